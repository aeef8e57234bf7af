"""`dni-rnn sweep`: a grid of training commands."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from dni_rnn.files import name_of


@dataclass(frozen=True)
class Sweep:
    """Run a grid of training commands with seeds; can be stopped, killed and started again at any point."""

    folder: tyro.conf.Positional[Path]
    """Folder with a sweep.toml; finished rows are appended to its rows.jsonl."""
    work: Path = Path("runs/sweeps")
    """Folder for the run directories, in a sub-folder named after the sweep's."""
    budget: str | None = None
    """Stop after this long (90s, 9m, 1h30m), with checkpoints. All cells share the time, in rounds; with
    in_order, the first ones use it first."""
    parallel: int = 1
    """Processes at a time."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where to compute, for cells that do not set --device."""
    carry: Path | None = None
    """Folder to transfer unfinished runs: read at the start, written at the end, in parts below 16 MB."""

    def __call__(self) -> None:
        from dni_rnn.experiments.sweep_runner import parse_duration, run_sweep

        failed = run_sweep(
            self.folder,
            self.work / name_of(self.folder),
            self.parallel,
            budget=None if self.budget is None else parse_duration(self.budget),
            device=self.device,
            carry=self.carry,
        )
        if failed:
            sys.exit(1)
