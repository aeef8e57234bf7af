"""The tables of what was tried, and the page that holds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dni_rnn.experiments.report import markdown_table, mean_sd
from dni_rnn.files import write_atomically, write_jsonl


class Kind(NamedTuple):
    """One table: what was tried, and how each column counts the records of a name."""

    file: str
    title: str
    columns: dict[str, Callable[[list[dict[str, Any]]], int]]


def _count(of: Callable[[dict[str, Any]], Any]) -> Callable[[list[dict[str, Any]]], int]:
    return lambda records: sum(int(of(record)) for record in records)


KINDS = [
    Kind("kills", "killed run", {
        "runs": len, "kills": _count(lambda r: r["kills"]), "left behind": _count(lambda r: r.get("left", 0)),
        "went on to the end": _count(lambda r: r["same"]),
    }),
    Kind("damaged", "damaged input", {
        "tried": len, "refused in one line": _count(lambda r: r["refused"] and not r["wrong"]),
        "did no harm": _count(lambda r: not r["refused"] and not r["wrong"]),
        "wrong": _count(lambda r: bool(r["wrong"])),
    }),
    Kind("full", "command on a disk that fills up", {
        "tried": len, "failed in one line, then went on": _count(lambda r: r["failed"] and not r["wrong"]),
        "had room": _count(lambda r: not r["failed"] and not r["wrong"]),
        "wrong": _count(lambda r: bool(r["wrong"])),
    }),
]  # fmt: skip


def counted(kind: Kind, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each name."""
    names = list(dict.fromkeys(record["name"] for record in records))
    rows = []
    for name in names:
        mine = [record for record in records if record["name"] == name]
        rows.append({"of": kind.title, "name": name} | {k: count(mine) for k, count in kind.columns.items()})
    return rows


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """A table of each kind, in Markdown."""
    texts = []
    for kind in KINDS:
        mine = [row for row in rows if row["of"] == kind.title]
        columns = list(kind.columns)
        lines = [[row["name"], *(f"{row[column]:,}" for column in columns)] for row in mine]
        total = ["all", *(f"{sum(row[column] for row in mine):,}" for column in columns)]
        if mine:
            texts.append(markdown_table([kind.title, *columns], [*lines, total]))
    return "\n".join(texts)


PAGE = """# Endurance

Runs of {steps} updates, killed with `kill -9` at random moments and resumed until they ended, against the
same run left alone. *Went on to the end*: every logged number that is no time, and every weight, is equal bit
for bit; of decoupled ones the numbers are those of validations, and of a sweep what counts are its rows, but
for times. Of runs in processes one of them was killed, or all that train, or what started them; *left behind*
are processes that were still there 20 seconds later. {errors}

Damaged inputs: cut, bytes flipped, overwritten, left out, put in or zeroed, values of another kind, each read
by a command that needs it. *Did no harm*: the command ended with exit code 0, as where a space was changed,
or a digit that nothing checks.

Disks fill up before a command or while it runs, but for a random room. *Failed in one line, then went on*:
with room again the same command ended with what it makes when there was always room.

{tables}
Made by `{command}` from [rows.jsonl](rows.jsonl), which has the counts.
"""


def errors_of(records: Sequence[dict[str, Any]]) -> str:
    """Compares killed runs with uninterrupted ones where the result depends on timing."""
    found = [record for record in records if "error" in record]
    if not found:
        return ""
    killed, alone = [record["error"] for record in found], found[0]["left_alone"]
    return (
        f"With two messages under way what runs do is up to the machine, so no two are equal: the test error "
        f"of those that were killed is {mean_sd(killed, 1)} % ({len(killed)} runs), of those left alone "
        f"{mean_sd(alone, 1)} % ({len(alone)} runs of the same seed)."
    )


def write_page(folder: Path, rows: list[dict[str, Any]], kills: Sequence[dict[str, Any]], steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "rows.jsonl", rows)
    command = "python benchmarks/endurance --minutes 60 --table results/endurance"
    page = PAGE.format(steps=steps, errors=errors_of(kills), tables=tables(rows), command=command)
    write_atomically(folder / "table.md", page.encode())
