"""Base of learners whose parts run in their own processes: waiting, orders, checkpoints, the end.

Process 0 drives the ordinary training loop. The others process what arrives. Orders (gather weights, save,
end) travel on the same links as messages, so that each part carries them out after the same message.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dni_rnn.data.task import Split
from dni_rnn.distributed.heartbeat import BEAT_SECONDS, Heartbeat
from dni_rnn.distributed.processes import Processes
from dni_rnn.distributed.transport import (
    END,
    GATHER,
    GRADIENT,
    MESSAGE,
    NOTES,
    SAVE,
    Incoming,
    Outgoing,
    Packet,
    PacketLayout,
)  # fmt: skip
from dni_rnn.training import checkpoint
from dni_rnn.training.learner import Learner, begin
from dni_rnn.training.loop import stop_requests, writing_failed
from dni_rnn.training.run_directory import MetricsLog, Run


class ProcessPart(Learner):
    """Trains one part in its own process.

    A subclass builds its model and record, says which modules a process has, opens the links, and handles
    messages and gradients.

    Attributes:
      source: the link on which messages and orders arrive; None in process 0.
      onward: links on which messages and orders are sent on.
      awaited: links on which gradients arrive; an order is complete when it has arrived there too.
      back: links on which an order is acknowledged.
      weights: links on which weights go to process 0, by the rank at the other end.
      arrivals: notified of packets on `source` and `awaited`, so that a part can wait for both.
      waited: seconds spent waiting for other processes, since the start.
      seen: counts of the last part: updates, sum of the losses, wrong rows. Sent back with the gradients.
    """

    source: Incoming | None = None
    seen: tuple[float, ...] = (0.0,) * NOTES

    def __init__(self, run: Run, config: Any, data: Any, device: torch.device, processes: Processes) -> None:
        super().__init__(config, data, device)
        begin(config)
        self.run, self.processes, self.rank = run, processes, processes.rank
        self.heartbeat = Heartbeat(processes, config.timeout)
        self.onward: list[Outgoing] = []
        self.awaited: list[Incoming] = []
        self.back: list[Outgoing] = []
        self.weights: dict[int, Any] = {}
        self.arrivals = threading.Condition()
        self.waited, self.own_updates = 0.0, 0
        self.gathered, self.saved = 0, 0

    def modules_of(self, rank: int) -> dict[str, nn.Module]:
        """The modules of the model that a process has."""
        raise NotImplementedError

    def connect(self) -> None:
        """Open the links."""
        raise NotImplementedError

    def take_message(self, packet: Packet) -> None:
        """Handle a message."""
        raise NotImplementedError

    def take_gradient(self, packet: Packet) -> None:
        """Handle the gradient of a message."""
        raise NotImplementedError

    def drained(self) -> None:
        """Called when no gradient is in flight any more."""

    def part_metrics(self) -> dict[str, float]:
        """Metrics of this part alone."""
        return {"waited": round(self.waited, 3)}

    # Waiting

    def wait(self, link: Incoming, *serving: Incoming) -> Packet:
        """The next packet, however long it takes, as long as all processes give heartbeats.

        Args:
          serving: links whose gradients are handled meanwhile; they share `arrivals` with `link`.
        """
        began = time.monotonic()
        while (packet := link.take(BEAT_SECONDS, *serving)) is None:
            self.heartbeat.beat()
            if time.monotonic() - began > self.heartbeat.timeout:
                self.heartbeat.check()
            for other in serving:
                if (gradient := other.poll()) is not None:
                    self.waited += time.monotonic() - began
                    self.take_gradient(gradient)
                    began = time.monotonic()
        self.waited += time.monotonic() - began
        return packet

    # Orders

    def order(self, kind: int, number: int) -> None:
        """Send an order on, and wait until it is complete; by then all gradients have arrived."""
        for link in self.onward:
            link.put(Packet(kind, number))
        for link in self.awaited:
            while (packet := self.wait(link)).kind == GRADIENT:
                self.take_gradient(packet)
            assert packet.kind == kind
        self.drained()

    def _obey(self, order: Packet) -> None:
        """Send an order on, carry it out when nothing is in flight any more, and acknowledge it."""
        if not self.awaited:
            self._save_if(order)
        self.order(order.kind, order.number)
        if self.awaited:
            self._save_if(order)
        for link in self.back:
            link.put(Packet(order.kind, order.number, notes=self.seen))
        if order.kind == GATHER:
            weights = [tensor.clone() for tensor in self._weights(self.rank)]
            self.weights[0].put(Packet(MESSAGE, order.number, weights))
        elif order.kind == END:
            self.weights[0].put(order)
            self._join()

    def _save_if(self, order: Packet) -> None:
        if order.kind == SAVE:
            self.counters.step = order.number
            self._save()

    def _join(self) -> None:
        source = [] if self.source is None else [self.source]
        for link in (*source, *self.onward, *self.awaited, *self.back, *self.weights.values()):
            link.join()

    def _weights(self, rank: int) -> list[Tensor]:
        return [t for module in self.modules_of(rank).values() for t in module.state_dict().values()]

    def connect_weights(self) -> None:
        """Open the links that carry weights to process 0."""
        group: Any = dist.new_group(backend="gloo")
        if self.rank:
            self.weights = {0: Outgoing(0, PacketLayout(self._weights(self.rank)), 1, group)}
        else:
            for rank in range(1, self.processes.size):
                self.weights[rank] = Incoming(rank, PacketLayout(self._weights(rank)), 1, group)

    def _gather(self) -> None:
        """Gather the weights of all parts in process 0, after the same message."""
        self.order(GATHER, self.counters.step)
        for rank, link in self.weights.items():
            packet = self.wait(link)
            for tensor, came in zip(self._weights(rank), packet.tensors, strict=True):
                tensor.copy_(came)
        self.gathered = self.counters.step

    # Process 0, driven by the training loop

    def reset_metrics(self) -> None:
        super().reset_metrics()
        self.seen_before = self.seen

    def since_reset(self) -> tuple[float, ...]:
        """Counts of the last part since `reset_metrics`, as far as this process knows them."""
        return tuple(now - then for now, then in zip(self.seen, self.seen_before, strict=True))

    def evaluate(self, split: Split, level: int | None) -> dict[str, float]:
        if self.gathered != self.counters.step:
            self._gather()
        return super().evaluate(split, level)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state of this part. In process 0, after all other parts have saved theirs: its checkpoint
        makes theirs valid.
        """
        if self.rank == 0:
            self.order(SAVE, self.counters.step)
        return super().state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        super().load_state_dict(tensors, values)
        self.gathered = self.saved = self.counters.step

    def end(self, code: int) -> None:
        """End the other processes with an exit code."""
        self.order(END, code)
        self._join()

    # The other processes

    def follow(self) -> int:
        """Process packets until the end; returns the exit code."""
        assert self.source is not None
        self.run.keep_rows(self.counters.step)
        log, began = MetricsLog(self.run), time.perf_counter()
        try:
            with stop_requests() as stop:
                while True:
                    packet = self.wait(self.source, *self.awaited)
                    if stop:
                        self.heartbeat.ask_to_stop(stop.pop())
                    if packet.kind == MESSAGE:
                        self.counters.step = packet.number
                        self.take_message(packet)
                        self.counters.updates += 1
                        self.heartbeat.beat()
                        if (self.counters.step + 1) % self.config.log_every == 0:
                            row = {
                                "step": self.counters.step + 1,
                                "messages": self.counters.updates,
                                **self.part_metrics(),
                            }
                            log.write(row | {"seconds": round(time.perf_counter() - began, 3)})
                            self.reset_metrics()
                        continue
                    self._obey(packet)
                    if packet.kind == END:
                        return packet.number
        finally:
            log.close()

    def _path(self, step: int) -> Path:
        return self.run.path / f"{step}.safetensors"

    def _save(self) -> None:
        """Write this part's checkpoint beside the last one, which is valid until process 0 saves its own."""
        try:
            tensors, values = super().state_dict()
            checkpoint.save_checkpoint(self._path(self.counters.step), tensors, values)
            for old in self.run.path.glob("*.safetensors"):
                if old not in (self._path(self.counters.step), self._path(self.saved)):
                    old.unlink()
        except OSError as error:
            raise writing_failed(self.run, self.counters.step, error) from None
        self.saved = self.counters.step

    def prepare_part(self, step: int) -> None:
        """Make this part's directory; unless `step` is 0, restore the checkpoint of that step."""
        self.run.path.mkdir(exist_ok=True)
        if step == 0:
            return
        tensors, values = checkpoint.load_checkpoint(self._path(step))
        self.load_state_dict(tensors, values)
