"""Messages: tensors, or nested tuples and dicts of tensors; and the only detach of the package."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
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


torch.serialization.add_safe_globals([LSTMState])  # or torch.load with weights_only refuses a saved state


LEAF = "leaf"
Spec = Any
"""The structure of a tree without its tensors, for `unflatten`."""


class Constant(NamedTuple):
    """A value in a tree that is not a leaf: part of the structure, restored unchanged."""

    value: Any


def has_rows(tensor: Tensor) -> bool:
    """Whether a tensor of a message has rows that get gradients: no integers, no scalars."""
    return tensor.dim() > 0 and (tensor.is_floating_point() or tensor.is_complex())


def flatten(tree: Tree, is_leaf: Callable[[Tensor], bool] | None = None) -> tuple[list[Tensor], Spec]:
    """The tensors of `tree` in a fixed order (dicts by sorted key), and the spec for `unflatten`.

    A tree is a tensor, or a tuple, named tuple, list, dict, dataclass, or a subclass of these, of trees. None
    and numbers are not leaves: `unflatten` restores them.

    Args:
      is_leaf: which tensors are leaves, for example `has_rows`; None: all. The others come back detached.

    Raises:
      TypeError: `tree` contains anything else.
    """
    leaves: list[Tensor] = []
    return leaves, _flatten(tree, leaves, is_leaf)


def _flatten(tree: Tree, leaves: list[Tensor], is_leaf: Callable[[Tensor], bool] | None) -> Spec:
    # Written out, because it runs a dozen times per window and torch's own is private and slow.
    if isinstance(tree, Tensor):
        if is_leaf is None or is_leaf(tree):
            leaves.append(tree)
            return LEAF
        return Constant(tree.detach() if tree.requires_grad else tree)
    if tree is None:
        return None
    if isinstance(tree, tuple | list):
        return _kind(tree), [_flatten(branch, leaves, is_leaf) for branch in tree]
    if isinstance(tree, dict):
        specs = {key: _flatten(tree[key], leaves, is_leaf) for key in _sorted(tree)}
        return _kind(tree), specs, list(tree)
    if isinstance(tree, bool | int | float | complex):
        return Constant(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in fields(tree)]
        specs = {name: _flatten(getattr(tree, name), leaves, is_leaf) for name in names}
        return Pattern(tree), specs, names
    raise TypeError(
        "a message is a tensor or a tuple, list, dict or dataclass of such; "
        f"found a {type(tree).__name__} in it"
    )


def _sorted(tree: dict[Any, Any]) -> list[Any]:
    try:
        return sorted(tree)
    except TypeError:  # keys of several types
        return sorted(tree, key=lambda key: (type(key).__name__, repr(key)))


class Pattern:
    """A container with more than its branches: a subclass, copied with its attributes."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def __repr__(self) -> str:
        return type(self.tree).__qualname__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and type(self.tree) is type(other.tree)

    def __hash__(self) -> int:
        return hash(type(self.tree))


def _kind(tree: Any) -> Any:
    """The type, if its branches alone can rebuild the container, else a `Pattern`."""
    kind = type(tree)
    plain = kind is tuple or kind is list or kind is dict or (hasattr(tree, "_fields") and not vars_of(tree))
    return kind if plain else Pattern(tree)


def vars_of(tree: Any) -> dict[str, Any]:
    """The instance attributes of a container, if any."""
    return getattr(tree, "__dict__", {})


def unflatten(leaves: Iterable[Tensor], spec: Spec) -> Tree:
    """The inverse of `flatten`."""
    return _unflatten(iter(leaves), spec)


def _unflatten(leaves: Iterator[Tensor], spec: Spec) -> Tree:
    if spec is LEAF:
        return next(leaves)
    if spec is None:
        return None
    if type(spec) is Constant:
        return spec.value
    kind, branches, *order = spec
    if order:
        values = {key: _unflatten(leaves, branch) for key, branch in branches.items()}
        if kind is dict:
            return {key: values[key] for key in order[0]}
        return _filled(kind.tree, values)
    values = [_unflatten(leaves, branch) for branch in branches]
    if isinstance(kind, Pattern):
        return _refilled(kind.tree, values)
    return kind._make(values) if hasattr(kind, "_fields") else kind(values)


def _filled(tree: Any, values: dict[Any, Any]) -> Any:
    """A copy of a dict or dataclass with these values; key order is kept."""
    new = copy.copy(tree)
    for key, value in values.items():
        if isinstance(tree, dict):
            new[key] = value
        else:
            object.__setattr__(new, key, value)  # a frozen one too
    return new


def _refilled(tree: Any, values: list[Any]) -> Any:
    """A copy of a list or tuple with these values."""
    kind = type(tree)
    if isinstance(tree, list):
        new = copy.copy(tree)
        new[:] = values
        return new
    if hasattr(tree, "n_sequence_fields"):  # built into torch or Python
        return kind(values)
    new = tuple.__new__(kind, values)  # its constructor may take other arguments
    vars_of(new).update(vars_of(tree))
    return new


def part(tree: Tree, key: str | int | None) -> Tree:
    """A part of a tree: the field of a named tuple, the key of a dict, the index of a tuple; None: all."""
    if key is None:
        return tree
    return tree[key] if isinstance(key, int) or isinstance(tree, dict) else getattr(tree, key)


def map_tree(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """Apply `function` to every tensor of `tree`."""
    leaves, spec = flatten(tree)
    return unflatten([function(leaf) for leaf in leaves], spec)


def detach(tree: Tree) -> Tree:
    """Cut the graph: same values, no history. For a state that is kept after it was sent."""
    return map_tree(torch.Tensor.detach, tree)


BatchDim = int | Sequence[int]
"""The batch dimension: one for all leaves, or one per leaf."""


def batch_dims(batch_dim: int | Tree) -> BatchDim:
    """`batch_dim` as the functions below take it: a number, or a tree of numbers in the shape of a message.

    Raises:
      TypeError: it is anything else.
    """
    if hasattr(batch_dim, "__index__") and not isinstance(batch_dim, bool | Tensor):
        return operator.index(batch_dim)
    found: list[int] = []

    def collect(spec: Spec) -> None:
        if isinstance(spec, Constant) and type(spec.value) is int:
            found.append(spec.value)
        elif isinstance(spec, tuple) and not isinstance(spec, Constant):
            for branch in spec[1].values() if isinstance(spec[1], dict) else spec[1]:
                collect(branch)
        elif spec is not None:
            raise TypeError(f"batch_dim is a number, or a tree of such like the message, not {batch_dim!r}")

    collect(flatten(batch_dim)[1])
    return found


def dims_of(leaves: Sequence[Tensor], batch_dim: BatchDim) -> Sequence[int]:
    """The batch dimension of each leaf. A number applies to all leaves but those of shape (B,).

    Raises:
      ValueError: `batch_dim` is for another number of leaves.
    """
    if isinstance(batch_dim, int):
        return [batch_dim if leaf.dim() > 1 else 0 for leaf in leaves]
    if len(batch_dim) != len(leaves):
        raise ValueError(f"batch_dim is for {len(batch_dim)} tensors, but {len(leaves)} tensors have rows")
    return batch_dim


def per_row(values: Tensor, leaf: Tensor, batch_dim: int) -> Tensor:
    """Shape `values` (B,) so that it broadcasts along dimension `batch_dim` of `leaf`."""
    shape = [1] * leaf.dim()
    shape[batch_dim] = leaf.shape[batch_dim]
    return values.reshape(shape)


def where_rows(rows: Tensor, chosen: Tree, other: Tree, batch_dim: int = -2) -> Tree:
    """Row by row: `chosen` where the boolean `rows` (B,) holds, `other` elsewhere.

    Tensors of integers have rows too, such as counters, where their dimension `batch_dim` has B of them. What
    has none is that of `other`.
    """
    leaves, _ = flatten(chosen)
    others, spec = flatten(other)

    def mixed(leaf: Tensor, other: Tensor, dim: int) -> Tensor:
        counted = has_rows(leaf) or (leaf.dim() > 0 and leaf.shape[dim] == len(rows))
        return torch.where(per_row(rows, leaf, dim), leaf, other) if counted else other

    return unflatten(map(mixed, leaves, others, dims_of(leaves, batch_dim)), spec)


def flatten_rows(tree: Tree, batch_dim: BatchDim = -2) -> Tensor:
    """All tensors of `tree` that have rows, concatenated along features: (B, features)."""
    return side_by_side(flatten(tree, has_rows)[0], batch_dim)


def side_by_side(leaves: Sequence[Tensor], batch_dim: BatchDim = -2) -> Tensor:
    """`flatten_rows` of tensors that all have rows.

    Raises:
      ValueError: there are none.
    """
    if not leaves:
        raise ValueError("nothing here has rows: give a tensor of real numbers, or a tree with one in it")
    if isinstance(batch_dim, int):
        rows = [_row_first(leaf, batch_dim) for leaf in leaves]
    else:
        rows = [_row_first(leaf, dim) for leaf, dim in zip(leaves, dims_of(leaves, batch_dim), strict=True)]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _row_first(leaf: Tensor, batch_dim: int) -> Tensor:
    # Fast paths for a state of one layer, and for what already is (B, features).
    dimensions = leaf.dim()
    if dimensions == 3 and batch_dim == -2 and leaf.shape[0] == 1:
        return leaf.squeeze(0)
    if dimensions == 2 and batch_dim in (0, -2):
        return leaf
    if dimensions == 1:
        return leaf.unsqueeze(1)
    return leaf.movedim(batch_dim, 0).flatten(1)


def unflatten_rows(rows: Tensor, leaves: Sequence[Tensor], batch_dim: BatchDim = -2) -> list[Tensor]:
    """The inverse of `flatten_rows`: tensors of the shapes of `leaves`."""
    dims = dims_of(leaves, batch_dim)
    if len(leaves) == 1:
        return [_row_back(rows, leaves[0], dims[0])]
    count = rows.shape[0]
    widths = [leaf.numel() // count for leaf in leaves] if count else list(map(width, leaves, dims))
    parts = rows.split(widths, dim=1)
    return list(map(_row_back, parts, leaves, dims))


def width(leaf: Tensor, batch_dim: int) -> int:
    """Features per row, also where there are no rows."""
    rows = leaf.shape[batch_dim]
    return leaf.numel() // rows if rows else leaf.movedim(batch_dim, 0).shape[1:].numel()


def _row_back(part: Tensor, leaf: Tensor, batch_dim: int) -> Tensor:
    if batch_dim == -2 and leaf.dim() == 3 and leaf.shape[0] == 1:
        return part.unsqueeze(0)
    return part.reshape(leaf.movedim(batch_dim, 0).shape).movedim(0, batch_dim)
