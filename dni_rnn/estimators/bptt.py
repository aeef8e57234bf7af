"""`bptt`: truncated backpropagation through time, the baseline, and the loop that others share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dni_rnn.estimators import Estimate, Estimator
from dni_rnn.penalty import StatePenalty
from dni_rnn.pytree import Tree, detach
from dni_rnn.recurrent import SequenceModel
from dni_rnn.traces import Traced
from dni_rnn.window import Boundary, Window, window_loss

TraceSteps = int | Literal["all"]


class TruncatedBPTT(Estimator):
    """Backpropagation within each window; no gradient crosses a boundary.

    One window per update is the textbook form. The gradients of several windows add up, and the state is
    carried, so that methods with different T can update after the same number of symbols.

    Args:
      penalty: state penalty at the end of each window, a term of the objective.
      trace: length in steps of a trace (`dni_rnn.traces.Traced`) of the steps before a window; 0: none,
        "all": every step, in the carried form. The gradient at the start of a window then reaches these
        steps, along each cell's own path (exactly in an element-wise core), including the embedding.
      trace_decay: factor on the trace per step.

    Raises:
      ValueError: called with a trace and a model for which `begin` was not called.

    Source: Williams & Peng 1990, "An efficient gradient-based algorithm for on-line training of
    recurrent network trajectories".
    """

    def __init__(
        self, penalty: StatePenalty | None = None, trace: TraceSteps = 0, trace_decay: float = 1.0
    ) -> None:
        super().__init__()
        self.penalty, self.trace, self.trace_decay = penalty, trace, trace_decay
        self._traced: list[Traced] = []  # in a list, since its core belongs to the model, not to this module

    def begin(self, model: SequenceModel, batch_size: int) -> None:
        if self.trace:
            core: Any = model.core.rnn
            steps = None if isinstance(self.trace, str) else self.trace
            self._traced = [Traced(core, steps, self.trace_decay, embedding=model.embedding)]

    def memory(self) -> dict[str, Tensor]:
        return {f"trace.{name}": t for traced in self._traced for name, t in traced.named_state().items()}

    def load_memory(self, tensors: dict[str, Tensor]) -> None:
        for traced in self._traced:
            traced.load_named_state({name.removeprefix("trace."): t for name, t in tensors.items()})

    def flush(self) -> None:
        for traced in self._traced:
            traced.flush()

    def forward(
        self, model: SequenceModel, windows: Sequence[Window], state: Tree, weight: float
    ) -> Estimate:
        if self.trace and [traced.core for traced in self._traced] != [model.core.rnn]:
            raise ValueError("a trace is of one model's rows: call begin(model, rows) before a first window")
        losses = []
        for window in windows:
            state = self.enter(model, model.reset(state, window.start.done), window.start)
            outputs, state = self.unroll(model, window, state)
            loss = window_loss(model.readout(outputs), window.targets)
            objective = weight * loss
            for term in self.leave(model, window, outputs, state, weight):
                objective = objective + term
            objective.backward()
            losses.append(loss.detach())
            state = detach(state)
        return Estimate(losses[0] if len(losses) == 1 else torch.stack(losses).sum(), state)

    def unroll(self, model: SequenceModel, window: Window, state: Tree) -> tuple[Tensor, Tree]:
        """The core's outputs over a window, and the state after it."""
        for traced in self._traced:
            return traced(window.inputs, state, window.start.done)
        return model.unroll(window.inputs, state)

    def enter(self, model: SequenceModel, state: Tree, start: Boundary) -> Tree:
        """The state at the start of a window."""
        return detach(state) if self.penalty is None else self.penalty.measure(state, start.done)

    def leave(
        self, model: SequenceModel, window: Window, outputs: Tensor, state: Tree, weight: float
    ) -> list[Tensor]:
        """Terms of the objective besides the window's loss."""
        return [] if self.penalty is None else [self.penalty(state, window.end.done)]


ESTIMATOR = TruncatedBPTT
