"""`dni-rnn sample`: text from a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Sample:
    """Let a run's best weights write text."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    prompt: str = ""
    """Text that the model reads first. Empty: it starts from a character, drawn as in the training text."""
    chars: int = 300
    """How many characters to write."""
    temperature: float = 0.8
    """Below 1 the model prefers what it finds likely; 1 samples its own distribution."""
    seed: int = 0
    """Of the sampling."""

    def __call__(self) -> None:
        from dni_rnn.training.inference import load_writer
        from dni_rnn.training.learner import choose_device
        from dni_rnn.training.sampling import sample

        loaded = load_writer(self.run, choose_device("cpu"))
        print(sample(loaded.model, loaded.data, self.prompt, self.chars, self.temperature, self.seed))
