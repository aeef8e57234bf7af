"""Sweeps: a grid of training commands with seeds, run to completion across interruptions.

A sweep is a folder with a `sweep.toml`:

    train = "ptb --hidden 256 --threads 1"     # arguments of every cell
    seeds = [0, 1, 2]
    in_order = true                            # a time budget goes to the first cells first; else to all

    [cells]                                    # a name, and further arguments
    "bptt T=2" = "--bptt 2"
    "dni T=2" = "--bptt 2 --dni"

    [retired]                                  # the same; rows are kept, but not run again
    "old" = "--an-option-that-is-gone"

Each (cell, seed) is one process `dni-rnn train ... --seed S --resume --out WORK/...`, so a killed sweep
resumes its runs from their checkpoints. A finished run becomes a row of `rows.jsonl` in the same folder and
is never run again; a failed one has a line in `failed.jsonl` until it succeeds.
"""

from __future__ import annotations

import io
import json
import operator
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dni_rnn.errors import UsageError
from dni_rnn.files import read_json, read_jsonl, understood
from dni_rnn.metrics import LOGGED

LOGGED_POINTS = 40
"""Points of each logged diagnostic that a row keeps."""

OF_THE_MACHINE = ("out", "data_dir", "resume")
"""Settings that say where a run was made, not what it did: left out of its row."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
      name: name of the cell, without the seed.
      seed: seed of the run.
      arguments: arguments of `dni-rnn train`, without `--seed`, `--resume` and `--out`.
      retired: keep its rows, but do not run it: one of its options is gone.
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
        """The command that reproduces this row."""
        return shlex.join(["dni-rnn", "train", *self.arguments, "--seed", str(self.seed)])


def read_sweep(folder: Path) -> list[Cell]:
    """The cells of `folder/sweep.toml`, all cells of one seed before the next seed.

    Raises:
      UsageError: there is no such file, or it lacks an entry that a sweep needs.
    """
    path = folder / "sweep.toml"
    values = _values(path)
    try:
        shared, seeds, cells = values["train"], values["seeds"], values["cells"]
        retired = values.get("retired", {})
        found = [
            Cell(name, operator.index(seed), tuple(shlex.split(f"{shared} " + added)), name in retired)
            for seed in seeds
            for name, added in [*cells.items(), *retired.items()]
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _not_a_sweep(path, error) from None
    folders = Counter(cell.folder for cell in found)
    for folder_name, times in folders.items():
        if times > 1:
            raise UsageError(f"{path}: {times} runs would share the folder {folder_name}; rename a cell")
    return found


def runs_in_order(folder: Path) -> bool:
    """Whether a time budget goes to the first cells first, by `in_order` of `sweep.toml`.

    Raises:
      UsageError: as `read_sweep`, or `in_order` is neither true nor false.
    """
    path = folder / "sweep.toml"
    in_order = _values(path).get("in_order", False)
    if not isinstance(in_order, bool):
        raise UsageError(f"{path}: in_order is {in_order!r}; give true or false")
    return in_order


def _values(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no sweep there") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise _not_a_sweep(path, error) from None


def _not_a_sweep(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path}: not a sweep ({error}); it needs train, seeds and [cells]")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The finished rows of a sweep; a last line that a crash cut short is left out."""
    return _records(folder / "rows.jsonl")


def read_failures(folder: Path) -> list[dict[str, Any]]:
    """The runs of a sweep that failed and have not succeeded since: which, how often and why."""
    return _records(folder / "failed.jsonl")


def _records(path: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(path) if path.exists() else []
    for place, row in enumerate(rows, start=1):
        for name, kind in {"cell": str, "seed": int}.items():
            if not isinstance(row.get(name), kind):
                raise UsageError(
                    f"{path}, line {place}: {name} is {row.get(name)!r}; correct or remove the line"
                )
    return rows


def make_row(cell: Cell, run: Path) -> dict[str, Any]:
    """One finished run as one row: command, results, learning curve, when each level was solved, and
    diagnostics.
    """
    config, summary = read_json(run / "config.json"), read_json(run / "summary.json")
    metrics = read_jsonl(run / "metrics.jsonl")
    with understood(run):
        return _made_row(cell, config, metrics, summary)


def _made_row(
    cell: Cell, config: dict[str, Any], metrics: list[dict[str, Any]], summary: dict[str, Any]
) -> dict[str, Any]:
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
    logged = _logged(metrics)
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
        **({"traces": logged} if logged else {}),
        **about,
        "machine": ", then ".join(config["machines"]),
    }


def _logged(metrics: Sequence[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Pairs [update, value], evenly spread, of each quantity of `LOGGED` that was logged."""
    found: dict[str, list[list[float]]] = {}
    for row in metrics:
        for name in row:
            if name.startswith(tuple(LOGGED)):
                found.setdefault(name, []).append([row["step"], float(f"{row[name]:.4g}")])
    return {name: _thinned(points) for name, points in found.items()}


def _thinned(points: list[list[float]]) -> list[list[float]]:
    last, kept = len(points) - 1, min(len(points), LOGGED_POINTS)
    return [points[round(i * last / max(kept - 1, 1))] for i in range(kept)]


def progress(run: Path) -> float:
    """The fraction of its budget that a run has used, by what it has written so far; 0 if nothing."""
    try:
        unit, amount = json.loads((run / "config.json").read_text(encoding="utf-8"))["budget"]
        last = json.loads(last_line(run / "metrics.jsonl"))
    except (OSError, ValueError, KeyError, TypeError):  # also for an infinite budget
        return 0.0
    done = {"symbols": last["symbols"], "steps": last["step"], "minutes": last["seconds"] / 60}
    return min(done[unit] / amount, 1.0)


def last_line(path: Path) -> str:
    """The last complete line of a file; of a progress bar, its last update."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, io.SEEK_END) - 4096))
        lines = file.read().decode(errors="replace").rpartition("\n")[0].splitlines()
    return lines[-1].strip() if lines else ""
