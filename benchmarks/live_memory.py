"""Does the memory of `dni-rnn train live` stay constant? An endless stream, with a reading each minute.

    python benchmarks/live_memory.py --out results/live-memory --minutes 120

The stream repeats a text (Python's own help) at a fixed number of bytes per second. Every byte is learnt when
it arrives: one row, T = 1, a trace of 32 steps, the state penalty, a checkpoint each minute. A reading is the
resident memory of that process, in MB. Needs Linux.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean
from typing import Any

from dni_rnn.files import read_jsonl, write_atomically, write_jsonl

WORDS = "--batch-size 1 --bptt 1 --lag 0 --trace 32 --restore 0.1 --threads 1 --log-every 500 --save-every 60"


def resident(process: int) -> float:
    """Memory of a process in MB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def feed(pipe: Any, rate: int) -> None:
    """Ten times a second, write the bytes that are due."""
    text = itertools.cycle("\n".join(topics[name] for name in sorted(topics)).encode())
    began, sent = time.monotonic(), 0
    try:
        while True:
            due = int((time.monotonic() - began) * rate)
            pipe.write(bytes(itertools.islice(text, due - sent)))
            pipe.flush()
            sent = due
            time.sleep(0.1)
    except (BrokenPipeError, ValueError):  # the run has ended
        return


def table(readings: Sequence[dict[str, float]]) -> str:
    """Means over sixths of the time after the first ten minutes."""
    settled = [r for r in readings if r["minute"] >= min(10, readings[-1]["minute"] / 2)]
    size = max(1, len(settled) // 6)
    lines = ["| minutes | bytes learnt | MB, mean | smallest | largest |", "|---|--:|--:|--:|--:|"]
    for start in range(0, size * (len(settled) // size), size):
        part = settled[start : start + size]
        mb = [r["mb"] for r in part]
        span = f"{part[0]['minute']:.0f} to {part[-1]['minute']:.0f}"
        lines.append(
            f"| {span} | {part[-1]['bytes']:,.0f} | {mean(mb):.1f} | {min(mb):.1f} | {max(mb):.1f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if the run failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for readings and table")
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--rate", type=int, default=100, help="bytes a second")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    readings: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "dni_rnn", "train", "live", *WORDS.split(), "--out", str(out)]
        run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert run.stdin is not None
        threading.Thread(target=feed, args=(run.stdin, options.rate), daemon=True).start()
        metrics = out / "metrics.jsonl"
        while run.poll() is None and not metrics.exists():
            time.sleep(0.1)
        began = time.monotonic()
        while run.poll() is None and time.monotonic() - began < 60 * options.minutes:
            time.sleep(min(60.0, 60 * options.minutes / 12))
            if run.poll() is None:
                rows = read_jsonl(metrics)
                readings.append(
                    {
                        "minute": round((time.monotonic() - began) / 60, 2),
                        "mb": round(resident(run.pid), 2),
                        "bytes": rows[-1]["symbols"] if rows else 0,
                    }
                )
                write_jsonl(options.out / "readings.jsonl", readings)
        run.terminate()
        code = run.wait()
    if not readings:
        print("no reading: the run ended at once", file=sys.stderr)
        return 1
    text = table(readings)
    write_atomically(options.out / "table.md", f"# Memory of a live run\n\n{text}\n".encode())
    print(text)
    return int(code not in (0, 143, -15))


if __name__ == "__main__":
    sys.exit(main())
