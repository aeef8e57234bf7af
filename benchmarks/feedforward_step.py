"""The cost of a synthetic gradient at every boundary: a step of a cut net, relative to backpropagation.

    python benchmarks/feedforward_step.py [--net "MNIST, fully connected" ...] [--layers 6] [--threads 1]
    python benchmarks/feedforward_step.py --operations     # multiply-adds of an example, no time

Uses the published nets, on random pictures, with the same net, data and optimizer for every method. The
methods take turns in blocks of steps, so that a change of the machine's speed affects all of them. Reports
the median step in milliseconds, and the median over rounds of (median step of the method / that of
backpropagation in the same round).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dni_rnn.experiments.bench import time_in_turns
from dni_rnn.feedforward import Method, decouple
from dni_rnn.nets import cnn, fcn
from dni_rnn.synthesizers import ErrorFeedback

CLASSES, ROWS = 10, 256
METHODS: dict[str, tuple[Method, list[int] | None]] = {
    "bprop": ("bprop", None),
    "dni, two hidden layers as wide as the net": ("dni", None),
    "dni, linear": ("dni", []),
    "cdni, one hidden layer as wide as the net": ("cdni", None),
    "cdni, linear": ("cdni", []),
    "cdni, error of a local classifier": ("cdni", []),  # with ErrorFeedback
    "critic, linear classifier": ("critic", None),
    "local": ("local", None),
    "local and critic": ("local+critic", None),
}


MNIST, CIFAR = (1, 28, 28), (3, 32, 32)
NETS: dict[str, tuple[tuple[int, int, int], Callable[[int], nn.Sequential]]] = {
    "MNIST, fully connected": (MNIST, lambda layers: fcn(math.prod(MNIST), CLASSES, layers, 256)),
    "CIFAR-10, fully connected": (CIFAR, lambda layers: fcn(math.prod(CIFAR), CLASSES, layers, 1000)),
    "MNIST, convolutional": (MNIST, lambda layers: cnn(MNIST, CLASSES, layers, 64)),
    "CIFAR-10, convolutional": (CIFAR, lambda layers: cnn(CIFAR, CLASSES, layers, 128)),
}


def training_step(name: str, layers: int, step_of: str, rows: int = ROWS) -> Callable[[], None]:
    """One step of the net with its own weights."""
    torch.manual_seed(0)
    shape, build = NETS[name]
    x, labels = torch.randn(rows, *shape), torch.randint(CLASSES, (rows,))
    method, hidden = METHODS[step_of]
    synthesizer = partial(ErrorFeedback, symbols=CLASSES) if "error" in step_of else None
    cuts = range(1, layers)
    cut = decouple(build(layers), cuts, x[:1], CLASSES, method, hidden=hidden, synthesizer=synthesizer)
    optimizer = torch.optim.Adam(cut.parameters(), 1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(cut(x, labels), labels).backward()
        optimizer.step()

    return step


class Operations(TorchDispatchMode):
    """Counts the operations of matrix products and convolutions, by torch's formulas.

    torch's own counter also follows modules, and then misses a gradient that is taken within a forward pass.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def multiply_adds(name: str, layers: int, step_of: str) -> float:
    """Multiply-adds of a step, forward and backward, per example."""
    rows = 4
    step = training_step(name, layers, step_of, rows)
    step()
    with Operations() as counted:
        step()
    return counted.total / 2 / rows


def operations() -> None:
    """Print the table of `multiply_adds`, in millions, for all published nets."""
    nets = [(name, layers) for name in NETS for layers in ((6,) if "fully" in name else (3, 4))]
    print("| step | " + " | ".join(f"{name}, {layers} layers" for name, layers in nets) + " |")
    print("|---|" + "--:|" * len(nets))
    for step_of in METHODS:
        found = [f"{multiply_adds(*net, step_of) / 1e6:.1f}" for net in nets]
        print(f"| {step_of} | " + " | ".join(found) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--net", nargs="+", choices=NETS, default=list(NETS)[:1])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--block", type=int, default=20, help="steps of a method before the next has its turn"
    )
    parser.add_argument("--operations", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.operations:
        operations()
        return
    print(f"torch {torch.__version__}, {args.threads} thread(s), {ROWS} rows\n")
    print("| net | step | ms | ratio to bprop |\n|---|---|---|---|")
    for net in args.net:
        steps = {name: training_step(net, args.layers, name) for name in METHODS}
        for name, cost in time_in_turns(steps, args.rounds, args.block).items():
            print(
                f"| {net}, {args.layers} layers | {name} | {cost.milliseconds:.1f} | {cost.ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
