"""The other half of the gradient that truncation cuts off: traces of what the past did to the state."""

from dni_rnn.traces.rules import Record, Term, Traceable, Window
from dni_rnn.traces.running import why_not_traced
from dni_rnn.traces.traced import Traced

__all__ = ["Record", "Term", "Traceable", "Traced", "Window", "why_not_traced"]
