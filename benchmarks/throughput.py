"""Characters per second of every cell of a sweep, interleaved in one process.

    python benchmarks/throughput.py results/ptb [--rounds 7] [--data-dir DATA]

A sweep's own wall-clock seconds were measured while other runs shared the machine. Here the cells train in
blocks of updates in turn, round after round, so that a change of the machine's speed affects all of them; the
median over rounds is written to speed.json in the sweep's folder, and `dni-rnn report` uses it to convert
characters to seconds. One thread.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from dni_rnn.cli import parse_train
from dni_rnn.experiments.bench import time_in_turns
from dni_rnn.experiments.sweep import read_sweep
from dni_rnn.training.learners import learner_class


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
            learners[cell.name] = learner_class(task, config)(
                config, task.load(args.data_dir), torch.device("cpu")
            )
    costs = time_in_turns({name: learner.update for name, learner in learners.items()}, args.rounds, block=30)
    medians = {
        name: round(1e3 * learner.counters.symbols / learner.counters.step / costs[name].milliseconds)
        for name, learner in learners.items()
    }
    for name, median in medians.items():
        print(f"{name:32} {median:7,} characters/s")
    about = {"torch": torch.__version__, "threads": 1, "rounds": args.rounds, "device": "cpu"}
    (args.folder / "speed.json").write_text(json.dumps({**about, "cells": medians}, indent=1) + "\n")


if __name__ == "__main__":
    main()
