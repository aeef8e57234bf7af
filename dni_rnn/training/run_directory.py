"""Run directories: the files of a run, written and read.

config.json               everything resolved: task, options, versions, commit, device, threads
metrics.jsonl             a row every `log_every` updates, and one per validation
checkpoint.safetensors    model, optimizer, recurrent state, random state, position in the data
best.safetensors          the model with the lowest validation loss so far
summary.json              written when the run has ended
events.out.tfevents.*     when tensorboard is installed
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dni_rnn.config import RecurrentConfig, RunConfig, from_json, to_json
from dni_rnn.config.spelling import flag
from dni_rnn.data.task import Alphabet, Corpus, Data, Task, config_of, content_of, installed_tasks
from dni_rnn.errors import UsageError
from dni_rnn.files import read_json, read_jsonl, understood, write_atomically, write_jsonl

REPORTED_PACKAGES = ("dni-rnn", "torch", "numpy", "safetensors")


class Run:
    """A run directory.

    Attributes:
      path: the directory.
      task_name, task, config: task and configuration of the run.
    """

    def __init__(self, path: Path, task_name: str, task: Task, config: RunConfig) -> None:
        self.path, self.task_name, self.task, self.config = path, task_name, task, config

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @classmethod
    def open(cls, path: Path) -> Run:
        """The run that was written to `path`.

        Raises:
          UsageError: there is none, or its task is not installed.
        """
        values = _read_config(path)
        name, options, config = values["task"], values["task_options"], values["config"]
        tasks = installed_tasks()
        if name not in tasks:
            raise UsageError(f"{path}: its task {name!r} is not installed; known: {', '.join(tasks)}")
        file = path / "config.json"
        task = from_json(tasks[name], options, file)
        return cls(path, name, task, from_json(config_of(tasks[name]), config, file))

    def check_data(self, data: Data, checkpoint: dict[str, Any] | None = None) -> None:
        """Raises `UsageError` when `data` are not those that the run was started with.

        Args:
          checkpoint: values of the checkpoint to resume from.
        """
        started = _read_config(self.path)
        if started.get("symbols") != _symbols(data):
            raise UsageError(
                f"{self.path} was trained on other symbols than those of {data.name}: the data have changed; "
                "put the old ones back"
            )
        now = content_of(data)
        for written in (started, checkpoint or {}):
            # Runs of earlier versions lack this entry.
            if "content" in written and written["content"] != now:
                raise UsageError(
                    f"{self.path} was trained on other data than {data.name} is now "
                    f"({_change(written['content'], now)}); put the old data back, or give another --out "
                    "(eval --file scores another text)"
                )

    def prepare(self, needed_bytes: int) -> None:
        """Check, before any training, that the directory can be written to and holds no other run.

        Raises:
          UsageError: it cannot be made or written, holds another run, or the disk is too full.
        """
        there = (self.path / "config.json").exists()
        if self.checkpoint.exists() and not there:
            raise UsageError(
                f"{self.path} holds a checkpoint but no config.json; put it back or give another --out"
            )
        if there and not self.config.resume:
            raise UsageError(
                f"{self.path} already holds a run; add --resume to go on with it, or give another --out"
            )
        if there:
            self.check_same()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / ".writable", b"")
            (self.path / ".writable").unlink()
        except OSError as error:
            raise UsageError(
                f"--out {self.path}: cannot be written ({error.strerror}); give another"
            ) from None
        free = shutil.disk_usage(self.path).free
        if free < needed_bytes:
            raise UsageError(
                f"--out {self.path}: {free / 1e6:.0f} MB free, but checkpoints need "
                f"{needed_bytes / 1e6:.0f} MB; free some space or give another"
            )

    @property
    def data_name(self) -> str:
        """Name of its data in results."""
        return str(_read_config(self.path).get("data"))

    def alphabet(self) -> Alphabet | None:
        """The symbols of a run on a text, from config.json; None for a run on other data.

        Raises:
          UsageError: they do not match their checksum.
        """
        values = _read_config(self.path)
        symbols, counts = values.get("symbols"), values.get("counts")
        if not isinstance(self.config, RecurrentConfig) or not isinstance(symbols, list):
            return None
        with understood(self.path / "config.json"):
            # Runs of earlier versions have neither counts nor a checksum.
            if values.get("symbols_sha256", _sha256(symbols, counts)) != _sha256(symbols, counts):
                raise ValueError("of the symbols")
            counts = tuple([1] * len(symbols) if counts is None else counts)
        return Alphabet(self.data_name, tuple(symbols), counts)

    def check_same(self) -> None:
        """Raises `UsageError` when the directory holds a run of another task, or one with other settings."""
        other = Run.open(self.path)
        if (other.task_name, other.task) != (self.task_name, self.task):
            raise UsageError(f"{self.path} holds a run of another task: {other.task_name} with {other.task}")
        mine, theirs = to_json(self.config), to_json(other.config)
        for name in mine:
            if name not in self.config.changeable_on_resume and mine[name] != theirs[name]:
                raise UsageError(
                    f"{self.path} was run with {flag(name)} {theirs[name]}, not {mine[name]}; "
                    "resume it with the same settings or give another --out"
                )

    def write_config(
        self, data: Data, content: Any, device: str, threads: int, budget: tuple[str, float]
    ) -> None:
        """Write config.json. A run resumed on another machine lists all its machines.

        Args:
          content: `content_of(data)`.
        """
        written = self.path / "config.json"
        before = _read_config(self.path) if written.exists() else {}
        symbols, counts = _symbols(data), data.alphabet.counts if isinstance(data, Corpus) else None
        values = {
            "task": self.task_name,
            "task_options": to_json(self.task),
            "data": data.name,
            "symbols": symbols,
            "counts": counts,
            "symbols_sha256": _sha256(symbols, counts),
            "content": content,
            "config": to_json(self.config),
            "command": ["dni-rnn", *sys.argv[1:]],
            "versions": {name: _version(name) for name in REPORTED_PACKAGES},
            "python": platform.python_version(),
            "commit": source_commit(),
            "device": device,
            "threads": threads,
            "machines": list(dict.fromkeys([*map(str, before.get("machines") or ()), machine_name()])),
            "budget": budget if math.isfinite(budget[1]) else None,
        }
        write_atomically(written, (json.dumps(values, indent=1) + "\n").encode())

    def write_summary(self, values: dict[str, Any]) -> None:
        """Write summary.json."""
        write_atomically(self.summary, (json.dumps(values, indent=1) + "\n").encode())

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line that a crash cut short is left out."""
        return read_jsonl(self.metrics) if self.metrics.exists() else []

    def keep_rows(self, step: int) -> None:
        """Drop the rows after update `step`: a resumed run will write them again."""
        with understood(self.metrics):
            rows = [row for row in self.rows() if row["step"] <= step]
        write_jsonl(self.metrics, rows)


class MetricsLog:
    """Appends rows to metrics.jsonl, each flushed, and mirrors them to TensorBoard when it is installed."""

    def __init__(self, run: Run) -> None:
        self._file = open(run.metrics, "a")  # noqa: SIM115
        self._events = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run.path))

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; `step` and `symbols` give the time of the other numbers."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in row.items():
                if name != "step":
                    self._events.add_scalar(name, value, row["step"])

    def close(self) -> None:
        # A failed write has been reported already; closing tries it again.
        with suppress(OSError):
            self._file.close()
        if self._events is not None:
            self._events.close()


def _read_config(path: Path) -> dict[str, Any]:
    """What `Run.write_config` wrote.

    Raises:
      UsageError: it is missing or damaged.
    """
    file = path / "config.json"
    if not file.exists():
        raise UsageError(f"{path}: no run there (config.json is missing)")
    values = read_json(file)
    kinds = {"task": str, "task_options": dict, "config": dict}
    if not all(isinstance(values.get(name), kind) for name, kind in kinds.items()):
        raise UsageError(f"{file}: not a configuration of this program; put a good copy in its place")
    return values


def _change(before: Any, now: Any) -> str:
    lengths = [each["length"] if isinstance(each, dict) and "length" in each else 0 for each in (before, now)]
    if lengths[0] == lengths[1]:
        return "as long as before, and changed inside"
    return "{:,} symbols or examples then, {:,} now".format(*lengths)


def _symbols(data: Data) -> list[str] | int:
    """The symbols of a text in the order of their numbers, or how many there are."""
    return list(getattr(data, "symbols", ())) or data.input_symbols


def machine_name() -> str:
    """Processor, and number of cores available to this process."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not on Linux, or a processor that has no name there
        name = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def _sha256(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def source_commit() -> str | None:
    """The commit of the source, followed by `+` if there are changes; None for an installed wheel."""
    here = Path(__file__).resolve().parents[1]
    if not (here.parent / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(here)]
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def default_path(task_name: str, config: RunConfig) -> Path:
    """runs/TASK-FOLDER-seedN below the working directory, FOLDER as the configuration says."""
    return Path(os.curdir) / "runs" / f"{task_name}-{config.folder}-seed{config.seed}"
