"""Reports: the rows of a sweep as a table, plots and a page, generated and never edited.

`about` reads what they need besides the rows; `provenance` writes the text below a table.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from dni_rnn.errors import UsageError
from dni_rnn.experiments.about import About, read_about
from dni_rnn.experiments.html_page import render_page
from dni_rnn.experiments.method_summary import summary_text
from dni_rnn.experiments.plots import Curve, save_curves, save_logged
from dni_rnn.experiments.provenance import commands_of, failed_runs, machines, samples, versions_of
from dni_rnn.experiments.sweep import Cell, read_failures, read_rows, read_sweep
from dni_rnn.files import understood, write_atomically
from dni_rnn.metrics import BPC, LOGGED, Metric, Point, metrics_of


def mean_sd(values: Sequence[float], digits: int) -> str:
    """`mean ± sd`, the sample standard deviation (n - 1 in the denominator); – for one value."""
    sd = f"{stdev(values):,.{digits}f}" if len(values) > 1 else "–"
    return f"{fmean(values):,.{digits}f} ± {sd}"


def amount_to(
    points: Sequence[Point], target: float, metric: Metric, axis: Literal["seconds", "symbols"] = "seconds"
) -> float | None:
    """Seconds or symbols of training until a curve first reaches `target`, linear between its validations.

    A curve whose first point has reached it gives those of that point, an upper bound; one that never
    reaches it gives None.
    """
    before = None
    for point in points:
        if metric.reached(point.value, target):
            there = getattr(point, axis)
            if before is None or not metric.validated:
                return there
            share = (before.value - target) / (before.value - point.value)
            return getattr(before, axis) + share * (there - getattr(before, axis))
        before = point
    return None


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that is also readable as text: first column left-aligned, the others right."""
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
    cells: Sequence[Cell],
    rows: Sequence[dict[str, Any]],
    about: About,
    metrics: Sequence[Metric] = (BPC,),
    failures: Sequence[dict[str, Any]] = (),
) -> str:
    """The contents of table.md: a pure function of sweep.toml, rows.jsonl and failed.jsonl.

    Args:
      cells: cells of the sweep, one for each seed.
      rows: finished rows, in any order.
      about: title, note, what it shows, reference cell and published numbers.
      metrics: the metrics to report, a table for each.
      failures: from `read_failures`.
    """
    groups = by_cell(cells, about.timed(rows))
    planned = Counter(cell.name for cell in cells)
    parts = [f"# {about.title}\n"]
    if about.note:
        parts.append(about.note.strip() + "\n")
    for metric in metrics:
        parts += _section(groups, planned, about, metric)
    parts.append(summary_text(groups))
    parts += [f"{text}\n" for text in (failed_runs(failures), machines(rows), about.shows.strip()) if text]
    if logged_of(groups):
        parts.append(f"![Training diagnostics]({INSIDE}.svg)\n")
        parts.append("Training diagnostics of the first seed of each cell; mean over cuts.\n")
    parts.append(samples(groups))
    parts.append(commands_of(cells, groups))
    if rows:
        parts.append(versions_of(rows))
    return "\n".join(part for part in parts if part)


def _section(
    groups: Mapping[str, Sequence[dict[str, Any]]], planned: Mapping[str, int], about: About, metric: Metric
) -> list[str]:
    """Plot, table and legend of one metric."""
    columns = {metric.key: metric.label}
    if metric.validated:
        columns = {f"best_valid_{metric.key}": f"best valid {metric.label}"}
        columns[f"test_{metric.key}"] = f"test {metric.label}"
    target, axes = None, {"seconds": "seconds"}
    if about.reference is not None and groups[about.reference]:
        final = f"valid_{metric.key}" if metric.validated else metric.key
        target = fmean(row[final] for row in groups[about.reference])
        if about.counted:
            axes = {"symbols": f"{metric.unit}s", **axes}

    header = ["cell", "n", *columns.values(), f"{metric.unit}s/s", "seconds"]
    if target is not None:
        header += [f"{unit} to {target:.{metric.digits}f}" for unit in axes.values()]
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
                itself = name == about.reference and metric.validated
                line += [
                    mean_sd([getattr(curve[-1], axis) for curve in curves], 0)
                    if itself
                    else _amount_to(curves, target, metric, axis)
                    for axis in axes
                ]
        else:
            line = [name, n, "no rows yet", *[""] * (len(columns) + (1 if target is None else 1 + len(axes)))]
        if about.published:
            line.append(about.published.get(name, ""))
        lines.append(line)
    picture = [f"![{metric.label}]({metric.key}.svg)\n"] if any(groups.values()) else []
    return [*picture, markdown_table(header, lines), _legend(about, target, axes, metric) + "\n"]


INSIDE = "inside"
"""File name of the plot of `logged_of`."""


def curves_of(groups: Mapping[str, Sequence[dict[str, Any]]], metric: Metric) -> list[Curve]:
    """The learning curves of each cell of `by_cell`."""
    return [
        Curve(name, found[0]["method"], _depth(found[0]), [_curve(row, metric) for row in found])
        for name, found in groups.items()
        if found
    ]


def logged_of(
    groups: Mapping[str, Sequence[dict[str, Any]]],
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Logged diagnostics of the first run of each cell, by quantity and cell: (updates, mean over cuts).

    Quantities that no such run has logged are left out; rows of earlier versions have none.
    """
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for quantity, label in LOGGED.items():
        for name, rows in groups.items():
            kept = rows[0].get("traces", {}) if rows else {}
            alike = [points for key, points in kept.items() if re.fullmatch(rf"{quantity}(_\d+)?", key)]
            if alike:
                found.setdefault(label, {})[name] = [
                    (each[0][0], fmean(value for _, value in each)) for each in zip(*alike, strict=True)
                ]
    return found


def _curve(row: Mapping[str, Any], metric: Metric) -> list[Point]:
    """The learning curve of a row; for a task with a curriculum, its levels up to the end."""
    # Curves of earlier versions lack updates: these are proportional to symbols.
    pace = row["steps"] / row["symbols"] if "steps" in row else None
    known = {} if pace is None else {"step": lambda point: round(pace * point["symbols"])}
    points = row["curve"] if metric.validated else [*row["climbs"], row]
    return metric.points([{name: make(p) for name, make in known.items()} | p for p in points])


def _amount_to(curves: Sequence[Sequence[Point]], target: float, metric: Metric, axis: Any) -> str:
    """Seconds or symbols until the curves of one cell reach `target`, or how many of them do not."""
    amounts = [amount_to(curve, target, metric, axis) for curve in curves]
    there = [amount for amount in amounts if amount is not None]
    if len(there) < len(amounts):
        return f"not reached ({len(amounts) - len(there)} of {len(amounts)})"
    bound = metric.validated and any(metric.reached(curve[0].value, target) for curve in curves)
    return ("≤ " if bound else "") + mean_sd(there, 0)


def _legend(about: About, target: float | None, axes: Mapping[str, str], metric: Metric) -> str:
    amounts = " and ".join(axes.values()).capitalize()
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
            f" {amounts} to {target:.{metric.digits}f}: until each seed had solved what `{about.reference}` "
            "had at its end (mean over its seeds); not reached (k of n): k of the n seeds did not get there."
        )
    elif target is not None:
        text += (
            f" {amounts} to {target:.{metric.digits}f}: until the validation curve of each seed reaches the "
            f"{metric.label} at which `{about.reference}` ends (mean of its last validations; its own entry "
            "is when that is), linear between validations; not reached (k of n): k of the n seeds did not "
            "get there; ≤: a seed was there at its first validation."
        )
    return text


def render_csv(cells: Sequence[Cell], rows: Iterable[dict[str, Any]]) -> str:
    """The contents of table.csv: a line per row with all its scalar values, and the versions.

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


def report_sweep(folder: Path) -> None:
    """Write table.md, table.csv, the plots and report.html beside the rows they are made from.

    Raises:
      UsageError: `folder` holds no sweep or no rows, or rows of other cells.
    """
    cells, rows = read_sweep(folder), read_rows(folder)
    if not rows:
        raise UsageError(f"{folder}: no rows yet; run dni-rnn sweep {folder} first")
    about = read_about(folder, cells)
    with understood(folder / "rows.jsonl"):
        metrics = metrics_of(rows[0])
        table, lines = (
            render_table(cells, rows, about, metrics, read_failures(folder)),
            render_csv(cells, rows),
        )
        groups = by_cell(cells, about.timed(rows))
        curves, logged = {metric: curves_of(groups, metric) for metric in metrics}, logged_of(groups)
    plots = []
    for metric in metrics:
        paths = [folder / f"{metric.key}.png", folder / f"{metric.key}.svg"]
        save_curves(paths, curves[metric], metric)
        plots += paths
    if logged:
        paths = [folder / f"{INSIDE}.png", folder / f"{INSIDE}.svg"]
        save_logged(paths, curves[metrics[0]], logged)
        plots += paths
    write_text(folder / "table.csv", lines)
    write_text(folder / "table.md", table)
    write_text(folder / "report.html", render_page(table, folder))
    names = ["table.md", "table.csv", "report.html", *(path.name for path in plots)]
    print(f"{folder}: {len(rows)} of {len(cells)} rows -> {', '.join(names)}")


def write_text(path: Path, text: str) -> None:
    """Replace a text file, whole or not at all."""
    write_atomically(path, text.encode())


def _depth(row: dict[str, Any]) -> int:
    """`RunConfig.depth` of a finished run."""
    config = row["config"]
    return config.get("bptt", config.get("layers", 1))  # 1 for the surface; decides a colour only
