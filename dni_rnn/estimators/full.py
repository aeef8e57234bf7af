"""`full`: backpropagation through all windows of an update; and true gradients of states, for comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dni_rnn.estimators import Estimate, Estimator
from dni_rnn.penalty import StatePenalty
from dni_rnn.pytree import Tree, detach, flatten, has_rows, unflatten
from dni_rnn.recurrent import SequenceModel
from dni_rnn.window import Window, window_loss


class FullBPTT(Estimator):
    """Backpropagation through all given windows as if they were one; memory grows with their number.

    Args:
      penalty: see `TruncatedBPTT`.
    """

    def __init__(self, penalty: StatePenalty | None = None) -> None:
        super().__init__()
        self.penalty = penalty

    def forward(
        self, model: SequenceModel, windows: Sequence[Window], state: Tree, weight: float
    ) -> Estimate:
        state = detach(state) if self.penalty is None else self.penalty.measure(state, windows[0].start.done)
        losses, penalties = [], []
        for window in windows:
            state = model.reset(state, window.start.done)
            outputs, state = model.unroll(window.inputs, state)
            losses.append(window_loss(model.readout(outputs), window.targets))
            if self.penalty is not None:
                penalties.append(self.penalty(state, window.end.done))
        total = torch.stack(losses).sum()
        objective = weight * total
        (torch.stack([objective, *penalties]).sum() if penalties else objective).backward()
        return Estimate(total.detach(), detach(state))


def state_gradients(
    model: SequenceModel, windows: Sequence[Window], state: Tree, weight: float, horizons: Sequence[int]
) -> dict[int, Tree]:
    """True gradients with respect to `state` of the loss of the next n windows, for each n of `horizons`.

    n = 0 stands for all of `windows`. The loss is weight · Σ −log p; each gradient is a tree like `state`.
    The graph of all windows is held in memory at once.
    """
    leaves, spec = flatten(detach(state), has_rows)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    state, losses = unflatten(leaves, spec), []
    for window in windows:
        outputs, state = model.unroll(window.inputs, model.reset(state, window.start.done))
        losses.append(weight * window_loss(model.readout(outputs), window.targets))
    found = {}
    for horizon in horizons:
        coming = torch.stack(losses[: horizon or len(losses)]).sum()
        gradients = torch.autograd.grad(coming, leaves, retain_graph=True, materialize_grads=True)
        found[horizon] = unflatten(list(gradients), spec)
    return found


ESTIMATOR = FullBPTT
