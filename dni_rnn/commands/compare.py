"""`dni-rnn compare`: runs side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Compare:
    """Print a table of runs, finished or not, and plot their validation curves over each other."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    out: Path = Path("compare.png")
    """Where the plot goes: png, svg or pdf by its ending."""

    def __call__(self) -> None:
        from dni_rnn.experiments.compare import compare_runs

        compare_runs(self.runs, self.out)
