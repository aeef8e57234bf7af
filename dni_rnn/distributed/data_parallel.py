"""Data-parallel training: batch rows shared among processes, with the same results as in one process.

Process 0 drives the ordinary training loop, so the result is an ordinary run; it announces each collective
operation to the others. Every process reads the whole stream and keeps its rows, so all agree on the position
of the stream, and a checkpoint can be resumed by any number of processes.

Gradients are summed in one all-reduce per update, not by `DistributedDataParallel`, for three reasons. That
hooks into one forward call of one module, but here a window is entered, unrolled and left through three
methods, and `accumulate` windows are differentiated one by one. It averages, but the loss and M's own are
already means over the rows of all processes. And it communicates during backward, as interfaces do: the order
of messages would have to be the same in all processes, which nothing guarantees.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dni_rnn.config import RecurrentConfig
from dni_rnn.data.streams import Stream
from dni_rnn.data.task import Data, content_of
from dni_rnn.distributed.processes import Processes, device_of, lead_or_follow, reaching
from dni_rnn.interface import Interface
from dni_rnn.penalty import StatePenalty
from dni_rnn.pytree import flatten_rows
from dni_rnn.training.loop import load_data, prepare, resume
from dni_rnn.training.recurrent import RecurrentLearner
from dni_rnn.training.run_directory import Run
from dni_rnn.window import Window

END, UPDATE, STATE, STATE_RMS = range(4)
"""Collective operations, announced by process 0."""


def train_rows(run: Run, processes: Processes) -> dict[str, Any] | None:
    """Train on this process's rows; returns the summary in process 0, None in the others.

    Raises:
      UsageError, DivergedError, Interrupted: as `dni_rnn.training.loop.train`. Other processes raise
        `ReportedElsewhere` for errors before training, and exit with the exit code after it.
      LostError: another process has died or hangs.
    """
    rank, config = processes.rank, run.config
    assert isinstance(config, RecurrentConfig)
    device = processes.together(lambda: device_of(processes, config.device))
    data = processes.together(lambda: load_data(run))
    processes.agree({"the data": content_of(data)})
    learner = processes.together(lambda: RowsLearner(config, data, device, processes))
    progress = processes.together(lambda: prepare(run, learner) if rank == 0 else None)
    processes.together(lambda: resume(run, learner) if rank else None)
    processes.agree({"the update of the checkpoint": learner.counters.step})
    return lead_or_follow(run, learner, progress)


class RowsOf:
    """Some rows of a stream; all else, including `scored` of its windows, is that of the whole stream."""

    def __init__(self, stream: Stream, rows: slice) -> None:
        self._stream, self._rows = stream, rows
        self.batch_size, self.curriculum, self.size = rows.stop - rows.start, stream.curriculum, stream.size
        self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict

    def window(self, steps: int, context: int) -> Window:
        return self._stream.window(steps, context).of_rows(self._rows)

    def to(self, device: torch.device) -> RowsOf:
        self._stream.to(device)
        return self


class RowsLearner(RecurrentLearner):
    """Trains a recurrent model on some rows of every window, together with other processes.

    All processes hold the same weights and, summed over all rows, the same statistics of the synthesizers.
    """

    def __init__(
        self, config: RecurrentConfig, data: Data, device: torch.device, processes: Processes
    ) -> None:
        super().__init__(config, data, device)
        self.processes = processes
        rows = config.batch_size // processes.size
        self.rows = slice(processes.rank * rows, (processes.rank + 1) * rows)
        self.stream = RowsOf(self.stream, self.rows)
        self.begin_rows(rows)
        for module in (*self.model.modules(), *self.estimator.modules()):
            if isinstance(module, Interface | StatePenalty):
                module.all_reduce = all_reduce

    def recorded(self, step: Callable[..., None]) -> Callable[..., None]:
        """`step` itself: an update waits for other processes, so it cannot be recorded."""
        return step

    def follow(self) -> int:
        """Obey process 0 until it ends; returns the exit code. Signals stop process 0 alone."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        together: dict[int, Callable[[], object]] = {
            UPDATE: self.update, STATE: self.state_dict, STATE_RMS: self.state_rms
        }  # fmt: skip
        while True:
            order, code = self._order()
            if order == END:
                return code
            together[order]()

    def end(self, code: int) -> None:
        """End the other processes, with an exit code."""
        self._order(END, code)

    def _order(self, order: int = END, code: int = 0) -> tuple[int, int]:
        """Broadcast an order from process 0; the other processes receive it."""
        message = torch.tensor([order, code])
        with reaching("another process"):
            dist.broadcast(message, src=0)
        return int(message[0]), int(message[1])

    def _begin(self, order: int) -> None:
        if self.processes.rank == 0:
            self._order(order)

    def update(self) -> None:
        self._begin(UPDATE)
        super().update()

    def all_reduce(self, loss: Tensor) -> Tensor:
        parameters = (*self.record.net, *self.record.synthesizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        *_, summed = all_reduce_([*gradients, loss.reshape(1)])
        return summed.reshape(())

    def state_rms(self) -> float:
        self._begin(STATE_RMS)
        rows = flatten_rows(self.state)
        squares = all_reduce(rows.square().sum()) / (rows.shape[1] * self.config.batch_size)
        return float(squares.sqrt())

    def by_row(self) -> dict[str, Tensor]:
        """With the rows of all processes."""
        return {name: self._whole(tensor) for name, tensor in super().by_row().items()}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self._begin(STATE)
        return super().state_dict()

    def _whole(self, leaf: Tensor) -> Tensor:
        """A leaf with the rows of all processes."""
        parts = [torch.empty_like(leaf) for _ in range(self.processes.size)]
        with reaching("another process"):
            dist.all_gather(parts, leaf.contiguous())
        return torch.cat(parts, dim=-2)

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        by_row = ("state.", "memory.")
        mine = {name: t[..., self.rows, :] for name, t in tensors.items() if name.startswith(by_row)}
        super().load_state_dict(tensors | mine, values)


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    (summed,) = all_reduce_([tensor.clone()])
    return summed


def all_reduce_(tensors: list[Tensor]) -> Iterable[Tensor]:
    """Sum each of several tensors over all processes, in place and in one message."""
    flat = tensors[0] if len(tensors) == 1 else torch.cat([tensor.flatten() for tensor in tensors])
    with reaching("another process"):
        dist.all_reduce(flat)
    if len(tensors) > 1:
        for tensor, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(piece.view_as(tensor))
    return tensors
