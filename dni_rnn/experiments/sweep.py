"""Sweeps: a grid of training commands with seeds, run to completion across interruptions.

A sweep is a folder with a `sweep.toml`:

    train = "ptb --hidden 256 --threads 1"     # what every cell shares
    seeds = [0, 1, 2]

    [cells]                                    # a name, and what the cell adds
    "bptt T=2" = "--bptt 2"
    "dni T=2" = "--bptt 2 --dni"

    [retired]                                  # the same; keeps its rows, and is not run
    "old" = "--an-option-that-is-gone"

Each (cell, seed) is one process `dni-rnn train ... --seed S --resume --out WORK/...`, so a killed sweep
goes on where its runs stood. A finished one becomes a row of `rows.jsonl` in the same folder and is
never run again; one that failed has a line in `failed.jsonl` until it succeeds.

A time budget is shared in rounds. In each of them every unfinished run has a turn of the same length, those
that have got least far first. A round takes half of the time that is left, and all of it when turns would be
shorter than `LEAST_TURN`. So every run soon has a checkpoint, and most of the time goes into long turns.
"""

from __future__ import annotations

import io
import json
import operator
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from dni_rnn.atomic_files import held, read_jsonl, write_atomically, write_jsonl
from dni_rnn.errors import UsageError
from dni_rnn.experiments.sweep_progress import Overview, best_score
from dni_rnn.metrics import TRACES, metric_of

POLL_SECONDS = 0.5
LEAST_TURN = 20.0
"""Seconds of a turn that are worth starting a process for."""

DIVERGED = 3
"""Exit code of a run that would only diverge again."""

PART_BYTES = 15_000_000
CARRIED = ("config.json", "metrics.jsonl", "checkpoint.safetensors", "best.safetensors")
"""What an unfinished run needs to go on."""

TRACED = 40
"""Points of each quantity that a row keeps of how things went inside."""

OF_THE_MACHINE = ("out", "data_dir", "resume")
"""Settings that say where a run was made, not what it did: left out of its row."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
      name: of the cell, without the seed.
      seed: of the run.
      arguments: of `dni-rnn train`, without `--seed`, `--resume` and `--out`.
      retired: it keeps the rows that it has, and is not run: an option of it is gone.
    """

    name: str
    seed: int
    arguments: tuple[str, ...]
    retired: bool = False

    @property
    def folder(self) -> str:
        return re.sub(r"[^A-Za-z0-9.]+", "-", self.name) + f"-seed{self.seed}"

    @property
    def command(self) -> str:
        """What a reader types to get this row again."""
        return shlex.join(["dni-rnn", "train", *self.arguments, "--seed", str(self.seed)])


def read_sweep(folder: Path) -> list[Cell]:
    """The cells of `folder/sweep.toml`, all cells of one seed before the next seed.

    Raises:
      UsageError: there is no such file, or it does not say what a sweep needs.
    """
    path = folder / "sweep.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        shared, seeds, cells = values["train"], values["seeds"], values["cells"]
        retired = values.get("retired", {})
        found = [
            Cell(name, operator.index(seed), tuple(shlex.split(f"{shared} " + added)), name in retired)
            for seed in seeds
            for name, added in [*cells.items(), *retired.items()]
        ]
    except FileNotFoundError:
        raise UsageError(f"{path}: no sweep there") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{path}: not a sweep ({error}); it needs train, seeds and [cells]") from None
    folders = Counter(cell.folder for cell in found)
    for folder_name, times in folders.items():
        if times > 1:
            raise UsageError(f"{path}: {times} runs would share the folder {folder_name}; rename a cell")
    return found


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The finished rows of a sweep; a last line that a crash cut short is left out."""
    path = folder / "rows.jsonl"
    return read_jsonl(path) if path.exists() else []


def read_failures(folder: Path) -> list[dict[str, Any]]:
    """The runs of a sweep that failed and have not succeeded since: which, how often and why."""
    path = folder / "failed.jsonl"
    return read_jsonl(path) if path.exists() else []


def make_row(cell: Cell, run: Path) -> dict[str, Any]:
    """One finished run as one row: what was asked, what came out, the curve, when each level began, and
    how things went inside.
    """
    config = json.loads((run / "config.json").read_text())
    metrics = read_jsonl(run / "metrics.jsonl")
    summary = json.loads((run / "summary.json").read_text())
    curve = [
        {"symbols": m["symbols"], "seconds": m["seconds"], name: round(m[name], 5), "step": m["step"]}
        for m in metrics
        for name in m
        if name.startswith("valid_")
    ]
    climbs: list[dict[str, Any]] = []
    for m in metrics:
        if "solved" in m and (not climbs or m["solved"] > climbs[-1]["solved"]):
            climbs.append({name: m[name] for name in ("symbols", "seconds", "solved", "step")})
    traces = _traces(metrics)
    about = {key: config[key] for key in ("versions", "python", "commit", "device", "threads")}
    return {
        "cell": cell.name,
        "seed": cell.seed,
        "command": cell.command,
        **summary,
        "config": {
            **{name: value for name, value in config["config"].items() if name not in OF_THE_MACHINE},
            "task_options": config["task_options"],
        },
        "curve": curve,
        **({"climbs": climbs} if climbs else {}),
        **({"traces": traces} if traces else {}),
        **about,
        "machine": ", then ".join(config["machines"]),
    }


def _traces(metrics: Sequence[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Of each quantity of `TRACES` that was logged: pairs [update, value], evenly spread."""
    found: dict[str, list[list[float]]] = {}
    for row in metrics:
        for name in row:
            if name.startswith(tuple(TRACES)):
                found.setdefault(name, []).append([row["step"], float(f"{row[name]:.4g}")])
    return {name: _thinned(points) for name, points in found.items()}


def _thinned(points: list[list[float]]) -> list[list[float]]:
    last, kept = len(points) - 1, min(len(points), TRACED)
    return [points[round(i * last / max(kept - 1, 1))] for i in range(kept)]


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `9m`, `1.5h` or `1h30m`."""
    number = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(f"(?:{number}h)?(?:{number}m)?(?:{number}s)?", text)
    if found is not None:
        seconds = sum(float(n or 0) * unit for n, unit in zip(found.groups(), (3600, 60, 1), strict=True))
        if seconds > 0:
            return seconds
    raise UsageError(f"--budget {text}: give a duration such as 90s, 9m or 1h30m")


def run_sweep(
    folder: Path,
    work: Path,
    parallel: int = 1,
    *,
    budget: float | None = None,
    device: str | None = None,
    carry: Path | None = None,
) -> int:
    """Run the cells that have no row yet, `parallel` at a time; returns how many failed.

    A run that fails is tried once more; its output is in `WORK/CELL.log`. One that has diverged twice is not
    tried by a later call either, as long as its command is the same. After `budget` seconds the running
    ones are stopped with a checkpoint, as on SIGINT and SIGTERM.

    Args:
      folder: with the sweep.toml.
      work: where the run directories go.
      parallel: processes at a time.
      budget: seconds to share between the runs; None runs each to its end, one after the other.
      device: `--device` of every run that does not say its own.
      carry: folder of `unpack_runs`, read before and written after.
    Raises:
      UsageError: there is no sweep, or another process runs it.
    """
    if parallel < 1:
        raise UsageError(f"--parallel must be at least 1, not {parallel}")
    cells = read_sweep(folder)
    with held(folder):
        work.mkdir(parents=True, exist_ok=True)
        if carry is not None:
            unpack_runs(carry, work)
        sweep = _Sweep(folder, work, cells, parallel, budget, device)
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            sweep.run()
        finally:
            signal.signal(signal.SIGTERM, before)
            sweep.close()
            if carry is not None:
                pack_runs(carry, work, [cell.folder for cell in sweep.waiting])
        return sweep.failed


class _Running:
    """A run that has its turn."""

    def __init__(self, cell: Cell, work: Path, device: str | None, turn: float) -> None:
        self.cell, self.turn, self.stopped = cell, turn, False
        self._config = work / cell.folder / "config.json"
        self._before = self._written()
        self.started = time.monotonic()
        self.process = _start(cell, work, device)

    def _written(self) -> int | None:
        with suppress(FileNotFoundError):
            return self._config.stat().st_mtime_ns

    def stop_when_due(self, deadline: float) -> None:
        """Ask it to stop when its turn or all time is over: once, as a second signal would not wait for the
        checkpoint, and at the end of a turn not before it has begun to train and can make one.
        """
        now = time.monotonic()
        over = now - self.started >= self.turn and self._written() != self._before
        if not self.stopped and (over or now >= deadline):
            self.stopped = True
            self.process.terminate()


class _Sweep:
    """One call of `run_sweep`.

    Attributes:
      waiting: the cells that have no row yet and are worth a try, running ones included.
      failed: how many were given up.
    """

    def __init__(
        self,
        folder: Path,
        work: Path,
        cells: Sequence[Cell],
        parallel: int,
        budget: float | None,
        device: str | None,
    ) -> None:
        self.folder, self.work, self.parallel, self.device = folder, work, parallel, device
        self.rows = read_rows(folder)
        self.deadline = float("inf") if budget is None else time.monotonic() + budget
        done = {(row["cell"], row["seed"]) for row in self.rows}
        hopeless = {
            (record["cell"], record["seed"], record["command"])
            for record in read_failures(folder)
            if record["exit_code"] == DIVERGED and record["times"] > 1
        }
        unfinished = [c for c in cells if (c.name, c.seed) not in done and not c.retired]
        self.waiting = [c for c in unfinished if (c.name, c.seed, c.command) not in hopeless]
        self.failures: Counter[Cell] = Counter()
        self.begun = False
        self.running: list[_Running] = []
        self.failed = 0
        name = folder.resolve().name
        self.asked = {(cell.name, cell.seed) for cell in cells}
        there = len(self._finished())
        self.overview = Overview(name, len(cells), min(parallel, len(cells)), there, self.deadline)
        self.overview.say(f"{folder}: {there} rows there, {len(self.waiting)} to run")
        for cell in unfinished:
            if cell not in self.waiting:
                self.overview.say(
                    f"{cell.name}, seed {cell.seed}: diverged twice and is left out; change its command, "
                    f"or remove its line from {folder / 'failed.jsonl'}"
                )

    def run(self) -> None:
        """Rounds, until all is done or time is up."""
        while self.waiting:
            share = (self.deadline - time.monotonic()) * self.parallel / max(len(self.waiting), self.parallel)
            if self.begun and share < LEAST_TURN:
                break
            self._round(share / 2 if share >= 2 * LEAST_TURN else share)
        if self.waiting:
            self.overview.say(
                f"time is up, {len(self.waiting)} unfinished; the same command goes on with them"
            )

    def _finished(self) -> list[dict[str, Any]]:
        """Rows of the cells that are asked for; there may be others, of cells or seeds that are no longer."""
        return [row for row in self.rows if (row["cell"], row["seed"]) in self.asked]

    def _round(self, turn: float) -> None:
        order = self.waiting
        if turn < float("inf"):
            order = sorted(order, key=lambda cell: progress(self.work / cell.folder))
        queue = deque(order)
        while (queue and time.monotonic() < self.deadline) or self.running:
            while queue and len(self.running) < self.parallel and time.monotonic() < self.deadline:
                cell = queue.popleft()
                self.begun = True
                self.running.append(_Running(cell, self.work, self.device, turn))
            for run in [run for run in self.running if run.process.poll() is not None]:
                self.running.remove(run)
                if self._ended(run):
                    queue.append(run.cell)
            for run in self.running:
                run.stop_when_due(self.deadline)
            shares = {
                f"{run.cell.name}, seed {run.cell.seed}": progress(self.work / run.cell.folder)
                for run in self.running
            }
            rows = self._finished()
            self.overview.show(len(rows), self.failed, shares, best_score(rows))
            time.sleep(POLL_SECONDS)

    def _ended(self, run: _Running) -> bool:
        """Note how a run ended; whether it is to be tried again at once."""
        cell, code = run.cell, run.process.returncode
        again = False
        if code == 0:
            row = make_row(cell, self.work / cell.folder)
            self.rows = [*read_rows(self.folder), row]
            write_jsonl(self.folder / "rows.jsonl", self.rows)
            self._record(cell, None)
            self.waiting.remove(cell)
            metric = metric_of(row)
            score = row[f"test_{metric.key}" if metric.validated else metric.key]
            outcome = f"{metric.label} {score:.{metric.digits}f} in {row['seconds']:.0f} s"
        elif run.stopped and code != DIVERGED:
            outcome = f"saved at {progress(self.work / cell.folder):.0%}"
        else:
            self._record(cell, code)
            self.failures[cell] += 1
            again = self.failures[cell] < 2
            outcome = f"failed with exit code {code}, "
            outcome += "will be tried again" if again else f"see {self.work / cell.folder}.log"
            if not again:
                self.failed += 1
                self.waiting.remove(cell)
        self.overview.say(f"{cell.name}, seed {cell.seed}: {outcome}; {len(self.waiting)} unfinished")
        return again

    def _record(self, cell: Cell, code: int | None) -> None:
        """Write the failure of a run down, or, with None, that it has succeeded."""
        records = read_failures(self.folder)
        others = [r for r in records if (r["cell"], r["seed"]) != (cell.name, cell.seed)]
        if code is not None:
            times = sum(r["times"] for r in records if r not in others and r["command"] == cell.command)
            reason = _last_line(self.work / f"{cell.folder}.log")
            record = {"cell": cell.name, "seed": cell.seed, "command": cell.command, "times": times + 1}
            others.append(record | {"exit_code": code, "reason": reason})
        if records or others:
            write_jsonl(self.folder / "failed.jsonl", others)

    def close(self) -> None:
        """Stop what is running, with a checkpoint."""
        for run in self.running:
            if not run.stopped:
                run.process.terminate()
        for run in self.running:
            run.process.wait()
        self.overview.close()


def progress(run: Path) -> float:
    """The share of its budget that a run has used up, by what it has written so far; 0 if nothing."""
    try:
        unit, amount = json.loads((run / "config.json").read_text(encoding="utf-8"))["budget"]
        last = json.loads(_last_line(run / "metrics.jsonl"))
    except (OSError, ValueError, KeyError, TypeError):  # an endless budget has no shares
        return 0.0
    done = {"symbols": last["symbols"], "steps": last["step"], "minutes": last["seconds"] / 60}
    return min(done[unit] / amount, 1.0)


def _last_line(path: Path) -> str:
    """The last whole line of a file, of a progress bar what it said last."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, io.SEEK_END) - 4096))
        lines = file.read().decode(errors="replace").rpartition("\n")[0].splitlines()
    return lines[-1].strip() if lines else ""


def pack_runs(folder: Path, work: Path, runs: Iterable[str]) -> None:
    """Write what `runs` in `work` need to go on to `folder`, as a tar archive in parts of at most 15 MB.

    Outputs that a run can do without are left out, and so are runs without a checkpoint. Parts that an
    earlier call wrote for this `work` are replaced.
    """
    begun = [run for run in runs if (work / run / "checkpoint.safetensors").exists()]
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for run in begun:
            for name in filter(lambda name: (work / run / name).exists(), CARRIED):
                tar.add(work / run / name, f"{run}/{name}")
    content = archive.getvalue() if begun else b""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(content), PART_BYTES)
    for number, start in enumerate(starts):
        write_atomically(folder / f"{work.name}.tar.{number:03}", content[start : start + PART_BYTES])
    for part in _parts(folder, work)[len(starts) :]:
        part.unlink()


def _parts(folder: Path, work: Path) -> list[Path]:
    return sorted(folder.glob(f"{escape(work.name)}.tar.[0-9]*"))


def unpack_runs(folder: Path, work: Path) -> None:
    """Put the runs of `pack_runs` into `work`, but for those that have got as far there.

    Raises:
      UsageError: a part is missing or not whole.
    """
    content = b"".join(part.read_bytes() for part in _parts(folder, work))
    if not content:
        return
    with tempfile.TemporaryDirectory(dir=work) as unpacked:
        try:
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                tar.extractall(unpacked, filter="data")
        except (tarfile.TarError, EOFError) as error:
            raise UsageError(
                f"{folder}: its {work.name}.tar.* do not belong together ({error}); copy them again"
            ) from None
        for run in sorted(Path(unpacked).iterdir()):
            if progress(run) > progress(work / run.name):
                shutil.rmtree(work / run.name, ignore_errors=True)
                run.rename(work / run.name)


def _start(cell: Cell, work: Path, device: str | None) -> subprocess.Popen[bytes]:
    words = [*cell.arguments, "--seed", str(cell.seed), "--resume", "--out", str(work / cell.folder)]
    if device is not None and "--device" not in cell.arguments:
        words += ["--device", device]
    with open(work / f"{cell.folder}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dni_rnn", "train", *words],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
