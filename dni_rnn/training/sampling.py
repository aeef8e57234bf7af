"""Sampling text from a trained model."""

from __future__ import annotations

import torch

from dni_rnn.data.task import Alphabet, Corpus, Data
from dni_rnn.data.texts import BYTES, UNKNOWN
from dni_rnn.errors import UsageError
from dni_rnn.recurrent import SequenceModel


@torch.no_grad()
def sample(
    model: SequenceModel, data: Data | Alphabet, prompt: str, characters: int, temperature: float, seed: int
) -> str:
    """Sample a continuation of `prompt`; the prompt is included.

    Each symbol is drawn from softmax(logits / temperature), but never the unknown one. Without a prompt, the
    first is drawn by its frequency in training. Bytes are decoded as UTF-8. In the `char` convention of the
    Penn Treebank, a space in the prompt is read as `_`, which is written as a space.

    Raises:
      UsageError: the data are not text, the prompt holds a symbol the model has never seen, or the
        temperature is not positive.
    """
    if isinstance(data, Corpus):
        data = data.alphabet
    if not isinstance(data, Alphabet):
        raise UsageError(f"{data.name} is not text: there is nothing to sample")
    if not temperature > 0:
        raise UsageError(f"--temperature must be positive, not {temperature}")
    if characters < 0:
        raise UsageError(f"--chars must not be negative, not {characters}")
    symbols, of_bytes = data.symbols, data.symbols == BYTES
    underscored = " " not in symbols and "_" in symbols
    text = prompt.replace(" ", "_") if underscored else prompt
    number = {symbol: i for i, symbol in enumerate(symbols)}
    if of_bytes:
        ids = [*text.encode()]
    else:
        for symbol in text:
            if symbol not in number:
                raise UsageError(f"--prompt: {symbol!r} does not occur in the training text; leave it out")
        ids = [number[symbol] for symbol in text]
    generator = torch.Generator().manual_seed(seed)
    if not ids:
        ids = [int(torch.multinomial(torch.tensor(data.counts).double(), 1, generator=generator))]
    device = next(model.parameters()).device
    logits, state = model(torch.tensor(ids, device=device).unsqueeze(1), model.initial_state(1))
    for _ in range(characters):
        scores = logits[-1, 0].double().cpu()
        if UNKNOWN in number:
            scores[number[UNKNOWN]] = -torch.inf
        probabilities = torch.softmax((scores - scores.max()) / temperature, dim=0)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        logits, state = model(torch.tensor([[ids[-1]]], device=device), state)
    if of_bytes:
        return bytes(ids).decode(errors="replace")
    written = "".join(symbols[i] for i in ids)
    return written.replace("_", " ") if underscored else written
