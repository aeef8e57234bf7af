"""Estimators of the gradient, one small file each, found by name (`dni_rnn.registry`). One interface for all.

    estimate = estimator(model, windows, state, weight)

adds to `.grad` of the model's parameters its estimate of

    ∂/∂θ  weight · Σ_windows Σ_scored targets  −log p(target)        (natural logarithm)

and returns what was measured on the way. The windows follow one another in time. The caller owns
zeroing, clipping and stepping. `--estimator NAME` trains with `dni_rnn.estimators.NAME`, an entry point of
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
      state: after the last window, detached.
    """

    loss: Tensor
    state: Tree


class Estimator(nn.Module):
    """Base of all estimators. Parameters and buffers of its own are registered, as in any module.

    An estimator may remember something of every row from call to call, besides the model's state: `begin`
    starts it, `memory` and `load_memory` save it, resume it and share it out with the rows.

    Attributes:
      lookahead: how many steps behind the last window it asks for. If there are any, training calls it as
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
        """So many rows begin, of this model. Called before the first window."""

    def memory(self) -> dict[str, Tensor]:
        """What is remembered of the rows, by name; rows in dimension -2 of every tensor."""
        return {}

    def load_memory(self, tensors: dict[str, Tensor]) -> None:
        """Go back to `memory`; `begin` was called with as many rows."""

    def flush(self) -> None:
        """Add to `.grad` what still waits to be added, and forget it: at the end of a sequence."""
