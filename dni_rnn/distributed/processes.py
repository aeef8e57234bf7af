"""Processes that train together: started by torchrun, or by `--processes`, which does the same.

Torch is imported only by what computes or starts processes: the command line reads this module.
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
"""How often `launch` starts processes anew after one of them died."""

ATTEMPT = "DNI_RNN_ATTEMPT"
"""Environment variable in which `launch` tells its processes which start this is, from 0."""

JOIN_SECONDS = 300.0
"""How long a process waits for the others to start."""


def launched() -> bool:
    """Whether this process was started as one of several, by torchrun or `launch`."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def attempt() -> int:
    """How often the processes have been started anew after one of them died."""
    return int(os.environ.get(ATTEMPT, 0)) + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def launch(arguments: list[str], processes: int) -> int:
    """Run `dni-rnn ARGUMENTS` in several processes of this machine, and return their exit code.

    What `torchrun --standalone --nproc-per-node PROCESSES -m dni_rnn ARGUMENTS` does, on the loopback only.
    When a process dies, all are started anew, up to `RESTARTS` times, and go on from their checkpoints; not
    when it ended for a reason of its own: what the user can mend (2), a diverged run (3), a signal.
    """
    logging.disable()  # of the launcher; what failed is said below
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
    """Of the exit codes of several processes, the smallest belongs to the one that was the cause.

    One that was killed comes first, then one that failed by itself. SIGTERM is what the launcher ends the
    others with, and 1 is what one ends with that lost the connection to another.
    """
    if exit_code == -signal.SIGTERM:
        return 2
    return 3 if exit_code == 1 else int(exit_code > 0)


@contextmanager
def reaching(whom: str) -> Iterator[None]:
    """Torch's errors inside mean that somebody is gone: `LostError`."""
    try:
        yield
    except RuntimeError:
        raise LostError(f"the connection to {whom} is lost; add --resume to go on") from None


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from one of them.

    Attributes:
      rank: number of this one.
      size: how many there are.
      local_rank: number of this one among those on this machine.
      store: small values that all can read.
    """

    rank: int
    size: int
    local_rank: int
    store: Store

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, in all of them, by rank. Any value that can be pickled."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with reaching("another process"):
            dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Do something in all processes that may fail in any of them.

        Raises:
          UsageError: it failed somewhere; in process 0 what the first process said that failed.
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
    """The processes that were started with this one, while they train together.

    Tensors on the CPU travel through gloo, those on CUDA devices through NCCL.

    Args:
      timeout: seconds after which an operation among all of them fails in which one does not take part.
      device: `auto`, `cuda` or `cpu`.

    Raises:
      UsageError: the others did not come.
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
        # torchrun keeps the store when it starts processes anew, and what the dead ones left is in it.
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
    """The device of this process; `name` is `auto`, `cuda` or `cpu`. CUDA devices are dealt out in turn."""
    import torch

    from dni_rnn.training.learner import choose_device

    device = choose_device(name)
    if device.type == "cuda":
        return torch.device("cuda", processes.local_rank % torch.cuda.device_count())
    return device


def lead_or_follow(run: Run, learner: Any, progress: Progress | None) -> dict[str, Any] | None:
    """Process 0, which has `progress`, drives the training loop, and the others do what it says to its end.

    Returns the summary in process 0. The others leave with the exit code that process 0 ends with.

    Args:
      learner: with `follow`, which returns that code, and `end`, which sends it.
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
