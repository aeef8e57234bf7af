"""Checks of what enters an interface, a trace or a penalty, by shapes and types alone.

They read no value, so they never wait for a device and leave nothing in a compiled or recorded graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dni_rnn.pytree import (
    Spec,
    Tree,
    batch_dims,
    dims_of,
    flatten,
    has_rows,
    side_by_side,
    unflatten_rows,
    width,
)

Done = Any
"""Which rows end: (B,) or (B, 1), a tensor, array or list of booleans or numbers (not 0 is done); or None."""


class Layout:
    """The batch dimensions of a message, and its conversion to rows and back.

    Args:
      batch_dim: see `dni_rnn.interface.Interface`; None: the last dimension but one of up to three.
    """

    def __init__(self, batch_dim: int | Tree | None) -> None:
        self.said = batch_dim is not None
        self.dims = -2 if batch_dim is None else batch_dims(batch_dim)

    def enter(
        self, message: Tree, done: Done = None, device: torch.device | None = None
    ) -> tuple[list[Tensor], Spec, Tensor | None]:
        """A message's tensors with rows, its spec, and its `done`, (B,); all checked.

        Args:
          device: the device where it must be; None: any.

        Raises:
          ValueError: see `Interface`.
        """
        leaves, spec = flatten(message, has_rows)
        if not leaves:
            return leaves, spec, None
        rows, here = self.count(leaves), leaves[0].device
        if device is not None and here != device:
            raise ValueError(f"the message is on {here}, its interface on {device}")
        return leaves, spec, done_rows(done, rows, here)

    def count(self, leaves: Sequence[Tensor]) -> int:
        """B, the number of rows of the tensors of a message, at least one tensor."""
        dims = dims_of(leaves, self.dims)
        device, rows, most = leaves[0].device, -1, 9 if self.said else 3
        for leaf, dim in zip(leaves, dims, strict=True):
            shape = leaf.shape
            dimensions = len(shape)
            if (
                dimensions > most
                or not -dimensions <= dim < dimensions
                or (rows >= 0 and rows != shape[dim])
                or leaf.is_complex()
                or leaf.device != device
                or leaf.layout is not torch.strided
            ):
                raise ValueError(self._why_refused(leaf, dim, leaves, dims))
            rows = shape[dim]
        return rows

    def sizes(self, leaves: Sequence[Tensor]) -> tuple[int, int]:
        """(B, features) of the tensors of a checked message."""
        dims = dims_of(leaves, self.dims)
        rows = leaves[0].shape[dims[0]]
        return rows, sum([leaf.numel() for leaf in leaves]) // rows if rows else sum(map(width, leaves, dims))

    def _why_refused(self, leaf: Tensor, dim: int, leaves: Sequence[Tensor], dims: Sequence[int]) -> str:
        shape = tuple(leaf.shape)
        if leaf.is_complex():
            return "a message has real numbers: for a complex tensor pass torch.view_as_real"
        if leaf.layout is not torch.strided:
            return f"a message has dense tensors, not {leaf.layout}"
        if leaf.device != leaves[0].device:
            return f"a message lies on one device, not on {leaves[0].device} and {leaf.device}"
        if not self.said and len(shape) > 3:
            return (
                f"say where the rows of a message {shape} lie: batch_dim=0 for feature maps "
                "(B, C, height, width), -2 for states (..., B, H)"
            )
        if not -len(shape) <= dim < len(shape):
            return f"batch_dim {dim} is no dimension of a message {shape}"
        shapes = ", ".join(
            f"{leaf.shape[dim]} in {tuple(leaf.shape)}" for leaf, dim in zip(leaves, dims, strict=True)
        )
        return (
            f"the tensors of a message must have the same number of rows, not {shapes} (dimensions "
            f"{list(dims)}): batch_dim gives their dimension, as one number or as a tree like the message"
        )

    def rows(self, leaves: Sequence[Tensor]) -> Tensor:
        """The tensors concatenated along features, (B, features)."""
        return side_by_side(leaves, self.dims)

    def like(self, rows: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The inverse: tensors of the shapes of `leaves`."""
        return unflatten_rows(rows, leaves, self.dims)


def done_rows(done: Done, rows: int, device: torch.device) -> Tensor | None:
    """`done` as a boolean tensor (B,) on `device`; None stays None.

    Raises:
      ValueError: it is not (B,) or (B, 1).
    """
    if done is None:
        return None
    known = type(done) is Tensor and done.dtype is torch.bool and done.layout is torch.strided
    if known and done.shape == (rows,) and done.device == device:
        return done
    if not isinstance(done, Tensor):
        try:
            # An array may be a reversed view or hold objects, which torch does not accept.
            done = torch.as_tensor(done.tolist() if hasattr(done, "tolist") else done)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"done must be {rows} booleans, one a row, or None; it is a {type(done).__name__}"
            ) from None
    if done.layout is not torch.strided:
        raise ValueError(f"done must be a dense tensor, not {done.layout}")
    if done.dim() == 2 and done.shape[1] == 1:
        done = done.squeeze(1)
    if done.shape != (rows,):
        raise ValueError(
            f"done must be (B,) or (B, 1), one truth value for each of the {rows} rows, "
            f"not {tuple(done.shape)}"
        )
    return done.to(torch.bool).to(device)


def alike(parts: Sequence[Tensor], leaves: Sequence[Tensor], what: str) -> None:
    """Raises ValueError if tensors do not have the shapes of a message."""
    if [part.shape for part in parts] != [leaf.shape for leaf in leaves]:
        got, wanted = [tuple(part.shape) for part in parts], [tuple(leaf.shape) for leaf in leaves]
        raise ValueError(f"{what} must be tensors like the message, {wanted}, not {got}")


def coming(tokens: Any, window: int, batch_first: bool, device: torch.device) -> Tensor:
    """The next symbols as (W, B), padded with -1 (unknown) at the end of a text.

    Args:
      tokens: integers, (w, B) with w ≤ W, or (B, w) with `batch_first`; if W is 1, also (B,) and (B, 1).
      window: W.
      device: the device where they must be.

    Raises:
      ValueError: they are anything else. If W = B, sizes cannot tell (W, B) from (B, W).
    """
    wanted = f"({window}, B)" if not batch_first else f"(B, {window})"
    if window == 1:
        wanted = "(B,)"
    if not isinstance(tokens, Tensor):
        raise ValueError(f"the context must be a tensor of integers {wanted}, not a {type(tokens).__name__}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"the context must be integers {wanted}, not {tokens.dtype}")
    if tokens.device != device:
        raise ValueError(f"the context is on {tokens.device}, its encoder on {device}")
    known = None
    if window == 1 and tokens.dim() == 1:
        known = tokens.unsqueeze(0)
    elif window == 1 and tokens.dim() == 2 and 1 in tokens.shape and tokens.numel():
        known = tokens.reshape(1, -1)
    elif tokens.dim() == 2:
        known = tokens.t() if batch_first else tokens
    if known is not None and known.shape[0] <= window:
        known = known.long()
        missing = window - known.shape[0]
        return torch.cat([known, known.new_full((missing, known.shape[1]), -1)]) if missing else known
    turned = tokens.dim() == 2 and not batch_first and 1 < tokens.shape[1] <= window
    other = "; if rows come first, give batch_first=True" if turned else ""
    raise ValueError(f"the context must be integers {wanted}, not {tuple(tokens.shape)}{other}")


torch.serialization.add_safe_globals([Layout])
