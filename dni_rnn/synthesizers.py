"""Synthesizers M(message, context) -> synthetic gradient, and the encoders of their context."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.trees import Tree, flatten, flatten_rows, unflatten


class ContextEncoder(nn.Module):
    """Turns a context into features that are added to the first layer of a `ContextMLP`."""

    def build(self, width: int, *, zero: bool) -> None:
        """Allocate for `width` features; all zero when they are themselves a synthetic gradient."""
        raise NotImplementedError


class OneHotTokens(ContextEncoder):
    """A window of W symbols, one-hot per position, through one linear map.

        e = Σ_i  E_i[token_i],   i in [0, W)

    which is one table row per (position, symbol), so it costs W row additions and no product. With
    W = 1 and `symbols` classes it encodes labels.

    Args:
      symbols: number of distinct symbols.
      window: W.

    Shapes: tokens (W, B), or (B,) when W is 1, integers in [0, symbols), or -1 where nothing is known
    (past the end of a sequence), which adds nothing. Returns (B, width).
    """

    table: nn.EmbeddingBag

    def __init__(self, symbols: int, window: int = 1) -> None:
        super().__init__()
        self.symbols, self.window = symbols, window

    def build(self, width: int, *, zero: bool) -> None:
        rows = self.symbols * self.window
        self.table = nn.EmbeddingBag(rows + 1, width, mode="sum", padding_idx=rows)
        nn.init.normal_(self.table.weight, std=0.0 if zero else self.window**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.reshape(self.window, -1)
        offsets = torch.arange(self.window, device=tokens.device).mul_(self.symbols).unsqueeze(1)
        rows = torch.where(tokens < 0, self.symbols * self.window, tokens + offsets)
        return self.table(rows.t())


class EmbeddedTokens(ContextEncoder):
    """A window of W symbols, each embedded by one shared table, then one linear map of them all.

    Smaller than `OneHotTokens` when there are many symbols: symbols·embedding + W·embedding·width
    weights instead of W·symbols·width. Shapes as there.
    """

    project: nn.Linear

    def __init__(self, symbols: int, window: int = 1, embedding: int = 32) -> None:
        super().__init__()
        self.symbols, self.window = symbols, window
        self.embed = nn.Embedding(symbols + 1, embedding, padding_idx=symbols)

    def build(self, width: int, *, zero: bool) -> None:
        self.project = nn.Linear(self.window * self.embed.embedding_dim, width, bias=False)
        if zero:
            nn.init.zeros_(self.project.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.reshape(self.window, -1)
        embedded = self.embed(torch.where(tokens < 0, self.symbols, tokens))
        return self.project(embedded.transpose(0, 1).flatten(1))


class ContextMLP(nn.Module):
    """A multilayer perceptron that is also told a context, and starts by saying zero.

        a_1 = W_1 x + b_1 + encoder(context);   a_{i+1} = W_{i+1} ReLU(a_i) + b_{i+1}

    The last layer's weight and bias start at zero, and so does a context that enters it. There is no
    nonlinearity at the output: a gradient has both signs.

    Args:
      inputs, outputs: features of a row of x and of the result.
      hidden: widths of the hidden layers; none makes it linear.
      context: encoder of the context: `OneHotTokens`, `EmbeddedTokens` or another `ContextEncoder`.

    Shapes: x (B, inputs) -> (B, outputs).
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], outputs: int, context: ContextEncoder | None = None
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden, outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)
        self.context = context
        if context is not None:
            context.build(widths[1], zero=not hidden)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        x = self.layers[0](x)
        if self.context is not None:
            if context is None:
                raise ValueError("built with a context encoder, so it must be called with a context")
            x = x + self.context(context)
        for layer in self.layers[1:]:
            x = layer(F.relu(x))
        return x


class MLPSynthesizer(nn.Module):
    """M as a `ContextMLP` on one row of the message, after a bounded nonlinearity.

        M(message, context) = MLP(tanh(message row, its tensors side by side), context)

    The tanh keeps M's input bounded when a cell state is not. M ≡ 0 at the start, so the first update
    is that of truncated BPTT.

    Args:
      message: an example; only its structure and the shapes of its rows are used.
      hidden, context: see `ContextMLP`.
      reads: "all" the tensors of the message, or the "first" alone (of an LSTM's state the hidden one,
        which is its output, as published), which halves the cost of the first layer.
      bounded: apply the tanh. Without it the message enters as it is: good for hidden states, which are
        within ±1 anyway.
      batch_dim: where the rows lie (see `Interface`).

    Source: Jaderberg et al. 2017, arXiv:1608.05343, §A.1 (zero start), §A.3 (one hidden layer).
    """

    def __init__(
        self,
        message: Tree,
        hidden: Sequence[int] = (),
        *,
        context: ContextEncoder | None = None,
        reads: Literal["all", "first"] = "all",
        bounded: bool = True,
        batch_dim: int = -2,
    ) -> None:
        super().__init__()
        self.reads, self.bounded, self.batch_dim = reads, bounded, batch_dim
        read = message if reads == "all" else flatten(message)[0][0]
        inputs, outputs = (flatten_rows(tree, batch_dim).shape[1] for tree in (read, message))
        self.mlp = ContextMLP(inputs, hidden, outputs, context)

    def forward(self, message: Tree, context: Any = None) -> Tree:
        leaves, spec = flatten(message)
        x = flatten_rows(leaves if self.reads == "all" else leaves[0], self.batch_dim)
        if self.bounded:
            x = torch.sigmoid(2.0 * x).mul(2.0).sub(1.0)  # tanh; several times faster than it on a CPU
        x = self.mlp(x, context)
        parts = x.split([leaf.numel() // leaf.shape[self.batch_dim] for leaf in leaves], dim=1)
        return unflatten([self._shape(part, leaf) for part, leaf in zip(parts, leaves, strict=True)], spec)

    def _shape(self, part: Tensor, leaf: Tensor) -> Tensor:
        """Rows (B, features) back into the shape of `leaf`."""
        if leaf.dim() == 3 and leaf.shape[0] == 1 and self.batch_dim == -2:
            return part.unsqueeze(0)  # one layer: the same, in one step
        return part.reshape(leaf.movedim(self.batch_dim, 0).shape).movedim(0, self.batch_dim)
