"""Inputs that are damaged, each read by a command that needs it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commands import RUNS, SHARED, TEXT, run, training, warm

from dni_rnn.experiments.sweep import Cell, make_row
from dni_rnn.files import write_jsonl


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
