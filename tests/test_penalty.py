"""The penalty on a state that runs away: by hand, alone and in every estimator."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from reference import close, distance, grad, laid_out, mean_square, random, running_size
from test_estimators import (
    WEIGHT,
    as_message,
    build,
    library,
    net_gradients,
    random_synthesizer,
    scaled,
)
from torch import Tensor, nn

from dni_rnn.estimators.bptt import TruncatedBPTT
from dni_rnn.estimators.dni import DNI
from dni_rnn.estimators.full import FullBPTT
from dni_rnn.interface import Interface
from dni_rnn.penalty import StatePenalty
from dni_rnn.pytree import LSTMState, Tree, flatten, flatten_rows, map_tree
from dni_rnn.synthesizers import MLPSynthesizer

STATE = torch.tensor([[0.0, 2.9, -2.9, 3.0, -3.0], [4.0, -4.0, 1e4, -3.5, 3.25]], dtype=torch.float64)
EXCESS = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 1e4 - 3.0, -0.5, 0.25]], dtype=torch.float64)


def made(strength: float = 0.1, rms: float | None = None, **options: Any) -> StatePenalty:
    penalty = StatePenalty(strength, **options).double()
    if rms is not None:
        penalty.mean_square.fill_(rms**2)
        penalty.count.fill_(5.0)
    return penalty


def feed(edge: Callable[..., Tree], gradient: Tree, state: Tree = None, done: Tensor | None = None) -> Tree:
    """Let `gradient` arrive at what `edge` takes over (default zeros)."""
    state = map_tree(torch.zeros_like, gradient) if state is None else state
    received = edge(state, done=done)
    pairs = zip(flatten(received)[0], flatten(gradient)[0], strict=True)
    torch.stack([(r * g.detach()).sum() for r, g in pairs]).sum().backward()
    return received


# The term of the loss.


@pytest.mark.parametrize("rms", [2.0, 0.0])
def test_its_value_and_gradient_in_numbers(rms):
    state = STATE.clone().requires_grad_()
    penalty = made(0.1, rms)(state)
    assert penalty.shape == ()
    close(penalty.detach(), 0.1 * rms * 0.5 * EXCESS.square().sum())
    penalty.backward()
    close(grad(state), 0.1 * rms * EXCESS)


def test_nothing_is_pushed_inside_the_bound(generator):
    state = (6.0 * torch.rand(2, 50, 7, dtype=torch.float64, generator=generator) - 3.0).requires_grad_()
    penalty = made(100.0, 5.0)(state)
    assert float(penalty.detach()) == 0.0
    penalty.backward()
    assert not grad(state).any()


def test_it_is_over_all_tensors_of_a_state(generator):
    """A hidden state and a cell, several layers; and a tree of other shapes."""
    state = LSTMState(4.0 * random(generator, 2, 3, 4), 4.0 * random(generator, 2, 3, 4))
    for tree in (state, {"z": state.cell, "a": (state.hidden, None, 9.0 * random(generator, 3, 2))}):
        leaves = [leaf.requires_grad_() for leaf in flatten(tree)[0]]
        for leaf in leaves:
            leaf.grad = None
        penalty = made(0.3, 2.0)(tree)
        excess = [leaf.detach() - leaf.detach().clamp(-3.0, 3.0) for leaf in leaves]
        assert all(e.any() for e in excess)
        close(penalty.detach(), torch.stack([0.3 * 2.0 * 0.5 * e.square().sum() for e in excess]).sum())
        penalty.backward()
        for leaf, e in zip(leaves, excess, strict=True):
            close(grad(leaf), 0.3 * 2.0 * e)


DONE = torch.tensor([False, True, False, False])


@pytest.mark.parametrize("garbage", [50.0, math.inf, -math.inf, math.nan])
def test_rows_that_end_are_not_pushed(garbage, generator):
    state = 5.0 * random(generator, 2, 4, 3)
    state[:, 1] = garbage
    state.requires_grad_()
    penalty = made(0.1, 2.0)(state, DONE)
    others = state.detach()[:, ~DONE]
    excess = others - others.clamp(-3.0, 3.0)
    close(penalty.detach(), 0.1 * 2.0 * 0.5 * excess.square().sum())
    penalty.backward()
    close(grad(state)[:, ~DONE], 0.1 * 2.0 * excess)
    assert not grad(state)[:, 1].any()


def test_the_rms_is_a_constant_and_may_be_given():
    state = STATE.clone().requires_grad_()
    rms = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    penalty = made(0.1, 2.0)
    given = penalty(state, rms=rms)
    close(given.detach(), 0.1 * 7.0 * 0.5 * EXCESS.square().sum())
    given.backward()
    close(grad(state), 0.1 * 7.0 * EXCESS)
    assert rms.grad is None
    assert float(penalty.mean_square) == 4.0


def test_its_slope_is_that_of_its_value(generator):
    """By finite differences."""
    state, direction = 4.0 * random(generator, 2, 4, 3), random(generator, 2, 4, 3)
    penalty = made(0.1, 2.0)
    leaf = state.clone().requires_grad_()
    penalty(leaf, DONE).backward()
    slope = (penalty(state + 1e-6 * direction, DONE) - penalty(state - 1e-6 * direction, DONE)) / 2e-6
    close((grad(leaf) * direction).sum(), slope, rtol=1e-6)


# What it measures.


def test_what_is_measured_is_passed_on_without_its_history(generator):
    producer = random(generator, 3, 4).requires_grad_()
    penalty = made()
    received = feed(penalty.measure, random(generator, 3, 4), producer * 2)
    assert torch.equal(received, producer * 2)
    assert producer.grad is None


@pytest.mark.parametrize("decay", [0.75, 0.99])
def test_its_rms_is_that_of_an_interface(decay, generator):
    """Gradient by gradient, rows that end and gradients that are not finite among them."""
    state = LSTMState(random(generator, 2, 4, 3), random(generator, 2, 4, 3))
    penalty = StatePenalty(0.1, decay=decay).double()
    interface = Interface(MLPSynthesizer(state), decay=decay).double()
    squares = []
    for number in range(12):
        factor = (1.0, 10.0, 0.1, 3.0)[number % 4]
        target = map_tree(lambda leaf, f=factor: f * random(generator, *leaf.shape), state)
        done = DONE if number % 3 == 1 else torch.ones(4, dtype=torch.bool) if number == 6 else None
        if done is not None:
            target.cell[:, 1] = math.nan  # another sequence's
        if number == 5:
            target.hidden[0, 0, 0] = math.inf
        for edge in (penalty.measure, interface.receive):
            feed(edge, target, state, done)
        kept = [leaf if done is None else leaf[:, ~done] for leaf in target]
        if number not in (5, 6):
            squares.append(mean_square(kept))
        assert torch.equal(penalty.mean_square, interface.target_square)
        assert torch.equal(penalty.count, interface.target_count)
        assert float(penalty.mean_square.sqrt()) == pytest.approx(running_size(squares, decay))
    assert float(penalty.count) == len(squares) == 10
    other = StatePenalty(0.5, decay=decay).double()
    other.load_state_dict(penalty.state_dict())
    assert torch.equal(other.mean_square, penalty.mean_square)


def test_rows_may_lie_elsewhere(generator):
    maps, target = 4.0 * random(generator, 4, 2, 3, 5), random(generator, 4, 2, 3, 5)
    penalty = made(0.1, batch_dim=0)
    feed(penalty.measure, target, maps, DONE)
    assert float(penalty.mean_square) == pytest.approx(mean_square([target[~DONE]]))
    leaf = maps.clone().requires_grad_()
    penalty(leaf, DONE).backward()
    excess = (maps - maps.clamp(-3.0, 3.0)).masked_fill(DONE.reshape(4, 1, 1, 1), 0.0)
    close(grad(leaf), 0.1 * float(penalty.mean_square) ** 0.5 * excess)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_no_gradients_are_recorded_it_is_a_detach_and_a_number(mode):
    state = STATE.clone().requires_grad_()
    penalty = made(0.1, 2.0)
    before = copy.deepcopy(penalty.state_dict())
    with mode():
        received, value = penalty.measure(state), penalty(state)
    assert torch.equal(received, state)
    assert not received.requires_grad
    assert not value.requires_grad
    assert float(value) == pytest.approx(0.1 * 2.0 * 0.5 * float(EXCESS.square().sum()))
    close(penalty.state_dict(), before, rtol=0, atol=0)


class Net(nn.Module):
    """An LSTM with a readout; its gates leave a large cell as it is."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.rnn, self.readout = nn.LSTM(3, 4), nn.Linear(4, 2)
        self.double()
        reference.randomize(self, generator, 0.5)
        with torch.no_grad():
            self.rnn.bias_ih_l0[4:8] += 4.0  # pyright: ignore

    def forward(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        outputs, state = self.rnn(x, state)
        return self.readout(outputs), state


def trajectory(
    strength: float,
    factor: float = 1.0,
    scaler: torch.amp.GradScaler | None = None,
    told: bool = True,
    adam: bool = True,
) -> tuple[list[Tensor], float]:
    """A loop as in the docstring, 20 updates: the parameters it comes to, and the RMS."""
    numbers = torch.Generator().manual_seed(3)
    net, penalty = Net(numbers), made(strength)
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(net.parameters(), lr=3e-3, eps=1e-30)
        if adam
        else torch.optim.SGD(net.parameters(), lr=0.01)
    )
    state: Tree = tuple(5.0 * random(numbers, 1, 6, 4) for _ in range(2))
    for _ in range(20):
        if scaler is not None and told:
            penalty.loss_scale = scaler.scale(torch.ones(()))
        x, y = random(numbers, 3, 6, 3), random(numbers, 3, 6, 2)
        outputs, state = net(x, penalty.measure(state))
        loss = factor * (outputs - y).square().mean() + penalty(state)
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return [p.detach() for p in net.parameters()], float(penalty.mean_square.sqrt())


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def test_the_unit_of_the_loss_does_not_change_an_adam_trajectory():
    plain, rms = trajectory(3.0)
    thousand, larger = trajectory(3.0, factor=1000.0)
    close(plain, thousand, rtol=1e-6, atol=1e-8)
    assert larger / rms == pytest.approx(1000.0, rel=1e-8)
    assert apart(plain, trajectory(0.0)[0]) > 1e-3  # the penalty took part


def test_a_loss_scaler_changes_nothing_when_the_penalty_is_told():
    """Powers of two, so bit for bit; the scale doubles after every second step."""

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)

    plain, rms = trajectory(3.0, adam=False)
    told, same = trajectory(3.0, scaler=scaler(), adam=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, told, strict=True))
    assert rms == same
    untold, larger = trajectory(3.0, scaler=scaler(), told=False, adam=False)
    assert larger > 1000 * rms
    assert apart(plain, untold) > 1e-3


class Together:
    """All-reduce among threads, each of which calls it once per backward pass."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.given = (
            size,
            threading.Barrier(size, timeout=30),
            [torch.zeros(0)] * size,
        )

    def of(self, rank: int) -> Callable[[Tensor], Tensor]:
        def all_reduce(tensor: Tensor) -> Tensor:
            self.given[rank] = tensor
            self.barrier.wait()
            total = torch.stack(self.given).sum(0)
            self.barrier.wait()
            return total

        return all_reduce


@pytest.mark.parametrize("some_done", [False, True])
def test_rows_spread_over_processes_give_what_all_give_together(some_done, generator):
    """Three rows here and one there: the RMS is that of all rows, and so the sum of gradients."""
    state = LSTMState(4.0 * random(generator, 2, 4, 3), 4.0 * random(generator, 2, 4, 3))
    targets = [map_tree(lambda leaf: random(generator, *leaf.shape), state) for _ in range(3)]
    done = torch.tensor([False, True, False, True]) if some_done else None
    together, shares = Together(2), [slice(0, 3), slice(3, 4)]
    whole, parts = made(0.1), [made(0.1), made(0.1)]
    found: list[list[Tensor]] = [[], []]

    def work(rank: int) -> None:
        rows = shares[rank]
        parts[rank].all_reduce = together.of(rank)
        here = None if done is None else done[rows]
        own = map_tree(lambda leaf: leaf[:, rows], state)
        for target in targets:
            feed(parts[rank].measure, map_tree(lambda leaf: leaf[:, rows], target), own, here)
        leaves = [leaf.clone().requires_grad_() for leaf in own]
        parts[rank](LSTMState(*leaves), here).backward()
        found[rank] = [grad(leaf) for leaf in leaves]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for target in targets:
        feed(whole.measure, target, state, done)
    leaves = [leaf.clone().requires_grad_() for leaf in state]
    whole(LSTMState(*leaves), done).backward()
    for part in parts:
        close(part.mean_square, whole.mean_square)
        close(part.count, whole.count)
    for number, leaf in enumerate(leaves):
        close(torch.cat([found[0][number], found[1][number]], dim=1), grad(leaf))
        assert grad(leaf).any()


# In the estimators, against slow equations.

STRENGTH = 20.0
"""So much that what few steps and small nets leave beyond the bound is a good part of the gradient."""


def run_away(kind: str, generator: torch.Generator, resets: bool) -> reference.Problem:
    """Windows of different lengths, begun far beyond the bound by a net that stays there a while."""
    problem = reference.random_problem(
        kind, generator, layers=2, steps=9, window=(2, 1, 4, 2), resets=resets, unscored=True
    )
    return problem._replace(state=tuple(12.0 * leaf for leaf in problem.state))


def excess_of(state: reference.State, done: Tensor | None) -> reference.State:
    """What lies beyond ±3, none in rows of `done`."""
    keep = 1.0 if done is None else (~done).to(torch.float64).reshape(1, -1, 1)
    return tuple((leaf - leaf.clamp(-3.0, 3.0)) * keep for leaf in state)


def alive_square(target: reference.State, done: Tensor | None) -> float:
    """Mean square over the rows that go on."""
    return mean_square([leaf if done is None else leaf[:, ~done] for leaf in target])


def by_hand(
    problem: reference.Problem,
    windows: list[Any],
    strength: float,
    said: Callable[[int, reference.State, float], reference.State],
) -> tuple[reference.Parameters, float]:
    """Window by window: the gradient of the weights, and the RMS of what arrived at the starts."""
    carried, squares, rms, nets = reference.states(problem), [], 0.0, []
    for number, window in enumerate(windows):
        start, end = reference.reset(carried[number], window.start.done), carried[number + 1]
        pushed = [strength * rms * leaf for leaf in excess_of(end, window.end.done)]
        injected = [s + p for s, p in zip(said(number, end, rms), pushed, strict=True)]
        net, target = reference.injected(problem, number, start, tuple(injected), WEIGHT)
        nets.append(net)
        squares.append(alive_square(target, window.start.done))
        rms = running_size(squares)
    return reference.add(*nets), rms


def some_end(resets: bool) -> Tensor | None:
    return torch.tensor([False, True, False]) if resets else None


kinds = pytest.mark.parametrize("kind", ["lstm", "gru"])
with_and_without_resets = pytest.mark.parametrize("resets", [False, True])


@kinds
@with_and_without_resets
def test_truncated_bptt_with_a_penalty_by_hand(kind, resets, generator):
    problem = run_away(kind, generator, resets)
    windows = library(problem, end=some_end(resets))
    nothing = tuple(map(torch.zeros_like, problem.state))
    wanted, rms = by_hand(problem, windows, STRENGTH, lambda *_: nothing)
    penalty, model = made(STRENGTH), build(problem)
    estimate = TruncatedBPTT(penalty)(model, windows, as_message(problem), WEIGHT)
    close(net_gradients(model), wanted)
    assert float(penalty.mean_square.sqrt()) == pytest.approx(rms, rel=1e-9)
    # It is a good part of the gradient, and no part of the loss that is reported.
    assert distance(wanted, scaled(reference.truncated_bptt(problem))) > 0.05
    loss, state = reference.total_loss(kind, problem.parameters, problem.windows, problem.state)
    close(estimate.loss, loss)
    close(tuple(flatten(estimate.state)[0]), state)


@kinds
@with_and_without_resets
@pytest.mark.parametrize("normalize", [True, False])
def test_dni_with_a_penalty_takes_the_rms_of_its_interface(kind, resets, normalize, generator):
    problem = run_away(kind, generator, resets)
    windows = library(problem, end=some_end(resets))
    synthesizer = random_synthesizer(problem, generator)
    example = flatten(as_message(problem))[0]

    def said(number: int, end: reference.State, rms: float) -> reference.State:
        done, steps = windows[number].end.done, len(windows[number].inputs)
        keep = 1.0 if done is None else (~done).to(torch.float64).reshape(1, -1, 1)
        with torch.no_grad():
            rows = laid_out(synthesizer(as_message(problem, end)), example)
        unit = rms if normalize else 1.0
        return tuple(0.7 * 0.9**steps * unit * keep * leaf for leaf in rows)

    wanted, rms = by_hand(problem, windows, STRENGTH, said)
    penalty, model = made(STRENGTH), build(problem, copy.deepcopy(synthesizer), scale=0.7)
    assert model.core.interface is not None
    model.core.interface.normalize = normalize
    DNI(discount=0.9, penalty=penalty)(model, windows, as_message(problem), WEIGHT)
    close(net_gradients(model), wanted)
    assert float(model.core.interface.target_square.sqrt()) == pytest.approx(rms, rel=1e-9)
    assert float(penalty.count) == 0.0  # it measures nothing itself
    without, _ = by_hand(problem, windows, 0.0, said)
    assert distance(without, wanted) > 0.05


@kinds
@with_and_without_resets
def test_zero_dni_with_a_penalty_is_truncated_bptt_with_it_bit_for_bit(kind, resets, generator):
    problem = run_away(kind, generator, resets)
    windows = library(problem, end=some_end(resets))
    model, plain = build(problem, MLPSynthesizer(as_message(problem), [6])), build(problem)
    one, other = DNI(penalty=made(STRENGTH)), TruncatedBPTT(made(STRENGTH))
    for _ in range(2):
        one(model, windows, as_message(problem), WEIGHT)
        other(plain, windows, as_message(problem), WEIGHT)
    got, wanted = net_gradients(model), net_gradients(plain)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert model.core.interface is not None
    assert other.penalty is not None
    assert torch.equal(model.core.interface.target_square, other.penalty.mean_square)
    assert distance(wanted, scaled(reference.truncated_bptt(problem), 2 * WEIGHT)) > 0.05


@kinds
@with_and_without_resets
def test_full_bptt_with_a_penalty_by_hand(kind, resets, generator):
    """At the end of every window; the RMS is that of the calls before, of the gradient at their starts."""
    problem = run_away(kind, generator, resets)
    ends = [w.done for w in problem.windows[1:]] + [some_end(resets)]
    windows = library(problem, end=some_end(resets))
    penalty, model = made(STRENGTH), build(problem)
    squares, rms = [], 0.0
    for _ in range(3):
        p = reference.leaves(problem.parameters)
        start = tuple(reference.leaf(leaf) for leaf in problem.state)
        state, total = start, problem.state[0].new_zeros(())
        for window, done in zip(problem.windows, ends, strict=True):
            outputs, state = reference.unroll(kind, p, window, reference.reset(state, window.done))
            total = total + WEIGHT * reference.window_loss(p, window, outputs)
            pushed = [e.square().sum() for e in excess_of(state, done)]
            total = total + STRENGTH * rms * 0.5 * torch.stack(pushed).sum()
        found = torch.autograd.grad(total, [*p.values(), *start])
        wanted = dict(zip(p, found, strict=False))
        model.zero_grad()
        estimate = FullBPTT(penalty)(model, windows, as_message(problem), WEIGHT)
        close(net_gradients(model), wanted)
        loss, _ = reference.total_loss(kind, problem.parameters, problem.windows, problem.state)
        close(estimate.loss, loss)
        squares.append(alive_square(found[len(p) :], problem.windows[0].done))
        rms = running_size(squares)
        assert float(penalty.mean_square.sqrt()) == pytest.approx(rms, rel=1e-9)
    assert distance(wanted, scaled(reference.full_bptt(problem))) > 0.05


@kinds
def test_full_and_truncated_are_the_same_of_one_window(kind, generator):
    problem = reference.random_problem(kind, generator, window=12)
    problem = problem._replace(state=tuple(24.0 * leaf for leaf in problem.state))
    found = []
    for estimator in (FullBPTT(made(0.5, 2.0)), TruncatedBPTT(made(0.5, 2.0))):
        model = build(problem)
        estimator(model, library(problem), as_message(problem), WEIGHT)
        found.append((net_gradients(model), estimator.state_dict()))
    close(found[0], found[1])


def test_it_turns_a_runaway_state_back():
    """A net whose objective drives its cell away: without the penalty it goes, with it it stays."""

    def run(strength: float) -> float:
        drive = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        penalty, state = made(strength), torch.zeros(1, 2, 1, dtype=torch.float64)
        optimizer = torch.optim.SGD([drive], lr=0.05)
        for _ in range(300):
            state = penalty.measure(state)
            state = 0.99 * state + drive
            optimizer.zero_grad()
            (-state.sum() + penalty(state)).backward()
            optimizer.step()
        return float(flatten_rows(state.detach()).abs().max())

    assert run(0.0) > 1000.0
    assert run(1.0) < 10.0
