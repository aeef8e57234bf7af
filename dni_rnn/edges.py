"""Edges that an interface adds to the autograd graph: one trains M on the gradient, one injects ĝ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Owner(Protocol):
    """The owner of an edge: an `Interface`."""

    loss_scale: Tensor | float | None

    def _factor(self, critique: bool, discount: float, loss_scale: Tensor | float | None) -> Tensor: ...

    def _like(self, rows: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]: ...

    def _regress(
        self, predicted: Tensor, gradients: Sequence[Tensor], done: Tensor | None, losses: Tensor | None
    ) -> list[Tensor]: ...


class Edge(torch.autograd.Function):
    """Identity forward. Backward: trains M on the gradient, and passes ĝ on if the message requires one.

    For a detached message, which does not, the edge is `receive`, and the graph ends here. The tensors are
    the `count` of the message, M's prediction for it (B, features), and M's losses, if any. The unnamed
    input is `ASKED`, if M is constant.
    """

    @staticmethod
    def forward(
        ctx: Any, interface: Owner, done: Tensor | None, _: Tensor | None, count: int, *tensors: Tensor
    ) -> Any:
        messages, predicted = tensors[:count], tensors[count:]
        ctx.interface, ctx.done = interface, done
        ctx.passes_on = any(ctx.needs_input_grad[4 : 4 + count])
        # With the current target RMS: backward updates it.
        ctx.factor = (
            interface._factor(len(predicted) > 1, 1.0, interface.loss_scale) if ctx.passes_on else None
        )
        ctx.save_for_backward(*predicted)
        # Not views: the receiver may change them in place, and M's input must stay as it was.
        return tuple(message.clone() for message in messages)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        predicted, *losses = ctx.saved_tensors
        interface = ctx.interface
        onward: list[Tensor | None] = [None] * len(gradients)
        if ctx.passes_on:
            onward = interface._like(times(ctx.factor, predicted), gradients)
        trained = interface._regress(predicted, gradients, ctx.done, losses[0] if losses else None)
        return None, None, None, None, *onward, *trained


class Send(torch.autograd.Function):
    """Zero forward. Backward: the synthetic gradients, as the gradients of the messages.

    The tensors are `count` gradients, as many messages, and others, which get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[:count])
        return tensors[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> Any:
        # The incoming factor is ignored on purpose. `receive` sees gradients of the scalar on which
        # backward is called, so M already predicts in its units: with (loss + sent) / 4, g is divided
        # by 4, M learns that, and dividing ĝ again would be wrong.
        synthetic = ctx.saved_tensors
        others = len(ctx.needs_input_grad) - 1 - 2 * len(synthetic)
        return None, *[None] * len(synthetic), *synthetic, *[None] * others


def attach(loss: Tensor, loss_scale: Tensor | float | None) -> Tensor:
    """A scalar of value 0 whose gradient with respect to the scalar `loss` is `loss_scale` (None: 1),
    whatever it is added to.
    """
    loss = loss if loss_scale is None else loss_scale * loss
    return Send.apply(1, torch.ones_like(loss), loss)  # type: ignore[return-value]


def without(done: Tensor | None, rows: Tensor) -> Tensor:
    """`rows` with zeros where `done` holds."""
    return rows if done is None else rows.masked_fill(done.unsqueeze(1), 0.0)


def times(factor: Tensor, tensor: Tensor) -> Tensor:
    """A scalar tensor times another, in the wider dtype: a small factor would underflow in float16."""
    return factor * tensor.to(torch.promote_types(tensor.dtype, factor.dtype))
