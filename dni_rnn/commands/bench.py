"""`dni-rnn bench`: the cost of training on this machine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Bench:
    """Measure training: characters per second and memory, without and with synthetic gradients.

    Every combination of --hidden and --bptt, against a hand-written loop on nn.LSTM.
    """

    hidden: tuple[int, ...] = (256, 1024)
    """Units of the LSTM."""
    bptt: tuple[int, ...] = (8,)
    """Truncation length T: steps per window."""
    batch_size: int = 32
    """Batch rows."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    threads: int = 1
    """CPU threads."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Precision of matrix multiplications."""
    processes: int = 3
    """Processes, run one after the other; figures are medians over them."""
    rounds: int = 5
    """Turns of each method in a process."""
    out: Path | None = None
    """Markdown file for the report, besides standard output."""

    def __call__(self) -> None:
        from dni_rnn.experiments.bench import run_bench

        run_bench(**{field.name: getattr(self, field.name) for field in fields(self)})
