"""A penalty on large recurrent states, for any estimator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dni_rnn.checks import Done, Layout
from dni_rnn.edges import without
from dni_rnn.pytree import Tree, unflatten
from dni_rnn.running_rms import ASKED, AllReduce, Running, follow, sum_of_squares

BEYOND = 3.0
"""tanh saturates beyond it, so a larger cell state gains nothing."""


class _Measure(torch.autograd.Function):
    """Identity forward. Backward: the gradient updates the penalty's RMS, and the graph ends."""

    @staticmethod
    def forward(ctx: Any, penalty: StatePenalty, done: Tensor | None, _: Tensor, *leaves: Tensor) -> Any:
        ctx.penalty, ctx.done = penalty, done
        return tuple(leaf.detach() for leaf in leaves)  # no views: it may be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.penalty._follow(gradients, ctx.done)
        return None, None, None, *[None] * len(gradients)


class StatePenalty(Running):
    """A loss term for any estimator that penalises elements of a recurrent state beyond ±3:

        penalty = strength · RMS · ½ Σ over rows and features of max(|state| − 3, 0)²

    at the state that ends a window. RMS is the running root mean square, over rows and features, of the
    gradient at a window's start, in units of the scalar on which backward is called; it is treated as a
    constant. So strength has units of 1/state: at 0.1, the penalty's gradient at an element 1 beyond the
    bound is a tenth of a typical gradient, whatever the scale of the loss and the batch size. Elements
    within the bound are not penalised.

    In a loop of truncated BPTT two lines change:

        state = penalty.measure(state)                      # was: detach
        output, state = lstm(x, state)
        loss = criterion(output, y) + penalty(state)        # was: criterion(output, y)

    Add it to the scalar on which backward is called, with no factor before it. Beside an `Interface`, which
    measures the same RMS, leave `measure` out and pass `rms=interface.target_rms()`, or if its `normalize` is
    off `rms=interface.target_square.sqrt()`.

    Args:
      strength: see above.
      decay: decay of the running RMS (`dni_rnn.running_rms.follow`).
      batch_dim: batch dimension of the state, a number or a tree of numbers (see `Interface`).

    A state without rows, such as the None of a first window, is accepted; its penalty is 0.

    Attributes:
      loss_scale, all_reduce: see `Interface`.

    Raises:
      ValueError, TypeError: called with a state or `done` that an `Interface` would refuse.
    """

    loss_scale: Tensor | float | None = None
    all_reduce: AllReduce | None = None
    mean_square: Tensor
    count: Tensor

    def __init__(self, strength: float, *, decay: float = 0.99, batch_dim: int | Tree | None = None) -> None:
        super().__init__()
        self.strength, self.decay, self.batch_dim = strength, decay, batch_dim
        self._layout = Layout(batch_dim)
        self.register_buffer("mean_square", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))

    def measure(self, state: Tree, done: Done = None) -> Tree:
        """Detach the state; in the backward pass its gradient updates the running RMS.

        Args:
          done: (B,) or (B, 1), as for an `Interface`: rows that begin a new sequence here; their gradients
            are ignored.
        """
        leaves, spec, done = self._layout.enter(state, done)
        leaves = [leaf.detach() for leaf in leaves]
        if not (leaves and torch.is_grad_enabled()):
            return unflatten(leaves, spec)
        return unflatten(_Measure.apply(self, done, ASKED, *leaves), spec)  # type: ignore[arg-type]

    def forward(self, state: Tree, done: Done = None, *, rms: Tensor | None = None) -> Tensor:
        """The penalty of the state that ends a window (a scalar), 0 in rows of `done`.

        Args:
          state: with its graph.
          done: as for `measure`, rows whose sequence ends here.
          rms: a scalar tensor to use instead of the RMS from `measure`.
        """
        rms = self.mean_square.sqrt() if rms is None else rms
        leaves, _, done = self._layout.enter(state, done)
        if not leaves:
            return rms.new_zeros(())
        rows = self._layout.rows(leaves)
        wide = torch.promote_types(rows.dtype, rms.dtype)
        excess = without(done, F.softshrink(rows, BEYOND)).to(wide)
        return (0.5 * self.strength) * rms.detach().to(wide) * sum_of_squares(excess)

    def _follow(self, gradients: tuple[Tensor, ...], done: Tensor | None) -> None:
        gradient = self._layout.rows(gradients).to(self.mean_square.dtype)
        if self.loss_scale is not None:
            gradient = gradient / self.loss_scale
        follow(self.mean_square, self.count, without(done, gradient), done, self.decay, self.all_reduce)

    def extra_repr(self) -> str:
        return f"strength={self.strength}"


torch.serialization.add_safe_globals([StatePenalty])
