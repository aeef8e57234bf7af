"""The memory of traces: deferred, step by step, or carried as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.traces.rules import LayerWindow, Term

EMBEDDING = "embedding.weight"
"""Name of the embedding's table among the parameters."""

Scale = Tensor | float | None
"""Loss scale; None: 1."""

MOST_BY_PRODUCT = 512
"""Up to so many symbols a GPU sums by symbol in a product; otherwise it adds rows one by one."""


class Plan:
    """Plan of the sums: which parameters have terms, and whether these cover all their rows.

    Args:
      parameters: by name.
      terms: all that will be added.
    """

    def __init__(self, parameters: Mapping[str, Tensor], terms: Iterable[Term]) -> None:
        spans: dict[str, set[tuple[int, int]]] = {}
        for term in terms:
            spans.setdefault(term.parameter, set()).add(_rows(term, parameters[term.parameter]))
        self.full = {
            name: sum(behind - first for first, behind in each) == len(parameters[name])
            for name, each in spans.items()
        }
        self.zeroed = {
            (name, first) for name, full in self.full.items() if not full for first, _ in spans[name]
        }


class Gradients:
    """Sums the contributions of terms to `.grad`.

    Args:
      parameters: by name; frozen ones get no gradient.
      plan: plan for these parameters and all terms that are added.
      embedding: that of the symbols that are input 0 of the first layer, with its table among the parameters;
        None if inputs are vectors.
      factor: factor on everything (a loss scale); None: 1.
      sorts: sum by symbol before all products, which is cheaper if symbols are fewer than rows and steps.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        plan: Plan,
        embedding: nn.Embedding | None,
        factor: Scale,
        sorts: bool,
    ) -> None:
        self.parameters, self.embedding, self.factor, self.sorts = parameters, embedding, factor, sorts
        self.table = None if embedding is None else parameters[EMBEDDING]
        self.sums = {
            name: torch.empty_like(parameters[name]) if full else torch.zeros_like(parameters[name])
            for name, full in plan.full.items()
            if parameters[name].requires_grad
        }
        self.by_symbol: dict[str, Tensor] = {}
        self.of_table: Tensor | None = None
        self._touched = set(plan.zeroed)

    def matrix(self, term: Term, left: Tensor, right: Tensor) -> None:
        """∂/∂W += leftᵀ right; left (N, rows of W), right (N, columns of W)."""
        if term.parameter not in self.sums:
            return
        out, first = self._place(term)
        if first:
            torch.mm(left.t(), right, out=out)
        else:
            out.addmm_(left.t(), right)

    def add(self, term: Term, values: Tensor) -> None:
        """∂/∂w += values, of the shape of those rows of w."""
        if term.parameter not in self.sums:
            return
        out, first = self._place(term)
        if first:
            out.copy_(values)
        else:
            out.add_(values)

    def _place(self, term: Term) -> tuple[Tensor, bool]:
        """The rows of the sum, and whether nothing was written there."""
        out = self.sums[term.parameter]
        first, behind = _rows(term, out)
        new = (term.parameter, first) not in self._touched
        self._touched.add((term.parameter, first))
        return out if term.rows is None else out[first:behind], new

    def terms(self, terms: Sequence[Term], delta: Tensor, inputs: Sequence[Tensor], bottom: bool) -> None:
        """Add terms of delta (N, C), gradients at the pre-activations, and inputs (N, I) or symbols (N,)."""
        by_symbol = None
        if bottom and self.sorts and self.table is not None:
            by_symbol = _sum_by(inputs[0], delta, len(self.table))
        sums = (delta if by_symbol is None else by_symbol).sum(0)
        for term in terms:
            if term.input is None:
                self.add(term, _part(sums[slice(*term.columns)], term))
                continue
            whole = term.columns == (0, delta.shape[1])
            if bottom and term.input == 0 and by_symbol is not None:
                self.symbols(term, _part(by_symbol[:, slice(*term.columns)], term))
                continue
            here = _part(delta if whole else delta[:, slice(*term.columns)], term)
            if not (bottom and term.input == 0 and self.table is not None):
                self.matrix(term, here, inputs[term.input])
            else:
                self.matrix(term, here, F.embedding(inputs[0], self.table))
                if self.table.requires_grad:
                    weight = self.parameters[term.parameter]
                    onward = here @ weight[slice(*_rows(term, weight))]
                    self._onward(_sum_by(inputs[0], onward, len(self.table)))

    def symbols(self, term: Term, summed: Tensor) -> None:
        """From delta summed by symbol (V, C): ∂/∂W = deltaᵀ table, ∂/∂table = delta W, both in `in_order`."""
        weight = self.parameters[term.parameter]
        if term.parameter not in self.by_symbol:
            self.by_symbol[term.parameter] = summed.new_zeros(len(summed), len(weight))
        self.by_symbol[term.parameter][:, slice(*_rows(term, weight))] += summed

    def _onward(self, gradient: Tensor) -> None:
        self.of_table = gradient if self.of_table is None else self.of_table.add_(gradient)

    def in_order(self) -> list[Tensor | None]:
        """The sums in the order of `parameters`; None for one without a gradient."""
        for name, summed in self.by_symbol.items():
            assert self.table is not None
            if name in self.sums:
                torch.mm(summed.t(), self.table, out=self.sums[name])
            if self.table.requires_grad:
                self._onward(summed @ self.parameters[name])
        of_table = self.of_table
        if of_table is not None and self.embedding is not None and self.embedding.padding_idx is not None:
            of_table[self.embedding.padding_idx] = 0.0
        if self.factor is not None:
            for gradient in (*self.sums.values(), *([] if of_table is None else [of_table])):
                gradient.mul_(self.factor)
        return [of_table if name == EMBEDDING else self.sums.get(name) for name in self.parameters]


def _rows(term: Term, parameter: Tensor) -> tuple[int, int]:
    return (0, len(parameter)) if term.rows is None else term.rows


def _part(values: Tensor, term: Term) -> Tensor:
    if not values.is_complex():
        return values
    return values.real if term.part == "real" else values.imag


def _sum_by(symbols: Tensor, values: Tensor, count: int) -> Tensor:
    """(count, F): the rows of values (N, F) summed by symbol (N,)."""
    if values.is_complex():
        parts = torch.view_as_real(values.resolve_conj()).flatten(-2)
        return torch.view_as_complex(_sum_by(symbols, parts, count).unflatten(-1, (-1, 2)))
    if values.is_cuda and count <= MOST_BY_PRODUCT:
        return (symbols == torch.arange(count, device=symbols.device).unsqueeze(-1)).to(values.dtype) @ values
    return torch.ops.aten.embedding_dense_backward(values.contiguous(), symbols, count, -1, False)


def _wide(values: Tensor, groups: int) -> Tensor:
    """(..., D) -> (..., groups·D), repeated."""
    return values if groups == 1 else values.repeat(*[1] * (values.dim() - 1), groups)


def _within(path: Tensor, decay: float, out: Tensor) -> Tensor:
    """out_t = decayᵀ⁻ᵗ⁻¹ · path_{t+1} ⋯ path_{T−1}, from step t to the end. Returns that from the start."""
    steps = len(path)
    out[-1] = 1.0
    if steps > 16:
        scaled = path if decay == 1.0 else path * decay
        out[:-1] = scaled.flip(0).cumprod(0)[:-1].flip(0)
        return out[0] * scaled[0]
    for t in range(steps - 1, 0, -1):
        torch.mul(out[t], path[t], out=out[t - 1])
        if decay != 1.0:
            out[t - 1].mul_(decay)
    total = out[0] * path[0]
    return total if decay == 1.0 else total.mul_(decay)


def _to_end(window: LayerWindow, decay: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A·(path from its step to the window's end), (T, B, C), conjugate where complex, and the whole path."""
    factors = window.factors.conj() if window.factors.is_complex() else window.factors
    if window.total is not None:
        return factors if out is None else out.copy_(factors), window.total
    path = window.path.conj().resolve_conj() if window.path.is_complex() else window.path
    within = torch.empty_like(path)
    total = _within(path, decay, within)
    out = torch.empty_like(factors).resolve_conj() if out is None else out
    torch.mul(_grouped(factors, within), within.unsqueeze(-2), out=_grouped(out, within))
    return out, total


def _grouped(values: Tensor, like: Tensor) -> Tensor:
    """(..., groups·D) -> (..., groups, D)."""
    cells = like.shape[-1]
    return values.unflatten(-1, (values.shape[-1] // cells, cells))


def _loaded(mine: Tensor, kept: Tensor) -> Tensor:
    """Copy in place if the shapes are equal."""
    return mine.copy_(kept) if mine.shape == kept.shape else kept.to(mine.device).clone()


class Deferred:
    """A trace whose steps wait for later residuals, and then enter one product each.

    Keeps the last `count` windows. With r the residual at a boundary, for each of them

        ρ += path · r,     path *= (path through the window that followed)

    and a window that has seen `count` boundaries leaves with (A·path within the window·ρ)ᵀ u, as in backprop;
    A·path within the window is what is stored. So the sum is that of the carried form, truncated to the
    boundaries within `count` windows of a step, and a correction comes up to `count` windows late. All
    tensors are changed in place and have static shapes.

    Args:
      count: number of windows kept.
      window: the layer's first window, for the shapes.
      decay: see `Traced`.
      on_device: keep the index of the oldest window on the device, for recorded updates.
    """

    def __init__(self, count: int, window: LayerWindow, decay: float, on_device: bool) -> None:
        _, rows, cells = window.path.shape
        self.count, self.decay, self.cells = count, decay, cells
        state = window.path
        self.path, self.rho = (state.new_zeros(count, rows, cells) for _ in range(2))
        self.factors = window.factors.new_zeros(count, *window.factors.shape)
        self.inputs = [u.new_zeros(count, *u.shape) for u in window.inputs]
        self.slot = 0
        # A recording would fix a Python number; a tensor on the device can change.
        self.index = torch.zeros(1, dtype=torch.long, device=state.device) if on_device else None

    def correct(self, residual: Tensor, gradients: Gradients, terms: Sequence[Term], bottom: bool) -> None:
        """Apply the residual (B, D) at the boundary after the newest window. The oldest window leaves."""
        self.rho.addcmul_(self.path, residual)
        self._leave(gradients, terms, bottom)

    def _leave(self, gradients: Gradients, terms: Sequence[Term], bottom: bool) -> None:
        factors, rho = self._take(self.factors), self._take(self.rho)
        delta = _grouped(factors, rho) * rho.unsqueeze(-2)
        inputs = [self._take(u).flatten(0, 1) for u in self.inputs]
        gradients.terms(terms, delta.view(-1, factors.shape[-1]), inputs, bottom)

    def push(self, window: LayerWindow) -> None:
        """The newest window takes the oldest one's place."""
        steps = len(window.path)
        if steps > self.factors.shape[1]:
            self._grow(steps)
        if self.index is None:
            _, total = _to_end(window, self.decay, self.factors[self.slot, :steps])
            self.factors[self.slot, steps:].zero_()
            for kept, u in zip(self.inputs, window.inputs, strict=True):
                kept[self.slot, :steps].copy_(u)
            self.path.mul_(total)
            self.path[self.slot].fill_(1.0)
            self.rho[self.slot].zero_()
            self.slot = (self.slot + 1) % self.count
            return
        factors, total = _to_end(window, self.decay)
        self.path.mul_(total)
        for kept, new in zip((self.factors, *self.inputs), (factors, *window.inputs), strict=True):
            missing = kept.shape[1] - steps
            if missing:
                new = torch.cat([new, new.new_zeros(missing, *new.shape[1:])])
            kept.index_copy_(0, self.index, new.resolve_conj().unsqueeze(0))
        self.path.index_fill_(0, self.index, 1.0)
        self.rho.index_fill_(0, self.index, 0.0)
        self.index.add_(1).remainder_(self.count)

    def _take(self, kept: Tensor) -> Tensor:
        return kept[self.slot] if self.index is None else kept.index_select(0, self.index).squeeze(0)

    def _grow(self, steps: int) -> None:
        def longer(kept: Tensor) -> Tensor:
            more = kept.new_zeros(kept.shape[0], steps - kept.shape[1], *kept.shape[2:])
            return torch.cat([kept, more], 1)

        self.factors = longer(self.factors)
        self.inputs = [longer(u) for u in self.inputs]

    def end(self, done: Tensor | None) -> None:
        """Rows of `done` (B,), or all, get no further residuals."""
        if done is None:
            self.path.zero_()
        else:
            self.path.masked_fill_(done.unsqueeze(-1), 0.0)

    def flush(self, gradients: Gradients, terms: Sequence[Term], bottom: bool) -> None:
        """All windows leave now. Later residuals are still gathered."""
        for _ in range(self.count):
            self._leave(gradients, terms, bottom)
            self.slot = (self.slot + 1) % self.count
            if self.index is not None:
                self.index.add_(1).remainder_(self.count)
        self.rho.zero_()

    def tensors(self) -> list[Tensor]:
        """All of it, rows along dimension −2, the oldest window first."""
        first = self.slot if self.index is None else int(self.index)
        kept = [self.path, self.rho, self.factors, *self.inputs]
        ordered = [tensor.roll(-first, 0) for tensor in kept]
        return [
            tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.unsqueeze(-1)
            for tensor in ordered
        ]

    def load(self, tensors: Sequence[Tensor]) -> None:
        symbols = [not (t.is_floating_point() or t.is_complex()) for t in tensors]
        kept = [t.squeeze(-1).clone() if s else t.clone() for t, s in zip(tensors, symbols, strict=True)]
        if len(kept) == 4 + len(self.inputs):  # earlier files store the path within a window separately
            within = kept.pop(2)
            kept[2] = (_grouped(kept[2], within) * within.unsqueeze(-2)).flatten(-2)
        mine = [self.path, self.rho, self.factors, *self.inputs]
        new = [_loaded(a, b) for a, b in zip(mine, kept, strict=True)]
        self.path, self.rho, self.factors, *self.inputs = new
        self.count, self.slot = len(self.path), 0  # the first window of this object may have been short
        if self.index is not None:
            self.index.zero_()


class Carried:
    """The trace E itself, one matrix for each row and parameter:

        E  ←  (path through the window) · E + Σ_t (path from t to its end · A_t) ⊗ u_t
        gradient = Σ_rows r · E

    Any horizon, nothing late, memory rows × (size of the parameters). With an embedding u_t is the symbol.
    """

    def __init__(self, window: LayerWindow, terms: Sequence[Term], decay: float, symbols: int | None) -> None:
        self.decay, self.cells = decay, window.path.shape[-1]
        self.symbols = symbols
        rows = window.path.shape[1]
        self.traces: dict[tuple[tuple[int, int], int | None], Tensor] = {}
        for term in terms:
            width: list[int] = []
            if term.input is not None:
                vectors = symbols is None or term.input != 0
                width = [window.inputs[term.input].shape[-1] if vectors else int(symbols or 0)]
            columns = term.columns[1] - term.columns[0]
            self.traces[term.columns, term.input] = window.factors.new_zeros(rows, columns, *width)

    def correct(self, residual: Tensor, gradients: Gradients, terms: Sequence[Term], bottom: bool) -> None:
        summed: dict[tuple[tuple[int, int], int | None], Tensor] = {}
        for key, trace in self.traces.items():
            wide = _wide(residual, trace.shape[1] // self.cells)
            summed[key] = torch.einsum("bc...,bc->c...", trace, wide)
        for term in terms:
            gradient = _part(summed[term.columns, term.input], term)
            if term.input == 0 and self.symbols is not None:
                gradients.symbols(term, gradient.t())
            else:
                gradients.add(term, gradient)

    def push(self, window: LayerWindow) -> None:
        factors, total = _to_end(window, self.decay)
        for (columns, number), trace in self.traces.items():
            wide = _wide(total, trace.shape[1] // self.cells)
            local = factors[..., slice(*columns)]
            if number is None:
                trace.mul_(wide).add_(local.sum(0))
                continue
            u = window.inputs[number]
            if number == 0 and self.symbols is not None:
                u = u.unsqueeze(-1) == torch.arange(self.symbols, device=u.device)  # one_hot synchronises
            trace.mul_(wide.unsqueeze(-1)).add_(torch.einsum("tbc,tbi->bci", local, u.to(local.dtype)))

    def end(self, done: Tensor | None) -> None:
        for trace in self.traces.values():
            if done is None:
                trace.zero_()
            else:
                trace.masked_fill_(done.reshape(-1, *[1] * (trace.dim() - 1)), 0.0)

    def flush(self, gradients: Gradients, terms: Sequence[Term], bottom: bool) -> None:
        """Nothing is pending: every part is zero."""
        zero = next(iter(self.traces.values()))
        self.correct(zero.new_zeros(zero.shape[0], self.cells), gradients, terms, bottom)

    def tensors(self) -> list[Tensor]:
        return [t.transpose(0, 1).clone() if t.dim() == 3 else t.clone() for t in self.traces.values()]

    def load(self, tensors: Sequence[Tensor]) -> None:
        for key, kept in zip(list(self.traces), tensors, strict=True):
            self.traces[key] = _loaded(self.traces[key], kept.transpose(0, 1) if kept.dim() == 3 else kept)
