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
    """Folder that holds the data files; the default is the run's. For a run on a text, a folder without that
    text counts as another text, as with --file."""
    file: Path | None = None
    """Another text for a run on a text, a file or a folder; all of it is evaluated."""

    def __call__(self) -> None:
        from dni_rnn.training.inference import load_elsewhere, load_run
        from dni_rnn.training.learner import choose_device
        from dni_rnn.training.learners import learner_class
        from dni_rnn.training.run_directory import Run

        run, file, what = Run.open(self.run), self.file, self.split
        find = getattr(run.task, "find", None)
        if file is None and self.data_dir is not None and find is not None and find(self.data_dir) is None:
            file = self.data_dir
        if file is None:
            loaded = load_run(self.run, choose_device(self.device), self.data_dir)
        else:
            loaded, unknown = load_elsewhere(self.run, choose_device(self.device), file)
            what = f"({len(loaded.data.test):,} symbols, {unknown})"
        scores = learner_class(run.task, run.config).score(
            loaded.model, loaded.data, self.split, loaded.device, loaded.level
        )
        print(
            f"{loaded.data.name} {what}: {', '.join(f'{v:.4f} {name}' for name, v in scores.items())} "
            f"after {loaded.symbols:,} training {run.config.metric.unit}s"
        )
