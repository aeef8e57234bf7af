"""How runs survive `kill -9` and a full disk, and how every command handles damaged inputs.

    python benchmarks/endurance.py --out runs/endurance --minutes 60 --table results/endurance

Killed runs: a run is killed repeatedly, each time at a random moment, and resumed until it ends. Every logged
number and every weight must then equal those of an uninterrupted run. In a run with several processes, one
process, all training processes, or their parent is killed. In a sweep, the process that runs it is killed,
and the rows must equal those of an uninterrupted sweep, except for times. No child process may be left.

Damaged inputs are made from valid ones. A command must refuse such an input in one line, with exit code 2 and
without having written anything, or work as usual if the damage has no meaning. No changed byte of a
checkpoint may go unnoticed.

Full disks: a disk fills up before a command or while it runs, except for some room. The command must end with
one line and leave no partial file; with room again it must end as it does when there was always room. The
disk is a tmpfs in a mount namespace of its own; where that is not allowed, the length of files is limited
instead.

Finished trials are kept in `--out`, by number, and not run again: the same command continues.
Needs `fork` (not available on Windows) and, for processes and sweeps, /proc (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from dni_rnn.cli import main as dni_rnn
from dni_rnn.experiments.report import markdown_table, mean_sd
from dni_rnn.experiments.sweep import Cell, make_row
from dni_rnn.files import exclusive, read_jsonl, write_atomically, write_jsonl
from dni_rnn.training.checkpoint import load_checkpoint

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.\n" * 400
SHARED = ["--threads", "1", "--device", "cpu", "--save-every", "0", "--log-every", "5"]
SMALL = "--hidden 16 --embedding 8 --batch-size 8 --bptt 4"
RUNS = {
    "recurrent, text": f"text text.txt {SMALL} --dni".split(),
    "recurrent, copy with a trace": f"copy {SMALL} --trace 8".split(),
    "feed-forward, addition": ["addition", "--width", "16", "--batch-size", "32", "--method", "dni"],
}  # fmt: skip
PARTS = "addition --layers 2 --width 64 --batch-size 32 --lr 0.05 --decoupled --processes 2"
APART = {
    "data-parallel": f"text text.txt {SMALL} --dni --processes 2".split(),
    "decoupled, queue of 1": [*PARTS.split(), "--queue", "1"],
    "decoupled, queue of 2": PARTS.split(),
}
"""Runs in several processes. What more than one message under way does is up to the machine, so no two such
runs are the same: their errors are set beside those of some that were left alone."""
UP_TO_THE_MACHINE = "decoupled, queue of 2"
LEFT_ALONE = 5
VICTIMS = ("one that trains", "all that train", "what started them")
STEPS, EVAL_EVERY = 300, 2_000
SECONDS = 900.0
"""After which a command hangs."""


class Ended(NamedTuple):
    """How a command ended; `code` is None if it was killed."""

    code: int | None
    out: str
    err: str


MARK = "DNI_RNN_ENDURANCE"
"""Environment variable by which processes that a command has started are found."""


class Command:
    """`dni-rnn WORDS` in `folder`, in a process of its own; a stream reads the text.

    Args:
      longest: the largest file that it may write, in bytes; None: no limit.
    """

    def __init__(self, folder: Path, words: Sequence[str], longest: int | None = None) -> None:
        self.mark = str(uuid.uuid4())
        self._files = [folder.parent / f".{folder.name}.{name}" for name in ("out", "err")]
        stream = next((place for place in (folder, folder.parent) if (place / "text.txt").exists()), None)
        self.pid = os.fork()
        if self.pid:
            return
        os.chdir(folder)
        os.environ[MARK] = self.mark
        sources = os.devnull if stream is None else stream / "text.txt"
        os.dup2(os.open(sources, os.O_RDONLY), 0)
        for descriptor, file in zip((1, 2), self._files, strict=True):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        if longest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (longest, longest))
        code = 99
        try:
            code = dni_rnn([str(word) for word in words])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float) -> Ended | None:
        """How the command ended; None while it runs."""
        until = time.monotonic() + seconds
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() >= until:
                return None
            time.sleep(0.002)
        out, err = (file.read_text(errors="replace") if file.exists() else "" for file in self._files)
        for file in self._files:
            file.unlink(missing_ok=True)
        return Ended(os.WEXITSTATUS(ended[1]) if os.WIFEXITED(ended[1]) else None, out, err)

    def kill(self) -> Ended:
        os.kill(self.pid, signal.SIGKILL)
        ended = self.wait(SECONDS)
        assert ended is not None
        return ended

    def started(self) -> list[int]:
        """Ids of its running child processes and their descendants."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
        return found

    def left(self, seconds: float = 20.0) -> int:
        """How many of them are still there after waiting at most so long; they are then killed."""
        until = time.monotonic() + seconds
        while (found := self.started()) and time.monotonic() < until:
            time.sleep(0.05)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(found)


def run(folder: Path, words: Sequence[str], seconds: float = SECONDS) -> Ended:
    """A command that is killed after so many seconds."""
    command = Command(folder, words)
    return command.wait(seconds) or command.kill()


@functools.cache
def warm(folder: Path) -> None:
    """Import what commands import before the first fork, so that a process is killed at its work."""
    shutil.rmtree(folder / "warm", ignore_errors=True)
    for number, name in enumerate(RUNS):
        words = training(name, str(folder / "warm" / str(number)), 1)
        words = [str(folder / "text.txt") if word == "text.txt" else word for word in words]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            dni_rnn(words)
            dni_rnn(["compare", str(folder / "warm" / str(number)), "--out", str(folder / "warm" / "c.png")])


def training(name: str, out: str, steps: int) -> list[str]:
    task, *words = (RUNS | APART)[name]
    budget = ["--steps", str(steps), "--eval-every", str(EVAL_EVERY)]
    return ["train", task, *words, *SHARED, *budget, "--out", out]


def result_of(path: Path, apart: bool = False) -> Any:
    """A digest of the weights of a run and of every logged number that is not a time.

    Args:
      apart: only the numbers of validations: what a part has received from others depends on timing.
    """
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in read_jsonl(path / "metrics.jsonl")]
    rows = [row for row in rows if not apart or "valid_loss" in row or "valid_error" in row]
    digest = hashlib.sha256(json.dumps(rows).encode())
    parts = [
        files[-1] for part in sorted(path.glob("part*")) if (files := sorted(part.glob("*.safetensors")))
    ]
    for file in (path / "checkpoint.safetensors", path / "best.safetensors", *parts):
        tensors, _ = load_checkpoint(file)
        for key in sorted(tensors):
            digest.update(key.encode() + tensors[key].flatten().view(torch.uint8).numpy().tobytes())
    return len(rows), digest.hexdigest()


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


# Damaged inputs


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def flipped(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ chance.randrange(1, 256)]) + content[place + 1 :]


def overwritten(content: bytes, chance: random.Random) -> bytes:
    place, length = chance.randrange(len(content)), chance.randrange(1, 64)
    return content[:place] + chance.randbytes(length) + content[place + length :]


def left_out(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + content[place + chance.randrange(1, 64) :]


def put_in(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return (
        content[:place] + chance.choice([b"\0" * 9, b"}", b'"', b"\xff\xfe", b"1", b"\n"]) + content[place:]
    )


def zeroed(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes(min(512, len(content) - place)) + content[place + 512 :]


def another_kind(content: bytes, chance: random.Random) -> bytes:
    """Replaces a value somewhere in JSON, or in a line of it, by one of another type, or removes it."""
    lines = content.decode().splitlines()
    whole = content[:2] == b"{\n"
    number = 0 if whole else chance.randrange(len(lines))
    try:
        value = json.loads(content if whole else lines[number])
    except ValueError:
        return flipped(content, chance)
    at: Any = value
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return flipped(content, chance)
        key = chance.choice(keys)
        if isinstance(at[key], dict | list) and at[key] and chance.random() < 0.7:
            at = at[key]
            continue
        if chance.random() < 0.3:
            del at[key]
        else:
            at[key] = chance.choice([None, -1, "x", 1e300, [], {}, True, "", [[1]], float("nan"), "../x"])
        break
    text = json.dumps(value, indent=1 if whole else None)
    return ((text if whole else "\n".join([*lines[:number], text, *lines[number + 1 :]])) + "\n").encode()


DAMAGE: list[Callable[[bytes, random.Random], bytes]] = [
    cut, flipped, overwritten, left_out, put_in, zeroed, another_kind
]  # fmt: skip
NAME = "recurrent, text"
RESUME = [*training(NAME, "run", 20), "--resume"]
SAMPLE = ["sample", "run", "--chars", "5"]
BEGIN = ["train", "text", "text.txt", *RUNS[NAME][2:], *SHARED, "--steps", "2", "--out", "new"]
INPUTS: dict[str, list[list[str]]] = {
    "run/checkpoint.safetensors": [RESUME],
    "run/best.safetensors": [
        ["eval", "run"],
        ["sample", "run", "--chars", "5"],
        ["diagnose", "run", "--bptt", "1"],
    ],
    "run/config.json": [["eval", "run"], ["sample", "run", "--chars", "5"], ["compare", "run"], RESUME],
    "run/metrics.jsonl": [["compare", "run"], RESUME],
    "run/summary.json": [["compare", "run"]],
    "sweep/sweep.toml": [["report", "sweep"]],
    "sweep/rows.jsonl": [["report", "sweep"]],
    "text.txt": [
        BEGIN,
        [*BEGIN, "--symbols", "bytes"],
        ["eval", "run", "--file", "text.txt"],
        ["eval", "run"],
        RESUME,
    ],
    "data/train-labels-idx1-ubyte.gz": [["train", "mnist", "--data-dir", "data", "--out", "new"]],
}
"""Valid inputs, and the commands that read them."""
STRICT = ("run/checkpoint.safetensors", "run/best.safetensors")
"""Of these no changed byte may go unnoticed."""


def valid(folder: Path) -> Path:
    """A folder of valid inputs, made once."""
    made = folder / "valid"
    if not (made / "sweep" / "rows.jsonl").exists():
        shutil.rmtree(made, ignore_errors=True)
        (made / "sweep").mkdir(parents=True)
        (made / "data").mkdir()
        (made / "text.txt").write_text(TEXT)
        assert run(made, training(NAME, "run", 10)).code == 0
        (made / "sweep" / "sweep.toml").write_text(
            'train = "text --hidden 16"\nseeds = [0, 1]\ntitle = "T"\n\n[cells]\n"a T=4" = "--bptt 4 --dni"\n'
        )
        for images in ("train", "t10k"):
            for kind in ("images-idx3", "labels-idx1"):
                (made / "data" / f"{images}-{kind}-ubyte.gz").write_bytes(bytes(100))
        rows = [make_row(Cell("a T=4", seed, ("text", "--hidden", "16")), made / "run") for seed in (0, 1)]
        write_jsonl(made / "sweep" / "rows.jsonl", rows)
    return made


def held(folder: Path) -> dict[str, bytes]:
    """The contents of a folder, without locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def damaged(folder: Path, number: int) -> dict[str, Any]:
    """One damaged input and one command that reads it; `wrong` describes the failure, if any."""
    warm(folder)
    chance, made, there = random.Random(number), valid(folder), folder / "damaged"
    shutil.rmtree(there, ignore_errors=True)
    shutil.copytree(made, there)
    name = list(INPUTS)[number % len(INPUTS)]
    damage = chance.choice(DAMAGE if name.endswith(("json", "jsonl")) else DAMAGE[:-1])
    words = chance.choice(INPUTS[name])
    content = (there / name).read_bytes()
    changed = damage(content, chance)
    (there / name).write_bytes(changed)
    before = held(there)
    ended = run(there, words)
    wrong, lines = "", ended.err.splitlines()
    if ended.code not in (0, 2):
        wrong = "hangs" if ended.code is None else f"exit code {ended.code}"
    elif "Traceback" in ended.err:
        wrong = "traceback"
    elif ended.code == 2 and len([line for line in lines if line.startswith("dni-rnn: ")]) != len(lines) != 1:
        wrong = "not in one line"
    elif ended.code == 2 and held(there) != before:
        wrong = "something was written"
    elif ended.code == 0 and name in STRICT and changed != content:
        wrong = "unnoticed"
    elif ended.code == 0 and name == "run/config.json" and words[0] in ("eval", "sample"):
        wrong = "" if ended.out == run(made, words).out else "another answer"
    record = {"name": name, "number": number, "damage": damage.__name__, "command": words[0]}
    return record | {"refused": ended.code == 2, "wrong": wrong, "said": ended.err[-600:] if wrong else ""}


# Full disks

BENCH = "--hidden 4 --bptt 1 --batch-size 2 --rounds 1 --processes 1"
FILLED: dict[str, list[str]] = {
    **{f"train, {name}": training(name, "new", 40) for name in RUNS},
    "train, live": ["train", "live", *SMALL.split(), "--lag", "0", "--trace", "8", *SHARED, "--out", "new"],
    "train, decoupled": training("decoupled, queue of 1", "new", 40),
    "train, data-parallel": training("data-parallel", "new", 40),
    "sweep": ["sweep", "grid", "--work", "work"],
    "report": ["report", "sweep"],
    "compare": ["compare", "run", "--out", "new.png"],
    "eval": ["eval", "run", "--device", "cpu"],
    "sample": SAMPLE,
    "diagnose": ["diagnose", "run", "--bptt", "1", "--device", "cpu"],
    "export": ["export", "run"],
    "demo": ["demo", "--out", "new"],
    "bench": ["bench", *BENCH.split(), "--out", "new.md"],
}
"""Commands while the disk is full. Of a demo, which takes minutes, only the failing is watched."""
INSIDE = "DNI_RNN_ENDURANCE_MOUNTS"


def may_mount() -> bool:
    """Whether this process may use a private mount namespace; if so, it restarts itself in one."""
    if INSIDE in os.environ or not shutil.which("unshare"):
        return INSIDE in os.environ
    words = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    probe = subprocess.run([*words, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    if probe.returncode == 0:
        os.environ[INSIDE] = "1"
        os.execvp(words[0], [*words, sys.executable, __file__, *sys.argv[1:]])
    return False


def whole_files(folder: Path) -> str:
    """Which file in a folder is incomplete, or that there is none."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".tmp":
            return f"{path.name} was left"
        content = path.read_bytes() if path.is_file() else b""
        try:
            if path.parent.name == "export" and path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".safetensors":
                load_checkpoint(path)
            elif path.suffix == ".json":
                json.loads(content)
            elif path.suffix == ".jsonl":
                read_jsonl(path)
        except Exception as error:
            return f"{path.name}: {error}"
        ends = {".png": b"IEND\xaeB`\x82", ".svg": b"</svg>", ".html": b"</html>", ".md": b"", ".toml": b""}
        if not content.rstrip().endswith(ends.get(path.suffix, b"")):
            return f"{path.name} is a part of a file"
    return ""


def outcome(there: Path, name: str, out: str) -> Any:
    """The output of a command, without times."""
    if name.startswith("train, decoupled") or name == "train, live":
        return True
    if name.startswith("train"):
        return result_of(there / "new")
    if name == "sweep":
        return rows_of(there / "grid")
    if name == "report":
        return {path.name: path.read_bytes() for path in sorted((there / "sweep").iterdir())}
    if name == "compare":
        return (there / "new.png").read_bytes()
    return out if name in ("eval", "sample") else True


def prepared(folder: Path, there: Path) -> None:
    shutil.copytree(valid(folder), there, dirs_exist_ok=True)
    (there / "grid").mkdir()
    (there / "grid" / "sweep.toml").write_text(SWEEP)


def filled(folder: Path, number: int, mounts: bool) -> dict[str, Any]:
    """One command whose disk fills up; `wrong` describes the failure, if any."""
    warm(folder)
    chance, name = random.Random(f"disk {number}"), list(FILLED)[number % len(FILLED)]
    words, there, example = FILLED[name], folder / "disk", folder / "ample" / name
    if name != "demo" and not (folder / f"ample {name}.json").exists():
        shutil.rmtree(example, ignore_errors=True)
        example.mkdir(parents=True)
        prepared(folder, example)
        before, began = sum(map(len, held(example).values())), time.monotonic()
        ended = run(example, words)
        assert ended.code == 0, ended
        wrote = sum(map(len, held(example).values())) - before
        about = {"wrote": wrote, "seconds": time.monotonic() - began, "out": ended.out}
        (folder / f"ample {name}.json").write_text(json.dumps(about))
    about = {"wrote": 100_000, "seconds": 4.0}
    if name != "demo":
        about = json.loads((folder / f"ample {name}.json").read_text())
    shutil.rmtree(there, ignore_errors=True)
    there.mkdir()
    size = 40_000_000
    if mounts:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(there)], check=True)
    try:
        prepared(folder, there)
        room = chance.randrange(1 + int(1.3 * about["wrote"]))
        moment = (
            0.0 if chance.random() < 0.3 or name == "demo" else chance.uniform(0.0, 1.2 * about["seconds"])
        )
        if mounts and not moment:
            fill(there, room)
        command = Command(there, words, longest=None if mounts else room)
        ended = command.wait(moment) if mounts and moment else None
        if mounts and moment and ended is None:
            fill(there, room)
        ended = ended or command.wait(SECONDS if name != "demo" else 20.0) or command.kill()
        wrong, lines = "", [line for line in ended.err.splitlines() if line.startswith("dni-rnn: ")]
        if ended.code is None and name != "demo":
            wrong = "hangs"
        elif "Traceback" in ended.err:
            wrong = "traceback"
        elif ended.code not in (None, 0, 2) and not (name == "sweep" and ended.code == 1):
            wrong = f"exit code {ended.code}"
        elif ended.code == 2 and len(lines) != 1:
            wrong = "not in one line"
        elif command.left(10.0):
            wrong = "something still runs"
        else:
            wrong = whole_files(there)
        (there / "ballast").unlink(missing_ok=True)
        failed, said = ended.code != 0, ended.err
        if failed and not wrong and name != "demo":
            ended = run(there, [*words, "--resume"] if words[0] == "train" else words)
            wrong = "" if ended.code == 0 else f"does not go on: exit code {ended.code}"
            said += ended.err
        if (
            not wrong
            and name != "demo"
            and outcome(there, name, ended.out) != outcome(example, name, about["out"])
        ):
            wrong = "ends otherwise"
        record = {"name": name, "number": number, "room": room, "failed": failed, "wrong": wrong}
        return record | {"said": said[-600:] if wrong else ""}
    finally:
        if mounts:
            subprocess.run(["umount", "--lazy", str(there)], check=True)


def fill(there: Path, room: int) -> None:
    """Fill a disk, except for so much room."""
    with open(there / "ballast", "wb") as ballast, contextlib.suppress(OSError):
        while (free := shutil.disk_usage(there).free - room) > 0:
            ballast.write(bytes(min(free, 1 << 16)))
            ballast.flush()


# What was tried, and the table


class Kind(NamedTuple):
    """One table: what was tried, and how each column counts the records of a name."""

    file: str
    title: str
    columns: dict[str, Callable[[list[dict[str, Any]]], int]]


def _count(of: Callable[[dict[str, Any]], Any]) -> Callable[[list[dict[str, Any]]], int]:
    return lambda records: sum(int(of(record)) for record in records)


KINDS = [
    Kind("kills", "killed run", {
        "runs": len, "kills": _count(lambda r: r["kills"]), "left behind": _count(lambda r: r.get("left", 0)),
        "went on to the end": _count(lambda r: r["same"]),
    }),
    Kind("damaged", "damaged input", {
        "tried": len, "refused in one line": _count(lambda r: r["refused"] and not r["wrong"]),
        "did no harm": _count(lambda r: not r["refused"] and not r["wrong"]),
        "wrong": _count(lambda r: bool(r["wrong"])),
    }),
    Kind("full", "command on a disk that fills up", {
        "tried": len, "failed in one line, then went on": _count(lambda r: r["failed"] and not r["wrong"]),
        "had room": _count(lambda r: not r["failed"] and not r["wrong"]),
        "wrong": _count(lambda r: bool(r["wrong"])),
    }),
]  # fmt: skip


def counted(kind: Kind, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each name."""
    names = list(dict.fromkeys(record["name"] for record in records))
    rows = []
    for name in names:
        mine = [record for record in records if record["name"] == name]
        rows.append({"of": kind.title, "name": name} | {k: count(mine) for k, count in kind.columns.items()})
    return rows


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """A table of each kind, in Markdown."""
    texts = []
    for kind in KINDS:
        mine = [row for row in rows if row["of"] == kind.title]
        columns = list(kind.columns)
        lines = [[row["name"], *(f"{row[column]:,}" for column in columns)] for row in mine]
        total = ["all", *(f"{sum(row[column] for row in mine):,}" for column in columns)]
        if mine:
            texts.append(markdown_table([kind.title, *columns], [*lines, total]))
    return "\n".join(texts)


PAGE = """# Endurance

Runs of {steps} updates, killed with `kill -9` at random moments and resumed until they ended, against the
same run left alone. *Went on to the end*: every logged number that is no time, and every weight, is equal bit
for bit; of decoupled ones the numbers are those of validations, and of a sweep what counts are its rows, but
for times. Of runs in processes one of them was killed, or all that train, or what started them; *left behind*
are processes that were still there 20 seconds later. {errors}

Damaged inputs: cut, bytes flipped, overwritten, left out, put in or zeroed, values of another kind, each read
by a command that needs it. *Did no harm*: the command ended with exit code 0, as where a space was changed,
or a digit that nothing checks.

Disks fill up before a command or while it runs, but for a random room. *Failed in one line, then went on*:
with room again the same command ended with what it makes when there was always room.

{tables}
Made by `{command}` from [rows.jsonl](rows.jsonl), which has the counts.
"""


def errors_of(records: Sequence[dict[str, Any]]) -> str:
    """Compares killed runs with uninterrupted ones where the result depends on timing."""
    found = [record for record in records if "error" in record]
    if not found:
        return ""
    killed, alone = [record["error"] for record in found], found[0]["left_alone"]
    return (
        f"With two messages under way what runs do is up to the machine, so no two are equal: the test error "
        f"of those that were killed is {mean_sd(killed, 1)} % ({len(killed)} runs), of those left alone "
        f"{mean_sd(alone, 1)} % ({len(alone)} runs of the same seed)."
    )


def write_page(folder: Path, rows: list[dict[str, Any]], kills: Sequence[dict[str, Any]], steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "rows.jsonl", rows)
    command = "python benchmarks/endurance.py --minutes 60 --table results/endurance"
    page = PAGE.format(steps=steps, errors=errors_of(kills), tables=tables(rows), command=command)
    write_atomically(folder / "table.md", page.encode())


class Job(NamedTuple):
    """One trial."""

    kind: str
    name: str
    number: int
    act: Callable[[], dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/endurance"), help="folder for all output")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="stop after this long; the same command continues"
    )
    parser.add_argument("--runs", type=int, default=20, help="killed runs of each kind")
    parser.add_argument("--apart", type=int, default=5, help="the same, in several processes")
    parser.add_argument("--sweeps", type=int, default=10, help="killed sweeps")
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of a run that is killed")
    parser.add_argument("--damaged", type=int, default=1000, help="damaged inputs")
    parser.add_argument("--full", type=int, default=150, help="commands on a full disk")
    parser.add_argument("--table", type=Path, help="folder for table.md and rows.jsonl")
    options = parser.parse_args(arguments)
    mounts = options.full > 0 and may_mount()
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    folder = options.out.resolve()
    (folder / "text.txt").write_text(TEXT)
    jobs = [
        Job("kills", name, n, functools.partial(act, folder, name, n, options.steps))
        for kinds, act, count in ((RUNS, killed, options.runs), (APART, killed_apart, options.apart))
        for n in range(count)
        for name in kinds
    ]
    jobs += [
        Job("kills", "sweep", n, functools.partial(killed_sweep, folder, n)) for n in range(options.sweeps)
    ]
    jobs += [Job("damaged", "", n, functools.partial(damaged, folder, n)) for n in range(options.damaged)]
    jobs += [Job("full", "", n, functools.partial(filled, folder, n, mounts)) for n in range(options.full)]
    records: dict[str, list[dict[str, Any]]] = {}
    with exclusive(folder):
        for kind in KINDS:
            file = folder / f"{kind.file}.jsonl"
            records[kind.file] = read_jsonl(file) if file.exists() else []
        done = {(kind, r["number"], r["name"]) for kind, rs in records.items() for r in rs}
        done |= {(kind, number, "") for kind, number, _ in done}
        most = Counter((job.kind, job.name) for job in jobs)
        # All kinds take turns, so that even a short time covers each.
        for job in sorted(jobs, key=lambda job: job.number / most[job.kind, job.name]):
            if (job.kind, job.number, job.name) not in done and time.monotonic() < until:
                records[job.kind].append(job.act())
                write_jsonl(folder / f"{job.kind}.jsonl", records[job.kind])
    rows = [row for kind in KINDS for row in counted(kind, records[kind.file])]
    print(tables(rows), end="")
    if options.table is not None:
        write_page(options.table, rows, records["kills"], options.steps)
    bad = [r for rs in records.values() for r in rs if not r.get("same", True) or r.get("wrong")]
    for record in bad:
        print(json.dumps(record), file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
