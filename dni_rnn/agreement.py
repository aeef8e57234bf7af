"""How well one gradient approximates another, and measuring it without side effects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Agreement(NamedTuple):
    """A synthetic gradient ĝ against a true one g, over all rows and features of a message.

    Attributes:
      cosine: similarity, ĝ·g / (|ĝ| |g|).
      explained: 1 − |ĝ − g|² / |g|²; 0 is what predicting zero gives, 1 is perfect; it may be far below 0.
      trust: the least-squares coefficient of g on ĝ, Σ ĝ·g / Σ ĝ·ĝ, clipped to [0, 1].
    """

    cosine: float
    explained: float
    trust: float


def agreement_of(synthetic: Tensor, true: Tensor) -> Agreement:
    """`Agreement` of two tensors of one shape."""
    explained = 1.0 - (synthetic - true).square().sum() / true.square().sum()
    trust = trust_of((synthetic * true).sum(), synthetic.square().sum())
    return Agreement(cosine_similarity(synthetic, true), float(explained), float(trust))


def cosine_similarity(a: Tensor, b: Tensor) -> float:
    """Cosine similarity of two tensors, flattened."""
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def trust_of(products: Tensor, squares: Tensor) -> Tensor:
    """Σ ĝ·g / Σ ĝ·ĝ from the two sums (scalars), clipped to [0, 1]; 0 where ĝ is 0."""
    return (products / squares).nan_to_num(0.0).clamp(0.0, 1.0)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Restore `.grad` and buffers (statistics of interfaces and batch normalisation) on exit.

    Inside, `.grad` starts as None.
    """
    parameters = [p for module in modules for p in module.parameters()]
    gradients = [p.grad for p in parameters]
    owners = [owner for module in modules for owner in module.modules()]
    kept = [
        (owner, name, buffer, buffer.clone())
        for owner in owners
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for owner, name, buffer, before in kept:
                setattr(owner, name, buffer.copy_(before))  # a module may have put another one there
