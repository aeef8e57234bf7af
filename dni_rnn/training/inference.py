"""Load a trained run with its best weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from dni_rnn.data.task import Corpus
from dni_rnn.data.texts import read_under
from dni_rnn.errors import UsageError
from dni_rnn.files import name_of
from dni_rnn.training import checkpoint
from dni_rnn.training.learners import learner_class
from dni_rnn.training.run_directory import Run


class LoadedRun(NamedTuple):
    """A run's model with its best weights, and its data."""

    model: Any
    data: Any
    device: torch.device
    symbols: int  # training symbols seen when the weights were kept
    level: int | None  # of a task with a curriculum: the level at that time


def load_run(path: Path, device: torch.device, data_dir: Path | None = None) -> LoadedRun:
    """Load a run directory.

    Raises:
      UsageError: no run or no checkpoint there, or its data are missing or have changed.
    """
    run = Run.open(path)
    data = run.task.load(data_dir or run.config.data_dir)
    run.check_data(data)
    return _loaded(run, data, device)


def load_writer(path: Path, device: torch.device) -> LoadedRun:
    """Load the run directory of a text without the text: `data` is its `Alphabet`.

    Raises:
      UsageError: no run or no checkpoint there, or it is not text.
    """
    run = Run.open(path)
    alphabet = run.alphabet()
    if alphabet is None:
        raise UsageError(
            f"{run.data_name} is not text: there is nothing to sample, and no other text to read"
        )
    return _loaded(run, alphabet, device)


class Elsewhere(NamedTuple):
    """A run with another text as its data."""

    run: LoadedRun
    unknown: str  # number of its symbols that the run does not know, in words


def load_elsewhere(path: Path, device: torch.device, file: Path) -> Elsewhere:
    """Load the run directory of a text, with another text: a file or a folder.

    Raises:
      UsageError: no run or no checkpoint there, it is not text, or the other one cannot be read.
    """
    loaded = load_writer(path, device)
    symbols = loaded.data.symbols
    text, unknown, has = read_under(file, symbols)
    if len(text) < 2:
        raise UsageError(f"{file}: {len(text)} symbols that the run knows; give a longer text")
    data = Corpus(f"text/{name_of(file)}", symbols, text, text, text)
    words = f"{unknown:,} unknown to the run{'' if has or not unknown else ', left out'}"
    return Elsewhere(loaded._replace(data=data), words)


def _loaded(run: Run, data: Any, device: torch.device) -> LoadedRun:
    tensors, values = checkpoint.load_checkpoint(run.best)
    model = learner_class(run.task, run.config).build(run.config, data)
    try:
        model.load_state_dict(tensors)
        symbols = values["symbols"]
    except (KeyError, RuntimeError):
        raise UsageError(f"{run.best}: not the weights of this run") from None
    return LoadedRun(model.to(device), data, device, symbols, values.get("level"))
