"""How a run takes `kill -9`, and every command inputs that are damaged. Prints a table in Markdown.

    python benchmarks/endurance.py --out runs/endurance --minutes 30

A killed run is killed again and again, each time at a random moment, and resumed until it ends: then every
logged number and every weight must be that of a run that was left alone. A damaged input is made from a valid
one; a command must refuse it in one line, with exit code 2 and without having written anything, or do what it
does when the damage means nothing. Of a checkpoint no changed byte may go unnoticed.

What was tried is kept in `--out`, by number, and not tried again: the same command goes on.
Needs `fork`, so not Windows.
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
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dni_rnn.atomic_files import exclusive, read_jsonl, write_jsonl
from dni_rnn.cli import main as dni_rnn
from dni_rnn.experiments.sweep import Cell, make_row
from dni_rnn.training.checkpoint import load_checkpoint

TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.\n" * 400
SHARED = ["--threads", "1", "--device", "cpu", "--save-every", "0", "--log-every", "5"]
SMALL = "--hidden 16 --embedding 8 --batch-size 8 --bptt 4"
RUNS = {
    "recurrent, text": f"text text.txt {SMALL} --dni".split(),
    "recurrent, copy with a trace": f"copy {SMALL} --trace 8".split(),
    "feed-forward, addition": ["addition", "--width", "16", "--batch-size", "32", "--method", "dni"],
}  # fmt: skip
STEPS, EVAL_EVERY = 300, 2_000
SECONDS = 120.0
"""After which a command hangs."""


class Ended(NamedTuple):
    """How a command ended; `code` is None for one that was killed."""

    code: int | None
    out: str
    err: str


def run(folder: Path, words: Sequence[str], seconds: float = SECONDS) -> Ended:
    """`dni-rnn WORDS` in `folder`, in a process of its own that is killed after so many seconds."""
    files = [folder / ".out", folder / ".err"]
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for descriptor, file in zip((1, 2), files, strict=True):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
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
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() >= until:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    out, err = (file.read_text(errors="replace") if file.exists() else "" for file in files)
    for file in files:
        file.unlink(missing_ok=True)
    return Ended(os.WEXITSTATUS(status) if os.WIFEXITED(status) else None, out, err)


@functools.cache
def warm(folder: Path) -> None:
    """Import all that commands import, before the first fork: a process is then killed at its work."""
    shutil.rmtree(folder / "warm", ignore_errors=True)
    for number, name in enumerate(RUNS):
        words = training(name, str(folder / "warm" / str(number)), 1)
        words = [str(folder / "text.txt") if word == "text.txt" else word for word in words]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            dni_rnn(words)
            dni_rnn(["compare", str(folder / "warm" / str(number)), "--out", str(folder / "warm" / "c.png")])


def training(name: str, out: str, steps: int) -> list[str]:
    task, *words = RUNS[name]
    budget = ["--steps", str(steps), "--eval-every", str(EVAL_EVERY)]
    return ["train", task, *words, *SHARED, *budget, "--out", out]


def result_of(path: Path) -> Any:
    """Every logged number of a run that is not a time, and its weights, as one digest."""
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in read_jsonl(path / "metrics.jsonl")]
    digest = hashlib.sha256(json.dumps(rows).encode())
    for name in ("checkpoint", "best"):
        tensors, _ = load_checkpoint(path / f"{name}.safetensors")
        for key in sorted(tensors):
            digest.update(key.encode() + tensors[key].flatten().view(torch.uint8).numpy().tobytes())
    return len(rows), digest.hexdigest()


def killed(folder: Path, name: str, number: int, steps: int) -> dict[str, Any]:
    """One run of a kind, killed at random moments until it ends; `same` is whether that left no mark."""
    warm(folder)
    whole = folder / f"whole {name}"
    began = time.monotonic()
    if not (whole / "summary.json").exists():
        shutil.rmtree(whole, ignore_errors=True)
        assert run(folder, training(name, whole.name, steps)).code == 0
        (whole / "seconds").write_text(str(time.monotonic() - began))
    seconds, chance = float((whole / "seconds").read_text()), random.Random(f"{name} {number}")
    shutil.rmtree(folder / "killed", ignore_errors=True)
    kills, moment = 0, 0
    while True:
        # Longer and longer, so that every run ends.
        limit = chance.uniform(0.0, seconds * (0.4 + 0.2 * moment))
        ended = run(folder, [*training(name, "killed", steps), "--resume"], limit)
        moment += 1
        if ended.code is not None:
            break
        kills += 1
    same = ended.code == 0 and result_of(folder / "killed") == result_of(whole)
    return {"name": name, "number": number, "kills": kills, "same": same, "said": ended.err[-300:]}


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
    """A value somewhere in JSON, or in a line of it, is of another kind, or gone."""
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
        (made / "text.txt").write_text(TEXT[:6000])
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
    """What lies in a folder; locks are no content."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def damaged(folder: Path, number: int) -> dict[str, Any]:
    """One damaged input and one command that reads it; `wrong` says what should not be, if anything."""
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


# What was tried, and the table


def table(kills: Sequence[dict[str, Any]], inputs: Sequence[dict[str, Any]]) -> str:
    lines = ["| killed run | runs | kills | the same bit for bit |", "|---|--:|--:|--:|"]
    for name in RUNS:
        mine = [record for record in kills if record["name"] == name]
        if mine:
            total = sum(r["kills"] for r in mine)
            lines.append(f"| {name} | {len(mine)} | {total} | {sum(r['same'] for r in mine)} |")
    lines += [
        "",
        "| damaged input | tried | refused in one line | did no harm | wrong |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in INPUTS:
        mine = [record for record in inputs if record["name"] == name]
        wrong = sum(bool(record["wrong"]) for record in mine)
        refused = sum(record["refused"] and not record["wrong"] for record in mine)
        if mine:
            lines.append(f"| `{name}` | {len(mine)} | {refused} | {len(mine) - refused - wrong} | {wrong} |")
    why = Counter(record["wrong"] for record in inputs if record["wrong"])
    lines += ["", f"{len(inputs)} damaged inputs, {sum(why.values())} wrong" + f": {dict(why)}" * bool(why)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 when anything was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/endurance"), help="folder for all that is made"
    )
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="stop after this long; the same command goes on"
    )
    parser.add_argument("--runs", type=int, default=20, help="killed runs of each kind")
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of a run that is killed")
    parser.add_argument("--damaged", type=int, default=1000, help="damaged inputs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    folder = options.out.resolve()
    (folder / "text.txt").write_text(TEXT)
    files = [folder / "kills.jsonl", folder / "damaged.jsonl"]
    with exclusive(folder):
        kills, inputs = (read_jsonl(file) if file.exists() else [] for file in files)
        done = {(record["name"], record["number"]) for record in kills}
        for number in range(max(options.runs, -(-options.damaged // 10))):  # both sides in turns
            for name in RUNS if number < options.runs else ():
                if (name, number) not in done and time.monotonic() < until:
                    kills.append(killed(folder, name, number, options.steps))
                    write_jsonl(files[0], kills)
            for each in range(10 * number, min(10 * number + 10, options.damaged)):
                if each >= len(inputs) and time.monotonic() < until:
                    inputs.append(damaged(folder, each))
            write_jsonl(files[1], inputs)
    print(table(kills, inputs))
    for record in (*kills, *inputs):
        if not record.get("same", True) or record.get("wrong"):
            print(json.dumps(record), file=sys.stderr)
    return int(any(record["wrong"] for record in inputs) or not all(record["same"] for record in kills))


if __name__ == "__main__":
    sys.exit(main())
