"""Shared by the other examples: a text in windows, and a character model that contains its interface."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dni_rnn import Interface, MLPSynthesizer

State = tuple[Tensor, Tensor]


def read(file: Path | None) -> tuple[Tensor, int]:
    """A text as numbers, and its number of different symbols. The default is a source file of torch."""
    text = file.read_text() if file else (Path(torch.__file__).parent / "nn/functional.py").read_text()
    symbols = {symbol: number for number, symbol in enumerate(sorted(set(text)))}
    return torch.tensor([symbols[symbol] for symbol in text]), len(symbols)


def windows(text: Tensor, rows: int, bptt: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` successive windows of `bptt` inputs and targets, (bptt, rows)."""
    columns = text[: len(text) // rows * rows].view(rows, -1).t()  # each row reads its own part
    starts = range(0, len(columns) - bptt, bptt)
    for step in range(steps):
        start = starts[step % len(starts)]
        yield columns[start : start + bptt], columns[start + 1 : start + bptt + 1]


# --8<-- [start:model]
class CharModel(nn.Module):
    """Embedding, LSTM, readout and the interface at the window's boundary, in one module.

    A framework that wraps a model (for DDP or autocast) wraps its `forward`. So `forward` contains both
    edges, and the synthesizer's parameters are among the model's.
    """

    def __init__(self, symbols: int, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 32)
        self.lstm = nn.LSTM(32, hidden)
        self.readout = nn.Linear(hidden, symbols)
        self.interface = Interface(MLPSynthesizer(self.initial_state(1), [hidden]), scale=0.1)

    def initial_state(self, rows: int) -> State:
        zeros = self.readout.weight.new_zeros(1, rows, self.lstm.hidden_size)
        return zeros, zeros.clone()

    def net_parameters(self) -> list[nn.Parameter]:
        """All parameters except the synthesizer's: those to clip."""
        return [p for name, p in self.named_parameters() if not name.startswith("interface.")]

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State, Tensor]:
        """Logits (T, B, symbols), the state after the window, and the zero-valued term to add to the loss."""
        state = self.interface.receive(state)
        output, state = self.lstm(self.embedding(x), state)
        return self.readout(output), state, self.interface.send(state)


# --8<-- [end:model]


class Average:
    """Prints the mean loss of every 100 steps, in bits per character."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        if len(self.losses) % 100 == 0:
            bits = float(torch.stack(self.losses[-100:]).mean()) / 0.6931
            print(f"step {len(self.losses)}: {bits:.3f} bits per character", flush=True)
