"""How runs survive `kill -9` and a full disk, and how every command handles damaged inputs.

    python benchmarks/endurance --out runs/endurance --minutes 60 --table results/endurance

Killed runs: a run is killed repeatedly, each time at a random moment, and resumed until it ends. Every logged
number and every weight must then equal those of an uninterrupted run. In a run with several processes, one
process, all training processes, or their parent is killed. In a sweep, the process that runs it is killed,
and the rows must equal those of an uninterrupted sweep, except for times. No child process may be left.

Damaged inputs are made from valid ones. A command must refuse such an input in one line, with exit code 2 and
without having written anything, or work as usual if the damage has no meaning. No changed byte of a
checkpoint may go unnoticed.

Full disks: a disk fills up before a command or while it runs, except for some room. The command must end with
one line and leave no partial file; with room again it must end as it does when there was always room. The
disk is a tmpfs in a mount namespace of its own; where that is not allowed, the length of files is limited
instead.

Finished trials are kept in `--out`, by number, and not run again: the same command continues.
Needs `fork` (not available on Windows) and, for processes and sweeps, /proc (Linux).
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from commands import APART, RUNS, STEPS, TEXT
from damage import damaged
from disk import filled, may_mount
from kills import killed, killed_apart, killed_sweep
from page import KINDS, counted, tables, write_page

from dni_rnn.files import exclusive, read_jsonl, write_jsonl


class Job(NamedTuple):
    """One trial."""

    kind: str
    name: str
    number: int
    act: Callable[[], dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/endurance"), help="folder for all output")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="stop after this long; the same command continues"
    )
    parser.add_argument("--runs", type=int, default=20, help="killed runs of each kind")
    parser.add_argument("--apart", type=int, default=5, help="the same, in several processes")
    parser.add_argument("--sweeps", type=int, default=10, help="killed sweeps")
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of a run that is killed")
    parser.add_argument("--damaged", type=int, default=1000, help="damaged inputs")
    parser.add_argument("--full", type=int, default=150, help="commands on a full disk")
    parser.add_argument("--table", type=Path, help="folder for table.md and rows.jsonl")
    options = parser.parse_args(arguments)
    mounts = options.full > 0 and may_mount()
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    folder = options.out.resolve()
    (folder / "text.txt").write_text(TEXT)
    jobs = [
        Job("kills", name, n, functools.partial(act, folder, name, n, options.steps))
        for kinds, act, count in ((RUNS, killed, options.runs), (APART, killed_apart, options.apart))
        for n in range(count)
        for name in kinds
    ]
    jobs += [
        Job("kills", "sweep", n, functools.partial(killed_sweep, folder, n)) for n in range(options.sweeps)
    ]
    jobs += [Job("damaged", "", n, functools.partial(damaged, folder, n)) for n in range(options.damaged)]
    jobs += [Job("full", "", n, functools.partial(filled, folder, n, mounts)) for n in range(options.full)]
    records: dict[str, list[dict[str, Any]]] = {}
    with exclusive(folder):
        for kind in KINDS:
            file = folder / f"{kind.file}.jsonl"
            records[kind.file] = read_jsonl(file) if file.exists() else []
        done = {(kind, r["number"], r["name"]) for kind, rs in records.items() for r in rs}
        done |= {(kind, number, "") for kind, number, _ in done}
        most = Counter((job.kind, job.name) for job in jobs)
        # All kinds take turns, so that even a short time covers each.
        for job in sorted(jobs, key=lambda job: job.number / most[job.kind, job.name]):
            if (job.kind, job.number, job.name) not in done and time.monotonic() < until:
                records[job.kind].append(job.act())
                write_jsonl(folder / f"{job.kind}.jsonl", records[job.kind])
    rows = [row for kind in KINDS for row in counted(kind, records[kind.file])]
    print(tables(rows), end="")
    if options.table is not None:
        write_page(options.table, rows, records["kills"], options.steps)
    bad = [r for rs in records.values() for r in rs if not r.get("same", True) or r.get("wrong")]
    for record in bad:
        print(json.dumps(record), file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
