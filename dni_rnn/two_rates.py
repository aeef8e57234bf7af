"""Two networks that tick at different rates, cut by interfaces where messages pass; and their learner.

    network A, fast:   (x_t, state) -> state, at every step; after every T steps an answer and a message
    network B, slow:   (message, state) -> state, once in T steps; after T messages an answer

A block of T² steps is one sequence: both states begin at zero. Joint backpropagation has to unroll all of
it before either can learn; with an interface on the message and one at the window boundaries of each net, A
unrolls T steps and B some of its own ticks, and neither waits for the other's gradient.

Source: Jaderberg et al. 2017, arXiv:1608.05343, §3.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.config import RatesConfig
from dni_rnn.data.labelled import Batches
from dni_rnn.data.task import Split
from dni_rnn.interface import Interface
from dni_rnn.pytree import Tree, detach
from dni_rnn.recurrent import Boundary, RecurrentCore
from dni_rnn.synthesizers import ContextMLP, Critic, MLPSynthesizer, OneHotTokens
from dni_rnn.training.feedforward import wrong
from dni_rnn.training.loop import BaseLearner

EVALUATION_STEPS, EVALUATION_PASSES = 40_000, 10
"""Inputs that one validation reads, in shuffled passes over the split, and the most passes."""

EVALUATION_ROWS = 256


class Block(NamedTuple):
    """T windows of T steps, B rows side by side.

    Attributes:
      inputs: (T, T, B, ...), windows first, then steps.
      fast: (T, B), what A is to answer after each window; integers.
      slow: (B,), what B is to answer at the end; integers.
    """

    inputs: Tensor
    fast: Tensor
    slow: Tensor

    def coming_slow(self, tick: int) -> Tensor:
        """What synthesizers of B's may know at `tick`: B's target, in the place of the tick; (T, B)."""
        known = torch.full_like(self.fast, -1)
        known[tick] = self.slow
        return known

    def coming(self, tick: int) -> Tensor:
        """What A's may know before window `tick`: A's targets from there on, and B's; (2T, B)."""
        fast = self.fast.clone()
        fast[:tick] = -1
        return torch.cat([fast, self.coming_slow(tick)])


class Turn(NamedTuple):
    """What one net, or both, learn from at once.

    Attributes:
      objective: a scalar to differentiate.
      fast, slow: logits and targets of what was answered on the way.
    """

    objective: Tensor
    fast: tuple[Tensor, Tensor] | None = None
    slow: tuple[Tensor, Tensor] | None = None


class FastNet(nn.Module):
    """Network A: two layers of Linear-LayerNorm-ReLU, an LSTM, a readout, and what it says to B.

    As published but for the normalisation, which was over the batch and there differed from step to step:
    over the features it makes no row depend on another, and no window on how it was cut.
    """

    def __init__(self, features: int, outputs: int, hidden: int, core: RecurrentCore) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(2),
            nn.Linear(features, hidden), nn.LayerNorm(hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU(),
        )  # fmt: skip
        self.core = core
        self.readout = nn.Linear(hidden, outputs)
        self.speech = nn.Sequential(nn.Linear(hidden, hidden), nn.LayerNorm(hidden))

    def forward(self, inputs: Tensor, state: Tree) -> tuple[Tensor, Tensor, Tree]:
        """inputs (T, B, ...) -> after them: logits (B, outputs), the message (B, H) and the state."""
        outputs, state = self.core(self.encoder(inputs), state)
        return self.readout(outputs[-1]), self.speech(outputs[-1]), state


class SlowNet(nn.Module):
    """Network B: an LSTM on messages, and a readout."""

    def __init__(self, outputs: int, hidden: int, core: RecurrentCore) -> None:
        super().__init__()
        self.core = core
        self.readout = nn.Linear(hidden, outputs)

    def forward(self, messages: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """messages (ticks, B, H) -> after them: logits (B, outputs) and the state."""
        outputs, state = self.core(messages, state)
        return self.readout(outputs[-1]), state


class TwoRates(nn.Module):
    """Both networks, with three interfaces between them and their own windows, or with none.

    The objective of a block is (mean over A's answers of −log p) + (−log p of B's answer), in nats, mean
    over rows. `lock_step` differentiates it as it is; `decoupled` in turns, each of which can be stepped on
    before the next one begins. With exact synthesizers the gradients of the turns add up to that of
    `lock_step`, when nothing is stepped on between.

    Args:
      fast, slow: the networks; their cores hold the interfaces at their own boundaries.
      interface: on the message; with None nothing comes back from B to A.
      period: T.
      ticks: of B, from one of its window boundaries to the next; a divisor of T.
    """

    def __init__(
        self, fast: FastNet, slow: SlowNet, interface: Interface | None, period: int, ticks: int
    ) -> None:
        super().__init__()
        self.fast, self.slow, self.interface = fast, slow, interface
        self.period, self.ticks = period, ticks

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """inputs (T, T, B, ...) -> A's logits (T, B, outputs), B's logits (B, outputs)."""
        rows = inputs.shape[2]
        state = self.fast.core.initial_state(rows)
        answers, messages = [], []
        for window in inputs:
            logits, message, state = self.fast(window, state)
            answers.append(logits)
            messages.append(message)
        logits, _ = self.slow(torch.stack(messages), self.slow.core.initial_state(rows))
        return torch.stack(answers), logits

    def lock_step(self, block: Block) -> Iterator[Turn]:
        """One turn for both, through all T² steps."""
        fast, slow = self(block.inputs)
        objective = F.cross_entropy(fast.flatten(0, 1), block.fast.flatten())
        objective = objective + F.cross_entropy(slow, block.slow)
        yield Turn(objective, (fast.flatten(0, 1), block.fast.flatten()), (slow, block.slow))

    def decoupled(self, block: Block) -> Iterator[Turn]:
        """A turn of A after every window, and one of B after every `ticks` of them."""
        period, rows = self.period, len(block.slow)
        fast_state, slow_state = (net.core.initial_state(rows) for net in (self.fast, self.slow))
        heard: list[Tensor] = []
        for tick in range(period):
            first, last = tick == 0, tick == period - 1
            if self.interface is not None and not first:
                fast_state = self.fast.core.receive(fast_state, Boundary(block.coming(tick)))
            logits, message, fast_state = self.fast(block.inputs[tick], fast_state)
            objective = F.cross_entropy(logits, block.fast[tick]) / period
            if self.interface is not None:
                objective = objective + self.interface.send(message, block.coming_slow(tick))
                if not last:
                    objective = objective + self.fast.core.send(fast_state, Boundary(block.coming(tick + 1)))
            yield Turn(objective, fast=(logits, block.fast[tick]))
            fast_state, message = detach(fast_state), message.detach()
            if self.interface is not None:
                message = self.interface.receive(message, block.coming_slow(tick))
            heard.append(message)
            if (tick + 1) % self.ticks:
                continue
            if self.interface is not None and tick >= self.ticks:
                known = Boundary(block.coming_slow(tick + 1 - self.ticks))
                slow_state = self.slow.core.receive(slow_state, known)
            logits, slow_state = self.slow(torch.stack(heard), slow_state)
            heard = []
            if last:
                yield Turn(F.cross_entropy(logits, block.slow), slow=(logits, block.slow))
            elif self.interface is not None:
                yield Turn(self.slow.core.send(slow_state, Boundary(block.coming_slow(tick + 1))))
            slow_state = detach(slow_state)

    def interfaces(self) -> dict[str, Interface]:
        """By what passes there: the states of A and B, and the message."""
        found = {
            "fast": self.fast.core.interface,
            "slow": self.slow.core.interface,
            "message": self.interface,
        }
        return {name: interface for name, interface in found.items() if interface is not None}

    def synthesizer_parameters(self) -> list[nn.Parameter]:
        """Those of the synthesizers."""
        return [p for interface in self.interfaces().values() for p in interface.parameters()]

    def net_parameters(self) -> list[nn.Parameter]:
        """All others."""
        theirs = {id(p) for p in self.synthesizer_parameters()}
        return [p for p in self.parameters() if id(p) not in theirs]


def build_model(config: RatesConfig, data: Any) -> TwoRates:
    """The two networks that `config` describes, with an interface at each cut if it wants them."""
    period, hidden, outputs = config.bptt, config.hidden, config.bptt**2 + 1
    ticks = config.ticks or period
    widths = config.synthesizer_spec.widths(hidden)
    grounding = {"centre": config.centre, "restore": config.restore}

    def encoder(places: int) -> OneHotTokens | None:
        return OneHotTokens(outputs, places) if config.context == "targets" else None

    def core(places: int, cut: bool) -> RecurrentCore:
        example = RecurrentCore("lstm", 1, hidden).initial_state(1)
        m = MLPSynthesizer(example, widths, context=encoder(places)) if cut else None
        return RecurrentCore("lstm", hidden, hidden, synthesizer=m, **grounding)

    fast = FastNet(math.prod(data.shape), outputs, hidden, core(2 * period, config.dni))
    slow = SlowNet(outputs, hidden, core(period, config.dni and ticks < period))
    interface = None
    if config.dni:
        m = (
            Critic(ContextMLP(hidden, widths, period * outputs), outputs)
            if config.critic
            else ContextMLP(hidden, widths, hidden, encoder(period))
        )
        interface = Interface(m, scale=config.scale, **grounding)
    return TwoRates(fast, slow, interface, period, ticks)


class RatesLearner(BaseLearner):
    """Two networks in training on blocks of T² inputs; an update is a block.

    One optimizer holds all parameters; a turn of one net leaves the gradients of the other None, and the
    optimizer passes those over, so each net is stepped at its own rate.
    """

    averages = ("fast_wrong", "slow_wrong", "loss")
    fast_wrong: Tensor
    slow_wrong: Tensor
    loss: Tensor
    model: TwoRates

    def __init__(self, config: RatesConfig, data: Any, device: torch.device) -> None:
        super().__init__(config, data, device)
        self.model = build_model(config, data).to(device)
        self.modules = {"model": self.model}
        self.net, self.synthesizer = self.model.net_parameters(), self.model.synthesizer_parameters()
        groups = [{"params": self.net, "lr": config.lr}]
        if self.synthesizer:
            groups.append({"params": self.synthesizer, "lr": config.synthesizer_lr})
        self.optimizer = torch.optim.Adam(groups, fused=True)
        self.turns = self.model.decoupled if config.cut else self.model.lock_step
        self.batches = Batches(data, "train", config.bptt**2 * config.batch_size, device, config.seed)
        self.one_pass = self.batches.per_pass * self.batches.batch_size

    @staticmethod
    def build(config: RatesConfig, data: Any) -> TwoRates:
        return build_model(config, data)

    @staticmethod
    def block(data: Any, batches: Batches, number: int, period: int) -> Block:
        """Block `number` of a stream that is shuffled anew for every pass over the data."""
        x, labels = batches.batch(number)
        x, labels = (each.unflatten(0, (period, period, -1)) for each in (x, labels))
        return Block(x, *data.answers(labels))

    @staticmethod
    @torch.no_grad()
    def score(
        model: TwoRates, data: Any, split: Split, device: torch.device, level: int | None = None
    ) -> dict[str, float]:
        """Percentage of wrong answers of both nets (the mean), of A and of B, on the same blocks always."""
        period = model.period
        rows = min(EVALUATION_ROWS, len(data.split(split)[0]) // period**2)
        batches = Batches(data, split, period**2 * rows, device)
        blocks = min(-(-EVALUATION_STEPS // batches.batch_size), EVALUATION_PASSES * batches.per_pass)
        fast, slow = 0.0, 0.0
        for number in range(blocks):
            block = RatesLearner.block(data, batches, number, period)
            a, b = model(block.inputs)
            fast += float(wrong(a.flatten(0, 1), block.fast.flatten()))
            slow += float(wrong(b, block.slow))
        fast, slow = 100.0 * fast / (blocks * rows * period), 100.0 * slow / (blocks * rows)
        return {"error": (fast + slow) / 2.0, "error_fast": fast, "error_slow": slow}

    def update(self) -> None:
        config = self.config
        block = self.block(self.data, self.batches, self.step, config.bptt)
        for turn in self.turns(block):
            self.optimizer.zero_grad()
            turn.objective.backward()
            if config.clip:
                nn.utils.clip_grad_norm_(self.net, config.clip)
            self.optimizer.step()
            with torch.no_grad():
                if turn.fast:
                    self.fast_wrong = self.fast_wrong + wrong(*turn.fast)
                if turn.slow:
                    self.slow_wrong = self.slow_wrong + wrong(*turn.slow)
                self.loss = self.loss + turn.objective.detach()
        self.step += 1
        self.updates += 1
        self.symbols += self.batches.batch_size

    def metrics(self) -> dict[str, float]:
        config = self.config
        blocks = self.updates * config.batch_size
        fast = 100.0 * float(self.fast_wrong) / (blocks * config.bptt)
        slow = 100.0 * float(self.slow_wrong) / blocks
        row = {"error": (fast + slow) / 2.0, "error_fast": fast, "error_slow": slow}
        row["loss"] = float(self.loss) / self.updates
        for name, interface in self.model.interfaces().items():
            row[f"synthesizer_loss_{name}"] = float(interface.regression_loss)
        return row

    def check(self, row: dict[str, float]) -> None:
        super().check(row | {"error": row["loss"]})  # an error is finite when a loss is not
