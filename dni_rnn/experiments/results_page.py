"""All results of a folder: every report in it, and a README.md that shows them at a glance.

The folder has an about.toml with a title and a note of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from posixpath import normpath
from typing import Any

from dni_rnn.errors import UsageError
from dni_rnn.experiments.about import About, read_about
from dni_rnn.experiments.html_page import render_page
from dni_rnn.experiments.report import (
    by_cell,
    markdown_table,
    mean_sd,
    write_report,
    write_text,
)
from dni_rnn.experiments.sweep import Cell, read_rows, read_sweep
from dni_rnn.metrics import metric_of


def write_reports(folder: Path) -> None:
    """The report of a sweep; the page of what another program has measured; or all that are in `folder`.

    Raises:
      UsageError: there is nothing to report.
    """
    if (folder / "sweep.toml").exists() or not (folder / "about.toml").exists():
        write_report(folder)
    elif (folder / "table.md").exists():
        table = (folder / "table.md").read_text(encoding="utf-8")
        write_text(folder / "report.html", render_page(table, folder))
        print(f"{folder}: table.md -> report.html")
    elif parts := result_folders(folder):
        for part in filter(_measured, parts):
            write_reports(part)
        write_text(folder / "README.md", render_index(folder))
        print(f"{folder}: {len(parts)} folders -> README.md")
    else:
        raise UsageError(f"{folder}: no table.md there yet; run what makes it first")


def result_folders(folder: Path) -> list[Path]:
    """The folders in `folder` that have results, or will have them."""
    return sorted(
        path
        for path in folder.iterdir()
        if any((path / name).exists() for name in ("sweep.toml", "about.toml"))
    )


def _measured(folder: Path) -> bool:
    if (folder / "sweep.toml").exists():
        return bool(read_rows(folder))  # a sweep that was stopped early leaves an empty rows.jsonl
    return (folder / "table.md").exists()


def render_index(folder: Path) -> str:
    """The contents of README.md: all folders in `folder` at a glance, a pure function of what is in them."""
    about = read_about(folder)
    parts, planned = [f"# {about.title}\n", about.note.strip() + "\n"], []
    for part in result_folders(folder):
        name = part.name
        cells = read_sweep(part) if (part / "sweep.toml").exists() else None
        found = read_about(part, cells)
        if not _measured(part):
            command = "" if cells is None else f": `dni-rnn sweep {folder.name}/{name}`"
            planned.append(f"- {found.title}{command}\n")
            continue
        parts.append(f"## {found.title}\n")
        links = f"[Table]({name}/table.md)"
        if cells is None:
            prose = f"{found.note.strip()}\n\n{found.shows.strip()}"
        else:
            rows = read_rows(part)
            parts.append(markdown_table(*_glance(cells, rows, found)))
            links += (
                f": {len(rows)} of {len(cells)} runs" if len(rows) < len(cells) else f": {len(rows)} runs"
            )
            prose = found.shows.strip()
        parts.append(f"{links}\n")
        parts += [_from_above(prose.strip(), name) + "\n"] * bool(prose)
    if planned:
        parts.append("## Not run yet\n")
        parts.append("".join(planned))
    return "\n".join(parts)


def _from_above(markdown: str, folder: str) -> str:
    """What stands in a file of `folder`, with links that lead to the same places from the folder above."""
    return re.sub(
        r"\]\((?!\w+:|#|/)([^)]+)\)", lambda found: f"]({normpath(f'{folder}/{found[1]}')})", markdown
    )


def _glance(
    cells: Sequence[Cell], rows: Sequence[dict[str, Any]], about: About
) -> tuple[list[str], list[list[str]]]:
    """A small table of one sweep: a line per method, a column per depth, and what was published below.

    Depth is the T=… in the name of a cell, or else a number behind its first word; where that does not tell
    all cells apart, a line per cell.
    """
    metric = metric_of(rows[0])
    key = f"test_{metric.key}" if metric.validated else metric.key
    planned = Counter(cell.name for cell in cells)
    places = {name: _place(name) for name in planned}
    if len(set(places.values())) < len(places):
        places = {name: (name, "") for name in planned}
    columns = list(dict.fromkeys(column for _, column in places.values()))
    columns.sort(key=lambda column: int(re.sub(r"\D", "", column) or 0))
    titles = (
        columns
        if "bptt" in rows[0]["config"]
        else [f"{column} layers" if column else "" for column in columns]
    )
    ours: dict[str, dict[str, str]] = {}
    published: dict[str, dict[str, str]] = {}
    for name, found in by_cell(cells, rows).items():
        line, column = places[name]
        n = "" if len(found) == planned[name] else f" ({len(found)} of {planned[name]})"
        mean = mean_sd([row[key] for row in found], metric.digits).removesuffix(" ± –") if found else ""
        score = f"{mean}{n}" if found else "–"
        ours.setdefault(line, {})[column] = score
        if name in about.published:
            published.setdefault(line, {})[column] = about.published[name]
    seeds = max(planned.values())
    better = "lower" if metric.lower_is_better else "higher"
    score = f"test {metric.label}" if metric.validated else metric.label
    header = [f"{score}, n = {seeds}, {better} is better", *titles]
    lines = []
    for line, scores in ours.items():
        lines.append([line, *(scores.get(column, "") for column in columns)])
        if line in published:
            lines.append(["*published figure*", *(published[line].get(column, "") for column in columns)])
    return header, lines


def _place(name: str) -> tuple[str, str]:
    """`dni, published T=4` is `dni, published` at T=4; `fcn 3, bprop` is `fcn, bprop` at 3."""
    found = re.search(r"\b(T=\d+)", name) or re.match(r"\w+ (\d+)(?=,|$)", name)
    if found is None:
        return name, ""
    rest = f"{name[: found.start(1)]} {name[found.end(1) :]}"
    return re.sub(r" +(,|$)", r"\1", re.sub(r" +", " ", rest)).strip(), found[1]
