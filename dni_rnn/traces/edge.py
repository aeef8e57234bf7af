"""The edge that a trace adds to the autograd graph, and the data of one window for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dni_rnn.traces.rules import Record


class Passage:
    """Data of one window for its backward pass: filled by the forward pass, read once."""

    def __init__(
        self,
        starts: list[Tensor],
        done: Tensor | None,
        anew: bool,
        sent: list[Tensor] | None,
        parameters: dict[str, Tensor],
    ) -> None:
        self.starts, self.done, self.anew, self.sent, self.parameters = starts, done, anew, sent, parameters
        self.records: list[Record] = []
        self.absorbed = self.differentiated = False


class Owner(Protocol):
    """The owner of an edge: a `Traced`."""

    def _backward(self, passage: Passage, gradients: Sequence[Tensor]) -> list[Tensor | None]: ...


class TraceEdge(torch.autograd.Function):
    """Identity on the state at a window's start. Backward: adds the trace's part for the parameters."""

    @staticmethod
    def forward(ctx: Any, traced: Owner, passage: Passage, count: int, *tensors: Tensor) -> Any:
        ctx.traced, ctx.passage, ctx.count = traced, passage, count
        return tuple(leaf.detach() for leaf in tensors[:count])  # no views: a core may change them in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        onward = [g if asks else None for g, asks in zip(gradients, ctx.needs_input_grad[3:], strict=False)]
        return None, None, None, *onward, *ctx.traced._backward(ctx.passage, gradients)
