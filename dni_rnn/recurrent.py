"""A recurrent core that emits an output and a synthetic gradient of the future loss, and a model with it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from dni_rnn.cores import Core
from dni_rnn.interface import Interface
from dni_rnn.pytree import Tree, where_rows
from dni_rnn.window import Boundary


class CoreOutput(NamedTuple):
    """What a core emits for one window.

    Attributes:
      output: (T, B, H), of the top layer.
      state: state after the last step.
      synthetic_gradient: ĝ of the future loss with respect to `state`: a tree like it.
    """

    output: Tensor
    state: Tree
    synthetic_gradient: Tree


class RecurrentCore(nn.Module):
    """A recurrent net with an interface at its window boundaries.

    Args:
      rnn: the net, a `Core`: one of `dni_rnn.cores`, or your own.
      interface: with a synthesizer called with the state; None: no synthetic gradients.

    Source: Jaderberg et al. 2017, arXiv:1608.05343, §2.1 and Fig. 4.
    """

    rnn: Core

    def __init__(self, rnn: Core, interface: Interface | None = None) -> None:
        super().__init__()
        self.rnn, self.interface = rnn, interface

    def initial_state(self, batch_size: int) -> Tree:
        """`Core.initial_state`."""
        return self.rnn.initial_state(batch_size)

    def forward(self, inputs: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """Run over inputs (T, B, input size): outputs (T, B, output size), and the state after them."""
        return self.rnn(inputs, state)

    def emit(self, inputs: Tensor, state: Tree, boundary: Boundary) -> CoreOutput:
        """`forward`, and the synthetic gradient with respect to the final state.

        `boundary` is that at the end.

        Raises:
          ValueError: the core has no interface.
        """
        if self.interface is None:
            raise ValueError("this core has no interface: give it one when it is built")
        outputs, after = self(inputs, state)
        synthetic = self.interface.synthetic_gradient(after, boundary.context, boundary.done)
        return CoreOutput(outputs, after, synthetic)


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
        self.readout = nn.Linear(core.rnn.output_size, target_symbols)

    def initial_state(self, batch_size: int) -> Tree:
        """`Core.initial_state`."""
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
        return state if done is None else where_rows(done, self.initial_state(len(done)), state)

    def synthesizer_parameters(self) -> list[nn.Parameter]:
        """The parameters of M: they have their own learning rate and are not clipped with the net's."""
        return [] if self.core.interface is None else list(self.core.interface.parameters())

    def net_parameters(self) -> list[nn.Parameter]:
        """All parameters but M's."""
        theirs = {id(p) for p in self.synthesizer_parameters()}
        return [p for p in self.parameters() if id(p) not in theirs]
