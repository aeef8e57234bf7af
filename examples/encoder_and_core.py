"""An encoder and a recurrent net in two processes that do not wait for each other.

    torchrun --nproc-per-node 2 examples/encoder_and_core.py [--windows 3000] [--frozen]

The input is a sequence of frames: each shows one of 4 symbols as one of many noisy patterns. Process 0
encodes them. Process 1, an LSTM, predicts which symbol was shown 2 frames ago, trained on windows of 4 steps
with a synthetic gradient at their ends. The encoder learns at once from a synthetic gradient at its output;
the true gradient comes back a window or two later and trains the synthesizer. --frozen keeps the encoder's
random weights.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn import Interface, LSTMState, MLPSynthesizer, StatePenalty
from dni_rnn.distributed.processes import Processes, joined
from dni_rnn.distributed.transport import END, GRADIENT, MESSAGE, Incoming, Outgoing, Packet, PacketLayout
from dni_rnn_tasks.surface_learner import Beside

SYMBOLS, PATTERNS, PIXELS, CODE, UNITS = 4, 8, 64, 8, 64
WINDOW, BATCH, DELAY, QUEUE = 4, 32, 2, 2


def frames(number: int) -> tuple[Tensor, Tensor]:
    """Frames (T, B, pixels) of window `number`, and the symbols they show (T, B)."""
    patterns = torch.randn(SYMBOLS, PATTERNS, PIXELS, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + number)
    symbols = torch.randint(SYMBOLS, (WINDOW, BATCH), generator=generator)
    which = torch.randint(PATTERNS, (WINDOW, BATCH), generator=generator)
    noise = torch.randn(WINDOW, BATCH, PIXELS, generator=generator)
    return patterns[symbols, which] + 0.5 * noise, symbols


def encode(windows: int, frozen: bool, layouts: list[PacketLayout], groups: list[Any]) -> None:
    """Process 0."""
    outgoing, answers = Outgoing(1, layouts[0], QUEUE, groups[0]), Incoming(1, layouts[1], QUEUE, groups[1])
    encoder = nn.Sequential(nn.Linear(PIXELS, 64), nn.ReLU(), nn.Linear(64, CODE), nn.Tanh())
    interface = Interface(Beside(CODE, SYMBOLS, 64))
    optimizer = torch.optim.Adam([*encoder.parameters(), *interface.parameters()], 2e-3)
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def learn(packet: Packet) -> None:
        optimizer.zero_grad()
        interface.receive(*kept.pop(packet.number)).backward(packet.tensors[0])
        optimizer.step()

    for number in range(windows):
        while len(kept) >= QUEUE:
            packet = answers.take(60.0)
            assert packet is not None, "the other process hangs"
            learn(packet)
        x, symbols = frames(number)
        code = encoder(x)
        outgoing.put(Packet(MESSAGE, number, [code.detach(), symbols]))
        context = F.one_hot(symbols, SYMBOLS).float()
        kept[number] = code.detach().flatten(0, 1), context.flatten(0, 1)
        if not frozen:
            optimizer.zero_grad()
            interface.send(code.flatten(0, 1), context.flatten(0, 1)).backward()
            optimizer.step()
    outgoing.put(Packet(END, windows))
    while (packet := answers.take(60.0)) is not None and packet.kind == GRADIENT:
        learn(packet)
    outgoing.join()
    answers.join()


def remember(layouts: list[PacketLayout], groups: list[Any]) -> float:
    """Process 1. Returns the share of symbols that it got right in the last fifth."""
    incoming, answering = Incoming(0, layouts[0], QUEUE, groups[0]), Outgoing(0, layouts[1], QUEUE, groups[1])
    lstm, readout = nn.LSTM(CODE, UNITS), nn.Linear(UNITS, SYMBOLS)
    state = LSTMState(torch.zeros(1, BATCH, UNITS), torch.zeros(1, BATCH, UNITS))
    interface = Interface(MLPSynthesizer(state, [UNITS]), scale=0.5, centre=True)
    penalty = StatePenalty(0.1)
    optimizer = torch.optim.Adam([*lstm.parameters(), *readout.parameters(), *interface.parameters()], 2e-3)
    before = torch.zeros(DELAY, BATCH, dtype=torch.long)
    right: list[float] = []
    while (packet := incoming.take(60.0)) is not None and packet.kind == MESSAGE:
        code, symbols = packet.tensors
        seen = torch.cat([before, symbols])
        target, before = seen[:WINDOW], seen[-DELAY:]
        code.requires_grad_()
        state = interface.receive(state)
        output, (hidden, cell) = lstm(code, tuple(state))
        state = LSTMState(hidden, cell)
        logits = readout(output).flatten(0, 1)
        loss = F.cross_entropy(logits, target.flatten()) + interface.send(state)
        loss = loss + penalty(state, rms=interface.target_rms())
        optimizer.zero_grad()
        loss.backward()
        assert code.grad is not None
        answering.put(Packet(GRADIENT, packet.number, [code.grad.flatten(0, 1)]))
        optimizer.step()
        right.append(float((logits.argmax(1) == target.flatten()).float().mean()))
    answering.put(Packet(END, 0))
    incoming.join()
    answering.join()
    last = right[-max(1, len(right) // 5) :]
    return sum(last) / len(last)


def run(processes: Processes, windows: int, frozen: bool) -> float | None:
    torch.manual_seed(processes.rank)
    code, symbols = torch.zeros(WINDOW, BATCH, CODE), torch.zeros(WINDOW, BATCH, dtype=torch.long)
    layouts = [PacketLayout([code, symbols]), PacketLayout([code.flatten(0, 1)])]
    groups: list[Any] = [dist.new_group(backend="gloo") for _ in range(2)]
    if processes.rank == 0:
        return encode(windows, frozen, layouts, groups)
    return remember(layouts, groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--windows", type=int, default=3000)
    parser.add_argument("--frozen", action="store_true")
    args = parser.parse_args()
    with joined(60.0) as processes:
        share = run(processes, args.windows, args.frozen)
    if share is not None:
        print(f"{100 * share:.0f}% right, chance is {100 / SYMBOLS:.0f}%")


if __name__ == "__main__":
    main()
