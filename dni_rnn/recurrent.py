"""Recurrent cores that emit an output and the synthetic gradient of the future loss, and a model on them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dni_rnn.interface import Interface
from dni_rnn.pytree import LSTMState, Tree, map_tree, where_rows

Kind = Literal["lstm", "gru", "rnn"]
Reading = Literal["boundary", "next-output"]

RNNS: dict[str, type[nn.LSTM] | type[nn.GRU] | type[nn.RNN]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Boundary(NamedTuple):
    """What is known at the boundary between two windows, besides the state.

    Attributes:
      context: what M may know: the next W symbols, integers (W, B), -1 past the end; or nothing.
      next_input: the first input symbols after the boundary, integers (B,); or nothing.
      done: boolean (B,), rows whose sequence ends here: the state is reset, and no gradient
        crosses; or nothing, when none ends.
    """

    context: Tensor | None = None
    next_input: Tensor | None = None
    done: Tensor | None = None


class CoreOutput(NamedTuple):
    """What a core emits for one window.

    Attributes:
      output: (T, B, H), the top layer's.
      state: after the last step.
      synthetic_gradient: ĝ of the loss to come with respect to `state`: a tree like it.
    """

    output: Tensor
    state: Tree
    synthetic_gradient: Tree


class _NextState(nn.Module):
    """The second published reading: M looks at what the core makes of the next input.

    The context is (the state one step on, the context proper)."""

    def __init__(self, synthesizer: nn.Module) -> None:
        super().__init__()
        self.synthesizer = synthesizer

    def forward(self, message: Tree, context: tuple[Tree, Tensor | None]) -> Tree:
        seen, context_proper = context
        return self.synthesizer(seen, context_proper)


class RecurrentCore(nn.Module):
    """An LSTM, GRU or tanh RNN (torch's own, fused) with an interface at its window boundaries.

    `core.rnn` is a plain `nn.LSTM`, `nn.GRU` or `nn.RNN`: load weights into it and take them out with
    its `state_dict`. Without a synthesizer the core is that module and nothing else.

    Args:
      kind: "lstm", "gru" or "rnn" (tanh).
      input_size, hidden_size, num_layers: as in torch.
      synthesizer: M, called with the state: `LSTMState`, or h (layers, B, H) for the others. For
        instance `MLPSynthesizer(state, ...)` with a state of one row.
      reading: which state M reads. "boundary": the state that crosses the boundary, as in the paper's
        equations. "next-output": the state one step on, after the first input of the next window, as
        the paper's figures suggest (one more step of the core per boundary, without gradient).
      scale, centre, restore: see `Interface`.

    Source: Jaderberg et al. 2017, arXiv:1608.05343, §2.1 and Fig. 4.
    """

    def __init__(
        self,
        kind: Kind,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        synthesizer: nn.Module | None = None,
        reading: Reading = "boundary",
        scale: float = 1.0,
        centre: bool = False,
        restore: float = 0.0,
    ) -> None:
        super().__init__()
        self.kind, self.reading = kind, reading
        self.rnn = RNNS[kind](input_size, hidden_size, num_layers)
        self.interface: Interface | None = None
        if synthesizer is not None:
            m = _NextState(synthesizer) if reading == "next-output" else synthesizer
            self.interface = Interface(m, scale=scale, centre=centre, restore=restore)

    def initial_state(self, batch_size: int) -> Tree:
        """Zeros, on the device and in the dtype of the weights."""
        weight = next(self.rnn.parameters())
        zeros = weight.new_zeros(self.rnn.num_layers, batch_size, self.rnn.hidden_size)
        return LSTMState(zeros, zeros.clone()) if self.kind == "lstm" else zeros

    def forward(self, inputs: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """Run over inputs (T, B, input_size): outputs (T, B, H) and the state after them."""
        outputs, after = self.rnn(inputs, state)
        return outputs, LSTMState(*after) if self.kind == "lstm" else after

    def emit(
        self, inputs: Tensor, state: Tree, boundary: Boundary, next_inputs: Tensor | None = None
    ) -> CoreOutput:
        """`forward`, and the synthetic gradient with respect to the state it ends in.

        `boundary` describes that end; `next_inputs` (B, input_size) is what the core will see next,
        needed by the reading "next-output" alone.

        Raises:
          ValueError: the core has no synthesizer, or `next_inputs` are missing.
        """
        outputs, after = self(inputs, state)
        context = self._context(after, boundary, next_inputs)
        synthetic = self._interface().synthetic_gradient(after, context, boundary.done)
        return CoreOutput(outputs, after, synthetic)

    def predict_gradient(self, state: Tree, boundary: Boundary, next_inputs: Tensor | None = None) -> Tree:
        """`Interface.predict` at a boundary."""
        return self._interface().predict(state, self._context(state, boundary, next_inputs), boundary.done)

    def audit(self, state: Tree, real: Tree, boundary: Boundary, next_inputs: Tensor | None = None) -> None:
        """`Interface.audit` at a boundary."""
        context = self._context(state, boundary, next_inputs)
        self._interface().audit(state, real, context, boundary.done)

    def receive(self, state: Tree, boundary: Boundary, next_inputs: Tensor | None = None) -> Tree:
        """`Interface.receive` at the start of a window."""
        return self._interface().receive(state, self._context(state, boundary, next_inputs), boundary.done)

    def send(self, state: Tree, boundary: Boundary, next_inputs: Tensor | None = None) -> Tensor:
        """`Interface.send` at the end of a window."""
        return self._interface().send(state, self._context(state, boundary, next_inputs), boundary.done)

    def _interface(self) -> Interface:
        if self.interface is None:
            raise ValueError("this core has no synthesizer: give it one when it is built")
        return self.interface

    def _context(self, state: Tree, boundary: Boundary, next_inputs: Tensor | None) -> object:
        if self.reading == "boundary":
            return boundary.context
        if next_inputs is None:
            raise ValueError('the reading "next-output" needs the next inputs at every boundary')
        with torch.no_grad():
            return self(next_inputs.unsqueeze(0), state)[1], boundary.context


class SequenceModel(nn.Module):
    """Symbols in, logits out: embedding, recurrent core, linear readout.

    Args:
      input_symbols, target_symbols: vocabulary sizes.
      embedding: width of the input embedding.
      core: the recurrent core; its input size is `embedding`.
    """

    def __init__(self, input_symbols: int, target_symbols: int, embedding: int, core: RecurrentCore) -> None:
        super().__init__()
        self.embedding = nn.Embedding(input_symbols, embedding)
        self.core = core
        self.readout = nn.Linear(core.rnn.hidden_size, target_symbols)

    def initial_state(self, batch_size: int) -> Tree:
        """Zeros (see `RecurrentCore.initial_state`)."""
        return self.core.initial_state(batch_size)

    def forward(self, symbols: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """symbols (T, B) -> logits (T, B, target symbols), and the state after the last step."""
        outputs, state = self.unroll(symbols, state)
        return self.readout(outputs), state

    def unroll(self, symbols: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """symbols (T, B) -> the core's outputs (T, B, H), and the state after the last step."""
        return self.core(self.embedding(symbols), state)

    def reset(self, state: Tree, done: Tensor | None) -> Tree:
        """Put the initial state into the rows of `done` (B,)."""
        if done is None:
            return state
        return where_rows(done, map_tree(torch.zeros_like, state), state)

    def receive(self, state: Tree, boundary: Boundary) -> Tree:
        """Take the state over at the start of a window."""
        return self.core.receive(state, boundary, self._next_inputs(boundary))

    def send(self, state: Tree, boundary: Boundary) -> Tensor:
        """Zero-valued; add it to the loss of the window that ends in `state`."""
        return self.core.send(state, boundary, self._next_inputs(boundary))

    def predict_gradient(self, state: Tree, boundary: Boundary) -> Tree:
        """M's output at a boundary, in units of its target's size, without gradient; 0 in rows of `done`."""
        return self.core.predict_gradient(state, boundary, self._next_inputs(boundary))

    def audit(self, state: Tree, real: Tree, boundary: Boundary) -> None:
        """Weigh ĝ by a comparison with the real gradient at a boundary (`Interface.audit`)."""
        self.core.audit(state, real, boundary, self._next_inputs(boundary))

    def synthesizer_parameters(self) -> list[nn.Parameter]:
        """The parameters of M: they learn with a rate of their own and are not clipped with the net's."""
        return [] if self.core.interface is None else list(self.core.interface.parameters())

    def net_parameters(self) -> list[nn.Parameter]:
        """All parameters but M's."""
        theirs = {id(p) for p in self.synthesizer_parameters()}
        return [p for p in self.parameters() if id(p) not in theirs]

    def _next_inputs(self, boundary: Boundary) -> Tensor | None:
        if boundary.next_input is None or self.core.reading == "boundary":
            return None
        with torch.no_grad():
            return self.embedding(boundary.next_input)
