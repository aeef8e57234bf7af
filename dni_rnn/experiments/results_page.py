"""All results of a folder: every report in it, and a README.md that begins with the findings.

The folder has an about.toml with a title, a note and the entries of `headline`.
"""

from __future__ import annotations

from pathlib import Path

from dni_rnn.errors import UsageError
from dni_rnn.experiments.about import read_about
from dni_rnn.experiments.headline import PICTURE, comparison_table, dot_panels, read_headline
from dni_rnn.experiments.html_page import render_page
from dni_rnn.experiments.plots import save_dots
from dni_rnn.experiments.report import report_sweep, write_text
from dni_rnn.experiments.sweep import read_rows, read_sweep
from dni_rnn.files import understood


def write_reports(folder: Path) -> None:
    """The report of a sweep, the page of another program's results, or all reports in `folder`.

    Raises:
      UsageError: there is nothing to report.
    """
    if (folder / "sweep.toml").exists() or not (folder / "about.toml").exists():
        report_sweep(folder)
    elif (folder / "table.md").exists():
        with understood(folder / "table.md"):
            table = (folder / "table.md").read_text(encoding="utf-8")
        write_text(folder / "report.html", render_page(table, folder))
        print(f"{folder}: table.md -> report.html")
    elif parts := result_folders(folder):
        for part in filter(_measured, parts):
            write_reports(part)
        with understood(folder):
            page, panels = render_index(folder), read_headline(folder).panels
            dots = dot_panels(folder, panels) if panels else None
        write_text(folder / "README.md", page)
        if dots:
            save_dots(folder / PICTURE, dots)
        print(f"{folder}: {len(parts)} folders -> README.md")
    else:
        raise UsageError(f"{folder}: no table.md there yet; run what makes it first")


def result_folders(folder: Path) -> list[Path]:
    """The folders in `folder` with results, or with results to come."""
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
    """The contents of README.md: findings, the comparison, a line for each folder in `folder`.

    A pure function of their contents.
    """
    about, headline = read_about(folder), read_headline(folder)
    parts = [f"# {about.title}\n", about.note.strip() + "\n"]
    if headline.panels:
        parts.append(f"![When it helps and when it does not]({PICTURE})\n")
    if headline.findings:
        parts.append("## Findings\n")
        parts.append("".join(f"{i}. {text.strip()}\n" for i, text in enumerate(headline.findings, 1)))
    if headline.comparison:
        parts.append("## Side by side\n")
        parts.append(comparison_table(folder, headline.comparison))
        parts += [headline.comparison["note"].strip() + "\n"] * ("note" in headline.comparison)
    measured, planned = [], []
    for part in result_folders(folder):
        cells = read_sweep(part) if (part / "sweep.toml").exists() else None
        found = read_about(part, cells)
        what = f": {found.summary.strip()}" if found.summary else ""
        if not _measured(part):
            command = "" if cells is None else f" `dni-rnn sweep {folder.name}/{part.name}`"
            planned.append(f"- {found.title}{what or ':' * bool(command)}{command}\n")
            continue
        rows = [] if cells is None else read_rows(part)
        runs = f" ({len(rows)} of {len(cells)} runs)" if cells is not None and len(rows) < len(cells) else ""
        measured.append(f"- [{found.title}]({part.name}/table.md){what}{runs}\n")
    parts += ["## All tables\n", "".join(measured)]
    if planned:
        parts += ["## Not run yet\n", "".join(planned)]
    return "\n".join(parts)
