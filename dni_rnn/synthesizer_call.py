"""M is asked: what it is told, and what it may answer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dni_rnn.checks import Layout, alike
from dni_rnn.pytree import Spec, Tree, flatten, has_rows, unflatten


class Critique(NamedTuple):
    """What M returns when it predicts the loss to come, and its gradient as the derivative of that.

    Attributes:
      gradient: like the message, as any M's answer (see `Interface`), but in units of the loss, not of
        `Interface.target_rms`; while gradients are recorded, with its graph, through which its match
        trains M (a second derivative).
      losses: (B,), what M is trained on besides the match: row by row, weighted as M sees fit against a
        match loss of 1 for predicting zero.
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
    """What M predicts for a message, checked and as rows; and behind it its losses if it has them.

    Args:
      dtype: M's, as last known; a message in another is turned into M's.

    Raises:
      ValueError: M does not return tensors of the shapes of the message, or has changed the message in place.
    """
    told = [leaf.detach() for leaf in leaves]
    before = _versions(leaves)
    if {leaf.dtype for leaf in told} != {dtype} and not torch.is_autocast_enabled(told[0].device.type):
        own = dtype_of(synthesizer)
        told = told if own is None else [leaf.to(own) for leaf in told]
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


def _versions(leaves: list[Tensor]) -> list[int]:
    """By which a change in place is seen; a compiler does not, and tensors without history have none."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return []
    return [0 if leaf.is_inference() else leaf._version for leaf in leaves]


def batch_dim_of(synthesizer: nn.Module) -> Tree:
    """Where M has the rows of its message; None where it does not say."""
    found = (getattr(module, "batch_dim", None) for module in synthesizer.modules())
    return next((batch_dim for batch_dim in found if batch_dim is not None), None)


def dtype_of(synthesizer: nn.Module) -> torch.dtype | None:
    """That of M's parameters; None where it has none."""
    parameter = next(synthesizer.parameters(), None)
    return None if parameter is None else parameter.dtype
