"""Running a sweep: processes, turns, rows and failures.

A time budget is shared in rounds. In each, every unfinished run has a turn of the same length, the least
advanced first. A round takes half of the remaining time, or all of it if turns would be shorter than
`LEAST_TURN`. So every run soon has a checkpoint, and most of the time goes into long turns. A sweep that is
`in_order` runs its first cells to the end instead.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dni_rnn.errors import UsageError
from dni_rnn.experiments.carry import pack_runs, unpack_runs
from dni_rnn.experiments.sweep import (
    Cell,
    last_line,
    make_row,
    progress,
    read_failures,
    read_rows,
    read_sweep,
    runs_in_order,
)
from dni_rnn.experiments.sweep_progress import SweepProgress, best_score
from dni_rnn.files import exclusive, name_of, understood, write_jsonl
from dni_rnn.metrics import metric_of
from dni_rnn.parent_process import environment

POLL_SECONDS = 0.5
LEAST_TURN = 20.0
"""Shortest turn, in seconds, that is worth starting a process for."""
DIVERGED = 3
"""Exit code of a diverged run, which would diverge again."""


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

    A failed run is tried once more; its output is in `WORK/CELL.log`. One that has diverged twice is not
    tried again by later calls, unless its command changes. After `budget` seconds the running ones are
    stopped with a checkpoint, as on SIGINT and SIGTERM.

    Args:
      folder: folder of the sweep.toml.
      work: folder for the run directories.
      parallel: processes at a time.
      budget: seconds to share between the runs, or for the first ones of a sweep that is `in_order`; None
        runs each to its end, one after the other.
      device: `--device` of every run that does not set its own.
      carry: folder of `unpack_runs`, read before and written after.
    Raises:
      UsageError: there is no sweep, or another process runs it.
    """
    if parallel < 1:
        raise UsageError(f"--parallel must be at least 1, not {parallel}")
    cells = read_sweep(folder)
    with exclusive(folder):
        work.mkdir(parents=True, exist_ok=True)
        if carry is not None:
            unpack_runs(carry, work)
        sweep = _Sweep(folder, work, cells, parallel, budget, device, runs_in_order(folder))
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
    """A run in its turn."""

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
        """Stop it when its turn or the budget is over. Once, because a second signal would not wait for the
        checkpoint; and, at the end of a turn, not before training has begun and can write one.
        """
        now = time.monotonic()
        over = now - self.started >= self.turn and self._written() != self._before
        if not self.stopped and (over or now >= deadline):
            self.stopped = True
            self.process.terminate()


class _Sweep:
    """One call of `run_sweep`.

    Attributes:
      waiting: the cells without a row that are to be run, including running ones.
      failed: number of cells that were given up.
    """

    def __init__(
        self,
        folder: Path,
        work: Path,
        cells: Sequence[Cell],
        parallel: int,
        budget: float | None,
        device: str | None,
        in_order: bool,
    ) -> None:
        self.in_order = in_order
        self.folder, self.work, self.parallel, self.device = folder, work, parallel, device
        self.rows = read_rows(folder)
        rows = {(row["cell"], row["seed"]) for row in self.rows}
        cells = [cell for cell in cells if not cell.retired or (cell.name, cell.seed) in rows]
        self.deadline = float("inf") if budget is None else time.monotonic() + budget
        with understood(folder / "failed.jsonl"):
            hopeless = {
                (record["cell"], record["seed"], record["command"])
                for record in read_failures(folder)
                if record["exit_code"] == DIVERGED and record["times"] > 1
            }
        unfinished = [c for c in cells if (c.name, c.seed) not in rows]
        self.waiting = [c for c in unfinished if (c.name, c.seed, c.command) not in hopeless]
        self.failures: Counter[Cell] = Counter()
        self.begun = False
        self.running: list[_Running] = []
        self.failed = 0
        name = name_of(folder)
        self.asked = {(cell.name, cell.seed) for cell in cells}
        there = len(self._finished())
        self.progress_shown = SweepProgress(name, len(cells), min(parallel, len(cells)), there, self.deadline)
        self.progress_shown.say(f"{folder}: {there} rows there, {len(self.waiting)} to run")
        for cell in unfinished:
            if cell not in self.waiting:
                self.progress_shown.say(
                    f"{cell.name}, seed {cell.seed}: diverged twice and is left out; change its command, "
                    f"or remove its line from {folder / 'failed.jsonl'}"
                )

    def run(self) -> None:
        """Run rounds until all cells are done or time is up."""
        while self.waiting:
            share = (self.deadline - time.monotonic()) * self.parallel / max(len(self.waiting), self.parallel)
            if self.begun and share < LEAST_TURN:
                break
            turn = share / 2 if share >= 2 * LEAST_TURN else share
            self._round(float("inf") if self.in_order else turn)
        if self.waiting:
            self.progress_shown.say(
                f"time is up, {len(self.waiting)} unfinished; the same command goes on with them"
            )

    def _finished(self) -> list[dict[str, Any]]:
        """Rows of the current cells; there may be others, of former cells or seeds."""
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
            self.progress_shown.show(len(rows), self.failed, shares, best_score(rows))
            time.sleep(POLL_SECONDS)

    def _ended(self, run: _Running) -> bool:
        """Record how a run ended. Whether it is to be tried again at once."""
        cell, code = run.cell, run.process.returncode
        again = False
        if code == 0:
            row = make_row(cell, self.work / cell.folder)
            self.rows = [*read_rows(self.folder), row]
            write_jsonl(self.folder / "rows.jsonl", self.rows)
            self._record(cell, None)
            self.waiting.remove(cell)
            metric = metric_of(row)
            score = row[metric.score_key]
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
        self.progress_shown.say(f"{cell.name}, seed {cell.seed}: {outcome}; {len(self.waiting)} unfinished")
        return again

    def _record(self, cell: Cell, code: int | None) -> None:
        """Record the failure of a run, or, with None, its success."""
        records = read_failures(self.folder)
        others = [r for r in records if (r["cell"], r["seed"]) != (cell.name, cell.seed)]
        if code is not None:
            times = sum(r["times"] for r in records if r not in others and r["command"] == cell.command)
            reason = last_line(self.work / f"{cell.folder}.log")
            record = {"cell": cell.name, "seed": cell.seed, "command": cell.command, "times": times + 1}
            others.append(record | {"exit_code": code, "reason": reason})
        if records or others:
            write_jsonl(self.folder / "failed.jsonl", others)

    def close(self) -> None:
        """Stop running processes, with a checkpoint."""
        for run in self.running:
            if not run.stopped:
                run.process.terminate()
        for run in self.running:
            run.process.wait()
        self.progress_shown.close()


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
            env=environment(),
        )
