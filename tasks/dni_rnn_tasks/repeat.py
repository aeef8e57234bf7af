"""Copy and repeat copy: read a sequence, then write it, once or several times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dni_rnn.config import PUBLISHED_DNI, Preset
from dni_rnn.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from dni_rnn.data.generated import EpisodeStream
    from dni_rnn.data.task import Split

SOLVED = 0.15
"""Bits per scored symbol below which a length counts as solved, as published."""
EVALUATION_SYMBOLS = 100_000
"""Symbols that one validation reads."""
SHORTEST_PERIOD = 32
"""Minimum number of steps over which the loss is averaged before a length counts as solved."""

RUN = {
    "hidden": 128, "embedding": 16, "bptt": 4, "lr": 5e-3, "beta2": 0.95, "minutes": 10.0,
    "eval_every": 2_000_000,
}  # fmt: skip
"""Settings for minutes on one CPU core."""
METHOD = {
    "synthesizer": "linear", "synthesizer_reads": "state", "synthesizer_lr": 5e-3, "scale": 1.0,
    "discount": 0.97,
}  # fmt: skip
PAPER = Preset(
    run={"hidden": 256, "embedding": 16, "bptt": 5, "batch_size": 256, "lr": 7e-5, "clip": 0.0},
    dni={**PUBLISHED_DNI, "synthesizer_lr": 7e-5},
)


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Copy: read N random symbols and a stop, then write them and a stop. N grows as it is learnt.

    Each episode begins from the initial state. N begins at 1 and grows by one whenever the loss falls
    under 0.15 bits per written symbol. The score is the longest N solved (published: T_task = N + 3).
    Source: Jaderberg et al. 2017, arXiv:1608.05343, §3.2.
    """

    presets: ClassVar = {
        "default": Preset(
            run={**RUN, "hidden": 256, "batch_size": 32, "lr": 3e-3, "beta2": 0.98},
            dni={**METHOD, "context": "next-tokens:48", "discount": 0.99, "synthesizer_lr": 3e-3},
        ),
        "paper": PAPER,
    }

    symbols: int = 8
    """Number of distinct symbols."""

    def __post_init__(self) -> None:
        _check(self.symbols)

    def load(self, data_dir: Path | None) -> EpisodeData:
        """Nothing is read: the episodes are generated."""
        return EpisodeData("copy", self.symbols, repeats=False)


@dataclass(frozen=True, kw_only=True)
class RepeatCopy:
    """Repeat copy: read N random symbols, a stop and a number R, then write them R times and a stop.

    Each episode begins from the initial state. N and R begin at 1 and grow in turn, whenever the loss
    falls under 0.15 bits per written symbol. The score is T_task = N·R + 3 of the longest solved.
    Source: Jaderberg et al. 2017, arXiv:1608.05343, §3.2.
    """

    presets: ClassVar = {
        "default": Preset(run=RUN, dni={**METHOD, "context": "next-tokens:32"}),
        "paper": PAPER,
    }

    symbols: int = 8
    """Number of distinct symbols."""

    def __post_init__(self) -> None:
        _check(self.symbols)

    def load(self, data_dir: Path | None) -> EpisodeData:
        """Nothing is read: the episodes are generated."""
        return EpisodeData("repeat-copy", self.symbols, repeats=True)


def _check(symbols: int) -> None:
    if symbols < 2:
        raise UsageError(f"--symbols must be at least 2, not {symbols}")


MOST_REPEATS = 64
"""Larger R share the input symbol of this one."""


@dataclass(frozen=True)
class EpisodeData:
    """The episodes of either task. Order of input symbols: random symbols, stop, blank, and the numbers R.

    Attributes:
      distinct: number of distinct random symbols.
      repeats: whether the task is repeat copy.

    The level of copy is N; of repeat copy (N, R) at the levels 1, 2, 3, ... is (1, 1), (2, 1), (2, 2), ...
    """

    name: str
    distinct: int
    repeats: bool

    @property
    def input_symbols(self) -> int:
        return self.distinct + 2 + (MOST_REPEATS if self.repeats else 0)

    @property
    def target_symbols(self) -> int:
        return self.distinct + 1

    def shape(self, level: int) -> tuple[int, int]:
        """(N, R) at a level."""
        return (level // 2 + 1, (level + 1) // 2) if self.repeats else (level, 1)

    def length(self, level: int) -> int:
        """Steps of an episode: N symbols, a stop, R in repeat copy, and N·R + 1 to write."""
        n, r = self.shape(level)
        return n + 1 + self.repeats + n * r + 1

    def score(self, level: int) -> int:
        """N for a level of copy; T_task = N·R + 3 for repeat copy, as published."""
        n, r = self.shape(level)
        return n * r + 3 if self.repeats and level else level

    def stream(self, split: Split, batch_size: int, seed: int) -> EpisodeStream:
        """Random episodes; the three splits and all seeds are different streams."""
        import numpy as np

        from dni_rnn.data.curriculum import Curriculum
        from dni_rnn.data.generated import EpisodeStream, Segment
        from dni_rnn.data.task import SPLITS
        from dni_rnn.window import UNSCORED

        stop, blank = self.distinct, self.distinct + 1

        def generate(random: np.random.Generator, count: int, level: int) -> Segment:
            n, r = self.shape(level)
            word = random.integers(self.distinct, size=(n, count))
            inputs = np.full((self.length(level), count), blank)
            targets = np.full_like(inputs, UNSCORED)
            inputs[:n], inputs[n] = word, stop
            if self.repeats:
                inputs[n + 1] = blank + min(r, MOST_REPEATS)
            targets[-n * r - 1 : -1], targets[-1] = np.tile(word, (r, 1)), stop
            decided_at = np.zeros(len(inputs), dtype=np.int64)
            decided_at[-n * r - 1 : -1], decided_at[-1] = np.tile(np.arange(n), r), n + self.repeats
            return Segment(inputs, targets, np.arange(len(inputs)) - decided_at)

        curriculum = Curriculum(1, SOLVED, lambda level: max(self.length(level), SHORTEST_PERIOD), self.score)
        return EpisodeStream(
            generate,
            batch_size,
            EVALUATION_SYMBOLS,
            idle=blank,
            seed=[seed, SPLITS.index(split)],
            curriculum=curriculum,
        )
