"""The cost of a trace on a GPU: updates of `dni-rnn train` as CUDA graphs, in turns, and where time goes.

    python benchmarks/trace_on_gpu.py [--hidden 1024 --rows 256 --steps 2 8 --rounds 9]

Prints one row for each method, in milliseconds per update, medians over rounds of blocks that take turns:
*update* is the whole update, *replay* only the replayed graph, with its ratio to truncated BPTT in the same
round. A trace is measured in two ways: with the LSTM of cuDNN, whose gates are recomputed (the default), and
as *cells*, step by step with the kernels of `nn.LSTMCell`, which keep the gates (`Traced(fused=False)`). Then
it prints the products and kernels of a step alone, and the kernels of one graph with their times. On a CPU no
graph is recorded; that only tests the script.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dni_rnn.experiments.bench import Cost, Size, learner, time_in_turns
from dni_rnn.traces import lstm

Work = Callable[[], Any]

TRACE = {"trace": 32}
ROWS: dict[str, tuple[dict[str, Any], bool]] = {
    "truncated": ({}, True),
    "trace": (TRACE, True),
    "trace, cells": (TRACE, False),
    "trace, restore": (TRACE | {"restore": 0.1}, True),
    "trace, restore, cells": (TRACE | {"restore": 0.1}, False),
    "dni": ({"dni": True}, True),
    "dni, trace": (TRACE | {"dni": True}, True),
    "dni, trace, cells": (TRACE | {"dni": True}, False),
}
"""Settings, and `fused` of the trace."""


def build(size: Size, settings: dict[str, Any], fused: bool) -> tuple[Work, Work | None]:
    """An update, and its recorded graph if there is one."""
    trained = learner(size, settings)
    for traced in getattr(trained.estimator, "_traced", []):
        traced.fused = fused
    for _ in range(6):
        trained.update()
    recordings = list(getattr(trained._run, "_recordings", {}).values())
    return trained.update, recordings[0][1] if recordings else None


def wait(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def several(work: Work, times: int) -> Work:
    """`work`, `times` times without synchronisation in between, as in training."""

    def call() -> None:
        for _ in range(times):
            work()

    return call


def measure(works: dict[str, Work], rounds: int, times: int, device: str) -> dict[str, Cost]:
    """The cost of one repetition, for works that do something `times` times."""
    found = time_in_turns(works, rounds, 1, partial(wait, device))
    return {name: cost._replace(milliseconds=cost.milliseconds / times) for name, cost in found.items()}


def compare(size: Size, rounds: int, block: int) -> Work:
    """Print the table of one size; returns the recorded graph of a trace with cells."""
    began = wait(size.device)
    built = {name: build(size, *row) for name, row in ROWS.items()}
    seconds = wait(size.device) - began
    alone = {name: replay or update for name, (update, replay) in built.items()}
    updates, replays = (
        measure({name: several(work, block) for name, work in works.items()}, rounds, block, size.device)
        for works in ({name: update for name, (update, _) in built.items()}, alone)
    )
    print(f"\nLSTM {size.hidden}, {size.batch_size} rows, T = {size.bptt} ({seconds:.1f} s to build)")
    for name in ROWS:
        update, (replay, beside) = updates[name].milliseconds, replays[name]
        ratio = f"x {beside:.3f}{'' if built[name][1] else '  not recorded'}"
        print(f"{name:20} update {update:8.3f}  replay {replay:8.3f}  {ratio}")
    return alone["trace, cells"]


def parts(size: Size, rounds: int, block: int) -> None:
    """The products and kernels that make up a step, each alone and in turns."""
    rows, hidden, steps, device = size.batch_size, size.hidden, size.bptt, size.device

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device) * 0.1

    h, c, weight, gates = (
        draw(rows, hidden),
        draw(rows, hidden),
        draw(4 * hidden, hidden),
        draw(rows, 4 * hidden),
    )
    turned, many, states = weight.t().contiguous(), draw(steps * rows, 4 * hidden), draw(steps * rows, hidden)
    works: dict[str, Work] = {
        "h Wᵀ": lambda: h @ weight.t(),
        "delta W": lambda: gates @ weight,
        "delta W, W turned before": lambda: torch.nn.functional.linear(gates, turned),
        "deltaᵀ h, all steps": lambda: many.t() @ states,
        "deltaᵀ h, three gates": lambda: many[:, : 3 * hidden].t() @ states,
        "copy of delta": many.clone,
    }
    if device == "cuda":
        works["cell forward"] = lambda: lstm.KERNEL.forward(gates, gates, c)
        works["cell backward"] = lambda: lstm.KERNEL.backward(h, c, c, c, gates)
    recorded = {name: _often(work, block, device) for name, work in works.items()}
    for name, cost in measure(recorded, rounds, block, device).items():
        print(f"{name:26}{1e3 * cost.milliseconds:8.1f} µs")


def _often(work: Work, block: int, device: str) -> Work:
    call = several(work, block)
    if device != "cuda":
        return call
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def kernels(replay: Work, times: int = 5, most: int = 40) -> None:
    """The kernels of one recording, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(times):
            replay()
        torch.cuda.synchronize()
    found = [event for event in profiled.key_averages() if event.self_device_time_total > 0]
    found.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in found) / times
    print(f"\nkernels of `trace, cells`: {sum(e.count for e in found) / times:.0f}, {total:.0f} µs in all")
    for event in found[:most]:
        print(
            f"{event.self_device_time_total / times:8.1f} µs {event.count / times:6.1f} x  {event.key[:110]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="*", default=[8, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block", type=int, default=20)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, TF32, {args.rounds} rounds of {args.block}")
    began = time.perf_counter()
    for steps in args.steps:
        size = Size(args.hidden, steps, args.rows, device, 1, "tf32" if device == "cuda" else "float32")
        replay = compare(size, args.rounds, args.block)
        print()
        parts(size, args.rounds, args.block)
        if device == "cuda":
            kernels(replay)
        print(f"{time.perf_counter() - began:.1f} s so far", flush=True)


if __name__ == "__main__":
    main()
