"""A linear recurrence over many steps at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _doubling(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_{t−1} + b_t from h_{−1} = 0, in log₂ T passes; a is (T, ...) or (1, ...) for all."""
    steps, reach = len(b), 1
    while reach < steps:
        b = torch.cat([b[:reach], torch.addcmul(b[reach:], a[-(steps - reach) :], b[:-reach])])
        if 2 * reach < steps:
            a = a * a if len(a) == 1 else torch.cat([a[:reach], a[reach:] * a[:-reach]])
        reach *= 2
    return b


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, start: Tensor) -> Tensor:
        h = _doubling(a, torch.cat([torch.addcmul(b[:1], a[:1], start), b[1:]]))
        ctx.save_for_backward(a, h, start)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # Backward is the same recurrence in reverse: δ_t = g_t + conj(a_{t+1}) δ_{t+1}.
        a, h, start = ctx.saved_tensors
        back = a.conj().resolve_conj()
        if len(a) > 1:
            back = torch.cat([back[:1], back[1:].flip(0)])
        delta = _doubling(back, gradient.flip(0)).flip(0)
        of_a = of_start = None
        if ctx.needs_input_grad[0]:
            of_a = torch.cat([start.unsqueeze(0), h[:-1]]).conj() * delta
            if len(a) == 1:
                of_a = of_a.sum(0, keepdim=True)
            of_a = of_a.sum_to_size(a.shape)
        if ctx.needs_input_grad[2]:
            of_start = a[0].conj() * delta[0]
        return of_a, delta, of_start


def scan(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """h_t = a_t · h_{t−1} + b_t for t = 0, ..., T − 1, by doubling: log₂ T passes, forward and backward.

    Args:
      a: (T, B, D), or (1, 1, D) if it is the same at every step; real or complex.
      b: (T, B, D).
      start: h_{−1}, (B, D).
    Returns:
      h, (T, B, D). Once differentiable.
    Source: Hillis & Steele 1986, Communications of the ACM 29; Martin & Cundy 2018, arXiv:1709.04057.
    """
    return _Scan.apply(a, b, start)  # type: ignore[return-value]
