"""Text below a table: failed runs, samples of text, commands, versions, machines."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dni_rnn.experiments.sweep import Cell


def failed_runs(failures: Sequence[dict[str, Any]]) -> str:
    """Which runs failed and are not in the table."""
    return " ".join(
        f"Not in the table: {f['cell']}, seed {f['seed']}, failed with exit code {f['exit_code']} "
        f"(`{f['reason'].removeprefix('dni-rnn: ')}`)."
        for f in failures
    )


def machines(rows: Sequence[dict[str, Any]]) -> str:
    """Machines of rows whose budget is in minutes, which mean nothing without them."""
    timed = [row for row in rows if row["config"].get("minutes") is not None]
    if not timed:
        return ""
    machines = _distinct(
        f"{row['device']}, threads {row['threads']}, machine {row.get('machine', 'not recorded')}"
        for row in timed
    )
    return f"The budget is in minutes, so the machine is part of the result: {machines}."


def samples(groups: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """The sample of text by the first run of each cell, if there is one."""
    parts = []
    for name, rows in groups.items():
        if rows and "sample" in rows[0]:
            text = "\n".join(
                textwrap.fill(line, 100, replace_whitespace=False, drop_whitespace=False)
                for line in rows[0]["sample"]["text"].splitlines()
            )
            fence = max(["~~~", *re.findall("~+", text)], key=len) + "~"  # longer than any in the text
            parts.append(f"{name}:\n\n{fence}text\n{text}\n{fence}\n")
    if not parts:
        return ""
    how = next(rows[0]["sample"] for rows in groups.values() if rows and "sample" in rows[0])
    about = f"Text written by the first seed, at temperature {how['temperature']}"
    return f"<details>\n<summary>{about}</summary>\n\n" + "\n".join(parts) + "\n</details>\n"


def commands_of(cells: Sequence[Cell], groups: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """The command of each cell, run or planned; more than one if its rows differ."""
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


def versions_of(rows: Sequence[dict[str, Any]]) -> str:
    """Packages, commits and machines of the rows, and where to find each row."""
    packages = sorted({name for row in rows for name in row["versions"]})
    made = {
        **{name: [row["versions"].get(name) for row in rows] for name in packages},
        "Python": [row["python"] for row in rows],
        "commit": [row["commit"] for row in rows],
        "device": [row["device"] for row in rows],
        "threads": [row["threads"] for row in rows],
    }
    if any("machine" in row for row in rows):
        made["machine"] = [row.get("machine") for row in rows]
    text = "; ".join(f"{name} {_distinct(values)}" for name, values in made.items())
    if any((row["commit"] or "").endswith("+") for row in rows):
        text += " (+: with uncommitted changes)"
    return (
        f"{len(rows)} rows, made with {text}. Every row: [table.csv](table.csv); with settings and "
        "validation curves: [rows.jsonl](rows.jsonl). This file is written by `dni-rnn report`.\n"
    )


def _distinct(values: Iterable[Any]) -> str:
    """One value, or each with its number of rows."""
    counts = Counter("unknown" if value is None else str(value) for value in values)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({counts[value]} rows)" for value in sorted(counts))
