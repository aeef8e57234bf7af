"""`dni-rnn sample`: text from a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Sample:
    """Sample text from a run's best weights."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    prompt: str = ""
    """Text that the model reads first. Empty: a character, drawn by its frequency in the training text."""
    chars: int = 300
    """Number of characters to sample."""
    temperature: float = 0.8
    """Below 1, likely characters are preferred; 1 samples the model's own distribution."""
    seed: int = 0
    """Seed of the sampling."""

    def __call__(self) -> None:
        from dni_rnn.training.inference import load_writer
        from dni_rnn.training.learner import choose_device
        from dni_rnn.training.sampling import sample

        loaded = load_writer(self.run, choose_device("cpu"))
        print(sample(loaded.model, loaded.data, self.prompt, self.chars, self.temperature, self.seed))
