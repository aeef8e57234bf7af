"""`char_model_before.py` with synthetic gradients: the two lines marked (1) and (2) change, and an
interface is created, whose parameters are added to the optimizer.

    python examples/char_model_after.py [FILE] [--bptt 4] [--steps 1500]
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from dni_rnn import Interface, MLPSynthesizer

parser = argparse.ArgumentParser()
parser.add_argument("file", type=Path, nargs="?", help="any text; the default is a source file of torch")
parser.add_argument("--bptt", type=int, default=4)
parser.add_argument("--steps", type=int, default=1500)
args = parser.parse_args()

torch.manual_seed(0)
text = args.file.read_text() if args.file else (Path(torch.__file__).parent / "nn/functional.py").read_text()
symbols = sorted(set(text))
data = torch.tensor([symbols.index(s) for s in text])
rows = 32
data = data[: len(data) // rows * rows].view(rows, -1).t()  # (time, rows): 32 stretches side by side

hidden = 128
embedding = nn.Embedding(len(symbols), 32)
lstm = nn.LSTM(32, hidden)
readout = nn.Linear(hidden, len(symbols))
net = nn.ModuleList([embedding, lstm, readout])
state = (torch.zeros(1, rows, hidden), torch.zeros(1, rows, hidden))
interface = Interface(MLPSynthesizer(state, hidden=[hidden]), scale=0.1)
optimizer = torch.optim.Adam([*net.parameters(), *interface.parameters()], 3e-3)

position, average = 0, 0.0
for step in range(1, args.steps + 1):
    if position + args.bptt + 1 > len(data):
        position = 0
    x, y = data[position : position + args.bptt], data[position + 1 : position + args.bptt + 1]
    position += args.bptt

    state = interface.receive(state)  # (1)
    output, state = lstm(embedding(x), state)
    loss = F.cross_entropy(readout(output).flatten(0, 1), y.flatten()) + interface.send(state)  # (2)

    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    average += loss.item() / 100
    if step % 100 == 0:
        print(f"step {step}: {average / 0.6931:.3f} bits per character")
        average = 0.0
