"""Local derivatives of a layer over one window: its path and its local factors.

A traced layer has a state s_t, (B, D), that carries its own past element by element:

    s_t = path_t · s_{t−1} + (what this step adds)
    ∂s_t/∂(pre-activation q of step t) = A_q,t              element-wise, the local factor of q
    ∂(pre-activation q)/∂W_q = u_t                          an input of the step: x_t, h_{t−1} or 1

so that a gradient r at s_K contributes to that of W_q the sum over rows and steps of

    (r · path_K ⋯ path_{t+1} · A_q,t) ⊗ u_t

If the true ∂s_t/∂s_{t−1} is not diagonal, `path` keeps only the cell's dependence on itself: its own path.
For an LSTM and a GRU that is the gate alone. Including the cell's own recurrent weight (SnAp-1) reduces the
error against full BPTT from 0.305 to 0.267 (LSTM) and from 0.234 to 0.220 (GRU) on small random nets at
T = 1, and from 0.366 to 0.365 on a trained LSTM of 128 units, so it is left out.

Sources: Bellec et al. 2020, Nature Communications 11 (e-prop: the path of an LSTM); Murray 2019, eLife 8
(RFLO); Menick et al. 2021, arXiv:2006.07232 (SnAp); Williams & Zipser 1989, Neural Computation 1 (RTRL).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.traces.lstm import StepwiseGates, WindowGates

Read = Tensor | complex | None


class Term(NamedTuple):
    """How columns of the local factors become the gradient of (some rows of) a parameter.

    Attributes:
      parameter: its name within the core, as in `named_parameters`.
      columns: columns of `LayerWindow.factors`, as (first, last + 1).
      input: which of `LayerWindow.inputs` it is multiplied with; None for a vector that is added (a bias).
      rows: rows of the parameter, as (first, last + 1); None: all.
      part: part of complex factors, "real" for a parameter w that enters as s += A·w, "imaginary" for
        s += A·i·w.
    """

    parameter: str
    columns: tuple[int, int]
    input: int | None = None
    rows: tuple[int, int] | None = None
    part: str = "real"


class LayerWindow(NamedTuple):
    """One layer's window of T steps, computed without gradient. D cells, all steps in order.

    Attributes:
      path: (T, B, D), ∂s_t/∂s_{t−1} of each cell along its own path; complex if s is.
      factors: (T, B, C), ∂s_t/∂(pre-activation), C a multiple of D: groups of D columns.
      inputs: the factors that multiply the parameters, each (T, B, I).
      reads: for each leaf of the state, in the order of `dni_rnn.pytree.flatten` (dicts by sorted key), how
        it depends on s after the last step: leaf = Re(conj(read)·s) to first order, (B, D) or a number; None
        if it does not. For a complex s in two leaves, real and imaginary: 1 and 1j.
      instant: for each leaf, (B, C'): ∂leaf/∂(pre-activation) of the last step for parameters that act on the
        leaf, not on s (the output gate of an LSTM); None if there are none. Empty: no leaf has any.
      total: (B, D), the path through the whole window, if `factors` already include the path from their step
        to the window's end, both with the trace's decay; then only the shape of `path` is used.
    """

    path: Tensor
    factors: Tensor
    inputs: tuple[Tensor, ...]
    reads: tuple[Read, ...]
    instant: tuple[Tensor | None, ...] = ()
    total: Tensor | None = None


class Record(NamedTuple):
    """Record of one layer and window, made by the forward pass.

    Attributes:
      terms: the gradients from `LayerWindow.factors`.
      window: called without gradient during backward, or, without a backward pass, at the next window, and
        once more for a copy that is made before. It must read the weights that the window ran with.
      instant_terms: the gradients from `LayerWindow.instant`.
    """

    terms: Sequence[Term]
    window: Callable[[], LayerWindow]
    instant_terms: Sequence[Term] = ()


@runtime_checkable
class Traceable(Protocol):
    """A core whose layers can be traced.

    `forward(inputs, state) -> (outputs, state)` may be anything; `run` returns the same two, and one
    `Record` for each layer, bottom first. A leaf of the state (layers, B, D) belongs layer by layer to the
    records, a leaf (B, D) to all. Parameters without terms get no trace, only the truncated gradient.
    """

    def initial_state(self, batch: int) -> Any: ...

    def run(self, inputs: Tensor, state: Any) -> tuple[Any, Any, list[Record]]: ...


def project(x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor | None) -> Tensor:
    """x Wᵀ + b for x (..., I). With `table` (V, I) x are symbols, and x Wᵀ is looked up if cheaper."""
    if table is None:
        return F.linear(x, weight, bias)
    if len(table) < x.numel():
        return F.embedding(x, F.linear(table, weight, bias))
    return F.linear(F.embedding(x, table), weight, bias)


def _add_product(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """out += x Wᵀ + b in place."""
    out.view(-1, out.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    return out if bias is None else out.add_(bias)


class Weights(NamedTuple):
    """Weights of one layer, in torch's order; biases may be missing."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None

    def bias(self, rows: slice) -> Tensor | None:
        return None if self.b_ih is None or self.b_hh is None else (self.b_ih + self.b_hh)[rows]


def _dense_terms(
    name: Callable[[str], str], hidden: int, ih: Sequence[int], hh: Sequence[int], first: int, bias: bool
) -> list[Term]:
    """Terms of weight_ih and weight_hh from row `first` on; `ih`, `hh`: which column groups they take."""
    terms = []
    for side, groups, number in (("ih", ih, 0), ("hh", hh, 1)):
        row = first
        for start, behind in _runs(groups):
            columns, rows = (start * hidden, behind * hidden), (row, row + (behind - start) * hidden)
            terms.append(Term(name(f"weight_{side}"), columns, number, rows))
            if bias:
                terms.append(Term(name(f"bias_{side}"), columns, None, rows))
            row = rows[1]
    return terms


def _runs(groups: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, last + 1)."""
    runs: list[tuple[int, int]] = []
    for group in groups:
        if runs and runs[-1][1] == group:
            runs[-1] = (runs[-1][0], group + 1)
        else:
            runs.append((group, group + 1))
    return runs


def lstm_terms(name: Callable[[str], str], hidden: int, bias: bool) -> tuple[list[Term], list[Term]]:
    """Terms of an LSTM: of c, and of the output gate, which acts on h; `name` makes a parameter's name."""
    return (
        _dense_terms(name, hidden, (0, 1, 2), (0, 1, 2), 0, bias),
        _dense_terms(name, hidden, (0,), (0,), 3 * hidden, bias),
    )


def lstm_window(
    w: Weights, x: Tensor, table: Tensor | None, h: Tensor, start: Sequence[Tensor], end: Sequence[Tensor]
) -> LayerWindow:
    """An LSTM along its cell: c_t = f·c_{t−1} + i·g, h_t = o·tanh(c_t).

        path  f;   factors  i: g·i(1−i)   f: c_{t−1}·f(1−f)   g: i(1−g²)
        of h  ∂h/∂c = o(1−tanh²c),   ∂h/∂(pre-activation of o) = tanh(c)·o(1−o)

    x (T, B, I), or symbols (T, B) with `table`; h (T, B, H): h_{t−1}; start, end: (h, c) before and after.
    """
    c, (h_end, c_end) = start[1], end
    steps, _, hidden = h.shape
    used, last = slice(3 * hidden), slice(3 * hidden, None)
    gates = _add_product(project(x, w.w_ih[used], w.bias(used), table), h, w.w_hh[used], None)
    gates[..., : 2 * hidden].sigmoid_()
    gates[..., 2 * hidden :].tanh_()
    i, f, g = gates.chunk(3, -1)
    kept, added = torch.empty_like(h), i * g
    for t in range(steps):
        torch.mul(f[t], c, out=kept[t])
        if t + 1 < steps:
            c = kept[t] + added[t]
    factors = torch.empty_like(gates)
    torch.addcmul(added, added, i, value=-1.0, out=factors[..., :hidden])
    torch.addcmul(kept, kept, f, value=-1.0, out=factors[..., hidden : 2 * hidden])
    torch.addcmul(i, added, g, value=-1.0, out=factors[..., 2 * hidden :])
    o = _add_product(project(x[-1], w.w_ih[last], w.bias(last), table), h[-1], w.w_hh[last], None).sigmoid_()
    slope = torch.addcmul(o, h_end, c_end.tanh(), value=-1.0)
    instant = torch.addcmul(h_end, h_end, o, value=-1.0)
    return LayerWindow(f, factors, (x, h), (slope, 1.0), (instant, None))


def lstm_window_kept(kept: WindowGates, x: Tensor) -> LayerWindow:
    """The same from kept gates; x (T, B, I), or symbols (T, B)."""
    hidden = kept.outputs.shape[-1]
    factors, slopes = kept.factors()
    return LayerWindow(
        kept.gates[..., hidden : 2 * hidden],
        factors[..., : 3 * hidden],
        (x, kept.before()),
        (slopes[-1], 1.0),
        (factors[-1, :, 3 * hidden :], None),
    )


def lstm_window_steps(kept: StepwiseGates, x: Tensor, decay: float) -> LayerWindow:
    """The same from kept steps, with factors that include the path to the window's end."""
    hidden = kept.hiddens.shape[-1]
    factors, total = kept.along_the_cell(decay)
    h, o = kept.hiddens[-1], kept.gates[-1][:, 3 * hidden :]
    slope = torch.addcmul(o, h, kept.cells[-1].tanh(), value=-1.0)
    instant = torch.addcmul(h, h, o, value=-1.0)
    path = total.expand(len(factors), *total.shape)
    return LayerWindow(path, factors, (x, kept.hiddens[:-1]), (slope, 1.0), (instant, None), total)


def gru_terms(name: Callable[[str], str], hidden: int, bias: bool) -> tuple[list[Term], list[Term]]:
    """Terms of a GRU; `name` makes a parameter's name, such as weight_ih_l0."""
    return _dense_terms(name, hidden, (1, 2, 3), (1, 2, 0), 0, bias), []


def gru_window(
    w: Weights, x: Tensor, table: Tensor | None, h: Tensor, start: Sequence[Tensor], end: Sequence[Tensor]
) -> LayerWindow:
    """A GRU along its update gate: h_t = (1−z)·n + z·h_{t−1}, n = tanh(n_x + r·n_h).

    path  z;   a = (1−z)(1−n²);   factors  n_h: a·r   r: a·n_h·r(1−r)   z: (h_{t−1}−n)·z(1−z)   n_x: a
    """
    hidden = h.shape[-1]
    of_x, of_h = project(x, w.w_ih, w.b_ih, table), F.linear(h, w.w_hh, w.b_hh)
    gates = (of_x[..., : 2 * hidden] + of_h[..., : 2 * hidden]).sigmoid_()
    (r, z), n_h = gates.chunk(2, -1), of_h[..., 2 * hidden :]
    n = torch.addcmul(of_x[..., 2 * hidden :], r, n_h).tanh_()
    factors = h.new_empty(*h.shape[:-1], 4 * hidden)
    by_n_h, by_r, by_z, by_n_x = factors.chunk(4, -1)
    torch.mul(1.0 - z, torch.addcmul(torch.ones_like(n), n, n, value=-1.0), out=by_n_x)
    torch.mul(by_n_x, r, out=by_n_h)
    torch.mul(by_n_h, n_h, out=by_r)
    by_r.mul_(1.0 - r)
    torch.mul(h - n, torch.addcmul(z, z, z, value=-1.0), out=by_z)
    return LayerWindow(z, factors, (x, h), (1.0,))


def rnn_terms(name: Callable[[str], str], hidden: int, bias: bool) -> tuple[list[Term], list[Term]]:
    """Terms of a tanh RNN; `name` makes a parameter's name, such as weight_ih_l0."""
    return _dense_terms(name, hidden, (0,), (0,), 0, bias), []


def rnn_window(
    w: Weights, x: Tensor, table: Tensor | None, h: Tensor, start: Sequence[Tensor], end: Sequence[Tensor]
) -> LayerWindow:
    """A tanh RNN along the weight of each cell to itself: path (1−h_t²)·R_jj, factor 1−h_t²."""
    after = torch.cat([h[1:], end[0].unsqueeze(0)])
    slope = torch.addcmul(torch.ones_like(after), after, after, value=-1.0)
    return LayerWindow(slope * w.w_hh.diagonal(), slope, (x, h), (1.0,))


KINDS: dict[type[nn.Module], tuple[Any, Any]] = {
    nn.LSTM: (lstm_terms, lstm_window),
    nn.LSTMCell: (lstm_terms, lstm_window),
    nn.GRU: (gru_terms, gru_window),
    nn.GRUCell: (gru_terms, gru_window),
    nn.RNN: (rnn_terms, rnn_window),
    nn.RNNCell: (rnn_terms, rnn_window),
}
