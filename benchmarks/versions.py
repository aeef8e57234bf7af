"""Does a step cost as much as in another version of the package?

    python benchmarks/versions.py CHECKOUT_BEFORE CHECKOUT_AFTER [--rounds 101]

Trains an LSTM with an interface in a plain loop with both checkouts, in one process, taking turns in an order
that changes from round to round. Prints CPU time of the thread: the median over rounds of the ratio, with
quartiles, and the smallest time of each version, which other processes disturb least.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

SIZES = ((256, 32, 8), (128, 64, 2), (128, 32, 8))  # hidden, rows, T
INPUTS = 32


def loaded(checkout: Path) -> Any:
    """The package of a checkout; a package loaded before stays usable."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "dni_rnn"]:
        del sys.modules[name]
    sys.path.insert(0, str(checkout.resolve()))
    package = importlib.import_module("dni_rnn")
    assert package.__file__ is not None
    assert Path(package.__file__).is_relative_to(checkout.resolve()), package.__file__
    names = {name: getattr(package, name) for name in ("Interface", "MLPSynthesizer")}
    sys.path.pop(0)
    return names


def calls(package: Any, hidden: int, rows: int, steps: int) -> dict[str, Callable[[], Any]]:
    """A training step, and separately the two calls of an interface in it."""
    torch.manual_seed(0)
    lstm = nn.LSTM(INPUTS, hidden)
    state = [(torch.zeros(1, rows, hidden), torch.zeros(1, rows, hidden))]
    synthesizer = package["MLPSynthesizer"](state[0], hidden=[hidden // 4])
    interface = package["Interface"](synthesizer, scale=0.1, centre=True)
    optimizer = torch.optim.Adam([*lstm.parameters(), *interface.parameters()], 1e-3)
    x = torch.randn(steps, rows, INPUTS)

    def step() -> None:
        output, end = lstm(x, interface.receive(state[0]))
        loss = output.square().mean() + interface.send(end)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state[0] = tuple(part.detach() for part in end)  # type: ignore[assignment]

    return {"step": step, "receive, send": lambda: (interface.receive(state[0]), interface.send(state[0]))}


def seconds(call: Callable[[], Any], times: int) -> float:
    start = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - start) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=101)
    args = parser.parse_args()
    torch.set_num_threads(1)
    packages = [loaded(args.before), loaded(args.after)]
    print(
        "| LSTM, rows, T | what | ratio (quartiles) | smallest, ms: before | after |\n|---|---|--:|--:|--:|"
    )
    for size in SIZES:
        versions = [calls(package, *size) for package in packages]
        for what, times in (("step", 10), ("receive, send", 40)):
            took: list[list[float]] = [[], []]
            for number in range(args.rounds + 1):
                for which in (0, 1) if number % 2 else (1, 0):
                    took[which].append(seconds(versions[which][what], times))
            before, after = (each[1:] for each in took)  # the first round warms up
            ratios = [new / old for old, new in zip(before, after, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            name = ", ".join(map(str, size))
            print(
                f"| {name} | {what} | {middle:.3f} ({low:.3f} to {high:.3f}) | {1e3 * min(before):.3f} "
                f"| {1e3 * min(after):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
