"""Delayed recall, which truncated BPTT cannot learn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dni_rnn.config import PUBLISHED_DNI, Preset
from dni_rnn.errors import UsageError

if TYPE_CHECKING:
    from dni_rnn.data.generated import GeneratedStream
    from dni_rnn.data.task import Split

BLOCK = 1024
EVALUATION_SYMBOLS = 100_000
"""Symbols that one validation reads."""

FIRST_DELAY, SOLVED = 2, 0.144
"""With --grow: the first delay, and the loss that counts as solved: 0.1 nats, in bits."""


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Delayed recall of random symbols: predict the symbol of K steps ago, in an endless stream.

    Chance is log2(symbols) bits per symbol. Truncated BPTT with a window shorter than the delay never
    connects a target with its symbol, so anything learnt needs a gradient across boundaries.
    """

    presets: ClassVar = {
        "default": Preset(
            run={
                "hidden": 128,
                "embedding": 4,
                "bptt": 4,
                "lr": 3e-3,
                "beta2": 0.99,
                "chars": 2_000_000,
                "eval_every": 200_000,
            },
            dni={
                "context": "next-tokens:64",
                "critic": True,
                "synthesizer": "linear",
                "synthesizer_reads": "state",
                "synthesizer_lr": 3e-3,
                "scale": 1.0,
                "discount": 0.97,
            },
        ),
        "paper": Preset(
            run={"hidden": 128, "embedding": 4, "bptt": 4, "lr": 3e-3, "chars": 2_000_000},
            dni=PUBLISHED_DNI,
        ),
    }

    delay: int = 8
    """K, in steps."""
    symbols: int = 4
    """Number of distinct symbols."""
    grow: bool = False
    """Begin at a delay of 2; it grows by one whenever the loss falls under 0.1 nats. --delay is ignored."""

    def __post_init__(self) -> None:
        if not 1 <= self.delay <= BLOCK:
            raise UsageError(f"--delay must lie between 1 and {BLOCK}, not {self.delay}")
        if self.symbols < 2:
            raise UsageError(f"--symbols must be at least 2, not {self.symbols}")

    def load(self, data_dir: Path | None) -> RecallData:
        """The generated streams; nothing is read."""
        return RecallData("recall/grow" if self.grow else f"recall/{self.delay}", self)


@dataclass(frozen=True)
class RecallData:
    """The streams of one delay, or of a growing one, whose level is the delay."""

    name: str
    task: Recall

    @property
    def input_symbols(self) -> int:
        return self.task.symbols

    @property
    def target_symbols(self) -> int:
        return self.task.symbols

    def stream(self, split: Split, batch_size: int, seed: int) -> GeneratedStream:
        """Random symbols; the three splits and all seeds are different streams."""
        import numpy as np

        from dni_rnn.data.curriculum import Curriculum
        from dni_rnn.data.generated import GeneratedStream, Segment
        from dni_rnn.data.task import SPLITS
        from dni_rnn.window import UNSCORED

        def symbols(number: int) -> np.ndarray:
            key = [seed, SPLITS.index(split)]
            generator = np.random.Generator(np.random.Philox(key=key, counter=number << 64))
            return generator.integers(0, self.task.symbols, (BLOCK, batch_size))

        def generate(number: int, level: int) -> Segment:
            inputs, delay = symbols(number), level if self.task.grow else self.task.delay
            before = symbols(number - 1) if number else np.full_like(inputs, UNSCORED)
            targets = np.concatenate([before[-delay:], inputs])[:BLOCK]
            return Segment(inputs, targets, np.full(BLOCK, delay))

        curriculum = Curriculum(FIRST_DELAY, SOLVED, lambda delay: delay + 32) if self.task.grow else None
        return GeneratedStream(generate, batch_size, EVALUATION_SYMBOLS, curriculum)
