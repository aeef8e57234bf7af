"""`--core diagonal`: complex diagonal recurrences (LRU), each followed by a non-linearity."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.cores._scan import scan
from dni_rnn.traces.rules import LayerWindow, Record, Term


class DiagonalState(NamedTuple):
    """State of a `Diagonal`: a complex number for each cell.

    Attributes:
      real, imaginary: each (layers, B, H).
    """

    real: Tensor
    imaginary: Tensor


torch.serialization.add_safe_globals([DiagonalState])


class _Layer(nn.Module):
    def __init__(self, input_size: int, hidden_size: int, ring: tuple[float, float], phase: float) -> None:
        super().__init__()
        inner, outer = ring
        square = torch.rand(hidden_size) * (outer**2 - inner**2) + inner**2
        self.log_decay = nn.Parameter(torch.log(-0.5 * torch.log(square)))
        self.log_phase = nn.Parameter(torch.log(phase * torch.rand(hidden_size).clamp_min(1e-4)))
        self.log_scale = nn.Parameter(0.5 * torch.log1p(-square))
        self.weight_real = nn.Parameter(torch.randn(hidden_size, input_size) / math.sqrt(2 * input_size))
        self.weight_imaginary = nn.Parameter(torch.randn(hidden_size, input_size) / math.sqrt(2 * input_size))
        self.mix = nn.Linear(2 * hidden_size, hidden_size)
        self.skip = nn.Linear(input_size, hidden_size, bias=False)

    def multiplier(self) -> Tensor:
        """λ, (H,)."""
        return torch.exp(torch.complex(-self.log_decay.exp(), self.log_phase.exp()))


class Diagonal(nn.Module):
    """A stack of complex diagonal recurrences:

        s_t = λ ⊙ s_{t−1} + γ ⊙ (B x_t),     λ = exp(−exp(ν) + i·exp(φ)),  γ = exp(log γ),  B complex
        y_t = GELU(C [Re s_t, Im s_t] + c + D x_t)

    y is the input of the next layer; that of the top layer is the output. |λ| < 1 for any ν. Initially λ is
    uniform on the ring between `inner` and `outer`, with phases up to `phase`, and γ = √(1 − |λ|²).

    A window of T steps is a scan of log₂ T passes, forward and backward. For one layer the trace
    (`dni_rnn.traces.Traced`) is exact: strictly online, it gives full BPTT. In a stack, each layer's trace is
    exact within that layer.

    Args:
      input_size, hidden_size, num_layers: as in torch.
      inner, outer: minimum and maximum of the initial |λ|. After K steps a factor |λ|^K is left: for lags of
        K, most |λ| should be 1 − 1/K or more.
      phase: maximum of the initial phase of λ.

    Attributes:
      output_size: `hidden_size`.
      output_leaf: None: no leaf of the state is the output.

    Sources: Orvieto et al. 2023, arXiv:2303.06349 (LRU); online: Zucchet et al. 2023, arXiv:2305.15947;
    Elelimy et al. 2024, arXiv:2409.01449 (real form, a non-linearity behind a linear recurrence).
    """

    output_leaf = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        inner: float = 0.8,
        outer: float = 0.999,
        phase: float = math.pi,
    ) -> None:
        super().__init__()
        if not 0.0 <= inner <= outer < 1.0:
            raise ValueError(f"inner and outer must lie in [0, 1), inner first, not {inner} and {outer}")
        self.hidden_size = self.output_size = hidden_size
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        self.layers = nn.ModuleList(_Layer(size, hidden_size, (inner, outer), phase) for size in sizes)

    def initial_state(self, batch: int) -> DiagonalState:
        """Zeros, on the device and in the dtype of the weights."""
        zeros = next(self.parameters()).new_zeros(len(self.layers), batch, self.hidden_size)
        return DiagonalState(zeros, zeros.clone())

    def forward(self, inputs: Tensor, state: DiagonalState) -> tuple[Tensor, DiagonalState]:
        """inputs (T, B, I) -> outputs (T, B, H), and the state after them."""
        return self.run(inputs, state)[:2]

    def run(self, inputs: Tensor, state: DiagonalState) -> tuple[Tensor, DiagonalState, list[Record]]:
        """`forward`, and a record of each layer for its trace."""
        x, ends, records = inputs, [], []
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, _Layer)
            start = torch.complex(state[0][number], state[1][number])
            multiplier, scale = layer.multiplier(), layer.log_scale.exp()
            dtype = scale.dtype
            weight = torch.cat([layer.weight_real, layer.weight_imaginary])
            real, imaginary = F.linear(x, weight).to(dtype).chunk(2, -1)
            s = scan(multiplier.expand(1, 1, -1), torch.complex(scale * real, scale * imaginary), start)
            used = multiplier.detach(), scale.detach()
            records.append(self._record(number, layer, used, x.detach(), start.detach(), s.detach()))
            ends.append(s[-1])
            x = F.gelu(layer.mix(torch.cat([s.real, s.imag], -1)) + layer.skip(x))
        end = torch.stack(ends)
        return x, DiagonalState(end.real, end.imag), records

    def _record(
        self, number: int, layer: _Layer, used: tuple[Tensor, Tensor], x: Tensor, start: Tensor, s: Tensor
    ) -> Record:
        hidden, name = self.hidden_size, f"layers.{number}."
        # All of the weights that the window ran with, whatever the layer has when backward comes.
        (multiplier, scale), log_decay, log_phase = used, layer.log_decay, layer.log_phase

        def window() -> LayerWindow:
            before = torch.cat([start.unsqueeze(0), s[:-1]])
            factors = s.new_empty(*s.shape[:-1], 4 * hidden)
            by_decay, by_phase, by_scale, by_input = factors.chunk(4, -1)
            carried = multiplier * before
            torch.mul(carried, -log_decay.exp(), out=by_decay)
            torch.mul(carried, 1j * log_phase.exp(), out=by_phase)
            torch.sub(s, carried, out=by_scale)
            by_input.copy_(scale.expand_as(s))
            return LayerWindow(multiplier.expand_as(s), factors, (x.to(scale.dtype),), (1.0, 1j))

        vectors = [
            Term(name + parameter, (group * hidden, (group + 1) * hidden))
            for group, parameter in enumerate(("log_decay", "log_phase", "log_scale"))
        ]
        columns = (3 * hidden, 4 * hidden)
        matrices = [
            Term(name + "weight_real", columns, 0),
            Term(name + "weight_imaginary", columns, 0, part="imaginary"),
        ]
        return Record([*vectors, *matrices], window)


CORE = Diagonal
