"""Entries of a sweep.toml or an about.toml that only the report reads.

A sweep.toml may have, above its [cells]:

    title = "Penn Treebank, characters"
    summary = "One line for the list of all results: what it is."
    note = "Markdown below the title: what was run."
    shows = "Markdown below the table: what came out."
    reference = "bptt T=20"        # report when the other cells reach this one's final score
    counted = true                 # in characters, too, not only in seconds

    [published]                    # below [cells]: an extra column
    "bptt T=20" = "1.42 (Jaderberg et al.)"

Results of another program have an about.toml with title, summary, note and shows, and a table.md.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dni_rnn.errors import UsageError
from dni_rnn.experiments.sweep import Cell
from dni_rnn.files import read_json, understood


@dataclass(frozen=True)
class About:
    """Entries of a sweep.toml or about.toml for the report. The default title is the folder's name."""

    title: str
    summary: str = ""
    note: str = ""
    shows: str = ""
    reference: str | None = None
    published: dict[str, str] = field(default_factory=dict)
    counted: bool = False
    speeds: dict[str, int] | None = None
    """Characters per second of each cell, if measured separately: `speed.json`."""

    def timed(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows, with seconds = symbols / `speeds` of their cell if these are given."""
        return [row if self.speeds is None else _retimed(row, self.speeds[row["cell"]]) for row in rows]


def read_about(folder: Path, cells: Sequence[Cell] | None = None) -> About:
    """The entries of `folder/sweep.toml` for the report; without `cells`, those of `folder/about.toml`.

    Raises:
      UsageError: it names a cell that the sweep does not have.
    """
    path = folder / ("about.toml" if cells is None else "sweep.toml")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: not TOML ({error})") from None
    with understood(folder / "speed.json"):
        speeds = _read_speeds(folder / "speed.json")
    about = About(
        values.get("title", folder.resolve().name),
        values.get("summary", ""),
        values.get("note", ""),
        values.get("shows", ""),
        values.get("reference"),
        values.get("published", {}),
        values.get("counted", False),
        speeds,
    )
    kinds = {"title": str, "summary": str, "note": str, "shows": str, "reference": str, "published": dict}
    for name, kind in kinds.items():
        if not isinstance(values.get(name, kind()), kind):
            raise UsageError(f"{path}: {name} is {values[name]!r}; correct it, or leave it out")
    if cells is None:
        return about
    missing = sorted({cell.name for cell in cells} - set(about.speeds or [cell.name for cell in cells]))
    if missing:
        raise UsageError(f"{folder / 'speed.json'} lacks {missing[0]!r}: measure it again")
    named = {*about.published, *([about.reference] if about.reference is not None else [])}
    unknown = sorted(named - {cell.name for cell in cells})
    if unknown:
        raise UsageError(f"{path}: {unknown[0]!r} is not one of its cells")
    return about


def _read_speeds(path: Path) -> dict[str, int] | None:
    return read_json(path)["cells"] if path.exists() else None


def _retimed(row: dict[str, Any], speed: int) -> dict[str, Any]:
    curve = [point | {"seconds": point["symbols"] / speed} for point in row["curve"]]
    return row | {"seconds": row["symbols"] / speed, "symbols_per_second": speed, "curve": curve}
