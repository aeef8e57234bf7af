"""What a run is: one frozen dataclass. Its fields are the flags, its docstrings their help.

Nothing here imports torch: `dni-rnn --help` reads this module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

from dni_rnn.errors import UsageError
from dni_rnn.metrics import BPC, COUNTS, ERROR, Metric


@dataclass(frozen=True, kw_only=True)
class SynthesizerSpec:
    """`--synthesizer` read."""

    hidden: tuple[int | Fraction, ...]
    """Widths of the hidden layers: units, or a fraction of the width of what M reads."""

    @classmethod
    def parse(cls, text: str) -> SynthesizerSpec:
        """`linear`, `mlp` (one hidden layer as wide as the core), `mlp:128`, `mlp:1/4`, `mlp:512,512`."""
        if text == "linear":
            return cls(hidden=())
        name, _, widths = text.partition(":")
        try:
            hidden = [Fraction(width) for width in (widths if text != "mlp" else "1/1").split(",")]
            whole = [width.denominator == 1 and text != "mlp" for width in hidden]
        except (ValueError, ZeroDivisionError):
            hidden, whole = [], []
        good = [width >= 1 if units else 0 < width <= 1 for width, units in zip(hidden, whole, strict=True)]
        if name != "mlp" or len(good) not in (1, 2) or not all(good):
            raise UsageError(
                f"--synthesizer {text}: give linear, mlp, mlp:WIDTH or mlp:WIDTH,WIDTH; "
                "a WIDTH is a number of units or, as 1/4, a part of the core's"
            )
        return cls(hidden=tuple(int(w) if units else w for w, units in zip(hidden, whole, strict=True)))

    def widths(self, core: int) -> list[int]:
        """Units of the hidden layers for a core of so many."""
        return [units(width, core) for width in self.hidden]


def units(width: int | Fraction, core: int) -> int:
    """A width as a number of units; a fraction is one of `core`, at least one unit."""
    return width if isinstance(width, int) else max(1, round(width * core))


@dataclass(frozen=True, kw_only=True)
class ContextSpec:
    """`--context` read: how many coming symbols M is told, and how they are encoded."""

    encoder: str
    """`none`, `next-tokens` or `gru`."""
    window: int
    width: int
    """Of the shared table of next-tokens, 0 for one-hot; of the GRU."""

    @classmethod
    def parse(cls, text: str) -> ContextSpec:
        """`none`, `next-tokens:W` (one-hot), `next-tokens:W:E` (embedded in E dimensions), `gru:W:UNITS`, or
        `gru:W` with 128 units.
        """
        if text == "none":
            return cls(encoder="none", window=0, width=0)
        wrong = f"--context {text}: give none, next-tokens:W, next-tokens:W:EMBEDDING, gru:W or gru:W:UNITS"
        encoder, *numbers = text.split(":")
        try:
            least, usual = {"next-tokens": (0, 0), "gru": (1, 128)}[encoder]
            window, width = int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else usual
        except (KeyError, IndexError, ValueError):
            raise UsageError(wrong) from None
        if len(numbers) > 2 or window < 1 or width < least:
            raise UsageError(wrong)
        return cls(encoder=encoder, window=window, width=width)


@dataclass(frozen=True)
class Preset:
    """Defaults of one task under a name.

    Attributes:
      run: values for fields of the task's configuration.
      dni: more of them, when `--dni` is given.
      task: values for fields of the task.
    """

    run: Mapping[str, Any] = field(default_factory=dict)
    dni: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)


PUBLISHED_DNI: Mapping[str, Any] = {
    "context": "none", "synthesizer": "mlp", "scale": 0.1, "centre": False, "restore": 0.0
}  # fmt: skip
"""The method as published: one hidden layer on the core's output, scaled by 0.1, nothing that grounds it."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run has, whatever it trains. A task names its configuration in `Task.config`."""

    learner: ClassVar[str]
    """Module and class of what is trained, `module:Class`; see `dni_rnn.training.loop.BaseLearner`."""
    part_learner: ClassVar[str]
    """The same for parts in processes of their own; see `dni_rnn.distributed.part.ProcessPart`."""
    metric: ClassVar[Metric]
    """What runs are judged by."""
    depth_name: ClassVar[str]
    """What tables call `depth`."""
    free: ClassVar[frozenset[str]] = frozenset(
        [
            "device",
            "threads",
            "graph",
            "data_dir",
            "out",
            "resume",
            "log_every",
            "save_every",
            "processes",
            "timeout",
        ]
    )
    """Fields that do not change what any one update does."""

    seed: int = 0
    """Of the initial weights and of generated data."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a CUDA device when there is one."""
    threads: int | None = None
    """CPU threads; the default is torch's."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Of the products of the net and its synthesizers; weights are float32. tf32 is for CUDA devices."""
    graph: bool = True
    """On a CUDA device, replay updates as CUDA graphs."""
    data_dir: Path | None = None
    """Folder that holds the data files."""
    out: Path | None = None
    """Run directory. The default is below runs/, named after task, method and seed."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint."""
    log_every: int = 50
    """Updates between rows of metrics.jsonl."""
    eval_every: int = 500_000
    """Training symbols between validations."""
    save_every: float = 30.0
    """Seconds between checkpoints."""
    processes: int | None = None
    """Train in so many processes of this machine, as torchrun --nproc-per-node starts them."""
    timeout: float = 300.0
    """Seconds after which a process that does nothing is reported as hanging; longer than a validation."""

    def __post_init__(self) -> None:
        self._check_positive("threads", "log_every", "eval_every", "processes", "timeout")
        if not self.save_every >= 0:
            raise UsageError("--save-every must not be negative")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must lie between 0 and 2^63 - 1, not {self.seed}")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name.replace('_', '-')} must be positive, not {value}")

    @property
    def method(self) -> str:
        """What tables call it."""
        raise NotImplementedError

    @property
    def may_change(self) -> frozenset[str]:
        """Settings that may be others when this run is resumed."""
        return self.free

    @property
    def budget(self) -> tuple[str, float] | None:
        """How long to train: ("steps", "minutes" or "symbols", how many); None is one pass over the data."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Through how much backpropagation would go: T steps, or layers. The colour of a line in a plot."""
        raise NotImplementedError

    @property
    def folder(self) -> str:
        """What its run directory is called by default, besides the task and the seed."""
        raise NotImplementedError

    @property
    def resolved(self) -> Any:
        """The same with every setting that was left to others decided."""
        return self

    def among(self, processes: int) -> Any:
        """The same as it is in so many processes that train together.

        Raises:
          UsageError: it cannot be.
        """
        if self.processes not in (None, processes):
            raise UsageError(f"--processes {self.processes}, but {processes} were started")
        if processes > 1:
            raise UsageError("this trains in one process: leave out --processes, and torchrun")
        return self


def _check_dni(config: Any, *names: str) -> None:
    """Refuse settings `names` that do nothing without --dni, and --dni that has no row to compare with."""
    for name in () if config.dni else names:
        if getattr(config, name) != getattr(type(config), name):
            raise UsageError(f"--{name.replace('_', '-')} does nothing without --dni; add --dni")
    if config.dni and config.centre and config.batch_size == 1:
        raise UsageError("--batch-size 1: a mean over one row leaves no synthetic gradient; add --no-centre")


def _check_critic(config: Any) -> None:
    """Refuse a critic that is told nothing."""
    if config.critic and config.context == "none":
        raise UsageError("--context none: a critic predicts the loss of known targets; add --no-critic")


BUDGETS = ("chars", "minutes", "steps")
"""Fields of `TrainConfig` that say when to stop; at most one is given."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Everything that decides what a recurrent training run does, beside the options of its task."""

    learner: ClassVar[str] = "dni_rnn.training.loop:Learner"
    metric: ClassVar[Metric] = BPC
    depth_name: ClassVar[str] = "T"
    free: ClassVar[frozenset[str]] = RunConfig.free | {*BUDGETS, "state_limit"}

    core: Literal["lstm", "gru", "rnn"] = "lstm"
    """Recurrent core; rnn is the tanh RNN."""
    hidden: int = 256
    """Units per layer."""
    layers: int = 1
    """Stacked recurrent layers."""
    embedding: int = 128
    """Width of the input embedding."""

    bptt: int = 20
    """T: steps per window, the length that gradients are backpropagated."""
    shorten: float = 0.0
    """Share of windows that end early, at a random step: a net can learn an even grid of boundaries."""
    accumulate: int = 1
    """Windows per update. Methods with equal bptt × accumulate update after the same number of symbols."""
    dni: bool = False
    """Put a synthetic gradient at each truncation boundary."""
    synthesizer: str = "mlp:1/4"
    """linear, mlp (one hidden layer as wide as the core), mlp:WIDTH[,WIDTH] (units, or 1/4 of the core's), or
    none, which leaves the restoring force alone."""
    synthesizer_reads: Literal["hidden", "state"] = "hidden"
    """The synthesizer reads the hidden state, which is the core's output, or the whole state."""
    critic: bool = False
    """The synthesizer predicts the loss of what it is told will come, and is differentiated."""
    context: str = "next-tokens:8"
    """What the synthesizer is told of what comes: none, next-tokens:W[:EMBEDDING] or gru:W[:UNITS]."""
    reading: Literal["boundary", "next-output"] = "boundary"
    """The synthesizer reads the boundary state, or the state after one more input."""
    scale: float = 0.9
    """Weight of the synthetic gradient; as it is bootstrapped, also a discount at each boundary."""
    discount: float = 1.0
    """Discount of the future per step: a boundary after T steps weighs by scale × discount^T."""
    centre: bool = True
    """Subtract the batch mean from the synthetic gradient."""
    restore: float = 0.1
    """Restoring force on a state beyond ±3, in units of the real gradients; stops it from running away."""
    audit: int = 0
    """Updates from one measurement of the synthetic gradient to the next: against a real one of 32 steps. Its
    weight is what they support (trust, in the metrics). 0 trusts it."""
    aux: bool = False
    """Auxiliary task: predict the synthetic gradient one window ahead."""
    aux_weight: float = 0.1
    """Weight of its dimensionless error beside the mean loss in nats."""

    batch_size: int = 64
    """Rows read side by side."""
    lr: float = 1e-3
    """Adam's learning rate for the net."""
    synthesizer_lr: float = 1e-3
    """Adam's learning rate for the synthesizer."""
    beta2: float = 0.999
    """Decay of Adam's mean square gradient; a shorter memory suits a task that grows."""
    anneal: bool = False
    """Let both learning rates fall to zero along a cosine, over --chars or --steps."""
    clip: float = 1.0
    """Largest norm of the net's gradient per update; 0 switches clipping off."""

    chars: int | None = None
    """Train on this many symbols. The default is one pass over the training text."""
    minutes: float | None = None
    """Train for this long instead (evaluation not counted)."""
    steps: int | None = None
    """Train for this many updates instead."""

    state_limit: float = 1000.0
    """Stop when the root mean square of the recurrent state exceeds this; in health it is a few units."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive(
            "hidden", "layers", "embedding", "bptt", "accumulate", "batch_size", "chars", "minutes", "steps",
            "lr", "synthesizer_lr", "state_limit", "aux_weight",
        )  # fmt: skip
        for name in ("clip", "scale", "restore", "audit"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"--{name.replace('_', '-')} must not be negative")
        if not 0 < self.beta2 < 1:
            raise UsageError(f"--beta2 must lie between 0 and 1, not {self.beta2}")
        if not 0 <= self.shorten <= 1:
            raise UsageError(f"--shorten is a share of windows, from 0 to 1, not {self.shorten}")
        if not 0 < self.discount <= 1:
            raise UsageError(f"--discount must lie above 0 and at most at 1, not {self.discount}")
        if sum(getattr(self, name) is not None for name in BUDGETS) > 1:
            raise UsageError("give one of --chars, --minutes and --steps, not several")
        if self.anneal and self.minutes is not None:
            raise UsageError("--anneal does not go by the clock: give --chars or --steps, not --minutes")
        _check_dni(
            self, "synthesizer", "synthesizer_reads", "critic", "context", "reading", "scale", "discount",
            "centre", "restore", "audit", "aux", "synthesizer_lr",
        )  # fmt: skip
        _check_critic(self)
        if not self.aux and self.aux_weight != type(self).aux_weight:
            raise UsageError("--aux-weight does nothing without --aux; add --aux")
        if self.silent:
            for name, instead in (
                ("critic", "add --no-critic"),
                ("aux", "add --no-aux"),
                ("audit", "leave it out"),
            ):
                if getattr(self, name):
                    raise UsageError(f"--synthesizer none: --{name} has nothing to work on; {instead}")
        else:
            SynthesizerSpec.parse(self.synthesizer)
        context = ContextSpec.parse(self.context)
        if self.critic and (context.encoder != "next-tokens" or context.width):
            raise UsageError(
                f"--critic has no encoder of its targets: --context next-tokens:{context.window}"
            )
        if self.critic and self.reading != "boundary":
            raise UsageError("--critic is differentiated by the state at the boundary: leave out --reading")

    def among(self, processes: int) -> TrainConfig:
        """With as many rows of the batch in each process."""
        if self.processes not in (None, processes):
            raise UsageError(f"--processes {self.processes}, but {processes} were started")
        if self.batch_size % processes:
            raise UsageError(
                f"--batch-size {self.batch_size} cannot be shared equally by {processes} processes: "
                "give a multiple of them"
            )
        return dataclasses.replace(self, processes=processes)

    @property
    def silent(self) -> bool:
        """There is no synthetic gradient: `--synthesizer none`."""
        return self.synthesizer == "none"

    @property
    def synthesizer_spec(self) -> SynthesizerSpec:
        return SynthesizerSpec.parse(self.synthesizer)

    @property
    def context_spec(self) -> ContextSpec:
        """What is known at a boundary; nothing where there is no synthesizer to tell it."""
        return ContextSpec.parse("none" if self.silent else self.context)

    @property
    def weight(self) -> float:
        """Of one symbol in an update: 1 / (T·accumulate·B), also where a window is shorter than T."""
        return 1.0 / (self.bptt * self.accumulate * self.batch_size)

    @property
    def method(self) -> str:
        """What tables call it: `bptt`, `dni-online` (told nothing of what comes), `dni+next-tokens:8`."""
        if not self.dni:
            return "bptt"
        if self.silent:
            return "bptt+restore"
        context = "-online" if self.context == "none" else f"+{self.context}"
        return f"dni{context}{'+critic' if self.critic else ''}{'+aux' if self.aux else ''}"

    @property
    def budget(self) -> tuple[str, float] | None:
        given = {"symbols": self.chars, "minutes": self.minutes, "steps": self.steps}
        return next(((unit, amount) for unit, amount in given.items() if amount is not None), None)

    @property
    def may_change(self) -> frozenset[str]:
        return self.free - {*BUDGETS} if self.anneal else self.free

    @property
    def depth(self) -> int:
        return self.bptt

    @property
    def folder(self) -> str:
        return f"{self.method.replace(':', '')}-T{self.bptt}"


@dataclass(frozen=True, kw_only=True)
class LiveConfig(TrainConfig):
    """A recurrent run on a stream that is read once, as it comes."""

    learner: ClassVar[str] = "dni_rnn.training.live:LiveLearner"

    lag: int | None = None
    """Symbols that training stays behind the newest: the synthesizer is told these, as --context
    next-tokens:LAG. 0 is strictly online. The default is what --context reaches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anneal and self.budget is None:
            raise UsageError("--anneal must know the end of a stream: add --chars or --steps")
        if self.lag is None:
            return
        if not self.dni:
            raise UsageError("--lag does nothing without --dni; add --dni")
        if self.lag < 0:
            raise UsageError(f"--lag must not be negative, not {self.lag}")
        if self.context != TrainConfig.context and self.context_spec.window != self.lag:
            raise UsageError(
                f"--lag {self.lag} and --context {self.context} disagree on how much is known; give one"
            )

    def among(self, processes: int) -> Any:
        """In one process: a stream can be read only once."""
        return RunConfig.among(self, processes)

    @property
    def resolved(self) -> LiveConfig:
        if self.lag is None:
            return dataclasses.replace(self, lag=self.context_spec.window) if self.dni else self
        if self.context_spec.window == self.lag:
            return self
        return dataclasses.replace(self, context=f"next-tokens:{self.lag}" if self.lag else "none")

    @property
    def method(self) -> str:
        """As offline, and that what is known costs a lag: `dni+next-tokens:8+lag`."""
        known = self.dni and self.context_spec.window
        return f"{super().method}+lag" if known else super().method


@dataclass(frozen=True, kw_only=True)
class FeedforwardConfig(RunConfig):
    """Everything that decides what a feed-forward training run does, beside the options of its task."""

    learner: ClassVar[str] = "dni_rnn.training.feedforward:LayeredLearner"
    part_learner: ClassVar[str] = "dni_rnn.distributed.chain:ChainPart"
    metric: ClassVar[Metric] = ERROR
    depth_name: ClassVar[str] = "layers"
    widths: ClassVar[dict[str, int]] = {"mlp": 256, "cnn": 64, "vgg": 64, "sigmoid": 32}
    """Published widths of the nets, by `model`."""
    paper_synthesizers: ClassVar[dict[tuple[str, str], str]] = {
        ("mlp", "dni"): "mlp:1024,1024",
        ("mlp", "cdni"): "linear",
        ("cnn", "dni"): "mlp:64,64",
        ("cnn", "cdni"): "linear",
    }
    """Published synthesizers, by `model` and `method`."""

    model: Literal["mlp", "cnn", "vgg", "sigmoid"] = "mlp"
    """mlp: Linear-BN-ReLU; cnn: 5x5 convolution-BN-ReLU-pooling; vgg: 11 convolutions of 3x3; sigmoid."""
    layers: int = 4
    """Layers, the last one included; of vgg always 12."""
    width: int | None = None
    """Units or channels per layer; the default is the published one of the task."""
    method: Literal["bprop", "none", "dni", "cdni", "critic"] = "critic"
    """No cut, nothing across it, or synthetic gradients: regressed, with labels, or of a predicted loss."""
    cuts: str = "all"
    """Between which layers: all (of vgg three, after every third), or numbers such as 1,3."""
    update_probability: float = 1.0
    """In each step, each layer takes part in the update with this probability."""
    unlock: bool = False
    """Synthetic inputs too: no layer waits for the one before either."""
    synthesizer: str | None = None
    """linear, mlp, mlp:WIDTH[,WIDTH] (units, or 1/4 of the layer's), of a critic its classifier."""
    recipe: Literal["fast", "paper"] = "fast"
    """Iterations, rates and synthesizers: as published, or chosen for far fewer iterations."""

    epochs: float | None = None
    """Passes over the training data."""
    batch_size: int = 256
    """Rows per update."""
    lr: float | None = None
    """Adam's largest learning rate for the net."""
    synthesizer_lr: float | None = None
    """Adam's largest learning rate for the synthesizers."""
    smoothing: float | None = None
    """Label smoothing of the training loss."""
    augment: bool = False
    """Random shifts, and flips where the task has them."""
    agreement_every: int = 0
    """Log cosine, explained variance and trust of the synthetic gradients every so many updates; 0: never."""

    decoupled: bool = False
    """A process for each part, started by --processes or torchrun. With bprop, parts wait for gradients."""
    queue: int = 2
    """Most messages that are under way from one part to the next. 1 learns as one process does; the more, the
    older the gradients."""
    when_full: Literal["wait", "drop-oldest"] = "wait"
    """What a part does when so many are under way: wait until one arrives, or go on and lose messages."""
    delay: float = 0.0
    """Milliseconds by which every message is held back: what a slow network would do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("layers", "width", "epochs", "batch_size", "lr", "synthesizer_lr", "queue")
        self._check_decoupled()
        if self.layers < 2:
            raise UsageError(f"--layers must be at least 2, not {self.layers}: one layer has no boundary")
        if self.model == "vgg":
            object.__setattr__(self, "layers", 12)
        if self.agreement_every < 0:
            raise UsageError("--agreement-every must not be negative")
        if not 0 <= (self.smoothing or 0) < 1:
            raise UsageError(f"--smoothing must lie between 0 and 1, not {self.smoothing}")
        if not 0 < self.update_probability <= 1:
            raise UsageError(
                f"--update-probability must lie above 0 and at most at 1, not {self.update_probability}"
            )
        if self.method in ("bprop", "none"):
            for name in ("update_probability", "unlock", "agreement_every"):
                if getattr(self, name) != getattr(type(self), name):
                    raise UsageError(
                        f"--{name.replace('_', '-')} needs synthetic gradients: --method dni, cdni or critic"
                    )
        if self.unlock and self.model in ("cnn", "vgg"):
            raise UsageError("--unlock needs layers that hand on vectors: --model mlp or sigmoid")
        if self.synthesizer is not None:
            SynthesizerSpec.parse(self.synthesizer)
        cuts = self.cut_positions
        if list(cuts) != sorted(set(cuts)) or not all(0 < cut < self.layers for cut in cuts):
            raise UsageError(
                f"--cuts {self.cuts}: give all, or rising numbers from 1 to {self.layers - 1} with commas"
            )

    def _check_decoupled(self) -> None:
        if not self.delay >= 0:
            raise UsageError("--delay must not be negative")
        if not self.decoupled:
            for name in ("queue", "when_full", "delay"):
                if getattr(self, name) != getattr(type(self), name):
                    raise UsageError(f"--{name.replace('_', '-')} does nothing without --decoupled")
            return
        if self.method == "none":
            raise UsageError("--method none with --decoupled: only the last part would learn; use another")
        for name in ("update_probability", "unlock", "agreement_every"):
            if getattr(self, name) != getattr(type(self), name):
                raise UsageError(f"--{name.replace('_', '-')} works in one process: leave out --decoupled")

    def among(self, processes: int) -> FeedforwardConfig:
        """With a cut between any two processes; where none are given, with as many layers in each part."""
        if not self.decoupled:
            return super().among(processes)
        if processes < 2 or self.processes not in (None, processes):
            parts = self.processes or (2 if self.cuts == "all" else len(self.cut_positions) + 1)
            raise UsageError(
                f"--decoupled: {processes} started, but each part takes one: --processes {parts}"
            )
        if self.cuts == "all":
            if processes > self.layers:
                raise UsageError(
                    f"{self.layers} layers make no {processes} parts: start at most {self.layers} processes"
                )
            edges = [round(self.layers * part / processes) for part in range(1, processes)]
            return dataclasses.replace(self, cuts=",".join(map(str, edges)))
        if len(self.cut_positions) + 1 != processes:
            raise UsageError(
                f"--cuts {self.cuts} makes {len(self.cut_positions) + 1} parts, but {processes} processes "
                "were started: start one for each part"
            )
        return self

    @property
    def resolved(self) -> FeedforwardConfig:
        """With the recipe's value where nothing was given."""
        values = {name: value for name, value in self._recipe().items() if getattr(self, name) is None}
        return dataclasses.replace(self, **values)

    def _recipe(self) -> dict[str, Any]:
        if self.recipe == "paper":
            return {
                "width": self.widths[self.model],
                # 500,000 iterations, whatever the batch and the task.
                "epochs": 500_000 * self.batch_size / 55_000,
                "lr": 3e-5,
                "synthesizer_lr": 3e-5,
                "smoothing": 0.0,
                "synthesizer": self.paper_synthesizers.get((self.model, self.method)),
            }
        # Told no label, M must stay ahead of the net (faster nets end worse), and a net that is sure of
        # itself leaves it nothing to learn.
        slow = self.method == "dni"
        return {
            "width": self.widths[self.model],
            "epochs": 60.0 if slow else 10.0,
            "lr": 3e-5 if slow else 3e-3,
            "synthesizer_lr": 1e-2 if self.method == "cdni" else 3e-3,
            "smoothing": 0.1 if slow else 0.0,
            "synthesizer": {"dni": "mlp:256,256", "cdni": "mlp", "critic": "linear"}.get(self.method),
        }

    @property
    def synthesizer_spec(self) -> SynthesizerSpec | None:
        """None where nothing is said: the default of `decouple`."""
        return None if self.synthesizer is None else SynthesizerSpec.parse(self.synthesizer)

    @property
    def cut_positions(self) -> tuple[int, ...]:
        """Before which layers the net is cut, as in slicing."""
        if self.cuts == "all":
            return (3, 6, 9) if self.model == "vgg" else tuple(range(1, self.layers))
        try:
            return tuple(int(text) for text in self.cuts.split(","))
        except ValueError:
            return (0,)

    @property
    def budget(self) -> tuple[str, float] | None:
        return None

    @property
    def depth(self) -> int:
        return self.layers

    @property
    def folder(self) -> str:
        return f"{self.model}{self.layers}-{self.method}{'-decoupled' if self.decoupled else ''}"


@dataclass(frozen=True, kw_only=True)
class RatesConfig(RunConfig):
    """Everything that decides what two networks at different rates do, beside the options of their task."""

    learner: ClassVar[str] = "dni_rnn.two_rates:RatesLearner"
    metric: ClassVar[Metric] = COUNTS
    depth_name: ClassVar[str] = "T"
    free: ClassVar[frozenset[str]] = RunConfig.free | {"digits"}

    bptt: int = 4
    """T: digits from one message to the next, and messages that B counts over; a block is T² digits."""
    decoupled: bool = False
    """Cut: A learns after T digits, B after its own ticks. Without it, one joint update per block."""
    dni: bool = False
    """Cut, with a synthetic gradient on the message and at each net's own window boundaries."""
    ticks: int | None = None
    """Of B, from one of its window boundaries to the next; the default is T, the whole block."""

    hidden: int = 128
    """Units of every layer, and of the message."""
    synthesizer: str = "linear"
    """linear, mlp (one hidden layer as wide as the nets), mlp:WIDTH[,WIDTH] (units, or 1/4 of theirs)."""
    context: Literal["targets", "none"] = "targets"
    """What synthesizers are told: the counts that are still to be said in the block, or nothing."""
    critic: bool = True
    """On the message: the derivative of a predicted loss in place of a regressed gradient."""
    scale: float = 1.0
    """Weight of the synthetic gradient of the message."""
    centre: bool = True
    """Subtract the batch mean from the synthetic gradient."""
    restore: float = 0.1
    """Restoring force on what lies beyond ±3, in units of the real gradients."""

    batch_size: int = 64
    """Rows read side by side."""
    lr: float = 1e-3
    """Adam's learning rate for the nets."""
    synthesizer_lr: float = 1e-3
    """Adam's learning rate for the synthesizers."""
    clip: float = 1.0
    """Largest norm of the gradient of a step; 0 switches clipping off."""
    digits: int = 1_200_000
    """How many digits to train on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("ticks", "hidden", "batch_size", "lr", "synthesizer_lr", "digits")
        for name in ("clip", "scale", "restore"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"--{name} must not be negative")
        if self.bptt < 2:
            raise UsageError(f"--bptt must be at least 2, not {self.bptt}: else there is but one rate")
        if self.ticks is not None and self.bptt % self.ticks:
            raise UsageError(f"--ticks {self.ticks} must divide --bptt {self.bptt}")
        _check_dni(
            self, "ticks", "synthesizer", "context", "critic", "scale", "centre", "restore", "synthesizer_lr"
        )
        _check_critic(self)
        SynthesizerSpec.parse(self.synthesizer)

    @property
    def cut(self) -> bool:
        return self.decoupled or self.dni

    @property
    def synthesizer_spec(self) -> SynthesizerSpec:
        return SynthesizerSpec.parse(self.synthesizer)

    @property
    def method(self) -> str:
        """`lock-step`, `decoupled`, `dni+targets`, `dni-online` (told nothing of what comes)."""
        if not self.dni:
            return "decoupled" if self.decoupled else "lock-step"
        return "dni+targets" if self.context == "targets" else "dni-online"

    @property
    def budget(self) -> tuple[str, float] | None:
        return "symbols", self.digits

    @property
    def depth(self) -> int:
        return self.bptt

    @property
    def folder(self) -> str:
        return f"{self.method}-T{self.bptt}"


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as JSON values; paths as text."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def from_json(kind: type, values: dict[str, Any]) -> Any:
    """The dataclass back from `to_json`; fields that are paths by their annotation become paths."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UsageError(f"this run was made by another version: unknown setting {unknown[0]}")
    return kind(**{k: Path(v) if v is not None and "Path" in fields[k] else v for k, v in values.items()})
