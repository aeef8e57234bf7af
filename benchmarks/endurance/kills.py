"""Runs and sweeps that are killed at random moments and resumed, against the same ones left alone."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from commands import SECONDS, Command, result_of, run, training, warm

from dni_rnn.files import read_jsonl

UP_TO_THE_MACHINE = "decoupled, queue of 2"
LEFT_ALONE = 5
VICTIMS = ("one that trains", "all that train", "what started them")


def left_alone(folder: Path, name: str, steps: int, number: int = 0) -> Path:
    """An uninterrupted run of a kind, made once; its file `seconds` says how long it took."""
    whole, began = folder / f"whole {name} {number}", time.monotonic()
    if not (whole / "seconds").exists():
        shutil.rmtree(whole, ignore_errors=True)
        ended = run(folder, training(name, whole.name, steps))
        assert ended.code == 0, ended
        (whole / "seconds").write_text(str(time.monotonic() - began))
    return whole


def killed(folder: Path, name: str, number: int, steps: int) -> dict[str, Any]:
    """One run of a kind, killed at random moments until it ends; `same`: whether the result is unchanged."""
    warm(folder)
    whole = left_alone(folder, name, steps)
    seconds, chance = float((whole / "seconds").read_text()), random.Random(f"{name} {number}")
    shutil.rmtree(folder / "killed", ignore_errors=True)
    kills, moment = 0, 0
    while True:
        # Each start gets more time, so that every run ends.
        limit = chance.uniform(0.0, seconds * (0.4 + 0.2 * moment))
        ended = run(folder, [*training(name, "killed", steps), "--resume"], limit)
        moment += 1
        if ended.code is not None:
            break
        kills += 1
    same = ended.code == 0 and result_of(folder / "killed") == result_of(whole)
    return {"name": name, "number": number, "kills": kills, "same": same, "said": ended.err[-300:]}


def killed_apart(folder: Path, name: str, number: int, steps: int) -> dict[str, Any]:
    """The same for a run in several processes. Child processes must be gone when their parent is."""
    whole, chance = left_alone(folder, name, steps), random.Random(f"{name} {number}")
    shutil.rmtree(folder / "killed", ignore_errors=True)
    words, metrics = training(name, "killed", steps), folder / "killed" / "metrics.jsonl"
    left, rows = 0, len(read_jsonl(whole / "metrics.jsonl"))
    victims = Counter[str]()
    command = Command(folder, [*words, "--resume"])
    for moment in sorted(chance.uniform(-0.3, 0.9) for _ in range(4)):
        # After a share of its rows, or at any moment before the first.
        until = time.monotonic() + (SECONDS if moment >= 0.0 else chance.uniform(0.0, 6.0))
        ended = command.wait(0.01)
        while ended is None and time.monotonic() < until:
            if moment >= 0.0 and metrics.exists() and metrics.read_bytes().count(b"\n") >= moment * rows:
                break
            ended = command.wait(0.01)
        there = command.started()
        if ended is not None or not there:
            continue
        victim = chance.choice(VICTIMS)
        victims[victim] += 1
        if victim == VICTIMS[2]:
            command.kill()
            left += command.left()
            command = Command(folder, [*words, "--resume"])
            continue
        for pid in there if victim == VICTIMS[1] else [chance.choice(there)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    ended = command.wait(SECONDS) or command.kill()
    left += command.left()
    if ended.code == 1 and "giving up" in ended.err:  # killed too often for one start
        ended = run(folder, [*words, "--resume"])
    same = ended.code == 0 and not left
    errors = {}
    if same and name == UP_TO_THE_MACHINE:
        others = [left_alone(folder, name, steps, other) for other in range(LEFT_ALONE)]
        errors = {"error": test_error(folder / "killed"), "left_alone": [test_error(path) for path in others]}
    elif same:
        apart = name.startswith("decoupled")
        same = result_of(folder / "killed", apart) == result_of(whole, apart)
    record = {"name": name, "number": number, "kills": victims.total(), "same": same, "left": left}
    return record | errors | {"victims": dict(victims), "said": ended.err[-300:]}


def test_error(path: Path) -> float:
    return json.loads((path / "summary.json").read_text())["test_error"]


SHORT = "--hidden 8 --embedding 4 --batch-size 4 --threads 1 --device cpu --save-every 0 --log-every 2"
SWEEP = f"""train = "text text.txt {SHORT} --steps 60 --eval-every 400"
seeds = [0]

[cells]
"T=4" = "--bptt 4 --dni"
"T=2" = "--bptt 2 --trace 8"
"""
OF_TIME = ("seconds", "symbols_per_second", "peak_memory_mb", "commit")


def sweep(folder: Path, name: str) -> list[str]:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "sweep.toml").write_text(SWEEP)
    return ["sweep", name, "--work", f"{name} at work"]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a sweep without times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in OF_TIME}
        return [timeless(each) for each in value] if isinstance(value, list) else value

    return [timeless(row) for row in read_jsonl(folder / "rows.jsonl")]


def swept(folder: Path, seconds: float = 4 * SECONDS) -> Path:
    """An uninterrupted sweep, made once."""
    whole, began = folder / "whole sweep", time.monotonic()
    if not (whole / "seconds").exists():
        shutil.rmtree(whole, ignore_errors=True)
        ended = run(folder, sweep(folder, whole.name), seconds)
        assert ended.code == 0, ended
        (whole / "seconds").write_text(str(time.monotonic() - began))
    return whole


def killed_sweep(folder: Path, number: int) -> dict[str, Any]:
    """A sweep, killed at random moments; the runs that it started must be gone too."""
    whole, chance = swept(folder), random.Random(f"sweep {number}")
    seconds = float((whole / "seconds").read_text())
    for name in ("killed sweep", "killed sweep at work"):
        shutil.rmtree(folder / name, ignore_errors=True)
    kills, left = 0, 0
    while True:
        command = Command(folder, sweep(folder, "killed sweep"))
        ended = command.wait(chance.uniform(0.0, seconds * (0.4 + 0.2 * kills)))
        if ended is not None:
            break
        command.kill()
        kills += 1
        left += command.left()
    same = ended.code == 0 and not left and rows_of(folder / "killed sweep") == rows_of(whole)
    failed = (folder / "killed sweep" / "failed.jsonl").exists()
    record = {"name": "sweep", "number": number, "kills": kills, "same": same and not failed, "left": left}
    return record | {"said": ended.err[-300:]}
