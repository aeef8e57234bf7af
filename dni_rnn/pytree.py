"""Messages: tensors, or nested tuples and dicts of tensors. And the one detach of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tree = Any
"""A tensor, or a (nested) tuple, named tuple, list or dict of tensors; None where there is nothing."""


class LSTMState(NamedTuple):
    """What an LSTM carries from step to step. A synthetic gradient of it has this same type.

    Attributes:
      hidden: h, (layers, B, H).
      cell: c, (layers, B, H).
    """

    hidden: Tensor
    cell: Tensor


LEAF = "leaf"
Spec = Any
"""The structure of a tree without its tensors; what `unflatten` needs."""


def flatten(tree: Tree) -> tuple[list[Tensor], Spec]:
    """The tensors of `tree` in a fixed order (dicts by sorted key), and what puts them back. None is no leaf.

    Raises:
      TypeError: a leaf is not a tensor.
    """
    leaves: list[Tensor] = []
    return leaves, _flatten(tree, leaves)


def _flatten(tree: Tree, leaves: list[Tensor]) -> Spec:
    # Written out, because it runs a dozen times per window and torch's own is private and slow.
    if isinstance(tree, Tensor):
        leaves.append(tree)
        return LEAF
    if tree is None:
        return None
    if isinstance(tree, tuple | list):
        return type(tree), [_flatten(branch, leaves) for branch in tree]
    if isinstance(tree, dict):
        specs = {key: _flatten(tree[key], leaves) for key in sorted(tree)}
        return dict, specs, list(tree)
    raise TypeError(
        f"a message is a tensor or a tuple or dict of tensors; found a {type(tree).__name__} in it"
    )


def unflatten(leaves: Iterable[Tensor], spec: Spec) -> Tree:
    """The inverse of `flatten`."""
    return _unflatten(iter(leaves), spec)


def _unflatten(leaves: Iterator[Tensor], spec: Spec) -> Tree:
    if spec is LEAF:
        return next(leaves)
    if spec is None:
        return None
    kind, branches, *order = spec
    if kind is dict:
        values = {key: _unflatten(leaves, branch) for key, branch in branches.items()}
        return {key: values[key] for key in order[0]}
    values = [_unflatten(leaves, branch) for branch in branches]
    return kind(*values) if hasattr(kind, "_fields") else kind(values)


def part(tree: Tree, key: str | int | None) -> Tree:
    """A part of a tree: the field of a named tuple, the key of a dict, the index of a tuple; None is all."""
    if key is None:
        return tree
    return tree[key] if isinstance(key, int) or isinstance(tree, dict) else getattr(tree, key)


def map_tree(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """Apply `function` to every tensor of `tree`."""
    leaves, spec = flatten(tree)
    return unflatten([function(leaf) for leaf in leaves], spec)


def detach(tree: Tree) -> Tree:
    """Cut the graph: the same values, no history."""
    return map_tree(torch.Tensor.detach, tree)


def per_row(values: Tensor, leaf: Tensor, batch_dim: int) -> Tensor:
    """Shape `values` (B,) so that it broadcasts along dimension `batch_dim` of `leaf`."""
    shape = [1] * leaf.dim()
    shape[batch_dim] = leaf.shape[batch_dim]
    return values.reshape(shape)


def where_rows(rows: Tensor, chosen: Tree, other: Tree, batch_dim: int = -2) -> Tree:
    """Row by row: `chosen` where the boolean `rows` (B,) holds, `other` elsewhere."""
    leaves, spec = flatten(chosen)
    others, _ = flatten(other)
    mixed = [
        torch.where(per_row(rows, leaf, batch_dim), leaf, o) for leaf, o in zip(leaves, others, strict=True)
    ]
    return unflatten(mixed, spec)


def flatten_rows(tree: Tree, batch_dim: int = -2) -> Tensor:
    """All tensors of `tree` side by side, one row per row: (B, features)."""
    rows = [_row_first(leaf, batch_dim) for leaf in flatten(tree)[0]]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _row_first(leaf: Tensor, batch_dim: int) -> Tensor:
    # The first two in one step each: a state of one layer, and what is rows already.
    if batch_dim == -2 and leaf.dim() == 3 and leaf.shape[0] == 1:
        return leaf.squeeze(0)
    if leaf.dim() == 2 and batch_dim in (0, -2):
        return leaf
    return leaf.movedim(batch_dim, 0).flatten(1)


def unflatten_rows(rows: Tensor, leaves: Sequence[Tensor], batch_dim: int = -2) -> list[Tensor]:
    """The inverse of `flatten_rows`: tensors of the shapes of `leaves`."""
    if len(leaves) == 1:
        return [_row_back(rows, leaves[0], batch_dim)]
    parts = rows.split([leaf.numel() // leaf.shape[batch_dim] for leaf in leaves], dim=1)
    return [_row_back(part, leaf, batch_dim) for part, leaf in zip(parts, leaves, strict=True)]


def _row_back(part: Tensor, leaf: Tensor, batch_dim: int) -> Tensor:
    if batch_dim == -2 and leaf.dim() == 3 and leaf.shape[0] == 1:
        return part.unsqueeze(0)
    return part.reshape(leaf.movedim(batch_dim, 0).shape).movedim(0, batch_dim)
