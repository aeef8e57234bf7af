"""A feed-forward net in training, each part in a process of its own.

Process 0 has the data and the first part; it drives the training loop that every run has. The others do
what comes: a message is learnt from and handed on at once, with a synthetic gradient; its gradient comes
back when it comes, and trains the synthesizer that served it. Orders (validate, save, end) come down the
same way as messages, so that each part carries them out after the same message.
"""

from __future__ import annotations

import operator
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dni_rnn import checkpoint
from dni_rnn.config import FeedforwardConfig
from dni_rnn.decoupled.watch import BEAT_SECONDS, Watch
from dni_rnn.decoupled.wire import (
    END,
    GATHER,
    GRADIENT,
    MESSAGE,
    NOTES,
    SAVE,
    Incoming,
    Layout,
    Outgoing,
    Packet,
)  # fmt: skip
from dni_rnn.distributed import Processes, device_of
from dni_rnn.errors import DivergedError, UsageError
from dni_rnn.examples import Examples
from dni_rnn.feedforward import messages_of, split
from dni_rnn.layered import LayeredLearner, context_of, loss_of, wrong
from dni_rnn.runs import MetricsLog, Run
from dni_rnn.training import Interrupted, fit, load_data, prepare, stop_requests

FORGET = 4
"""Where messages may get lost: how many are kept for their gradients, in units of `queue`."""


def train_part(run: Run, processes: Processes) -> dict[str, Any] | None:
    """Train the part of this process; returns the summary in process 0, None in the others.

    Raises:
      UsageError, DivergedError, Interrupted: as `dni_rnn.training.train`; in the other processes
        `ReportedElsewhere` for what may happen before the training, and afterwards the exit code.
      LostError: another process has died or hangs.
    """
    config: Any = run.config
    rank = processes.rank
    device = processes.together(lambda: device_of(processes, config.device))
    data = processes.together(lambda: load_data(run))
    own = run if rank == 0 else Run(run.path / f"part{rank}", run.task_name, run.task, config)
    learner = PartLearner(own, config, data, device, processes)
    progress = processes.together(lambda: prepare(run, learner) if rank == 0 else None)
    start = processes.gather(learner.step)[0]
    processes.together(lambda: learner.prepare_part(start) if rank else None)
    learner.connect()
    if rank:
        code = learner.follow()
        return sys.exit(code) if code else None
    assert progress is not None
    try:
        summary = fit(run, learner, progress)
    except (UsageError, DivergedError, Interrupted) as error:
        code = {UsageError: 2, DivergedError: 3}.get(type(error), 128)
        learner.end(code + error.signal if isinstance(error, Interrupted) else code)
        raise
    learner.end(0)
    return summary


class Kept(NamedTuple):
    """A message whose gradient has not come back yet."""

    message: Tensor
    context: Tensor
    updates: int  # of the part, when it was sent


class PartLearner(LayeredLearner):
    """One part of a cut net in training, in a process of its own.

    Attributes:
      part: the layers of this process; the last part has the loss.
      interface: at its end, with the synthesizer of the gradients that come from the next part; None in
        the last part, and with bprop, where a part waits for the gradient itself.
      kept: messages whose gradients have not come back, by number.
      stale: updates that this part made between sending a message and learning from its gradient, one
        number per gradient since the last metrics row.
      lost: messages without a gradient, since the start.
      waited: seconds spent waiting for another part, since the start.
      seen: by the last part: updates, sum of the losses, wrong rows. Travels back with the gradients.
    """

    seen: tuple[float, ...] = (0.0,) * NOTES

    def __init__(
        self, run: Run, config: FeedforwardConfig, data: Examples, device: torch.device, processes: Processes
    ) -> None:
        super().__init__(config, data, device)
        self.run, self.processes, self.rank = run, processes, processes.rank
        self.watch = Watch(processes, config.timeout)
        parts = self.model.parts
        if config.method == "bprop":
            parts = split(self.model.parts[0], config.cut_positions)  # type: ignore[arg-type]
        self.parts: Any = parts
        interfaces: Any = self.model.interfaces
        self.interfaces: list[Any] = [*interfaces, *[None] * (len(parts) - len(interfaces))]
        self.part, self.interface = parts[self.rank], self.interfaces[self.rank]
        self.modules = self._modules(self.rank)
        groups = [{"params": list(self.part.parameters()), "base": config.lr}]
        if self.interface is not None:
            groups.append({"params": list(self.interface.parameters()), "base": config.synthesizer_lr})
        self.optimizer = torch.optim.Adam(groups, fused=True)
        self.last = self.rank == processes.size - 1
        self.kept: dict[int, Kept] = {}
        self.lost, self.waited, self.own_updates = 0, 0.0, 0
        self.gathered, self.saved = 0, 0

    def _modules(self, rank: int) -> dict[str, torch.nn.Module]:
        interface = self.interfaces[rank]
        return {"part": self.parts[rank]} | ({} if interface is None else {"interface": interface})

    def connect(self) -> None:
        """Open the links to the neighbours."""
        config, rank = self.config, self.rank
        x, targets = self.batches.batch(0)
        messages = list(messages_of(self.parts, x))
        forth, back = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
        assert isinstance(forth, dist.ProcessGroup)
        assert isinstance(back, dist.ProcessGroup)
        capacity, delay = config.queue, config.delay / 1000.0
        self.outgoing = self.answers = self.incoming = self.answering = None
        if not self.last:
            message = messages[rank]
            self.outgoing = Outgoing(rank + 1, Layout([message, targets]), capacity, forth)
            self.answers = Incoming(rank + 1, Layout([message]), capacity, back, delay)
        if rank:
            message = messages[rank - 1]
            self.incoming = Incoming(rank - 1, Layout([message, targets]), capacity, forth, delay)
            self.answering = Outgoing(rank - 1, Layout([message]), capacity, back)

    # What every part does with a message.

    def learn(self, x: Tensor, targets: Tensor) -> None:
        """Learn from the message `self.step`, hand it on, and answer it with its gradient."""
        config, number = self.config, self.step
        self._collect()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate() * group["base"]
        x = x.detach().requires_grad_(self.rank > 0)
        out = self.part(x)
        if self.outgoing is not None:
            self.outgoing.put(Packet(MESSAGE, number, [out.detach(), targets]))
        gradient = None
        if self.last:
            loss = loss_of(out, targets, config.smoothing)
            seen = (1.0, float(loss.detach()), float(wrong(out, targets)))
            self.seen = tuple(map(operator.add, self.seen, seen))
        elif self.interface is not None:
            context = context_of(targets)
            self.kept[number] = Kept(out.detach(), context, self.own_updates)
            loss = self.interface.send(out, context)
        else:
            loss, gradient = out, self._gradient(number)
        self.optimizer.zero_grad()
        loss.backward(gradient)
        if self.answering is not None:
            assert x.grad is not None
            self.answering.put(Packet(GRADIENT, number, [x.grad], self.seen))
        self.optimizer.step()
        self.own_updates += 1
        self.watch.beat()

    def _gradient(self, number: int) -> Tensor:
        """Wait for the gradient of a message: no part does anything else meanwhile."""
        assert self.answers is not None
        packet = self._wait(self.answers)
        assert packet.kind == GRADIENT
        assert packet.number == number
        self.seen = packet.notes
        return packet.tensors[0].to(self.device)

    def _collect(self) -> None:
        """Learn from the gradients that have come; wait for some when too many messages are under way."""
        if self.interface is None:
            return
        assert self.answers is not None
        while (packet := self.answers.take(0.0)) is not None:
            self._teach(packet)
        queue = self.config.queue
        if self.config.when_full == "wait":
            while len(self.kept) >= queue:
                self._teach(self._wait(self.answers))
        while len(self.kept) >= FORGET * queue:
            self._forget(min(self.kept))

    def _teach(self, packet: Packet) -> None:
        """Train the synthesizer that served a message on the gradient that comes back for it."""
        self.seen = packet.notes
        # Links keep the order: whatever was sent before will not be answered any more.
        for number in [n for n in self.kept if n < packet.number]:
            self._forget(number)
        kept = self.kept.pop(packet.number, None)
        if kept is None:
            return
        gradient = packet.tensors[0].to(self.device)
        self.optimizer.zero_grad()
        self.interface.receive(kept.message, kept.context).backward(gradient)
        self.optimizer.step()
        self.stale.append(self.own_updates - kept.updates)

    def _forget(self, number: int) -> None:
        del self.kept[number]
        self.lost += 1

    def _wait(self, link: Incoming) -> Packet:
        """The next packet, however long it takes, as long as all processes give signs of life."""
        began = time.monotonic()
        while (packet := link.take(BEAT_SECONDS)) is None:
            self.watch.beat()
            if time.monotonic() - began > self.config.timeout:
                self.watch.check()
        self.waited += time.monotonic() - began
        return packet

    def _drain(self, kind: int) -> None:
        """Wait until the parts behind have carried out an order; by then all gradients have come."""
        assert self.answers is not None
        while (packet := self._wait(self.answers)).kind != kind:
            self._teach(packet)
        for number in list(self.kept):
            self._forget(number)

    # The first part, driven by the training loop.

    def reset_metrics(self) -> None:
        super().reset_metrics()
        self.stale: list[int] = []
        self.seen_before = self.seen

    def update(self) -> None:
        x, targets = self.batches.batch(self.step)
        self.learn(x, targets)
        self.step += 1
        self.updates += 1
        self.symbols += len(x)

    def metrics(self) -> dict[str, float]:
        """Error and loss are those of the last part, as far as process 0 has heard of them."""
        while self.seen[0] == self.seen_before[0] and self.kept:
            assert self.answers is not None
            self._teach(self._wait(self.answers))
        updates, loss, wrongs = (now - then for now, then in zip(self.seen, self.seen_before, strict=True))
        updates = max(updates, 1.0)
        row = {"error": 100.0 * wrongs / (updates * self.batches.batch_size), "loss": loss / updates}
        return row | self.part_metrics()

    def part_metrics(self) -> dict[str, float]:
        """Of this part alone."""
        row = {"waited": round(self.waited, 3)}
        if self.interface is not None:
            row["synthesizer_loss"] = float(self.interface.regression_loss)
            row["lost"] = self.lost
        if self.stale:
            row |= {"staleness": sum(self.stale) / len(self.stale), "staleness_max": max(self.stale)}
        return row

    def evaluate(self, split: Any, level: int | None) -> dict[str, float]:
        if self.gathered != self.step:
            self._order(GATHER, self.step)
            self._gather()
        return super().evaluate(split, level)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Of this part. In process 0, after all other parts have written theirs: its checkpoint makes them
        count.
        """
        if self.rank == 0:
            self._order(SAVE, self.step)
            self.processes.together(lambda: None)
        return super().state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        super().load_state_dict(tensors, values)
        self.gathered = self.saved = self.step

    def end(self, code: int) -> None:
        """Let the other processes end with an exit code."""
        self._order(END, code)
        self._join()

    def _order(self, kind: int, number: int) -> None:
        assert self.outgoing is not None
        self.outgoing.put(Packet(kind, number))
        self._drain(kind)

    def _join(self) -> None:
        for link in (self.outgoing, self.answers, self.incoming, self.answering):
            if link is not None:
                link.join()

    def _gather(self) -> None:
        """Bring the weights of all parts to process 0."""
        for rank in range(1, self.processes.size):
            if self.rank not in (0, rank):
                continue
            tensors = [t for module in self._modules(rank).values() for t in module.state_dict().values()]
            layout = Layout(tensors)
            if self.rank:
                dist.send(layout.pack(Packet(MESSAGE, 0, tensors)), 0)
                continue
            buffer = torch.empty(layout.bytes, dtype=torch.uint8)
            dist.recv(buffer, rank)
            for tensor, came in zip(tensors, layout.unpack(buffer).tensors, strict=True):
                tensor.copy_(came)
        self.gathered = self.step

    # The other parts.

    def follow(self) -> int:
        """Learn from what comes until the end; returns the exit code."""
        assert self.incoming is not None
        assert self.answering is not None
        self.run.keep_rows(self.step)
        log, began = MetricsLog(self.run), time.perf_counter()
        try:
            with stop_requests() as stop:
                while True:
                    packet = self._wait(self.incoming)
                    if stop:
                        self.watch.ask_to_stop(stop.pop())
                    if packet.kind == MESSAGE:
                        self.step = packet.number
                        x, targets = (tensor.to(self.device) for tensor in packet.tensors)
                        self.learn(x, targets)
                        self.updates += 1
                        if (self.step + 1) % self.config.log_every == 0:
                            self._log(log, time.perf_counter() - began)
                        continue
                    self._obey(packet)
                    if packet.kind == END:
                        return packet.number
        finally:
            log.close()

    def _obey(self, order: Packet) -> None:
        assert self.answering is not None
        if self.outgoing is not None:
            self.outgoing.put(order)
            self._drain(order.kind)
        self.answering.put(Packet(order.kind, order.number, notes=self.seen))
        if order.kind == GATHER:
            self._gather()
        elif order.kind == SAVE:
            self.step = order.number
            self.processes.together(self._save)
        elif order.kind == END:
            self._join()

    def _log(self, log: MetricsLog, seconds: float) -> None:
        row = {"step": self.step + 1, "messages": self.updates, **self.part_metrics()}
        if self.last:
            updates, loss, _ = (now - then for now, then in zip(self.seen, self.seen_before, strict=True))
            row["loss"] = loss / updates
        log.write(row | {"seconds": round(seconds, 3)})
        self.reset_metrics()

    def _path(self, step: int) -> Path:
        return self.run.path / f"{step}.safetensors"

    def _save(self) -> None:
        """Write this part's checkpoint beside the last one, which counts until process 0 has written its."""
        try:
            tensors, values = super().state_dict()
            checkpoint.save_checkpoint(self._path(self.step), tensors, values)
            for old in self.run.path.glob("*.safetensors"):
                if old not in (self._path(self.step), self._path(self.saved)):
                    old.unlink()
        except OSError as error:
            raise UsageError(
                f"{self.run.path}: writing failed at update {self.step} ({error.strerror}); "
                "the last checkpoint is whole: make room and add --resume"
            ) from None
        self.saved = self.step

    def prepare_part(self, step: int) -> None:
        """Make this part's directory; after the start, go back to the checkpoint that it wrote at `step`."""
        self.run.path.mkdir(exist_ok=True)
        if step == 0:
            return
        tensors, values = checkpoint.load_checkpoint(self._path(step))
        self.load_state_dict(tensors, values)
