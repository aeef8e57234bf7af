"""A stream from standard input, learnt online."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from dni_rnn.config import Preset, RecurrentConfig, RunConfig
from dni_rnn.errors import UsageError

if TYPE_CHECKING:
    from dni_rnn.data.task import Split
    from dni_rnn.training.learner import Learner
    from dni_rnn_tasks.live_learner import LiveStream

BYTES = 256


@dataclass(frozen=True, kw_only=True)
class LiveConfig(RecurrentConfig):
    """A recurrent run on a stream that is read once, as it arrives."""

    lag: int | None = None
    """Number of symbols by which training lags behind the newest; the synthesizer is conditioned on these, as
    with --context next-tokens:LAG. 0 is strictly online, with any method. The default follows --context."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anneal and self.budget is None:
            raise UsageError("--anneal must know the end of a stream: add --chars or --steps")
        if self.lookahead or self.estimator_spec[0] == "lookahead":
            raise UsageError(
                "live: --lookahead needs later symbols, which a stream does not have; use --trace or --dni"
            )
        if self.lag is None:
            return
        if self.lag < 0:
            raise UsageError(f"--lag must not be negative, not {self.lag}")
        if self.lag and not self.dni:
            raise UsageError(f"--lag {self.lag} does nothing without --dni; add --dni")
        if self.context != RecurrentConfig.context and self.context_window != self.lag:
            raise UsageError(
                f"--lag {self.lag} and --context {self.context} disagree on how much is known; give one"
            )

    def for_world_size(self, processes: int) -> Self:
        """In one process: a stream can be read only once."""
        RunConfig.for_world_size(self, processes)
        return self

    @property
    def resolved(self) -> Self:
        decided = super().resolved
        if not self.dni:
            return decided
        if self.lag is None:
            return dataclasses.replace(decided, lag=self.context_window)
        if self.context_window == self.lag:
            return decided
        return dataclasses.replace(decided, context=f"next-tokens:{self.lag}" if self.lag else "none")

    @property
    def context_window(self) -> int:
        return 0 if self.lag == 0 and not self.dni else super().context_window

    @property
    def method(self) -> str:
        """As offline, with `+lag` if the context costs a lag: `dni+next-tokens:8+lag`."""
        known = self.dni and self.context_window
        return f"{super().method}+lag" if known else super().method


@dataclass(frozen=True, kw_only=True)
class Live:
    """The bytes of standard input, learnt online, without end and in constant memory.

        tail -f server.log | dni-rnn train live --dni --out runs/log

    Every byte is predicted before it is learnt; the bits per character are of those predictions. With
    --lag W training lags W bytes behind the newest, and the synthesizer is conditioned on them. With --lag 0
    it is strictly online. Ctrl-C, or the end of the input, saves; --resume continues with new input. For a
    slow stream use --batch-size 1 --no-centre: every byte is learnt when it arrives.
    """

    config: ClassVar = LiveConfig
    presets: ClassVar = {
        "default": Preset(run={"batch_size": 16, "hidden": 128, "bptt": 8, "eval_every": 100_000})
    }

    stretch: int = 256
    """With several batch rows: consecutive bytes for one row before the next row gets as many."""

    def __post_init__(self) -> None:
        if self.stretch < 1:
            raise UsageError(f"--stretch must be positive, not {self.stretch}")

    @staticmethod
    def learner() -> type[Learner]:
        from dni_rnn_tasks.live_learner import LiveLearner

        return LiveLearner

    def load(self, data_dir: Path | None) -> LiveData:
        """Nothing is read yet."""
        return LiveData(self.stretch)


@dataclass(frozen=True)
class LiveData:
    """Standard input as a task's data: a training stream only."""

    stretch: int
    name: str = "live"
    input_symbols: int = BYTES
    target_symbols: int = BYTES
    of_bytes: bool = True

    def stream(self, split: Split, batch_size: int, seed: int) -> LiveStream:
        from dni_rnn_tasks.live_learner import LiveStream, standard_input

        if split != "train":
            raise UsageError(
                "live: a stream has no held-out part; the run's metrics.jsonl and summary.json have its loss "
                "on each symbol before that was learnt"
            )
        return LiveStream(standard_input(), batch_size, self.stretch)
