"""`dni-rnn export`: a run's net for plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Export:
    """Write a run's best weights for plain torch, which loads them without this package.

    Makes a folder with model.safetensors, model.json (modules, symbols, figures) and a model card, README.md.
    """

    run: tyro.conf.Positional[Path]
    """Run directory."""
    out: Path | None = None
    """Folder to write; the default is export/ in the run directory."""
    overwrite: bool = False
    """Replace an earlier export there."""
    data_dir: Path | None = None
    """Folder that holds the data files; the default is the run's. Not needed for a run on a text."""

    def __call__(self) -> None:
        from dni_rnn.training.export import export_run

        print(export_run(self.run, self.out or self.run / "export", self.overwrite, self.data_dir))
