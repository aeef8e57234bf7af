"""Truncated backpropagation through time with synthetic gradients (decoupled neural interfaces)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dni_rnn.estimators import DNI, Estimate, FullBPTT, TruncatedBPTT, Window
    from dni_rnn.feedforward import Decoupled, decouple
    from dni_rnn.interface import Critique, Interface
    from dni_rnn.pytree import LSTMState
    from dni_rnn.recurrent import Boundary, CoreOutput, RecurrentCore, SequenceModel
    from dni_rnn.synthesizers import (
        BackwardGRU,
        ContextMLP,
        Critic,
        EmbeddedTokens,
        MLPSynthesizer,
        NoSynthesizer,
        OneHotTokens,
        Rows,
    )

_PUBLIC = {
    "estimators": ("DNI", "Estimate", "FullBPTT", "TruncatedBPTT", "Window"),
    "feedforward": ("Decoupled", "decouple"),
    "interface": ("Critique", "Interface"),
    "recurrent": ("Boundary", "CoreOutput", "RecurrentCore", "SequenceModel"),
    "synthesizers": (
        "BackwardGRU",
        "ContextMLP",
        "Critic",
        "EmbeddedTokens",
        "MLPSynthesizer",
        "NoSynthesizer",
        "OneHotTokens",
        "Rows",
    ),
    "pytree": ("LSTMState",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [  # noqa: RUF022  (by module)
    "DNI",
    "Estimate",
    "FullBPTT",
    "TruncatedBPTT",
    "Window",
    "Decoupled",
    "decouple",
    "Critique",
    "Interface",
    "Boundary",
    "CoreOutput",
    "RecurrentCore",
    "SequenceModel",
    "BackwardGRU",
    "ContextMLP",
    "Critic",
    "EmbeddedTokens",
    "MLPSynthesizer",
    "NoSynthesizer",
    "OneHotTokens",
    "Rows",
    "LSTMState",
]


def __getattr__(name: str) -> Any:
    # Importing torch takes a second; `dni-rnn --help` imports this package and needs none of it.
    if name in _HOME:
        return getattr(import_module(f"dni_rnn.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dni_rnn' has no attribute {name!r}")
