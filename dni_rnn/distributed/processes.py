"""Processes that train together, started by torchrun or by `--processes`.

Torch is imported only in functions that compute or start processes: the command line reads this module.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from dni_rnn import parent_process
from dni_rnn.errors import DivergedError, LostError, ReportedElsewhere, UsageError

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

    from dni_rnn.training.loop import Progress
    from dni_rnn.training.run_directory import Run

T = TypeVar("T")

RESTARTS = 3
"""How often `launch` restarts the processes after one of them died."""

ATTEMPT = "DNI_RNN_ATTEMPT"
"""Environment variable with the number of restarts by `launch` so far."""

JOIN_SECONDS = 300.0
"""How long a process waits for the others to start."""


def launched() -> bool:
    """Whether this process was started as one of several, by torchrun or `launch`."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def attempt() -> int:
    """How often the processes were restarted after one of them died."""
    return int(os.environ.get(ATTEMPT, 0)) + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def launch(arguments: list[str], processes: int) -> int:
    """Run `dni-rnn ARGUMENTS` in several processes of this machine, and return their exit code.

    Like `torchrun --standalone --nproc-per-node PROCESSES -m dni_rnn ARGUMENTS`, on the loopback device only.
    When a process dies, all are restarted from their checkpoints, up to `RESTARTS` times; not after a usage
    error (2), a diverged run (3) or a signal.
    """
    logging.disable()  # that of the launcher; failures are reported below
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes)]
    for start in range(RESTARTS + 1):
        os.environ |= {**parent_process.environment(), ATTEMPT: str(start)}
        try:
            run(parse_args([*options, "-m", "dni_rnn", *arguments]))
            return 0
        except SignalException as stop:
            return 128 + int(stop.sigval)
        except ChildFailedError as error:
            rank, failure = min(error.failures.items(), key=lambda each: _precedence(each[1].exitcode))
            if failure.exitcode in (2, 3, 128 + signal.SIGINT, 128 + signal.SIGTERM):
                return failure.exitcode
            how = f"exit code {failure.exitcode}"
            if failure.exitcode < 0:
                how = f"killed by {signal.Signals(-failure.exitcode).name}"
            what = f"starting all anew ({start + 1} of {RESTARTS})" if start < RESTARTS else "giving up"
            print(f"dni-rnn: process {rank} died ({how}); {what}", file=sys.stderr, flush=True)
    return 1


def _precedence(exit_code: int) -> int:
    """Sort key for the exit codes of several processes: the smallest is that of the root cause.

    A killed process comes first, then one that failed by itself. The launcher ends the others with SIGTERM,
    and a process that lost its connection to another ends with 1.
    """
    if exit_code == -signal.SIGTERM:
        return 2
    return 3 if exit_code == 1 else int(exit_code > 0)


@contextmanager
def reaching(whom: str) -> Iterator[None]:
    """Turn torch's errors inside, which mean that `whom` is gone, into `LostError`."""
    try:
        yield
    except RuntimeError:
        raise LostError(f"the connection to {whom} is lost; add --resume to go on") from None


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from one of them.

    Attributes:
      rank: number of this process.
      size: number of processes.
      local_rank: number of this process among those on this machine.
      store: small values that all can read.
    """

    rank: int
    size: int
    local_rank: int
    store: Store

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank, in each of them. Values must be picklable."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with reaching("another process"):
            dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Run an action in all processes that may fail in any of them.

        Raises:
          UsageError: it failed somewhere; in process 0, with the message of the first process that failed.
          ReportedElsewhere: the same, in the other processes.
        """
        result, error = None, None
        try:
            result = action()
        except UsageError as failed:
            error = str(failed)
        errors = {rank: text for rank, text in enumerate(self.gather(error)) if text is not None}
        if errors:
            first, text = next(iter(errors.items()))
            if self.rank:
                raise ReportedElsewhere(text)
            raise UsageError(text if first == 0 else f"process {first}: {text}")
        return result  # type: ignore[return-value]

    def agree(self, values: Mapping[str, Any]) -> None:
        """Raises `UsageError` as `together` does when processes differ in one of `values`."""

        def compare() -> None:
            for rank, others in enumerate(gathered):
                for name in values.keys() | others.keys():
                    mine, theirs = values.get(name), others.get(name)
                    if mine != theirs:
                        raise UsageError(
                            f"processes {self.rank} and {rank} differ in {name}: {mine} and {theirs}; "
                            "start all with the same command and the same versions"
                        )

        gathered = self.gather(dict(values))
        self.together(compare)


@contextmanager
def joined(timeout: float, device: str = "cpu") -> Iterator[Processes]:
    """The process group of all processes started with this one.

    CPU tensors are sent through gloo, CUDA tensors through NCCL.

    Args:
      timeout: seconds after which a collective operation fails if a process does not take part.
      device: `auto`, `cuda` or `cpu`.

    Raises:
      UsageError: the processes could not connect.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", rank))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size) and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))
        # torchrun keeps the store over restarts, with entries of dead processes in it.
        store = PrefixStore(f"attempt{attempt()}", store)
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    except (dist.DistError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"process {rank} of {size} could not join the others ({reason})") from None
    try:
        yield Processes(rank, size, local, PrefixStore("values", store))
    finally:
        dist.destroy_process_group()


def device_of(processes: Processes, name: str) -> torch.device:
    """The device of this process; `name` is `auto`, `cuda` or `cpu`. CUDA devices are assigned in turn."""
    import torch

    from dni_rnn.training.learner import choose_device

    device = choose_device(name)
    if device.type == "cuda":
        return torch.device("cuda", processes.local_rank % torch.cuda.device_count())
    return device


def lead_or_follow(run: Run, learner: Any, progress: Progress | None) -> dict[str, Any] | None:
    """Process 0, which has `progress`, drives the training loop; the others obey it until it ends.

    Returns the summary in process 0. The others exit with the exit code of process 0.

    Args:
      learner: has `follow`, which returns that code, and `end`, which sends it.
    """
    from dni_rnn.training.loop import Interrupted, fit

    if progress is None:
        code = learner.follow()
        return sys.exit(code) if code else None
    try:
        summary = fit(run, learner, progress)
    except (UsageError, DivergedError, Interrupted) as error:
        code = {UsageError: 2, DivergedError: 3}.get(type(error), 128)
        learner.end(code + error.signal if isinstance(error, Interrupted) else code)
        raise
    learner.end(0)
    return summary
