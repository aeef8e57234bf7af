"""How close does a trace come to the gradient of full BPTT on a frozen net?

    python benchmarks/trace_quality.py [--data-dir DATA] [--out results/trace-quality]

A net of 128 units is trained on Penn Treebank characters by truncated BPTT with T = 20, then frozen. Each
estimator of `dni-rnn diagnose` is then compared at each T with full BPTT over 120 steps of validation text.
Each (core, seed) is a few lines of rows.jsonl; existing rows are not run again, and with --report nothing is.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dni_rnn.config import RecurrentConfig
from dni_rnn.experiments.diagnose import diagnose_model
from dni_rnn.experiments.report import markdown_table, mean_sd
from dni_rnn.files import read_jsonl, write_atomically, write_jsonl
from dni_rnn.training.recurrent import RecurrentLearner
from dni_rnn_tasks.ptb import PTB

CORES = ("lstm", "gru", "rnn", "mingru", "diagonal")
SEEDS = (0, 1, 2)
LENGTHS = (1, 2, 4, 8)
UPDATES = 1000  # of 64 rows x 20 steps

HEADER = """# Traces on a frozen net: gradient error and bias

Penn Treebank characters (convention char), 128 units, {updates:,} updates of truncated BPTT (T = 20,
batch 64, Adam at 1e-3), then frozen. *Error*: relative, of the gradient of the core's weights over
120 steps of up to 128 rows of validation text, against full BPTT; mean over 6 stretches. *Bias*: the same
of the expected gradient, from the product of the errors of two disjoint halves of the rows. *Gain*: how
much of the true gradient is in the estimate. *Cost*: seconds of both halves, as a multiple of truncated
BPTT at this T; shared machine. `trace`: own path, or exact in mingru and diagonal; it learns nothing and is
conditioned on nothing. `lookahead:8`: backpropagation through 8 steps more, an upper bound for any M that is
conditioned on 8 symbols. Mean ± sample standard deviation over n seeds.

"""


def measure(core: str, seed: int, data_dir: Path | None) -> list[dict[str, Any]]:
    """The rows of one net."""
    data = PTB().load(data_dir)
    config = RecurrentConfig(core=core, hidden=128, embedding=32, bptt=20, seed=seed)
    learner = RecurrentLearner(config, data, torch.device("cpu"))
    for _ in range(UPDATES):
        learner.update()
    bits = learner.evaluate("valid", None)["bpc"]
    found = diagnose_model(learner.model, data, 8, config.weight, LENGTHS)
    about = {"core": core, "seed": seed, "valid_bpc": round(bits, 4), "torch": torch.__version__}
    return [
        about | {k: v if isinstance(v, str) else round(v, 5) for k, v in asdict(q).items()}
        for q in found.parameters
    ]


def render(rows: list[dict[str, Any]]) -> str:
    """table.md."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["core"], row["bptt"], row["estimator"]), []).append(row)
    order = sorted(groups, key=lambda key: (CORES.index(key[0]), key[1]))
    lines = [
        [
            f"{core}, {estimator}",
            str(bptt),
            str(len(groups[core, bptt, estimator])),
            *(
                mean_sd([row[name] for row in groups[core, bptt, estimator]], 3)
                for name in ("relative_error", "bias", "gain", "cosine")
            ),
            mean_sd([row["cost"] for row in groups[core, bptt, estimator]], 1),
        ]
        for core, bptt, estimator in order
    ]
    columns = ["core, estimator", "T", "n", "error", "bias", "gain", "cosine similarity", "cost"]
    made = "\nMade by `python benchmarks/trace_quality.py` from [rows.jsonl](rows.jsonl).\n"
    return HEADER.format(updates=UPDATES) + markdown_table(columns, lines) + made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results/trace-quality"))
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.out / "rows.jsonl"
    rows = read_jsonl(path) if path.exists() else []
    for seed in SEEDS:
        for core in CORES:
            if args.report or any((row["core"], row["seed"]) == (core, seed) for row in rows):
                continue
            rows += measure(core, seed, args.data_dir)
            write_jsonl(path, rows)
            print(f"{core}, seed {seed}", flush=True)
    write_atomically(args.out / "table.md", render(rows).encode())


if __name__ == "__main__":
    main()
