"""`dni-rnn report`: tables, plots and pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Report:
    """Write the table, the plots and the page of a sweep, or the overview of a folder of sweeps."""

    folder: tyro.conf.Positional[Path]
    """Folder with a sweep.toml and its rows.jsonl, or with an about.toml: table.md, report.html and more are
    written there. For a folder of such folders: all of them, and its README.md."""

    def __call__(self) -> None:
        from dni_rnn.experiments.results_page import write_reports

        write_reports(self.folder)
