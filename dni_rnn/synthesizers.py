"""Synthesizers M(message, context) -> synthetic gradient, and the encoders of their context."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.checks import Layout, coming
from dni_rnn.pytree import Tree, flatten, flatten_rows, has_rows, part, unflatten
from dni_rnn.synthesizer_call import Critique


def units(widths: Sequence[int | Fraction], of: int) -> list[int]:
    """Widths as numbers of units; a fraction is relative to `of`, at least one unit."""
    return [width if isinstance(width, int) else max(1, round(width * of)) for width in widths]


class ContextEncoder(nn.Module):
    """Turns a context into features that are added to the first layer of a `ContextMLP`.

    A subclass allocates in `build`, which the `ContextMLP` calls once with its width, and maps a context of B
    rows to (B, width) in `forward`.
    """

    def build(self, width: int, *, zero: bool) -> None:
        """Allocate for `width` features; all zero if they are themselves a synthetic gradient."""
        raise NotImplementedError


class OneHotTokens(ContextEncoder):
    """A window of W symbols, one-hot per position, through one linear map.

        e = Σ_i  E_i[token_i],   i in [0, W)

    which is one table row per (position, symbol), so it costs W row additions and no product. With
    W = 1 and `symbols` classes it encodes labels.

    Args:
      symbols: number of distinct symbols.
      window: W.
      batch_first: tokens are (B, W), rows first; if W = B, shapes cannot show this.

    Shapes: tokens (W, B), or (B,) if W is 1, integers in [0, symbols), or -1 for unknown ones, which add
    nothing. Fewer than W are padded with unknown ones, as at the end of a text. Returns (B, width).

    Raises:
      ValueError: tokens of other shapes or of no integer type. A symbol out of range raises torch's index
        error, or a device-side assertion on a CUDA device.
    """

    table: nn.EmbeddingBag
    row_of: Tensor

    def __init__(self, symbols: int, window: int = 1, *, batch_first: bool = False) -> None:
        super().__init__()
        self.symbols, self.window, self.batch_first = symbols, window, batch_first

    def build(self, width: int, *, zero: bool) -> None:
        rows = self.symbols * self.window
        self.table = nn.EmbeddingBag(rows + 1, width, mode="sum", padding_idx=rows)
        nn.init.normal_(self.table.weight, std=0.0 if zero else self.window**-0.5)
        # The table's row of each symbol at each position, after that of the unknown one.
        known = torch.arange(rows).view(self.window, self.symbols)
        self.register_buffer("row_of", F.pad(known, (1, 0), value=rows), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = coming(tokens, self.window, self.batch_first, self.row_of.device)
        rows = self.row_of.gather(1, (tokens + 1).clamp_min_(0))
        return self.table(rows.t())


class ContextMLP(nn.Module):
    """A multilayer perceptron conditioned on a context, zero at the start.

        a_1 = W_1 x + b_1 + encoder(context);   a_{i+1} = W_{i+1} ReLU(norm(a_i)) + b_{i+1}

    The last layer's weight and bias start at zero, and so does a context that enters it. There is no
    nonlinearity at the output: a gradient has both signs. It is an M for messages that are vectors, or, with
    `kernel`, feature maps.

    Args:
      inputs, outputs: features of a row of x and of the result; with `kernel`, channels.
      hidden: widths of the hidden layers; none makes it linear.
      context: encoder of the context: `OneHotTokens` or another `ContextEncoder`.
      norm: batch normalisation of the hidden layers, as published; else norm is the identity. A batch of
        one row, which has no variance, is normalised by the running statistics.
      kernel: make every W a convolution of kernel × kernel (odd) that keeps the resolution. The context is
        then added equally at every position, as label planes through a convolution are (except at the border,
        where a kernel larger than 1 × 1 would see fewer of them).
      places: spatial dimensions of a feature map, with `kernel`: 1 for (B, C, length), 2, 3 for volumes.

    Shapes: x (B, inputs) -> (B, outputs), with `kernel` (B, inputs, height, width) -> (B, outputs, height,
    width), or as `places` gives.

    Raises:
      ValueError: `kernel` is even; or, when called, the context is missing, or x or the context has other
        sizes.

    Source: Jaderberg et al. 2017, arXiv:1608.05343, §A.1.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        context: ContextEncoder | None = None,
        *,
        norm: bool = False,
        kernel: int | None = None,
        places: int = 2,
    ) -> None:
        super().__init__()
        if kernel is not None and kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, not {kernel}: an even one shifts the map")
        widths = [inputs, *hidden, outputs]
        self.inputs, self.kernel, self.places = inputs, kernel, 0 if kernel is None else places
        self.batch_dim = None if kernel is None else 0
        if kernel is None:
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        else:
            convolution: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[places - 1]
            self.layers = nn.ModuleList(
                convolution(a, b, kernel, padding=kernel // 2) for a, b in pairwise(widths)
            )
        kind: Any = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[self.places]
        self.norms = nn.ModuleList(kind(width) if norm else nn.Identity() for width in hidden)
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)
        self.context = context
        if context is not None:
            context.build(widths[1], zero=not hidden)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        if x.dim() != 2 + self.places or x.shape[1] != self.inputs:
            wanted = ", ".join(["B", str(self.inputs), "length", "height", "width"][: 2 + self.places])
            raise ValueError(f"built for a message ({wanted}), not {tuple(x.shape)}")
        rows = x.shape[0]
        x = self.layers[0](x)
        if self.context is not None:
            if context is None:
                raise ValueError("built with a context encoder, so it must be called with a context")
            known = self.context(context)
            if known.dim() > 1 and known.shape[0] != rows:
                raise ValueError(
                    f"the context has {known.shape[0]} rows, the message {rows}: symbols are (W, B), "
                    "with batch_first (B, W)"
                )
            x = x + (known.reshape(*known.shape, *[1] * self.places) if self.places else known)
        for layer, norm in zip(self.layers[1:], self.norms, strict=True):
            x = layer(F.relu(_normalized(norm, x)))
        return x


def _normalized(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm` of x; uses the running statistics if each feature has one value only, and so no variance."""
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training and x.numel() == x.shape[1]:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return norm(x)


class Rows(nn.Module):
    """A message as (B, features), its tensors concatenated.

    Args:
      leaf: read only this part of the message, such as "hidden" of an `LSTMState` (its output, as
        published), which halves the cost of what follows; see `dni_rnn.pytree.part`. None reads all.
      bounded: apply a tanh, which keeps the features bounded when a cell state is not. Not needed for hidden
        states, which are within ±1.
      batch_dim: batch dimension of the message, a number or a tree of numbers (`Interface` reads it here).
    """

    def __init__(
        self, *, leaf: str | int | None = None, bounded: bool = False, batch_dim: int | Tree | None = None
    ) -> None:
        super().__init__()
        self.leaf, self.bounded, self.batch_dim = leaf, bounded, batch_dim
        self._dims = Layout(batch_dim if isinstance(batch_dim, int | None) else part(batch_dim, leaf)).dims

    def forward(self, message: Tree) -> Tensor:
        x = flatten_rows(part(message, self.leaf), self._dims)
        # tanh by way of the sigmoid, several times faster on a CPU.
        return torch.sigmoid(2.0 * x).mul(2.0).sub(1.0) if self.bounded else x


class MLPSynthesizer(nn.Module):
    """M as a `ContextMLP` on the rows of the message, after a bounded nonlinearity.

        M(message, context) = MLP(tanh(row of the message), context)

    M ≡ 0 at the start, so the first update is that of truncated BPTT. A row of the message is all its
    tensors concatenated: 2·layers·H features for an LSTM, layers·H for a GRU. It is for vectors and states;
    for feature maps see `ContextMLP`.

    Args:
      message: an example; only its structure and the shapes of its rows are used.
      hidden, context: see `ContextMLP`.
      leaf, bounded, batch_dim: see `Rows`.

    Shapes: a message of B rows -> (B, features), the concatenated gradients of its tensors.

    Raises:
      ValueError: `batch_dim` does not fit the message; or, when called, a message has other features than
        the example.

    Source: Jaderberg et al. 2017, arXiv:1608.05343, §A.1 (zero start), §A.3 (one hidden layer).
    """

    def __init__(
        self,
        message: Tree,
        hidden: Sequence[int] = (),
        *,
        context: ContextEncoder | None = None,
        leaf: str | int | None = None,
        bounded: bool = True,
        batch_dim: int | Tree | None = None,
    ) -> None:
        super().__init__()
        self.rows = Rows(leaf=leaf, bounded=bounded, batch_dim=batch_dim)
        layout = Layout(batch_dim)
        leaves, *_ = layout.enter(message)
        outputs = layout.rows(leaves).shape[1]
        self.mlp = ContextMLP(self.rows(message).shape[1], hidden, outputs, context)

    def forward(self, message: Tree, context: Any = None) -> Tensor:
        return self.mlp(self.rows(message), context)


class Critic(nn.Module):
    """M as the derivative of a predicted loss, that of a classifier of the message with the coming targets.

        ℓ_row    = Σ_i −log softmax(classifier(message)_i)[target_i],   i in [0, W)
        gradient = weight · ∂(Σ_rows ℓ_row)/∂message

    The context is the coming targets: the labels (W = 1) between two layers, the next W targets at the
    boundary of a recurrent net. The classifier is trained on `loss_weight` · ℓ (mean over rows), as if it
    were all that follows the message, and by the `Interface` on the match of M's gradient with the true one,
    through the second derivative. So, unlike a regression, M has the right direction and size before the
    first true gradient arrives, and the match corrects it. A classifier that starts at zero makes M start at
    zero.

    Args:
      classifier: message -> logits, (B, W·symbols), position by position. For a vector a `ContextMLP`;
        for states and feature maps one after `Rows`.
      symbols: number of distinct targets.
      weight: weight of a target in the scalar on which backward is called; None, the default, is 1 / B, for a
        loss that is a mean over rows.
      batch_first: targets are (B, W) (see `OneHotTokens`).
      loss_weight: weight of ℓ, in nats, relative to the match. The match draws the classifier from its own
        task to the net's, and more of it was worse (MNIST, 6 layers, validation error after 10 passes: 1.88 %
        with 100, 2.12 % with 10).

    Shapes: context (B,) or (W, B), integers, -1 for an unknown target (which adds nothing), as for
    `OneHotTokens`. Returns a `Critique`: the gradient like the message, and loss_weight · ℓ, (B,).

    `torch.compile` cannot differentiate twice: in a compiled function a critic is a graph break and warns
    once; `fullgraph=True` fails.

    Raises:
      ValueError: called without a context, or with one of another size or type.

    Source: Czarnecki et al. 2017, "Sobolev Training for Neural Networks", arXiv:1706.04859, §4.3; there ℓ
    is regressed on the final loss, here it is trained on the target itself.
    """

    def __init__(
        self,
        classifier: nn.Module,
        symbols: int,
        *,
        weight: float | None = None,
        loss_weight: float = 100.0,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        self.classifier, self.symbols, self.batch_first = classifier, symbols, batch_first
        self.weight, self.loss_weight = weight, loss_weight

    def forward(self, message: Tree, context: Any = None) -> Critique:
        if context is None:
            raise ValueError("a critic must be called with the coming targets as context")
        if torch.compiler.is_compiling():
            return _not_compiled(self, message, context)  # type: ignore[call-arg]
        return self.criticize(message, context)

    def criticize(self, message: Tree, context: Any) -> Critique:
        """`forward`, never compiled."""
        leaves, spec = flatten(message, has_rows)
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            logits = self.classifier(unflatten(leaves, spec))
            losses, slope = _losses(logits, context, self.symbols, self.batch_first)
            slope = slope * (1.0 / max(len(losses), 1) if self.weight is None else self.weight)
            gradients = torch.autograd.grad(
                logits, leaves, slope, create_graph=differentiable, materialize_grads=True
            )
        return Critique(unflatten(gradients, spec), self.loss_weight * losses)


def _losses(
    logits: Tensor, targets: Tensor, symbols: int, batch_first: bool = False
) -> tuple[Tensor, Tensor]:
    """ℓ (B,), and its derivative with respect to the logits, softmax − one-hot, as a function of them."""
    each = logits.unflatten(1, (-1, symbols))  # (B, W, symbols)
    targets = coming(targets, each.shape[1], batch_first, logits.device)
    if targets.shape[1] != len(each):
        raise ValueError(
            f"the context has {targets.shape[1]} rows, the message {len(each)}: targets are (W, B), "
            "with batch_first (B, W)"
        )
    targets = targets.t().unsqueeze(2)
    known, places = targets >= 0, targets.clamp_min(0)
    predicted = F.log_softmax(each, 2)
    losses = -torch.where(known, predicted.gather(2, places), 0.0).sum((1, 2))
    wanted = torch.zeros_like(predicted).scatter_(2, places, 1.0)
    return losses, torch.where(known, predicted.exp() - wanted, 0.0).flatten(1)


# As in `torch.compiler`, whose import takes seconds and is needed only when something is compiled.
@torch._disable_dynamo  # type: ignore[reportPrivateImportUsage]
def _not_compiled(critic: Critic, message: Tree, context: Any) -> Critique:
    warnings.warn("torch.compile cannot differentiate twice: a Critic runs outside of it", stacklevel=2)
    return critic.criticize(message, context)


class ErrorFeedback(nn.Module):
    """M as a linear map of the error of a local classifier, without second derivatives.

        e        = softmax(W h + b) − onehot(target)     per row, position by position
        ℓ_row    = Σ_i −log softmax(W h + b)_i[target_i],   i in [0, W)
        gradient = weight · (W + U)ᵀ e

    h is a row of the message. W and b are trained only on `loss_weight` · ℓ, as a local loss, and U only on
    the match with the true gradient. All start at zero. With U = 0 it is the gradient of that local loss (a
    linear `Critic` without the match); U maps it to the true gradient, as far as the error determines that.
    Below a linear last layer this is the form of the true gradient.

    M's error shrinks with e, and is zero where e is: M does not fall behind a convolutional net, as a
    regression on activations does (results/cifar).

    Args:
      message: an example, with rows in dimension 0; only the shape of its rows is used.
      symbols: number of distinct targets.
      window: targets per row, W of the sum.
      weight, loss_weight: see `Critic`.

    Shapes: message (B, ...), context (B,) or (window, B), integers, -1 for an unknown target (which adds
    nothing). Returns a `Critique`: the gradient as rows (B, features), and loss_weight · ℓ, (B,).

    Raises:
      ValueError: called without a context, or with one of another size or type.

    Source: the error fed back to lower layers through separate weights: Nøkland 2016, "Direct Feedback
    Alignment", arXiv:1609.01596 (the net's error, fixed random U).
    """

    batch_dim = 0

    def __init__(
        self,
        message: Tensor,
        symbols: int,
        window: int = 1,
        *,
        weight: float | None = None,
        loss_weight: float = 100.0,
    ) -> None:
        super().__init__()
        self.symbols, self.weight, self.loss_weight = symbols, weight, loss_weight
        features = message[0].numel()
        self.classifier = nn.Linear(features, window * symbols)
        self.feedback = nn.Linear(window * symbols, features, bias=False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, message: Tensor, context: Any = None) -> Critique:
        if context is None:
            raise ValueError("an error needs targets: call it with them as context")
        losses, error = _losses(self.classifier(message.flatten(1)), context, self.symbols)
        error = error.detach() * (1.0 / max(len(losses), 1) if self.weight is None else self.weight)
        gradient = self.feedback(error) + F.linear(error, self.classifier.weight.detach().t())
        return Critique(gradient, self.loss_weight * losses)


torch.serialization.add_safe_globals([OneHotTokens, ContextMLP, Rows, MLPSynthesizer, Critic, ErrorFeedback])
