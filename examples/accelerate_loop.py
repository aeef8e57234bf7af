"""Synthetic gradients with Hugging Face Accelerate: mixed precision, accumulation, clipping, devices.

    python examples/accelerate_loop.py [FILE] [--precision bf16] [--accumulate 2]
    accelerate launch examples/accelerate_loop.py

The interface is part of the model, so `prepare` sees one module. Each process reads its own rows; here all
processes read the same text, starting at different places.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from characters import Average, CharModel, read, windows
from torch.nn import functional as F

parser = argparse.ArgumentParser()
parser.add_argument("file", type=Path, nargs="?", help="any text; the default is a source file of torch")
parser.add_argument("--bptt", type=int, default=4)
parser.add_argument("--steps", type=int, default=1500, help="windows")
parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no")
parser.add_argument("--accumulate", type=int, default=1, help="windows per update")
args = parser.parse_args()

torch.manual_seed(0)
# --8<-- [start:loop]
accelerator = Accelerator(mixed_precision=args.precision, gradient_accumulation_steps=args.accumulate)
text, symbols = read(args.file)
text = text.roll(-accelerator.process_index * len(text) // accelerator.num_processes)
plain = CharModel(symbols)
model, optimizer = accelerator.prepare(plain, torch.optim.Adam(plain.parameters(), 3e-3))

rows, average = 32, Average()
one = torch.ones((), device=accelerator.device)
state = tuple(s.to(accelerator.device) for s in plain.initial_state(rows))
for x, y in windows(text.to(accelerator.device), rows, args.bptt, args.steps):
    if accelerator.scaler is not None:  # float16 only
        plain.interface.loss_scale = accelerator.scaler.scale(one)
    with accelerator.accumulate(model):
        logits, state, sent = model(x, state)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        accelerator.backward(loss + sent)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(plain.net_parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.is_main_process:
        average.add(loss)
# --8<-- [end:loop]
