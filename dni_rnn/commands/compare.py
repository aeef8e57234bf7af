"""`dni-rnn compare`: compare runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Compare:
    """Print a table of runs, finished or not, and plot their validation curves."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path = Path("compare.png")
    """File for the plot: png, svg or pdf, by its suffix."""

    def __call__(self) -> None:
        from dni_rnn.experiments.compare import compare_runs

        compare_runs(self.runs, self.out)
