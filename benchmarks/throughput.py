"""Characters per second of every cell of a sweep, interleaved in one process.

    python benchmarks/throughput.py results/ptb [--rounds 7] [--data-dir DATA]

A sweep's own wall-clock seconds were taken while other runs shared the machine. Here each cell trains for
a moment in turn, round after round, so that a change of the machine's speed meets all of them; the
median over rounds is written to speed.json in the sweep's folder, and `dni-rnn report` uses it to turn
characters into seconds. One thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from dni_rnn.cli import parse_train
from dni_rnn.sweep import read_sweep
from dni_rnn.training import BaseLearner, learner_class

SECONDS_PER_TURN = 1.5


def symbols_per_second(learner: BaseLearner) -> float:
    """Train for a moment."""
    learner.update()
    symbols, start = learner.symbols, time.perf_counter()
    while time.perf_counter() - start < SECONDS_PER_TURN:
        learner.update()
    return (learner.symbols - symbols) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--data-dir", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    learners = {}
    for cell in read_sweep(args.folder):
        if cell.name not in learners:
            _, task, config = parse_train(list(cell.arguments))
            learners[cell.name] = learner_class(config)(config, task.load(args.data_dir), torch.device("cpu"))
    speeds: dict[str, list[float]] = {name: [] for name in learners}
    for _ in range(args.rounds):
        for name, learner in learners.items():
            speeds[name].append(symbols_per_second(learner))
    medians = {name: round(statistics.median(values)) for name, values in speeds.items()}
    for name, median in medians.items():
        low, high = min(speeds[name]), max(speeds[name])
        print(f"{name:32} {median:7,} characters/s  (rounds: {low:,.0f} to {high:,.0f})")
    about = {"torch": torch.__version__, "threads": 1, "rounds": args.rounds, "device": "cpu"}
    (args.folder / "speed.json").write_text(json.dumps({**about, "cells": medians}, indent=1) + "\n")


if __name__ == "__main__":
    main()
