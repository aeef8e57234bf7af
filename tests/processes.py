"""Real processes for tests: forked, so that torch is imported once, and ended whatever happens."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

SECONDS = 120.0


class Outcome(NamedTuple):
    """What a process came to."""

    result: Any
    error: BaseException | None
    stderr: str


def in_processes(size: int, action: Callable[..., Any], *arguments: Any) -> list[Outcome]:
    """Run `action(rank, *arguments)` in `size` processes with the environment that torchrun gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ends = [fork.Pipe(duplex=False) for _ in range(size)]
    started = [
        fork.Process(target=_run, args=(rank, size, port, ends[rank][1], action, arguments), daemon=True)
        for rank in range(size)
    ]
    try:
        for process in started:
            process.start()
        outcomes = []
        for process, (end, _) in zip(started, ends, strict=True):
            assert end.poll(SECONDS), "a process said nothing"
            outcomes.append(end.recv())
            process.join(SECONDS)
        return outcomes
    finally:
        for process in started:
            process.kill()
            process.join()


def _run(rank: int, size: int, port: int, end: Any, action: Any, arguments: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    result, error, said = None, None, io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            result = action(rank, *arguments)
        except BaseException as failed:
            error = failed
    end.send(Outcome(result, error, said.getvalue()))
