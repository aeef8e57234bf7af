"""Progress of a sweep: lines that stay and, in a terminal, an updated line for every process."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from dni_rnn.metrics import metric_of

STATUS_SECONDS = 60.0
"""Between two lines of status in a log."""


def duration(seconds: float) -> str:
    """`45s`, `12m`, `2h05m`."""
    if seconds <= 90:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    return f"{minutes}m" if minutes < 90 else f"{minutes // 60}h{minutes % 60:02}m"


def best_score(rows: Sequence[Mapping[str, Any]]) -> str:
    """The best finished row, chosen on validation, in words; empty without a row."""
    if not rows:
        return ""
    metric = metric_of(rows[0])
    key = f"best_valid_{metric.key}" if metric.validated else metric.key
    best = metric.best(row[key] for row in rows)
    cell = next(row["cell"] for row in rows if row[key] == best)
    return f"best {metric.label} {best:.{metric.digits}f} ({cell})"


class SweepProgress:
    """Shows the progress of a sweep.

    Args:
      title: title of the sweep.
      cells: number of runs.
      parallel: number of lines for running ones.
      done: number of runs finished at the start.
      deadline: end of the time budget, on `time.monotonic`; infinite without one.
    """

    def __init__(self, title: str, cells: int, parallel: int, done: int, deadline: float) -> None:
        self.title, self.cells, self.deadline = title, cells, deadline
        self.started, self.begun_with = time.monotonic(), done
        self.told = self.started
        moving = sys.stderr.isatty()
        how: Any = {"disable": not moving, "dynamic_ncols": True}  # cut at the edge of the terminal
        self.bar = tqdm(total=cells, initial=done, bar_format="|{bar:20}| {desc}", **how)
        self.lines = [tqdm(bar_format="  {desc}", leave=False, **how) for _ in range(parallel)]

    def say(self, text: str) -> None:
        """Print a line that stays."""
        tqdm.write(text)
        sys.stdout.flush()

    def show(self, done: int, failed: int, shares: Mapping[str, float], best: str) -> None:
        """Show the current status.

        Args:
          done, failed: numbers of runs.
          shares: finished fraction of each running one, by name.
          best: `best_score`.
        """
        now = time.monotonic()
        parts = [f"{done} of {self.cells} done", f"{len(shares)} running"]
        parts += [f"{failed} failed"] * bool(failed) + [best] * bool(best)
        left = self._left(done + sum(shares.values()), now)
        status = ", ".join(parts) + (f", {left} left" if left else "")
        if not self.bar.disable:
            self.bar.n = done + sum(shares.values())
            self.bar.set_description_str(f"{self.title}: {status}")
            texts = [f"{share:4.0%} {name}" for name, share in shares.items()]
            for line, text in zip(self.lines, [*texts, *[""] * len(self.lines)], strict=False):
                line.set_description_str(text)
        elif now - self.told >= STATUS_SECONDS:
            self.told = now
            self.say(status)

    def _left(self, done: float, now: float) -> str:
        if self.deadline < float("inf"):
            return duration(max(self.deadline - now, 0.0))
        gained = done - self.begun_with
        return f"about {duration((now - self.started) * (self.cells - done) / gained)}" if gained > 0 else ""

    def close(self) -> None:
        for bar in (*reversed(self.lines), self.bar):
            bar.close()
