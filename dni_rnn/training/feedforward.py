"""Feed-forward nets in training: the learner that image tasks bring to the training loop."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.config import FeedforwardConfig
from dni_rnn.data.labelled import Batches, Examples
from dni_rnn.data.task import Split
from dni_rnn.errors import UsageError
from dni_rnn.feedforward import Decoupled, agreement, cnn, decouple, fcn, sigmoid_net, vgg
from dni_rnn.training.loop import BaseLearner, cosine

WARM_UP = 0.15
"""Share of a fast training in which the learning rate rises."""

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
    spec = config.synthesizer_spec
    window, classes = (1, data.outputs) if data.train[1].ndim == 1 else (data.outputs, 2)
    return decouple(
        build_net(config, data),
        config.cut_positions,
        torch.zeros(2, *data.shape),
        classes,
        config.method,
        hidden=None if spec is None else spec.hidden,
        window=window,
        update_probability=config.update_probability,
        unlock=UNLOCK_HIDDEN if config.unlock else None,
    )


def loss_of(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over rows of −log p(target) in nats, summed over bits where a target is bits.

    Smoothing s: a right class counts 1 − s + s / classes, a wrong one s / classes; bits as two classes.
    """
    if targets.dim() == 1:
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)
    wanted = targets.to(logits.dtype) * (1.0 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / len(logits)


def wrong(logits: Tensor, targets: Tensor) -> Tensor:
    """How many rows are classified wrongly; of bits, all must be right."""
    if targets.dim() == 1:
        return (logits.argmax(1) != targets).sum()
    return ((logits > 0) != targets.bool()).any(1).sum()


def context_of(targets: Tensor) -> Tensor:
    """The targets as synthesizers are told them: (B,), or position by position (bits, B)."""
    return targets if targets.dim() == 1 else targets.t()


class LayeredLearner(BaseLearner):
    """A cut feed-forward net in training on labelled examples.

    Learning rates of the fast recipe rise linearly over the first 15 % of the updates and then fall to
    zero along a cosine; those of the paper fall to a tenth after 60 % and again after 80 %. Test error is
    that of the weights with the lowest validation error.
    """

    averages = ("loss", "wrongs")
    loss: Tensor
    wrongs: Tensor
    model: Decoupled

    def __init__(self, config: FeedforwardConfig, data: Examples, device: torch.device) -> None:
        config = config.resolved
        super().__init__(config, data, device)
        # Convolutions are faster where the channels of a place lie side by side.
        pictures = config.model in ("cnn", "vgg")
        self.layout = torch.channels_last if pictures else torch.contiguous_format
        self.model = build_model(config, data).to(device)
        self.model.to(memory_format=self.layout)  # pyright: ignore[reportCallIssue]
        self.modules = {"model": self.model}
        self.net, self.synthesizer = self.model.net_parameters(), self.model.synthesizer_parameters()
        groups = [{"params": self.net, "lr": config.lr}]
        if self.synthesizer:
            groups.append({"params": self.synthesizer, "lr": config.synthesizer_lr})
        self.optimizer = self.adam(groups)
        # Which layers take part in an update is drawn in Python, so it cannot be replayed.
        self._run = self.recorded(self._work) if config.update_probability == 1.0 else self._work
        self.batches = Batches(data, "train", config.batch_size, device, config.seed, config.augment)
        assert config.epochs is not None
        self.steps = max(1, round(config.epochs * self.batches.per_pass))
        self.one_pass = self.steps * self.batches.batch_size
        self.agreements: dict[str, float] = {}

    @staticmethod
    def build(config: FeedforwardConfig, data: Examples) -> Decoupled:
        return build_model(config, data)

    @staticmethod
    @torch.no_grad()
    def score(
        model: Decoupled, data: Examples, split: Split, device: torch.device, level: int | None = None
    ) -> dict[str, float]:
        """Percentage of a split that is classified wrongly."""
        training = model.training
        model.eval()
        batches = Batches(data, split, 1, device)
        errors = [(wrong(model(x), y), len(y)) for x, y in batches.in_order()]
        model.train(training)
        return {"error": 100.0 * float(sum(e for e, _ in errors)) / sum(n for _, n in errors)}

    def update(self) -> None:
        config = self.config
        x, targets = self.batches.batch(self.step)
        self.set_rates(self.rate())
        if config.agreement_every and self.step % config.agreement_every == 0:
            self._measure(x, targets)
        self._run(x, targets)
        self.step += 1
        self.updates += 1
        self.symbols += len(x)

    def _work(self, x: Tensor, targets: Tensor) -> None:
        """What an update does on the device, in place."""
        x = x.contiguous(memory_format=self.layout)
        with self.autocast():
            logits = self.model(x, context_of(targets))
            loss = loss_of(logits, targets, self.config.smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.loss.add_(loss)
            self.wrongs.add_(wrong(logits, targets))

    def rate(self) -> float:
        """Factor on the learning rates of the coming update."""
        done = self.step / self.steps
        if self.config.recipe == "paper":
            return 0.1 ** ((done >= 0.6) + (done >= 0.8))
        if done < WARM_UP:
            return (self.step + 1) / (WARM_UP * self.steps + 1)
        return cosine((done - WARM_UP) / (1.0 - WARM_UP))

    def _measure(self, x: Tensor, targets: Tensor) -> None:
        found = agreement(
            self.model, x, context_of(targets), lambda out: loss_of(out, targets, self.config.smoothing)
        )
        for cut, each in enumerate(found, start=1):
            self.agreements[f"cosine_{cut}"] = each.cosine
            self.agreements[f"explained_{cut}"] = each.explained
            self.agreements[f"trust_{cut}"] = each.trust

    def metrics(self) -> dict[str, float]:
        examples = self.updates * self.batches.batch_size
        row = {"error": 100.0 * float(self.wrongs) / examples, "loss": float(self.loss) / self.updates}
        interfaces: Any = self.model.interfaces
        for cut, interface in enumerate(interfaces, start=1):
            row[f"synthesizer_loss_{cut}"] = float(interface.regression_loss)
        return row | self.agreements

    def check(self, row: dict[str, float]) -> None:
        super().check(row | {"error": row["loss"]})  # an error is finite when a loss is not
