"""`dni-rnn` in processes of its own, to be killed or watched, and the small runs that are tried."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dni_rnn.cli import main as dni_rnn
from dni_rnn.files import read_jsonl
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
