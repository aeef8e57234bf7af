"""A net in two parts and its synthesizer, the oracle, each in its own process.

    process 0, input part:    x -> h;  sends (h, y) to both others, and learns when ĝ arrives
    process 1, oracle:        (h, y) -> ĝ;  learns when the gradient of h arrives from the output part
    process 2, output part:   h -> ŷ;  learns from y, and sends (h, y) and the gradient of h to the oracle

Processes wait only for space in a queue. ĝ is matched with its x by the number of the message.

Source of the arrangement: github.com/macfergus/synthetic-gradient (2016).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.data.task import Split
from dni_rnn.distributed.part import ProcessPart
from dni_rnn.distributed.processes import Processes
from dni_rnn.distributed.transport import GRADIENT, MESSAGE, Incoming, Outgoing, Packet, PacketLayout
from dni_rnn.feedforward import Decoupled
from dni_rnn.interface import Interface
from dni_rnn.metrics import RMSE
from dni_rnn.synthesizers import ContextMLP
from dni_rnn.training.learner import Learner, TrainingRecord, adam, begin, cosine_schedule
from dni_rnn.training.run_directory import Run

if TYPE_CHECKING:
    from dni_rnn_tasks.surface import Lumps, SurfaceConfig

INPUT, ORACLE, OUTPUT = range(3)

LINES = {
    "gradient": "input part: size of the synthetic gradient",
    "synthesizer_loss": "oracle: error of it",
    "loss": "output part: loss",
}
"""Metrics of the parts, and their labels in a plot."""


class Beside(nn.Module):
    """M(message, context) for a context of numbers: a `ContextMLP` of both, concatenated.

    Shapes: (B, inputs) and (B, numbers) -> (B, inputs).
    """

    def __init__(self, inputs: int, numbers: int, hidden: int) -> None:
        super().__init__()
        self.net = ContextMLP(inputs + numbers, [hidden], inputs)

    def forward(self, message: Tensor, context: Tensor) -> Tensor:
        return self.net(torch.cat([message, context], 1))


def build_model(config: SurfaceConfig) -> Decoupled:
    """Both parts, and the oracle between them."""
    width = config.width
    parts = [
        nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()),
        nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)),
    ]
    return Decoupled(parts, [Interface(Beside(width, 1, 2 * width), batch_dim=0)])


@torch.no_grad()
def grid_error(model: Decoupled, data: Lumps, split: Split, device: torch.device) -> float:
    """Root mean square error on the grid of a split."""
    x, y = (tensor.to(device) for tensor in data.grid(split))
    training = model.training
    model.eval()
    error = float((model(x) - y).square().mean().sqrt())
    model.train(training)
    return error


@torch.no_grad()
def draw_surface(run: Run, model: Decoupled, data: Lumps, device: torch.device) -> None:
    """Draw surface.png: the true surface, the learnt one, and the losses of the parts."""
    from dni_rnn.experiments.plots import Panel, save_surface

    x, y = data.grid("test")
    side = math.isqrt(len(x))
    learnt = model.eval()(x.to(device)).cpu()
    lines: dict[str, list[tuple[float, float]]] = {}
    for part in ("", f"part{ORACLE}", f"part{OUTPUT}"):
        for row in Run(run.path / part, run.task_name, run.task, run.config).rows():
            for key, label in LINES.items():
                if key in row:
                    lines.setdefault(label, []).append((row["step"], row[key]))
    panel = Panel("update", "of each part, over time", lines, logarithmic=False)
    surfaces = {"true": y.view(side, side).numpy(), "learnt": learnt.view(side, side).numpy()}
    save_surface(run.path / "surface.png", surfaces, panel)


class SurfaceLearner(Learner):
    """Both parts and the oracle in one process. Learning rates fall to zero by a cosine schedule."""

    model: Decoupled

    def __init__(self, config: SurfaceConfig, data: Lumps, device: torch.device) -> None:
        super().__init__(config, data, device)
        begin(config)
        self.model = build_model(config).to(device)
        net, synthesizer = self.model.net_parameters(), self.model.synthesizer_parameters()
        optimizer = adam([(net, config.lr), (synthesizer, config.synthesizer_lr)], device)
        self.record = TrainingRecord({"model": self.model}, net, synthesizer, optimizer, ("loss",), device)
        self.one_pass = config.steps * config.batch_size

    @staticmethod
    def build(config: SurfaceConfig, data: Lumps) -> Decoupled:
        return build_model(config)

    @staticmethod
    def score(
        model: Any, data: Lumps, split: Split, device: torch.device, level: int | None = None
    ) -> dict[str, float]:
        return {RMSE.key: grid_error(model, data, split, device)}

    def update(self) -> None:
        config, counters, record = self.config, self.counters, self.record
        record.set_rates(cosine_schedule(counters.step / config.steps))
        x, y = self.data.batch(counters.step, config.batch_size, config.seed, self.device)
        loss = F.mse_loss(self.model(x, y), y)
        record.optimizer.zero_grad()
        loss.backward()
        record.optimizer.step()
        record.averages["loss"] += loss.detach()
        counters.advance(len(x))

    def metrics(self) -> dict[str, float]:
        interfaces: Any = self.model.interfaces
        loss = float(self.record.averages["loss"]) / max(self.counters.updates, 1)
        return {
            "rmse": math.sqrt(loss),
            "loss": loss,
            "synthesizer_loss": float(interfaces[0].regression_loss),
        }

    @property
    def ended(self) -> bool:
        return self.counters.step >= self.config.steps

    def draw(self, run: Run) -> None:
        draw_surface(run, self.model, self.data, self.device)


class SurfacePart(ProcessPart):
    """The input part, the oracle or the output part, by the number of the process.

    Attributes:
      kept: in the input part, points of messages that wait for ĝ, with the updates at that time, by number.
      stale: in the input part, updates between sending a message and learning from it.
    """

    def __init__(
        self, run: Run, config: SurfaceConfig, data: Lumps, device: torch.device, processes: Processes
    ) -> None:
        super().__init__(run, config, data, device, processes)
        self.model: Any = build_model(config).to(device)
        modules = self.modules_of(self.rank)
        rate = config.synthesizer_lr if self.rank == ORACLE else config.lr
        parameters = [p for module in modules.values() for p in module.parameters()]
        net, synthesizer = self.model.net_parameters(), self.model.synthesizer_parameters()
        self.record = TrainingRecord(
            modules, net, synthesizer, adam([(parameters, rate)], device), (), device
        )
        self.one_pass = config.steps * config.batch_size
        self.interface: Any = self.model.interfaces[0]
        self.kept: dict[int, tuple[Tensor, int]] = {}
        self.gradient = 0.0
        self.reset_metrics()

    build = staticmethod(SurfaceLearner.build)
    score = staticmethod(SurfaceLearner.score)

    @property
    def ended(self) -> bool:
        return self.counters.step >= self.config.steps

    def draw(self, run: Run) -> None:
        draw_surface(run, self.model, self.data, self.device)

    def modules_of(self, rank: int) -> dict[str, nn.Module]:
        parts, interfaces = self.model.parts, self.model.interfaces
        return {"part": [parts[0], interfaces[0], parts[1]][rank]}

    def connect(self) -> None:
        config = self.config
        h, y = torch.zeros(config.batch_size, config.width), torch.zeros(config.batch_size, 1)
        message, lesson, capacity = PacketLayout([h, y]), PacketLayout([h, y, h]), config.queue
        groups: list[Any] = [dist.new_group(backend="gloo") for _ in range(4)]
        late = config.delay / 1000.0
        if self.rank == INPUT:
            self.onward = [
                Outgoing(ORACLE, message, capacity, groups[0]), Outgoing(OUTPUT, message, capacity, groups[1])
            ]  # fmt: skip
            self.awaited = [Incoming(ORACLE, PacketLayout([h]), capacity, groups[2], late, self.arrivals)]
        elif self.rank == ORACLE:
            self.source = Incoming(INPUT, message, capacity, groups[0], late, self.arrivals)
            self.awaited = [Incoming(OUTPUT, lesson, capacity, groups[3], late, self.arrivals)]
            self.back = [Outgoing(INPUT, PacketLayout([h]), capacity, groups[2])]
        else:
            self.source = Incoming(INPUT, message, capacity, groups[1], late, self.arrivals)
            self.onward = [Outgoing(ORACLE, lesson, capacity, groups[3])]

    def update(self) -> None:
        """For the input part: send a message, and learn from synthetic gradients that have arrived."""
        answers = self.awaited[0]
        while (packet := answers.poll()) is not None:
            self.take_gradient(packet)
        while len(self.kept) >= self.config.queue:
            self.take_gradient(self.wait(answers))
        step = self.counters.step
        x, y = self.data.batch(step, self.config.batch_size, self.config.seed, self.device)
        with torch.no_grad():
            h = self.record.modules["part"](x)
        self.kept[step] = x, self.own_updates
        for link in self.onward:
            link.put(Packet(MESSAGE, step, [h, y]))
        self.heartbeat.beat()
        self.counters.advance(len(x))

    def take_message(self, packet: Packet) -> None:
        h, y = (tensor.to(self.device) for tensor in packet.tensors)
        if self.rank == ORACLE:
            synthetic = self.interface.synthetic_gradient(h, y)
            self.back[0].put(Packet(GRADIENT, packet.number, [synthetic], self.seen))
            while (answer := self.awaited[0].poll()) is not None:
                self.take_gradient(answer)
            return
        self.record.set_rates(cosine_schedule(self.counters.step / self.config.steps))
        h.requires_grad_()
        loss = F.mse_loss(self.record.modules["part"](h), y)
        self.record.optimizer.zero_grad()
        loss.backward()
        assert h.grad is not None
        self.seen = (self.seen[0] + 1, self.seen[1] + float(loss.detach()), 0.0)
        self.onward[0].put(Packet(GRADIENT, packet.number, [h.detach(), y, h.grad], self.seen))
        self.record.optimizer.step()

    def take_gradient(self, packet: Packet) -> None:
        """Learn from a synthetic gradient (input part), or from a gradient of the output part (oracle)."""
        self.seen = packet.notes
        tensors = [tensor.to(self.device) for tensor in packet.tensors]
        self.record.set_rates(cosine_schedule(self.counters.step / self.config.steps))
        self.record.optimizer.zero_grad()
        if self.rank == ORACLE:
            h, y, gradient = tensors
            self.interface.receive(h, y).backward(gradient)
        else:
            # Links keep the order: earlier messages will get no gradient any more.
            for number in [n for n in self.kept if n < packet.number]:
                del self.kept[number]
            x, updates = self.kept.pop(packet.number)
            # Run it again with the current weights: those at sending have changed.
            self.record.modules["part"](x).backward(tensors[0])
            self.gradient = float(tensors[0].norm())
            self.stale.append(self.own_updates - updates)
        self.record.optimizer.step()
        self.own_updates += 1

    def drained(self) -> None:
        self.kept.clear()

    def reset_metrics(self) -> None:
        super().reset_metrics()
        self.stale: list[int] = []

    def metrics(self) -> dict[str, float]:
        while self.since_reset()[0] == 0 and self.kept:
            self.take_gradient(self.wait(self.awaited[0]))
        updates, loss, _ = self.since_reset()
        return {"rmse": math.sqrt(loss / max(updates, 1.0)), **self.part_metrics()}

    def part_metrics(self) -> dict[str, float]:
        row = super().part_metrics()
        if self.rank == INPUT:
            row["gradient"] = self.gradient
            if self.stale:
                row |= {"staleness": sum(self.stale) / len(self.stale), "staleness_max": max(self.stale)}
        elif self.rank == ORACLE:
            row["synthesizer_loss"] = float(self.interface.regression_loss)
        else:
            updates, loss, _ = self.since_reset()
            row["loss"] = loss / max(updates, 1.0)
        return row
