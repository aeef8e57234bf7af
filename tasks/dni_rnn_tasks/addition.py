"""Addition of binary numbers, the standard tutorial task of synthetic gradients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from dni_rnn.config import FeedforwardConfig
from dni_rnn.data.labelled import Examples, hold_out
from dni_rnn.errors import UsageError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class AdditionConfig(FeedforwardConfig):
    """A run on addition: by default a sigmoid net of 3 layers."""

    model: Literal["mlp", "sigmoid"] = "sigmoid"
    """sigmoid: Linear-Sigmoid; mlp: Linear-BN-ReLU."""
    layers: int = 3
    """Layers, including the last."""
    width: int | None = 64
    """Units per hidden layer."""
    epochs: float | None = 100.0
    """Passes over the training data."""
    lr: float | None = 2e-2
    """Adam's peak learning rate for the net."""
    synthesizer_lr: float | None = 3e-2
    """Adam's peak learning rate for the synthesizers."""
    batch_size: int = 64
    """Rows per update."""


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Sum of two binary numbers: a sigmoid net of 3 layers, cut between them.

    All pairs of numbers of `bits` bits, a fifth of them held out for validation and a fifth for the test.
    A row is right if every bit of the sum is.
    """

    config: ClassVar[type[FeedforwardConfig]] = AdditionConfig

    bits: int = 6
    """Bits of each number."""

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 10:
            raise UsageError(f"--bits must lie between 2 and 10, not {self.bits}")

    def load(self, data_dir: Path | None) -> Examples:
        """All pairs; nothing is read."""
        import numpy as np

        numbers = np.arange(1 << self.bits)
        a, b = (part.ravel() for part in np.meshgrid(numbers, numbers))
        inputs = np.concatenate([_bits(a, self.bits), _bits(b, self.bits)], axis=1)
        sums = _bits(a + b, self.bits + 1)
        fifth = len(inputs) // 5
        rest, test = hold_out(inputs, sums, fifth)
        train, valid = hold_out(*rest, fifth)
        return Examples(f"addition/{self.bits}", ("0", "1"), train, valid, test)


def _bits(numbers: np.ndarray, count: int) -> np.ndarray:
    """(N, count), the highest bit first."""
    import numpy as np

    return (numbers[:, None] >> np.arange(count)[::-1] & 1).astype(np.uint8)
