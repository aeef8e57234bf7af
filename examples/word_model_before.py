"""A word-level language model in plain PyTorch, in the usual form (batchify, repackage_hidden, get_batch,
clip, AdamW), with truncated BPTT. `word_model_after.py` is the same program with a trace.

    python examples/word_model_before.py [FILE] [--bptt 2] [--epochs 3] [--seed 0]
"""

import argparse
import math
import re
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

parser = argparse.ArgumentParser()
parser.add_argument(
    "file", type=Path, nargs="?", help="any text; the default is the help that comes with Python"
)
parser.add_argument("--bptt", type=int, default=2)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)
rows, hidden = 32, 128


def help_of_python():
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def batchify(words):
    """(time, rows): stretches of the text side by side."""
    return words[: len(words) // rows * rows].view(rows, -1).t().contiguous()


def repackage_hidden(state):
    """Wraps hidden states in new tensors, to detach them from their history."""
    return tuple(leaf.detach() for leaf in state)


def get_batch(source, start):
    length = min(args.bptt, len(source) - 1 - start)
    return source[start : start + length], source[start + 1 : start + 1 + length]


text = re.findall(r"\w+|[^\w\s]|\n", args.file.read_text() if args.file else help_of_python())
words = [word for word, _ in Counter(text).most_common(2000)]
number = {word: n for n, word in enumerate(["<unk>", *words])}
data = torch.tensor([number.get(word, 0) for word in text])
train_data, valid_data = batchify(data[: len(data) * 9 // 10]), batchify(data[len(data) * 9 // 10 :])

embedding, lstm, decoder = nn.Embedding(len(number), 64), nn.LSTM(64, hidden), nn.Linear(hidden, len(number))
model = nn.ModuleList([embedding, lstm, decoder])
optimizer = torch.optim.AdamW(model.parameters(), args.lr)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
    optimizer, args.epochs * math.ceil((len(train_data) - 1) / args.bptt)
)


def zeros():
    return torch.zeros(1, rows, hidden), torch.zeros(1, rows, hidden)


@torch.no_grad()
def evaluate():
    output, _ = lstm(embedding(valid_data[:-1]), zeros())
    return F.cross_entropy(decoder(output).flatten(0, 1), valid_data[1:].flatten()).item()


began = time.process_time()
print(f"before training: perplexity {math.exp(evaluate()):.1f}")
for epoch in range(1, args.epochs + 1):
    state = zeros()
    for start in range(0, len(train_data) - 1, args.bptt):
        x, y = get_batch(train_data, start)
        output, state = lstm(embedding(x), repackage_hidden(state))
        loss = F.cross_entropy(decoder(output).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - began
    print(f"epoch {epoch}: perplexity {math.exp(evaluate()):.1f}, {seconds:.0f} s")
