"""`dni-rnn train` compared with a bare PyTorch loop that does the same work, in characters per second.

    python benchmarks/loop.py [--rounds 7] [--steps 400] [--threads 1]

Both train an LSTM of 256 on the same text with the same windows, optimizer and clipping; `train` also logs,
shows progress and writes checkpoints. They take turns in one process; medians. Neither includes validation.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from dni_rnn.config import RecurrentConfig
from dni_rnn.data.task import installed_tasks
from dni_rnn.training.loop import train
from dni_rnn.training.run_directory import Run


def bare_loop(data: torch.Tensor, symbols: int, config: RecurrentConfig, steps: int) -> float:
    """Characters per second of the loop that a user would write."""
    torch.manual_seed(0)
    embedding, lstm = nn.Embedding(symbols, config.embedding), nn.LSTM(config.embedding, config.hidden)
    readout = nn.Linear(config.hidden, symbols)
    net = nn.ModuleList([embedding, lstm, readout])
    optimizer = torch.optim.Adam(net.parameters(), config.lr, fused=True)
    parameters = list(net.parameters())
    h = c = torch.zeros(1, config.batch_size, config.hidden)
    position = 0
    start = time.perf_counter()
    for _ in range(steps):
        x = data[position : position + config.bptt]
        y = data[position + 1 : position + config.bptt + 1]
        position += config.bptt
        output, (h, c) = lstm(embedding(x), (h.detach(), c.detach()))
        loss = F.cross_entropy(readout(output).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
    return steps * config.bptt * config.batch_size / (time.perf_counter() - start)


def product(config: RecurrentConfig, steps: int) -> float:
    """Characters per second of `dni-rnn train`, logging and checkpoints included."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run", "text", installed_tasks()["text"](), config)
        return train(run)["symbols_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = installed_tasks()["text"]().load(None)
    print(f"torch {torch.__version__}, {args.threads} thread(s), LSTM 256, batch 64, {args.rounds} rounds")
    for bptt in (2, 8):
        config = RecurrentConfig(bptt=bptt, steps=args.steps, threads=args.threads, eval_every=10**9)
        length = len(text.train) // config.batch_size
        rows = torch.from_numpy(text.train[: length * config.batch_size].astype("int64"))
        data = rows.view(config.batch_size, length).t().contiguous()
        ratios, bare = [], []
        for _ in range(args.rounds):
            bare.append(bare_loop(data, len(text.symbols), config, args.steps))
            ratios.append(product(config, args.steps) / bare[-1])
        print(
            f"T={bptt}: bare loop {statistics.median(bare):,.0f} characters/s, dni-rnn train "
            f"{statistics.median(ratios):.3f} of it (rounds: {min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main()
