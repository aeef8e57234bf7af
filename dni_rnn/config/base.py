"""Settings common to all training runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from dni_rnn.config.spelling import flag
from dni_rnn.errors import UsageError
from dni_rnn.metrics import Metric


@dataclass(frozen=True)
class Preset:
    """A named set of defaults for one task.

    Attributes:
      run: values for fields of the task's configuration.
      dni: more such values, used with `--dni`.
      task: values for fields of the task.
    """

    run: Mapping[str, Any] = field(default_factory=dict)
    dni: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings common to all training runs. A task names its configuration in `Task.config`."""

    metric: ClassVar[Metric]
    """The metric of these runs."""
    depth_name: ClassVar[str]
    """Name of `depth` in tables."""
    amount: ClassVar[str]
    """The field that says how long to train in the task's own unit, beside --minutes and --steps."""
    changeable: ClassVar[frozenset[str]] = frozenset(
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
            "minutes",
        ]
    )
    """Fields that do not affect any single update."""

    seed: int = 0
    """Seed of the initial weights and of generated data."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a CUDA device if there is one."""
    threads: int | None = None
    """CPU threads; the default is torch's."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Precision of matrix multiplications in the net and its synthesizers; weights are float32. tf32 needs a
    CUDA device."""
    graph: bool = True
    """On a CUDA device, replay updates as CUDA graphs."""
    data_dir: Path | None = None
    """Folder that holds the data files."""
    out: Path | None = None
    """Run directory. The default is below runs/, named after task, method and seed."""
    resume: bool = False
    """Resume the run in --out from its last checkpoint."""
    minutes: float | None = None
    """Train for this long (evaluation not counted) and stop."""
    log_every: int = 50
    """Updates between rows of metrics.jsonl."""
    eval_every: int = 500_000
    """Training symbols between validations."""
    save_every: float = 30.0
    """Seconds between checkpoints."""
    processes: int | None = None
    """Train in this many processes on this machine, like torchrun --nproc-per-node."""
    timeout: float = 300.0
    """Seconds after which an unresponsive process counts as hanging; must exceed the time of a validation."""

    def __post_init__(self) -> None:
        self._check_positive("threads", "minutes", "log_every", "eval_every", "processes", "timeout")
        self._check_not_negative("save_every")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must lie between 0 and 2^63 - 1, not {self.seed}")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{flag(name)} must be positive, not {value}")

    def _check_not_negative(self, *names: str) -> None:
        for name in names:
            if not (getattr(self, name) or 0) >= 0:
                raise UsageError(f"{flag(name)} must not be negative")

    def _refuse(self, why: str, *names: str) -> None:
        """Refuse settings in `names` that differ from their defaults."""
        for name in names:
            if getattr(self, name) != getattr(type(self), name):
                raise UsageError(f"{flag(name)} {why}")

    def _check_dni(self, *names: str) -> None:
        """Refuse settings that do nothing without --dni, and centring over a single row."""
        config: Any = self
        if not config.dni:
            self._refuse("does nothing without --dni; add --dni", *names)
        elif config.centre and config.batch_size == 1:
            raise UsageError("--batch-size 1: there is no mean over rows to subtract; add --no-centre")

    @classmethod
    def budgets(cls) -> tuple[str, ...]:
        """The fields that say when to stop."""
        return tuple(dict.fromkeys([cls.amount, "minutes", "steps"]))

    def _check_budget(self) -> None:
        """Refuse several of the fields that say when to stop."""
        if sum(getattr(self, name) is not None for name in self.budgets()) > 1:
            flags = [f"--{name}" for name in self.budgets()]
            raise UsageError(f"give one of {', '.join(flags[:-1])} and {flags[-1]}, not several")

    @property
    def method(self) -> str:
        """Name of the method in tables."""
        raise NotImplementedError

    @property
    def changeable_on_resume(self) -> frozenset[str]:
        """Settings that may change when this run is resumed."""
        return self.changeable

    @property
    def budget(self) -> tuple[str, float] | None:
        """How long to train: ("steps", "minutes" or "symbols", how many); None: the learner decides."""
        for unit in ("minutes", "steps"):
            if getattr(self, unit, None) is not None:
                return unit, getattr(self, unit)
        return None

    @property
    def depth(self) -> int:
        """How far backpropagation goes: T steps, or layers. Sets the colour of a line in a plot."""
        raise NotImplementedError

    @property
    def folder(self) -> str:
        """Default name of the run directory, besides the task and the seed."""
        raise NotImplementedError

    @property
    def resolved(self) -> Self:
        """The same with all defaults filled in that depend on other settings."""
        return self

    def for_world_size(self, processes: int) -> Self:
        """The same for training in so many processes.

        Raises:
          UsageError: this configuration cannot be trained so.
        """
        if self.processes not in (None, processes):
            raise UsageError(f"--processes {self.processes}, but {processes} were started")
        if processes > 1:
            raise UsageError("this trains in one process: leave out --processes, and torchrun")
        return self


def decide_restore(config: Any) -> Any:
    """The same with the default of --restore filled in: 0.1 with --dni and 0 without."""
    if config.restore is not None:
        return config
    return dataclasses.replace(config, restore=0.1 if config.dni else 0.0)


def check_critic(config: Any) -> None:
    """Refuse an unconditioned critic."""
    if config.critic and config.context == "none":
        raise UsageError("--context none: a critic predicts the loss of known targets; add --no-critic")


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as JSON values; paths as text."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}


def from_json(kind: type, values: dict[str, Any], file: Path = Path("config.json")) -> Any:
    """The dataclass back from `to_json`; fields that are paths by their annotation become paths.

    Args:
      file: source of the values, for error lines.

    Raises:
      UsageError: a setting is unknown or has an invalid value.
    """
    hints = get_type_hints(kind)
    known = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UsageError(f"this run was made by another version: unknown setting {unknown[0]}")
    for name, value in values.items():
        if not _fits(value, known[name]):
            raise UsageError(f"{file}: {name} cannot be {value!r}; put a good copy in its place")
    try:
        return kind(
            **{k: Path(v) if isinstance(v, str) and _path(known[k]) else v for k, v in values.items()}
        )
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None


def _path(hint: Any) -> bool:
    return hint is Path or Path in get_args(hint)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value fits an annotation; an annotation without a JSON type accepts any."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    plain = {Path: str, float: (int, float), int: int, bool: bool, str: str, NoneType: NoneType}
    if hint not in plain:
        return True
    return isinstance(value, plain[hint]) and (hint is bool or not isinstance(value, bool))
