"""What does a synthetic gradient at every boundary cost? One training step of a cut net against backprop.

    python benchmarks/feedforward_step.py [--model mlp cnn] [--layers 6] [--threads 1] [--rounds 9]

The same net, data and optimizer; the methods take turns in blocks of steps, so that a change of the
machine's speed meets all of them. Reported: the median step in milliseconds, and the median over rounds
of (median step of the method / that of backprop in the same round).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch.nn import functional as F

from dni_rnn.bench import compare
from dni_rnn.feedforward import Method, cnn, decouple, fcn

CLASSES, ROWS = 10, 256
METHODS: dict[str, tuple[Method, list[int] | None]] = {
    "bprop": ("bprop", None),
    "dni, two hidden layers as wide as the net": ("dni", None),
    "dni, linear": ("dni", []),
    "cdni, one hidden layer as wide as the net": ("cdni", None),
    "cdni, linear": ("cdni", []),
    "critic, linear classifier": ("critic", None),
}


def training_step(model: str, layers: int, method: Method, hidden: list[int] | None) -> Callable[[], None]:
    """One step of the net with its own weights."""
    torch.manual_seed(0)
    x, labels = torch.randn(ROWS, 1, 28, 28), torch.randint(CLASSES, (ROWS,))
    net = fcn(784, CLASSES, layers, 256) if model == "mlp" else cnn((1, 28, 28), CLASSES, layers, 64)
    cut = decouple(net, range(1, layers), x[:1], CLASSES, method, hidden=hidden)
    optimizer = torch.optim.Adam(cut.parameters(), 1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(cut(x, labels), labels).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=["mlp", "cnn"], default=["mlp"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} thread(s), {ROWS} rows\n")
    print("| net | step | ms | ratio to bprop |\n|---|---|---|---|")
    for model in args.model:
        steps = {name: training_step(model, args.layers, *how) for name, how in METHODS.items()}
        found = compare(steps, args.rounds, block=20 if model == "mlp" else 1)
        for name, cost in found.items():
            print(
                f"| {model} {args.layers} | {name} | {cost.milliseconds:.1f} | {cost.ratio:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
