"""`bptt`: truncated backpropagation through time, the baseline of all others and the loop that they share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dni_rnn.estimators import Estimate, Estimator
from dni_rnn.penalty import StatePenalty
from dni_rnn.pytree import Tree, detach
from dni_rnn.recurrent import SequenceModel
from dni_rnn.window import Boundary, Window, window_loss


class TruncatedBPTT(Estimator):
    """Backpropagation within each window; nothing crosses a boundary.

    One window per update is the textbook form. Several accumulate their gradients, and the state is
    carried, so that methods with different T can update after the same number of symbols.

    Args:
      penalty: on the state that ends each window, a term of the objective.

    Source: Williams & Peng 1990, "An efficient gradient-based algorithm for on-line training of
    recurrent network trajectories".
    """

    def __init__(self, penalty: StatePenalty | None = None) -> None:
        super().__init__()
        self.penalty = penalty

    def forward(
        self, model: SequenceModel, windows: Sequence[Window], state: Tree, weight: float, memory: Tree = ()
    ) -> Estimate:
        losses = []
        for window in windows:
            state = self.enter(model, model.reset(state, window.start.done), window.start)
            outputs, state = model.unroll(window.inputs, state)
            loss = window_loss(model.readout(outputs), window.targets)
            objective = weight * loss
            for term in self.leave(model, window, outputs, state, weight):
                objective = objective + term
            objective.backward()
            losses.append(loss.detach())
            state = detach(state)
        return Estimate(losses[0] if len(losses) == 1 else torch.stack(losses).sum(), state)

    def enter(self, model: SequenceModel, state: Tree, start: Boundary) -> Tree:
        """The state as the window takes it over."""
        return detach(state) if self.penalty is None else self.penalty.measure(state, start.done)

    def leave(
        self, model: SequenceModel, window: Window, outputs: Tensor, state: Tree, weight: float
    ) -> list[Tensor]:
        """Terms of the objective besides the window's loss."""
        return [] if self.penalty is None else [self.penalty(state, window.end.done)]


ESTIMATOR = TruncatedBPTT
