"""The record of everything that is trained and saved, and the interface of learners to the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dni_rnn.data.task import Split
from dni_rnn.errors import DivergedError, UsageError
from dni_rnn.training import checkpoint
from dni_rnn.training.cuda_graph import Recorded

if TYPE_CHECKING:
    from dni_rnn.training.run_directory import Run

BITS = 1.0 / math.log(2.0)
"""Bits per nat."""


@dataclass
class Counters:
    """How far training has come; `updates` and `scored` since the last metrics row."""

    step: int = 0
    symbols: int = 0
    updates: int = 0
    scored: int = 0

    def advance(self, symbols: int) -> None:
        """Count one update on so many symbols."""
        self.step += 1
        self.updates += 1
        self.symbols += symbols


class TrainingRecord:
    """Everything that training changes and a checkpoint holds, in one place.

    Args:
      modules: all modules with weights or statistics, by their names in a checkpoint.
      net, synthesizer: parameters of the net and of its synthesizers.
      optimizer: optimizer of both.
      averages: names of sums over the updates of a metrics row; scalars on `device`.
      device: where to train.

    Attributes:
      counters: see `Counters`.
      averages: the sums, by name; `reset` zeroes them.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        net: Sequence[nn.Parameter],
        synthesizer: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        averages: Sequence[str],
        device: torch.device,
    ) -> None:
        self.modules, self.net, self.synthesizer = dict(modules), list(net), list(synthesizer)
        self.optimizer, self.device, self.counters = optimizer, device, Counters()
        self.averages = {name: torch.zeros((), device=device) for name in averages}

    def reset(self) -> None:
        """Start the averages of the next metrics row."""
        for average in self.averages.values():
            average.zero_()
        self.counters.updates = self.counters.scored = 0

    def set_rates(self, factor: float) -> None:
        """Set learning rates to multiples of their groups' "base"; in place if a recording reads them."""
        for group in self.optimizer.param_groups:
            rate = factor * group["base"]
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which training resumes bit for bit."""
        tensors = checkpoint.nest("optimizer", checkpoint.optimizer_state(self.optimizer))
        for name, module in self.modules.items():
            tensors |= checkpoint.nest(name, module.state_dict())
        tensors |= checkpoint.nest("average", self.averages)
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors, asdict(self.counters)

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        for name, module in self.modules.items():
            module.load_state_dict(checkpoint.under(name, tensors))
        checkpoint.load_optimizer_state(self.optimizer, checkpoint.under("optimizer", tensors))
        torch.set_rng_state(tensors["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        for name, average in self.averages.items():
            average.copy_(tensors[f"average.{name}"])
        self.counters = Counters(**{name: values[name] for name in asdict(self.counters)})


def begin(config: Any) -> None:
    """Set the seed and the precision of a run, before its first weight is drawn."""
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = config.precision == "tf32"


def adam(
    groups: Sequence[tuple[Sequence[nn.Parameter], float]], device: torch.device, **options: Any
) -> torch.optim.Adam:
    """Adam for groups of (parameters, learning rate); empty groups are left out.

    A recording can follow changes of its rates (`TrainingRecord.set_rates`); "base" holds a group's own rate.
    """
    cuda = device.type == "cuda"

    def followed(rate: float) -> Any:
        return torch.tensor(rate, device=device) if cuda else rate

    made = [
        {"params": list(parameters), "lr": followed(rate), "base": rate}
        for parameters, rate in groups
        if parameters
    ]
    return torch.optim.Adam(made, fused=True, capturable=cuda, **options)


def cosine_schedule(done: float) -> float:
    """Factor on the learning rates when a fraction `done` is over: (1 + cos(π·done)) / 2."""
    return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA if there is a device, else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def _without_onednn() -> Iterator[None]:
    """oneDNN refuses bfloat16 LSTMs on processors without bfloat16; torch's own kernels do not."""
    # torch.backends.mkldnn.flags would set TF32 as well, with a warning.
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


class Learner:
    """A model in training, as the training loop sees it.

    A subclass builds its model and its `TrainingRecord`, and implements `update`, `metrics`, `build` and
    `score`.

    Args:
      config: configuration of the run.
      data: data of the task.
      device: where to train.

    Attributes:
      model: the model that is evaluated, and saved when it is the best.
      record: everything that is trained and saved.
      one_pass: symbols in one pass over the training data, the default budget.
      ended: no training data are left, whatever the budget.
      keeps_best: keep the weights of the best validation, not of the last.
    """

    model: nn.Module
    record: TrainingRecord
    one_pass: float
    keeps_best: bool = True

    def __init__(self, config: Any, data: Any, device: torch.device) -> None:
        self.config, self.data, self.device = config, data, device

    @staticmethod
    def build(config: Any, data: Any) -> nn.Module:
        """The model that `config` describes, for `data`."""
        raise NotImplementedError

    @staticmethod
    def score(
        model: Any, data: Any, split: Split, device: torch.device, level: int | None = None
    ) -> dict[str, float]:
        """`config.metric` by its key, and any other scores, over one pass of `split`.

        For a task with a curriculum: at `level`.
        """
        raise NotImplementedError

    def update(self) -> None:
        """One update: forward, backward, step."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """Averages since `reset_metrics`, among them the metric on the training data."""
        raise NotImplementedError

    # Defaults that suit most learners.

    @property
    def counters(self) -> Counters:
        return self.record.counters

    @property
    def ended(self) -> bool:
        return False

    def ready(self) -> bool:
        """Whether there are data to learn from; a live source waits a moment for them."""
        return True

    def reset_metrics(self) -> None:
        """Start the averages of the next metrics row."""
        self.record.reset()

    def check(self, row: dict[str, float]) -> None:
        """Raises `DivergedError` when `metrics` show that training has diverged."""
        if not math.isfinite(row.get("loss", row[self.config.metric.key])):
            raise DivergedError("the loss is not finite")
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise DivergedError("a weight is not finite")

    @property
    def level(self) -> int | None:
        """The level being learnt, for a task with a curriculum."""
        return None

    def evaluate(self, split: Split, level: int | None) -> dict[str, float]:
        """`score` of the current model."""
        return self.score(self.model, self.data, split, self.device, level)

    def summary(self) -> dict[str, Any]:
        """Entries of the summary that not every run has. The model holds its best weights."""
        return {}

    def draw(self, run: Run) -> None:
        """Draw plots of what was learnt into the run directory."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which training resumes bit for bit."""
        return self.record.state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.record.load_state_dict(tensors, values)

    def recorded(self, step: Callable[..., None]) -> Callable[..., None]:
        """`step`, on a CUDA device as a CUDA graph if the configuration wants it (`cuda_graph.Recorded`)."""
        return Recorded(step) if self.device.type == "cuda" and self.config.graph else step

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision in which the net computes; its weights are always float32."""
        contexts = ExitStack()
        if self.config.precision == "bf16":
            contexts.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            if self.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                contexts.enter_context(_without_onednn())
        return contexts
