"""Using a trained run: load its best weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from dni_rnn.errors import UsageError
from dni_rnn.training import checkpoint
from dni_rnn.training.learners import learner_class
from dni_rnn.training.run_directory import Run


class LoadedRun(NamedTuple):
    """A run's model with its best weights, and its data."""

    model: Any
    data: Any
    device: torch.device
    symbols: int  # training symbols seen when the weights were kept
    level: int | None  # of a task with a curriculum: what was being learnt then


def load_run(path: Path, device: torch.device, data_dir: Path | None = None) -> LoadedRun:
    """Open a run directory for use.

    Raises:
      UsageError: no run or no checkpoint there, or its data are not found.
    """
    run = Run.open(path)
    data = run.task.load(data_dir or run.config.data_dir)
    run.check_data(data)
    tensors, values = checkpoint.load_checkpoint(run.best)
    model = learner_class(run.task, run.config).build(run.config, data)
    try:
        model.load_state_dict(tensors)
        symbols = values["symbols"]
    except (KeyError, RuntimeError):
        raise UsageError(f"{run.best}: not the weights of this run") from None
    return LoadedRun(model.to(device), data, device, symbols, values.get("level"))
