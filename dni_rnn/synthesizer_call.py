"""The call of a synthesizer M, with checks of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dni_rnn.checks import Layout, alike
from dni_rnn.pytree import Spec, Tree, flatten, has_rows, unflatten


class Critique(NamedTuple):
    """The output of an M that predicts the future loss, and the gradient as its derivative.

    Attributes:
      gradient: like the message, as the output of any M (see `Interface`), but in units of the loss, not of
        `Interface.target_rms`; while gradients are recorded, with its graph, through which the match trains M
        (a second derivative).
      losses: (B,), further losses of M per row, weighted relative to a match loss of 1 for predicting zero.
    """

    gradient: Tree
    losses: Tensor


def ask(
    synthesizer: nn.Module,
    layout: Layout,
    leaves: list[Tensor],
    spec: Spec,
    context: Any,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """M's prediction for a message, checked and as rows; followed by its losses, if any.

    Args:
      dtype: that of M, as last known; a message of another dtype is converted.

    Raises:
      ValueError: M does not return tensors of the shapes of the message, or has changed the message in place.
    """
    told = [leaf.detach() for leaf in leaves]
    before = _versions(leaves)
    if {leaf.dtype for leaf in told} != {dtype} and not torch.is_autocast_enabled(told[0].device.type):
        own = dtype_of(synthesizer)
        told = told if own is None else [leaf.to(own) for leaf in told]
    with _forgotten():
        answer = synthesizer(unflatten(told, spec), context)
    if _versions(leaves) != before:
        raise ValueError(
            "the synthesizer changed its message in place, which is the sender's too: begin it with a clone, "
            "or with a layer that does not work in place"
        )
    answer, losses = (answer.gradient, [answer.losses]) if isinstance(answer, Critique) else (answer, [])
    rows, features = layout.sizes(leaves)
    if losses and losses[0].shape != (rows,):
        raise ValueError(f"a critique has one loss a row, ({rows},), not {tuple(losses[0].shape)}")
    if isinstance(answer, Tensor) and answer.shape == (rows, features):
        return [answer, *losses]
    parts, _ = flatten(answer, has_rows)
    alike(parts, leaves, "what the synthesizer returns")
    return [layout.rows(parts), *losses]


@contextmanager
def _forgotten() -> Iterator[None]:
    """While no gradients are recorded, autocast does not keep M's converted weights.

    torch 2.6 would use them also where gradients are recorded: in a `receive` after `send` in one autocast
    region, M's weights would get none.
    """
    cached = torch.is_autocast_cache_enabled()
    if torch.is_grad_enabled() or not cached or torch.compiler.is_compiling():
        yield
        return
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _versions(leaves: list[Tensor]) -> list[int]:
    """Version counters, which show changes in place; not when compiling or in inference mode."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return []
    return [0 if leaf.is_inference() else leaf._version for leaf in leaves]


def batch_dim_of(synthesizer: nn.Module) -> Tree:
    """M's `batch_dim`; None if it has none."""
    found = (getattr(module, "batch_dim", None) for module in synthesizer.modules())
    return next((batch_dim for batch_dim in found if batch_dim is not None), None)


def dtype_of(synthesizer: nn.Module) -> torch.dtype | None:
    """The dtype of M's parameters; None if it has none."""
    parameter = next(synthesizer.parameters(), None)
    return None if parameter is None else parameter.dtype
