"""A net in two parts and its synthesizer, the oracle, each in a process of its own.

    process 0, input part:    x -> h;  sends (h, y) to both others, and learns when ĝ for it comes back
    process 1, oracle:        (h, y) -> ĝ;  learns when the gradient of h comes from the output part
    process 2, output part:   h -> ŷ;  learns from y, and sends (h, y) and the gradient of h to the oracle

Nobody waits for anybody but for room in a queue. ĝ is matched with its x by the number of the message.

Source of the arrangement: github.com/macfergus/synthetic-gradient (2016).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.data.task import Split
from dni_rnn.distributed.part import ProcessPart
from dni_rnn.distributed.processes import Processes
from dni_rnn.distributed.transport import GRADIENT, MESSAGE, Incoming, Layout, Outgoing, Packet
from dni_rnn.feedforward import Decoupled
from dni_rnn.interface import Interface
from dni_rnn.metrics import RMSE
from dni_rnn.synthesizers import ContextMLP
from dni_rnn.training.loop import BaseLearner, cosine
from dni_rnn.training.run_directory import Run

INPUT, ORACLE, OUTPUT = range(3)

LINES = {
    "gradient": "input part: size of the synthetic gradient",
    "synthesizer_loss": "oracle: error of it",
    "loss": "output part: loss",
}
"""What the parts' metrics say of their learning, and what a plot calls it."""


class Beside(nn.Module):
    """M(message, context) for a context of numbers: both side by side into a `ContextMLP`.

    Shapes: (B, inputs) and (B, numbers) -> (B, inputs).
    """

    def __init__(self, inputs: int, numbers: int, hidden: int) -> None:
        super().__init__()
        self.net = ContextMLP(inputs + numbers, [hidden], inputs)

    def forward(self, message: Tensor, context: Tensor) -> Tensor:
        return self.net(torch.cat([message, context], 1))


class SurfaceLearner(BaseLearner):
    """Both parts and the oracle in one process."""

    averages = ("loss",)
    loss: Tensor
    model: Decoupled

    def __init__(self, config: Any, data: Any, device: torch.device) -> None:
        super().__init__(config, data, device)
        self.model = self.build(config, data).to(device)
        self.modules = {"model": self.model}
        self.net, self.synthesizer = self.model.net_parameters(), self.model.synthesizer_parameters()
        self.optimizer = torch.optim.Adam(
            [
                {"params": self.net, "base": config.lr},
                {"params": self.synthesizer, "base": config.synthesizer_lr},
            ],
            fused=True,
        )
        self.one_pass = config.steps * config.batch_size

    @staticmethod
    def build(config: Any, data: Any) -> Decoupled:
        width = config.width
        parts = [
            nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()),
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)),
        ]
        return Decoupled(parts, [Interface(Beside(width, 1, 2 * width), batch_dim=0)])

    @staticmethod
    @torch.no_grad()
    def score(
        model: Any, data: Any, split: Split, device: torch.device, level: int | None = None
    ) -> dict[str, float]:
        """Root mean square error on the grid of a split."""
        x, y = (tensor.to(device) for tensor in data.grid(split))
        training = model.training
        model.eval()
        error = float((model(x) - y).square().mean().sqrt())
        model.train(training)
        return {RMSE.key: error}

    def rate(self) -> float:
        """Factor on the learning rates of the coming update: along a cosine to zero."""
        return cosine(self.step / self.config.steps)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Points and heights of the update to come."""
        x, y = self.data.batch(self.step, self.config.batch_size, self.config.seed)
        return x.to(self.device), y.to(self.device)

    def count(self, points: int) -> None:
        """One update more."""
        self.step += 1
        self.updates += 1
        self.symbols += points

    def update(self) -> None:
        self.set_rates(self.rate())
        x, y = self.batch()
        loss = F.mse_loss(self.model(x, y), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss = self.loss + loss.detach()
        self.count(len(x))

    def metrics(self) -> dict[str, float]:
        interfaces: Any = self.model.interfaces
        loss = float(self.loss) / max(self.updates, 1)
        return {
            "rmse": math.sqrt(loss),
            "loss": loss,
            "synthesizer_loss": float(interfaces[0].regression_loss),
        }

    @torch.no_grad()
    def draw(self, run: Run) -> None:
        """surface.png: the surface, what was learnt of it, and the parts' losses."""
        from dni_rnn.experiments.plots import Panel, save_surface

        x, y = self.data.grid("test")
        side = math.isqrt(len(x))
        learnt = self.model.eval()(x.to(self.device)).cpu()
        lines: dict[str, list[tuple[float, float]]] = {}
        for part in ("", f"part{ORACLE}", f"part{OUTPUT}"):
            for row in Run(run.path / part, run.task_name, run.task, run.config).rows():
                for key, label in LINES.items():
                    if key in row:
                        lines.setdefault(label, []).append((row["step"], row[key]))
        panel = Panel("update", "of each part, over time", lines, logarithmic=False)
        surfaces = {"true": y.view(side, side).numpy(), "learnt": learnt.view(side, side).numpy()}
        save_surface(run.path / "surface.png", surfaces, panel)


class SurfacePart(ProcessPart, SurfaceLearner):
    """The input part, the oracle or the output part, by the number of the process.

    Attributes:
      kept: in the input part, points of messages without a synthetic gradient, and updates then, by number.
      stale: in the input part, updates made between sending a message and learning from it.
    """

    def __init__(self, run: Run, config: Any, data: Any, device: torch.device, processes: Processes) -> None:
        super().__init__(run, config, data, device, processes)
        self.modules = self.modules_of(self.rank)
        rate = config.synthesizer_lr if self.rank == ORACLE else config.lr
        parameters = [p for module in self.modules.values() for p in module.parameters()]
        self.optimizer = torch.optim.Adam([{"params": parameters, "base": rate}], fused=True)
        self.interface: Any = self.model.interfaces[0]
        self.kept: dict[int, tuple[Tensor, int]] = {}
        self.gradient = 0.0

    def modules_of(self, rank: int) -> dict[str, nn.Module]:
        parts, interfaces = self.model.parts, self.model.interfaces
        return {"part": [parts[0], interfaces[0], parts[1]][rank]}

    def connect(self) -> None:
        config = self.config
        h, y = torch.zeros(config.batch_size, config.width), torch.zeros(config.batch_size, 1)
        message, lesson, capacity = Layout([h, y]), Layout([h, y, h]), config.queue
        groups: list[Any] = [dist.new_group(backend="gloo") for _ in range(4)]
        late = config.delay / 1000.0
        if self.rank == INPUT:
            self.onward = [
                Outgoing(ORACLE, message, capacity, groups[0]), Outgoing(OUTPUT, message, capacity, groups[1])
            ]  # fmt: skip
            self.awaited = [Incoming(ORACLE, Layout([h]), capacity, groups[2], late)]
        elif self.rank == ORACLE:
            self.source = Incoming(INPUT, message, capacity, groups[0], late)
            self.awaited = [Incoming(OUTPUT, lesson, capacity, groups[3], late)]
            self.back = [Outgoing(INPUT, Layout([h]), capacity, groups[2])]
        else:
            self.source = Incoming(INPUT, message, capacity, groups[1], late)
            self.onward = [Outgoing(ORACLE, lesson, capacity, groups[3])]

    def update(self) -> None:
        """Of the input part: send a message, and learn from whatever synthetic gradients have come."""
        answers = self.awaited[0]
        while (packet := answers.poll()) is not None:
            self.take_gradient(packet)
        while len(self.kept) >= self.config.queue:
            self.take_gradient(self.wait(answers))
        x, y = self.batch()
        with torch.no_grad():
            h = self.modules["part"](x)
        self.kept[self.step] = x, self.own_updates
        for link in self.onward:
            link.put(Packet(MESSAGE, self.step, [h, y]))
        self.watch.beat()
        self.count(len(x))

    def take_message(self, packet: Packet) -> None:
        h, y = (tensor.to(self.device) for tensor in packet.tensors)
        if self.rank == ORACLE:
            synthetic = self.interface.synthetic_gradient(h, y)
            self.back[0].put(Packet(GRADIENT, packet.number, [synthetic], self.seen))
            while (answer := self.awaited[0].poll()) is not None:
                self.take_gradient(answer)
            return
        self.set_rates(self.rate())
        h.requires_grad_()
        loss = F.mse_loss(self.modules["part"](h), y)
        self.optimizer.zero_grad()
        loss.backward()
        assert h.grad is not None
        self.seen = (self.seen[0] + 1, self.seen[1] + float(loss.detach()), 0.0)
        self.onward[0].put(Packet(GRADIENT, packet.number, [h.detach(), y, h.grad], self.seen))
        self.optimizer.step()

    def take_gradient(self, packet: Packet) -> None:
        """A synthetic gradient in the input part, a lesson of the output part in the oracle."""
        self.seen = packet.notes
        tensors = [tensor.to(self.device) for tensor in packet.tensors]
        self.set_rates(self.rate())
        self.optimizer.zero_grad()
        if self.rank == ORACLE:
            h, y, gradient = tensors
            self.interface.receive(h, y).backward(gradient)
        else:
            # Links keep the order: whatever was sent before will not be answered any more.
            for number in [n for n in self.kept if n < packet.number]:
                del self.kept[number]
            x, updates = self.kept.pop(packet.number)
            # Once more, with the weights of now: those that it was sent with have changed.
            self.modules["part"](x).backward(tensors[0])
            self.gradient = float(tensors[0].norm())
            self.stale.append(self.own_updates - updates)
        self.optimizer.step()
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
