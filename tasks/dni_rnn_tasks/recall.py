"""Delayed recall: the task that truncation cannot do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dni_rnn.errors import UsageError

if TYPE_CHECKING:
    from dni_rnn.streams import GeneratedStream
    from dni_rnn.task import Split

BLOCK = 1024
EVALUATION_SYMBOLS = 100_000
"""Symbols that one validation reads."""


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Delayed recall of random symbols: say the symbol of K steps ago, in an endless stream.

    Chance is log2(symbols) bits per symbol. Truncated BPTT with a window shorter than the delay never
    connects a target with its symbol, so what is learnt beyond it crossed a boundary.
    """

    delay: int = 8
    """K, in steps."""
    symbols: int = 4
    """Number of distinct symbols."""

    def __post_init__(self) -> None:
        if not 1 <= self.delay <= BLOCK:
            raise UsageError(f"--delay must lie between 1 and {BLOCK}, not {self.delay}")
        if self.symbols < 2:
            raise UsageError(f"--symbols must be at least 2, not {self.symbols}")

    def load(self, data_dir: Path | None) -> RecallData:
        """Nothing is read: the stream is generated."""
        return RecallData(f"recall/{self.delay}", self.delay, self.symbols)


@dataclass(frozen=True)
class RecallData:
    """The streams of one delay."""

    name: str
    delay: int
    input_symbols: int

    @property
    def target_symbols(self) -> int:
        return self.input_symbols

    def stream(self, split: Split, batch_size: int, seed: int) -> GeneratedStream:
        """Random symbols; the three splits and all seeds are different streams."""
        import numpy as np

        from dni_rnn.estimators import UNSCORED
        from dni_rnn.streams import Block, GeneratedStream
        from dni_rnn.task import SPLITS

        def symbols(number: int) -> np.ndarray:
            key = [seed, SPLITS.index(split)]
            generator = np.random.Generator(np.random.Philox(key=key, counter=number << 64))
            return generator.integers(0, self.input_symbols, (BLOCK, batch_size))

        def generate(number: int) -> Block:
            inputs = symbols(number)
            before = symbols(number - 1) if number else np.full_like(inputs, UNSCORED)
            return Block(inputs, np.concatenate([before[-self.delay :], inputs])[:BLOCK])

        return GeneratedStream(generate, batch_size, EVALUATION_SYMBOLS)
