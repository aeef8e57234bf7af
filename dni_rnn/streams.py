"""Streams: where windows come from. A stream knows where it stands and can be put back there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch

from dni_rnn.errors import UsageError
from dni_rnn.estimators import UNSCORED, Window
from dni_rnn.recurrent import Boundary


class Stream(Protocol):
    """An endless source of consecutive windows, B rows side by side."""

    batch_size: int

    size: int
    """Symbols in one pass; for an endless source, what one evaluation reads."""

    def window(self, steps: int, context: int) -> Window:
        """The next window of at most `steps` steps; its boundaries know the next `context` symbols."""
        ...

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go back there."""
        ...

    def to(self, device: torch.device) -> Stream:
        """Move the data to a device."""
        ...


class TokenStream:
    """A text cut into B pieces of equal length that are read side by side, over and over.

    Row b of a window continues row b of the one before. Inputs are symbols t, targets symbols t + 1.
    The last window of a pass may be shorter than asked; at its end every row is done, and the next
    window starts from the beginning. At most B symbols at the end of the text are not used.

    The context at a boundary before input t is symbols t, t + 1, ..., t + W − 1, −1 past the end.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int) -> None:
        steps = (len(tokens) - 1) // batch_size
        if steps < 1:
            raise UsageError(
                f"a text of {len(tokens)} symbols is too short for {batch_size} rows; "
                "use a longer text or a smaller --batch-size"
            )
        self.batch_size, self.length, self.position = batch_size, steps, 0
        self.size = steps * batch_size
        rows = np.arange(batch_size)[None, :] * steps + np.arange(steps + 1)[:, None]
        self._tokens = torch.from_numpy(tokens[rows].astype(np.int64))  # (length + 1, B)
        self._end = torch.ones(batch_size, dtype=torch.bool)

    def to(self, device: torch.device) -> TokenStream:
        self._tokens, self._end = self._tokens.to(device), self._end.to(device)
        return self

    def window(self, steps: int, context: int) -> Window:
        first, last = self.position, min(self.position + steps, self.length)
        self.position = last % self.length
        return Window(
            self._tokens[first:last],
            self._tokens[first + 1 : last + 1],
            self._boundary(first, context),
            self._boundary(last, context),
            (last - first) * self.batch_size,
        )

    def _boundary(self, position: int, context: int) -> Boundary:
        if position == self.length or position == 0:
            # The end of one pass and the start of the next are one boundary: nothing is known beyond it.
            nothing = self._tokens.new_full((context, self.batch_size), -1) if context else None
            return Boundary(nothing, self._tokens[0], self._end)
        following = self._tokens[position : position + context]
        if len(following) < context:
            padding = self._tokens.new_full((context - len(following), self.batch_size), -1)
            following = torch.cat([following, padding])
        return Boundary(following if context else None, self._tokens[position], None)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Block(NamedTuple):
    """A stretch of a generated stream; the first axis is time.

    Attributes:
      inputs: (L, B) symbols.
      targets: (L, B) symbols, `UNSCORED` where a step does not count.
    """

    inputs: np.ndarray
    targets: np.ndarray


class GeneratedStream:
    """An endless stream made block by block, so that its position alone says where it stands.

    The context at a boundary before step t is the targets of steps t, t + 1, ..., t + W − 1, -1 where
    a step is not scored: what the loss to come depends on.

    Args:
      generate: block number -> the block; the same number gives the same block.
      batch_size: B.
      size: symbols that one evaluation reads.
    """

    def __init__(self, generate: Callable[[int], Block], batch_size: int, size: int) -> None:
        self.batch_size, self.size, self.position = batch_size, size, 0
        self._generate, self._device = generate, torch.device("cpu")
        self._block = len(generate(0).inputs)
        self._first = -1  # number of the first of the two blocks held

    def to(self, device: torch.device) -> GeneratedStream:
        self._device, self._first = device, -1
        return self

    def window(self, steps: int, context: int) -> Window:
        self._hold(self.position // self._block, steps + context)
        first = self.position - self._first * self._block
        last = first + steps
        self.position += steps
        scored = int(np.count_nonzero(self._scored[first:last]))
        return Window(
            self._inputs[first:last],
            self._targets[first:last],
            self._boundary(first, context),
            self._boundary(last, context),
            scored,
        )

    def _boundary(self, at: int, context: int) -> Boundary:
        coming = self._targets[at : at + context]
        known = torch.where(coming == UNSCORED, -1, coming) if context else None
        return Boundary(known, self._inputs[at], None)

    def _hold(self, number: int, ahead: int) -> None:
        """Have the block `number` and enough of what follows in memory."""
        count = 2 + ahead // self._block
        if number == self._first and count * self._block <= len(self._inputs):
            return
        blocks = [self._generate(number + i) for i in range(count)]
        inputs, targets = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        self._scored = targets != UNSCORED
        self._inputs, self._targets = (
            torch.from_numpy(part.astype(np.int64)).to(self._device) for part in (inputs, targets)
        )
        self._first = number

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position, self._first = state["position"], -1
