"""A feed-forward net cut into a chain of parts, each in its own process.

A part sends its output on and learns from its input at once, with a synthetic gradient ĝ; the true gradient g
arrives later and trains the synthesizer. With `--correct` the part then also backpropagates the residual
g − ĝ, and only then sends the sum back:

    at once:         θ += ĝ·∂out/∂θ
    when g arrives:  θ += (g − ĝ)·∂out/∂θ,   sends back  ĝ·∂out/∂x + (g − ĝ)·∂out/∂x = g·∂out/∂x

(as gradients, each with an optimizer step). Both use the graph of the one forward pass, at its weights. The
last part sends its true gradient back, so every part receives true gradients, and all that it learns from a
message sums to the true gradient for any M, only late. With ĝ = 0 (method none) this is delayed-gradient
model parallelism with what PipeDream calls weight stashing (Harlap et al. 2018, arXiv:1806.03377).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dni_rnn.config import FeedforwardConfig
from dni_rnn.data.labelled import Batches, Examples
from dni_rnn.distributed.part import ProcessPart
from dni_rnn.distributed.processes import Processes
from dni_rnn.distributed.transport import GRADIENT, MESSAGE, Incoming, Outgoing, Packet, PacketLayout
from dni_rnn.feedforward import messages_of, split
from dni_rnn.stashed import Stashed
from dni_rnn.training.feedforward import (
    FeedforwardLearner,
    build_model,
    context_of,
    loss_of,
    memory_format,
    planned_updates,
    rate_factor,
    wrong,
)
from dni_rnn.training.learner import TrainingRecord, adam
from dni_rnn.training.run_directory import Run

FORGET = 4
"""Messages kept for their gradients when messages may be lost, in units of `queue`."""


def backward(roots: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """Backpropagate from several tensors at once, each with its gradient; None, for a scalar, is 1."""
    tensors, gradients = zip(*roots, strict=True)
    torch.autograd.backward(tensors, gradients)


class Unanswered(NamedTuple):
    """A message whose gradient has not arrived yet."""

    message: Tensor
    context: Tensor
    updates: int  # of the part, including that with this message
    synthetic: Tensor | None  # ĝ
    made: Stashed | None  # its forward pass, for the correction


class ChainPart(ProcessPart):
    """Trains one part of a cut net in its own process.

    Attributes:
      part: the layers of this process; the last part has the loss.
      interface: at its end, with the synthesizer of the gradients of the next part; None if there is none.
      local: a local loss at its end; None if there is none.
      free: it does not wait for the gradient of a message; False for the last part, and with bprop.
      corrects: it learns from the residual g − ĝ when g arrives.
      gradients: whether packets sent back hold gradients; with a local loss they only acknowledge a message.
      kept: messages whose gradients have not arrived, by number.
      stale: updates of this part between that with a message and the arrival of its gradient, one number per
        gradient since the last metrics row; in one process it would be 0.
      lost: number of messages that got no gradient, since the start.
    """

    def __init__(
        self, run: Run, config: FeedforwardConfig, data: Examples, device: torch.device, processes: Processes
    ) -> None:
        config = config.resolved
        super().__init__(run, config, data, device, processes)
        self.model = build_model(config, data).to(device)
        self.model.to(memory_format=memory_format(config))  # pyright: ignore[reportCallIssue]
        parts: Any = self.model.parts
        if config.method == "bprop":
            parts = split(self.model.parts[0], config.cut_positions)  # type: ignore[arg-type]
        self.parts: Any = parts
        interfaces: Any = self.model.interfaces
        self.interfaces: list[Any] = [*interfaces, *[None] * (len(parts) - len(interfaces))]
        losses: Any = self.model.losses
        self.losses: list[Any] = [*losses, *[None] * (len(parts) - len(losses))]
        self.part, self.interface = parts[self.rank], self.interfaces[self.rank]
        self.local = self.losses[self.rank]
        self.gradients = config.method != "local"
        groups = [(list(self.part.parameters()), config.lr or 0.0)]
        ends = [p for end in (self.interface, self.local) if end is not None for p in end.parameters()]
        if ends:
            groups.append((ends, config.synthesizer_lr or 0.0))
        net, synthesizer = self.model.net_parameters(), self.model.synthesizer_parameters()
        self.record = TrainingRecord(
            self.modules_of(self.rank), net, synthesizer, adam(groups, device), (), device
        )
        self.batches = Batches(data, "train", config.batch_size, device, config.seed, config.augment)
        self.steps = planned_updates(config, self.batches)
        self.one_pass = self.steps * self.batches.batch_size
        self.last = self.rank == processes.size - 1
        self.free = not self.last and config.method != "bprop"
        self.corrects = self.free and config.correct
        self.kept: dict[int, Unanswered] = {}
        self.lost = 0
        self.reset_metrics()

    build = staticmethod(FeedforwardLearner.build)
    score = staticmethod(FeedforwardLearner.score)

    @property
    def ended(self) -> bool:
        return self.counters.step >= self.steps

    def modules_of(self, rank: int) -> dict[str, nn.Module]:
        modules = {"part": self.parts, "interface": self.interfaces, "local_loss": self.losses}
        return {name: each[rank] for name, each in modules.items() if each[rank] is not None}

    def connect(self) -> None:
        config, rank = self.config, self.rank
        x, targets = self.batches.batch(0)
        messages = list(messages_of(self.parts, x))
        forth, back = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
        assert isinstance(forth, dist.ProcessGroup)
        assert isinstance(back, dist.ProcessGroup)
        capacity, delay = config.queue, config.delay / 1000.0
        if not self.last:
            message = messages[rank]
            self.onward = [Outgoing(rank + 1, PacketLayout([message, targets]), capacity, forth)]
            layout = PacketLayout([message][: self.gradients])
            self.awaited = [Incoming(rank + 1, layout, capacity, back, delay, self.arrivals)]
        if rank:
            message = messages[rank - 1]
            layout = PacketLayout([message, targets])
            self.source = Incoming(rank - 1, layout, capacity, forth, delay, self.arrivals)
            self.back = [Outgoing(rank - 1, PacketLayout([message][: self.gradients]), capacity, back)]

    def update(self) -> None:
        x, targets = self.batches.batch(self.counters.step)
        self.learn(x, targets)
        self.heartbeat.beat()
        self.counters.advance(len(x))

    def take_message(self, packet: Packet) -> None:
        x, targets = (tensor.to(self.device) for tensor in packet.tensors)
        self.learn(x, targets)

    def learn(self, x: Tensor, targets: Tensor) -> None:
        """Learn from message `self.counters.step`, send the output on and the gradient back."""
        config, number = self.config, self.counters.step
        self._collect()
        self.record.set_rates(rate_factor(config, number, self.steps))
        x = x.detach().requires_grad_(self.rank > 0 and self.gradients)
        made = Stashed(self.part, x) if self.corrects else None
        out = self.part(x) if made is None else made.out
        for link in self.onward:
            link.put(Packet(MESSAGE, number, [out.detach(), targets]))
        roots: list[tuple[Tensor, Tensor | None]] = []
        gradient = None
        if self.last:
            loss = loss_of(out, targets, config.smoothing)
            roots.append((loss, None))
            seen = (1.0, float(loss.detach()), float(wrong(out, targets)))
            self.seen = tuple(map(operator.add, self.seen, seen))
        elif self.free:
            context = context_of(targets)
            if self.interface is not None:
                gradient = self.interface.synthetic_gradient(out.detach(), context)
                roots.append((out, gradient))
            if self.local is not None:
                roots.append((self.local.send(out, context), None))
            self.kept[number] = Unanswered(out.detach(), context, self.own_updates + 1, gradient, made)
        else:
            roots.append((out, self._gradient(number)))
        self.record.optimizer.zero_grad()
        if made is None:
            backward(roots)
            self._answer(number, x)
        elif gradient is not None:
            made.out.backward(gradient, retain_graph=True)
        self.record.optimizer.step()
        self.own_updates += 1

    def _answer(self, number: int, x: Tensor) -> None:
        for link in self.back:
            link.put(Packet(GRADIENT, number, [] if x.grad is None else [x.grad], self.seen))

    def _gradient(self, number: int) -> Tensor:
        """Wait for the gradient of a message, and do nothing else meanwhile."""
        packet = self.wait(self.awaited[0])
        assert (packet.kind, packet.number) == (GRADIENT, number)
        self.seen = packet.notes
        return packet.tensors[0].to(self.device)

    def _collect(self) -> None:
        """Learn from the gradients that have arrived; wait for some if too many messages are in flight."""
        if not self.free:
            return
        answers, queue = self.awaited[0], self.config.queue
        while (packet := answers.poll()) is not None:
            self.take_gradient(packet)
        if self.config.when_full == "wait":
            while len(self.kept) >= queue:
                self.take_gradient(self.wait(answers))
        while len(self.kept) >= FORGET * queue:
            self._forget(min(self.kept))

    def take_gradient(self, packet: Packet) -> None:
        """Train the synthesizer on the gradient of a message, and learn from the residual (`corrects`)."""
        self.seen = packet.notes
        # Links keep the order: earlier messages will get no gradient any more.
        for number in [n for n in self.kept if n < packet.number]:
            self._forget(number)
        kept = self.kept.pop(packet.number, None)
        if kept is None or not packet.tensors:
            return
        gradient = packet.tensors[0].to(self.device)
        self.record.optimizer.zero_grad()
        if self.interface is not None:
            self.interface.receive(kept.message, kept.context).backward(gradient)
        if kept.made is not None:
            kept.made.out.backward(gradient if kept.synthetic is None else gradient - kept.synthetic)
            self._answer(packet.number, kept.made.inputs[0])
        self.record.optimizer.step()
        self.stale.append(self.own_updates - kept.updates)

    def _forget(self, number: int) -> None:
        del self.kept[number]
        self.lost += 1

    def drained(self) -> None:
        for number in list(self.kept):
            self._forget(number)

    def reset_metrics(self) -> None:
        super().reset_metrics()
        self.stale: list[int] = []

    def metrics(self) -> dict[str, float]:
        """Error and loss are those of the last part, as far as process 0 knows them."""
        while self.since_reset()[0] == 0 and self.kept:
            self.take_gradient(self.wait(self.awaited[0]))
        updates, loss, wrongs = self.since_reset()
        updates = max(updates, 1.0)
        row = {"error": 100.0 * wrongs / (updates * self.batches.batch_size), "loss": loss / updates}
        return row | self.part_metrics()

    def part_metrics(self) -> dict[str, float]:
        row = super().part_metrics()
        if self.interface is not None:
            row["synthesizer_loss"] = float(self.interface.regression_loss)
        if self.local is not None:
            row["local_loss"] = float(self.local.value)
        if self.free:
            row["lost"] = self.lost
        if self.stale:
            row |= {"staleness": sum(self.stale) / len(self.stale), "staleness_max": max(self.stale)}
        if self.last:
            updates, loss, _ = self.since_reset()
            row["loss"] = loss / max(updates, 1.0)
        return row
