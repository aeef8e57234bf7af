"""The one training loop: budget, metrics, validation, checkpoints, and a clean way to stop."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dni_rnn.atomic_files import held
from dni_rnn.config import RunConfig, TrainConfig
from dni_rnn.data.task import Corpus, Data, Split
from dni_rnn.errors import DivergedError, UsageError
from dni_rnn.estimators import DNI, TruncatedBPTT, Window, state_gradients, window_loss
from dni_rnn.metrics import BPC, Metric
from dni_rnn.pytree import flatten, flatten_rows
from dni_rnn.recurrent import Boundary, RecurrentCore, SequenceModel
from dni_rnn.synthesizers import (
    BackwardGRU,
    ContextEncoder,
    ContextMLP,
    Critic,
    EmbeddedTokens,
    MLPSynthesizer,
    NoSynthesizer,
    OneHotTokens,
    Rows,
)
from dni_rnn.training import checkpoint
from dni_rnn.training.cuda_graph import Recorded
from dni_rnn.training.run_directory import MetricsLog, Run
from dni_rnn.training.sampling import sample

BITS = 1.0 / math.log(2.0)
"""Bits per nat."""

EVAL_ROWS, EVAL_STEPS = 128, 100

SAMPLED = 200
"""Characters that a text run writes at its end."""

AUDIT_STEPS = 32
"""How far the gradient is backpropagated that a synthetic one is compared with."""


def build_model(config: TrainConfig, data: Data) -> SequenceModel:
    """The model that `config` describes, for the symbols of `data`."""
    core = RecurrentCore(
        config.core,
        config.embedding,
        config.hidden,
        config.layers,
        synthesizer=_build_synthesizer(config, data) if config.dni else None,
        reading=config.reading,
        scale=config.scale * config.discount**config.bptt,
        centre=config.centre,
        restore=config.restore,
    )
    return SequenceModel(data.input_symbols, data.target_symbols, config.embedding, core)


def _build_synthesizer(config: TrainConfig, data: Data) -> nn.Module:
    if config.silent:
        return NoSynthesizer()
    example = RecurrentCore(config.core, 1, config.hidden, config.layers).initial_state(1)
    hidden = config.synthesizer_spec.widths(config.hidden)
    reads = "first" if config.synthesizer_reads == "hidden" else "all"
    bounded = config.synthesizer_reads == "state"
    if not config.critic:
        context = _context_encoder(config, data)
        return MLPSynthesizer(example, hidden, context=context, reads=reads, bounded=bounded)
    rows = Rows(reads=reads, bounded=bounded)
    places = config.context_spec.window * data.target_symbols
    classifier = nn.Sequential(rows, ContextMLP(rows(example).shape[1], hidden, places))
    # Its own loss counts little: in a net that has learnt the task it would go on pushing where the true
    # gradient is zero.
    return Critic(classifier, data.target_symbols, weight=config.weight, value=1.0)


def build_estimator(config: TrainConfig, data: Data) -> TruncatedBPTT:
    """The estimator that `config` describes."""
    if not config.dni:
        return TruncatedBPTT()
    if not config.aux:
        return DNI()
    state = RecurrentCore(config.core, 1, config.hidden, config.layers).initial_state(1)
    features = flatten_rows(state).shape[1]
    hidden = config.synthesizer_spec.widths(config.hidden)
    aux = ContextMLP(config.hidden, hidden, features, _context_encoder(config, data))
    return DNI(aux, config.aux_weight)


def _context_encoder(config: TrainConfig, data: Data) -> ContextEncoder | None:
    spec = config.context_spec
    if not spec.window:
        return None
    if spec.encoder == "gru":
        return BackwardGRU(data.target_symbols, spec.window, spec.width)
    if spec.width:
        return EmbeddedTokens(data.target_symbols, spec.window, spec.width)
    return OneHotTokens(data.target_symbols, spec.window)


def cosine(done: float) -> float:
    """Factor on the learning rates at `done`, from 0 to 1, of the way: (1 + cos(π·done)) / 2."""
    return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA when there is a device, else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def learner_class(config: RunConfig) -> type[BaseLearner]:
    """What trains a run of this configuration (`RunConfig.learner`)."""
    module, _, name = config.learner.partition(":")
    return getattr(import_module(module), name)


class BaseLearner:
    """A model in training: everything that one update reads and changes, and nothing else.

    A kind of learner sets in its constructor the attributes below, the modules and averages that make
    up its state, and gives `update`, `metrics`, `summary`, `build` and `score` their meaning. Averages
    are tensors that `reset_metrics` zeroes.

    Args:
      config: of the run.
      data: of the task.
      device: where to train.

    Attributes:
      model: what is saved as the best and evaluated; `modules` are all that hold weights.
      net, synthesizer: parameters of the net and of its synthesizers.
      optimizer: of both.
      one_pass: symbols in one pass over the training data, the default budget.
      step, symbols, updates: since the start; `updates` since the last metrics row.
      ended: there is nothing more to learn from, whatever the budget.
      keeps_best: what is kept is the weights of the best validation, not those of the last.
    """

    averages: tuple[str, ...]
    counts: tuple[str, ...] = ("step", "symbols", "updates")
    model: nn.Module
    modules: dict[str, nn.Module]
    net: list[nn.Parameter]
    synthesizer: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    one_pass: float
    ended: bool = False
    keeps_best: bool = True

    def __init__(self, config: Any, data: Any, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
        self.config, self.data, self.device = config, data, device
        self.step, self.symbols = 0, 0
        for name in self.averages:
            setattr(self, name, torch.zeros((), device=device))
        self.reset_metrics()

    def adam(self, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Adam:
        """Adam, whose rates a recording can follow (`set_rates`); each group keeps its own as "base"."""
        cuda = self.device.type == "cuda"
        groups = [group | {"base": group["lr"]} for group in groups]
        if cuda:
            groups = [group | {"lr": torch.tensor(group["lr"], device=self.device)} for group in groups]
        return torch.optim.Adam(groups, fused=True, capturable=cuda, **options)

    def set_rates(self, factor: float) -> None:
        """Learning rates as multiples of their groups' "base"; in place where a recording reads them."""
        for group in self.optimizer.param_groups:
            rate = factor * group["base"]
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def recorded(self, step: Callable[..., None]) -> Callable[..., None]:
        """`step`, on a CUDA device as a CUDA graph if the configuration wants it (`graphs.Recorded`)."""
        return Recorded(step) if self.device.type == "cuda" and self.config.graph else step

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision in which the net computes; its weights are float32 all the same."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    @staticmethod
    def build(config: Any, data: Any) -> nn.Module:
        """The model that `config` describes, for `data`."""
        raise NotImplementedError

    @staticmethod
    def score(
        model: Any, data: Any, split: Split, device: torch.device, level: int | None = None
    ) -> dict[str, float]:
        """`config.metric` by its key, and what else there is, over one pass of `split`.

        Of a task that gets harder: at `level`.
        """
        raise NotImplementedError

    def reset_metrics(self) -> None:
        """Start the averages of the next metrics row."""
        for name in self.averages:
            getattr(self, name).zero_()
        self.updates = 0

    def ready(self) -> bool:
        """Whether there is something to learn from; a live source waits a moment for it."""
        return True

    def update(self) -> None:
        """One update: forward, backward, step."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """Averages since `reset_metrics`, among them the metric on the training data."""
        raise NotImplementedError

    def check(self, row: dict[str, float]) -> None:
        """Raises `DivergedError` when `metrics` are not those of a healthy run."""
        if not math.isfinite(row[self.config.metric.key]):
            raise DivergedError("the loss is not finite")
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise DivergedError("a weight is not finite")

    @property
    def level(self) -> int | None:
        """Of a task that gets harder: the level being learnt."""
        return None

    def evaluate(self, split: Split, level: int | None) -> dict[str, float]:
        """`score` of the model as it is."""
        return self.score(self.model, self.data, split, self.device, level)

    def summary(self) -> dict[str, Any]:
        """What the summary says besides what every run's does. The model has its best weights."""
        return {}

    def draw(self, run: Run) -> None:
        """Pictures of what has been learnt, into the run directory."""

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values from which training goes on bit for bit."""
        tensors = checkpoint.nest("optimizer", checkpoint.optimizer_state(self.optimizer))
        for name, module in self.modules.items():
            tensors |= checkpoint.nest(name, module.state_dict())
        tensors |= {f"average.{name}": getattr(self, name) for name in self.averages}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors, {name: getattr(self, name) for name in self.counts}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go back to `state_dict`."""
        for name, module in self.modules.items():
            module.load_state_dict(checkpoint.under(name, tensors))
        checkpoint.load_optimizer_state(self.optimizer, checkpoint.under("optimizer", tensors))
        torch.set_rng_state(tensors["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)
        for name in self.averages:
            getattr(self, name).copy_(tensors[f"average.{name}"])
        for name in self.counts:
            setattr(self, name, values[name])


class Learner(BaseLearner):
    """A recurrent model in training on a stream of windows."""

    averages = ("loss", "norm")
    counts = (*BaseLearner.counts, "scored")
    loss: Tensor
    norm: Tensor
    model: SequenceModel

    def __init__(self, config: TrainConfig, data: Data, device: torch.device) -> None:
        super().__init__(config, data, device)
        self.model = build_model(config, data).to(device)
        self.estimator = build_estimator(config, data).to(device)
        self.net = self.model.net_parameters()
        self.synthesizer = [*self.model.synthesizer_parameters(), *self.estimator.parameters()]
        groups = [{"params": self.net, "lr": config.lr}]
        if self.synthesizer and config.synthesizer_lr == config.lr:  # one group is one call less
            groups[0]["params"] = [*self.net, *self.synthesizer]
        elif self.synthesizer:
            groups.append({"params": self.synthesizer, "lr": config.synthesizer_lr})
        self.optimizer = self.adam(groups, betas=(0.9, config.beta2))
        self.stream = data.stream("train", config.batch_size, config.seed).to(device)
        self.state = self.model.initial_state(config.batch_size)
        self.context = config.context_spec.window
        self.modules = {"model": self.model, "estimator": self.estimator}
        self.one_pass = self.stream.size
        self.window_loss = torch.zeros((), device=device)
        self._run = self.recorded(self._work)

    @staticmethod
    def build(config: Any, data: Any) -> SequenceModel:
        return build_model(config, data)

    @staticmethod
    def score(
        model: SequenceModel, data: Data, split: Split, device: torch.device, level: int | None = None
    ) -> dict[str, float]:
        return {BPC.key: evaluate(model, data, split, device, level)}

    def reset_metrics(self) -> None:
        super().reset_metrics()
        self.scored = 0

    def update(self) -> None:
        """One update: `accumulate` windows forward and backward, clip, step."""
        config = self.config
        if config.audit and self.step % config.audit == 0:
            self._audit()
        if config.anneal:
            self.set_rates(self.rate())
        windows = [self.stream.window(steps, self.context) for steps in self._lengths()]
        self._run(*(tensor for w in windows for tensor in (w.inputs, w.targets, *w.start, *w.end)))
        scored, steps = (sum(w.scored for w in windows), sum(len(w.inputs) for w in windows))
        if self.stream.ladder is not None:
            self.stream.ladder.note(self.window_loss, scored, steps)
        self.scored += scored
        self.symbols += steps * config.batch_size
        self.step += 1
        self.updates += 1

    def rate(self) -> float:
        """Factor on the learning rates of the coming update of an annealed run: along a cosine to zero."""
        unit, amount = self.config.budget or ("symbols", self.one_pass)
        return cosine((self.step if unit == "steps" else self.symbols) / amount)

    def _lengths(self) -> list[int]:
        """Of the windows of the coming update; the update's number alone says what was drawn."""
        config = self.config
        if not config.shorten:
            return [config.bptt] * config.accumulate
        random = np.random.default_rng([config.seed, self.step])
        short = random.integers(1, config.bptt, config.accumulate, endpoint=True)
        return np.where(random.random(config.accumulate) < config.shorten, short, config.bptt).tolist()

    def _work(self, *tensors: Any) -> None:
        """What an update does on the device, in place; the tensors are those of its windows."""
        config = self.config
        windows = [
            Window(inputs, targets, Boundary(*known[:3]), Boundary(*known[3:]), 0)
            for inputs, targets, *known in zip(*[iter(tensors)] * 8, strict=True)
        ]
        self.optimizer.zero_grad()
        with self.autocast():
            estimate = self.estimator(self.model, windows, self.state, config.weight)
        loss = self.collect(estimate.loss)
        if config.clip:
            self.norm.add_(nn.utils.clip_grad_norm_(self.net, config.clip))
        self.optimizer.step()
        for kept, new in zip(flatten(self.state)[0], flatten(estimate.state)[0], strict=True):
            kept.copy_(new)
        self.window_loss.copy_(loss)
        self.loss.add_(loss)

    def collect(self, loss: Tensor) -> Tensor:
        """The loss of all rows, once `.grad` is the gradient of all; here there are no others."""
        return loss

    def _audit(self) -> None:
        """Compare ĝ at the boundary where training stands with the real gradient of the steps to come."""
        config, place = self.config, self.stream.state_dict()
        count = -(-AUDIT_STEPS // config.bptt)
        windows = [self.stream.window(config.bptt, self.context) for _ in range(count)]
        self.stream.load_state_dict(place)
        real = state_gradients(self.model, windows, self.state, config.weight, (0,))[0]
        self.model.audit(self.state, real, windows[0].start)

    def metrics(self) -> dict[str, float]:
        """Averages since `reset_metrics`: training bits per scored symbol, and how things go inside."""
        row = {"bpc": float(self.loss) * BITS / max(self.scored, 1), "state_rms": self.state_rms()}
        if self.config.clip:
            row["gradient_norm"] = float(self.norm) / self.updates
        if self.model.core.interface is not None:
            row["synthesizer_loss"] = float(self.model.core.interface.regression_loss)
            row["target_size"] = float(self.model.core.interface.size())
            if self.config.audit:
                row["trust"] = float(self.model.core.interface.trust)
        if self.stream.ladder is not None:
            row |= {"level": self.stream.ladder.level, "solved": self.stream.ladder.solved}
        return row

    def state_rms(self) -> float:
        """Root mean square of the recurrent state, over rows and features."""
        return float(flatten_rows(self.state).square().mean().sqrt())

    @property
    def level(self) -> int | None:
        """Of a task that gets harder: the level being learnt."""
        return None if self.stream.ladder is None else self.stream.ladder.level

    def check(self, row: dict[str, float]) -> None:
        super().check(row)
        if not row["state_rms"] <= self.config.state_limit:
            raise DivergedError(
                f"the recurrent state has run away (root mean square {row['state_rms']:.3g}, "
                f"limit {self.config.state_limit:g})"
            )

    def summary(self) -> dict[str, Any]:
        values: dict[str, Any] = {"state_rms": self.state_rms()}
        if self.stream.ladder is not None:
            values["solved"] = self.stream.ladder.solved
        if isinstance(self.data, Corpus):
            how = {"characters": SAMPLED, "temperature": 0.8, "seed": 0}
            values["sample"] = {"text": sample(self.model, self.data, "", **how), **how}
        return values

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super().state_dict()
        tensors |= {f"state.{i}": leaf for i, leaf in enumerate(flatten(self.state)[0])}
        return tensors, values | {"stream": self.stream.state_dict()}

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        super().load_state_dict(tensors, values)
        leaves = checkpoint.under("state", tensors)
        for number, leaf in enumerate(flatten(self.state)[0]):
            leaf.copy_(leaves[str(number)])
        self.stream.load_state_dict(values["stream"])


@torch.no_grad()
def evaluate(
    model: SequenceModel, data: Data, split: Split, device: torch.device, level: int | None = None
) -> float:
    """Bits per scored symbol over one pass of `split`, of a task that gets harder at `level`.

    The split is read as up to 128 rows side by side, each with its state carried from beginning to
    end, so at most 128 symbols are predicted without history.
    """
    rows = EVAL_ROWS
    while True:
        try:
            stream = data.stream(split, rows, 0).to(device)
            break
        except UsageError:
            if rows == 1:
                raise
            rows //= 2
    if stream.ladder is not None and level is not None:
        stream.ladder.level = level
    state = model.initial_state(rows)
    loss, scored, seen = torch.zeros((), device=device, dtype=torch.float64), 0, 0
    while seen < stream.size:
        window = stream.window(EVAL_STEPS, 0)
        logits, state = model(window.inputs, model.reset(state, window.start.done))
        loss += window_loss(logits, window.targets)
        scored += window.scored
        seen += window.inputs.numel()
    return float(loss) * BITS / scored


class Interrupted(Exception):  # noqa: N818
    """A signal asked the run to stop; it was saved. `signal` is its number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal = signal_number


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that an update is never cut in two. A second one is not collected."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(run: Run, *, quiet: bool = False) -> dict[str, Any]:
    """Train as `run.config` says, into `run.path`, and return the summary.

    Validation happens every `eval_every` symbols and at the end; the test split is evaluated once, at
    the end, with the weights that had the lowest validation loss. `seconds` counts training alone. A
    task that gets harder is validated at the level being learnt, and tested at that of the best weights.

    Raises:
      UsageError: the data, the device or the directory cannot be used (nothing is written), or a
        checkpoint cannot be written (the last one stays).
      DivergedError: the loss is not finite or the state ran away.
      Interrupted: SIGINT or SIGTERM; a checkpoint was written.
    """
    config = run.config
    device = choose_device(config.device)
    learner = learner_class(config)(config, load_data(run), device)
    return fit(run, learner, prepare(run, learner), quiet=quiet)


def load_data(run: Run) -> Any:
    """The data of the run's task; from here on torch uses the number of threads that it is to use."""
    data = run.task.load(run.config.data_dir)
    if run.config.threads:
        torch.set_num_threads(run.config.threads)
    return data


class Progress(NamedTuple):
    """How far a run had come before."""

    seconds: float
    best: Best | None


def prepare(run: Run, learner: BaseLearner) -> Progress:
    """Check the run directory, and `resume`."""
    size = sum(t.numel() * t.element_size() for t in learner.model.state_dict().values())
    run.prepare(needed_bytes=12 * size)
    return resume(run, learner)


def resume(run: Run, learner: BaseLearner) -> Progress:
    """Put the learner where the checkpoint stands, if one is to be resumed."""
    if not (run.config.resume and run.checkpoint.exists()):
        return Progress(0.0, None)
    run.check_symbols(learner.data)
    tensors, values = checkpoint.load_checkpoint(run.checkpoint)
    try:
        learner.load_state_dict(tensors, values)
        return Progress(values["seconds"], values["best"] and Best(*values["best"]))
    except (KeyError, RuntimeError, ValueError):
        raise UsageError(f"{run.checkpoint}: not a checkpoint of this run; remove it to start anew") from None


def fit(run: Run, learner: BaseLearner, progress: Progress, *, quiet: bool = False) -> dict[str, Any]:
    """The rest of `train`, for a learner that `prepare` has seen."""
    budget = run.config.budget or ("symbols", learner.one_pass)
    with ExitStack() as stack:
        stack.enter_context(held(run.path))
        stop = stack.enter_context(stop_requests())  # first: config.json says that it can be asked to stop
        try:
            run.write_config(learner.data, device_name(learner.device), torch.get_num_threads(), budget)
            run.keep_rows(learner.step)
            loop = _Loop(run, learner, budget, progress, quiet)
            stack.callback(loop.close)
            return loop.fit(stop)
        except OSError as error:
            raise writing_failed(run, learner.step, error) from None
        except DivergedError as error:
            kept = (
                f"last good checkpoint: {run.checkpoint}" if run.checkpoint.exists() else "no checkpoint yet"
            )
            raise DivergedError(f"update {learner.step}: {error}; {kept}") from None


def writing_failed(run: Run, step: int, error: OSError) -> UsageError:
    """What to say when a run directory cannot be written."""
    return UsageError(
        f"{run.path}: writing failed at update {step} ({error.strerror}); "
        "the last checkpoint is whole: make room and add --resume"
    )


class Best(NamedTuple):
    """The best validation so far: at the highest level, and there with the best value of the metric."""

    level: int
    value: float

    def beats(self, other: Best, metric: Metric) -> bool:
        """Whether this is better than `other`, not merely as good."""
        if self.level != other.level:
            return self.level > other.level
        return self.value != other.value and metric.reached(self.value, other.value)


TRACE = 12
"""Points of the curve beside the progress bar."""


def _spark(values: list[float]) -> str:
    """A curve in one line of text, from the lowest to the highest of its values."""
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low or 1.0))] for value in values)


class _Stopwatch:
    """Seconds of training: runs from `seconds` on, but not inside `paused`."""

    def __init__(self, seconds: float) -> None:
        self._start = time.perf_counter() - seconds

    def read(self) -> float:
        return time.perf_counter() - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        seconds = self.read()
        try:
            yield
        finally:
            self._start = time.perf_counter() - seconds


class _Loop:
    """One call of `train`: when to log, to validate, to save and to stop."""

    def __init__(
        self, run: Run, learner: BaseLearner, budget: tuple[str, float], progress: Progress, quiet: bool
    ) -> None:
        config, (seconds, best) = run.config, progress
        self.run, self.learner, self.config, self.best = run, learner, config, best
        self.metric = config.metric
        self.counted, self.budget = budget
        self.clock = _Stopwatch(seconds)
        self.saved, self.saved_step = time.perf_counter(), learner.step
        self.logged_at, self.logged_symbols = seconds, learner.symbols
        self.log = MetricsLog(run)
        self.trace: list[float] = []
        units = {"steps": "update", "minutes": "min", "symbols": self.metric.unit}
        self.bar = tqdm(
            total=self.budget, initial=self._done(), desc=run.path.name, unit=units[self.counted],
            unit_scale=self.counted != "minutes", disable=quiet,
            dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 30.0, leave=False,
        )  # fmt: skip

    def close(self) -> None:
        self.log.close()
        self.bar.close()

    def fit(self, stop: list[int]) -> dict[str, Any]:
        learner, config = self.learner, self.config
        next_eval = (learner.symbols // config.eval_every + 1) * config.eval_every
        last = self._finished()
        while not last and not stop:
            if learner.ready():
                learner.update()
            elif not learner.ended:
                if learner.step > self.saved_step and self._due():
                    self._save()
                continue
            last = self._finished()
            if learner.updates and (learner.step % config.log_every == 0 or last):
                self._log()
            if learner.symbols >= next_eval or last:
                next_eval = (learner.symbols // config.eval_every + 1) * config.eval_every
                with self.clock.paused():
                    self._validate()
                    self._save()
            elif learner.step % config.log_every == 0 and self._due():
                with self.clock.paused():
                    self._save()
        if stop:
            self._save()
            raise Interrupted(stop[0])
        return self._summarise()

    def _due(self) -> bool:
        return time.perf_counter() - self.saved > self.config.save_every

    def _finished(self) -> bool:
        return self.learner.ended or self._done() >= self.budget

    def _done(self) -> float:
        """How much of the budget is used up, in the units it is given in."""
        if self.counted == "minutes":
            return self.clock.read() / 60.0
        return self.learner.step if self.counted == "steps" else self.learner.symbols

    def _log(self) -> None:
        learner = self.learner
        measured = learner.metrics()
        learner.check(measured)
        seconds = self.clock.read()
        speed = (learner.symbols - self.logged_symbols) / max(seconds - self.logged_at, 1e-9)
        self.logged_at, self.logged_symbols = seconds, learner.symbols
        learner.reset_metrics()
        self.log.write(
            {"step": learner.step, "symbols": learner.symbols, **measured}
            | {"seconds": round(seconds, 3), "symbols_per_second": round(speed)}
        )
        key, unit = self.metric.key, self.metric.unit
        self.trace = [*self.trace, measured[key]][-TRACE:]
        self.bar.set_postfix_str(
            f"{_spark(self.trace)} {measured[key]:.3f} {key}, {speed / 1e3:.1f}k {unit}s/s", refresh=False
        )
        self.bar.update(self._done() - self.bar.n)

    def _validate(self) -> None:
        learner = self.learner
        level = learner.level
        found = learner.evaluate("valid", level)
        if not all(math.isfinite(value) for value in found.values()):
            raise DivergedError("the validation loss is not finite")
        seconds = round(self.clock.read(), 3)
        values = {"step": learner.step, "symbols": learner.symbols}
        values |= {f"valid_{name}": value for name, value in found.items()}
        if level is not None:
            values["level"] = level
        self.log.write(values | {"seconds": seconds})
        now = Best(level or 0, found[self.metric.key])
        if self.best is None or not learner.keeps_best or now.beats(self.best, self.metric):
            self.best = now
            checkpoint.save_checkpoint(self.run.best, learner.model.state_dict(), values)

    def _save(self) -> None:
        learner = self.learner
        if learner.updates:
            learner.check(learner.metrics())
        tensors, values = learner.state_dict()
        values |= {"seconds": self.clock.read(), "best": self.best}
        checkpoint.save_checkpoint(self.run.checkpoint, tensors, values)
        self.saved, self.saved_step = time.perf_counter(), learner.step

    def _summarise(self) -> dict[str, Any]:
        learner = self.learner
        tensors, best = checkpoint.load_checkpoint(self.run.best)
        last = next(row for row in reversed(self.run.rows()) if f"valid_{self.metric.key}" in row)
        seconds = self.clock.read()
        learner.model.load_state_dict(tensors)
        test = learner.evaluate("test", best.get("level"))
        summary = {
            "task": self.run.task_name,
            "data": learner.data.name,
            "method": self.config.method,
            "steps": learner.step,
            "symbols": learner.symbols,
            "seconds": round(seconds, 3),
            "symbols_per_second": round(learner.symbols / seconds),
            **{f"valid_{name}": last[f"valid_{name}"] for name in test},
            **{f"best_valid_{name}": best[f"valid_{name}"] for name in test},
            "best_symbols": best["symbols"],
            **{f"test_{name}": value for name, value in test.items()},
            **learner.summary(),
            "net_parameters": sum(p.numel() for p in learner.net),
            "synthesizer_parameters": sum(p.numel() for p in learner.synthesizer),
            "peak_memory_mb": round(peak_memory(learner.device) / 1e6, 1),
        }
        self.run.write_summary(summary)
        learner.draw(self.run)
        return summary


def peak_memory(device: torch.device) -> int:
    """Largest memory in bytes: allocated on a CUDA device, or resident in this process; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """What config.json calls it: the GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
