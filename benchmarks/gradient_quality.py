"""How good is a synthetic gradient on a frozen net, and what does it cost?

    python benchmarks/gradient_quality.py [--data-dir DATA] [--out results/gradient-quality]

An LSTM of 128 is trained on Penn Treebank characters by truncated BPTT with T = 20, then frozen. Only a
synthesizer M is trained on the training text, by the package's own `DNI`, and the resulting gradient is
compared with full BPTT over 120 steps of validation text (`dni_rnn.gradient_quality`). One thread.

Each (candidate, seed) is a line of rows.jsonl; existing rows are not run again. --seconds measures the cost
of an update and writes seconds.jsonl. table.md and the plot are made from these two files; --report does
nothing else.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dni_rnn.config import RecurrentConfig
from dni_rnn.data.task import Data
from dni_rnn.estimators.bptt import TruncatedBPTT
from dni_rnn.estimators.dni import DNI
from dni_rnn.experiments.bench import time_in_turns
from dni_rnn.experiments.diagnose import diagnose_model
from dni_rnn.experiments.plots import Panel, save_lines
from dni_rnn.experiments.report import markdown_table, mean_sd
from dni_rnn.files import read_jsonl, write_atomically, write_jsonl
from dni_rnn.gradient_quality import Diagnosis
from dni_rnn.recurrent import SequenceModel
from dni_rnn.training.builders import build_model
from dni_rnn.training.recurrent import RecurrentLearner
from dni_rnn_tasks.ptb import PTB

HIDDEN, EMBEDDING, ROWS = 128, 32, 128
LEARNING_RATE = 3e-3  # of M, falling to zero along a cosine
CORE_UPDATES = 1600  # of 32 rows x 20 steps
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Candidate:
    """A synthesizer and how it is trained; the fields are those of `RecurrentConfig` where they share a name.

    Attributes:
      windows: the number of windows of T steps and 128 rows that M is trained on.
      core: the core at the end of its training, with a constant learning rate or one that fell to zero.
    """

    bptt: int
    synthesizer: str
    context: str = "next-tokens:8"
    synthesizer_reads: Literal["hidden", "state"] = "hidden"
    windows: int = 5000
    core: Literal["constant", "annealed"] = "constant"

    def config(self, seed: int) -> RecurrentConfig:
        """ĝ is injected as M predicts it: not scaled, not centred, and without a penalty."""
        return RecurrentConfig(
            hidden=HIDDEN, embedding=EMBEDDING, batch_size=ROWS, bptt=self.bptt, seed=seed,
            dni=True, scale=1.0, centre=False, restore=0.0, synthesizer=self.synthesizer,
            synthesizer_reads=self.synthesizer_reads, context=self.context,
        )  # fmt: skip


LENGTHS = (1, 2, 4)
NARROW = [Candidate(bptt, f"mlp:{64 * bptt}") for bptt in LENGTHS]
WIDE = [Candidate(bptt, "mlp:512") for bptt in LENGTHS]

PLAN: list[tuple[Candidate, int]] = [
    *((candidate, 3) for candidate in (*NARROW, *WIDE)),
    # What it depends on.
    (Candidate(1, "mlp:64", core="annealed"), 1),
    (Candidate(1, "mlp:512", core="annealed"), 1),
    (Candidate(1, "mlp:512", synthesizer_reads="state"), 1),
    (Candidate(1, "mlp:512", "none"), 1),
    (Candidate(1, "mlp:512", "next-tokens:4"), 1),
    (Candidate(1, "mlp:512", "next-tokens:16"), 1),
    *((Candidate(bptt, "linear"), 1) for bptt in LENGTHS),
    *((Candidate(bptt, "mlp:512,512", windows=3000), 1) for bptt in LENGTHS),
    (Candidate(1, "mlp:128"), 1),
    (Candidate(1, "mlp:256"), 1),
]
"""Candidates and how many seeds of each. A seed is that of the core and of M."""

RETIRED = [Candidate(bptt, "mlp:512,512", "gru:16:128", windows=3000) for bptt in LENGTHS]
"""Their rows stay. A GRU that read the context backwards was 6 to 30 windows of work and not worth it."""


@functools.cache
def load(data_dir: Path | None) -> Data:
    """Penn Treebank, the published characters."""
    return PTB().load(data_dir)


@functools.cache
def pretrained(core: str, seed: int, data_dir: Path | None) -> tuple[dict[str, Tensor], float]:
    """Weights of the net without M, and its validation bits per character."""
    annealed = core == "annealed"
    rate = 2e-3 if annealed else 1e-3
    config = RecurrentConfig(hidden=HIDDEN, embedding=EMBEDDING, batch_size=32, bptt=20, lr=rate, seed=seed)
    learner = RecurrentLearner(config, load(data_dir), CPU)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(learner.record.optimizer, CORE_UPDATES)
    for _ in range(CORE_UPDATES):
        learner.update()
        if annealed:
            schedule.step()
    return learner.model.state_dict(), learner.evaluate("valid", level=None)["bpc"]


def train_synthesizer(
    model: SequenceModel, candidate: Candidate, config: RecurrentConfig, data: Data
) -> None:
    """Train only M on the training text."""
    net, parameters = model.net_parameters(), model.synthesizer_parameters()
    for parameter in net:
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, candidate.windows)
    stream, state, estimator = data.stream("train", ROWS, 0), model.initial_state(ROWS), DNI()
    for _ in range(candidate.windows):
        window = stream.window(candidate.bptt, config.context_window)
        optimizer.zero_grad()
        state = estimator(model, [window], state, config.weight).state
        optimizer.step()
        schedule.step()
    for parameter in net:
        parameter.requires_grad_(True)


def multiply_adds(candidate: Candidate, data: Data) -> tuple[float, float]:
    """Multiply-adds of M at a boundary, and all that DNI adds, relative to a window of truncated BPTT.

    Counted by PyTorch, forward and backward, for one row. M is called in `send` and in `receive`, where it is
    trained. DNI also needs the gradient at the start of a window, which truncated BPTT does not. One-hot
    symbols are rows of a table that are added, without products.
    """
    config = candidate.config(seed=0)
    # In float64 an LSTM and a GRU on a CPU are made of operations that are counted; fused ones are not.
    model = build_model(config, data).double()
    window = data.stream("train", 1, 0).window(config.bptt, config.context_window)
    window = window._replace(start=window.end)  # the beginning of the text, where rows are done, is special
    state = model.initial_state(1)

    interface: Any = model.core.interface

    def both_edges() -> None:
        received = interface.receive(state, window.end.context)
        (received.hidden.sum() + received.cell.sum() + interface.send(state, window.end.context)).backward()

    plain, dni, synthesizer = (
        _products(work)
        for work in (
            lambda: TruncatedBPTT()(model, [window], state, 1.0),
            lambda: DNI()(model, [window], state, 1.0),
            both_edges,
        )
    )
    return synthesizer / plain, dni / plain - 1.0


def _products(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2


def seconds_ratio(config: RecurrentConfig, data_dir: Path | None) -> float:
    """The extra time of an update of `dni-rnn train` with --dni, relative to one without.

    In CPU time of the process: with one thread, this is wall-clock time on a machine that is not shared.
    """
    torch.set_num_threads(1)
    data = load(data_dir)
    plain = RecurrentConfig(hidden=HIDDEN, embedding=EMBEDDING, batch_size=ROWS, bptt=config.bptt)
    steps = {name: RecurrentLearner(c, data, CPU).update for name, c in (("plain", plain), ("dni", config))}
    return time_in_turns(steps, rounds=9, block=15, clock=time.process_time)["dni"].ratio - 1.0


def measure_seconds(path: Path, data_dir: Path | None) -> None:
    """Write `seconds_ratio` of every candidate, each in its own process (`dni_rnn.experiments.bench`)."""
    os.environ.update(MALLOC_MMAP_THRESHOLD_=str(2**30), MALLOC_TRIM_THRESHOLD_=str(2**32))
    found = []
    for candidate in {c: None for c, _ in PLAN if c.core == "constant"}:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            ratio = pool.apply(seconds_ratio, (candidate.config(0), data_dir))
        found.append({**asdict(candidate), "seconds_ratio": round(ratio, 3)})
        print(json.dumps(found[-1]), flush=True)
    write_jsonl(path, found)


def measure(candidate: Candidate, seed: int, data_dir: Path | None) -> dict[str, Any]:
    """One row."""
    data, config = load(data_dir), candidate.config(seed)
    weights, bits = pretrained(candidate.core, seed, data_dir)
    torch.manual_seed(seed)
    model = build_model(config, data)
    model.load_state_dict(weights, strict=False)
    start = time.perf_counter()
    train_synthesizer(model, candidate, config, data)
    seconds = time.perf_counter() - start
    found = diagnose_model(model, data, config.context_window, config.weight, [candidate.bptt])
    synthesizer_products, added_products = multiply_adds(candidate, data)
    return {
        **asdict(candidate),
        "seed": seed,
        "core_bits": round(bits, 4),
        **qualities(found),
        "synthesizer_parameters": sum(p.numel() for p in model.synthesizer_parameters()),
        "multiply_adds": round(synthesizer_products, 4),
        "added_multiply_adds": round(added_products, 4),
        "seconds": round(seconds, 2),
        "torch": torch.__version__,
    }


def qualities(found: Diagnosis) -> dict[str, float]:
    """The errors of a diagnosis at one T: of DNI, of truncated BPTT, and of ĝ for everything that follows."""
    values = {}
    for quality in found.parameters:
        prefix = "truncated_" if quality.estimator == "truncated" else ""
        values |= {f"{prefix}relative_error": quality.relative_error, f"{prefix}cosine": quality.cosine}
    (whole,) = (boundary for boundary in found.boundaries if boundary.horizon == 0)
    values["explained"] = whole.explained
    return {name: round(value, 5) for name, value in values.items()}


def candidate_of(row: dict[str, Any]) -> Candidate:
    """The candidate of a line of rows.jsonl or seconds.jsonl."""
    return Candidate(**{field.name: row[field.name] for field in fields(Candidate)})


def read_seconds(path: Path) -> dict[Candidate, float]:
    """The output of `measure_seconds`; empty if it has not been run."""
    return {candidate_of(row): row["seconds_ratio"] for row in read_jsonl(path)} if path.exists() else {}


def by_candidate(rows: Iterable[dict[str, Any]]) -> dict[Candidate, list[dict[str, Any]]]:
    """The rows of each candidate, sorted by T and cost."""
    groups: dict[Candidate, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(candidate_of(row), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: (item[0].bptt, item[1][0]["multiply_adds"])))


def describe(candidate: Candidate) -> str:
    """The settings in which candidates differ, in words."""
    state = ", reads h and c" if candidate.synthesizer_reads == "state" else ""
    core = ", annealed core" if candidate.core == "annealed" else ""
    return f"{candidate.synthesizer}, {candidate.context}{state}{core}"


def render(rows: list[dict[str, Any]], ratios: dict[Candidate, float]) -> str:
    """table.md."""
    groups = by_candidate(rows)
    lines = []
    for core in ("constant", "annealed"):
        for bptt in (1, 2, 4):
            chosen = {c: found for c, found in groups.items() if (c.bptt, c.core) == (bptt, core)}
            # Of the core and not of M: the same in every row of a seed.
            plain = {row["seed"]: row for found in chosen.values() for row in found}.values()
            if plain:
                name = "truncated BPTT" + (", annealed core" if core == "annealed" else "")
                error, cosine = (
                    mean_sd([row[f"truncated_{value}"] for row in plain], 3)
                    for value in ("relative_error", "cosine")
                )
                lines.append([name, str(bptt), str(len(plain)), error, "1", cosine, *["–"] * 7])
            lines += [
                line(candidate, found, ratios.get(replace(candidate, core="constant")))
                for candidate, found in chosen.items()
            ]
    bits = [row["core_bits"] for row in rows]
    return HEADER.format(low=min(bits), high=max(bits)) + markdown_table(COLUMNS, lines) + NOTES


COLUMNS = [
    "estimator", "T", "n", "relative error", "of truncated", "cosine", "explained", "parameters",
    "M", "DNI", "seconds", "windows", "seconds of training",
]  # fmt: skip

HEADER = """# Gradient quality of a synthesizer beside a frozen core

![Relative error](error.svg)

Penn Treebank characters (`ptb`, convention char), LSTM 128 with an embedding of 32, pretrained with truncated
BPTT (T = 20, batch 32, 1,600 updates, Adam) to {low:.2f} to {high:.2f} bits per character on the validation
split, then frozen.

"""

NOTES = """
Mean ± sample standard deviation over n seeds; a seed is that of core and M.

*Relative error*, *cosine*: of the gradient with respect to the LSTM's weights, summed over 120 steps of 128
rows of validation text, against full BPTT; mean over 6 such stretches. *Of truncated*: that error over the
error of truncated BPTT with the same core and T. *Explained*: 1 − |ĝ − g|² / |g|² at the boundaries, g the
true gradient of the loss of all that follows. *Parameters*: of M.

Costs, as shares of a window of T steps of truncated BPTT, forward and backward. *M*: multiply-adds of M at a
boundary, forward at both ends and backward. *DNI*: all multiply-adds that DNI adds, which are those of M and
the gradient at the start of the window. Rows of a one-hot table are added, not multiplied. *Seconds*: what
`--dni` adds to an update of `dni-rnn train` with these settings, over an update without it; medians of CPU
time, in turn in one process, one thread.

M is trained on *windows* of 128 rows of the training text: Adam, 3e-3 falling to zero along a cosine; ĝ
neither scaled nor centred. *Seconds of training*: of M, the least of the n; the CPU was shared by several
programs. The core's learning rate was 1e-3 to the end, the annealed one's 2e-3, falling to zero along a
cosine.

Made by `python benchmarks/gradient_quality.py` from [rows.jsonl](rows.jsonl).
"""


def line(candidate: Candidate, rows: list[dict[str, Any]], seconds_ratio: float | None) -> list[str]:
    """One line of the table."""
    ratios = [row["relative_error"] / row["truncated_relative_error"] for row in rows]
    return [
        describe(candidate),
        str(candidate.bptt),
        str(len(rows)),
        *(mean_sd(values, 3) for values in ([row["relative_error"] for row in rows], ratios)),
        *(mean_sd([row[name] for row in rows], 3) for name in ("cosine", "explained")),
        f"{rows[0]['synthesizer_parameters']:,}",
        f"{rows[0]['multiply_adds']:.2f}",
        f"{rows[0]['added_multiply_adds']:.2f}",
        "–" if seconds_ratio is None else f"{seconds_ratio:.2f}",
        f"{candidate.windows:,}",
        f"{min(row['seconds'] for row in rows):.0f}",
    ]


def panels(rows: list[dict[str, Any]]) -> list[Panel]:
    """Relative error against T, and against the cost of M."""
    groups = by_candidate(rows)

    def mean(candidate: Candidate, name: str = "relative_error") -> float:
        return statistics.fmean(row[name] for row in groups[candidate])

    by_length: dict[str, list[tuple[float, float]]] = {}
    by_length["truncated BPTT"] = [(c.bptt, mean(c, "truncated_relative_error")) for c in WIDE]
    for label, candidates in (("mlp:64T", NARROW), ("mlp:512", WIDE)):
        by_length[label] = [(c.bptt, mean(c)) for c in candidates]
    by_cost = {
        f"T={bptt}, mlp of one layer": [
            (mean(c, "multiply_adds"), mean(c))
            for c in groups
            if c in {Candidate(bptt, f"mlp:{width}") for width in (64, 128, 256, 512)}
        ]
        for bptt in LENGTHS
    }
    error = "relative error of the core's gradient"
    return [Panel("T", error, by_length), Panel("multiply-adds of M per window", error, by_cost)]


def report(out: Path) -> None:
    """Write table.md and the plot."""
    rows = read_jsonl(out / "rows.jsonl")
    write_atomically(out / "table.md", render(rows, read_seconds(out / "seconds.jsonl")).encode())
    for ending in ("png", "svg"):
        save_lines(out / f"error.{ending}", panels(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/gradient-quality"))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seconds", action="store_true", help="measure seconds instead of quality")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    path = args.out / "rows.jsonl"
    if args.seconds:
        measure_seconds(args.out / "seconds.jsonl", args.data_dir)
    elif not args.report:
        torch.set_num_threads(1)
        args.out.mkdir(parents=True, exist_ok=True)
        rows = read_jsonl(path) if path.exists() else []
        done = {(candidate_of(row), row["seed"]) for row in rows}
        wanted = [(candidate, seed) for candidate, seeds in PLAN for seed in range(seeds)]
        for candidate, seed in wanted:
            if (candidate, seed) not in done:
                rows.append(measure(candidate, seed, args.data_dir))
                write_jsonl(path, rows)
                print(json.dumps(rows[-1]), flush=True)
    report(args.out)


if __name__ == "__main__":
    main()
