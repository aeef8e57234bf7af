"""Tasks that get harder as they are learnt."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Curriculum:
    """A task that gets harder as it is learnt: the level rises when the loss at this one is low enough.

    After each rise the loss of one period is ignored, because rows may still be at the previous level;
    then it is averaged over the scored symbols of each period.

    Args:
      level: the first level.
      limit: the level rises when the mean loss is below it, in bits per scored symbol.
      period: level -> steps; at least the length of an episode.
      score: level -> the task's score, for example the length of a sequence; 0 below the first level.
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
        """Record the loss of `steps` steps: −log p in nats, summed over their `scored` symbols (a scalar)."""
        self._steps += steps
        period = self._period(self.level)
        if self._steps <= period:
            return
        self._loss = self._loss.to(loss.device) + loss
        self._scored += scored
        if self._steps < 2 * period or not self._scored:
            return
        rises = float(self._loss) / math.log(2.0) < self.limit * self._scored
        self.level += rises
        self._steps, self._scored, self._loss = 0 if rises else period, 0, torch.zeros(())

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
        """Restore `state_dict`."""
        self.level, self._steps, self._scored = state["level"], state["steps"], state["scored"]
        self._loss = torch.tensor(state["loss"])
