"""Disks that fill up before a command or while it runs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from commands import RUNS, SECONDS, SHARED, SMALL, Command, result_of, run, training, warm
from damage import SAMPLE, held, valid
from kills import SWEEP, rows_of
from safetensors.torch import load_file

from dni_rnn.files import read_jsonl
from dni_rnn.training.checkpoint import load_checkpoint

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
        os.execvp(words[0], [*words, sys.executable, str(Path(__file__).parent), *sys.argv[1:]])
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
