"""Traces: how the state depends on parameters through past steps, the part that truncation cuts off."""

import warnings
from typing import Any

from dni_rnn.traces.rules import LayerWindow, Record, Term, Traceable
from dni_rnn.traces.running import why_not_traced
from dni_rnn.traces.traced import Traced

__all__ = ["LayerWindow", "Record", "Term", "Traceable", "Traced", "why_not_traced"]


def __getattr__(name: str) -> Any:
    if name != "Window":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "dni_rnn.traces.Window is called LayerWindow: import that", DeprecationWarning, stacklevel=2
    )
    return LayerWindow
