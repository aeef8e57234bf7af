"""The effect of the age of a gradient, with and without correction.

    python benchmarks/age.py --out results/age [--methods dni cdni critic none] [--under-way 1 2 4 8 16 32]

Trains the parts of a net that is cut at every boundary as `--decoupled` does, but in one process and with
exact ages: with k messages in flight, a gradient comes back after k − 1 more messages have been learnt from.
The task is addition with a sigmoid net of 3 layers, where age does harm. A rate is a factor on all learning
rates. The test error is that of the weights with the lowest validation error. Existing rows are not run
again.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dni_rnn.data.labelled import Batches
from dni_rnn.experiments.plots import Panel, save_lines
from dni_rnn.experiments.report import markdown_table, mean_sd
from dni_rnn.files import read_jsonl, write_atomically, write_jsonl
from dni_rnn.stashed import Stashed
from dni_rnn.training.feedforward import (
    build_model,
    context_of,
    error_rate,
    loss_of,
    planned_updates,
    rate_factor,
)
from dni_rnn.training.learner import adam
from dni_rnn_tasks.addition import Addition, AdditionConfig

METHODS = ("dni", "cdni", "critic", "none")
UNDER_WAY = (1, 2, 4, 8, 16, 32)
VALIDATIONS = 20
CPU = torch.device("cpu")

PAGE = """# What the age of a gradient does, and its correction

Test error in percent of the weights with the lowest validation error on addition: a sigmoid net of 3 layers,
each a part of its own, {epochs} passes, mean ± sample standard deviation over {seeds} seeds. Ages are exact
and the same at every cut: with k messages under way a gradient comes back when its part has learnt from k − 1
more. `corrected`: `--correct`. `none, corrected` has no synthetic gradient at all; with 1 under way it is
backpropagation. Rates are those of the task, chosen for one process, unless a factor stands there. Written by
[the script](../../benchmarks/age.py).

![error %](error.svg)

{table}"""


class Message(NamedTuple):
    """An output of a part, kept until its true gradient is back."""

    out: Tensor
    synthetic: Tensor | None  # ĝ
    made: Stashed | None  # with correction
    answer: Tensor | None  # without correction: the gradient that was sent at once to the part before


class Part:
    """A part of the net and the interface at its end."""

    def __init__(self, net: nn.Module, interface: Any, config: AdditionConfig) -> None:
        self.net, self.interface = net, interface
        groups = [(list(net.parameters()), config.lr or 0.0)]
        if interface is not None:
            groups.append((list(interface.parameters()), config.synthesizer_lr or 0.0))
        self.optimizer = adam(groups, CPU)
        self.rates = [rate for _, rate in groups]

    def set_rates(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = factor * rate

    def learn(self, x: Tensor, context: Tensor, corrected: bool) -> Message:
        """Learn from a message at once."""
        x = x.detach().requires_grad_()
        self.optimizer.zero_grad()
        made = Stashed(self.net, x) if corrected else None
        out = self.net(x) if made is None else made.out
        synthetic = None
        if self.interface is not None:
            synthetic = self.interface.synthetic_gradient(out.detach(), context)
            if made is None:
                out.backward(synthetic)
            else:
                made.out.backward(synthetic, retain_graph=True)
        self.optimizer.step()
        return Message(out.detach(), synthetic, made, x.grad if made is None else None)

    def hear(self, message: Message, gradient: Tensor, context: Tensor) -> Tensor | None:
        """Handle the gradient that comes back: the true one, or without correction the next part's guess."""
        self.optimizer.zero_grad()
        if self.interface is not None:
            self.interface.receive(message.out, context).backward(gradient)
        if message.made is not None:
            left_out = gradient if message.synthetic is None else gradient - message.synthetic
            message.made.out.backward(left_out)
        self.optimizer.step()
        return message.answer if message.made is None else message.made.inputs[0].grad

    def finish(self, x: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        """The last part's update: its output and the true gradient of its input."""
        x = x.detach().requires_grad_()
        out = self.net(x)
        self.optimizer.zero_grad()
        loss_of(out, targets, smoothing).backward()
        self.optimizer.step()
        assert x.grad is not None
        return out, x.grad


def train(row: dict[str, Any]) -> dict[str, Any]:
    config = AdditionConfig(method=row["method"], epochs=row["epochs"], seed=row["seed"]).resolved
    assert config.lr is not None
    assert config.synthesizer_lr is not None
    rates = {name: getattr(config, name) * row["rate"] for name in ("lr", "synthesizer_lr")}
    config = dataclasses.replace(config, **rates)
    data = Addition().load(None)
    torch.manual_seed(row["seed"])
    model = build_model(config, data)
    interfaces: list[Any] = [*model.interfaces] or [None] * (len(model.parts) - 1)
    *parts, last = [
        Part(net, interface, config) for net, interface in zip(model.parts, [*interfaces, None], strict=True)
    ]
    batches = Batches(data, "train", config.batch_size, CPU, row["seed"])
    steps = planned_updates(config, batches)
    kept: deque[tuple[list[Message], Tensor, Tensor]] = deque()
    best, test, begun = float("inf"), float("nan"), time.perf_counter()
    for step in range(steps):
        if len(kept) == row["under_way"]:
            messages, gradient, context = kept.popleft()
            for part, message in zip(reversed(parts), reversed(messages), strict=True):
                back = part.hear(message, gradient, context)
                assert back is not None
                gradient = back
        x, targets = batches.batch(step)
        context = context_of(targets)
        for part in [*parts, last]:
            part.set_rates(rate_factor(config, step, steps))
        messages, message = [], x
        for part in parts:
            messages.append(part.learn(message, context, row["corrected"]))
            message = messages[-1].out
        kept.append((messages, last.finish(message, targets, config.smoothing or 0.0)[1], context))
        if (step + 1) % (steps // VALIDATIONS) == 0:
            error = error_rate(model, data, "valid", CPU)
            if error < best:
                best, test = error, error_rate(model, data, "test", CPU)
    return row | {"valid_error": best, "test_error": test, "seconds": round(time.perf_counter() - begun, 1)}


def name_of(row: dict[str, Any]) -> str:
    rate = "" if row["rate"] == 1 else f", rates × {row['rate']:g}"
    return row["method"] + (", corrected" if row["corrected"] else "") + rate


def report(out: Path) -> None:
    """Write table.md and the plot."""
    rows = read_jsonl(out / "rows.jsonl")
    ages = sorted({row["under_way"] for row in rows})
    names = list(
        dict.fromkeys(name_of(row) for row in sorted(rows, key=lambda r: (-r["rate"], r["corrected"])))
    )
    errors: dict[str, dict[int, list[float]]] = {name: {} for name in names}
    for row in rows:
        errors[name_of(row)].setdefault(row["under_way"], []).append(row["test_error"])
    seeds = {len(values) for cells in errors.values() for values in cells.values()}
    table = markdown_table(
        ["under way", *map(str, ages)],
        [
            [name, *(mean_sd(cells[age], 1) if age in cells else "–" for age in ages)]
            for name, cells in errors.items()
        ],
    )
    page = PAGE.format(
        epochs=f"{rows[0]['epochs']:g}", seeds=" or ".join(map(str, sorted(seeds))), table=table
    )
    write_atomically(out / "table.md", page.encode())
    lines = {
        title: {
            name: sorted((float(age), sum(v) / len(v)) for age, v in errors[name].items())
            for name in names
            if ("corrected" in name) == corrected
        }
        for title, corrected in (("as they are", False), ("corrected", True))
    }
    panels = [
        Panel(f"messages under way ({title})", "test error %", each) for title, each in lines.items() if each
    ]
    for ending in ("png", "svg"):
        save_lines(out / f"error.{ending}", panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/age"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--under-way", nargs="+", type=int, default=UNDER_WAY)
    parser.add_argument("--corrected", nargs="+", choices=("no", "yes"), default=("yes", "no"))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--epochs", type=float, default=60.0)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.out / "rows.jsonl"
    rows = read_jsonl(path) if path.exists() else []
    wanted = [
        {"method": method, "corrected": corrected == "yes", "under_way": under_way, "rate": args.rate}
        | {"epochs": args.epochs, "seed": seed}
        for seed in args.seeds
        for under_way in args.under_way
        for method in args.methods
        for corrected in args.corrected
        if method != "none" or corrected == "yes"
    ]
    for row in wanted:
        if not args.report and not any(row.items() <= there.items() for there in rows):
            rows.append(train(row))
            print(
                {name: rows[-1][name] for name in ("under_way", "test_error", "seconds")},
                name_of(row),
                flush=True,
            )
            args.out.mkdir(parents=True, exist_ok=True)
            write_jsonl(path, rows)
    report(args.out)


if __name__ == "__main__":
    main()
