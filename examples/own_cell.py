"""A custom recurrent cell, trained with synthetic gradients from the command line.

    PYTHONPATH=examples dni-rnn train text --core own_cell:Cell --bptt 4 --dni --steps 50

It is an LSTM with coupled input and forget gates: the memory takes in as large a share as it forgets:

    f, o  = σ(W x + U h + b)                two gates
    m'    = f · m + (1 − f) · tanh(W x + b) the memory, always within ±1
    h'    = o · tanh(m')                    the output

Any module with the four members below works (`dni_rnn.cores.Core`); its state can be any tree of tensors,
here it is a dict.

Source: Greff et al. 2017, "LSTM: A Search Space Odyssey", arXiv:1503.04069 (CIFG, without peepholes).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dni_rnn.errors import UsageError

State = dict[str, Tensor]


class Cell(nn.Module):
    """See the module. State: "memory" and "output", each (B, hidden_size)."""

    output_leaf = "output"

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1) -> None:
        super().__init__()
        if num_layers != 1:
            raise UsageError("--core own_cell:Cell has one layer: leave out --layers")
        self.output_size = hidden_size
        self.inputs = nn.Linear(input_size, 3 * hidden_size)
        self.recurrent = nn.Linear(hidden_size, 2 * hidden_size, bias=False)

    def initial_state(self, batch_size: int) -> State:
        """Zeros."""
        zeros = self.recurrent.weight.new_zeros(batch_size, self.output_size)
        return {"memory": zeros, "output": zeros.clone()}

    def forward(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """inputs (T, B, input_size) -> outputs (T, B, hidden_size), and the state after them."""
        memory, output, outputs = state["memory"], state["output"], []
        for x in self.inputs(inputs):
            gates, candidate = x.split([2 * self.output_size, self.output_size], dim=1)
            forget, open_ = torch.sigmoid(gates + self.recurrent(output)).chunk(2, dim=1)
            memory = torch.lerp(candidate.tanh(), memory, forget)
            output = open_ * memory.tanh()
            outputs.append(output)
        return torch.stack(outputs), {"memory": memory, "output": output}
