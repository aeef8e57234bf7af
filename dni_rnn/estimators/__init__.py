"""Estimators of the gradient, one small file each, found by name (`dni_rnn.registry`). One interface for all.

    estimate = estimator(model, windows, state, weight, memory)

adds to `.grad` of the model's parameters its estimate of

    ∂/∂θ  weight · Σ_windows Σ_scored targets  −log p(target)        (natural logarithm)

and returns what was measured on the way. The windows follow one another in time. The caller owns
zeroing, clipping and stepping. `--estimator NAME` trains with `dni_rnn.estimators.NAME`, an entry point of
the group `dni_rnn.estimators`, or `package.module:Estimator`; `NAME,option=value` passes keyword arguments.
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
      memory: what the estimator itself carries on to its next call, detached; see `Estimator.init_memory`.
    """

    loss: Tensor
    state: Tree
    memory: Tree = ()


class Estimator(nn.Module):
    """Base of all estimators. What has parameters or buffers of its own registers them, as a module does."""

    def init_memory(self, model: SequenceModel, batch_size: int) -> Tree:
        """What the estimator carries from call to call besides the model's state, before the first call.

        Tensors with the rows of the batch in dimension -2, in any tree; () for nothing. It is saved, resumed
        bit for bit, and shared out with the rows in data-parallel training.
        """
        return ()

    def forward(
        self, model: SequenceModel, windows: Sequence[Window], state: Tree, weight: float, memory: Tree = ()
    ) -> Estimate:
        """See the module."""
        raise NotImplementedError
