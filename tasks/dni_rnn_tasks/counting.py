"""Counting digits with two networks at different rates.

Jaderberg et al. 2017, §3.2, do not say over what A counts, when B answers, or where a stream begins. Chosen
here: a block of T² digits is a sequence, in which both states begin at zero; A answers after every T digits,
with the number of odd ones in the block so far, so it has to carry its count across its own windows; B
answers once, after its T messages, so the gradient of an early message has to pass through all later ticks.
Each answer is one of T² + 1 classes. With T = 4, always answering the likeliest is wrong in 73 % of A's
answers and 68 % of B's.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from dni_rnn.config import Preset, RunConfig
from dni_rnn.config.base import check_critic, decide_restore
from dni_rnn.config.spelling import parse_synthesizer
from dni_rnn.data.labelled import Examples
from dni_rnn.errors import UsageError
from dni_rnn.metrics import COUNTS, Metric
from dni_rnn_tasks.images import MNIST

if TYPE_CHECKING:
    from torch import Tensor

    from dni_rnn.training.learner import Learner


@dataclass(frozen=True, kw_only=True)
class CountingConfig(RunConfig):
    """Settings of a run of two networks at different rates, besides the options of their task."""

    metric: ClassVar[Metric] = COUNTS
    depth_name: ClassVar[str] = "T"
    amount: ClassVar[str] = "digits"
    changeable: ClassVar[frozenset[str]] = RunConfig.changeable | {"digits", "steps"}

    bptt: int = 4
    """T: digits from one message to the next, and messages per answer of B; a block is T² digits."""
    decoupled: bool = False
    """Cut the nets: A learns after T digits, B after its own ticks. Else one joint update per block."""
    dni: bool = False
    """Cut the nets, with a synthetic gradient on the message and at each net's own window boundaries."""
    correct: bool = False
    """At the end of a block also learn from the residuals g − ĝ of all messages: late, but exact."""
    ticks: int | None = None
    """Ticks of B between its window boundaries; the default is T, the whole block."""

    hidden: int = 128
    """Units of every layer, and of the message."""
    synthesizer: str = "linear"
    """linear, mlp (one hidden layer as wide as the nets), mlp:WIDTH[,WIDTH] (units, or 1/4 of theirs)."""
    context: Literal["targets", "none"] = "targets"
    """What synthesizers are conditioned on: the remaining targets of the block, or nothing."""
    critic: bool = True
    """For the message, use the derivative of a predicted loss instead of a regressed gradient."""
    scale: float = 1.0
    """Weight of the synthetic gradient of the message."""
    centre: bool = True
    """Subtract the batch mean from the synthetic gradient."""
    restore: float | None = None
    """Strength of the penalty on states and messages beyond ±3 where the nets are cut, in units of typical
    gradients. The default is 0.1 with --dni and 0 without."""

    batch_size: int = 64
    """Batch rows, read in parallel."""
    lr: float = 1e-3
    """Adam's learning rate for the nets."""
    synthesizer_lr: float = 1e-3
    """Adam's learning rate for the synthesizers."""
    clip: float = 1.0
    """Maximum norm of the gradient of a step; 0: no clipping."""
    digits: int | None = None
    """Number of digits to train on. The default is 1,200,000."""
    steps: int | None = None
    """Train for this many updates instead, a block each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("ticks", "hidden", "batch_size", "lr", "synthesizer_lr", "digits", "steps")
        self._check_budget()
        self._check_not_negative("clip", "scale", "restore")
        if self.bptt < 2:
            raise UsageError(f"--bptt must be at least 2, not {self.bptt}: else there is but one rate")
        if self.ticks is not None and self.bptt % self.ticks:
            raise UsageError(f"--ticks {self.ticks} must divide --bptt {self.bptt}")
        self._check_dni("ticks", "synthesizer", "context", "critic", "scale", "centre", "synthesizer_lr")
        check_critic(self)
        parse_synthesizer(self.synthesizer)
        if self.correct and not self.cut:
            raise UsageError("--correct works where nets are cut: add --dni or --decoupled")
        if self.restore and not self.cut:
            raise UsageError("--restore works where nets are cut: add --dni or --decoupled")

    @property
    def cut(self) -> bool:
        return self.decoupled or self.dni

    @property
    def resolved(self) -> Self:
        return decide_restore(self)

    @property
    def synthesizer_hidden(self) -> tuple[int | Fraction, ...]:
        """Widths of the synthesizers' hidden layers (`parse_synthesizer`)."""
        return parse_synthesizer(self.synthesizer)

    @property
    def method(self) -> str:
        """`lock-step`, `decoupled`, `decoupled+restore`, `dni+targets`, `dni-online` (unconditioned)."""
        if not self.dni:
            return f"decoupled{'+restore' if self.restore else ''}" if self.decoupled else "lock-step"
        return "dni+targets" if self.context == "targets" else "dni-online"

    @property
    def budget(self) -> tuple[str, float] | None:
        return super().budget if self.digits is None else ("symbols", self.digits)

    @property
    def depth(self) -> int:
        return self.bptt

    @property
    def folder(self) -> str:
        return f"{self.method}-T{self.bptt}"


@dataclass(frozen=True)
class CountedDigits(Examples):
    """Digits; one network counts the odd ones and the other the 3s."""

    def answers(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """labels (windows, steps, B) -> odd digits so far after each window (windows, B); 3s in all (B,)."""
        return (labels % 2).sum(1).cumsum(0), (labels == 3).sum((0, 1))


@dataclass(frozen=True, kw_only=True)
class Counting:
    """Two networks at different rates count in a stream of MNIST digits.

    Network A sees every digit; after every T of them it answers how many were odd, and sends network B a
    message. B sees only the messages; after T of them it answers how many 3s were among the T² digits. Both
    are reset after T² digits.
    """

    config: ClassVar[type[CountingConfig]] = CountingConfig
    presets: ClassVar = {
        "default": Preset(run={"eval_every": 100_000}),
        "paper": Preset(
            run={"hidden": 256, "lr": 1e-5, "digits": 100_000_000},
            dni={
                "synthesizer_lr": 1e-5, "context": "none", "critic": False, "synthesizer": "mlp",
                "scale": 10.0, "centre": False, "restore": 0.0,
            },
        ),
    }  # fmt: skip

    @staticmethod
    def learner() -> type[Learner]:
        from dni_rnn_tasks.counting_learner import CountingLearner

        return CountingLearner

    def load(self, data_dir: Path | None) -> CountedDigits:
        """MNIST; see `dni_rnn_tasks.images`."""
        digits = MNIST().load(data_dir)
        return CountedDigits("counting/mnist", digits.symbols, digits.train, digits.valid, digits.test)
