"""Windows of a stream, and what is known at the boundaries between them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

UNSCORED = -100
"""The target of a step that is not scored."""


class Boundary(NamedTuple):
    """What is known at the boundary between two windows, besides the state.

    Attributes:
      context: what M is conditioned on: coming symbols, integers (W, B), -1 past the end; or nothing.
      done: boolean (B,), rows whose sequence ends here: the state is reset, and no gradient
        crosses; or nothing, when none ends.
    """

    context: Tensor | None = None
    done: Tensor | None = None

    def of_rows(self, rows: slice) -> Boundary:
        """The boundary of some rows."""
        return Boundary(*(None if values is None else values[..., rows] for values in self))


class Window(NamedTuple):
    """T steps of a stream of B batch rows.

    Attributes:
      inputs: (T, B) symbols.
      targets: (T, B) symbols, `UNSCORED` where a step does not count.
      start: what is known at the boundary before it.
      end: what is known at the boundary after it; `start` of the next window.
      scored: number of targets that count.
    """

    inputs: Tensor
    targets: Tensor
    start: Boundary
    end: Boundary
    scored: int

    def of_rows(self, rows: slice) -> Window:
        """The window of some rows; `scored` still counts all rows."""
        return self._replace(
            inputs=self.inputs[:, rows],
            targets=self.targets[:, rows],
            start=self.start.of_rows(rows),
            end=self.end.of_rows(rows),
        )


def window_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of −log p(target) in nats over the scored targets: logits (T, B, V), targets (T, B)."""
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten().long(), ignore_index=UNSCORED, reduction="sum"
    )
