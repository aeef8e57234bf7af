"""`dni-rnn demo`: what truncation costs, in three minutes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Demo:
    """Train with short windows, without and with a trace, and with longer ones, and compare them.

    Small models on recall and on the text that comes with Python, on the CPU, in about three minutes.
    """

    out: Path = Path("runs/demo")
    """Folder for the runs and the plot; those of an earlier demo are replaced."""
    chars: int = 500_000
    """Characters that each model trains on."""

    def __call__(self) -> None:
        from dni_rnn.experiments.demo import run_demo
        from dni_rnn.training.loop import Interrupted

        try:
            run_demo(self.out, self.chars)
        except Interrupted as stop:
            print("dni-rnn: demo stopped; the same command starts it anew", file=sys.stderr)
            sys.exit(128 + stop.signal)
