"""The cost of a trace: an update with it, relative to truncated BPTT, interleaved, one thread.

    python benchmarks/trace_speed.py [--rounds 15] [--device cpu]

An update is the whole step: embedding, `nn.LSTM`, readout, cross entropy, backward, clipping, Adam. The nets
take turns in blocks of updates, round after round, so that a change of the machine's speed affects all of
them. Prints medians over rounds of the milliseconds per update and of the ratio to the plain net in the same
round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dni_rnn.traces import Traced

SYMBOLS = 50
SIZES = [(256, 32, 8), (256, 32, 2), (128, 64, 2), (128, 64, 1), (1024, 32, 8)]
"""Hidden units (and width of the embedding), rows, steps of a window."""


def updates(hidden: int, rows: int, steps: int, device: str, wait: int) -> dict[str, Callable[[], Any]]:
    """One update for each of several nets of the same size, by name."""
    embedding = nn.Embedding(SYMBOLS, hidden)
    lstm, readout = nn.LSTM(hidden, hidden), nn.Linear(hidden, SYMBOLS)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(SYMBOLS, (steps, rows), generator=generator).to(device) for _ in range(2))

    def build(traced: bool, symbols: bool) -> Callable[[], None]:
        net = copy.deepcopy(nn.ModuleList([embedding, lstm, readout])).to(device)
        look_up, plain, out = net
        core = plain
        if traced:
            core = Traced(plain, wait, embedding=look_up if symbols else None)  # type: ignore[arg-type]
        optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
        state = tuple(torch.zeros(1, rows, hidden, device=device) for _ in range(2))

        def update() -> None:
            nonlocal state
            optimizer.zero_grad()
            state = tuple(leaf.detach() for leaf in state)
            output, state = core(x if symbols else look_up(x), state)
            F.cross_entropy(out(output).flatten(0, 1), y.flatten()).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()

        return update

    return {
        "truncated": build(False, False),
        "trace": build(True, False),
        "trace, symbols": build(True, True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--wait", type=int, default=32, help="`steps` of the trace")
    parser.add_argument("--only", type=int, nargs="*", help="rows of the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for number, (hidden, rows, steps) in enumerate(SIZES):
        if args.only and number not in args.only:
            continue
        nets = updates(hidden, rows, steps, args.device, args.wait)
        block = max(1, 20_000_000 // (hidden * hidden * rows * steps))
        seconds: dict[str, list[float]] = {name: [] for name in nets}
        for turn in range(args.rounds + 2):
            for name, update in nets.items():
                began = time.perf_counter()
                for _ in range(block):
                    update()
                if args.device != "cpu":
                    torch.cuda.synchronize()
                if turn > 1:
                    seconds[name].append((time.perf_counter() - began) / block)
        for name, each in seconds.items():
            ratio = statistics.median(b / a for a, b in zip(seconds["truncated"], each, strict=True))
            print(
                f"LSTM {hidden}, {rows} rows, T = {steps}: {name:16}"
                f"{1e3 * statistics.median(each):8.2f} ms  x {ratio:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
