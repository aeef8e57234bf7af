"""Letting a trained model write."""

from __future__ import annotations

import torch

from dni_rnn.data.task import Corpus, Data
from dni_rnn.errors import UsageError
from dni_rnn.recurrent import SequenceModel


@torch.no_grad()
def sample(
    model: SequenceModel, data: Data, prompt: str, characters: int, temperature: float, seed: int
) -> str:
    """Text that the model writes after `prompt`; the prompt is included.

    Each character is drawn from softmax(logits / temperature). In the `char` convention of the Penn
    Treebank, a space of the prompt is read as `_`, and `_` is written as a space.

    Raises:
      UsageError: the data are not text, the prompt holds a symbol the model has never seen, or the
        temperature is not positive.
    """
    if not isinstance(data, Corpus):
        raise UsageError(f"{data.name} is not text: there is nothing to sample")
    if not temperature > 0:
        raise UsageError(f"--temperature must be positive, not {temperature}")
    if characters < 0:
        raise UsageError(f"--chars must not be negative, not {characters}")
    symbols = data.symbols
    underscored = " " not in symbols and "_" in symbols
    text = prompt.replace(" ", "_") if underscored else prompt
    number = {symbol: i for i, symbol in enumerate(symbols)}
    for symbol in text:
        if symbol not in number:
            raise UsageError(f"--prompt: {symbol!r} does not occur in the training text; leave it out")
    generator = torch.Generator().manual_seed(seed)
    if not text:
        start = int(torch.randint(len(data.train), (1,), generator=generator))
        text = symbols[int(data.train[start])]
    ids = [number[symbol] for symbol in text]
    device = next(model.parameters()).device
    logits, state = model(torch.tensor(ids, device=device).unsqueeze(1), model.initial_state(1))
    for _ in range(characters):
        scores = logits[-1, 0].double().cpu()
        probabilities = torch.softmax((scores - scores.max()) / temperature, dim=0)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        logits, state = model(torch.tensor([[ids[-1]]], device=device), state)
    written = "".join(symbols[i] for i in ids)
    return written.replace("_", " ") if underscored else written
