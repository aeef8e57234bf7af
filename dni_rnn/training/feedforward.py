"""The learner of feed-forward nets, for image tasks."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.config import FeedforwardConfig
from dni_rnn.data.labelled import Batches, Examples
from dni_rnn.data.task import Split
from dni_rnn.errors import UsageError
from dni_rnn.feedforward import Decoupled, agreement, decouple
from dni_rnn.nets import cnn, fcn, sigmoid_net, vgg
from dni_rnn.synthesizers import ErrorFeedback
from dni_rnn.training.learner import Learner, TrainingRecord, adam, begin, cosine_schedule

WARM_UP = 0.15
"""Fraction of a training by the fast recipe in which the learning rate rises."""

UNLOCK_HIDDEN = (256,)
"""Hidden layers of a synthetic input; one, as published."""


def build_net(config: FeedforwardConfig, data: Examples) -> nn.Sequential:
    """The uncut net that `config` describes, one module per layer."""
    config = config.resolved
    assert config.width is not None
    features = math.prod(data.shape)
    if config.model in ("cnn", "vgg"):
        if len(data.shape) != 3:
            raise UsageError(f"--model {config.model} needs pictures; {data.name} has none")
        if config.model == "vgg":
            return vgg(data.shape, data.outputs, config.width)
        return cnn(data.shape, data.outputs, config.layers, config.width)
    kind = fcn if config.model == "mlp" else sigmoid_net
    return kind(features, data.outputs, config.layers, config.width)


def build_model(config: FeedforwardConfig, data: Examples) -> Decoupled:
    """The cut net with its synthesizers."""
    config = config.resolved
    window, classes = (1, data.outputs) if data.train[1].ndim == 1 else (data.outputs, 2)
    error = functools.partial(ErrorFeedback, symbols=classes, window=window)
    return decouple(
        build_net(config, data),
        config.cut_positions,
        torch.zeros(2, *data.shape),
        classes,
        config.method,
        hidden=config.synthesizer_hidden,
        window=window,
        update_probability=config.update_probability,
        unlock=UNLOCK_HIDDEN if config.unlock else None,
        synthesizer=error if config.synthesizer == "error" else None,
    )


def memory_format(config: FeedforwardConfig) -> torch.memory_format:
    """Convolutions are faster with channels last."""
    return torch.channels_last if config.model in ("cnn", "vgg") else torch.contiguous_format


def loss_of(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over rows of −log p(target) in nats, summed over bits where a target is bits.

    Smoothing s: a right class counts 1 − s + s / classes, a wrong one s / classes; bits as two classes.
    """
    if targets.dim() == 1:
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)
    wanted = targets.to(logits.dtype) * (1.0 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / len(logits)


def wrong(logits: Tensor, targets: Tensor) -> Tensor:
    """Number of wrongly classified rows; where targets are bits, all must be right."""
    if targets.dim() == 1:
        return (logits.argmax(1) != targets).sum()
    return ((logits > 0) != targets.bool()).any(1).sum()


def context_of(targets: Tensor) -> Tensor:
    """The targets as the context of synthesizers: (B,), or (bits, B)."""
    return targets if targets.dim() == 1 else targets.t()


def planned_updates(config: FeedforwardConfig, batches: Batches) -> int:
    """Number of updates in the learning-rate schedule: those of `epochs`, or `steps`."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return max(1, round(config.epochs * batches.per_pass))


def rate_factor(config: FeedforwardConfig, step: int, steps: int) -> float:
    """Factor on the learning rates of update `step` of `steps`.

    Fast recipe: linear warm-up over the first 15 % of the updates, then a cosine schedule to zero. Recipe of
    the paper: divided by ten after 60 % and again after 80 %.
    """
    done = step / steps
    if config.recipe == "paper":
        return 0.1 ** ((done >= 0.6) + (done >= 0.8))
    if done < WARM_UP:
        return (step + 1) / (WARM_UP * steps + 1)
    return cosine_schedule((done - WARM_UP) / (1.0 - WARM_UP))


@torch.no_grad()
def error_rate(model: nn.Module, data: Examples, split: Split, device: torch.device) -> float:
    """Percentage of a split that is classified wrongly."""
    training = model.training
    model.eval()
    batches = Batches(data, split, 1, device)
    errors = [(wrong(model(x), y), len(y)) for x, y in batches.in_order()]
    model.train(training)
    return 100.0 * float(sum(e for e, _ in errors)) / sum(n for _, n in errors)


class FeedforwardLearner(Learner):
    """Trains a cut feed-forward net on labelled examples.

    Learning rates follow `rate_factor`. The test error is that of the weights with the lowest validation
    error.
    """

    model: Decoupled

    def __init__(self, config: FeedforwardConfig, data: Examples, device: torch.device) -> None:
        config = config.resolved
        super().__init__(config, data, device)
        begin(config)
        self.layout = memory_format(config)
        self.model = build_model(config, data).to(device)
        self.model.to(memory_format=self.layout)  # pyright: ignore[reportCallIssue]
        net, synthesizer = self.model.net_parameters(), self.model.synthesizer_parameters()
        optimizer = adam([(net, config.lr or 0.0), (synthesizer, config.synthesizer_lr or 0.0)], device)
        self.record = TrainingRecord(
            {"model": self.model}, net, synthesizer, optimizer, ("loss", "wrongs"), device
        )
        # Python draws which layers take part in an update, so such an update cannot be replayed.
        self._run = self.recorded(self._work) if config.update_probability == 1.0 else self._work
        self.batches = Batches(data, "train", config.batch_size, device, config.seed, config.augment)
        self.steps = planned_updates(config, self.batches)
        self.one_pass = self.steps * self.batches.batch_size
        self.agreements: dict[str, float] = {}

    @staticmethod
    def build(config: FeedforwardConfig, data: Examples) -> Decoupled:
        return build_model(config, data)

    @staticmethod
    def score(
        model: Decoupled, data: Examples, split: Split, device: torch.device, level: int | None = None
    ) -> dict[str, float]:
        return {"error": error_rate(model, data, split, device)}

    @property
    def ended(self) -> bool:
        return self.counters.step >= self.steps

    def update(self) -> None:
        config, counters = self.config, self.counters
        x, targets = self.batches.batch(counters.step)
        self.record.set_rates(rate_factor(config, counters.step, self.steps))
        if config.agreement_every and counters.step % config.agreement_every == 0:
            self._measure(x, targets)
        self._run([x, targets])
        counters.advance(len(x))

    def _work(self, batch: list[Tensor]) -> None:
        """The device work of an update, in place."""
        x, targets = batch
        averages = self.record.averages
        x = x.contiguous(memory_format=self.layout)
        with self.autocast():
            logits = self.model(x, context_of(targets))
            loss = loss_of(logits, targets, self.config.smoothing)
        self.record.optimizer.zero_grad()
        loss.backward()
        self.record.optimizer.step()
        with torch.no_grad():
            averages["loss"].add_(loss)
            averages["wrongs"].add_(wrong(logits, targets))

    def _measure(self, x: Tensor, targets: Tensor) -> None:
        found = agreement(
            self.model, x, context_of(targets), lambda out: loss_of(out, targets, self.config.smoothing)
        )
        for cut, each in enumerate(found, start=1):
            self.agreements |= {f"{name}_{cut}": value for name, value in each._asdict().items()}

    def metrics(self) -> dict[str, float]:
        averages, updates = self.record.averages, self.counters.updates
        examples = updates * self.batches.batch_size
        row = {
            "error": 100.0 * float(averages["wrongs"]) / examples,
            "loss": float(averages["loss"]) / updates,
        }
        interfaces: Any = self.model.interfaces
        for cut, interface in enumerate(interfaces, start=1):
            row[f"synthesizer_loss_{cut}"] = float(interface.regression_loss)
        losses: Any = self.model.losses
        for cut, loss in enumerate(losses, start=1):
            row[f"local_loss_{cut}"] = float(loss.value)
        return row | self.agreements
