"""Streams of windows. The position of a stream can be saved and restored."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dni_rnn.data.curriculum import Curriculum
from dni_rnn.errors import UsageError
from dni_rnn.window import Boundary, Window


class Stream(Protocol):
    """An endless source of consecutive windows of B batch rows."""

    batch_size: int

    curriculum: Curriculum | None
    """For a task that gets harder as it is learnt; the training loop reports the loss to it."""

    size: int
    """Symbols in one pass; for an endless source, what one evaluation reads."""

    def window(self, steps: int, context: int) -> Window:
        """The next window of at most `steps` steps; with `context` symbols known at its boundaries."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position of the stream, as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position."""
        ...

    def to(self, device: torch.device) -> Stream:
        """Move the data to a device."""
        ...


class TokenStream:
    """A text cut into B pieces of equal length that are read in parallel, over and over.

    Row b of a window continues row b of the one before. Inputs are symbols t, targets symbols t + 1.
    The last window of a pass may be shorter; at its end every row is done, and the next
    window starts from the beginning. At most B symbols at the end of the text are not used.

    The context at a boundary before input t is symbols t, t + 1, ..., t + W − 1, −1 past the end.
    """

    curriculum: Curriculum | None = None

    def __init__(self, tokens: np.ndarray, batch_size: int) -> None:
        steps = (len(tokens) - 1) // batch_size
        if steps < 1:
            raise UsageError(
                f"a text of {len(tokens)} symbols is too short for {batch_size} rows; "
                "use a longer text or a smaller --batch-size"
            )
        self.batch_size, self.length, self.position = batch_size, steps, 0
        self.size = steps * batch_size
        if not (tokens.flags.writeable and tokens.flags.c_contiguous):  # torch takes no other
            tokens = tokens.copy()
        # (length + 1, B), a view: a text is held once, in its own type.
        self._tokens = torch.from_numpy(tokens).as_strided((steps + 1, batch_size), (1, steps))
        self._end = torch.ones(batch_size, dtype=torch.bool)

    def to(self, device: torch.device) -> TokenStream:
        self._tokens, self._end = self._tokens.to(device), self._end.to(device)
        return self

    def window(self, steps: int, context: int) -> Window:
        first, last = self.position, min(self.position + steps, self.length)
        self.position = last % self.length
        read = self._symbols(first, last + 1)
        return Window(
            read[:-1],
            read[1:],
            self._boundary(first, context),
            self._boundary(last, context),
            (last - first) * self.batch_size,
        )

    def _symbols(self, first: int, last: int) -> Tensor:
        return self._tokens[first:last].to(torch.int64, memory_format=torch.contiguous_format)

    def _boundary(self, position: int, context: int) -> Boundary:
        end = position == self.length or position == 0
        if not context:
            return Boundary(None, self._end if end else None)
        # The end of one pass and the start of the next are one boundary: nothing is known beyond it.
        following = self._symbols(position, position if end else position + context)
        if len(following) < context:
            padding = following.new_full((context - len(following), self.batch_size), -1)
            following = torch.cat([following, padding])
        return Boundary(following, self._end if end else None)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not 0 <= state["position"] < self.length:
            raise ValueError(f"position {state['position']} in a text of {self.length} steps")
        self.position = state["position"]
