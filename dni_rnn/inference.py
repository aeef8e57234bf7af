"""Using a trained run: load its best weights, let it write."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from dni_rnn import checkpoint
from dni_rnn.errors import UsageError
from dni_rnn.runs import Run
from dni_rnn.task import Corpus
from dni_rnn.training import learner_class


class LoadedRun(NamedTuple):
    """A run's model with its best weights, and its data."""

    model: Any
    data: Any
    device: torch.device
    symbols: int  # training symbols seen when the weights were kept
    level: int | None  # of a task that gets harder: what was being learnt then


def load_run(path: Path, device: torch.device, data_dir: Path | None = None) -> LoadedRun:
    """Open a run directory for use.

    Raises:
      UsageError: no run or no checkpoint there, or its data are not found.
    """
    run = Run.open(path)
    data = run.task.load(data_dir or run.config.data_dir)
    run.check_symbols(data)
    tensors, values = checkpoint.load_checkpoint(run.best)
    model = learner_class(run.config).build(run.config, data)
    try:
        model.load_state_dict(tensors)
        symbols = values["symbols"]
    except (KeyError, RuntimeError):
        raise UsageError(f"{run.best}: not the weights of this run") from None
    return LoadedRun(model.to(device), data, device, symbols, values.get("level"))


@torch.no_grad()
def sample(run: LoadedRun, prompt: str, characters: int, temperature: float, seed: int) -> str:
    """Text that the model writes after `prompt`; the prompt is included.

    Each character is drawn from softmax(logits / temperature). In the `char` convention of the Penn
    Treebank, a space of the prompt is read as `_`, and `_` is written as a space.

    Raises:
      UsageError: the data are not text, the prompt holds a symbol the model has never seen, or the
        temperature is not positive.
    """
    if not isinstance(run.data, Corpus):
        raise UsageError(f"{run.data.name} is not text: there is nothing to sample")
    if not temperature > 0:
        raise UsageError(f"--temperature must be positive, not {temperature}")
    if characters < 0:
        raise UsageError(f"--chars must not be negative, not {characters}")
    symbols = run.data.symbols
    underscored = " " not in symbols and "_" in symbols
    text = prompt.replace(" ", "_") if underscored else prompt
    number = {symbol: i for i, symbol in enumerate(symbols)}
    for symbol in text:
        if symbol not in number:
            raise UsageError(f"--prompt: {symbol!r} does not occur in the training text; leave it out")
    generator = torch.Generator().manual_seed(seed)
    if not text:
        start = int(torch.randint(len(run.data.train), (1,), generator=generator))
        text = symbols[int(run.data.train[start])]
    ids = [number[symbol] for symbol in text]
    logits, state = run.model(torch.tensor(ids).unsqueeze(1), run.model.initial_state(1))
    for _ in range(characters):
        scores = logits[-1, 0].double()
        probabilities = torch.softmax((scores - scores.max()) / temperature, dim=0)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        logits, state = run.model(torch.tensor([[ids[-1]]]), state)
    written = "".join(symbols[i] for i in ids)
    return written.replace("_", " ") if underscored else written
