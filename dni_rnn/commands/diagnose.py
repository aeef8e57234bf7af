"""`dni-rnn diagnose`: a run's gradients against full BPTT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Diagnose:
    """Measure a run's gradients, and its synthetic ones, against full BPTT on held-out text."""

    run: tyro.conf.Positional[Path]
    """Run directory; diagnostics.json and diagnostics.png are written there."""
    bptt: str = "1,2,4,8,20,40"
    """Truncation lengths T to measure, separated by commas."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    data_dir: Path | None = None
    """Folder that holds the data files; the default is the run's."""

    def __call__(self) -> None:
        from dni_rnn.experiments.diagnose import diagnose_run
        from dni_rnn.training.learner import choose_device

        diagnose_run(self.run, self.bptt, choose_device(self.device), self.data_dir)
