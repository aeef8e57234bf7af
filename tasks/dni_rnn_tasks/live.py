"""A stream from standard input, learnt as it comes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dni_rnn.config import LiveConfig, Preset
from dni_rnn.errors import UsageError

if TYPE_CHECKING:
    from dni_rnn.data.task import Split
    from dni_rnn.training.live import LiveStream

BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Live:
    """The bytes of standard input, learnt as they come, without end and in constant memory.

        tail -f server.log | dni-rnn train live --dni --out runs/log

    Every byte is predicted before it is learnt; the bits per character are of those predictions. With
    --lag W training stays W bytes behind the newest, and the synthesizer is told these; with --lag 0
    it is strictly online. Ctrl-C, or the end of the input, saves; --resume goes on with what comes then.
    For a slow stream use --batch-size 1 --no-centre: every byte is learnt when it comes.
    """

    config: ClassVar = LiveConfig
    presets: ClassVar = {
        "default": Preset(run={"batch_size": 16, "hidden": 128, "bptt": 8, "eval_every": 100_000})
    }

    stretch: int = 256
    """With several rows: consecutive bytes that one row reads before the next row gets as many."""

    def __post_init__(self) -> None:
        if self.stretch < 1:
            raise UsageError(f"--stretch must be positive, not {self.stretch}")

    def load(self, data_dir: Path | None) -> LiveData:
        """Nothing is read yet."""
        return LiveData(self.stretch)


@dataclass(frozen=True)
class LiveData:
    """Standard input as a task's data: it has a training stream and no other."""

    stretch: int
    name: str = "live"
    input_symbols: int = BYTES
    target_symbols: int = BYTES

    def stream(self, split: Split, batch_size: int, seed: int) -> LiveStream:
        from dni_rnn.training.live import LiveStream, StandardInput

        if split != "train":
            raise UsageError(
                "live: a stream has no held-out part; the run's metrics.jsonl and summary.json have its loss "
                "on each symbol before that was learnt"
            )
        return LiveStream(StandardInput(), batch_size, self.stretch)
