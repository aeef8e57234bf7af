"""Traces against gradients of nets that are unrolled step by step, in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import CellOfAnLSTM, close, random
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.cores._scan import scan
from dni_rnn.cores.diagonal import Diagonal, DiagonalState
from dni_rnn.cores.mingru import MinGRU
from dni_rnn.interface import Interface
from dni_rnn.penalty import StatePenalty
from dni_rnn.pytree import LSTMState, Tree, flatten, map_tree, unflatten, where_rows
from dni_rnn.synthesizers import MLPSynthesizer
from dni_rnn.traces import LayerWindow, Record, Term, Traced, memory, running
from dni_rnn.traces import lstm as traced_lstm

I, H, B, V = 3, 4, 3, 5  # noqa: E741 — widths of input and state, rows, symbols
State = list[Tensor]
"""The leaves of a state, each (layers, B, H)."""


# The oracle. A step of a whole net, from the leaves of its state. `own` cuts every path across the step but
# each cell's own.


def _lstm(p: dict[str, Tensor], x: Tensor, state: State, own: bool) -> State:
    h, c = state
    h = h.detach() if own else h
    i, f, g, o = (x @ p["weight_ih"].T + p["bias_ih"] + h @ p["weight_hh"].T + p["bias_hh"]).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return [o.sigmoid() * c.tanh(), c]


def _gru(p: dict[str, Tensor], x: Tensor, state: State, own: bool) -> State:
    seen = state[0].detach() if own else state[0]
    r_x, z_x, n_x = (x @ p["weight_ih"].T + p["bias_ih"]).chunk(3, 1)
    r_h, z_h, n_h = (seen @ p["weight_hh"].T + p["bias_hh"]).chunk(3, 1)
    z, n = (z_x + z_h).sigmoid(), (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return [(1 - z) * n + z * state[0]]


def _rnn(p: dict[str, Tensor], x: Tensor, state: State, own: bool) -> State:
    h, w = state[0], p["weight_hh"]
    back = h.detach() @ w.T + (h - h.detach()) * w.diagonal().detach() if own else h @ w.T
    return [(x @ p["weight_ih"].T + p["bias_ih"] + back + p["bias_hh"]).tanh()]


CELLS: dict[str, Callable[..., State]] = {"lstm": _lstm, "gru": _gru, "rnn": _rnn}
MODULES: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def _step(kind: str, p: dict[str, Tensor], x: Tensor, state: State, own: bool) -> tuple[Tensor, State]:
    """A step of the stack: its output and the leaves after it."""
    layers = []
    for layer in range(state[0].shape[0]):
        here = [leaf[layer] for leaf in state]
        if own and layer:
            x = x.detach()  # a layer's trace is of its own parameters and state
        if kind in CELLS:
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            after = CELLS[kind]({n: p[f"{n}_l{layer}"] for n in names}, x, here, own)
            x = after[0]
        elif kind == "mingru":
            z, n = (x @ p[f"layers.{layer}.weight"].T + p[f"layers.{layer}.bias"]).chunk(2, 1)
            x = (1 - z.sigmoid()) * here[0] + z.sigmoid() * n
            after = [x]
        else:
            q = {
                n.removeprefix(f"layers.{layer}."): t
                for n, t in p.items()
                if n.startswith(f"layers.{layer}.")
            }
            size, turn = torch.exp(-q["log_decay"].exp()), q["log_phase"].exp()
            re, im = size * turn.cos(), size * turn.sin()
            gamma = q["log_scale"].exp()
            after = [
                re * here[0] - im * here[1] + gamma * (x @ q["weight_real"].T),
                re * here[1] + im * here[0] + gamma * (x @ q["weight_imaginary"].T),
            ]
            x = F.gelu(torch.cat(after, 1) @ q["mix.weight"].T + q["mix.bias"] + x @ q["skip.weight"].T)
        layers.append(after)
    return x, [torch.stack(leaves) for leaves in zip(*layers, strict=True)]


class Net(NamedTuple):
    """A core with an embedding and a readout, and a text for it."""

    kind: str
    core: Any
    embedding: nn.Embedding
    readout: Tensor
    symbols: Tensor  # (steps, B)
    targets: Tensor
    start: State
    done: dict[int, Tensor]  # rows that start anew at a step

    def parameters(self) -> dict[str, Tensor]:
        return {**dict(self.core.named_parameters()), "embedding": self.embedding.weight}

    def state(self, leaves: State) -> Tree:
        if self.kind == "lstm":
            return tuple(leaves)
        return DiagonalState(*leaves) if self.kind == "diagonal" else leaves[0]

    def loss(self, output: Tensor, first: int) -> Tensor:
        logits = output @ self.readout.T
        y = self.targets[first : first + len(output)]
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")

    def unroll(self, p: dict[str, Tensor], first: int, behind: int, state: State, own: bool = False) -> Any:
        outputs = []
        for t in range(first, behind):
            if t in self.done:
                keep = 1.0 - self.done[t].double().unsqueeze(-1)
                state = [leaf * keep for leaf in state]
            x = p["embedding"][self.symbols[t]]
            output, state = _step(self.kind, p, x, state, own)
            outputs.append(output)
        return torch.stack(outputs), state


def net(kind: str, generator: torch.Generator, *, steps: int = 12, layers: int = 1, **options: Any) -> Net:
    if kind in MODULES:
        core: nn.Module = MODULES[kind](I, H, layers, **options).double()
        with torch.no_grad():
            for layer in range(layers):
                w = core.get_parameter(f"weight_hh_l{layer}")
                blocks = [torch.linalg.qr(random(generator, H, H))[0] for _ in range(len(w) // H)]
                w.copy_(torch.cat(blocks) * (1.0 if kind == "rnn" else 1.2))
                if kind != "rnn":
                    core.get_parameter(f"bias_hh_l{layer}")[H : 2 * H] += 1.0
    else:
        core = (Diagonal if kind == "diagonal" else MinGRU)(I, H, layers).double()
        with torch.no_grad():
            for p in core.parameters():
                p.add_(0.3 * random(generator, *p.shape))
    embedding = nn.Embedding(V, I).double()
    symbols, targets = (torch.randint(V, (steps, B), generator=generator) for _ in range(2))
    count = 2 if kind in ("lstm", "diagonal") else 1
    start = [0.5 * random(generator, layers, B, H) for _ in range(count)]
    return Net(kind, core, embedding, random(generator, V, H), symbols, targets, start, {})


def gradient_of(total: Any, p: Mapping[str, Tensor], **options: Any) -> dict[str, Tensor]:
    found = torch.autograd.grad(total, list(p.values()), allow_unused=True, materialize_grads=True, **options)
    return dict(zip(p, found, strict=True))


def full(n: Net) -> dict[str, Tensor]:
    p = n.parameters()
    output, _ = n.unroll(p, 0, len(n.symbols), n.start)
    return gradient_of(n.loss(output, 0), p)


def bounds(n: Net, window: int) -> list[tuple[int, int]]:
    steps = len(n.symbols)
    return [(t, min(t + window, steps)) for t in range(0, steps, window)]


def boundary_states(n: Net, window: int) -> list[State]:
    states = [n.start]
    with torch.no_grad():
        for first, behind in bounds(n, window):
            states.append(n.unroll(n.parameters(), first, behind, states[-1])[1])
    return states


def completed(
    n: Net, window: int, sent: Sequence[State] | None = None, reach: int | None = None, decay: float = 1.0
) -> dict[str, Tensor]:
    """Σ_k truncated gradient of window k with ĝ_{k+1} at its end, + (g_k − ĝ_k)·E_k, E_k of the cut net.

    E_k reaches back over `reach` windows, and fades by `decay` at every step.
    """
    p, spans, states = n.parameters(), bounds(n, window), boundary_states(n, window)
    sums = {name: torch.zeros_like(value) for name, value in p.items()}
    zero = [torch.zeros_like(leaf) for leaf in n.start]

    def injected(number: int) -> State:
        return zero if sent is None or number >= len(spans) else list(sent[number])

    for k, (first, behind) in enumerate(spans):
        start = [leaf.detach().requires_grad_() for leaf in states[k]]
        output, end = n.unroll(p, first, behind, start)
        total = n.loss(output, first)
        for leaf, g in zip(end, injected(k + 1), strict=True):
            total = total + (leaf * g).sum()
        arrived = torch.autograd.grad(total, start, retain_graph=True)
        residual = [g - guess for g, guess in zip(arrived, injected(k) if k else zero, strict=True)]
        terms = [gradient_of(total, p)]
        if k:
            oldest = 0 if reach is None else spans[max(0, k - reach)][0]
            terms.append(_against(n, p, oldest, first, residual, decay))
        for term in terms:
            for name in sums:
                sums[name] = sums[name] + term[name]
    return sums


def _against(
    n: Net, p: dict[str, Tensor], oldest: int, first: int, residual: State, decay: float
) -> dict[str, Tensor]:
    """residual · ds_first/dθ over the steps since `oldest`: one leaf of θ for each step."""
    state, steps = n.start, []
    for t in range(first):
        state = [leaf.detach() for leaf in state] if t <= oldest else state
        q = {name: v.detach().requires_grad_() for name, v in p.items()}
        _, state = n.unroll(q, t, t + 1, state, own=True)
        if t >= oldest:
            steps.append((decay ** (first - 1 - t), q))
    if first in n.done:
        keep = 1.0 - n.done[first].double().unsqueeze(-1)
        state = [leaf * keep for leaf in state]
    reached = sum((leaf * r.detach()).sum() for leaf, r in zip(state, residual, strict=True))
    sums = {name: torch.zeros_like(v) for name, v in p.items()}
    for weight, q in steps:
        found = gradient_of(reached, q, retain_graph=True)
        for name in sums:
            sums[name] = sums[name] + weight * found[name]
    return sums


class Says(nn.Module):
    """M(state, number) = the tensors of that number."""

    def __init__(self, answers: Sequence[State], spec: Any) -> None:
        super().__init__()
        self.answers, self.spec = answers, spec

    def forward(self, message: Tree, context: int) -> Tree:
        return unflatten(self.answers[context], self.spec)


def trained(
    n: Net,
    window: int,
    *,
    steps: int | None = 64,
    sent: Sequence[State] | None = None,
    embedding: bool = True,
    flush: bool = True,
    scale: float = 1.0,
    **options: Any,
) -> tuple[dict[str, Tensor], Traced]:
    """`.grad` after one reading of the text with Traced."""
    core = Traced(n.core, steps, embedding=n.embedding if embedding else None, **options)
    spans, state = bounds(n, window), n.state(n.start)
    interface = None
    if sent is not None:
        none = [torch.zeros_like(leaf) for leaf in n.start]
        interface = Interface(Says([*sent, none], flatten(state)[1]), normalize=False)
    for parameter in (*core.parameters(), n.embedding.weight):
        parameter.grad = None
    for k, (first, behind) in enumerate(spans):
        done = n.done.get(first)
        if done is not None:
            state = where_rows(done, map_tree(torch.zeros_like, state), state)
        if interface is not None:
            state = interface.receive(state, k, done)
        x = n.symbols[first:behind] if embedding else n.embedding(n.symbols[first:behind])
        output, state = core(x, state, done=done)
        loss = scale * n.loss(output, first)
        if interface is not None and k + 1 < len(spans):
            loss = loss + interface.send(state, k + 1, n.done.get(behind))
        loss.backward()
    if flush:
        core.flush()
    return found_in(n.parameters()), core


def found_in(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`.grad` by name, zero where nothing arrived."""
    return {name: torch.zeros_like(v) if v.grad is None else v.grad.clone() for name, v in p.items()}


def same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, value in wanted.items():
        assert float((got[name] - value).abs().max()) < 1e-10 * (1.0 + float(value.abs().max())), name


def norm(p: dict[str, Tensor]) -> float:
    return float(sum(v.square().sum() for v in p.values())) ** 0.5


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return norm({name: a[name] - b[name] for name in a}) / norm(b)


EXACT, OWN = ["diagonal", "mingru"], ["lstm", "gru", "rnn"]


@pytest.mark.parametrize("guess", ["zero", "random", "half right"])
@pytest.mark.parametrize("kind", EXACT)
@given(window=st.integers(1, 12), steps=st.sampled_from([None, 12, 30]))
def test_exact_trace_is_full_bptt(kind, guess, window, steps):
    generator = torch.Generator().manual_seed(window)
    n = net(kind, generator)
    wanted = full(n)
    sent = None if guess == "zero" else guesses(n, window, generator, 0.5 if guess == "half right" else 0.0)
    got, _ = trained(n, window, steps=steps, sent=sent)
    same(got, wanted)
    if window == 1:
        without, _ = trained(n, window, steps=1, decay=0.0)
        assert apart(without, wanted) > 0.1


def guesses(n: Net, window: int, generator: torch.Generator, right: float) -> list[State]:
    """At every boundary `right` times the true gradient of the loss to come, and noise."""
    found = []
    for (first, _), state in zip(bounds(n, window), boundary_states(n, window), strict=False):
        start = [leaf.detach().requires_grad_() for leaf in state]
        output, _ = n.unroll(n.parameters(), first, len(n.symbols), start)
        true = torch.autograd.grad(n.loss(output, first), start)
        noise = 0.0 if right else 1.0
        found.append([right * g + noise * random(generator, *g.shape) for g in true])
    return found


def random_done(n: Net, window: int, generator: torch.Generator) -> None:
    """Some rows start anew at every second boundary."""
    for first, _ in bounds(n, window)[1::2]:
        n.done[first] = torch.rand(B, generator=generator) < 0.5


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", OWN + EXACT)
def test_own_path_is_the_net_with_every_other_path_cut(kind, layers, carried, generator):
    n = net(kind, generator, layers=layers)
    for window in (1, 3, 5):
        sent = guesses(n, window, generator, 0.5)
        got, _ = trained(n, window, steps=None if carried else 12, sent=sent)
        wanted = completed(n, window, sent)
        same(got, wanted)
    truncated = completed(n, 1, reach=0)
    assert apart(truncated, full(n)) > 0.1
    assert apart(truncated, completed(n, 1)) > 0.1


@pytest.mark.parametrize("kind", OWN + EXACT)
def test_the_own_path_brings_the_gradient_nearer_to_full_bptt(kind, generator):
    n = net(kind, generator)
    wanted = full(n)
    assert apart(trained(n, 1)[0], wanted) < apart(completed(n, 1, reach=0), wanted)


@pytest.mark.parametrize("kind", ["lstm", "gru", "diagonal"])
@given(window=st.integers(1, 4), steps=st.integers(1, 9), decay=st.sampled_from([1.0, 0.7]))
def test_few_steps_are_the_sum_cut_to_so_many_windows(kind, window, steps, decay):
    generator = torch.Generator().manual_seed(7)
    n = net(kind, generator, steps=9)
    random_done(n, window, generator)
    got, _ = trained(n, window, steps=steps, decay=decay)
    same(got, completed(n, window, reach=-(-steps // window), decay=decay))


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("kind", OWN + EXACT)
def test_rows_that_are_done_end_their_traces(kind, carried, generator):
    n = net(kind, generator)
    random_done(n, 3, generator)
    sent = [
        [g * (~n.done.get(first, torch.zeros(B, dtype=torch.bool))).double().unsqueeze(-1) for g in gradient]
        for (first, _), gradient in zip(bounds(n, 3), guesses(n, 3, generator, 0.5), strict=True)
    ]
    got, _ = trained(n, 3, steps=None if carried else 12, sent=sent)
    same(got, completed(n, 3, sent))
    if kind in EXACT:
        same(got, full(n))


@pytest.mark.parametrize("carried", [False, True])
def test_a_state_of_none_ends_all_traces(carried, generator):
    n = net("lstm", generator)
    n.done.update({0: torch.ones(B, dtype=torch.bool), 6: torch.ones(B, dtype=torch.bool)})
    core, state = Traced(n.core, None if carried else 8), None
    for first, behind in bounds(n, 3):
        given = None if first in n.done else state
        output, state = core(n.embedding(n.symbols[first:behind]), given)
        n.loss(output, first).backward()
    core.flush()
    wanted = completed(n, 3)
    got = found_in(n.parameters())
    same({k: v for k, v in got.items() if k != "embedding"}, {k: wanted[k] for k in got if k != "embedding"})


@pytest.mark.parametrize("layers", [1, 2])
def test_an_lstm_by_torch_s_own_kernel_has_the_same_trace(layers, generator):
    n = net("lstm", generator, layers=layers)
    for symbols in (True, False):
        kept, _ = trained(n, 3, fused=False, embedding=symbols)
        fused, _ = trained(n, 3, fused=True, embedding=symbols)
        same(fused, kept)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_lstm_by_the_cells_of_a_gpu_has_the_same_trace(layers, generator, monkeypatch):
    n = net("lstm", generator, layers=layers)
    wanted = {
        (symbols, steps): trained(n, 3, embedding=symbols, steps=steps, decay=0.9)[0]
        for symbols in (True, False)
        for steps in (6, None)
    }
    monkeypatch.setattr(running, "BY_STEP", "cpu")
    monkeypatch.setattr(traced_lstm, "KERNEL", CellOfAnLSTM)
    for (symbols, steps), parts in wanted.items():
        same(trained(n, 3, embedding=symbols, steps=steps, decay=0.9)[0], parts)


def test_without_its_embedding_only_the_embedding_lacks_the_trace(generator):
    n = net("lstm", generator)
    got, wanted = trained(n, 2, embedding=False)[0], completed(n, 2)
    same({**got, "embedding": wanted["embedding"]}, wanted)
    close(got["embedding"], completed(n, 2, reach=0)["embedding"])


@pytest.mark.parametrize("symbols", [2, 40])
def test_the_embedding_gets_its_part_whether_symbols_are_few_or_many(symbols, generator):
    n = net("gru", generator)
    n = n._replace(
        embedding=nn.Embedding(symbols, I, padding_idx=1).double(),
        symbols=torch.randint(symbols, (12, B), generator=generator),
    )
    got, wanted = trained(n, 2)[0], completed(n, 2)
    assert not got["embedding"][1].any()
    wanted["embedding"][1] = 0.0
    same(got, wanted)


@pytest.mark.parametrize("kind", OWN)
def test_a_cell_is_a_window_of_one_step(kind, generator):
    n = net(kind, generator)
    cell = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}[kind](I, H).double()
    cell.load_state_dict({name.removesuffix("_l0"): v for name, v in n.core.state_dict().items()})
    core, state = Traced(cell, 12, embedding=n.embedding), [leaf[0] for leaf in n.start]
    state = tuple(state) if kind == "lstm" else state[0]
    for t in range(len(n.symbols)):
        state = core(n.symbols[t], state)
        n.loss((state[0] if kind == "lstm" else state).unsqueeze(0), t).backward()
    core.flush()
    wanted = completed(n, 1)
    got = {f"{name}_l0": g for name, g in found_in(dict(cell.named_parameters())).items()}
    same({**got, **found_in({"embedding": n.embedding.weight})}, wanted)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("bias", [False, True])
def test_batch_first_and_no_bias(kind, bias, generator):
    n = net(kind, generator, layers=2, batch_first=True)
    if not bias:
        n.core.bias = False  # type: ignore[assignment]
        with torch.no_grad():
            for name, parameter in n.core.named_parameters():
                if "bias" in name:
                    parameter.zero_()
    weights = {name: v for name, v in n.core.state_dict().items() if bias or "bias" not in name}
    rnn = MODULES[kind](I, H, 2, batch_first=True, bias=bias).double()
    rnn.load_state_dict(weights)
    core, state = Traced(rnn, 12, embedding=n.embedding), n.state(n.start)
    for first, behind in bounds(n, 4):
        output, state = core(n.symbols[first:behind].t(), state)
        n.loss(output.transpose(0, 1), first).backward()
    core.flush()
    wanted, got = completed(n, 4), found_in(dict(rnn.named_parameters()))
    same(got, {name: wanted[name] for name in got})


def test_windows_of_any_length_follow_each_other(generator):
    n = net("gru", generator)
    core, state, first = Traced(n.core, 12, embedding=n.embedding), n.state(n.start), 0
    spans = [(0, 2), (2, 3), (3, 8), (8, 12)]
    for first, behind in spans:
        output, state = core(n.symbols[first:behind], state)
        n.loss(output, first).backward()
    core.flush()
    got = found_in(n.parameters())
    # The same by the carried form, which the oracle has checked.
    state = n.state(n.start)
    for parameter in n.parameters().values():
        parameter.grad = None
    core = Traced(n.core, None, embedding=n.embedding)
    for first, behind in spans:
        output, state = core(n.symbols[first:behind], state)
        n.loss(output, first).backward()
    same(got, found_in(n.parameters()))


@pytest.mark.parametrize("kind", EXACT)
def test_a_penalty_on_the_state_is_a_loss_and_no_guess(kind, generator):
    n = net(kind, generator)
    p = n.parameters()
    state, total = n.start, torch.zeros(())
    for first, behind in bounds(n, 3):
        output, state = n.unroll(p, first, behind, state)
        total = total + n.loss(output, first) + 0.7 * sum(leaf.square().sum() for leaf in state)
    wanted = gradient_of(total, p)
    core, state = Traced(n.core, 12, embedding=n.embedding), n.state(n.start)
    none = [torch.zeros_like(leaf) for leaf in n.start]
    interface = Interface(Says([*guesses(n, 3, generator, 0.5), none], flatten(state)[1]), normalize=False)
    for k, (first, behind) in enumerate(bounds(n, 3)):
        output, state = core(n.symbols[first:behind], interface.receive(state, k))
        penalty = 0.7 * sum(leaf.square().sum() for leaf in flatten(state)[0])
        (n.loss(output, first) + penalty + interface.send(state, k + 1 if behind < 12 else -1)).backward()
    core.flush()
    same(found_in(p), wanted)


def test_a_state_penalty_beside_an_interface_is_not_taken_back(generator):
    n = net("mingru", generator)
    n = n._replace(start=[30.0 * leaf for leaf in n.start])
    with torch.no_grad():
        n.core.get_parameter("layers.0.bias")[:H] -= 2.0  # it forgets slowly
    p, state = n.parameters(), n.start
    total: Any = 0.0
    for first, behind in bounds(n, 2):
        output, state = n.unroll(p, first, behind, state)
        penalty = 0.5 * 0.3 * F.softshrink(state[0], 3.0).square().sum()
        assert first > 6 or penalty > 0.01
        total = total + n.loss(output, first) + penalty
    wanted = gradient_of(total, p)
    core, state = Traced(n.core, 12, embedding=n.embedding), n.state(n.start)
    says = Says([*guesses(n, 2, generator, 0.5), [torch.zeros_like(n.start[0])]], flatten(state)[1])
    interface, penalty = Interface(says, normalize=False), StatePenalty(0.3)
    for k, (first, behind) in enumerate(bounds(n, 2)):
        output, state = core(n.symbols[first:behind], interface.receive(state, k))
        sending = interface.send(state, k + 1 if behind < 12 else -1)
        (n.loss(output, first) + sending + penalty(state, rms=interface.target_rms())).backward()
    core.flush()
    same(found_in(p), wanted)


def test_a_thousand_times_the_loss_is_a_thousand_times_the_gradient(generator):
    n = net("lstm", generator)
    once, thousand = trained(n, 2)[0], trained(n, 2, scale=1000.0)[0]
    same({name: g / 1000.0 for name, g in thousand.items()}, once)


def test_a_loss_scale_that_changes_leaves_the_gradient_as_it_is(generator):
    n = net("lstm", generator)
    sent = guesses(n, 2, generator, 0.5)
    wanted = completed(n, 2, sent)
    state = n.state(n.start)
    core = Traced(n.core, 12, embedding=n.embedding)
    none = [torch.zeros_like(leaf) for leaf in n.start]
    interface = Interface(Says([*sent, none], flatten(state)[1]), normalize=False)
    sums = {name: torch.zeros_like(v) for name, v in wanted.items()}
    for k, (first, behind) in enumerate(bounds(n, 2)):
        factor = torch.tensor(2.0 ** (k % 3), dtype=torch.float64)
        core.loss_scale = interface.loss_scale = factor
        output, state = core(n.symbols[first:behind], interface.receive(state, k))
        sending = interface.send(state, k + 1 if behind < 12 else -1)
        (factor * n.loss(output, first) + sending).backward()
        if behind == 12:
            core.flush()
        for name, v in n.parameters().items():
            assert v.grad is not None
            sums[name] += v.grad / factor
            v.grad = None
    same(sums, wanted)


def test_a_gradient_that_overflowed_does_not_stay_in_the_trace(generator):
    n = net("lstm", generator)
    core, state = Traced(n.core, 12), n.state(n.start)
    core.loss_scale = 1.0
    for first, behind in bounds(n, 2):
        output, state = core(n.embedding(n.symbols[first:behind]), state)
        (n.loss(output, first) * (torch.inf if first == 4 else 1.0)).backward()
        n.core.zero_grad()
    core.flush()
    assert all(g.isfinite().all() for name, g in found_in(dict(n.core.named_parameters())).items())


@pytest.mark.parametrize("steps", [4, None])
@pytest.mark.parametrize("kind", ["lstm", "gru", "diagonal"])
def test_shared_out_rows_sum_to_the_whole(kind, steps, generator):
    n = net(kind, generator)
    wanted, core = trained(n, 2, steps=steps, flush=False)
    state = core.trace_state()
    for tensor in (t for layer in state.values() for t in layer):
        assert tensor.shape[-2] == B
    sums = {name: torch.zeros_like(v) for name, v in wanted.items()}
    rest = net(kind, generator)
    rest = rest._replace(core=n.core, embedding=n.embedding, readout=n.readout)
    whole = continued(rest, core, slice(None))
    for rows in (slice(0, 1), slice(1, B)):
        part = Traced(n.core, steps, embedding=n.embedding)
        part.load_trace_state({name: [t[..., rows, :] for t in layer] for name, layer in state.items()})
        for name, g in continued(rest, part, rows).items():
            sums[name] += g
    same(sums, whole)
    assert norm(whole) > 0.1


def continued(n: Net, core: Traced, rows: slice) -> dict[str, Tensor]:
    for parameter in n.parameters().values():
        parameter.grad = None
    state = n.state([leaf[:, rows] for leaf in n.start])
    for first, behind in bounds(n, 2):
        output, state = core(n.symbols[first:behind, rows], state)
        y = n.targets[first:behind, rows]
        F.cross_entropy((output @ n.readout.T).flatten(0, 1), y.flatten(), reduction="sum").backward()
    core.flush()
    return found_in(n.parameters())


@pytest.mark.parametrize("steps", [4, None])
@pytest.mark.parametrize("kind", OWN + EXACT)
def test_a_run_goes_on_bit_for_bit(kind, steps, generator):
    n = net(kind, generator)
    _, core = trained(n, 3, steps=steps, flush=False)
    clone = copy.deepcopy(core)
    built = Traced(copy.deepcopy(n.core), steps, embedding=copy.deepcopy(n.embedding))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.zero_()
    built.load_state_dict(core.state_dict())
    # By name: a file may give its tensors in any order.
    built.load_named_state(dict(reversed(core.named_state().items())))
    for a, b in zip(flatten(built.trace_state())[0], flatten(core.trace_state())[0], strict=True):
        assert torch.equal(a, b)
    wanted = continued(n, core, slice(None))
    for other in (built, clone):
        assert other.embedding is not None
        got = continued(n._replace(core=other.core, embedding=other.embedding), other, slice(None))
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", ["lstm", "gru", "diagonal"])
def test_a_run_goes_on_from_an_earlier_file(kind, generator):
    """It had A and the path from a step to the window's end by themselves."""
    n = net(kind, generator)
    _, core = trained(n, 3, steps=9, decay=0.9, flush=False)
    state = core.trace_state()
    for name, layer in zip(state, core._layers or [], strict=True):
        own = len(state[name]) - len(layer.memory.tensors())
        path, rho, factors, *inputs = state[name][own:]
        within = (
            torch.rand(*factors.shape[:-1], path.shape[-1], dtype=factors.dtype, generator=generator) + 0.5
        )
        apart = factors / within.repeat(1, 1, 1, factors.shape[-1] // within.shape[-1])
        state[name][own:] = [path, rho, within, apart, *inputs]
    built = Traced(n.core, 9, 0.9, embedding=n.embedding)
    built.load_trace_state(state)
    same(continued(n, built, slice(None)), continued(n, core, slice(None)))


@pytest.mark.parametrize("kind", ["lstm", "diagonal"])
def test_a_place_that_the_device_counts_is_the_same_place(kind, generator, monkeypatch):
    n = net(kind, generator)
    wanted, _ = trained(n, 5, steps=10)
    plain = memory.Deferred.__init__
    monkeypatch.setattr(memory.Deferred, "__init__", lambda self, c, w, d, _: plain(self, c, w, d, True))
    got, core = trained(n, 5, steps=10)
    same(got, wanted)
    core.load_trace_state(core.trace_state())


@pytest.mark.parametrize("complex_", [False, True])
@given(steps=st.integers(1, 20), constant=st.booleans())
def test_a_scan_is_the_loop(complex_, steps, constant):
    generator = torch.Generator().manual_seed(steps)
    dtype = torch.complex128 if complex_ else torch.float64

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()

    a, b, start = draw(*((1, 1) if constant else (steps, 2)), 3), draw(steps, 2, 3), draw(2, 3)
    h, outputs = start, []
    for t in range(steps):
        h = (a[0] if constant else a[t]) * h + b[t]
        outputs.append(h)
    wanted = torch.stack(outputs)
    weight = draw(steps, 2, 3).detach()
    got = scan(a, b, start)
    close(got, wanted)
    gradients = [torch.autograd.grad((x * weight).abs().sum(), (a, b, start)) for x in (got, wanted)]
    for g, w in zip(*gradients, strict=True):
        close(g, w, rtol=1e-8)


@pytest.mark.parametrize("kind", EXACT)
def test_a_core_is_its_loop_over_steps(kind, generator):
    n = net(kind, generator, layers=2, steps=17)
    p = n.parameters()
    wanted, end = n.unroll(p, 0, 17, n.start)
    output, state = n.core(n.embedding(n.symbols), n.state(n.start))
    close(output, wanted)
    for a, b in zip(flatten(state)[0], end, strict=True):
        close(a, b)
    assert output.shape[-1] == n.core.output_size
    same(gradient_of(n.loss(output, 0), p), full(n))
    assert flatten(n.core.initial_state(5))[0][0].shape == (2, 5, H)


def test_a_diagonal_core_starts_in_its_ring():
    core = Diagonal(3, 500, inner=0.5, outer=0.9, phase=1.0)
    first: Any = core.layers[0]
    multiplier = first.multiplier()
    size, turn = multiplier.detach().abs(), multiplier.detach().angle()
    assert 0.5 <= float(size.min()) <= 0.55
    assert 0.88 <= float(size.max()) <= 0.9
    assert float(turn.min()) >= 0.0
    assert float(turn.max()) <= 1.0
    with pytest.raises(ValueError, match="inner and outer must lie in"):
        Diagonal(3, 4, inner=0.5, outer=1.0)


@pytest.mark.parametrize("kind", OWN + EXACT)
def test_autocast(kind, generator):
    n = net(kind, generator)
    core = Traced(n.core.float(), 4, embedding=n.embedding.float())
    state = core.initial_state(B)
    for first, behind in bounds(n, 2):
        with torch.autocast("cpu", torch.bfloat16):
            output, state = core(n.symbols[first:behind], state)
            loss = n.loss(output.double(), first)
        loss.backward()
        with torch.autocast("cpu", torch.bfloat16):
            assert core.trace_state() is not None
    for name, g in found_in(n.parameters()).items():
        assert g.dtype == torch.float32, name
        assert g.isfinite().all(), name
        assert g.any(), name


def test_where_nothing_is_recorded_it_is_the_core(generator):
    n = net("lstm", generator)
    _, core = trained(n, 3, flush=False)
    before, x = core.trace_state(), n.symbols[:5]
    with torch.no_grad():
        output, state = core(x, n.state(n.start))
    wanted, _ = n.core(n.embedding(x), n.state(n.start))
    assert torch.equal(output, wanted)
    assert not state[0].requires_grad
    core.eval()
    assert torch.equal(core(x, n.state(n.start))[0], wanted)
    assert type(core(x)[1]) is type(core.initial_state(B)) is type(state) is LSTMState
    assert (core.output_size, core.output_leaf) == (H, "hidden")
    core(x[:, :1])  # other rows too
    for a, b in zip(flatten(before)[0], flatten(core.trace_state())[0], strict=True):
        assert torch.equal(a, b)


def test_one_line_changes_in_a_program(generator):
    """Truncated BPTT as anybody writes it, before and after."""
    x, y = torch.randint(V, (40, B), generator=generator), torch.randint(V, (40, B), generator=generator)
    embedding, lstm, readout = nn.Embedding(V, I), nn.LSTM(I, H), nn.Linear(H, V)

    def losses(change: str) -> list[float]:
        net = copy.deepcopy(nn.ModuleList([embedding, lstm, readout]))
        look_up, plain, out = net
        core = Traced(plain, 16) if change else plain
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        state, found = (torch.zeros(1, B, H), torch.zeros(1, B, H)), []
        for t in range(0, 40, 4):
            if change:
                output, state = core(look_up(x[t : t + 4]), state)
            else:
                output, state = core(look_up(x[t : t + 4]), tuple(leaf.detach() for leaf in state))
            loss = F.cross_entropy(out(output).flatten(0, 1), y[t : t + 4].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            found.append(loss.item())
        return found

    before, after = losses(""), losses("traced")
    torch.testing.assert_close(before[:2], after[:2])  # the first window has no past
    assert before[3:] != after[3:]


class Leaky(nn.Module):
    """A cell that somebody else wrote, with a dict as its state:

    s' = a ⊙ s + (1 − a) ⊙ tanh(W x + b), slow' = ½ slow + ½ x, which has no parameters."""

    output_size = H

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(I, H)
        self.rate = nn.Parameter(torch.zeros(H))

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        return {"s": self.rate.new_zeros(batch, H), "slow": self.rate.new_zeros(batch, I)}

    def run(self, inputs: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Any, list[Record]]:
        a, s, slow = self.rate.sigmoid(), state["s"], state["slow"]
        befores, outputs, new = [], [], self.inner(inputs).tanh()
        for x, n in zip(inputs, new, strict=True):
            befores.append(s.detach())
            s, slow = a * s + (1 - a) * n, 0.5 * slow + 0.5 * x
            outputs.append(s)
        before, seen, n = torch.stack(befores), inputs.detach(), new.detach()

        def window() -> LayerWindow:
            a = self.rate.sigmoid()
            by_rate, by_inner = (before - n) * a * (1 - a), (1 - a) * (1 - n.square())
            return LayerWindow(a.expand_as(n), torch.cat([by_rate, by_inner], -1), (seen,), (1.0, None))

        terms = [
            Term("rate", (0, H)),
            Term("inner.weight", (H, 2 * H), 0),
            Term("inner.bias", (H, 2 * H)),
        ]
        return torch.stack(outputs), {"s": s, "slow": slow}, [Record(terms, window)]

    def forward(self, inputs: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Any]:
        return self.run(inputs, state)[:2]


@pytest.mark.parametrize("steps", [12, None])
def test_a_cell_of_the_user_s_own(steps, generator):
    cell = Leaky().double()
    x, weight = random(generator, 12, B, I), random(generator, 12, B, H)
    output, _ = cell(x, cell.initial_state(B))
    p = dict(cell.named_parameters())
    wanted = gradient_of((output.sin() * weight).sum(), p)
    core, state = Traced(cell, steps), None
    for t in range(0, 12, 3):
        output, state = core(x[t : t + 3], state)
        (output.sin() * weight[t : t + 3]).sum().backward()
    core.flush()
    same(found_in(p), wanted)
    assert apart(wanted, {name: 0.5 * g for name, g in wanted.items()}) > 0.1


def test_frozen_parameters_get_nothing(generator):
    n = net("lstm", generator)
    n.core.get_parameter("weight_hh_l0").requires_grad_(False)
    n.embedding.weight.requires_grad_(False)
    got, _ = trained(n, 2)
    assert n.core.get_parameter("weight_hh_l0").grad is None
    assert n.embedding.weight.grad is None
    for parameter in n.parameters().values():
        parameter.requires_grad_()
    wanted = completed(n, 2)
    same({"w": got["weight_ih_l0"]}, {"w": wanted["weight_ih_l0"]})


@pytest.mark.parametrize("kind", OWN + EXACT)
def test_the_weights_of_a_functional_call_are_those_of_its_trace(kind, generator):
    n, other = net(kind, generator), net(kind, generator)
    wanted, _ = trained(n, 2, steps=4, flush=False)
    core = Traced(other.core, 4, embedding=other.embedding)
    p = {name: v.detach().clone().requires_grad_() for name, v in n.parameters().items()}
    named = {"embedding.weight" if name == "embedding" else f"core.{name}": v for name, v in p.items()}
    state = n.state(n.start)
    for first, behind in bounds(n, 2):
        output, state = torch.func.functional_call(core, named, (n.symbols[first:behind], state))
        n.loss(output, first).backward()
    same(found_in(p), wanted)


@pytest.mark.parametrize("kind", OWN)
def test_a_weight_that_two_layers_share_gets_the_sum(kind, generator):
    n = net(kind, generator, layers=2)
    names = [("weight_hh_l0", "weight_hh_l1"), ("bias_hh_l0", "bias_hh_l1")]
    with torch.no_grad():
        for below, above in names:
            n.core.get_parameter(above).copy_(n.core.get_parameter(below))
    wanted, _ = trained(n, 2, steps=4)
    for below, above in names:
        wanted[below] = wanted[below] + wanted.pop(above)
        setattr(n.core, above, n.core.get_parameter(below))
    got, _ = trained(n, 2, steps=4)
    same(got, wanted)


LOSSES = [[5], [2], [0, 3], [1, 2, 5]]
"""Which of six windows have a loss."""


@pytest.mark.parametrize("which", LOSSES)
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("steps", [12, None])
def test_a_window_may_have_no_loss(kind, which, guess, steps, generator):
    """It gets no backward pass, and what M said of it is taken back all the same."""
    n, spans = net(kind, generator), bounds(net(kind, generator), 2)
    p, (output, _) = n.parameters(), n.unroll(n.parameters(), 0, 12, n.start)
    wanted = gradient_of(sum(n.loss(output[slice(*spans[k])], spans[k][0]) for k in which), p)
    core, state = Traced(n.core, steps, embedding=n.embedding), n.state(n.start)
    sent = guesses(n, 2, generator, 0.0) if guess else [[torch.zeros_like(leaf) for leaf in n.start]] * 6
    interface = Interface(Says(sent, flatten(state)[1]), normalize=False)
    for k, (first, behind) in enumerate(spans):
        output, state = core(n.symbols[first:behind], interface.receive(state, k))
        loss = n.loss(output, first)
        if k + 1 < len(spans):
            loss = loss + interface.send(state, k + 1)
        if k in which:
            loss.backward()
    core.flush()
    same(found_in(p), wanted)


@pytest.mark.parametrize("which", LOSSES)
@pytest.mark.parametrize("kind", EXACT)
def test_a_window_without_loss_does_not_push_the_oldest_out_unheard(kind, which, generator):
    n, spans = net(kind, generator), bounds(net(kind, generator), 2)
    p, states, losses = n.parameters(), boundary_states(n, 2), []
    for k in which:
        oldest = max(0, k - 2)
        output, _ = n.unroll(p, spans[oldest][0], spans[k][1], states[oldest])
        losses.append(n.loss(output[-2:], spans[k][0]))
    core, state = Traced(n.core, 4, embedding=n.embedding), n.state(n.start)
    for k, (first, behind) in enumerate(spans):
        output, state = core(n.symbols[first:behind], state)
        if k in which:
            (1000 * n.loss(output, first)).backward()
        core.loss_scale = 1000.0
    core.flush()
    same({name: g / 1000 for name, g in found_in(p).items()}, gradient_of(sum(losses), p))


@pytest.mark.parametrize("kind", OWN + EXACT)
def test_a_copy_before_backward_is_one_that_had_none(kind, generator):
    n = net(kind, generator)

    def later(copied: Callable[[Traced], Traced] | None) -> list[Tensor]:
        """`.grad` of what follows the fourth window: of a copy that was made in it, or passed over."""
        core, state = Traced(n.core, 4, embedding=n.embedding), n.state(n.start)
        for number, (first, behind) in enumerate(bounds(n, 2)):
            output, state = core(n.symbols[first:behind], state)
            loss = n.loss(output, first)
            if number == 3:
                twin = core if copied is None else copied(core)
                if copied is not None:
                    loss.backward()
                core, state = twin, map_tree(torch.Tensor.detach, state)
                core.zero_grad()
            else:
                loss.backward()
        core.flush()
        return list(found_in(dict(core.named_parameters())).values())

    wanted = later(None)
    for copied in (copy.deepcopy, lambda core: pickle.loads(pickle.dumps(core))):
        for got, g in zip(later(copied), wanted, strict=True):
            assert float((got - g).abs().max()) < 1e-10


def test_what_a_window_without_backward_owes_is_in_no_state(generator):
    n = net("gru", generator)
    core, state = Traced(n.core, 4, embedding=n.embedding), n.state(n.start)
    output, state = core(n.symbols[:2], state)
    assert float(core.trace_state()["layer0"][3].abs().max()) > 0  # the window itself is
    for first in (0, 2, 4):
        n.loss(output, first).backward()
        output, state = core(n.symbols[first + 2 : first + 4], state)
    with pytest.raises(RuntimeError, match="are due in the next one"):
        core.trace_state()
    n.loss(output, 6).backward()  # and here it comes
    assert core.trace_state()


def test_a_window_that_the_core_refused_leaves_nothing(generator):
    core, x = Traced(nn.GRU(I, H)), torch.randn(3, 2, B, I)
    with pytest.raises(RuntimeError, match="input"):
        core(x[0, :, :2, :2])  # other rows, and too few inputs
    output, state = core(x[1])
    output.sum().backward()
    core(x[2], state)[0].sum().backward()


@pytest.mark.parametrize("kind", ["gru", "rnn"])
def test_a_window_passed_over_under_autocast_is_in_the_precision_of_the_weights(kind):
    core, x = Traced(MODULES[kind](I, H), 4), torch.randn(3, 2, B, I)
    state = None
    for window in x:
        with torch.autocast("cpu", torch.bfloat16):
            output, state = core(window, state)
    output.float().sum().backward()
    assert {t.dtype for t in flatten(core.trace_state())[0]} == {torch.float32}


@pytest.mark.parametrize("kind", EXACT)
def test_where_nothing_was_sent_nothing_is_taken_back(kind, generator):
    """M is asked at every second boundary alone."""
    n, spans = net(kind, generator), bounds(net(kind, generator), 2)
    wanted, sent = full(n), guesses(n, 2, generator, 0.0)
    core, state = Traced(n.core, None, embedding=n.embedding), n.state(n.start)
    interface = Interface(Says(sent, flatten(state)[1]), normalize=False)
    for k, (first, behind) in enumerate(spans):
        output, state = core(n.symbols[first:behind], interface.receive(state, k))
        loss = n.loss(output, first)
        (loss + interface.send(state, k + 1) if k % 2 == 0 else loss).backward()
    same(found_in(n.parameters()), wanted)


@pytest.mark.parametrize("turns", [True, False])
def test_an_interface_of_two_cores_is_refused(turns, generator):
    cores = [Traced(nn.GRU(I, H)), Traced(nn.GRU(I, H))]
    states = [core.initial_state(B) for core in cores]
    interface = Interface(MLPSynthesizer(states[0]))

    def window() -> None:
        sends = []
        for number, core in enumerate(cores):
            output, states[number] = core(torch.randn(2, B, I), interface.receive(states[number]))
            sends.append((output.sum(), states[number]))
            if turns:
                (output.sum() + interface.send(states[number])).backward()
        if not turns:
            torch.stack([loss + interface.send(state) for loss, state in sends]).sum().backward()

    window()
    with pytest.raises(ValueError, match="serves one traced core"):
        window()


def test_a_state_is_received_whole_and_by_the_interface_given():
    lstm, x = nn.LSTM(I, H), torch.randn(2, B, I)
    core = Traced(lstm)
    h, c = core.initial_state(B)
    first, second = (Interface(MLPSynthesizer(h)) for _ in range(2))
    for state in ((first.receive(h), second.receive(c)), (first.receive(h), c), (h, first.receive(c))):
        with pytest.raises(ValueError, match="as a whole, by one interface"):
            core(x, state)
    whole, other = (Interface(MLPSynthesizer((h, c))) for _ in range(2))
    given = Traced(lstm, interface=whole)
    with pytest.raises(ValueError, match="another interface"):
        given(x, other.receive((h, c)))
    given(x, whole.receive((h, c)))


def test_other_weights_than_the_trace_is_of_are_refused():
    core = Traced(nn.GRU(I, H))
    output, state = core(torch.randn(2, B, I))
    output.sum().backward()
    core.double()
    with pytest.raises(ValueError, match=r"in torch\.float32, not torch\.float64: call reset"):
        core(torch.randn(2, B, I).double(), state.double())
    core.reset()
    core(torch.randn(2, B, I).double(), state.double())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
def test_compiled_around_it_is_the_same(generator):
    n = net("lstm", generator)
    wanted, _ = trained(n, 2, steps=4)
    core, state = Traced(n.core, 4, embedding=n.embedding), n.state(n.start)
    for p in core.parameters():
        p.grad = None

    @torch.compile(backend="aot_eager")
    def step(first: int, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        output, state = core(x, state)
        return n.loss(output, first), state

    for first, behind in bounds(n, 2):
        loss, state = step(first, n.symbols[first:behind], state)
        loss.backward()
    core.flush()
    same(found_in(n.parameters()), wanted)


@pytest.mark.parametrize("kind", ["lstm", "mingru"])
@pytest.mark.parametrize("steps", [4, None])
def test_what_is_thawed_gets_its_part_from_then_on(kind, steps, generator):
    n = net(kind, generator)
    p = dict(n.core.named_parameters())
    name, frozen = next(iter(p.items()))

    def parts(thawed: int) -> list[dict[str, Tensor]]:
        """Of each window; the first parameter is frozen up to window `thawed`."""
        core, state, found = Traced(n.core, steps, embedding=n.embedding), n.state(n.start), []
        for number, (first, behind) in enumerate(bounds(n, 2)):
            frozen.requires_grad_(number >= thawed)
            for parameter in p.values():
                parameter.grad = None
            output, state = core(n.symbols[first:behind], state)
            n.loss(output, first).backward()
            found.append(found_in(p))
        return found

    wanted = parts(0)
    for number, (got, here) in enumerate(zip(parts(3), wanted, strict=True)):
        same(got, here if number >= 3 else here | {name: torch.zeros_like(frozen)})


def test_hooks_that_would_not_be_called_are_refused():
    for register in ("register_forward_hook", "register_full_backward_hook", "register_forward_pre_hook"):
        for core in (nn.LSTM(2, 3), MinGRU(2, 3)):
            getattr(core, register)(lambda *_: None)
            with pytest.raises(ValueError, match="hook"):
                Traced(core)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: Traced(nn.LSTM(2, 3, bidirectional=True)), ValueError, "bidirectional"),
        (lambda: Traced(nn.LSTM(2, 3, proj_size=1)), ValueError, "proj_size"),
        (lambda: Traced(nn.RNN(2, 3, nonlinearity="relu")), ValueError, "relu"),
        (lambda: Traced(nn.RNNCell(2, 3, nonlinearity="relu")), ValueError, "relu"),
        (lambda: Traced(nn.Linear(2, 3)), TypeError, "Linear does not say how it is traced"),
        (lambda: Traced(nn.LSTM(2, 3), 0), ValueError, "steps"),
        (lambda: Traced(nn.LSTM(2, 3), decay=1.1), ValueError, "decay"),
        (lambda: Traced(nn.LSTM(2, 3), embedding=nn.Embedding(4, 2, sparse=True)), ValueError, "plain"),
        (lambda: Traced(nn.LSTM(2, 3))(torch.zeros(4, 2)), ValueError, "rows"),
    ],
)
def test_what_cannot_be_traced_is_refused(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_misuse_is_told_in_words():
    core = Traced(nn.LSTM(I, H))
    x = torch.randn(2, B, I)
    first, state = core(x)
    second, _ = core(x, state)
    with pytest.raises(RuntimeError, match="followed by another"):
        first.sum().backward()
    second.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated before"):
        second.sum().backward()
    with pytest.raises(ValueError, match=r"of 3 rows, not 2: call reset"):
        core(x[:, :2])
    core.reset()
    _, state = core(x[:, :2])
    zeros = LSTMState(torch.zeros(1, 2, H), torch.zeros(1, 2, H))
    interface = Interface(MLPSynthesizer(zeros, hidden=[4]))
    received = interface.receive(zeros)
    with pytest.raises(ValueError, match="changed after"):
        core(x[:, :2], tuple(0.5 * leaf for leaf in received))
    told = Traced(nn.LSTM(I, H), interface=interface)
    told(x[:, :2], tuple(0.5 * leaf for leaf in received))
    core(x[:, :2], received)
    core(x[:, :2], LSTMState(*state))
