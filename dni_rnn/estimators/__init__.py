"""Gradient estimators with one interface, one small file each, found by name (`dni_rnn.registry`).

    estimate = estimator(model, windows, state, weight)

adds to `.grad` of the model's parameters its estimate of

    ∂/∂θ  weight · Σ_windows Σ_scored targets  −log p(target)        (natural logarithm)

and returns loss and state. The windows follow one another in time. The caller zeroes and clips gradients and
steps the optimizer. `--estimator NAME` trains with `dni_rnn.estimators.NAME`, an entry point of
the group `dni_rnn.estimators`, or `package.module:Estimator`; `NAME,option=value` passes keyword arguments,
and `--restore` one more, `penalty`, a `StatePenalty`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from dni_rnn.pytree import Tree
from dni_rnn.window import Window

if TYPE_CHECKING:
    from dni_rnn.recurrent import SequenceModel


class Estimate(NamedTuple):
    """What an estimator returns. Gradients are in `.grad`.

    Attributes:
      loss: sum over the windows' scored targets of −log p, in nats, detached (a scalar).
      state: state after the last window, detached.
    """

    loss: Tensor
    state: Tree


class Estimator(nn.Module):
    """Base of all estimators. Parameters and buffers of its own are registered, as in any module.

    An estimator may keep a memory per row from call to call, besides the model's state: `begin` starts it,
    `memory` and `load_memory` save it, restore it and share it among processes with the rows.

    Attributes:
      lookahead: how many steps after the last window it needs. If not 0, training calls it as
        `estimator(model, windows, state, weight, ahead)`, with windows of so many steps.
    """

    lookahead: int = 0

    def __init__(self) -> None:
        super().__init__()

    def forward(
        self, model: SequenceModel, windows: Sequence[Window], state: Tree, weight: float
    ) -> Estimate:
        """See the module."""
        raise NotImplementedError

    def begin(self, model: SequenceModel, batch_size: int) -> None:
        """Start with so many rows of this model. Called before the first window."""

    def memory(self) -> dict[str, Tensor]:
        """The memory per row, by name; rows in dimension -2 of every tensor."""
        return {}

    def load_memory(self, tensors: dict[str, Tensor]) -> None:
        """Restore `memory`; `begin` was called with as many rows."""

    def flush(self) -> None:
        """Add pending gradients to `.grad` and forget them: at the end of a sequence."""
