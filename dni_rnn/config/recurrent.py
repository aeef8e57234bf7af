"""Recurrent runs: truncated BPTT on streams, with what replaces the gradient that truncation cuts off."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal, Self

from dni_rnn.config.base import RunConfig, check_critic, decide_restore
from dni_rnn.config.spelling import parse_call, parse_context, parse_synthesizer
from dni_rnn.errors import UsageError
from dni_rnn.metrics import BPC, Metric
from dni_rnn.registry import check, is_import

PUBLISHED_DNI: Mapping[str, Any] = {
    "context": "none", "synthesizer": "mlp", "scale": 0.1, "centre": False, "restore": 0.0
}  # fmt: skip
"""The method as published: one hidden layer on the core's output, scaled by 0.1, no centring, no penalty."""


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig(RunConfig):
    """Settings of a recurrent training run, besides the options of its task."""

    metric: ClassVar[Metric] = BPC
    depth_name: ClassVar[str] = "T"
    amount: ClassVar[str] = "chars"
    changeable: ClassVar[frozenset[str]] = RunConfig.changeable | {"chars", "steps", "state_limit"}

    core: str = "lstm"
    """Recurrent core: lstm, gru, rnn (tanh), mingru, diagonal, one registered by a package, or
    package.module:Cell. Arguments follow commas: NAME,argument=value."""
    hidden: int = 256
    """Units per layer."""
    layers: int = 1
    """Stacked recurrent layers."""
    embedding: int = 128
    """Width of the input embedding."""

    bptt: int = 20
    """Truncation length T: steps per window, over which gradients are backpropagated."""
    random_truncation: float = 0.0
    """Fraction of windows that end early, at a random step; a net can exploit evenly spaced boundaries."""
    accumulate: int = 1
    """Windows per update. Methods with equal bptt × accumulate update after the same number of symbols."""
    estimator: str | None = None
    """Gradient estimator: bptt (truncated, the default), full (through all --accumulate windows), or
    package.module:Estimator. Arguments follow commas: NAME,argument=value."""
    trace: int | Literal["all"] = 0
    """Length of the trace: the gradient at a window's start reaches so many earlier steps, along each cell's
    own path (exact for element-wise cores), with any method; 0: no trace. all: every step, with memory of
    rows × weights of the core, for small or element-wise cores. On text, 32 with --restore 0.1 beat truncated
    BPTT at T = 1, 2, 8 and 20 (results/ptb-published, ptb-trace)."""
    trace_decay: float = 1.0
    """Factor on the trace per step."""
    lookahead: int = 0
    """Also backpropagate through so many steps after each window (overlapping windows): an upper bound for a
    synthesizer conditioned on so many symbols. 0: none."""
    dni: bool = False
    """Use a synthetic gradient at each truncation boundary. On text, a trace gains more."""
    restore: float | None = None
    """Strength of the state penalty on elements beyond ±3, in units of typical gradients, with any method;
    keeps the state from growing. The default is 0.1 with --dni and 0 without."""
    synthesizer: str = "mlp:1/4"
    """linear, mlp (one hidden layer as wide as the core), mlp:WIDTH[,WIDTH] (units, or 1/4 of the core's), or
    package.module:Class."""
    synthesizer_reads: Literal["hidden", "state"] = "hidden"
    """Input of the synthesizer: the hidden state, which is the core's output, or the whole state."""
    critic: bool = False
    """The synthesizer predicts the loss of the symbols it is conditioned on; its derivative is used."""
    context: str = "next-tokens:8"
    """What the synthesizer is conditioned on: none, or the next W symbols, next-tokens:W."""
    scale: float = 0.9
    """Weight of the synthetic gradient; with bootstrapped targets, also a discount per boundary."""
    discount: float = 1.0
    """Discount per step: a boundary after T steps is weighted by scale × discount^T."""
    centre: bool = True
    """Subtract the batch mean from the synthetic gradient."""
    audit: int = 0
    """Updates between comparisons of the synthetic gradient with the true gradient of 32 steps. The
    least-squares coefficient of the true on the synthetic one (trust, in the metrics) becomes its weight. 0:
    never."""
    aux: bool = False
    """Auxiliary task: predict the synthetic gradient one window ahead."""
    aux_weight: float = 0.1
    """Weight of its dimensionless error, relative to the mean loss in nats."""

    batch_size: int = 64
    """Batch rows, read in parallel."""
    lr: float = 1e-3
    """Adam's learning rate for the net."""
    synthesizer_lr: float = 1e-3
    """Adam's learning rate for the synthesizer."""
    beta2: float = 0.999
    """Adam's beta2; lower values suit a task with a curriculum."""
    anneal: bool = False
    """Decay both learning rates to zero with a cosine schedule over --chars or --steps."""
    clip: float = 1.0
    """Maximum norm of the net's gradient per update; 0: no clipping."""

    chars: int | None = None
    """Train on this many symbols. The default is one pass over the training text."""
    steps: int | None = None
    """Train for this many updates instead."""

    state_limit: float = 1000.0
    """Stop when the root mean square of the recurrent state exceeds this; a few units are normal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive(
            "hidden", "layers", "embedding", "bptt", "accumulate", "batch_size", "chars", "steps",
            "lr", "synthesizer_lr", "state_limit", "aux_weight",
        )  # fmt: skip
        if not 0 <= self.trace_decay <= 1:
            raise UsageError(f"--trace-decay must lie between 0 and 1, not {self.trace_decay}")
        if not self.trace:
            self._refuse("does nothing without --trace; add --trace 32", "trace_decay")
        elif self.trace != "all":
            self._check_not_negative("trace")
        self._check_not_negative("clip", "scale", "restore", "audit", "lookahead")
        if not 0 < self.beta2 < 1:
            raise UsageError(f"--beta2 must lie between 0 and 1, not {self.beta2}")
        if not 0 <= self.random_truncation <= 1:
            raise UsageError(
                f"--random-truncation is a share of windows, from 0 to 1, not {self.random_truncation}"
            )
        if not 0 < self.discount <= 1:
            raise UsageError(f"--discount must lie above 0 and at most at 1, not {self.discount}")
        self._check_budget()
        if self.anneal and self.minutes is not None:
            raise UsageError("--anneal needs --chars or --steps, not --minutes")
        self._check_dni(
            "synthesizer", "synthesizer_reads", "critic", "context", "scale", "discount", "centre", "audit",
            "aux", "synthesizer_lr",
        )  # fmt: skip
        check_critic(self)
        if not self.aux:
            self._refuse("does nothing without --aux; add --aux", "aux_weight")
        if not is_import(self.synthesizer):
            parse_synthesizer(self.synthesizer)
        parse_context(self.context)
        check("cores", self.core_spec[0])
        check("estimators", self.estimator_spec[0])
        if self.critic and is_import(self.synthesizer):
            raise UsageError(
                f"--synthesizer {self.synthesizer}: a critic has a classifier of its own; add --no-critic"
            )
        if self.dni and self.estimator is not None:
            raise UsageError("--dni is an estimator of its own: leave out --estimator or --dni")
        if self.lookahead and (self.dni or self.estimator is not None):
            other = "--dni" if self.dni else "--estimator"
            raise UsageError(f"--lookahead is an estimator of its own: leave out {other} or --lookahead")
        if self.estimator_spec[0] == "dni" and not self.dni:
            raise UsageError("--estimator dni needs a synthesizer: give --dni in its place")

    def for_world_size(self, processes: int) -> Self:
        """With the batch rows shared equally by the processes."""
        if self.processes not in (None, processes):
            raise UsageError(f"--processes {self.processes}, but {processes} were started")
        if self.batch_size % processes:
            raise UsageError(
                f"--batch-size {self.batch_size} cannot be shared equally by {processes} processes: "
                "give a multiple of them"
            )
        return dataclasses.replace(self, processes=processes)

    @property
    def resolved(self) -> Self:
        return decide_restore(self)

    @property
    def synthesizer_hidden(self) -> tuple[int | Fraction, ...]:
        """Widths of its hidden layers (`parse_synthesizer`); `package.module:Class` has none."""
        return () if is_import(self.synthesizer) else parse_synthesizer(self.synthesizer)

    @property
    def context_window(self) -> int:
        """How many symbols the synthesizer is conditioned on."""
        return parse_context(self.context)

    @property
    def core_spec(self) -> tuple[str, dict[str, Any]]:
        """Name of the core and its keyword arguments."""
        return parse_call("--core", self.core)

    @property
    def estimator_spec(self) -> tuple[str, dict[str, Any]]:
        """Name of the estimator and its keyword arguments."""
        if self.estimator is not None:
            return parse_call("--estimator", self.estimator)
        if self.lookahead:
            return "lookahead", {"steps": self.lookahead}
        return "dni" if self.dni else "bptt", {}

    @property
    def weight(self) -> float:
        """Weight of one symbol in an update: 1 / (T·accumulate·B), also in a window shorter than T."""
        return 1.0 / (self.bptt * self.accumulate * self.batch_size)

    @property
    def method(self) -> str:
        """Name in tables: `bptt`, `bptt+restore`, `dni-online` (unconditioned), `dni+next-tokens:8`."""
        if not self.dni:
            ahead = f"+lookahead:{self.lookahead}" if self.lookahead else ""
            name = f"{self.estimator or 'bptt'}{ahead}{'+restore' if self.restore else ''}"
        else:
            context = "-online" if self.context == "none" else f"+{self.context}"
            name = f"dni{context}{'+critic' if self.critic else ''}{'+aux' if self.aux else ''}"
        return f"{name}+trace" if self.trace else name

    @property
    def budget(self) -> tuple[str, float] | None:
        return super().budget if self.chars is None else ("symbols", self.chars)

    @property
    def changeable_on_resume(self) -> frozenset[str]:
        return self.changeable - {*self.budgets()} if self.anneal else self.changeable

    @property
    def depth(self) -> int:
        return self.bptt

    @property
    def folder(self) -> str:
        return re.sub(r"[^A-Za-z0-9.+]+", "-", self.method.replace(":", "")) + f"-T{self.bptt}"
