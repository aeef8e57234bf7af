"""A lumpy surface over the plane: the task of the first public decoupled system."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from dni_rnn.config import RunConfig
from dni_rnn.data.task import Split
from dni_rnn.errors import UsageError
from dni_rnn.metrics import RMSE, Metric

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dni_rnn.distributed.part import ProcessPart
    from dni_rnn.training.learner import Learner

GRID = {"train": 32, "valid": 48, "test": 64}
"""Points along each side of the grid that a split is measured on."""


@dataclass(frozen=True, kw_only=True)
class SurfaceConfig(RunConfig):
    """A run on the surface: two parts of two layers each, with a message between them."""

    metric: ClassVar[Metric] = RMSE
    depth_name: ClassVar[str] = "layers"
    amount: ClassVar[str] = "steps"

    width: int = 64
    """Units per layer."""
    steps: int = 6000
    """Updates. They set the learning-rate schedule, even if --minutes stops earlier."""
    batch_size: int = 128
    """Points per update."""
    lr: float = 3e-3
    """Adam's peak learning rate for both parts, with a cosine schedule to zero."""
    synthesizer_lr: float = 3e-3
    """Adam's peak learning rate for the oracle, with the same schedule."""
    queue: int = 4
    """Maximum number of messages that wait for their synthetic gradients."""
    delay: float = 0.0
    """Milliseconds by which every message is delayed, to simulate a slow network."""
    eval_every: int = 100_000
    """Training points between validations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("width", "steps", "batch_size", "lr", "synthesizer_lr", "queue")
        self._check_not_negative("delay")

    def for_world_size(self, processes: int) -> Self:
        """One process, or three: input part, oracle, output part."""
        if processes not in (1, 3) or self.processes not in (None, processes):
            raise UsageError(
                "surface trains in one process, or in three (input part, oracle, output part): --processes 3"
            )
        return self

    @property
    def method(self) -> str:
        return "dni" if self.processes is None else "oracle"

    @property
    def depth(self) -> int:
        return 4

    @property
    def folder(self) -> str:
        return self.method


@dataclass(frozen=True)
class Lumps:
    """A sum of Gaussians over [-1, 1] x [-1, 1], with mean 0 and deviation 1 there.

    Attributes:
      centres: (lumps, 2).
      widths, heights: each (lumps,).
      mean, deviation: those of the sum on a fine grid.
    """

    name: str
    centres: Tensor
    widths: Tensor
    heights: Tensor
    mean: float
    deviation: float
    input_symbols: int = 2
    """Number of inputs, noted in a run directory."""

    def __call__(self, x: Tensor) -> Tensor:
        """Height (B, 1) at x (B, 2)."""
        return (self._sum(x) - self.mean) / self.deviation

    def _sum(self, x: Tensor) -> Tensor:
        distance = (x.unsqueeze(1) - self.centres.to(x.device)).square().sum(2)  # (B, lumps)
        bumps = (-distance / (2 * self.widths.to(x.device) ** 2)).exp()
        return (bumps * self.heights.to(x.device)).sum(1, keepdim=True)

    def batch(self, number: int, size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Uniform random points (B, 2) and heights (B, 1); a function of its arguments alone."""
        import torch

        generator = torch.Generator().manual_seed(hash((seed, number)) % 2**63)
        x = torch.rand(size, 2, generator=generator) * 2 - 1
        return x.to(device), self(x).to(device)

    def grid(self, split: Split) -> tuple[Tensor, Tensor]:
        """Points (n·n, 2) of a grid and heights there (n·n, 1)."""
        x = square(GRID[split])
        return x, self(x)


def square(side: int) -> Tensor:
    """The centres of a side × side grid on [-1, 1] x [-1, 1], row by row: (side·side, 2)."""
    import torch

    along = (torch.arange(side) + 0.5) / side * 2 - 1
    return torch.cartesian_prod(along, along)


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A lumpy surface over the plane, learnt by an input part, an output part and an oracle between them.

    A sum of Gaussians. Points are drawn uniformly; the error is that on a grid, in units of its deviation.
    """

    config: ClassVar[type[SurfaceConfig]] = SurfaceConfig

    @staticmethod
    def learner() -> type[Learner]:
        from dni_rnn_tasks.surface_learner import SurfaceLearner

        return SurfaceLearner

    @staticmethod
    def part() -> type[ProcessPart]:
        from dni_rnn_tasks.surface_learner import SurfacePart

        return SurfacePart

    lumps: int = 12
    """Number of Gaussians."""

    def __post_init__(self) -> None:
        if self.lumps < 1:
            raise UsageError(f"--lumps must be positive, not {self.lumps}")

    def load(self, data_dir: Path | None) -> Lumps:
        """The surface, which depends only on the number of lumps; nothing is read."""
        import torch

        generator = torch.Generator().manual_seed(0)
        centres = torch.rand(self.lumps, 2, generator=generator) * 2 - 1
        widths = 0.1 + 0.2 * torch.rand(self.lumps, generator=generator)
        heights = torch.randn(self.lumps, generator=generator)
        raw = Lumps("", centres, widths, heights, 0.0, 1.0)(square(128))
        mean, deviation = float(raw.mean()), float(raw.std())
        return Lumps(f"surface/{self.lumps}", centres, widths, heights, mean, deviation)
