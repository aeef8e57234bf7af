"""`--core mingru`: a GRU whose gates depend on the input alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dni_rnn.cores._scan import scan
from dni_rnn.traces.rules import LayerWindow, Record, Term


class MinGRU(nn.Module):
    """A stack of minimal GRUs:

        h_t = (1 − z_t)·h_{t−1} + z_t·n_t,     z_t = σ(W_z x_t + b_z),  n_t = W_n x_t + b_n

    h is the input of the next layer; that of the top layer is the output. The only recurrence is
    element-wise, so a window of T steps is a scan of log₂ T passes, forward and backward, and for one layer
    the trace (`dni_rnn.traces.Traced`) is exact: strictly online, it gives full BPTT. In a stack, each
    layer's trace is exact within that layer.

    Args:
      input_size, hidden_size, num_layers: as in torch.

    Attributes:
      output_size: `hidden_size`.
      output_leaf: None: the state is one tensor.

    Source: Feng et al. 2024, arXiv:2410.01201 (without its log-space form, which is for half precision).
    """

    output_leaf = None

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1) -> None:
        super().__init__()
        self.hidden_size = self.output_size = hidden_size
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        self.layers = nn.ModuleList(nn.Linear(size, 2 * hidden_size) for size in sizes)

    def initial_state(self, batch: int) -> Tensor:
        """Zeros, on the device and in the dtype of the weights."""
        return next(self.parameters()).new_zeros(len(self.layers), batch, self.hidden_size)

    def forward(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """inputs (T, B, I) -> outputs (T, B, H), and the state (layers, B, H) after them."""
        return self.run(inputs, state)[:2]

    def run(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor, list[Record]]:
        """`forward`, and a record of each layer for its trace."""
        x, ends, records = inputs, [], []
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            start = state[number]
            z, n = layer(x).to(layer.weight.dtype).chunk(2, -1)
            z = z.sigmoid()
            h = scan(1.0 - z, z * n, start)
            records.append(
                self._record(number, x.detach(), z.detach(), n.detach(), start.detach(), h.detach())
            )
            ends.append(h[-1])
            x = h
        return x, torch.stack(ends), records

    def _record(self, number: int, x: Tensor, z: Tensor, n: Tensor, start: Tensor, h: Tensor) -> Record:
        def window() -> LayerWindow:
            before = torch.cat([start.unsqueeze(0), h[:-1]])
            by_z = (n - before) * torch.addcmul(z, z, z, value=-1.0)
            return LayerWindow(1.0 - z, torch.cat([by_z, z], -1), (x.to(z.dtype),), (1.0,))

        columns = (0, 2 * self.hidden_size)
        terms = [Term(f"layers.{number}.weight", columns, 0), Term(f"layers.{number}.bias", columns)]
        return Record(terms, window)


CORE = MinGRU
