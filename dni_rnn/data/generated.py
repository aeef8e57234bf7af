"""Generated streams: endless ones, and consecutive episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dni_rnn.data.curriculum import Curriculum
from dni_rnn.window import UNSCORED, Boundary, Window


class Segment(NamedTuple):
    """A segment of a generated stream; the first axis is time.

    Attributes:
      inputs: (L, B) symbols.
      targets: (L, B) symbols, `UNSCORED` where a step does not count.
      delay: (L,) steps from the input that decides a target to the target; unused where none is scored.
    """

    inputs: np.ndarray
    targets: np.ndarray
    delay: np.ndarray


# The context at a boundary holds future targets whose input has been read: others say nothing about what the
# state should hold. A position means the same at every level, or M would have to learn each level anew.


class _Known(NamedTuple):
    """The end of the last window: the start of the next one unless the stream was moved."""

    place: tuple[int, int, int]  # position, context, level
    boundary: Boundary


class GeneratedStream:
    """An endless stream generated block by block; position and level are its whole state.

    The context at a boundary before step t holds at position a, for a = 0 ... W − 1, the next target that
    input t − 1 − a decides, -1 if there is none. So a symbol moves by one position per step, and a delay
    longer by one step needs one position more.

    Args:
      generate: (block number, level) -> the block, deterministically. All blocks have the same length.
      batch_size: B.
      size: symbols that one evaluation reads.
      curriculum: sets the level; without one it is 0.
    """

    def __init__(
        self,
        generate: Callable[[int, int], Segment],
        batch_size: int,
        size: int,
        curriculum: Curriculum | None = None,
    ) -> None:
        self.batch_size, self.size, self.curriculum, self.position = batch_size, size, curriculum, 0
        self._generate, self._device = generate, torch.device("cpu")
        self._block = len(generate(0, self._level).inputs)
        self._held = (-1, -1)  # number of the first of the blocks held, and their level
        self._end = _Known((-1, -1, -1), Boundary())

    @property
    def _level(self) -> int:
        return 0 if self.curriculum is None else self.curriculum.level

    def to(self, device: torch.device) -> GeneratedStream:
        self._device, self._held = device, (-1, -1)
        self._end = _Known((-1, -1, -1), Boundary())
        return self

    def window(self, steps: int, context: int) -> Window:
        self._hold(self.position // self._block, steps)
        first = self.position - self._held[0] * self._block
        last = first + steps
        self.position += steps
        scored = int(np.count_nonzero(self._scored[first:last]))
        start, here = self._end.boundary, (self.position - steps, context, self._level)
        if self._end.place != here:
            start = self._boundary(first, context)
        end = self._boundary(last, context)
        self._end = _Known((self.position, context, self._level), end)
        return Window(self._inputs[first:last], self._targets[first:last], start, end, scored)

    def _boundary(self, at: int, context: int) -> Boundary:
        if not context:
            return Boundary()
        # Backwards: the nearest target of an input is the last.
        steps = np.arange(at + self._reach - 1, at - 1, -1)
        places = at - 1 - (steps - self._delay[steps])
        known = (places >= 0) & (places < context)
        step_of = np.full(context, -1)
        step_of[places[known]] = steps[known]
        index = torch.from_numpy(step_of).to(self._device)[:, None]
        coming = self._targets[index.clamp_min(0).squeeze(1)]
        return Boundary(torch.where((index < 0) | (coming == UNSCORED), -1, coming))

    def _hold(self, number: int, steps: int) -> None:
        """Load block `number` and enough of the following ones, at the current level."""
        level = self._level
        if self._held == (number, level) and len(self._inputs) > self._block + steps + self._reach:
            return
        blocks = [self._generate(number, level)]
        while len(blocks) * self._block <= self._block + steps + max(int(b.delay.max()) for b in blocks):
            blocks.append(self._generate(number + len(blocks), level))
        inputs, targets, self._delay = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        self._scored, self._reach = targets != UNSCORED, int(self._delay.max())
        self._inputs, self._targets = (
            torch.from_numpy(part.astype(np.int64)).to(self._device) for part in (inputs, targets)
        )
        self._held = (number, level)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position} | _curriculum_state(self.curriculum)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self._held = state["position"], (-1, -1)
        if self.curriculum is not None:
            self.curriculum.load_state_dict(state["curriculum"])


class EpisodeStream:
    """Consecutive episodes in each row, each from the initial state.

    Episodes begin at window boundaries: a row whose episode ends within a window idles until its end and is
    done there. A window ends early once no row has steps left. A row that reaches a new level first idles
    for a random part of an episode, so that a batch holds all phases of one.

    The context at a boundary holds at position a, for a = 0 ... W − 1, the row's next target in its episode
    that is decided by an input read at a step t with t mod W = a, -1 if there is none. A symbol keeps its
    position until it is the target for the last time, so a cell that stores it gets the same signal at every
    boundary.

    Args:
      generate: (random generator, count, level) -> `count` episodes of equal length side by side.
      batch_size: B.
      size: symbols that one evaluation reads.
      idle: the input symbol of an idle row.
      seed: seed of the episodes; equal seeds give equal streams.
      curriculum: sets the level; without one it is 0.
    """

    def __init__(
        self,
        generate: Callable[[np.random.Generator, int, int], Segment],
        batch_size: int,
        size: int,
        *,
        idle: int,
        seed: Sequence[int],
        curriculum: Curriculum | None = None,
    ) -> None:
        self.batch_size, self.size, self.curriculum = batch_size, size, curriculum
        self._generate, self._idle, self._device = generate, idle, torch.device("cpu")
        self._random = np.random.default_rng(seed)
        # Per row: its episode, padded with idle unscored steps; its length; the position in it.
        self._inputs = np.full((batch_size, 0), idle)
        self._targets = np.full((batch_size, 0), UNSCORED)
        self._delay = np.zeros((batch_size, 0), dtype=np.int64)
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
        return 0 if self.curriculum is None else self.curriculum.level

    def _begin(self, done: np.ndarray) -> None:
        """Begin episodes in the rows of `done`; rows new to the level idle first."""
        level = self._level
        block = self._generate(self._random, int(done.sum()), level)
        length = len(block.inputs)
        self._reach(length, np.zeros_like(self._position))
        self._inputs[done, :length], self._targets[done, :length] = block.inputs.T, block.targets.T
        self._delay[done, :length] = block.delay
        self._inputs[done, length:], self._targets[done, length:] = self._idle, UNSCORED
        self._length[done], self._position[done] = length, 0
        new = done & (self._row_level != level)
        self._inputs[new], self._targets[new] = self._idle, UNSCORED
        self._length[new] = self._random.integers(1, length, int(new.sum()), endpoint=True)
        self._row_level[new] = level

    def _reach(self, ahead: int, position: np.ndarray | None = None) -> None:
        """Extend the arrays to `ahead` steps beyond the rows' positions."""
        position = self._position if position is None else position
        missing = int(position.max()) + ahead - self._inputs.shape[1]
        if missing > 0:
            wider = ((0, 0), (0, missing + 64))
            self._inputs = np.pad(self._inputs, wider, constant_values=self._idle)
            self._targets = np.pad(self._targets, wider, constant_values=UNSCORED)
            self._delay = np.pad(self._delay, wider)

    def _boundary(self, context: int, done: np.ndarray) -> Boundary:
        rows = np.arange(self.batch_size)
        known = None
        if context:
            coming = np.full((context, self.batch_size), -1)
            left = int((self._length - self._position).max())
            # Backwards: the nearest target of an input is the last.
            steps = np.minimum(
                self._position + np.arange(left - 1, -1, -1)[:, None], self._inputs.shape[1] - 1
            )
            targets = self._targets[rows, steps]
            decided = steps - self._delay[rows, steps]
            read = (targets != UNSCORED) & (decided < self._position)
            coming[decided[read] % context, np.broadcast_to(rows, read.shape)[read]] = targets[read]
            known = self._tensor(coming)
        return Boundary(known, self._tensor(done) if done.any() else None)

    def _tensor(self, array: np.ndarray) -> Tensor:
        # From pageable memory this returns once the array has been read, without further synchronisation.
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        used = int(self._length.max(initial=0))
        return {
            "inputs": self._inputs[:, :used].tolist(),
            "targets": self._targets[:, :used].tolist(),
            "delay": self._delay[:, :used].tolist(),
            "length": self._length.tolist(),
            "position": self._position.tolist(),
            "row_level": self._row_level.tolist(),
            "random": self._random.bit_generator.state,
        } | _curriculum_state(self.curriculum)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = ("inputs", "targets", "delay", "length", "position", "row_level")
        self._inputs, self._targets, self._delay, self._length, self._position, self._row_level = (
            np.array(state[name], dtype=np.int64) for name in names
        )
        self._random.bit_generator.state = state["random"]
        self._start = None
        if self.curriculum is not None:
            self.curriculum.load_state_dict(state["curriculum"])


def _width(boundary: Boundary) -> int:
    return 0 if boundary.context is None else len(boundary.context)


def _curriculum_state(curriculum: Curriculum | None) -> dict[str, Any]:
    return {} if curriculum is None else {"curriculum": curriculum.state_dict()}
