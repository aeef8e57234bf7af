"""Three streams, read once, strictly online: bits per character, each byte predicted before it is learnt.

    python benchmarks/live.py --text FILE --log FILE [--minutes 30]

Every run is `dni-rnn train live --lag 0` (rows of conditioned DNI state their lag) with the stream on its
standard input. Streams: a play (tiny-shakespeare), a log, and a manual, Python's own help. The learning rates
were chosen beforehand, on the first 100,000 bytes of the play (--rates). Each run is a line of rows.jsonl;
existing rows are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from dni_rnn.experiments.report import markdown_table, mean_sd
from dni_rnn.files import read_jsonl, write_atomically, write_jsonl

BYTES = 300_000
SEEDS = (0, 1, 2)
METHODS = {
    "trace and penalty, T = 1": "--bptt 1 --lag 0 --trace 32 --restore 0.1",
    "truncated, T = 1": "--bptt 1 --lag 0",
    "truncated, T = 16": "--bptt 16 --lag 0",
    "truncated and penalty, T = 1": "--bptt 1 --lag 0 --restore 0.1",
    "truncated, T = 8": "--bptt 8 --lag 0",
    "truncated, T = 4": "--bptt 4 --lag 0",
    "DNI, unconditioned, T = 1": "--bptt 1 --dni --lag 0",
    "DNI, conditioned, 8 symbols behind, T = 1": "--bptt 1 --dni --lag 8",
    "trace and penalty, T = 8": "--bptt 8 --lag 0 --trace 32 --restore 0.1",
}
RATES = ("1e-3", "3e-3", "1e-2", "3e-2")  # the last only at T > 1

HEADER = """# Three streams, read once

LSTM 128, 16 rows of a stream that is read once, {count:,} bytes of each; *BPC*: mean over all bytes, each
predicted before it was learnt. Nothing is learnt besides the net but M in the rows of DNI; nothing is
conditioned on what comes but where the row says so; a trace remembers 32 steps. Rates: the better of those
tried for each method on the first 100,000 bytes of the play, one seed ({tried}; the last
at T > 1 alone). Seconds: of training, on
a machine that is shared. Mean ± sample standard deviation over n seeds.

"""


def run(stream: bytes, words: str, seed: int) -> dict[str, Any]:
    """The summary of one run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "dni_rnn", "train", "live", *words.split(), "--seed", str(seed)]
        command += ["--threads", "1", "--out", str(out)]
        done = subprocess.run(command, input=stream, capture_output=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.stderr.decode()[-500:]}")
        return json.loads((out / "summary.json").read_text())


def better_rates(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The better learning rate of each method, from the pilots."""
    best: dict[str, tuple[float, str]] = {}
    for row in rows:
        if row["pilot"]:
            best[row["method"]] = min(best.get(row["method"], (9.0, "")), (row["bpc"], row["lr"]))
    return {method: lr for method, (_, lr) in best.items()}


def render(rows: list[dict[str, Any]], streams: list[str]) -> str:
    """table.md."""
    rates = better_rates(rows)
    lines = []
    for method in METHODS:
        line = [method, rates.get(method, "–")]
        for stream in streams:
            here = [r for r in rows if not r["pilot"] and (r["method"], r["stream"]) == (method, stream)]
            line.append(f"{mean_sd([r['bpc'] for r in here], 3)} ({len(here)})" if here else "–")
        seconds = [r["seconds"] for r in rows if not r["pilot"] and r["method"] == method]
        lines.append([*line, f"{sum(seconds) / len(seconds):.0f}" if seconds else "–"])
    columns = ["method", "rate", *(f"{stream}: BPC (n)" for stream in streams), "seconds"]
    tried = ", ".join(RATES)
    made = "\nMade by `python benchmarks/live.py` from [rows.jsonl](rows.jsonl).\n"
    return HEADER.format(count=BYTES, tried=tried) + markdown_table(columns, lines) + made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, help="tiny-shakespeare's input.txt")
    parser.add_argument("--log", type=Path, help="a log of at least 300,000 bytes")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=Path("results/live"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path, deadline = args.out / "rows.jsonl", time.monotonic() + 60 * args.minutes
    rows = read_jsonl(path) if path.exists() else []
    streams: dict[str, bytes] = {"play": b"", "log": b"", "manual": b""}
    if args.text:
        streams["play"] = args.text.read_bytes()[:BYTES]
    if args.log:
        streams["log"] = args.log.read_bytes()[:BYTES]
    streams["manual"] = "\n".join(topics[name] for name in sorted(topics)).encode()[:BYTES]
    jobs = [
        (True, "play", method, words, lr, 0)
        for method, words in METHODS.items()
        for lr in RATES[: 3 if "--bptt 1 " in words else 4]
    ]
    jobs += [
        (False, stream, method, words, "", seed)
        for seed in SEEDS
        for stream in streams
        for method, words in METHODS.items()
    ]
    for pilot, stream, method, words, lr, seed in jobs:
        lr = lr or better_rates(rows).get(method, "")
        same = {"pilot": pilot, "stream": stream, "method": method, "lr": lr, "seed": seed}
        data = streams[stream][: 100_000 if pilot else None]
        if any(all(row[key] == value for key, value in same.items()) for row in rows) or not data or not lr:
            continue
        if time.monotonic() > deadline:
            break
        rates = f"--lr {lr}" + (f" --synthesizer-lr {lr}" if "--dni" in words else "")
        summary = run(data, f"{words} {rates}", seed)
        kept = {key: summary[key] for key in ("symbols", "seconds", "state_rms")}
        digest = hashlib.sha256(data).hexdigest()[:16]
        rows.append(same | {"bpc": round(summary["test_bpc"], 4), "sha256": digest} | kept)
        write_jsonl(path, rows)
        print(rows[-1], flush=True)
    write_atomically(args.out / "table.md", render(rows, list(streams)).encode())


if __name__ == "__main__":
    main()
