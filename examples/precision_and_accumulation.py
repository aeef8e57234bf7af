"""Synthetic gradients under autocast, with a gradient scaler, and with several windows per update.

    python examples/precision_and_accumulation.py [FILE] [--precision bf16] [--accumulate 2]

bfloat16 needs only autocast, and a processor with instructions for it (torch's LSTM refuses it otherwise).
float16 needs a scaler, which multiplies the loss, and the interface must know the factor. Several windows
per update need nothing special: the state is carried from window to window as usual, and only the optimizer
waits.
"""

import argparse
from pathlib import Path

import torch
from characters import Average, CharModel, read, windows
from torch import nn
from torch.nn import functional as F

parser = argparse.ArgumentParser()
parser.add_argument("file", type=Path, nargs="?", help="any text; the default is a source file of torch")
parser.add_argument("--bptt", type=int, default=4)
parser.add_argument("--steps", type=int, default=1500, help="windows")
parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16")
parser.add_argument("--accumulate", type=int, default=1, help="windows per update")
args = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
text, symbols = read(args.file)
model = CharModel(symbols).to(device)
optimizer = torch.optim.Adam(model.parameters(), 3e-3)
# --8<-- [start:loop]
scaler = torch.amp.GradScaler(device, enabled=args.precision == "fp16")

rows, average, one = 32, Average(), torch.ones((), device=device)
state = model.initial_state(rows)
for step, (x, y) in enumerate(windows(text.to(device), rows, args.bptt, args.steps), start=1):
    model.interface.loss_scale = scaler.scale(one)  # 1 if the scaler is disabled
    with torch.autocast(device, dtype, enabled=dtype is not None):
        logits, state, sent = model(x, state)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
    scaler.scale((loss + sent) / args.accumulate).backward()
    average.add(loss)
    if step % args.accumulate == 0:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.net_parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
# --8<-- [end:loop]
