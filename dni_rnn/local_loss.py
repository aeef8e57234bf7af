"""Local losses: each part of a cut net learns from a loss at its own output, with no gradient from above.

Source: Nøkland and Eidnes 2019, "Training Neural Networks with Local Error Signals", arXiv:1901.06656.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.checks import coming
from dni_rnn.edges import attach

POOLED = 2048
"""Most features of a pooled feature map, as published."""


class LocalLoss(nn.Module):
    """The loss of a linear classifier on a message, and of the message's similarities, against the targets.

        loss = (1 − β) · pred + β · sim,   β = `similarity`
        pred = mean over rows of Σ_i −log softmax(classifier(pool(message)))[target_i],   i in [0, W), in nats
        sim  = mean over pairs of rows of (S(z) − S(one-hot targets))²
        S(z)_ij = cosine of z_i and z_j, each less its mean over features

    For a vector, z is a linear map of it to `projected` features; for a feature map, the standard deviation
    over positions of each channel of a 3×3 convolution to as many channels. pool is a mean over the smallest
    squares (intervals, cubes) that leave at most 2,048 features; a vector is not pooled. β = 0 uses the
    classifier alone, β = 1 the similarities. The classifier starts at zero. One backward pass trains the
    classifier, the map and whatever made the message.

    Over a few hundred updates similarities help fully connected layers and hinder convolutions
    (results/what-was-tried.md), so the default β is 0.99 for a vector and 0 for a feature map.

    Args:
      message: an example, (B, F), or (B, C, ...) with one to three spatial dimensions.
      symbols: number of distinct targets.
      window: targets per row, W.
      similarity: β; None: see above.
      projected: features of z, at most as many as the message has.

    Shapes: message like the example, context (B,) or (W, B), integers, -1 for an unknown target: it adds
    nothing to pred, and no pair of its row counts in sim. Returns a scalar.

    Attributes:
      value: the last loss (a scalar tensor; reading it need not wait for a device).
      loss_scale: see `Interface`; for `send`.

    Raises:
      ValueError: the message is no vector and no feature map; or, when called, the context is missing or has
        another size or type.

    Source: Nøkland and Eidnes 2019, arXiv:1901.06656: β = 0.99 is their "predsim", β = 0 their "pred". There
    z has as many features as the message, and the sides of the squares are powers of two.
    """

    value: Tensor
    loss_scale: Tensor | float | None = None

    def __init__(
        self,
        message: Tensor,
        symbols: int,
        window: int = 1,
        *,
        similarity: float | None = None,
        projected: int = 64,
    ) -> None:
        super().__init__()
        places = message.dim() - 2
        if not 0 <= places <= 3:
            raise ValueError(f"a local loss reads vectors and feature maps, not {tuple(message.shape)}")
        if similarity is None:
            similarity = 0.0 if places else 0.99
        if not 0.0 <= similarity <= 1.0:
            raise ValueError(f"similarity must lie between 0 and 1, not {similarity}")
        self.symbols, self.window, self.similarity = symbols, window, similarity
        width, sides = message.shape[1], message.shape[2:]
        self.pooling = 1
        while width * _pooled(sides, self.pooling) > POOLED and self.pooling < max(sides, default=1):
            self.pooling += 1
        self.classifier = nn.Linear(width * _pooled(sides, self.pooling), window * symbols)
        for parameter in self.classifier.parameters():
            nn.init.zeros_(parameter)
        convolution: Any = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[places]
        options: dict[str, Any] = {"kernel_size": 3, "padding": 1} if places else {}
        self.projection: nn.Module | None = None
        if similarity > 0.0:
            self.projection = convolution(width, min(width, projected), bias=False, **options)
        self.register_buffer("value", torch.zeros(()))

    def forward(self, message: Tensor, context: Any = None) -> Tensor:
        if context is None:
            raise ValueError("a local loss must be called with the targets as context")
        targets = coming(context, self.window, False, message.device).t()  # (B, W)
        if len(targets) != len(message):
            raise ValueError(f"the context has {len(targets)} rows, the message {len(message)}")
        loss = message.new_zeros(())
        if self.similarity < 1.0:
            loss = loss + (1.0 - self.similarity) * self._prediction(message, targets)
        if self.similarity > 0.0:
            loss = loss + self.similarity * self._similarity(message, targets)
        with torch.no_grad():
            self.value.copy_(loss)
        return loss

    def send(self, message: Tensor, context: Any = None) -> Tensor:
        """A scalar of value 0 whose gradient is that of the loss: as `Interface.send`."""
        return attach(self(message, context), self.loss_scale)

    def _prediction(self, message: Tensor, targets: Tensor) -> Tensor:
        if self.pooling > 1:
            pool: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[message.dim() - 3]
            message = pool(message, self.pooling, ceil_mode=True)
        logits = self.classifier(message.flatten(1)).unflatten(1, (self.window, self.symbols))
        summed = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
        return summed / max(len(message), 1)

    def _similarity(self, message: Tensor, targets: Tensor) -> Tensor:
        assert self.projection is not None
        z = self.projection(message)
        if z.dim() > 2:
            z = z.flatten(2)
            z = z.std(2, correction=0) if z.shape[2] > 1 else z.squeeze(2)
        wanted = targets.unsqueeze(2) == torch.arange(self.symbols, device=targets.device)
        known = (targets >= 0).all(1, keepdim=True)
        rows = directions(z) * known
        wanted = directions(wanted.flatten(1).to(z.dtype)) * known
        # Σ_ij (S_ij − S*_ij)² from products that are as wide as the rows, not as the batch.
        summed = _products(rows, rows) - 2.0 * _products(rows, wanted) + _products(wanted, wanted)
        return summed / known.sum().square().clamp_min(1)


def directions(rows: Tensor) -> Tensor:
    """Rows (B, features) less their means over features, of length 1; 0 for a row that is constant."""
    rows = rows - rows.mean(1, keepdim=True)
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(lengths > 0, lengths, 1.0)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Σ_ij (a_i·a_j)(b_i·b_j) over pairs of rows: the sum of squares of aᵀb."""
    return (a.t() @ b).square().sum()


def _pooled(sides: torch.Size, size: int) -> int:
    """Positions left of a map after pooling over `size`."""
    return math.prod(-(-side // size) for side in sides)


torch.serialization.add_safe_globals([LocalLoss])
