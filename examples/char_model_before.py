"""A character model in plain PyTorch, with truncated BPTT. `char_model_after.py` is the same program with
synthetic gradients.

    python examples/char_model_before.py [FILE] [--bptt 4] [--steps 1500]
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

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
optimizer = torch.optim.Adam(net.parameters(), 3e-3)

state = (torch.zeros(1, rows, hidden), torch.zeros(1, rows, hidden))
position, average = 0, 0.0
for step in range(1, args.steps + 1):
    if position + args.bptt + 1 > len(data):
        position = 0
    x, y = data[position : position + args.bptt], data[position + 1 : position + args.bptt + 1]
    position += args.bptt

    state = tuple(s.detach() for s in state)
    output, state = lstm(embedding(x), state)
    loss = F.cross_entropy(readout(output).flatten(0, 1), y.flatten())

    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    average += loss.item() / 100
    if step % 100 == 0:
        print(f"step {step}: {average / 0.6931:.3f} bits per character")
        average = 0.0
