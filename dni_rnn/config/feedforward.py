"""Feed-forward runs: labelled examples, and a net cut between its layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal, Self

from dni_rnn.config.base import RunConfig
from dni_rnn.config.spelling import parse_synthesizer
from dni_rnn.errors import UsageError
from dni_rnn.metrics import ERROR, Metric

ONE_PROCESS = ("update_probability", "unlock", "agreement_every")
"""Settings of decoupled parts within one process."""


@dataclass(frozen=True, kw_only=True)
class FeedforwardConfig(RunConfig):
    """Settings of a feed-forward training run, besides the options of its task."""

    metric: ClassVar[Metric] = ERROR
    depth_name: ClassVar[str] = "layers"
    amount: ClassVar[str] = "epochs"
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
    """Layers, including the last; vgg always has 12."""
    width: int | None = None
    """Units or channels per layer; the default is as published."""
    method: Literal["bprop", "none", "dni", "cdni", "critic", "local", "local+critic"] = "critic"
    """No cut (bprop), no gradient across cuts, synthetic gradients (regressed, conditioned on labels, or the
    derivative of a predicted loss), or a local loss at each cut, alone or with a critic."""
    cuts: str = "all"
    """Where to cut: between all layers (vgg: after every third), or after layers such as 1,3."""
    update_probability: float = 1.0
    """Probability that a layer takes part in an update."""
    unlock: bool = False
    """Predict inputs too, so that no layer waits for the one before it."""
    synthesizer: str | None = None
    """linear, mlp or mlp:WIDTH[,WIDTH] (units, or 1/4 of the layer's); for a critic, its classifier. For cdni
    and local+critic also error, a linear map of a local classifier's error."""
    recipe: Literal["fast", "paper"] = "fast"
    """Iterations, learning rates and synthesizers: as published, or for far fewer iterations."""

    epochs: float | None = None
    """Passes over the training data. They set the learning-rate schedule, even if --minutes stops earlier."""
    steps: int | None = None
    """Train for this many updates instead; they set the learning-rate schedule."""
    batch_size: int = 256
    """Rows per update."""
    lr: float | None = None
    """Adam's peak learning rate for the net."""
    synthesizer_lr: float | None = None
    """Adam's peak learning rate for the synthesizers."""
    smoothing: float | None = None
    """Label smoothing of the training loss."""
    augment: bool = False
    """Random shifts, and flips where the task has them."""
    agreement_every: int = 0
    """Log cosine, explained variance and trust of the synthetic gradients every so many updates; 0: never."""

    decoupled: bool = False
    """Train each part in its own process (--processes or torchrun). With bprop, parts wait for gradients."""
    queue: int = 2
    """Maximum number of messages in flight from one part to the next. 1 learns as one process does; more
    makes gradients older."""
    when_full: Literal["wait", "drop-oldest"] = "wait"
    """What a part does at that maximum: wait until a message arrives, or go on and lose messages."""
    delay: float = 0.0
    """Milliseconds by which every message is delayed, to simulate a slow network."""
    correct: bool = False
    """When the true gradient g of a message arrives, also learn from the residual g − ĝ: late, but exact."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive(
            "layers", "width", "epochs", "steps", "batch_size", "lr", "synthesizer_lr", "queue"
        )
        self._check_not_negative("agreement_every", "delay")
        self._check_decoupled()
        if self.steps is not None and self.minutes is not None:
            raise UsageError("give one of --minutes and --steps, not both")
        if self.steps is not None and self.epochs != type(self).epochs:
            raise UsageError("give one of --epochs and --steps, not both")
        if self.layers < 2:
            raise UsageError(f"--layers must be at least 2, not {self.layers}: one layer has no boundary")
        if self.model == "vgg":
            object.__setattr__(self, "layers", 12)
        if not 0 <= (self.smoothing or 0) < 1:
            raise UsageError(f"--smoothing must lie between 0 and 1, not {self.smoothing}")
        if not 0 < self.update_probability <= 1:
            raise UsageError(
                f"--update-probability must lie above 0 and at most at 1, not {self.update_probability}"
            )
        if self.method in ("bprop", "none"):
            self._refuse("needs learning parts: --method dni, cdni, critic, local", *ONE_PROCESS)
        if self.unlock and self.model in ("cnn", "vgg"):
            raise UsageError("--unlock needs layers that output vectors: --model mlp or sigmoid")
        if self.synthesizer is not None:
            if self.method == "local":
                raise UsageError("--method local has no synthesizer: leave --synthesizer out")
            if self.synthesizer != "error":
                parse_synthesizer(self.synthesizer)
            elif self.method not in ("cdni", "local+critic"):
                raise UsageError("--synthesizer error needs --method cdni or local+critic")
        cuts = self.cut_positions
        if list(cuts) != sorted(set(cuts)) or not all(0 < cut < self.layers for cut in cuts):
            raise UsageError(
                f"--cuts {self.cuts}: give all, or rising numbers from 1 to {self.layers - 1} with commas"
            )

    def _check_decoupled(self) -> None:
        if not self.decoupled:
            self._refuse("does nothing without --decoupled", "queue", "when_full", "delay", "correct")
            return
        if self.method == "none" and not self.correct:
            raise UsageError(
                "--method none with --decoupled: only the last part would learn; add --correct or use another"
            )
        if self.correct and self.method not in ("none", "dni", "cdni", "critic"):
            does = "waits for true gradients" if self.method == "bprop" else "has losses at its cuts"
            raise UsageError(f"--correct: --method {self.method} {does}; leave out one of the two")
        self._refuse("works in one process: leave out --decoupled", *ONE_PROCESS)

    def for_world_size(self, processes: int) -> Self:
        """With one part per process, of equal numbers of layers unless cuts are given."""
        if not self.decoupled:
            return super().for_world_size(processes)
        if processes < 2 or self.processes not in (None, processes):
            parts = self.processes or (2 if self.cuts == "all" else len(self.cut_positions) + 1)
            raise UsageError(
                f"--decoupled: {processes} started, but each part takes one: --processes {parts}"
            )
        if self.cuts == "all":
            if processes > self.layers:
                raise UsageError(
                    f"{self.layers} layers cannot form {processes} parts: use at most {self.layers} processes"
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
    def resolved(self) -> Self:
        """With the recipe's values filled in."""
        values = {name: value for name, value in self._recipe().items() if getattr(self, name) is None}
        if self.steps is not None:
            values.pop("epochs", None)
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
        # Without labels, M must keep ahead of the net (faster nets end worse), and an overconfident net
        # leaves it nothing to learn.
        slow = self.method == "dni"
        synthesizers = {"dni": "mlp:256,256", "cdni": "mlp", "critic": "linear", "local+critic": "linear"}
        return {
            "width": self.widths[self.model],
            "epochs": 60.0 if slow else 10.0,
            "lr": 3e-5 if slow else 3e-3,
            "synthesizer_lr": 1e-2 if self.method == "cdni" and self.synthesizer != "error" else 3e-3,
            "smoothing": 0.1 if slow else 0.0,
            "synthesizer": synthesizers.get(self.method),
        }

    @property
    def synthesizer_hidden(self) -> tuple[int | Fraction, ...] | None:
        """Widths of the synthesizers' hidden layers; None is the default of `decouple`."""
        return None if self.synthesizer in (None, "error") else parse_synthesizer(self.synthesizer)

    @property
    def cut_positions(self) -> tuple[int, ...]:
        """Indices of the layers before which the net is cut, as in slicing."""
        if self.cuts == "all":
            return (3, 6, 9) if self.model == "vgg" else tuple(range(1, self.layers))
        try:
            return tuple(int(text) for text in self.cuts.split(","))
        except ValueError:
            return (0,)

    @property
    def depth(self) -> int:
        return self.layers

    @property
    def folder(self) -> str:
        return f"{self.model}{self.layers}-{self.method}{'-decoupled' if self.decoupled else ''}"
