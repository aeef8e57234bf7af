"""The training loop: budget, metrics, validation, checkpoints, and a clean stop on signals."""

from __future__ import annotations

import math
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from dni_rnn.data.task import content_of
from dni_rnn.errors import DivergedError, UsageError
from dni_rnn.files import exclusive
from dni_rnn.metrics import Metric
from dni_rnn.training import checkpoint
from dni_rnn.training.learner import Learner, choose_device
from dni_rnn.training.learners import learner_class
from dni_rnn.training.progress_bar import ProgressBar
from dni_rnn.training.run_directory import MetricsLog, Run


class Interrupted(Exception):  # noqa: N818
    """A signal asked the run to stop; it was saved. `signal` is its number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal = signal_number


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, so that no update is interrupted. A second one takes effect at once."""
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
    the end, with the weights of the best validation. `seconds` counts training alone. A task with a
    curriculum is validated at the level being learnt, and tested at that of the best weights.

    Raises:
      UsageError: the data, the device or the directory cannot be used (nothing is written), or a
        checkpoint cannot be written (the last one stays).
      DivergedError: the loss is not finite or the state exceeds its limit.
      Interrupted: SIGINT or SIGTERM; a checkpoint was written.
    """
    config = run.config
    device = choose_device(config.device)
    learner = learner_class(run.task, config)(config, load_data(run), device)
    return fit(run, learner, prepare(run, learner), quiet=quiet)


def load_data(run: Run) -> Any:
    """The data of the run's task; also sets torch's number of threads.

    Raises:
      UsageError: they cannot be read, or are not those of the run to be resumed.
    """
    data = run.task.load(run.config.data_dir)
    if run.config.resume and run.checkpoint.exists():
        run.check_same()
        run.check_data(data)
    if run.config.threads:
        torch.set_num_threads(run.config.threads)
    return data


class Progress(NamedTuple):
    """Progress of a run before it was resumed."""

    seconds: float
    best: Best | None


def prepare(run: Run, learner: Learner) -> Progress:
    """Check the run directory, then `resume`."""
    size = sum(t.numel() * t.element_size() for t in learner.model.state_dict().values())
    run.prepare(needed_bytes=12 * size)
    return resume(run, learner)


def resume(run: Run, learner: Learner) -> Progress:
    """Restore the learner from the checkpoint, if the run is to be resumed."""
    if not (run.config.resume and run.checkpoint.exists()):
        return Progress(0.0, None)
    tensors, values = checkpoint.load_checkpoint(run.checkpoint)
    run.check_data(learner.data, values)
    try:
        learner.load_state_dict(tensors, values)
        return Progress(values["seconds"], values["best"] and Best(*values["best"]))
    except (KeyError, RuntimeError, ValueError):
        raise UsageError(f"{run.checkpoint}: not a checkpoint of this run; remove it to start anew") from None


def fit(run: Run, learner: Learner, progress: Progress, *, quiet: bool = False) -> dict[str, Any]:
    """The rest of `train`, after `prepare`."""
    budget = run.config.budget or ("symbols", learner.one_pass)
    with ExitStack() as stack:
        stack.enter_context(exclusive(run.path))
        stop = stack.enter_context(stop_requests())  # first: once config.json exists, a sweep may send them
        try:
            content = content_of(learner.data)
            where = device_name(learner.device), torch.get_num_threads()
            run.keep_rows(learner.counters.step)  # before anything is written: it may raise
            run.write_config(learner.data, content, *where, budget)
            loop = _Loop(run, learner, content, budget, progress, quiet)
            stack.callback(loop.close)
            return loop.fit(stop)
        except OSError as error:
            raise writing_failed(run, learner.counters.step, error) from None
        except DivergedError as error:
            kept = (
                f"last good checkpoint: {run.checkpoint}" if run.checkpoint.exists() else "no checkpoint yet"
            )
            raise DivergedError(f"update {learner.counters.step}: {error}; {kept}") from None


def writing_failed(run: Run, step: int, error: OSError) -> UsageError:
    """The error for a run directory that cannot be written."""
    return UsageError(
        f"{run.path}: writing failed at update {step} ({error.strerror}); "
        "the last checkpoint is whole: make room and add --resume"
    )


class Best(NamedTuple):
    """The best validation so far: at the highest level, and there with the best value of the metric."""

    level: int
    value: float

    def beats(self, other: Best, metric: Metric) -> bool:
        """Whether this is strictly better than `other`."""
        if self.level != other.level:
            return self.level > other.level
        return self.value != other.value and metric.reached(self.value, other.value)


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
        self,
        run: Run,
        learner: Learner,
        content: dict[str, Any] | None,
        budget: tuple[str, float],
        progress: Progress,
        quiet: bool,
    ) -> None:
        config, (seconds, best) = run.config, progress
        self.run, self.learner, self.config, self.best = run, learner, config, best
        self.content = content
        self.metric = config.metric
        self.counted, self.budget = budget
        self.clock = _Stopwatch(seconds)
        self.saved, self.saved_step = time.perf_counter(), learner.counters.step
        self.logged_at, self.logged_symbols = seconds, learner.counters.symbols
        self.log = MetricsLog(run)
        units = {"steps": "update", "minutes": "min", "symbols": self.metric.unit}
        self.bar = ProgressBar(self.budget, self._done(), run.path.name, units[self.counted], quiet)

    def close(self) -> None:
        self.log.close()
        self.bar.close()

    def fit(self, stop: list[int]) -> dict[str, Any]:
        learner, config = self.learner, self.config
        next_eval = (learner.counters.symbols // config.eval_every + 1) * config.eval_every
        last = self._finished()
        while not last and not stop:
            if learner.ready():
                learner.update()
            elif not learner.ended:
                if learner.counters.step > self.saved_step and self._due():
                    self._save()
                if not self._finished():  # a budget of minutes may end while no data come
                    continue
            last = self._finished()
            if learner.counters.updates and (learner.counters.step % config.log_every == 0 or last):
                self._log()
            if learner.counters.symbols >= next_eval or last:
                next_eval = (learner.counters.symbols // config.eval_every + 1) * config.eval_every
                with self.clock.paused():
                    self._validate()
                    self._save()
            elif learner.counters.step % config.log_every == 0 and self._due():
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
        """How much of the budget is used, in its own units."""
        if self.counted == "minutes":
            return self.clock.read() / 60.0
        return self.learner.counters.step if self.counted == "steps" else self.learner.counters.symbols

    def _log(self) -> None:
        learner = self.learner
        measured = learner.metrics()
        learner.check(measured)
        seconds = self.clock.read()
        speed = (learner.counters.symbols - self.logged_symbols) / max(seconds - self.logged_at, 1e-9)
        self.logged_at, self.logged_symbols = seconds, learner.counters.symbols
        learner.reset_metrics()
        self.log.write(
            {"step": learner.counters.step, "symbols": learner.counters.symbols, **measured}
            | {"seconds": round(seconds, 3), "symbols_per_second": round(speed)}
        )
        key, unit = self.metric.key, self.metric.unit
        self.bar.show(self._done(), measured[key], key, f"{speed / 1e3:.1f}k {unit}s/s")

    def _validate(self) -> None:
        learner = self.learner
        level = learner.level
        found = learner.evaluate("valid", level)
        if not all(math.isfinite(value) for value in found.values()):
            raise DivergedError("the validation loss is not finite")
        seconds = round(self.clock.read(), 3)
        values = {"step": learner.counters.step, "symbols": learner.counters.symbols}
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
        if learner.counters.updates:
            learner.check(learner.metrics())
        tensors, values = learner.state_dict()
        values |= {"seconds": self.clock.read(), "best": self.best, "content": self.content}
        checkpoint.save_checkpoint(self.run.checkpoint, tensors, values)
        self.saved, self.saved_step = time.perf_counter(), learner.counters.step

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
            "steps": learner.counters.step,
            "symbols": learner.counters.symbols,
            "seconds": round(seconds, 3),
            "symbols_per_second": round(learner.counters.symbols / seconds),
            **{f"valid_{name}": last[f"valid_{name}"] for name in test},
            **{f"best_valid_{name}": best[f"valid_{name}"] for name in test},
            "best_symbols": best["symbols"],
            **{f"test_{name}": value for name, value in test.items()},
            **learner.summary(),
            "net_parameters": sum(p.numel() for p in learner.record.net),
            "synthesizer_parameters": sum(p.numel() for p in learner.record.synthesizer),
            "peak_memory_mb": round(peak_memory(learner.device) / 1e6, 1),
        }
        self.run.write_summary(summary)
        learner.draw(self.run)
        return summary


def peak_memory(device: torch.device) -> int:
    """Largest memory in bytes: allocated on a CUDA device, or resident in this process; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # on Linux, getrusage includes the peak of the parent process
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if peak is not None:
        return int(peak[1]) * 1024
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def device_name(device: torch.device) -> str:
    """Name of the device in config.json: the GPU's, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
