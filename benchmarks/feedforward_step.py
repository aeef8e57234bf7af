"""What does a synthetic gradient at every boundary cost? One training step of a cut net against backprop.

    python benchmarks/feedforward_step.py [--net "MNIST, fully connected" ...] [--layers 6] [--threads 1]

The published nets, on random pictures. The same net, data and optimizer; the methods take turns in blocks of
steps, so that a change of the machine's speed meets all of them. Reported: the median step in milliseconds,
and the median over rounds of (median step of the method / that of backprop in the same round).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from dni_rnn.experiments.bench import time_in_turns
from dni_rnn.feedforward import Method, cnn, decouple, fcn

CLASSES, ROWS = 10, 256
METHODS: dict[str, tuple[Method, list[int] | None]] = {
    "bprop": ("bprop", None),
    "dni, two hidden layers as wide as the net": ("dni", None),
    "dni, linear": ("dni", []),
    "cdni, one hidden layer as wide as the net": ("cdni", None),
    "cdni, linear": ("cdni", []),
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


def training_step(name: str, layers: int, method: Method, hidden: list[int] | None) -> Callable[[], None]:
    """One step of the net with its own weights."""
    torch.manual_seed(0)
    shape, build = NETS[name]
    x, labels = torch.randn(ROWS, *shape), torch.randint(CLASSES, (ROWS,))
    net = build(layers)
    cut = decouple(net, range(1, layers), x[:1], CLASSES, method, hidden=hidden)
    optimizer = torch.optim.Adam(cut.parameters(), 1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(cut(x, labels), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--net", nargs="+", choices=NETS, default=list(NETS)[:1])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--block", type=int, default=20, help="steps of a method before the next has its turn"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} thread(s), {ROWS} rows\n")
    print("| net | step | ms | ratio to bprop |\n|---|---|---|---|")
    for net in args.net:
        steps = {name: training_step(net, args.layers, *how) for name, how in METHODS.items()}
        for name, cost in time_in_turns(steps, args.rounds, args.block).items():
            print(
                f"| {net}, {args.layers} layers | {name} | {cost.milliseconds:.1f} | {cost.ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
