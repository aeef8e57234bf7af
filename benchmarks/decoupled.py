"""Throughput of the parts of a net in separate processes: without waiting for gradients, and in lock-step.

    python benchmarks/decoupled.py [--seconds 2] [--rounds 3] [--parts 2 3] [--out results/decoupled]

Parts of equal cost (2 layers of 1024 each, batch 256), one thread each. Lock-step: the same parts in the same
processes, with exact gradients; a part sends its output and waits for the gradient (`--method bprop`).
Decoupled: a critic. Corrected: the same with `--correct`. Late gradients alone: `--method none --correct`.
The methods take turns, round after round, in one run; medians over rounds. Every message is held back by an
artificial delay. Takes about five minutes on two idle cores.

Writes rows.jsonl, table.md and throughput.png (svg). `--plot` only renders the plot and the table again from
existing rows, including the simulation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dni_rnn.config import FeedforwardConfig
from dni_rnn.data.labelled import Examples
from dni_rnn.data.task import installed_tasks
from dni_rnn.distributed.chain import ChainPart
from dni_rnn.distributed.processes import Processes, joined
from dni_rnn.experiments.plots import Panel, save_lines
from dni_rnn.experiments.report import markdown_table
from dni_rnn.files import read_jsonl
from dni_rnn.training.run_directory import Run

WIDTH, BATCH, QUEUE = 1024, 256, 32
DELAYS = (0.0, 1.0, 10.0, 100.0)
METHODS = {
    "lock-step": ("bprop", False),
    "decoupled": ("critic", False),
    "corrected": ("critic", True),
    "late gradients alone": ("none", True),
}
"""Method and `--correct`."""
WARM_UP, FEWEST = 3, 5
MICRO, MANY, LATENCIES = 8, (2, 4, 8, 16, 32), (0.1, 1.0, 10.0, 100.0)
SIMULATED = ("lock-step", "micro-batches", "decoupled")


def made_up() -> Examples:
    """Random rows as wide as the layers, so that all layers cost the same."""
    random = np.random.default_rng(0)

    def some(count: int) -> tuple[np.ndarray, np.ndarray]:
        return random.integers(0, 256, (count, WIDTH)).astype(np.uint8), random.integers(0, 10, count)

    return Examples("random", tuple("0123456789"), some(8 * BATCH), some(BATCH), some(BATCH))


def measure(
    processes: Processes, data: Examples, method: str, delay: float, seconds: float, folder: Path
) -> dict[str, Any]:
    """Train for a while; returns the counts of process 0."""
    parts = processes.size
    config = FeedforwardConfig(
        layers=2 * parts + 1,
        width=WIDTH,
        method=METHODS[method][0],  # type: ignore[arg-type]
        correct=METHODS[method][1],
        cuts=",".join(str(2 * part) for part in range(1, parts)),
        batch_size=BATCH,
        epochs=1000.0,
        decoupled=True,
        queue=QUEUE,
        delay=delay,
        log_every=10**9,
    ).resolved
    run = Run(folder / f"part{processes.rank}", "mnist", installed_tasks()["mnist"](), config)
    run.path.mkdir(exist_ok=True)
    learner = ChainPart(run, config, data, torch.device("cpu"), processes)
    learner.connect()
    learner.connect_weights()
    if processes.rank:
        learner.follow()
        return {}
    # What the last part has done is what counts: messages under way at the beginning and at the end cancel.
    while learner.seen[0] < WARM_UP:
        learner.update()
    learner.reset_metrics()
    before, start = learner.seen[0], time.perf_counter()
    while time.perf_counter() - start < seconds or learner.seen[0] - before < FEWEST:
        learner.update()
    messages, passed = learner.seen[0] - before, time.perf_counter() - start
    stale = statistics.mean(learner.stale) if learner.stale else 0.0
    learner.end(0)
    return {"messages": messages, "seconds": round(passed, 4), "staleness": round(stale, 2)}


def work(args: argparse.Namespace) -> None:
    """The work of one process."""
    torch.set_num_threads(1)
    data = made_up()
    with joined(600.0) as processes, tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for delay in DELAYS:
                for method in METHODS:
                    found = measure(processes, data, method, delay, args.seconds, Path(folder))
                    if processes.rank == 0:
                        row = {"parts": processes.size, "delay": delay, "method": method, "round": number}
                        with open(args.out / "rows.jsonl", "a") as file:
                            file.write(json.dumps(row | found) + "\n")


def launch(args: argparse.Namespace, parts: int) -> None:
    """Start the processes with torch's own launcher, on the loopback interface."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    options = ["--rounds", str(args.rounds), "--seconds", str(args.seconds), "--out", str(args.out)]
    subprocess.run(
        [*launcher, "--nproc-per-node", str(parts), __file__, *options],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def medians(rows: list[dict[str, Any]]) -> dict[tuple[int, float, str], tuple[float, float]]:
    """Messages per second and staleness, by parts, delay and method."""
    found: dict[tuple[int, float, str], tuple[float, float]] = {}
    for key in {(row["parts"], row["delay"], row["method"]) for row in rows}:
        those = [row for row in rows if (row["parts"], row["delay"], row["method"]) == key]
        speed = statistics.median(row["messages"] / row["seconds"] for row in those)
        found[key] = speed, statistics.median(row["staleness"] for row in those)
    return found


def ratios(rows: list[dict[str, Any]], parts: int, delay: float, method: str) -> list[float]:
    """Ratios of the throughput to that of lock-step, round by round."""
    speeds = {
        (row["round"], row["method"]): row["messages"] / row["seconds"]
        for row in rows
        if (row["parts"], row["delay"]) == (parts, delay)
    }
    rounds = sorted({number for number, of in speeds if of == method})
    return [speeds[number, method] / speeds[number, "lock-step"] for number in rounds]


def simulated(method: str, parts: int, cost: float, extra: float, latency: float) -> float:
    """Messages per second of a pipeline of equal parts, each on its own processor. Simulated, not measured.

    Args:
      cost: seconds of a part's forward and backward pass and update, a third of it forward.
      extra: seconds that its synthesizer takes.
      latency: seconds that a message takes.

    Decoupled: part i starts on message k as soon as it has arrived and the previous one is done, with at most
    `QUEUE` in flight. Lock-step: forward through all parts and back. Micro-batches (`MICRO`, as in GPipe):
    the exact gradient as well, with the parts working in parallel.
    """
    if method == "lock-step":
        return 1.0 / (parts * cost + 2 * (parts - 1) * latency)
    if method == "micro-batches":
        return 1.0 / ((MICRO + parts - 1) * cost / MICRO + 2 * (parts - 1) * latency)
    count, forward, each = 40 * QUEUE, cost / 3, cost + extra
    done = np.zeros((parts, count + 1))  # the last column stands for the message before the first
    for k in range(count):
        came = 0.0
        for i in range(parts):
            start = max(done[i, k - 1], came)
            if i + 1 < parts and k >= QUEUE:
                start = max(start, done[i + 1, k - QUEUE] + latency)
            done[i, k], came = start + each, start + forward + latency
    half = count // 2
    return half / (done[-1, count - 1] - done[-1, count - 1 - half])


def write(out: Path) -> None:
    """Write the table and the plots of the existing rows."""
    rows = read_jsonl(out / "rows.jsonl")
    found = medians(rows)
    cells, panels = [], {}
    for parts, delay in sorted({key[:2] for key in found}):
        for method in METHODS:
            if (parts, delay, method) not in found:
                continue
            speed, stale = found[parts, delay, method]
            each = ratios(rows, parts, delay, method)
            ratio = f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f}, n = {len(each)})"
            cells.append([str(parts), f"{delay:g}", method, f"{speed:.1f}", ratio, f"{stale:.1f}"])
            panels.setdefault(f"{method}, {parts} parts", []).append((max(delay, 0.1), speed))
    lines = [
        "# Parts in processes of their own: throughput",
        "",
        f"Messages (batches of {BATCH}) per second, parts of 2 layers of {WIDTH}, one thread each, at most "
        f"{QUEUE} messages under way; two CPU cores shared by all parts. `decoupled` is a critic, "
        "`corrected` the same with `--correct`, `late gradients alone` is `--method none --correct`. Medians "
        "over rounds in one run; the ratio is the median of the ratios within a round, with the smallest and "
        "the largest.",
        "",
        markdown_table(
            ["parts", "delay, ms", "method", "messages / s", "to lock-step", "staleness, updates"], cells
        ).rstrip(),
    ]
    cost = 1.0 / (2 * found[2, 0.0, "lock-step"][0])
    extra = max(0.0, 1.0 / found[2, 0.0, "decoupled"][0] - cost)
    lines += [
        "",
        f"Simulated, not measured: parts that each have a processor, {1e3 * cost:.1f} ms a part (half of the "
        f"measured lock-step time of two) and {1e3 * extra:.1f} ms more where it has a synthesizer (what the "
        "measured decoupled time of two was above that; two processes that share two cores with others).",
        "",
        "| parts | latency, ms | lock-step | micro-batches (8) | decoupled |",
        "|---|---|---|---|---|",
    ]
    curves: dict[str, list[tuple[float, float]]] = {}
    for latency in LATENCIES:
        for parts in MANY:
            speeds = [simulated(m, parts, cost, extra, latency / 1e3) for m in SIMULATED]
            lines.append(
                f"| {parts} | {latency:g} | " + " | ".join(f"{speed:.1f}" for speed in speeds) + " |"
            )
            for method, speed in zip(SIMULATED, speeds, strict=True):
                curves.setdefault(f"{method}, {latency:g} ms", []).append((parts, speed))
    (out / "table.md").write_text("\n".join(lines) + "\n")
    shown = {
        label: points
        for label, points in curves.items()
        if label.endswith((" 10 ms", " 100 ms")) and label != "decoupled, 10 ms"
    }
    for ending in ("png", "svg"):
        save_lines(
            out / f"throughput.{ending}",
            [
                Panel("delay of every message, ms (0 drawn at 0.1)", "messages / s, measured", panels),
                Panel("parts", "messages / s, simulated", shown, logarithmic=False),
            ],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--out", type=Path, default=Path("results/decoupled"))
    parser.add_argument("--plot", action="store_true")
    args = parser.parse_args()
    if "RANK" in os.environ:
        return work(args)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.plot:
        (args.out / "rows.jsonl").unlink(missing_ok=True)
        for parts in args.parts:
            launch(args, parts)
    write(args.out)
    return None


if __name__ == "__main__":
    main()
