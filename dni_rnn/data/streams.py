"""Streams: where windows come from. A stream knows where it stands and can be put back there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dni_rnn.errors import UsageError
from dni_rnn.estimators import UNSCORED, Window
from dni_rnn.recurrent import Boundary


class Ladder:
    """A task that gets harder: the level rises by one whenever the loss of the present one is low enough.

    After each climb the loss of one period is left out, because rows may still be at the level before;
    then it is averaged over the scored symbols of one period after the other.

    Args:
      level: to begin with.
      limit: the level rises when the mean loss is below it, in bits per scored symbol.
      period: level -> steps; at least the length of an episode.
      score: level -> what a task calls it, for example the length of a sequence; 0 below the first.
    """

    def __init__(
        self,
        level: int,
        limit: float,
        period: Callable[[int], int],
        score: Callable[[int], int] = lambda level: level,
    ) -> None:
        self.level, self.limit, self._period, self._score = level, limit, period, score
        self._steps, self._scored, self._loss = 0, 0, torch.zeros(())

    def note(self, loss: Tensor, scored: int, steps: int) -> None:
        """Take in a stretch of `steps` steps: −log p in nats, summed over its `scored` symbols (a scalar)."""
        self._steps += steps
        period = self._period(self.level)
        if self._steps <= period:
            return
        self._loss = self._loss.to(loss.device) + loss
        self._scored += scored
        if self._steps < 2 * period or not self._scored:
            return
        climbs = float(self._loss) / math.log(2.0) < self.limit * self._scored
        self.level += climbs
        self._steps, self._scored, self._loss = 0 if climbs else period, 0, torch.zeros(())

    @property
    def solved(self) -> int:
        """The score of the highest level solved."""
        return self._score(self.level - 1)

    def state_dict(self) -> dict[str, Any]:
        """The level, and the average so far."""
        return {
            "level": self.level, "steps": self._steps, "scored": self._scored, "loss": float(self._loss)
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to `state_dict`."""
        self.level, self._steps, self._scored = state["level"], state["steps"], state["scored"]
        self._loss = torch.tensor(state["loss"])


class Stream(Protocol):
    """An endless source of consecutive windows, B rows side by side."""

    batch_size: int

    ladder: Ladder | None
    """Of a task that gets harder as it is learnt; the training loop tells it the loss."""

    size: int
    """Symbols in one pass; for an endless source, what one evaluation reads."""

    def window(self, steps: int, context: int) -> Window:
        """The next window of at most `steps` steps; its boundaries are told `context` symbols."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
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

    ladder: Ladder | None = None

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

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Block(NamedTuple):
    """A stretch of a generated stream; the first axis is time.

    Attributes:
      inputs: (L, B) symbols.
      targets: (L, B) symbols, `UNSCORED` where a step does not count.
      lag: (L,) steps from the input that decides a target to the target; of no account where none is scored.
    """

    inputs: np.ndarray
    targets: np.ndarray
    lag: np.ndarray


# What M is told at a boundary are targets to come whose input has been read: one that has not says nothing
# about what the state should hold. A place means the same at every level, or a task that grows would be
# learnt anew from level to level.


class GeneratedStream:
    """An endless stream made block by block, so that its position and level alone say where it stands.

    The context at a boundary before step t: at place a, for a = 0 ... W − 1, the next target that input
    t − 1 − a decides, -1 where none is to come. So a symbol moves on by one place per step, and a longer
    delay needs one place more.

    Args:
      generate: (block number, level) -> the block; the same numbers give the same block. Blocks are
        equally long.
      batch_size: B.
      size: symbols that one evaluation reads.
      ladder: where the level comes from; without one it is 0.
    """

    def __init__(
        self,
        generate: Callable[[int, int], Block],
        batch_size: int,
        size: int,
        ladder: Ladder | None = None,
    ) -> None:
        self.batch_size, self.size, self.ladder, self.position = batch_size, size, ladder, 0
        self._generate, self._device = generate, torch.device("cpu")
        self._block = len(generate(0, self._level).inputs)
        self._held = (-1, -1)  # number of the first of the blocks held, and their level

    @property
    def _level(self) -> int:
        return 0 if self.ladder is None else self.ladder.level

    def to(self, device: torch.device) -> GeneratedStream:
        self._device, self._held = device, (-1, -1)
        return self

    def window(self, steps: int, context: int) -> Window:
        self._hold(self.position // self._block, steps)
        first = self.position - self._held[0] * self._block
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
        if not context:
            return Boundary(None, self._inputs[at], None)
        steps = np.arange(
            at + self._reach - 1, at - 1, -1
        )  # backwards: the nearest target of an input is the last
        places = at - 1 - (steps - self._lag[steps])
        told = (places >= 0) & (places < context)
        step_of = np.full(context, -1)
        step_of[places[told]] = steps[told]
        index = torch.from_numpy(step_of).to(self._device)[:, None]
        coming = self._targets[index.clamp_min(0).squeeze(1)]
        return Boundary(torch.where((index < 0) | (coming == UNSCORED), -1, coming), self._inputs[at], None)

    def _hold(self, number: int, steps: int) -> None:
        """Have the block `number` and enough of what follows in memory, at the present level."""
        level = self._level
        if self._held == (number, level) and len(self._inputs) > self._block + steps + self._reach:
            return
        blocks = [self._generate(number, level)]
        while len(blocks) * self._block <= self._block + steps + max(int(b.lag.max()) for b in blocks):
            blocks.append(self._generate(number + len(blocks), level))
        inputs, targets, self._lag = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        self._scored, self._reach = targets != UNSCORED, int(self._lag.max())
        self._inputs, self._targets = (
            torch.from_numpy(part.astype(np.int64)).to(self._device) for part in (inputs, targets)
        )
        self._held = (number, level)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position} | _ladder_state(self.ladder)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self._held = state["position"], (-1, -1)
        if self.ladder is not None:
            self.ladder.load_state_dict(state["ladder"])


class EpisodeStream:
    """Episodes one after the other in each row, every one begun from the initial state.

    An episode begins with a window: when it ends within one, the row idles up to the end of that window
    and is done there. A window is cut short where the last of its rows has nothing left. A row that comes
    to a new level first idles for a random part of an episode, so that a batch holds all phases of one.

    The context at a boundary: at place a, for a = 0 ... W − 1, the row's next target in its episode that is
    decided by an input it has read at a step t with t mod W = a, -1 where none is to come. A symbol stays at
    its place until it has been asked for the last time: a cell that keeps it gets the same signal at every
    boundary.

    Args:
      generate: (random generator, count, level) -> `count` episodes of equal length side by side.
      batch_size: B.
      size: symbols that one evaluation reads.
      idle: the input symbol of a row that has nothing to do.
      seed: of the episodes; equal seeds give equal streams.
      ladder: where the level comes from; without one it is 0.
    """

    def __init__(
        self,
        generate: Callable[[np.random.Generator, int, int], Block],
        batch_size: int,
        size: int,
        *,
        idle: int,
        seed: Sequence[int],
        ladder: Ladder | None = None,
    ) -> None:
        self.batch_size, self.size, self.ladder = batch_size, size, ladder
        self._generate, self._idle, self._device = generate, idle, torch.device("cpu")
        self._random = np.random.default_rng(seed)
        # Per row: its episode, idle and unscored to the end of the array; its length; the place in it.
        self._inputs = np.full((batch_size, 0), idle)
        self._targets = np.full((batch_size, 0), UNSCORED)
        self._lag = np.zeros((batch_size, 0), dtype=np.int64)
        self._length = np.zeros(batch_size, dtype=np.int64)
        self._position = np.zeros(batch_size, dtype=np.int64)
        self._row_level = np.full(batch_size, -1)
        self._start: Boundary | None = None

    def to(self, device: torch.device) -> EpisodeStream:
        self._device, self._start = device, None
        return self

    def window(self, steps: int, context: int) -> Window:
        if not self._length.any():
            self._begin(self._length == 0)
        steps = min(steps, int((self._length - self._position).max()))
        rows = np.arange(self.batch_size)
        self._reach(steps + 1)
        at = self._position + np.arange(steps)[:, None]
        inputs, targets = self._inputs[rows, at], self._targets[rows, at]
        start = self._start
        if start is None or _width(start) != context:
            start = self._boundary(context, self._position == 0)
        self._position = self._position + steps
        done = self._position >= self._length
        if done.any():
            self._begin(done)
        self._start = self._boundary(context, done)
        scored = int(np.count_nonzero(targets != UNSCORED))
        return Window(self._tensor(inputs), self._tensor(targets), start, self._start, scored)

    @property
    def _level(self) -> int:
        return 0 if self.ladder is None else self.ladder.level

    def _begin(self, done: np.ndarray) -> None:
        """New episodes in the rows of `done`; idling first in those that are new to the level."""
        level = self._level
        block = self._generate(self._random, int(done.sum()), level)
        length = len(block.inputs)
        self._reach(length, np.zeros_like(self._position))
        self._inputs[done, :length], self._targets[done, :length] = block.inputs.T, block.targets.T
        self._lag[done, :length] = block.lag
        self._inputs[done, length:], self._targets[done, length:] = self._idle, UNSCORED
        self._length[done], self._position[done] = length, 0
        new = done & (self._row_level != level)
        self._inputs[new], self._targets[new] = self._idle, UNSCORED
        self._length[new] = self._random.integers(1, length, int(new.sum()), endpoint=True)
        self._row_level[new] = level

    def _reach(self, ahead: int, position: np.ndarray | None = None) -> None:
        """Have the arrays reach `ahead` steps beyond where the rows stand."""
        position = self._position if position is None else position
        missing = int(position.max()) + ahead - self._inputs.shape[1]
        if missing > 0:
            wider = ((0, 0), (0, missing + 64))
            self._inputs = np.pad(self._inputs, wider, constant_values=self._idle)
            self._targets = np.pad(self._targets, wider, constant_values=UNSCORED)
            self._lag = np.pad(self._lag, wider)

    def _boundary(self, context: int, done: np.ndarray) -> Boundary:
        rows = np.arange(self.batch_size)
        known = None
        if context:
            coming = np.full((context, self.batch_size), -1)
            left = int((self._length - self._position).max())
            steps = np.minimum(
                self._position + np.arange(left - 1, -1, -1)[:, None], self._inputs.shape[1] - 1
            )
            targets = self._targets[rows, steps]  # backwards: the nearest target of an input is the last
            decided = steps - self._lag[rows, steps]
            told = (targets != UNSCORED) & (decided < self._position)
            coming[decided[told] % context, np.broadcast_to(rows, told.shape)[told]] = targets[told]
            known = self._tensor(coming)
        next_input = self._tensor(self._inputs[rows, self._position])
        return Boundary(known, next_input, self._tensor(done) if done.any() else None)

    def _tensor(self, array: np.ndarray) -> Tensor:
        # Out of pageable memory this returns once the array has been read; it waits for nothing else.
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        used = int(self._length.max(initial=0))
        return {
            "inputs": self._inputs[:, :used].tolist(),
            "targets": self._targets[:, :used].tolist(),
            "lag": self._lag[:, :used].tolist(),
            "length": self._length.tolist(),
            "position": self._position.tolist(),
            "row_level": self._row_level.tolist(),
            "random": self._random.bit_generator.state,
        } | _ladder_state(self.ladder)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = ("inputs", "targets", "lag", "length", "position", "row_level")
        self._inputs, self._targets, self._lag, self._length, self._position, self._row_level = (
            np.array(state[name], dtype=np.int64) for name in names
        )
        self._random.bit_generator.state = state["random"]
        self._start = None
        if self.ladder is not None:
            self.ladder.load_state_dict(state["ladder"])


def _width(boundary: Boundary) -> int:
    return 0 if boundary.context is None else len(boundary.context)


def _ladder_state(ladder: Ladder | None) -> dict[str, Any]:
    return {} if ladder is None else {"ladder": ladder.state_dict()}
