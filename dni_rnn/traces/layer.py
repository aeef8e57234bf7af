"""The trace of one layer: its memory, and how the leaves of the state depend on the traced state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dni_rnn.traces.memory import Carried, Deferred, Gradients
from dni_rnn.traces.rules import LayerWindow, Read, Record


class Layer:
    """The trace of one layer, with what is needed from the end of the last window.

    Args:
      record, window: those of the layer's first window, for the shapes.
      number: number of the layer, from the bottom.
      steps, decay: see `Traced`.
      symbols: V if input 0 of the bottom layer is symbols, else None.
      on_device: see `Deferred`; unused in the carried form.
    """

    def __init__(
        self,
        record: Record,
        window: LayerWindow,
        number: int,
        steps: int | None,
        decay: float,
        symbols: int | None,
        on_device: bool,
    ) -> None:
        self.bottom = number == 0
        self.terms, self.instant_terms = record.terms, record.instant_terms
        self.memory: Deferred | Carried
        if steps is None:
            self.memory = Carried(window, record.terms, decay, symbols if self.bottom else None)
        else:
            self.memory = Deferred(-(-steps // len(window.path)), window, decay, on_device)
        # At the boundary after the last window. Buffers, since a recorded update needs fixed tensors.
        self.reads: list[Read] = [torch.zeros_like(r) if isinstance(r, Tensor) else r for r in window.reads]
        self.instant = [None if a is None else torch.zeros_like(a) for a in window.instant]
        self.last = [u.new_zeros(u.shape[1:]) for u in window.inputs] if self.instant else []

    def correct(self, residuals: Sequence[Tensor], gradients: Gradients) -> None:
        """Add the product of the trace and `residuals`, g − ĝ of each leaf, (B, D), to the sums."""
        if len(residuals) != len(self.reads):
            raise ValueError(f"the state has {len(residuals)} leaves, the trace reads {len(self.reads)}")
        total: Tensor | None = None
        for residual, read in zip(residuals, self.reads, strict=True):
            if read is None:
                continue
            if isinstance(read, Tensor) or read != 1.0:
                residual = residual * read
            total = residual if total is None else total + residual
        if total is None:
            raise ValueError("no leaf of the state reads what is traced")
        self.memory.correct(total, gradients, self.terms, self.bottom)
        for residual, factor in zip(residuals, self.instant, strict=False):
            if factor is None:
                continue
            groups = factor.shape[-1] // residual.shape[-1]
            wide = residual if groups == 1 else residual.repeat(1, groups)
            gradients.terms(self.instant_terms, wide * factor, self.last, self.bottom)

    def push(self, window: LayerWindow) -> None:
        self.memory.push(window)
        mine, new = (*self.reads, *self.instant), (*window.reads, *window.instant)
        pairs = [(a, b) for a, b in zip(mine, new, strict=True) if isinstance(a, Tensor)]
        pairs += [(kept, u[-1]) for kept, u in zip(self.last, window.inputs, strict=False)]
        for floating in (True, False):  # one launch each on a GPU
            alike = [(a, b) for a, b in pairs if a.is_floating_point() is floating]
            if alike:
                torch._foreach_copy_([a for a, _ in alike], [b for _, b in alike])  # type: ignore[arg-type]

    def end(self, done: Tensor | None) -> None:
        self.memory.end(done)
        for factor in self.instant:
            if factor is not None and done is None:
                factor.zero_()
            elif factor is not None and done is not None:
                factor.masked_fill_(done.unsqueeze(-1), 0.0)

    def flush(self, gradients: Gradients) -> None:
        self.memory.flush(gradients, self.terms, self.bottom)

    def _kept(self) -> list[Tensor]:
        return [t for t in (*self.reads, *self.instant, *self.last) if isinstance(t, Tensor)]

    def tensors(self) -> list[Tensor]:
        kept = [t.unsqueeze(-1).clone() if t.dim() == 1 else t.clone() for t in self._kept()]
        return [*kept, *self.memory.tensors()]

    def load(self, tensors: Sequence[Tensor]) -> None:
        kept = self._kept()
        for mine, theirs in zip(kept, tensors, strict=False):
            mine.copy_(theirs.reshape(mine.shape))
        self.memory.load([t.to(kept[0].device) if kept else t for t in tensors[len(kept) :]])
