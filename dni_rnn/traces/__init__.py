"""Traces: how the state depends on parameters through past steps, the part that truncation cuts off."""

from dni_rnn.traces.rules import LayerWindow, Record, Term, Traceable
from dni_rnn.traces.running import why_not_traced
from dni_rnn.traces.traced import Traced

__all__ = ["LayerWindow", "Record", "Term", "Traceable", "Traced", "why_not_traced"]
