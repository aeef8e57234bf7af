"""`dni-rnn eval`: a run's score on a split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Eval:
    """Evaluate a run's best weights (lowest validation loss) on a split."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    split: Literal["valid", "test"] = "test"
    """Which split."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    data_dir: Path | None = None
    """Folder that holds the data files; the default is the run's."""

    def __call__(self) -> None:
        from dni_rnn.training.inference import load_run
        from dni_rnn.training.learner import choose_device
        from dni_rnn.training.learners import learner_class
        from dni_rnn.training.run_directory import Run

        loaded = load_run(self.run, choose_device(self.device), self.data_dir)
        run = Run.open(self.run)
        config = run.config
        scores = learner_class(run.task, config).score(
            loaded.model, loaded.data, self.split, loaded.device, loaded.level
        )
        print(
            f"{loaded.data.name} {self.split}: {', '.join(f'{v:.4f} {name}' for name, v in scores.items())} "
            f"after {loaded.symbols:,} training {config.metric.unit}s"
        )
