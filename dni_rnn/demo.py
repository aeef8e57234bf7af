"""The demo: what truncation costs, and what synthetic gradients give back, in three minutes on a CPU."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from dni_rnn.compare import Record, plot_records, read_record, render_comparison
from dni_rnn.config import TrainConfig
from dni_rnn.errors import UsageError
from dni_rnn.inference import load_run, sample
from dni_rnn.runs import Run
from dni_rnn.task import installed_tasks
from dni_rnn.training import train

TASK = "text"

SHARED = TrainConfig(hidden=128, batch_size=32, lr=3e-3, device="cpu", threads=1, log_every=20)

# Every update is made of 20 steps of text, so that only the length of backpropagation differs.
METHODS = {
    "bptt-T2": dataclasses.replace(SHARED, bptt=2, accumulate=10),
    "dni-T2": dataclasses.replace(SHARED, bptt=2, accumulate=10, dni=True),
    "bptt-T20": dataclasses.replace(SHARED, bptt=20, accumulate=1),
}

VALIDATIONS = 12

CLEAR = 0.02
"""BPC (bits per character) below which two runs are not told apart: seeds alone move one by about 0.01."""

PROMPT, SAMPLED = "The value of ", 300
"""What the best model goes on from, and for how many characters."""


def run_demo(out: Path, chars: int) -> None:
    """Train three models, compare them, and let the best write.

    Args:
      out: folder for their runs and `demo.png`; runs of an earlier demo in it are replaced.
      chars: characters that each model trains on.
    Raises:
      UsageError: the task is not installed, or `out` cannot be written.
      Interrupted: SIGINT or SIGTERM during training.
    """
    tasks = installed_tasks()
    if TASK not in tasks:
        raise UsageError(f"the demo needs the task {TASK!r}; known: {', '.join(tasks)}")
    print(f"Training {len(METHODS)} models, one after the other, on {chars:,} characters each.", flush=True)
    for name, method in METHODS.items():
        config = dataclasses.replace(method, chars=chars, eval_every=max(chars // VALIDATIONS, 1))
        run = Run(out / name, TASK, tasks[TASK](), config)
        if (run.path / "config.json").exists():
            shutil.rmtree(run.path)
        train(run)
    records = [read_record(out / name, name) for name in METHODS]
    print(render_comparison(records))
    print(verdict(*records))
    plot_records(records, out / "demo.png")
    print(f"Validation curves: {out / 'demo.png'}\n")
    best = min(records, key=lambda record: record.best or float("inf"))
    loaded = load_run(out / best.name, torch.device("cpu"))
    print(f"{best.name} writes:\n{sample(loaded, PROMPT, SAMPLED, 0.8, 0)}")


def verdict(short: Record, synthetic: Record, long: Record) -> str:
    """One sentence on test BPC: short truncation without and with synthetic gradients, and a longer one."""
    assert short.test is not None
    assert synthetic.test is not None
    assert long.test is not None
    change, goal = synthetic.test - short.test, long.test - short.test
    what = f"the test BPC of T={short.depth}"
    if change <= -CLEAR:
        effect = f"lowered {what} by {-change:.3f}"
    elif change >= CLEAR:
        effect = f"did not help: they raised {what} by {change:.3f}"
    else:
        effect = f"made no clear difference to {what} ({change:+.3f})"
    if goal > -CLEAR:
        comparison = f"T={long.depth} was no better than T={short.depth} itself ({goal:+.3f})"
    elif change <= -CLEAR:
        comparison = f"that is {change / goal:.0%} of what T={long.depth} gains ({-goal:.3f})"
    else:
        comparison = f"T={long.depth} lowered it by {-goal:.3f}"
    return (
        f"In these runs, one seed each, synthetic gradients {effect}, "
        f"at {synthetic.seconds / short.seconds:.1f} times its training time; {comparison}."
    )
