"""The comparison at the top of the results of a folder, and its picture.

Both are made from rows of several sweeps, as the folder's about.toml says:

    findings = ["What came out, as a line of Markdown.", ...]

    [comparison]
    note = "Markdown that goes under the table."
    columns = ["truncated BPTT", "published"]
    [comparison.rows]
    "Copy, T = 5" = ["copy/bptt T=5", "copy/dni T=5 (published)"]    # folder/cell; "" where there is none

    [[panels]]                                                       # of headline.svg
    title = "Yes: no window that can be afforded is long enough"
    label = "below the axis; without it, the metric"
    points = {"truncated, T = 5" = "copy/bptt T=5"}
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dni_rnn.errors import UsageError
from dni_rnn.experiments.about import About, read_about
from dni_rnn.experiments.plots import Dot, DotPanel
from dni_rnn.experiments.report import by_cell, markdown_table, mean_sd
from dni_rnn.experiments.sweep import read_rows, read_sweep
from dni_rnn.metrics import Metric, metric_of

PUBLISHED = " (published)"

PICTURE = "headline.svg"


@dataclass(frozen=True)
class Headline:
    """The entries of about.toml for the headline; each may be missing."""

    findings: list[str] = field(default_factory=list)
    comparison: dict[str, Any] = field(default_factory=dict)
    panels: list[dict[str, Any]] = field(default_factory=list)


def read_headline(folder: Path) -> Headline:
    """The entries of `folder/about.toml` for the headline."""
    values = tomllib.loads((folder / "about.toml").read_text(encoding="utf-8"))
    return Headline(values.get("findings", []), values.get("comparison", {}), values.get("panels", []))


class Cells:
    """Cells by `folder/cell`, for all sweeps below a folder."""

    def __init__(self, folder: Path) -> None:
        self._sweep = cache(lambda name: self._read(folder / name))

    @staticmethod
    def _read(folder: Path) -> tuple[About, dict[str, list[dict[str, Any]]]]:
        cells = read_sweep(folder)
        return read_about(folder, cells), by_cell(cells, read_rows(folder))

    def __getitem__(self, reference: str) -> tuple[About, list[dict[str, Any]]]:
        """The sweep's About and the rows of the cell; no rows where it has not been run."""
        folder, _, cell = reference.partition("/")
        about, groups = self._sweep(folder)
        if cell not in groups:
            raise UsageError(f"about.toml: {reference!r} is no cell of {folder}/sweep.toml")
        return about, groups[cell]

    def scores(self, reference: str) -> tuple[list[float], Metric] | None:
        """The score of each seed of a cell; None if it has not been run."""
        _, rows = self[reference]
        if not rows:
            return None
        metric = metric_of(rows[0])
        return [row[metric.score_key] for row in rows], metric


def comparison_table(folder: Path, comparison: dict[str, Any]) -> str:
    """The table as Markdown: a line for each task, a column for each method.

    A value shows its n unless that is 3 (with ± sd) or 1 (without), and its T if it differs from that of the
    first column.
    """
    cells = Cells(folder)
    lines = []
    for task, references in comparison["rows"].items():
        found = [cells.scores(r) for r in references if r and not r.endswith(PUBLISHED)]
        metric = next(each[1] for each in found if each is not None)
        first = _window(cells, references[0])
        label = f"{task}: {metric.label}, {'lower' if metric.lower_is_better else 'higher'} is better"
        lines.append([label, *(_entry(cells, reference, first) for reference in references)])
    return markdown_table(["", *comparison["columns"]], lines)


def _entry(cells: Cells, reference: str, first: int | None) -> str:
    if not reference:
        return "–"
    if reference.endswith(PUBLISHED):
        name = reference.removesuffix(PUBLISHED)
        return f"*{cells[name][0].published[name.partition('/')[2]]}*"
    found = cells.scores(reference)
    if found is None:
        return "not run"
    values, metric = found
    text = mean_sd(values, metric.digits).removesuffix(" ± –")
    about = [] if len(values) in (1, 3) else [f"n = {len(values)}"]
    window = _window(cells, reference)
    about += [f"T = {window}"] if window != first else []
    return f"{text} ({', '.join(about)})" if about else text


def _window(cells: Cells, reference: str) -> int | None:
    _, rows = cells[reference]
    return rows[0]["config"].get("bptt") if rows else None


def dot_panels(folder: Path, panels: list[dict[str, Any]]) -> list[DotPanel]:
    """The contents of `PICTURE`: a panel for each question, a dot for each cell."""
    cells = Cells(folder)
    drawn = []
    for panel in panels:
        dots, label = [], ""
        for name, reference in panel["points"].items():
            found = cells.scores(reference)
            if found is not None:
                values, metric = found
                sd = stdev(values) if len(values) > 1 else 0.0
                dots.append(Dot(name, fmean(values), sd, mean_sd(values, metric.digits).removesuffix(" ± –")))
                direction = "lower" if metric.lower_is_better else "higher"
                label = f"{metric.score_label} ({direction} is better)"
        drawn.append(DotPanel(panel["title"], panel.get("label", label), dots))
    return drawn
