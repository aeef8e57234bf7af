"""Labelled examples in memory, and batches of them made on the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dni_rnn.data.task import Split

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

SHIFT = 4
"""Largest shift of an augmented picture in either direction, per 32 pixels of height."""


@dataclass(frozen=True)
class Examples:
    """Inputs and targets of a task, in three splits.

    Attributes:
      name: name of the data in results.
      symbols: names of the classes, in the order of their numbers.
      train, valid, test: inputs (N, ...) uint8, and targets: class numbers (N,), or (N, bits) of 0 and 1.
      flips: pictures may be mirrored.
    """

    name: str
    symbols: tuple[str, ...]
    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    flips: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.train[0].shape[1:]

    @property
    def outputs(self) -> int:
        """Number of outputs of a net: a logit per class, or per bit."""
        targets = self.train[1]
        return len(self.symbols) if targets.ndim == 1 else targets.shape[1]

    def split(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a split."""
        return getattr(self, split)

    @functools.cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation over all training inputs; per channel for pictures."""
        import numpy as np

        inputs = self.train[0]
        over = (0, *range(2, inputs.ndim)) if inputs.ndim > 2 else (0, 1)
        mean = inputs.mean(over, dtype=np.float64)
        square = np.mean(inputs.astype(np.float32) ** 2, axis=over, dtype=np.float64)
        return mean, np.sqrt(square - mean**2)


def hold_out(
    inputs: np.ndarray, targets: np.ndarray, count: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Training and validation data: `count` examples, always the same, are held out."""
    import numpy as np

    order = np.random.Generator(np.random.Philox(0)).permutation(len(inputs))
    train, valid = order[:-count], order[-count:]
    return (inputs[train], targets[train]), (inputs[valid], targets[valid])


class Batches:
    """Batches of a split, held on a device as uint8 and normalised there.

        x = (input − mean) / deviation,   both from `Examples.moments`

    The order of a pass depends on the seed and the number of the pass alone; examples that do not fill a
    last batch are left out. Python handles no single example.

    Args:
      data: data of the task.
      split: which split.
      batch_size: rows.
      seed: seed of the orders.
      augment: shift pictures by up to `SHIFT` pixels per 32 (filled with black), and mirror half of them if
        the data allow it; uses torch's random state of the device.
    """

    def __init__(
        self,
        data: Examples,
        split: Split,
        batch_size: int,
        device: torch.device,
        seed: int = 0,
        augment: bool = False,
    ) -> None:
        import numpy as np
        import torch

        inputs, targets = data.split(split)
        self.batch_size = min(batch_size, len(inputs))
        self.per_pass = len(inputs) // self.batch_size
        self._inputs = torch.from_numpy(inputs).to(device)
        self._targets = torch.from_numpy(targets.astype(np.int64)).to(device)
        self._seed, self._augment, self._flips = seed, augment, data.flips
        self._pass, self._order = -1, torch.empty(0)
        mean, deviation = data.moments
        wide = (-1, *[1] * (inputs.ndim - 2))
        self._shift = torch.tensor(mean, dtype=torch.float32, device=device).reshape(wide)
        self._factor = torch.tensor(1.0 / deviation, dtype=torch.float32, device=device).reshape(wide)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Inputs (B, ...) float32 and targets of batch `number`, counted over all passes."""
        import numpy as np
        import torch

        number_of_pass, within = divmod(number, self.per_pass)
        if number_of_pass != self._pass:
            generator = np.random.Generator(np.random.Philox(key=[self._seed, number_of_pass]))
            order = torch.from_numpy(generator.permutation(len(self._inputs)))
            self._pass, self._order = number_of_pass, order.to(self._inputs.device)
        rows = self._order[within * self.batch_size : (within + 1) * self.batch_size]
        inputs = self._inputs[rows]
        if self._augment:
            inputs = shifted(inputs, self._flips)
        return self._numbers(inputs), self._targets[rows]

    def in_order(self, batch_size: int = 1000) -> Iterator[tuple[Tensor, Tensor]]:
        """All examples once, in their order, none left out."""
        for inputs, targets in zip(
            self._inputs.split(batch_size), self._targets.split(batch_size), strict=True
        ):
            yield self._numbers(inputs), targets

    def _numbers(self, inputs: Tensor) -> Tensor:
        return (inputs.float() - self._shift) * self._factor


def shifted(pictures: Tensor, flips: bool) -> Tensor:
    """Pictures (B, C, height, width), each moved by a random number of pixels, half of them mirrored."""
    import torch
    from torch.nn import functional as F

    rows, _, height, width = pictures.shape
    device, most = pictures.device, max(1, SHIFT * height // 32)
    padded = F.pad(pictures, [most] * 4)
    down, right = torch.randint(2 * most + 1, (2, rows, 1), device=device)
    across = torch.arange(width, device=device).expand(rows, width)
    if flips:
        mirrored = torch.rand(rows, 1, device=device) < 0.5
        across = torch.where(mirrored, width - 1 - across, across)
    y = (down + torch.arange(height, device=device))[:, :, None]  # (B, height, 1)
    x = (right + across)[:, None, :]  # (B, 1, width)
    return padded[torch.arange(rows, device=device)[:, None, None], :, y, x].permute(0, 3, 1, 2)
