"""Compares runs with a trace to the same runs without it, seed by seed, wherever `results/` has both.

    python benchmarks/do_no_harm.py

Two runs are a pair if they have the same seed and their commands differ only in `--trace`. Nothing is run:
the table is made from the rows of the sweeps and of `results/live`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dni_rnn.experiments.report import markdown_table, mean_sd
from dni_rnn.files import read_jsonl, write_atomically
from dni_rnn.metrics import BPC, Metric, metrics_of

FOLDER = Path("results/do-no-harm")
ON_STREAMS = {
    "trace and penalty, T = 1": "truncated and penalty, T = 1",
}  # of results/live, whose rows have no commands
BEFORE_LEARNT = replace(BPC, validated=False)  # of streams: no held-out data
OF_THE_NET = ("hidden", "embedding", "batch_size", "lr", "beta2", "clip")

HEADER = """# A trace against the same run without it

Pairs of runs whose commands differ in `--trace` alone, seed by seed: all that the tables here have.
*Difference*: with the trace less without it, mean ± sample standard deviation over the pairs; of text, test
BPC of the weights with the best validation, of streams BPC of each byte before it was learnt (lower is
better); of tasks that grow, the longest solved (higher is better). *Worse*: pairs in which the run with the
trace ended worse. A trace costs time: in tasks that end after ten minutes a run with it makes fewer updates,
elsewhere as many.

"""
AT_EQUAL_UPDATES = """
The tasks that end after ten minutes once more, each pair after as many updates as the shorter of its two
runs made: what the trace is worth without what it costs.

"""


@dataclass(frozen=True)
class Pair:
    """Final scores of two runs of one seed, with the trace and without it."""

    folder: str
    cell: str
    seed: int
    metric: Metric
    traced: float
    plain: float
    at_equal_updates: Pair | None = None

    @property
    def difference(self) -> float:
        return self.traced - self.plain

    @property
    def worse(self) -> bool:
        return not self.metric.reached(self.traced, self.plain)


def alike(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs of one command trained the same net at the same rate; a default may have changed."""
    return all(row["config"].get(name) == other["config"].get(name) for name in OF_THE_NET)


def pairs_of_sweep(folder: str, rows: Iterable[dict[str, Any]]) -> Iterator[Pair]:
    """The pairs of one sweep, in the order of its rows."""
    found = list(rows)
    without = {row["command"]: row for row in found if "--trace " not in row["command"]}
    for row in found:
        plain = without.get(re.sub(r" --trace \S+", "", row["command"]))
        if plain is None or plain is row or not alike(row, plain):
            continue
        metric = metrics_of(row)[0]
        pair = Pair(folder, row["cell"], row["seed"], metric, row[metric.score_key], plain[metric.score_key])
        yield replace(pair, at_equal_updates=at_equal_updates(pair, row, plain))


def at_equal_updates(pair: Pair, row: dict[str, Any], plain: dict[str, Any]) -> Pair | None:
    """The levels that both runs had solved when the shorter one ended; None for other tasks."""
    if "climbs" not in row or "climbs" not in plain:
        return None
    end = min(run["curve"][-1]["step"] for run in (row, plain))

    def solved(run: dict[str, Any]) -> float:
        return max((climb["solved"] for climb in run["climbs"] if climb["step"] <= end), default=0)

    return replace(pair, traced=solved(row), plain=solved(plain))


def pairs_of_streams(rows: Iterable[dict[str, Any]]) -> Iterator[Pair]:
    """The pairs of `results/live`."""
    ended = {(row["stream"], row["method"], row["seed"]): row["bpc"] for row in rows if not row["pilot"]}
    for (stream, method, seed), bpc in ended.items():
        plain = ended.get((stream, ON_STREAMS.get(method, ""), seed))
        if plain is not None:
            yield Pair("live", f"{method}: {stream}", seed, BEFORE_LEARNT, bpc, plain)


def all_pairs(results: Path) -> list[Pair]:
    """The pairs of every folder of `results` that has any."""
    found: list[Pair] = []
    for path in sorted(results.glob("*/rows.jsonl")):
        rows = read_jsonl(path)
        if path.parent.name == "live":
            found += pairs_of_streams(rows)
        elif (path.parent / "sweep.toml").exists():
            found += pairs_of_sweep(path.parent.name, rows)
    return found


def render(pairs: Iterable[Pair]) -> str:
    """table.md."""
    found = list(pairs)
    again = [pair.at_equal_updates for pair in found if pair.at_equal_updates is not None]
    made = "\nMade by `python benchmarks/do_no_harm.py` from the rows of these tables.\n"
    return HEADER + table(found) + (AT_EQUAL_UPDATES + table(again) if again else "") + made


def table(pairs: Iterable[Pair]) -> str:
    """A line for each cell, and one for all."""
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair.folder, pair.cell), []).append(pair)
    lines = [
        [
            f"[{folder}](../{folder}/table.md)",
            cell,
            group[0].metric.score_label,
            str(len(group)),
            mean_sd([pair.traced for pair in group], group[0].metric.digits),
            mean_sd([pair.plain for pair in group], group[0].metric.digits),
            mean_sd([pair.difference for pair in group], group[0].metric.digits),
            str(sum(pair.worse for pair in group)),
        ]
        for (folder, cell), group in groups.items()
    ]
    count = sum(len(group) for group in groups.values())
    worse = sum(pair.worse for group in groups.values() for pair in group)
    lines.append(["**all**", "", "", str(count), "", "", "", f"**{worse}**"])
    columns = ["table", "with the trace", "metric", "n", "with", "without", "difference", "worse"]
    return markdown_table(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.parse_args()
    write_atomically(FOLDER / "table.md", render(all_pairs(FOLDER.parent)).encode())


if __name__ == "__main__":
    main()
