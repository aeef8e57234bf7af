"""Synthetic gradients on one page: three layers learn to add, and none waits for the layer above.

    python examples/addition.py

A sigmoid net of 3 layers gets two binary numbers and outputs their sum. It is trained four times: with
backpropagation; with synthetic gradients predicted from a layer's output alone, which says little about the
target sum, so the net hardly learns; with synthetic gradients predicted from the output and the target; and
with the derivative of a loss that is predicted from these two.
"""

import torch
from torch import nn
from torch.nn import functional as F

from dni_rnn import ContextMLP, Critic, Interface, OneHotTokens

BITS, HIDDEN, STEPS = 4, 32, 4000


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two random numbers as bits, (rows, 2·BITS), and their sum, (rows, BITS + 1)."""
    a, b = torch.randint(1 << BITS, (2, rows, 1))
    places, more = torch.arange(BITS), torch.arange(BITS + 1)
    return torch.cat([a >> places & 1, b >> places & 1], dim=1).float(), (a + b >> more & 1).float()


def train(method: str) -> float:
    """Share of sums that are right after training."""
    torch.manual_seed(0)
    layers = nn.ModuleList(
        [
            nn.Sequential(nn.Linear(2 * BITS, HIDDEN), nn.Sigmoid()),
            nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Sigmoid()),
        ]
    )
    readout = nn.Linear(HIDDEN, BITS + 1)

    # One interface at the output of each hidden layer: it gives the layer a synthetic gradient, and learns
    # from the gradient that the next layer sends back.
    interfaces = nn.ModuleList()
    if method != "backpropagation":
        for _ in layers:
            if method == "predicted loss":
                synthesizer = Critic(ContextMLP(HIDDEN, [], 2 * (BITS + 1)), 2)
            else:
                data = OneHotTokens(2, BITS + 1) if method == "output and data" else None
                synthesizer = ContextMLP(HIDDEN, [64], HIDDEN, data)
            interfaces.append(Interface(synthesizer))

    optimizer = torch.optim.Adam([*layers.parameters(), *readout.parameters()], 1e-2)
    learning = torch.optim.Adam(interfaces.parameters(), 3e-2) if len(interfaces) else None
    for _ in range(STEPS):
        x, wanted = batch(64)
        h = x
        for number, layer in enumerate(layers):
            h = layer(h)
            if learning:
                h = interfaces[number](h, wanted.long().t())  # the only line that differs
        loss = F.binary_cross_entropy_with_logits(readout(h), wanted)
        optimizer.zero_grad()
        if learning:
            learning.zero_grad()
        loss.backward()
        optimizer.step()
        if learning:
            learning.step()

    with torch.no_grad():
        h, wanted = batch(2000)
        for layer in layers:
            h = layer(h)
        return float(((readout(h) > 0) == wanted.bool()).all(dim=1).float().mean())


if __name__ == "__main__":
    for method in ("backpropagation", "output alone", "output and data", "predicted loss"):
        print(f"{method:16} {train(method):6.1%} of the sums right", flush=True)
