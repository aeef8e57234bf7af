"""Synthetic gradients with `torch.compile`: a recurrent cell of your own, compiled with both edges.

    python examples/compiled_core.py [FILE] [--backend inductor]

The whole window step is one graph: `receive`, the cell's T steps, the loss and `send`. torch does not
compile `nn.LSTM`, `nn.GRU` and `nn.RNN` (it calls their fused kernels, and the interface works with them as
usual); compiling speeds up loops in Python such as this cell.
"""

import argparse
from pathlib import Path

import torch
from characters import Average, read, windows
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn import Interface, MLPSynthesizer

parser = argparse.ArgumentParser()
parser.add_argument("file", type=Path, nargs="?", help="any text; the default is a source file of torch")
parser.add_argument("--bptt", type=int, default=4)
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--backend", default="inductor", help="inductor needs a C++ compiler; aot_eager does not")
args = parser.parse_args()


class MinimalGatedUnit(nn.Module):
    """h' = (1 − f) h + f tanh(W x + U (f h)),   f = σ(W_f x + U_f h)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.from_input = nn.Linear(inputs, 2 * hidden)
        self.forget = nn.Linear(hidden, hidden)
        self.candidate = nn.Linear(hidden, hidden)

    def forward(self, inputs: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for gate, candidate in zip(*self.from_input(inputs).chunk(2, dim=-1), strict=True):
            f = torch.sigmoid(gate + self.forget(h))
            h = (1 - f) * h + f * torch.tanh(candidate + self.candidate(f * h))
            outputs.append(h)
        return torch.stack(outputs), h


torch.manual_seed(0)
text, symbols = read(args.file)
rows, hidden = 32, 128
embedding, cell, readout = nn.Embedding(symbols, 32), MinimalGatedUnit(32, hidden), nn.Linear(hidden, symbols)
net = nn.ModuleList([embedding, cell, readout])
state = torch.zeros(rows, hidden)
interface = Interface(MLPSynthesizer(state, [hidden]), scale=0.1)
optimizer = torch.optim.Adam([*net.parameters(), *interface.parameters()], 3e-3)


# --8<-- [start:step]
def window_step(x: Tensor, y: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs, state = cell(embedding(x), interface.receive(state))
    loss = F.cross_entropy(readout(outputs).flatten(0, 1), y.flatten()) + interface.send(state)
    return loss, state.detach()  # a state that requires grad would cause another compilation


compiled = torch.compile(window_step, backend=args.backend, fullgraph=True)
# --8<-- [end:step]


average = Average()
for x, y in windows(text, rows, args.bptt, args.steps):
    loss, state = compiled(x, y, state)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    average.add(loss)
