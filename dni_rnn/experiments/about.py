"""What a sweep.toml or an about.toml holds for the report alone.

A sweep.toml may say more than a sweep needs, above its [cells]:

    title = "Penn Treebank, characters"
    summary = "One line for the list of all results: what it is."
    note = "Markdown that goes under the title: what was run."
    shows = "Markdown that goes under the table: what came out."
    reference = "bptt T=20"        # how soon do the other cells get where this one ends?
    counted = true                 # after how many characters, too, not only after how many seconds

    [published]                    # below [cells]: an extra column
    "bptt T=20" = "1.42 (Jaderberg et al.)"

What another program has measured has an about.toml with title, summary, note and shows beside a table.md
of its own.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dni_rnn.atomic_files import read_json, understood
from dni_rnn.errors import UsageError
from dni_rnn.experiments.sweep import Cell


@dataclass(frozen=True)
class About:
    """What a sweep.toml or about.toml holds for the report alone. The title may be the folder's name."""

    title: str
    summary: str = ""
    note: str = ""
    shows: str = ""
    reference: str | None = None
    published: dict[str, str] = field(default_factory=dict)
    counted: bool = False
    speeds: dict[str, int] | None = None
    """Characters per second of each cell where they were measured apart: `speed.json`."""

    def timed(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows, with seconds of symbols / `speeds` of their cell where there are such."""
        return [row if self.speeds is None else _retimed(row, self.speeds[row["cell"]]) for row in rows]


def read_about(folder: Path, cells: Sequence[Cell] | None = None) -> About:
    """The part of `folder/sweep.toml` that is for the report; where there are no cells, `folder/about.toml`.

    Raises:
      UsageError: it speaks of a cell that the sweep does not have.
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
            raise UsageError(f"{path}: {name} is {values[name]!r}; mend it, or leave it out")
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
