"""Learning beyond the truncation window: synthetic gradients (decoupled neural interfaces) and traces.

What is public stands in `__init__.pyi`, once: importing torch takes a second, and `dni-rnn --help`, which
imports this package, needs none of it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
