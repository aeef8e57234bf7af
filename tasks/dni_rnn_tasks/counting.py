"""Counting digits with two networks at different rates.

Jaderberg et al. 2017, §3.2, do not say over what A counts, when B answers, or where a stream begins. Chosen
here: a block of T² digits is a sequence, both states begin it at zero; A answers after every T digits, with
the odd ones of the block so far, so it has to carry its count across its own windows; B answers once, after
its T messages, so the gradient of an early message has to come back through all later ticks. Each answer is
one of T² + 1 classes. With T = 4, always saying the likeliest is wrong in 73 % of A's answers and 68 % of
B's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dni_rnn.config import Preset, RatesConfig
from dni_rnn.data.labelled import Examples
from dni_rnn_tasks.images import MNIST

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CountedDigits(Examples):
    """Digits, of which one network counts the odd ones and the other the 3s."""

    def answers(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """labels (windows, steps, B) -> odd digits so far after each window (windows, B); 3s in all (B,)."""
        return (labels % 2).sum(1).cumsum(0), (labels == 3).sum((0, 1))


@dataclass(frozen=True, kw_only=True)
class Counting:
    """Two networks at different rates count in a stream of MNIST digits.

    Network A sees every digit; after every T of them it says how many were odd, and sends network B a
    message. B sees only the messages; after T of them it says how many 3s were among the T² digits. Both
    begin anew after T² digits.
    """

    config: ClassVar[type[RatesConfig]] = RatesConfig
    presets: ClassVar = {
        "default": Preset(run={"eval_every": 100_000}),
        "paper": Preset(
            run={"hidden": 256, "lr": 1e-5, "digits": 100_000_000},
            dni={
                "synthesizer_lr": 1e-5, "context": "none", "critic": False, "synthesizer": "mlp",
                "scale": 10.0, "centre": False, "restore": 0.0,
            },
        ),
    }  # fmt: skip

    def load(self, data_dir: Path | None) -> CountedDigits:
        """MNIST; see `dni_rnn_tasks.images`."""
        digits = MNIST().load(data_dir)
        return CountedDigits("counting/mnist", digits.symbols, digits.train, digits.valid, digits.test)
