"""The origin of the state at the start of a traced window, and the ĝ that was sent into it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dni_rnn.interface import RECEIVED_BY, Interface
from dni_rnn.penalty import StatePenalty

ENDS = "_ends_a_traced_window"
"""Attribute that marks the end state of a traced window."""


def received_by(leaves: list[Tensor], given: Interface | None) -> Interface | None:
    """The interface that a state was received from.

    Args:
      given: the expected one; the state may then have been changed since.

    Raises:
      ValueError: it was changed since, or comes from several interfaces, or from another than the given one.
    """
    found = None
    owners = [getattr(leaf.grad_fn, "interface", None) or getattr(leaf, RECEIVED_BY, None) for leaf in leaves]
    for leaf, own in zip(leaves, owners, strict=True):
        if given is not None:
            if own is not None and own is not given:
                raise ValueError("the state was received by another interface than the one given to Traced")
        elif own is not None and not leaf._version:
            found = own
        elif own is not None or (not hasattr(leaf, ENDS) and _hides_interface(leaf.grad_fn)):
            raise ValueError(
                "the state was changed after Interface.receive, so what was sent into it is not known: "
                "change it before, or give Traced the interface (or detach it, if it was not received)"
            )
    if found is not None and any(own is not found for own in owners):
        raise ValueError("a traced state is received as a whole, by one interface: receive((h, c))")
    return found if given is None else given


def sent_since(interface: Interface, heard: tuple[list[Tensor] | None] | None) -> list[Tensor] | None:
    """What an interface has sent at this boundary; None: nothing.

    Args:
      heard: its `sent` when the last window began; None: not known.

    Raises:
      ValueError: it has sent more than once since.
    """
    if heard is None:
        return interface.sent
    if interface.sent is heard[0]:
        return None
    if interface.sent_before is not heard[0]:
        raise ValueError(
            "what the interface has sent is not of this core's last window alone: an interface serves "
            "one traced core, with one send a window (another interface from here on: reset() first)"
        )
    return interface.sent


def measured(leaf: Tensor) -> bool:
    """Whether a penalty measures the gradient at this state."""
    return isinstance(getattr(leaf.grad_fn, "penalty", None), StatePenalty)


def _hides_interface(node: Any, most: int = 32) -> bool:
    """Whether a few operations lie between a state and `Interface.receive`."""
    waiting, seen = [] if node is None else [node], 0
    while waiting and seen < most:
        node, seen = waiting.pop(0), seen + 1
        if hasattr(node, "traced"):
            continue  # the last window, not this one
        if isinstance(getattr(node, "interface", None), Interface) and not node.passes_on:
            return True
        waiting.extend(before for before, _ in node.next_functions if before is not None)
    return False
