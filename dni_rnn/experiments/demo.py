"""The demo: what truncation costs, and what a trace and synthetic gradients recover, in minutes on a CPU.

It begins with recall, where one step of backpropagation alone learns nothing; then it trains on text, where a
trace helps, at a price.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from dni_rnn.config import RecurrentConfig
from dni_rnn.data.task import installed_tasks
from dni_rnn.errors import UsageError
from dni_rnn.experiments.compare import RunSoFar, plot_runs, read_run, render_comparison
from dni_rnn.training.inference import load_run
from dni_rnn.training.loop import train
from dni_rnn.training.run_directory import Run
from dni_rnn.training.sampling import sample

RECALL = RecurrentConfig(
    hidden=64, embedding=4, bptt=1, lr=5e-3, beta2=0.95, chars=300_000, eval_every=30_000, log_every=20,
    device="cpu", threads=1,
)  # fmt: skip
DELAY, CHANCE = 5, 2.0
RECALL_METHODS = {
    "recall-bptt-T1": RECALL,
    "recall-trace-T1": dataclasses.replace(RECALL, trace=8, restore=0.1),
    "recall-dni-T1": dataclasses.replace(
        RECALL, dni=True, critic=True, context=f"next-tokens:{DELAY}", synthesizer="linear",
        synthesizer_reads="state", synthesizer_lr=5e-3, scale=1.0, discount=0.97,
    ),
}  # fmt: skip

TASK = "text"

SHARED = RecurrentConfig(
    hidden=128, batch_size=32, lr=3e-3, restore=0.1, device="cpu", threads=1, log_every=20
)

# All update every 20 steps of text and have the state penalty; they differ in how gradients reach back.
METHODS = {
    "bptt-T2": dataclasses.replace(SHARED, bptt=2, accumulate=10),
    "trace-T2": dataclasses.replace(SHARED, bptt=2, accumulate=10, trace=32),
    "bptt-T20": dataclasses.replace(SHARED, bptt=20, accumulate=1),
}

VALIDATIONS = 12

CLEAR = 0.02
"""Difference in BPC (bits per character) that counts as clear: seeds alone make about 0.01."""

PROMPT, SAMPLED = "The value of ", 300
"""Prompt of the best model, and how many characters it samples."""


def run_demo(out: Path, chars: int) -> None:
    """Train three models on recall and three on text, compare them, and sample from the best.

    Args:
      out: folder for their runs and the plots; runs of an earlier demo in it are replaced.
      chars: characters that each model on text trains on.
    Raises:
      UsageError: a task is not installed, or `out` cannot be written.
      Interrupted: SIGINT or SIGTERM during training.
    """
    print(f"One step of backpropagation, and a symbol to be recalled after {DELAY}:", flush=True)
    print(recall_verdict(*_train("recall", {"delay": DELAY}, RECALL_METHODS, out, "recall.png")))
    print(f"\nText, {chars:,} characters for each of {len(METHODS)} models:", flush=True)
    methods = {
        name: dataclasses.replace(method, chars=chars, eval_every=max(chars // VALIDATIONS, 1))
        for name, method in METHODS.items()
    }
    runs = _train(TASK, {}, methods, out, "demo.png")
    print(verdict(*runs) + "\n")
    best = min(runs, key=lambda run: run.best or float("inf"))
    loaded = load_run(out / best.name, torch.device("cpu"))
    print(f"{best.name} writes:\n{sample(loaded.model, loaded.data, PROMPT, SAMPLED, 0.8, 0)}")


def _train(
    name: str, options: dict[str, Any], methods: dict[str, RecurrentConfig], out: Path, plot: str
) -> list[RunSoFar]:
    """Train one task by each method, print the table and save the plot."""
    tasks = installed_tasks()
    if name not in tasks:
        raise UsageError(f"the demo needs the task {name!r}; known: {', '.join(tasks)}")
    for folder, config in methods.items():
        run = Run(out / folder, name, tasks[name](**options), config)
        if (run.path / "config.json").exists():
            shutil.rmtree(run.path)
        train(run)
    runs = [read_run(out / folder, folder) for folder in methods]
    print(render_comparison(runs))
    plot_runs(runs, out / plot)
    print(f"Validation curves: {out / plot}")
    return runs


def recall_verdict(without: RunSoFar, trace: RunSoFar, synthetic: RunSoFar) -> str:
    """One sentence on the loss of each; chance is 2 bits."""
    left = [run.test or 0.0 for run in (without, trace, synthetic)]
    return (
        f"In these runs, one seed each, of {CHANCE:.0f} bits that are chance truncated BPTT leaves "
        f"{left[0]:.2f}, a trace, which knows nothing of what comes, {left[1]:.2f}, and a synthetic "
        f"gradient, conditioned on what is still to be recalled, {left[2]:.2f}."
    )


def verdict(short: RunSoFar, trace: RunSoFar, long: RunSoFar) -> str:
    """One sentence on test BPC: short truncation without and with a trace, and a longer one."""
    assert short.test is not None
    assert trace.test is not None
    assert long.test is not None
    change, goal = trace.test - short.test, long.test - short.test
    what = f"the test BPC of T={short.depth}"
    if change <= -CLEAR:
        effect = f"lowered {what} by {-change:.3f}"
    elif change >= CLEAR:
        effect = f"did not help: it raised {what} by {change:.3f}"
    else:
        effect = f"made no clear difference to {what} ({change:+.3f})"
    if goal > -CLEAR:
        comparison = f"T={long.depth} was no better than T={short.depth} itself ({goal:+.3f})"
    elif change <= -CLEAR:
        comparison = f"that is {change / goal:.0%} of what T={long.depth} gains ({-goal:.3f})"
    else:
        comparison = f"T={long.depth} lowered it by {-goal:.3f}"
    return (
        f"In these runs, one seed each, a trace {effect}, "
        f"at {trace.seconds / short.seconds:.1f} times its training time; {comparison}."
    )
