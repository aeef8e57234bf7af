"""The learner of two networks at different rates, on blocks of digits."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dni_rnn.cores.lstm import LSTM
from dni_rnn.data.labelled import Batches
from dni_rnn.data.task import Split
from dni_rnn.interface import Interface
from dni_rnn.penalty import StatePenalty
from dni_rnn.synthesizers import ContextMLP, Critic, MLPSynthesizer, OneHotTokens, units
from dni_rnn.training.feedforward import wrong
from dni_rnn.training.learner import Learner, TrainingRecord, adam, begin
from dni_rnn.two_rates import Cut, DigitBlock, FastNet, SlowNet, TwoRates

if TYPE_CHECKING:
    from dni_rnn_tasks.counting import CountingConfig

EVALUATION_STEPS, EVALUATION_PASSES = 40_000, 10
"""Inputs that one validation reads, in shuffled passes over the split, and the maximum of passes."""

EVALUATION_ROWS = 256

DIGITS = 1_200_000
"""Default length of a run."""


def build_model(config: CountingConfig, data: Any) -> TwoRates:
    """The two networks that `config` describes, with their cuts."""
    config = config.resolved
    period, hidden, outputs = config.bptt, config.hidden, config.bptt**2 + 1
    ticks = config.ticks or period
    widths = units(config.synthesizer_hidden, hidden)
    fast = FastNet(math.prod(data.shape), outputs, hidden, LSTM(hidden, hidden))
    slow = SlowNet(outputs, hidden, LSTM(hidden, hidden))
    used = {"fast": True, "slow": ticks < period, "message": True}
    synthesizers: dict[str, nn.Module] = {}

    def encoder(places: int) -> OneHotTokens | None:
        return OneHotTokens(outputs, places) if config.context == "targets" else None

    if config.dni:
        state = fast.core.initial_state(1)
        synthesizers["fast"] = MLPSynthesizer(state, widths, context=encoder(2 * period))
        synthesizers["slow"] = MLPSynthesizer(state, widths, context=encoder(period))
        synthesizers["message"] = (
            Critic(ContextMLP(hidden, widths, period * outputs), outputs)
            if config.critic
            else ContextMLP(hidden, widths, hidden, encoder(period))
        )

    def cut(name: str) -> Cut:
        if not used[name]:
            return Cut()
        scale = config.scale if name == "message" else 1.0
        m = synthesizers.get(name)
        interface = None if m is None else Interface(m, scale=scale, centre=config.centre)
        return Cut(interface, StatePenalty(config.restore) if config.restore else None)

    return TwoRates(fast, slow, {name: cut(name) for name in used}, period, ticks)


class CountingLearner(Learner):
    """Trains two networks on blocks of T² inputs; an update is a block.

    One optimizer holds all parameters; a turn of one net leaves the gradients of the other None, and the
    optimizer skips those, so each net is stepped at its own rate.
    """

    model: TwoRates

    def __init__(self, config: CountingConfig, data: Any, device: torch.device) -> None:
        super().__init__(config, data, device)
        begin(config)
        self.model = build_model(config, data).to(device)
        net, synthesizer = self.model.net_parameters(), self.model.synthesizer_parameters()
        optimizer = adam([(net, config.lr), (synthesizer, config.synthesizer_lr)], device)
        averages = ("fast_wrong", "slow_wrong", "loss")
        self.record = TrainingRecord({"model": self.model}, net, synthesizer, optimizer, averages, device)
        self.turns = self.model.lock_step
        if config.cut:
            self.turns = functools.partial(self.model.decoupled, correct=config.correct)
        self.batches = Batches(data, "train", config.bptt**2 * config.batch_size, device, config.seed)
        self.one_pass = DIGITS

    @staticmethod
    def build(config: CountingConfig, data: Any) -> TwoRates:
        return build_model(config, data)

    @staticmethod
    def block(data: Any, batches: Batches, number: int, period: int) -> DigitBlock:
        """Block `number` of a stream that is reshuffled for every pass over the data."""
        x, labels = batches.batch(number)
        x, labels = (each.unflatten(0, (period, period, -1)) for each in (x, labels))
        return DigitBlock(x, *data.answers(labels))

    @staticmethod
    @torch.no_grad()
    def score(
        model: TwoRates, data: Any, split: Split, device: torch.device, level: int | None = None
    ) -> dict[str, float]:
        """Percentage of wrong answers of both nets (the mean), of A and of B, always on the same blocks."""
        period = model.period
        rows = min(EVALUATION_ROWS, len(data.split(split)[0]) // period**2)
        batches = Batches(data, split, period**2 * rows, device)
        blocks = min(-(-EVALUATION_STEPS // batches.batch_size), EVALUATION_PASSES * batches.per_pass)
        fast, slow = 0.0, 0.0
        for number in range(blocks):
            block = CountingLearner.block(data, batches, number, period)
            a, b = model(block.inputs)
            fast += float(wrong(a.flatten(0, 1), block.fast.flatten()))
            slow += float(wrong(b, block.slow))
        fast, slow = 100.0 * fast / (blocks * rows * period), 100.0 * slow / (blocks * rows)
        return {"error": (fast + slow) / 2.0, "error_fast": fast, "error_slow": slow}

    def update(self) -> None:
        config, counters, record = self.config, self.counters, self.record
        averages = record.averages
        block = self.block(self.data, self.batches, counters.step, config.bptt)
        for turn in self.turns(block):
            record.optimizer.zero_grad()
            turn.backward()
            if config.clip:
                nn.utils.clip_grad_norm_(record.net, config.clip)
            record.optimizer.step()
            with torch.no_grad():
                if turn.fast:
                    averages["fast_wrong"] += wrong(*turn.fast)
                if turn.slow:
                    averages["slow_wrong"] += wrong(*turn.slow)
                if turn.objective is not None:
                    averages["loss"] += turn.objective.detach()
        counters.advance(self.batches.batch_size)

    def metrics(self) -> dict[str, float]:
        config, averages, updates = self.config, self.record.averages, self.counters.updates
        blocks = updates * config.batch_size
        fast = 100.0 * float(averages["fast_wrong"]) / (blocks * config.bptt)
        slow = 100.0 * float(averages["slow_wrong"]) / blocks
        row = {"error": (fast + slow) / 2.0, "error_fast": fast, "error_slow": slow}
        row["loss"] = float(averages["loss"]) / updates
        for name, interface in self.model.interfaces().items():
            row[f"synthesizer_loss_{name}"] = float(interface.regression_loss)
        return row
