"""Progress of a training run: one updated line in a terminal, occasional lines in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

NARROW = 100
"""Terminal width below which the line is shortened."""
REFRESH_SECONDS, LOG_SECONDS = 0.5, 30.0
"""Between two updates in a terminal, and in a log."""
CURVE_POINTS = 12
"""Points of the curve beside the bar."""


class _Lines:
    """Standard error for a log: every update of a bar is a new line."""

    encoding = property(lambda self: getattr(sys.stderr, "encoding", None))

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


class ProgressBar:
    """Shows how far a run has come, its speed and its latest training score.

    Args:
      total: the budget; may be infinite.
      done: how much of it is used.
      name: name of the run.
      unit: unit of the budget; minutes are "min".
      quiet: show nothing.
    """

    def __init__(self, total: float, done: float, name: str, unit: str, quiet: bool) -> None:
        moves = sys.stderr is not None and sys.stderr.isatty()
        where: dict[str, Any] = {"mininterval": REFRESH_SECONDS} if moves else {
            "file": _Lines(), "mininterval": LOG_SECONDS, "delay": LOG_SECONDS
        }  # fmt: skip
        self._bar = tqdm(
            total=total, initial=done, desc=name, unit=unit, unit_scale=unit != "min",
            disable=quiet or sys.stderr is None, dynamic_ncols=True, leave=False, **where,
        )  # fmt: skip
        self._name = name
        self._curve: list[float] = []

    def show(self, done: float, value: float, key: str, speed: str) -> None:
        """Show progress; `value` is the latest training score, called `key`."""
        self._curve = [*self._curve, value][-CURVE_POINTS:]
        if self._bar.disable:
            return
        columns, score = self._bar.format_dict["ncols"], f"{value:.3f} {key}"
        if columns and columns < NARROW:
            share = "{n_fmt} {elapsed}"
            if self._bar.total:
                share = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
            self._bar.desc = self._name[:20] + ": "
            self._bar.bar_format = f"{{desc}}{share}{{postfix}}"
            self._bar.set_postfix_str(score, refresh=False)
        else:
            self._bar.bar_format = None
            self._bar.set_postfix_str(f"{_curve(self._curve)} {score}, {speed}", refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def _curve(values: list[float]) -> str:
    """A curve as one line of text, scaled to the range of its values."""
    low, high, marks = min(values), max(values), "▁▂▃▄▅▆▇█"
    try:
        marks.encode(getattr(sys.stderr, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        marks = "_.-~=*#@"
    return "".join(marks[round(7 * (value - low) / (high - low or 1.0))] for value in values)
