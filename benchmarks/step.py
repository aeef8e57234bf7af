"""What does a synthetic gradient cost? One training step, DNI against plain truncated BPTT.

    python benchmarks/step.py [--hidden 256 1024] [--bptt 8] [--batch-size 32] [--threads 1]

Interleaved: blocks of steps of each method in turn, so that a change of the machine's speed meets all of
them, in several processes one after the other; reported is the median over processes of the median over
rounds of (method's median step / plain's). The plain step is a hand-written truncated-BPTT loop on
`nn.LSTM` that imports nothing of this package.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from dni_rnn import DNI, Boundary, MLPSynthesizer, OneHotTokens, RecurrentCore, SequenceModel, Window

SYMBOLS, EMBEDDING, CONTEXT = 50, 128, 8


def plain_step(hidden: int, batch: int, bptt: int) -> Callable[[], None]:
    """Truncated BPTT on `nn.LSTM`, without this package."""
    embedding, readout = nn.Embedding(SYMBOLS, EMBEDDING), nn.Linear(hidden, SYMBOLS)
    lstm = nn.LSTM(EMBEDDING, hidden)
    parameters = [*embedding.parameters(), *lstm.parameters(), *readout.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-3, fused=True)
    inputs = torch.randint(SYMBOLS, (bptt + 1, batch))
    state = [(torch.zeros(1, batch, hidden), torch.zeros(1, batch, hidden))]

    def step() -> None:
        optimizer.zero_grad()
        output, (h, c) = lstm(embedding(inputs[:-1]), state[0])
        loss = F.cross_entropy(readout(output).flatten(0, 1), inputs[1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        state[0] = (h.detach(), c.detach())

    return step


def dni_step(hidden: int, batch: int, bptt: int, layers: list[int], context: bool) -> Callable[[], None]:
    """The same with a synthetic gradient at the boundary."""
    example = RecurrentCore("lstm", 1, hidden).initial_state(1)
    encoder = OneHotTokens(SYMBOLS, CONTEXT) if context else None
    synthesizer = MLPSynthesizer(example, layers, context=encoder, reads="first", bounded=False)
    core = RecurrentCore("lstm", EMBEDDING, hidden, synthesizer=synthesizer, scale=0.1)
    model, estimator = SequenceModel(SYMBOLS, SYMBOLS, EMBEDDING, core), DNI()
    net = model.net_parameters()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    inputs = torch.randint(SYMBOLS, (bptt + 1, batch))
    boundary = Boundary(torch.randint(SYMBOLS, (CONTEXT, batch)) if context else None)
    window = Window(inputs[:-1], inputs[1:], boundary, boundary, bptt * batch)
    state = [model.initial_state(batch)]

    def step() -> None:
        optimizer.zero_grad()
        state[0] = estimator(model, [window], state[0], 1.0 / (bptt * batch)).state
        nn.utils.clip_grad_norm_(net, 1.0)
        optimizer.step()

    return step


def compare(
    steps: dict[str, Callable[[], None]],
    rounds: int,
    block: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[float, float]]:
    """For each: the median step in milliseconds, and the median ratio to the first, round by round."""
    medians: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(block):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            times = []
            for _ in range(block):
                start = clock()
                step()
                times.append(clock() - start)
            medians[name].append(statistics.median(times))
    first = next(iter(medians.values()))
    return {
        name: (
            1e3 * statistics.median(values),
            statistics.median(v / f for v, f in zip(values, first, strict=True)),
        )
        for name, values in medians.items()
    }


def measure(hidden: int, batch: int, bptt: int, rounds: int) -> dict[str, tuple[float, float]]:
    """All four steps at one size."""
    size = (hidden, batch, bptt)
    steps = {
        "plain `nn.LSTM`, truncated BPTT": plain_step(*size),
        "DNI, linear": dni_step(*size, [], False),
        "DNI, one hidden layer": dni_step(*size, [hidden], False),
        "DNI, one hidden layer, next 8 symbols": dni_step(*size, [hidden], True),
    }
    return compare(steps, rounds, block=40 if hidden < 512 else 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--bptt", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=7)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.threads} thread(s), batch {args.batch_size}, T {args.bptt}")
    print(f"medians of {args.processes} processes\n")
    print("| hidden | step | ms | ratio to plain | of the processes |\n|---|---|---|---|---|")
    # Left to itself the allocator maps and unmaps the larger tensors at every step, in some processes and
    # not in others, which costs as much as what is measured here. Processes read this when they start.
    os.environ.update(MALLOC_MMAP_THRESHOLD_=str(2**30), MALLOC_TRIM_THRESHOLD_=str(2**32))
    context = multiprocessing.get_context("spawn")
    for hidden in args.hidden:
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(args.processes):
            # Where its tensors happen to lie makes one process faster or slower than another for good.
            with context.Pool(1, torch.set_num_threads, (args.threads,)) as pool:
                size = (hidden, args.batch_size, args.bptt, args.rounds)
                for name, values in pool.apply(measure, size).items():
                    found.setdefault(name, []).append(values)
        for name, values in found.items():
            milliseconds, ratios = zip(*values, strict=True)
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            medians = f"{statistics.median(milliseconds):.2f} | {statistics.median(ratios):.3f}"
            print(f"| {hidden} | {name} | {medians} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
