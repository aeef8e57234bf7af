"""Reports: the rows of a sweep as a table and a plot, generated and never edited.

A sweep.toml may say more than a sweep needs, above its [cells]:

    title = "Penn Treebank, characters"
    note = "Markdown that goes under the title."
    reference = "bptt T=20"        # how soon do the other cells get where this one ends?

    [published]                    # below [cells]: an extra column
    "bptt T=20" = "1.42 (Jaderberg et al.)"
"""

from __future__ import annotations

import csv
import io
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dni_rnn.errors import UsageError
from dni_rnn.metrics import BPC, Metric, Point, metric_of
from dni_rnn.plots import Curve, save_curves
from dni_rnn.sweep import Cell, read_rows, read_sweep


@dataclass(frozen=True)
class About:
    """What a sweep.toml says for its report alone; `title` is the folder's name unless given."""

    title: str
    note: str = ""
    reference: str | None = None
    published: dict[str, str] = field(default_factory=dict)
    speeds: dict[str, int] | None = None
    """Characters per second of each cell where they were measured apart: `speed.json`."""

    def timed(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows, with seconds of symbols / `speeds` of their cell where there are such."""
        return [row if self.speeds is None else _retimed(row, self.speeds[row["cell"]]) for row in rows]


def read_about(folder: Path, cells: Sequence[Cell]) -> About:
    """The part of `folder/sweep.toml` that is for the report.

    Raises:
      UsageError: it speaks of a cell that the sweep does not have.
    """
    values = tomllib.loads((folder / "sweep.toml").read_text(encoding="utf-8"))
    about = About(
        values.get("title", folder.resolve().name),
        values.get("note", ""),
        values.get("reference"),
        values.get("published", {}),
        _read_speeds(folder / "speed.json"),
    )
    missing = sorted({cell.name for cell in cells} - set(about.speeds or [cell.name for cell in cells]))
    if missing:
        raise UsageError(f"{folder / 'speed.json'} lacks {missing[0]!r}: measure it again")
    named = {*about.published, *([about.reference] if about.reference is not None else [])}
    unknown = sorted(named - {cell.name for cell in cells})
    if unknown:
        raise UsageError(f"{folder / 'sweep.toml'}: {unknown[0]!r} is not one of its cells")
    return about


def _read_speeds(path: Path) -> dict[str, int] | None:
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else None


def _retimed(row: dict[str, Any], speed: int) -> dict[str, Any]:
    curve = [point | {"seconds": point["symbols"] / speed} for point in row["curve"]]
    return row | {"seconds": row["symbols"] / speed, "symbols_per_second": speed, "curve": curve}


def mean_sd(values: Sequence[float], digits: int) -> str:
    """`mean ± sd`, the sample standard deviation (n - 1 below the fraction); – for one value."""
    sd = f"{stdev(values):,.{digits}f}" if len(values) > 1 else "–"
    return f"{fmean(values):,.{digits}f} ± {sd}"


def seconds_to(points: Sequence[Point], target: float, metric: Metric) -> float | None:
    """Seconds of training until a curve first reaches `target`, linear between its validations.

    A curve whose first point is there already gives the seconds of that point, an upper bound; one
    that never gets there gives None.
    """
    before = None
    for point in points:
        if metric.reached(point.value, target):
            if before is None or not metric.validated:
                return point.seconds
            share = (before.value - target) / (before.value - point.value)
            return before.seconds + share * (point.seconds - before.seconds)
        before = point
    return None


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that is also readable as text: the first column left, the others right."""
    lines = [[text.replace("|", "\\|") for text in line] for line in (header, *rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(line[1:], widths[1:], strict=True))]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def by_cell(cells: Sequence[Cell], rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each cell, cells in the order of the sweep and rows in the order of their seeds.

    Raises:
      UsageError: a row belongs to no cell.
    """
    groups: dict[str, list[dict[str, Any]]] = {cell.name: [] for cell in cells}
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["cell"] not in groups:
            raise UsageError(
                f"rows.jsonl has a row of {row['cell']!r}, which is no cell of sweep.toml; "
                "put the cell back, or rename or remove its rows"
            )
        groups[row["cell"]].append(row)
    return groups


def render_table(
    cells: Sequence[Cell], rows: Sequence[dict[str, Any]], about: About, metric: Metric = BPC
) -> str:
    """The contents of table.md: a pure function of what sweep.toml and rows.jsonl say.

    Args:
      cells: of the sweep, one for each seed.
      rows: the finished ones, in any order.
      about: title, note, reference cell and published numbers.
      metric: which number is reported.
    """
    groups = by_cell(cells, about.timed(rows))
    planned = Counter(cell.name for cell in cells)
    columns = {metric.key: metric.label}
    if metric.validated:
        columns = {f"best_valid_{metric.key}": f"best valid {metric.label}"}
        columns[f"test_{metric.key}"] = f"test {metric.label}"
    target = None
    if about.reference is not None and groups[about.reference]:
        final = f"valid_{metric.key}" if metric.validated else metric.key
        target = fmean(row[final] for row in groups[about.reference])

    header = ["cell", "n", *columns.values(), f"{metric.unit}s/s", "seconds"]
    if target is not None:
        header.append(f"seconds to {target:.{metric.digits}f}")
    if about.published:
        header.append("published")
    lines = []
    for name, found in groups.items():
        n = str(len(found)) if len(found) == planned[name] else f"{len(found)} of {planned[name]}"
        if found:
            line = [
                name,
                n,
                *(mean_sd([row[column] for row in found], metric.digits) for column in columns),
                f"{fmean(row['symbols_per_second'] for row in found):,.0f}",
                f"{fmean(row['seconds'] for row in found):,.0f}",
            ]
            if target is not None:
                curves = [_curve(row, metric) for row in found]
                line.append(
                    mean_sd([curve[-1].seconds for curve in curves], 0)
                    if name == about.reference and metric.validated
                    else _time_to(curves, target, metric)
                )
        else:
            line = [name, n, "no rows yet", *[""] * (len(columns) + (1 if target is None else 2))]
        if about.published:
            line.append(about.published.get(name, ""))
        lines.append(line)

    parts = [f"# {about.title}\n"]
    if about.note:
        parts.append(about.note.strip() + "\n")
    if rows:
        parts.append(f"![{metric.label}]({metric.key}.svg)\n")
    parts.append(markdown_table(header, lines))
    parts.append(_legend(about, target, metric) + "\n")
    parts.append(_commands(cells, groups))
    if rows:
        parts.append(_provenance(rows))
    return "\n".join(parts)


def _curve(row: Mapping[str, Any], metric: Metric) -> list[Point]:
    """How a row came to its number; of a task that gets harder up to the end, where it stood."""
    if metric.validated:
        return metric.points(row["curve"])
    last = {name: row[name] for name in ("symbols", "seconds", metric.key)}
    return metric.points([*row["climbs"], last])


def _time_to(curves: Sequence[Sequence[Point]], target: float, metric: Metric) -> str:
    """Seconds until the curves of one cell reach `target`, or how many of them do not."""
    times = [seconds_to(curve, target, metric) for curve in curves]
    there = [seconds for seconds in times if seconds is not None]
    if len(there) < len(times):
        return f"not reached ({len(times) - len(there)} of {len(times)})"
    bound = metric.validated and any(metric.reached(curve[0].value, target) for curve in curves)
    return ("≤ " if bound else "") + mean_sd(there, 0)


def _legend(about: About, target: float | None, metric: Metric) -> str:
    plotted = "mean over seeds, band ± 1 standard deviation" if metric.validated else "a line for each seed"
    splits = (
        "Best valid is the best validation of each run, test is measured with the weights of that "
        "validation. "
    )
    text = (
        f"{metric.label}: {metric.meaning}; mean ± sample standard deviation over n seeds. "
        f"{splits if metric.validated else ''}{metric.unit}s/s and "
        f"seconds: means, of training alone, validation not counted. Plot: {plotted}."
    )
    if about.speeds is not None:
        text += (
            f" Seconds are {metric.unit}s / ({metric.unit}s per second of the cell), and those were measured "
            "apart, all cells in turn in one process, one thread (`benchmarks/throughput.py`, `speed.json`): "
            "the runs themselves shared a busy machine."
        )
    if target is not None and not metric.validated:
        text += (
            f" Seconds to {target:.{metric.digits}f}: until each seed had solved what `{about.reference}` "
            "had at its end (mean over its seeds); not reached (k of n): k of the n seeds did not get there."
        )
    elif target is not None:
        text += (
            f" Seconds to {target:.{metric.digits}f}: until the validation curve of each seed reaches the "
            f"{metric.label} at which `{about.reference}` ends (mean of its last validations; its own entry "
            "is when that is), linear between validations; not reached (k of n): k of the n seeds did not "
            "get there; ≤: a seed was there at its first validation."
        )
    return text


def _commands(cells: Sequence[Cell], groups: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """What was run for each cell, or what will be; more than one command when its rows disagree."""
    lines = []
    for name, found in groups.items():
        planned = [cell.command for cell in cells if cell.name == name]
        commands = [row["command"] for row in found] or planned
        different: dict[str, str] = {}
        for command in commands:
            different.setdefault(re.sub(r" --seed \S+", "", command), command)
        lines += [f"- {name}: `{command}`" for command in different.values()]
    return (
        "<details>\n<summary>Commands of the first seed; the others differ in --seed</summary>\n\n"
        + "\n".join(lines)
        + "\n\n</details>\n"
    )


def _provenance(rows: Sequence[dict[str, Any]]) -> str:
    packages = sorted({name for row in rows for name in row["versions"]})
    made = {
        **{name: [row["versions"].get(name) for row in rows] for name in packages},
        "Python": [row["python"] for row in rows],
        "commit": [row["commit"] for row in rows],
        "device": [row["device"] for row in rows],
        "threads": [row["threads"] for row in rows],
    }
    text = "; ".join(f"{name} {_distinct(values)}" for name, values in made.items())
    if any((row["commit"] or "").endswith("+") for row in rows):
        text += " (+: with uncommitted changes)"
    return (
        f"{len(rows)} rows, made with {text}. Every row: [table.csv](table.csv); with settings and "
        "validation curves: [rows.jsonl](rows.jsonl). This file is written by `dni-rnn report`.\n"
    )


def _distinct(values: Iterable[Any]) -> str:
    """One value, or each with how many rows it holds for."""
    counts = Counter("unknown" if value is None else str(value) for value in values)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({counts[value]} rows)" for value in sorted(counts))


def render_csv(cells: Sequence[Cell], rows: Iterable[dict[str, Any]]) -> str:
    """The contents of table.csv: a line per row with every single value of it, and the versions.

    Settings are in the command; the curves stay in rows.jsonl.
    """
    lines = []
    for found in by_cell(cells, rows).values():
        for row in found:
            values = {name: value for name, value in row.items() if not isinstance(value, dict | list)}
            lines.append(values | {f"{name} version": text for name, text in row["versions"].items()})
    columns = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def write_report(folder: Path) -> None:
    """Write table.md, table.csv and the plots beside the rows they are made from.

    Raises:
      UsageError: `folder` holds no sweep or no rows, or they do not belong together.
    """
    cells, rows = read_sweep(folder), read_rows(folder)
    if not rows:
        raise UsageError(f"{folder}: no rows yet; run dni-rnn sweep {folder} first")
    about = read_about(folder, cells)
    metric = metric_of(rows[0])
    table = render_table(cells, rows, about, metric)
    curves = [
        Curve(name, found[0]["method"], _depth(found[0]), [_curve(r, metric) for r in found])
        for name, found in by_cell(cells, about.timed(rows)).items()
        if found
    ]
    plots = [folder / f"{metric.key}.png", folder / f"{metric.key}.svg"]
    save_curves(plots, curves, metric)
    (folder / "table.csv").write_text(render_csv(cells, rows), encoding="utf-8", newline="\n")
    (folder / "table.md").write_text(table, encoding="utf-8", newline="\n")
    names = f"table.md, table.csv, {metric.key}.png, {metric.key}.svg"
    print(f"{folder}: {len(rows)} of {len(cells)} rows -> {names}")


def _depth(row: dict[str, Any]) -> int:
    """`RunConfig.depth` of a finished run."""
    config = row["config"]
    return config["bptt"] if "bptt" in config else config["layers"]
