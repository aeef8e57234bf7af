"""The running root mean square of the gradients at a boundary, the unit of predictions and penalties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

AllReduce = Callable[[Tensor], Tensor]
"""Tensor -> its sum over the processes that share the rows of a batch."""


ASKED = torch.zeros((), requires_grad=True)
"""An input that asks for a gradient, or the backward pass of an edge that measures one is not called. It gets
none. It is never made anew: in compiled code a tensor cannot begin to require a gradient."""


class Running(nn.Module):
    """A module whose own buffers stay float32 when it is converted to a narrower type: they move slowly."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            wide = before[name]
            if buffer is not None and wide is not None and buffer.element_size() < 4:
                self._buffers[name] = wide.to(buffer.device)
        return self


def sum_of_squares(rows: Tensor) -> Tensor:
    """Sum of squares of all elements (a scalar)."""
    flat = rows.flatten()
    return torch.dot(flat, flat)


def follow(
    mean_square: Tensor,
    count: Tensor,
    gradient: Tensor,
    done: Tensor | None,
    decay: float,
    all_reduce: AllReduce | None,
) -> tuple[Tensor, Tensor | float]:
    """Update a running mean square by one gradient, in place; a gradient that is not finite is skipped.

        mean_square ← mean_square + (mean of gradient² − mean_square) · max(1 / count, 1 − decay)

    that is, the mean of the first 1 / (1 − decay) gradients, then an exponential mean.

    Args:
      mean_square, count: scalars, the running statistics.
      gradient: (B, features), 0 in rows of `done`.
      done: (B,), rows that do not count; if all are done, nothing changes.
      decay: see above.
      all_reduce: given if the rows are shared among processes.

    Returns:
      1 if it was updated, else 0 (a scalar tensor); and the number of elements counted, over all processes (1
      for a batch without rows, as a safe divisor).
    """
    elements: Tensor | float = float(gradient.numel())
    if done is not None:
        elements = ((~done).sum() * gradient.shape[1]).to(gradient.dtype)
    square = sum_of_squares(gradient)
    if all_reduce is not None:
        square, elements = all_reduce(torch.stack([square, square.new_zeros(()) + elements]))
    square = square / elements  # not a number when no row is left
    moved = (square < torch.inf).to(square.dtype)
    count.add_(moved)
    rate = moved / count.clamp(1.0, 1.0 / (1.0 - decay))
    mean_square.lerp_(square.nan_to_num(0.0, 0.0), rate)
    return moved, elements if isinstance(elements, Tensor) else max(elements, 1.0)
