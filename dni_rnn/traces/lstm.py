"""An LSTM that keeps its gates, which backpropagation and the trace both need.

On one CPU thread it takes about as long as torch's fused LSTM or less, and its trace recomputes no gates. It
has `nn.LSTM`'s weights, equations and results, to rounding. On a GPU the element-wise part of a step is
the kernel of torch's `nn.LSTMCell` (`KERNEL`), one launch forward and one backward.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class WindowGates:
    """The gates of every step of one layer and window, and values derived from them.

    Attributes:
      gates: σ(i), σ(f), tanh(g), σ(o), concatenated, (T, B, 4H).
      cells: c_t, and tanh of it, each (T, B, H).
      outputs: h_t, (T, B, H).
      start: h, c before the first step, each (B, H).
    """

    gates: Tensor
    cells: Tensor
    tanh_cells: Tensor
    outputs: Tensor
    start: tuple[Tensor, Tensor]
    _factors: Tensor | None = None
    _slopes: Tensor | None = None

    def before(self) -> Tensor:
        """h_{t−1}, (T, B, H)."""
        return torch.cat([self.start[0].unsqueeze(0), self.outputs[:-1]])

    def factors(self) -> tuple[Tensor, Tensor]:
        """∂c_t/∂(i, f, g) and ∂h_t/∂o, concatenated, (T, B, 4H); ∂h_t/∂c_t, (T, B, H)."""
        if self._factors is None or self._slopes is None:
            i, f, g, o = self.gates.chunk(4, -1)
            factors = torch.empty_like(self.gates)
            by_i, by_f, by_g, by_o = factors.chunk(4, -1)
            added = i * g
            kept = torch.empty_like(added)
            torch.mul(f[0], self.start[1], out=kept[0])
            torch.mul(f[1:], self.cells[:-1], out=kept[1:])
            torch.addcmul(added, added, i, value=-1.0, out=by_i)
            torch.addcmul(kept, kept, f, value=-1.0, out=by_f)
            torch.addcmul(i, added, g, value=-1.0, out=by_g)
            torch.addcmul(self.outputs, self.outputs, o, value=-1.0, out=by_o)
            self._factors = factors
            self._slopes = torch.addcmul(o, self.outputs, self.tanh_cells, value=-1.0)
        return self._factors, self._slopes


class _Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept: WindowGates, x: Tensor, h: Tensor, c: Tensor, weight: Tensor) -> Any:
        steps, rows, hidden = len(x), *h.shape
        kept.start = h.detach(), c.detach()
        kept.gates = torch.empty_like(x)
        kept.cells, kept.tanh_cells, kept.outputs = (x.new_empty(steps, rows, hidden) for _ in range(3))
        groups = kept.gates.unflatten(-1, (4, hidden)).unbind(-2)
        back = weight.t()
        for x_t, gates, i, f, g, o, cell, tanh_cell, output in zip(
            x.unbind(0),
            kept.gates.unbind(0),
            *(group.unbind(0) for group in groups),
            kept.cells.unbind(0),
            kept.tanh_cells.unbind(0),
            kept.outputs.unbind(0),
            strict=True,
        ):
            torch.addmm(x_t, h, back, out=gates)
            # tanh x = 2σ(2x) − 1: torch's own takes four times as long on a CPU.
            g.mul_(2.0)
            gates.sigmoid_()
            g.mul_(2.0).sub_(1.0)
            c = torch.mul(f, c, out=cell).addcmul_(i, g)
            torch.mul(c, 2.0, out=tanh_cell).sigmoid_().mul_(2.0).sub_(1.0)
            h = torch.mul(o, tanh_cell, out=output)
        ctx.kept = kept
        ctx.save_for_backward(weight)
        # Not the kept tensors themselves, which would make a reference cycle with the graph.
        return kept.outputs.detach(), kept.cells[-1].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_outputs: Tensor, of_cell: Tensor) -> Any:
        kept, (weight,) = ctx.kept, ctx.saved_tensors
        hidden = of_outputs.shape[-1]
        factors, slopes = kept.factors()
        delta = torch.empty_like(factors)
        groups = factors.unflatten(-1, (4, hidden)), delta.unflatten(-1, (4, hidden))
        forget = kept.gates[..., hidden : 2 * hidden].unbind(0)
        of_h, of_c = torch.zeros_like(of_cell), of_cell
        every = list(
            zip(
                of_outputs.unbind(0),
                slopes.unbind(0),
                forget,
                groups[0][:, :, :3].unbind(0),
                groups[1][:, :, :3].unbind(0),
                groups[0][:, :, 3].unbind(0),
                groups[1][:, :, 3].unbind(0),
                delta.unbind(0),
                strict=True,
            )
        )
        for of_output, slope, f, by_c, delta_c, by_o, delta_o, delta_t in reversed(every):
            of_h = of_h.add_(of_output)
            of_c = torch.addcmul(of_c, of_h, slope)
            torch.mul(by_c, of_c.unsqueeze(1), out=delta_c)
            torch.mul(by_o, of_h, out=delta_o)
            of_h = delta_t @ weight
            of_c = of_c.mul_(f)
        of_weight = None
        if ctx.needs_input_grad[4]:
            of_weight = delta.view(-1, 4 * hidden).t() @ kept.before().view(-1, hidden)
        return None, delta, of_h, of_c, of_weight


def steps(x: Tensor, h: Tensor, c: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, WindowGates]:
    """An LSTM layer over the steps of a window.

    Args:
      x: (T, B, 4H), the contribution of inputs and biases to the gates i, f, g, o.
      h, c: (B, H), before the first step.
      weight: weight_hh, (4H, H).
    Returns:
      h_t of all steps (T, B, H), c after the last (B, H), and what was kept. Once differentiable.
    """
    kept = WindowGates()
    outputs, cell = _Steps.apply(kept, x.contiguous(), h, c, weight)  # type: ignore[misc]
    return outputs, cell, kept


class StepKernel(Protocol):
    """The element-wise part of a step: gates (B, 4H) in the order i, f, g, o; h and c (B, H).

    forward: from the contributions of x and h to the gates, and c_{t−1}, to h_t, c_t and the gates σ(i),
      σ(f), tanh(g), σ(o).
    backward: from the gradients at h_t (None: 0) and c_t, and c_{t−1}, c_t and the gates, to the gradients at
      the pre-activations, (B, 4H), and at c_{t−1}.
    """

    @staticmethod
    def forward(of_x: Tensor, of_h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    @staticmethod
    def backward(
        at_h: Tensor | None, at_c: Tensor, before: Tensor, after: Tensor, gates: Tensor
    ) -> tuple[Tensor, Tensor]: ...


class _Aten:
    """One torch kernel each; they exist for CUDA only."""

    @staticmethod
    def forward(of_x: Tensor, of_h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._thnn_fused_lstm_cell(of_x, of_h, c)

    @staticmethod
    def backward(
        at_h: Tensor | None, at_c: Tensor, before: Tensor, after: Tensor, gates: Tensor
    ) -> tuple[Tensor, Tensor]:
        cell = torch.ops.aten._thnn_fused_lstm_cell_backward_impl
        return cell(at_h, at_c, before, after, gates, False)[:2]


KERNEL: type[StepKernel] = _Aten


class StepwiseGates:
    """Values of one layer and window, step by step, from `KERNEL`.

    Attributes:
      gates: σ(i), σ(f), tanh(g), σ(o) of each step, (B, 4H).
      cells: c before the first step and after each, (B, H).
      hiddens: h before the first step and after each, (T + 1, B, H).
    """

    gates: list[Tensor]
    cells: list[Tensor]
    hiddens: Tensor

    def along_the_cell(self, decay: float) -> tuple[Tensor, Tensor]:
        """∂c_T/∂(i, f, g) of every step, (T, B, 3H), and ∂c_T/∂c_0, (B, H), both along the forget gates.

        Equals the backward pass, step by step, with gradient 1 at c_T and none at any h.
        """
        hidden = self.hiddens.shape[-1]
        at_c, found = torch.ones_like(self.cells[0]), []
        for t in range(len(self.gates) - 1, -1, -1):
            at_gates, at_c = KERNEL.backward(None, at_c, self.cells[t], self.cells[t + 1], self.gates[t])
            if decay != 1.0:
                at_c = at_c.mul_(decay)
            found.append(at_gates[:, : 3 * hidden])
        return torch.stack(found[::-1]), at_c


class _KernelSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept: StepwiseGates, x: Tensor, h: Tensor, c: Tensor, weight: Tensor) -> Any:
        back, hiddens = weight.t(), [h.contiguous()]
        kept.gates, kept.cells = [], [c.detach().contiguous()]
        for x_t in x.unbind(0):
            h, c, gates = KERNEL.forward(x_t, hiddens[-1] @ back, kept.cells[-1])
            hiddens.append(h)
            kept.cells.append(c)
            kept.gates.append(gates)
        kept.hiddens = torch.stack(hiddens)
        ctx.kept = kept
        ctx.save_for_backward(weight)
        return kept.hiddens[1:].detach(), kept.cells[-1].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_outputs: Tensor, of_cell: Tensor) -> Any:
        kept, (weight,) = ctx.kept, ctx.saved_tensors
        at_h, at_c = of_outputs.clone(memory_format=torch.contiguous_format), of_cell.contiguous()
        found = []
        for t in range(len(kept.gates) - 1, -1, -1):
            delta, at_c = KERNEL.backward(at_h[t], at_c, kept.cells[t], kept.cells[t + 1], kept.gates[t])
            found.append(delta)
            if t:
                at_h[t - 1].addmm_(delta, weight)
        of_h = found[-1] @ weight
        delta = torch.stack(found[::-1])
        of_weight = None
        if ctx.needs_input_grad[4]:
            of_weight = delta.flatten(0, 1).t() @ kept.hiddens[:-1].flatten(0, 1)
        return None, delta, of_h, at_c, of_weight


def kernel_steps(x: Tensor, h: Tensor, c: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, StepwiseGates]:
    """`steps` by `KERNEL`: two launches per step, for devices where launches dominate."""
    kept = StepwiseGates()
    outputs, cell = _KernelSteps.apply(kept, x.contiguous(), h, c, weight)  # type: ignore[misc]
    return outputs, cell, kept
