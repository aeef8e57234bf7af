"""Sweeps: a grid of training commands with seeds, run to completion across interruptions.

A sweep is a folder with a `sweep.toml`:

    train = "ptb --hidden 256 --threads 1"     # what every cell shares
    seeds = [0, 1, 2]

    [cells]                                    # a name, and what the cell adds
    "bptt T=2" = "--bptt 2"
    "dni T=2" = "--bptt 2 --dni"

Each (cell, seed) is one process `dni-rnn train ... --seed S --resume --out WORK/...`, so a killed sweep
goes on where its runs stood. A finished one becomes a row of `rows.jsonl` in the same folder and is
never run again.
"""

from __future__ import annotations

import json
import operator
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dni_rnn.errors import UsageError
from dni_rnn.files import read_jsonl, write_jsonl
from dni_rnn.metrics import metric_of

POLL_SECONDS = 0.5

OF_THE_MACHINE = ("out", "data_dir", "resume")
"""Settings that say where a run was made, not what it did: left out of its row."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
      name: of the cell, without the seed.
      seed: of the run.
      arguments: of `dni-rnn train`, without `--seed`, `--resume` and `--out`.
    """

    name: str
    seed: int
    arguments: tuple[str, ...]

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
        found = [
            Cell(name, operator.index(seed), tuple(shlex.split(f"{shared} " + added)))
            for seed in seeds
            for name, added in cells.items()
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


def make_row(cell: Cell, run: Path) -> dict[str, Any]:
    """One finished run as one row: what was asked, what came out, the curve, and when each level began."""
    config = json.loads((run / "config.json").read_text())
    metrics = read_jsonl(run / "metrics.jsonl")
    summary = json.loads((run / "summary.json").read_text())
    curve = [
        {"symbols": m["symbols"], "seconds": m["seconds"], name: round(m[name], 5)}
        for m in metrics
        for name in m
        if name.startswith("valid_")
    ]
    climbs: list[dict[str, Any]] = []
    for m in metrics:
        if "solved" in m and (not climbs or m["solved"] > climbs[-1]["solved"]):
            climbs.append({name: m[name] for name in ("symbols", "seconds", "solved")})
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
        **about,
    }


def run_sweep(folder: Path, work: Path, parallel: int, minutes: float | None = None) -> int:
    """Run the cells that have no row yet, `parallel` at a time; returns how many failed.

    A cell that fails is tried once more; its output is in `WORK/CELL.log`. After `minutes` no further
    cell is started and the running ones are stopped with a checkpoint, as on SIGINT and SIGTERM.
    """
    if parallel < 1:
        raise UsageError(f"--parallel must be at least 1, not {parallel}")
    done = {(row["cell"], row["seed"]) for row in read_rows(folder)}
    waiting = [cell for cell in read_sweep(folder) if (cell.name, cell.seed) not in done]
    print(f"{folder}: {len(done)} rows there, {len(waiting)} to run", flush=True)
    work.mkdir(parents=True, exist_ok=True)
    deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    running: dict[Cell, subprocess.Popen[bytes]] = {}
    attempts: dict[Cell, int] = {}
    stopped: set[Cell] = set()
    failed = 0
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        while (waiting and time.monotonic() < deadline) or running:
            while waiting and len(running) < parallel and time.monotonic() < deadline:
                cell = waiting.pop(0)
                attempts[cell] = attempts.get(cell, 0) + 1
                running[cell] = _start(cell, work)
            for cell, process in list(running.items()):
                code = process.poll()
                if code is None:
                    if time.monotonic() >= deadline and cell not in stopped:
                        stopped.add(cell)
                        process.terminate()  # once: a second signal would not wait for the checkpoint
                    continue
                del running[cell]
                if code == 0:
                    row = make_row(cell, work / cell.folder)
                    rows = [*read_rows(folder), row]
                    write_jsonl(folder / "rows.jsonl", rows)
                    metric = metric_of(row)
                    score = row[f"test_{metric.key}" if metric.validated else metric.key]
                    outcome = f"{metric.label} {score:.{metric.digits}f} in {row['seconds']:.0f} s"
                elif time.monotonic() >= deadline:
                    outcome = "stopped, saved"
                elif attempts[cell] < 2:
                    waiting.append(cell)
                    outcome = f"failed with exit code {code}, will be tried again"
                else:
                    failed += 1
                    outcome = f"failed with exit code {code}, see {work / (cell.folder + '.log')}"
                print(f"{cell.name}, seed {cell.seed}: {outcome}; {len(waiting)} waiting", flush=True)
            time.sleep(POLL_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, before)
        for cell, process in running.items():
            if cell not in stopped:
                process.terminate()
        for process in running.values():
            process.wait()
    return failed


def _start(cell: Cell, work: Path) -> subprocess.Popen[bytes]:
    words = [*cell.arguments, "--seed", str(cell.seed), "--resume", "--out", str(work / cell.folder)]
    with open(work / f"{cell.folder}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dni_rnn", "train", *words],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
