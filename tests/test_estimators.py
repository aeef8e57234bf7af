"""Estimators and recurrent cores: one harness for all, against slow equations."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import Problem, close, distance, grad, gradients, laid_out, random, randomize, running_size
from torch import Tensor, nn

from dni_rnn.cli import main
from dni_rnn.config import RecurrentConfig
from dni_rnn.cores.gru import GRU
from dni_rnn.cores.lstm import LSTM
from dni_rnn.cores.rnn import RNN
from dni_rnn.estimators import Estimator
from dni_rnn.estimators.bptt import TruncatedBPTT
from dni_rnn.estimators.dni import DNI
from dni_rnn.estimators.full import FullBPTT
from dni_rnn.estimators.lookahead import LookaheadBPTT
from dni_rnn.interface import Interface
from dni_rnn.pytree import LSTMState, Tree, flatten, map_tree, unflatten
from dni_rnn.recurrent import RecurrentCore, SequenceModel
from dni_rnn.synthesizers import ContextMLP, MLPSynthesizer, OneHotTokens
from dni_rnn.training.checkpoint import load_checkpoint
from dni_rnn.training.recurrent import RecurrentLearner
from dni_rnn.window import UNSCORED, Boundary, Window, window_loss
from dni_rnn_tasks.repeat import Copy

WEIGHT = 0.37
CONTEXT = 3
KINDS: dict[str, Callable[..., Any]] = {"lstm": LSTM, "gru": GRU, "rnn": RNN}
TORCHS: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CORES = [(kind, layers) for kind in KINDS for layers in (1, 2)]
every_core = pytest.mark.parametrize(("kind", "layers"), CORES)


class Answers(nn.Module):
    """M(state, context) = the given gradient of the boundary whose number the context holds.

    Rows of `done` are spoilt: that they stay out is the library's business.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.answers = []
        for number, gradient in enumerate(reference.state_gradients(problem)):
            done = problem.windows[number].done if number < len(problem.windows) else None
            spoilt = torch.zeros(gradient[0].shape[1]) if done is None else 100.0 * done
            self.answers.append(tuple(leaf + spoilt.to(leaf.dtype).reshape(1, -1, 1) for leaf in gradient))

    def forward(self, message: Tree, context: Tensor) -> Tree:
        spec = flatten(message)[1]
        return unflatten(list(self.answers[int(context[0, 0])]), spec)


def library(problem: Problem, context: int = 0, end: Tensor | None = None) -> list[Window]:
    """The same windows for the library, each boundary with the next `context` symbols. `end`: its `done`."""
    inputs = torch.cat([window.inputs for window in problem.windows])
    unknown = torch.full((context, inputs.shape[1]), -1)
    padded = torch.cat([inputs, unknown])
    boundaries, position = [], 0
    for window in problem.windows:
        following = padded[position : position + context] if context else None
        boundaries.append(Boundary(following, window.done))
        position += len(window.inputs)
    boundaries.append(Boundary(unknown if context else None, end))
    return [
        Window(w.inputs, w.targets, start, after, int((w.targets != UNSCORED).sum()))
        for w, start, after in zip(problem.windows, boundaries, boundaries[1:], strict=False)
    ]


def numbered(windows: list[Window]) -> list[Window]:
    """The context of every boundary is its number."""

    def number(boundary: Boundary, n: int) -> Boundary:
        return boundary._replace(context=torch.full((1, windows[0].inputs.shape[1]), n))

    return [w._replace(start=number(w.start, n), end=number(w.end, n + 1)) for n, w in enumerate(windows)]


def build(problem: Any, synthesizer: nn.Module | None = None, **options: Any) -> SequenceModel:
    """The library's model with the problem's weights; `options` are those of the interface."""
    (symbols, embedding), hidden = (
        problem.parameters["embedding.weight"].shape,
        problem.parameters["readout.weight"].shape[1],
    )
    rnn = KINDS[problem.kind](embedding, hidden, problem.state[0].shape[0])
    core = RecurrentCore(rnn, None if synthesizer is None else Interface(synthesizer, **options))
    model = SequenceModel(symbols, symbols, embedding, core).double()
    weights = {_theirs(name): tensor for name, tensor in problem.parameters.items()}
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert all(".interface." in name for name in missing.missing_keys)
    return model


def _theirs(name: str) -> str:
    return f"core.{name}" if name.startswith("rnn.") else name


def net_gradients(model: SequenceModel) -> reference.Parameters:
    """Under the oracle's names."""
    return {
        name.removeprefix("core."): g for name, g in gradients(model).items() if ".interface." not in name
    }


def as_message(problem: Problem, state: reference.State | None = None) -> Tree:
    state = problem.state if state is None else state
    return LSTMState(*state) if problem.kind == "lstm" else state[0]


def scaled(p: reference.Parameters, factor: float = WEIGHT) -> reference.Parameters:
    return {name: factor * tensor for name, tensor in p.items()}


def random_synthesizer(
    problem: Problem, generator: torch.Generator, context: int = 0, hidden: tuple[int, ...] = (6,)
) -> MLPSynthesizer:
    symbols = len(problem.parameters["readout.bias"])
    encoder = OneHotTokens(symbols, context) if context else None
    synthesizer = MLPSynthesizer(as_message(problem), hidden, context=encoder).double()
    randomize(synthesizer, generator)
    if encoder is not None:
        with torch.no_grad():
            encoder.table.weight[-1].zero_()  # the padding
    return synthesizer


# The harness: everything that holds for every estimator.


class Case(NamedTuple):
    """An estimator with the model it works on."""

    name: str
    dni: bool = False
    context: int = 0
    aux: bool = False


CASES = [Case("full"), Case("truncated")] + [
    Case("dni", True, context, aux) for context in (0, CONTEXT) for aux in (False, True)
]
every_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.name}-{c.context}{'-aux' * c.aux}" if c.dni else c.name
)


def random_aux(problem: Problem, generator: torch.Generator, context: int) -> ContextMLP:
    symbols, hidden = problem.parameters["readout.weight"].shape
    features = sum(leaf.shape[0] * leaf.shape[2] for leaf in problem.state)
    aux = ContextMLP(hidden, [5], features, OneHotTokens(symbols, context) if context else None).double()
    randomize(aux, generator)
    return aux


def make(case: Case, problem: Problem, generator: torch.Generator) -> tuple[Estimator, SequenceModel]:
    if not case.dni:
        return (FullBPTT() if case.name == "full" else TruncatedBPTT()), build(problem)
    aux = random_aux(problem, generator, case.context) if case.aux else None
    synthesizer = random_synthesizer(problem, generator, case.context)
    return DNI(aux), build(problem, synthesizer)


@every_case
@pytest.mark.parametrize("kind", list(KINDS))
def test_windows_with_carried_state_are_one_long_window(case, kind, generator):
    """In the loss and the final state; weights are loaded, so this is torch's forward against ours too."""
    problem = reference.random_problem(kind, generator, layers=2, window=3, unscored=True)
    whole = problem._replace(
        windows=[
            reference.Window(
                torch.cat([w.inputs for w in problem.windows]),
                torch.cat([w.targets for w in problem.windows]),
            )
        ]
    )
    loss, state = reference.total_loss(kind, problem.parameters, problem.windows, problem.state)
    for each in (problem, whole):
        estimator, model = make(case, each, generator)
        estimate = estimator(model, library(each, case.context), as_message(each), WEIGHT)
        close(estimate.loss, loss)
        close(tuple(flatten(estimate.state)[0]), state)
        assert type(estimate.state) is type(model.initial_state(3))
        assert not any(leaf.requires_grad for leaf in [estimate.loss, *flatten(estimate.state)[0]])


@every_case
def test_gradients_are_added_to_those_that_are_there(case, generator):
    problem = reference.random_problem("lstm", generator)
    estimator, model = make(case, problem, generator)
    windows, state = library(problem, case.context), as_message(problem)
    again = copy.deepcopy(model)
    estimator(model, windows, state, WEIGHT)
    first = gradients(model)
    assert all(bool(g.any()) for g in first.values())
    for parameter in again.parameters():
        parameter.grad = torch.full_like(parameter, 5.0)
    estimator(again, windows, state, WEIGHT)
    close(gradients(again), {name: g + 5.0 for name, g in first.items()})


@every_case
def test_rows_do_not_meet(case, generator):
    """A batch's gradient is the sum of what its rows give alone (M in fixed units, so that it can be)."""
    problem = reference.random_problem("gru", generator, rows=3, unscored=True, resets=True)
    estimator, model = make(case, problem, generator)
    if model.core.interface is not None:
        model.core.interface.normalize = False
    estimator(model, library(problem, case.context), as_message(problem), WEIGHT)
    alone = []
    for row in range(3):
        part = problem._replace(
            windows=[
                reference.Window(*[field[..., row : row + 1] for field in w if field is not None])
                for w in problem.windows
            ],
            state=tuple(leaf[:, row : row + 1] for leaf in problem.state),
        )
        model_of_one = copy.deepcopy(model)
        model_of_one.zero_grad()
        estimator(model_of_one, library(part, case.context), as_message(part), WEIGHT)
        alone.append(net_gradients(model_of_one))
    close(net_gradients(model), reference.add(*alone))


# Full and truncated.


@every_core
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("window", [1, 3, 12])
def test_full_and_truncated_bptt_are_the_reference(kind, layers, window, resets, generator):
    problem = reference.random_problem(
        kind, generator, layers=layers, window=window, resets=resets, unscored=True
    )
    full, truncated = reference.full_bptt(problem), reference.truncated_bptt(problem)
    loss, state = reference.total_loss(kind, problem.parameters, problem.windows, problem.state)
    for estimator, wanted in ((FullBPTT(), full), (TruncatedBPTT(), truncated)):
        model = build(problem)
        estimate = estimator(model, library(problem), as_message(problem), WEIGHT)
        close(net_gradients(model), scaled(wanted))
        close(estimate.loss, loss)
        close(tuple(flatten(estimate.state)[0]), state)
    if window < 12:
        assert distance(truncated, full) > 0.05
    else:
        close(truncated, full)


@every_case
def test_one_window_is_full_bptt_when_the_sequence_ends_with_it(case, generator):
    """Whatever M says. (Not with the auxiliary task, whose gradient is there as well.)"""
    if case.aux:
        case = case._replace(aux=False)
    problem = reference.random_problem("lstm", generator, window=12)
    estimator, model = make(case, problem, generator)
    if model.core.interface is not None:
        model.core.interface.normalize = False  # in units of a size, it would say zero at first anyway
    windows = library(problem, case.context, end=torch.ones(3, dtype=torch.bool))
    estimator(model, windows, as_message(problem), WEIGHT)
    close(net_gradients(model), scaled(reference.full_bptt(problem)))


def test_the_loss_is_a_sum_in_nats_over_scored_targets():
    logits = torch.zeros(3, 2, 7, dtype=torch.float64)
    targets = torch.tensor([[0, UNSCORED], [3, 6], [UNSCORED, UNSCORED]])
    close(window_loss(logits, targets), torch.tensor(3 * math.log(7.0), dtype=torch.float64))
    assert window_loss(logits, torch.full((3, 2), UNSCORED)).item() == 0.0


# DNI.


@every_core
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("window", [1, 4])
def test_oracle_dni_is_full_bptt(kind, layers, resets, window, generator):
    problem = reference.random_problem(
        kind, generator, layers=layers, window=window, resets=resets, unscored=True
    )
    full = reference.full_bptt(problem)
    assert distance(reference.truncated_bptt(problem), full) > 0.05
    model = build(problem, Answers(problem), normalize=False)
    DNI()(model, numbered(library(problem)), as_message(problem), 1.0)
    close(net_gradients(model), full)


@every_core
@pytest.mark.parametrize("context", [0, CONTEXT])
def test_fresh_dni_is_truncated_bptt_bit_for_bit(kind, layers, context, generator):
    problem = reference.random_problem(kind, generator, layers=layers, resets=True, unscored=True)
    encoder = OneHotTokens(5, context) if context else None
    synthesizer = MLPSynthesizer(as_message(problem), [6], context=encoder)
    model, plain = build(problem, synthesizer), build(problem)
    estimates = [
        estimator(m, library(problem, context), as_message(problem), WEIGHT)
        for estimator, m in ((DNI(), model), (TruncatedBPTT(), plain))
    ]
    got, wanted = net_gradients(model), net_gradients(plain)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert torch.equal(estimates[0].loss, estimates[1].loss)
    assert distance(wanted, scaled(reference.full_bptt(problem))) > 0.05
    # Only M's last layer can learn yet, and it does.
    assert grad(synthesizer.mlp.get_parameter("layers.1.weight")).any()


class ByHand(NamedTuple):
    net: reference.Parameters
    synthesizer: list[Tensor]
    aux: list[Tensor]
    size: float


def dni_by_hand(
    problem: Problem,
    windows: list[Window],
    synthesizer: nn.Module,
    *,
    normalize: bool,
    scale: float,
    discount: float,
    aux: nn.Module | None,
    aux_weight: float,
) -> ByHand:
    """The docstrings of `DNI` and `Interface` as arithmetic, window by window."""
    carried, squares, size = reference.states(problem), [], 0.0 if normalize else 1.0
    nets, theirs, auxes = [], [], []
    rows, parameters = problem.state[0].shape[1], list(synthesizer.parameters())

    def says(state: reference.State, at: Boundary) -> reference.State:
        message = as_message(problem, state)
        return tuple(laid_out(synthesizer(message, at.context), flatten(message)[0]))

    def living(boundary: Boundary) -> Tensor:
        done = torch.zeros(rows, dtype=torch.bool) if boundary.done is None else boundary.done
        return (~done).to(torch.float64).reshape(1, -1, 1)

    def side_by_side(state: reference.State) -> Tensor:
        return torch.cat([torch.cat(list(leaf), dim=1) for leaf in state], dim=1)

    for number, window in enumerate(windows):
        start = reference.reset(carried[number], window.start.done)
        with torch.no_grad():
            said = tuple(leaf * living(window.end) for leaf in says(carried[number + 1], window.end))

        def extra(outputs: list[Tensor], window: Window = window, said: reference.State = said) -> Tensor:
            assert aux is not None
            errors = aux(outputs[0], window.start.context) - side_by_side(said)
            return aux_weight * window.targets.numel() * WEIGHT * errors.square().mean()

        net, target = reference.injected(
            problem,
            number,
            start,
            tuple(scale * discount ** len(window.inputs) * size * leaf for leaf in said),
            WEIGHT,
            None if aux is None else extra,
        )
        nets.append(net)
        if aux is not None:
            with torch.no_grad():
                outputs = reference.unroll(problem.kind, problem.parameters, problem.windows[number], start)[
                    0
                ]
            auxes.append(torch.autograd.grad(extra(outputs), list(aux.parameters())))

        alive = living(window.start)
        if not alive.any():
            continue
        elements = float(alive.sum()) * sum(leaf[:, 0].numel() for leaf in target)
        if normalize:
            squares.append(sum(float((leaf * alive).square().sum()) for leaf in target) / elements)
            size = running_size(squares)
        errors = [(p - g / size) * alive for p, g in zip(says(start, window.start), target, strict=True)]
        loss = torch.stack([error.square().sum() for error in errors]).sum() / elements
        theirs.append(torch.autograd.grad(loss, parameters))

    def total(parts: list[Any], like: list[nn.Parameter]) -> list[Tensor]:
        return [torch.stack([part[i] for part in parts]).sum(0) for i in range(len(like))]

    return ByHand(
        reference.add(*nets),
        total(theirs, parameters),
        [] if aux is None else total(auxes, list(aux.parameters())),
        size,
    )


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("context", [0, CONTEXT])
@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("window", "discount"), [(2, 1.0), ((3, 1, 2, 2), 0.9)], ids=str)
def test_dni_by_hand(kind, context, aux, resets, normalize, window, discount, generator):
    problem = reference.random_problem(
        kind, generator, layers=2, steps=8, window=window, resets=resets, unscored=True
    )
    end = torch.tensor([False, True, False]) if resets else None
    windows = library(problem, context, end)
    synthesizer = random_synthesizer(problem, generator, context)
    helper = random_aux(problem, generator, context) if aux else None
    model = build(problem, synthesizer, scale=0.7, normalize=normalize)
    DNI(helper, 0.3, discount=discount)(model, windows, as_message(problem), WEIGHT)

    own = copy.deepcopy(synthesizer)
    wanted = dni_by_hand(
        problem,
        windows,
        own,
        normalize=normalize,
        scale=0.7,
        discount=discount,
        aux=copy.deepcopy(helper),
        aux_weight=0.3,
    )
    close(net_gradients(model), wanted.net)
    close([grad(p) for p in synthesizer.parameters()], wanted.synthesizer)
    if helper is not None:
        close([grad(p) for p in helper.parameters()], wanted.aux)
    assert model.core.interface is not None
    assert float(model.core.interface.target_rms()) == pytest.approx(wanted.size, rel=1e-9)
    # The synthetic gradient is a good part of the result.
    assert distance(wanted.net, scaled(reference.truncated_bptt(problem))) > 0.05


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_the_future_is_discounted_by_the_steps_of_this_window(kind, generator):
    """Windows of 5, 1 and 2 steps: with γ = 1/2 what they send is 1/32, 1/2 and 1/4 of what M says."""
    problem = reference.random_problem(kind, generator, steps=8, window=(5, 1, 2))
    synthesizer = random_synthesizer(problem, generator)
    leaves = flatten(as_message(problem))[0]
    for number, factor in enumerate((1 / 32, 1 / 2, 1 / 4)):
        model = build(problem, synthesizer, scale=0.7, normalize=False)
        state = reference.states(problem)[number]
        window = library(problem)[number]
        after = reference.states(problem)[number + 1]
        with torch.no_grad():
            said = laid_out(synthesizer(as_message(problem, after)), leaves)
        injected = tuple(0.7 * factor * leaf for leaf in said)
        wanted = reference.injected(problem, number, state, injected, WEIGHT)[0]
        DNI(discount=0.5)(model, [window], as_message(problem, state), WEIGHT)
        close(net_gradients(model), wanted)
        undiscounted = tuple(0.7 * leaf for leaf in said)
        plain = reference.injected(problem, number, state, undiscounted, WEIGHT)[0]
        assert distance(plain, wanted) > 0.05


# The auxiliary task.


def test_the_auxiliary_task_reaches_the_core_and_not_the_synthesizer(generator):
    problem = reference.random_problem("lstm", generator, window=12)
    synthesizer = random_synthesizer(problem, generator)
    aux = random_aux(problem, generator, 0)
    with_aux = build(problem, copy.deepcopy(synthesizer), normalize=False)
    without = build(problem, copy.deepcopy(synthesizer), normalize=False)
    start = torch.ones(3, dtype=torch.bool)  # nothing to learn for M at the start, so all it got is from aux
    window = library(problem)[0]
    window = window._replace(start=window.start._replace(done=start))
    DNI(aux, 0.3)(with_aux, [window], as_message(problem), WEIGHT)
    DNI()(without, [window], as_message(problem), WEIGHT)
    assert with_aux.core.interface is not None
    assert not any(bool(p.grad.any()) for p in with_aux.core.interface.parameters() if p.grad is not None)
    got, plain = net_gradients(with_aux), net_gradients(without)
    assert distance(got, plain) > 0.01
    # It is on the first output alone: the readout sees nothing of it, the embedding only the first symbols.
    close(got["readout.weight"], plain["readout.weight"])
    changed = (got["embedding.weight"] - plain["embedding.weight"]).abs().sum(1) > 0
    assert set(changed.nonzero().flatten().tolist()) == set(window.inputs[0].tolist())


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_the_auxiliary_task_in_numbers(kind, generator):
    """A constant M and a constant A: A's gradient is aux_weight·T·B·weight·2(A − M)/n, row by row."""

    class Ones(nn.Module):
        def forward(self, message: Tree, context: Any) -> Tree:
            return map_tree(torch.ones_like, message)

    class Threes(nn.Module):
        def __init__(self, features: int) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.full((3, features), 3.0, dtype=torch.float64))

        def forward(self, output: Tensor, context: Any) -> Tensor:
            assert output.shape == (3, 4)
            return self.value

    problem = reference.random_problem(kind, generator, layers=2, window=12)
    features = 2 * 4 * (2 if kind == "lstm" else 1)
    aux = Threes(features)
    DNI(aux, 0.3)(build(problem, Ones()), library(problem), as_message(problem), WEIGHT)
    number = 0.3 * 12 * 3 * WEIGHT * 2 * (3.0 - 1.0) / (3 * features)
    close(grad(aux.value), torch.full((3, features), number, dtype=torch.float64))


# What goes through the core's interface.


def test_a_context_reaches_the_synthesizer_row_by_row(generator):
    problem = reference.random_problem("gru", generator)
    model = build(problem, random_synthesizer(problem, generator, CONTEXT), normalize=False)
    symbols = torch.tensor([[0, 1, 2], [3, 4, 0], [1, 2, -1]])
    changed = symbols.clone()
    changed[2, 1] = 4
    inputs = random(generator, 2, 3, 3)
    one, other = (
        model.core.emit(inputs, as_message(problem), Boundary(context)).synthetic_gradient
        for context in (symbols, changed)
    )
    assert (~torch.isclose(one, other).all(dim=0).all(dim=-1)).tolist() == [False, True, False]


def test_a_core_without_an_interface_says_so(generator):
    problem = reference.random_problem("gru", generator)
    model = build(problem)
    with pytest.raises(ValueError, match="core has no interface"):
        DNI()(model, library(problem), as_message(problem), WEIGHT)
    with pytest.raises(ValueError, match="core has no interface"):
        model.core.emit(random(generator, 2, 3, 3), as_message(problem), Boundary())


def test_a_trace_of_no_model_or_another_is_refused(generator):
    problem = reference.random_problem("lstm", generator)
    model, windows = build(problem), library(problem)
    estimator = TruncatedBPTT(trace="all")
    for begun in (None, build(problem)):
        if begun is not None:
            estimator.begin(begun, windows[0].inputs.shape[1])
        with pytest.raises(ValueError, match=r"call begin\(model, rows\)"):
            estimator(model, windows, as_message(problem), WEIGHT)


class CountingCell(nn.Module):
    """A core whose gain depends on the number of steps since a row began."""

    output_size, output_leaf = 3, "h"

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(2, 3)

    def initial_state(self, batch_size: int) -> Tree:
        h = next(self.parameters()).new_zeros(batch_size, 3)
        return {"h": h, "steps": torch.zeros(batch_size, 1, dtype=torch.long)}

    def forward(self, inputs: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        h, steps, outputs = state["h"], state["steps"], []
        for x in inputs:
            h, steps = self.cell(x * (1 + steps % 3), h), steps + 1
            outputs.append(h)
        return torch.stack(outputs), {"h": h, "steps": steps}


def test_integers_of_a_state_begin_anew_with_their_row(generator):
    """And what looks ahead passes by them: to the end, it is full BPTT."""
    model = SequenceModel(4, 4, 2, RecurrentCore(CountingCell())).double()
    randomize(model, generator)
    x, y = torch.randint(4, (2, 6, 3), generator=generator)
    done = torch.tensor([False, True, False])
    edges = [Boundary(), Boundary(done=done), Boundary(), Boundary()]
    windows = [Window(x[2 * k :][:2], y[2 * k :][:2], edges[k], edges[k + 1], 6) for k in range(3)]
    found = []
    for estimator in (FullBPTT(), LookaheadBPTT(9)):
        model.zero_grad()
        end = estimator(model, windows, model.initial_state(3), WEIGHT).state
        assert end["steps"].flatten().tolist() == [6, 4, 6]
        found.append(net_gradients(model))
    close(found[1], found[0])


def test_an_estimator_remembers_nothing_unless_it_says_so(generator):
    problem = reference.random_problem("gru", generator)
    model = build(problem, random_synthesizer(problem, generator))
    for estimator in (Estimator(), FullBPTT(), TruncatedBPTT(), DNI()):
        estimator.begin(model, 3)
        if type(estimator) is not Estimator:
            estimator(model, library(problem), as_message(problem), WEIGHT)
        assert estimator.memory() == {}
    with pytest.raises(NotImplementedError):
        Estimator()(model, library(problem), as_message(problem), WEIGHT)


# The core.


@every_core
def test_torch_weights_go_in_and_out(kind, layers, generator):
    theirs = TORCHS[kind](3, 4, layers)
    randomize(theirs.double(), generator)
    rnn = KINDS[kind](3, 4, layers)
    core = RecurrentCore(rnn).double()
    rnn.load_state_dict(theirs.state_dict())
    inputs, state = random(generator, 6, 2, 3), core.initial_state(2)
    with torch.no_grad():
        for mine, wanted in zip(core(inputs, state), theirs(inputs), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(flatten(mine)[0], flatten(wanted)[0], strict=True))
        out = TORCHS[kind](3, 4, layers).double()
        out.load_state_dict(rnn.state_dict())
        assert torch.equal(out(inputs)[0], theirs(inputs)[0])
    assert theirs(inputs)[0].any()


@every_core
def test_the_initial_state_is_zero_of_the_right_type(kind, layers):
    state = RecurrentCore(KINDS[kind](3, 4, layers)).double().initial_state(5)
    assert isinstance(state, LSTMState) == (kind == "lstm")
    for leaf in flatten(state)[0]:
        assert leaf.shape == (layers, 5, 4)
        assert leaf.dtype == torch.float64
        assert not leaf.any()


@every_core
def test_emit_is_forward_and_the_synthetic_gradient(kind, layers, generator):
    problem = reference.random_problem(kind, generator, layers=layers)
    core = build(problem, random_synthesizer(problem, generator), scale=0.5).core
    interface = core.interface
    assert interface is not None
    inputs = random(generator, 6, 3, 3)
    received = flatten(interface.receive(as_message(problem)))[0]
    torch.stack([2.0 * leaf.sum() for leaf in received]).sum().backward()  # a target of RMS 2
    done = torch.tensor([False, True, False])
    emitted = core.emit(inputs, as_message(problem), Boundary(done=done))
    output, state = core(inputs, as_message(problem))
    assert torch.equal(emitted.output, output)
    assert type(emitted.state) is type(emitted.synthetic_gradient) is type(state)
    close(flatten(emitted.state)[0], flatten(state)[0], rtol=0, atol=0)
    predicted = flatten(interface.predict(state, done=done))[0]
    given_back = map_tree(lambda leaf: leaf.detach().requires_grad_(), state)
    interface.send(given_back, done=done).backward()
    for leaf, p, sent in zip(
        flatten(emitted.synthetic_gradient)[0], predicted, flatten(given_back)[0], strict=True
    ):
        close(leaf, 0.5 * 2.0 * p)
        close(leaf, grad(sent))
        assert leaf.shape == (layers, 3, 4)
        assert not leaf.requires_grad
        assert not leaf[:, 1].any()
        assert leaf[:, 0].any()


def test_the_parameters_of_net_and_synthesizer_are_all_and_apart(generator):
    problem = reference.random_problem("lstm", generator)
    synthesizer = random_synthesizer(problem, generator)
    model = build(problem, synthesizer)
    net, theirs = model.net_parameters(), model.synthesizer_parameters()
    assert {id(p) for p in theirs} == {id(p) for p in synthesizer.parameters()}
    assert {id(p) for p in net} | {id(p) for p in theirs} == {id(p) for p in model.parameters()}
    assert len(net) + len(theirs) == len(list(model.parameters()))
    assert build(problem).synthesizer_parameters() == []


def test_reset_puts_zeros_into_the_rows_that_are_done(generator):
    problem = reference.random_problem("lstm", generator)
    model, state = build(problem), as_message(problem)
    done = torch.tensor([False, True, False])
    after = model.reset(state, done)
    assert isinstance(after, LSTMState)
    close(tuple(after), reference.reset(tuple(state), done), rtol=0, atol=0)
    assert model.reset(state, None) is state


# Over shapes nobody thought of.


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    return reference.random_problem(
        draw(st.sampled_from(list(KINDS))),
        torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1))),
        layers=draw(st.integers(1, 3)),
        steps=sum(lengths),
        window=lengths,
        rows=draw(st.integers(1, 4)),
        hidden=draw(st.integers(1, 5)),
        unscored=draw(st.booleans()),
        resets=draw(st.booleans()),
    )


@given(problem=problems())
def test_oracle_equals_full_bptt_always(problem):
    model = build(problem, Answers(problem), normalize=False)
    DNI()(model, numbered(library(problem)), as_message(problem), 1.0)
    close(net_gradients(model), reference.full_bptt(problem))


@given(
    problem=problems(),
    context=st.integers(0, 5),
    weight=st.sampled_from([1.0, 1e-3, 17.0]),
)
def test_zero_equals_truncated_bptt_always(problem, context, weight):
    encoder = OneHotTokens(5, context) if context else None
    synthesizer = MLPSynthesizer(as_message(problem), [3], context=encoder)
    model, plain = build(problem, synthesizer), build(problem)
    windows = library(problem, context)
    DNI()(model, windows, as_message(problem), weight)
    TruncatedBPTT()(plain, windows, as_message(problem), weight)
    got, wanted = net_gradients(model), net_gradients(plain)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    close(got, scaled(reference.truncated_bptt(problem), weight))


@given(problem=problems(), weight=st.sampled_from([1.0, 1e-3, 17.0]))
def test_full_bptt_equals_the_reference_always(problem, weight):
    model = build(problem)
    estimate = FullBPTT()(model, library(problem), as_message(problem), weight)
    close(net_gradients(model), scaled(reference.full_bptt(problem), weight))
    loss, state = reference.total_loss(problem.kind, problem.parameters, problem.windows, problem.state)
    close(estimate.loss, loss)
    close(tuple(flatten(estimate.state)[0]), state)


@given(problem=problems())
def test_a_row_that_starts_anew_knows_nothing_of_before(problem):
    """Neither values nor gradients: the state before is garbage there, and nothing changes."""
    done = torch.ones(problem.state[0].shape[1], dtype=torch.bool)
    problem.windows[0] = problem.windows[0]._replace(done=done)
    results = []
    for state in (problem.state, tuple(1e3 * leaf + 7.0 for leaf in problem.state)):
        for estimator, synthesizer in (
            (FullBPTT(), None),
            (TruncatedBPTT(), None),
            (DNI(), MLPSynthesizer(as_message(problem), [3])),
        ):
            model = build(problem, synthesizer)
            estimate = estimator(model, library(problem), as_message(problem, state), WEIGHT)
            results.append((net_gradients(model), estimate.loss))
    for before, after in zip(results[:3], results[3:], strict=True):
        close(after, before, rtol=0, atol=0)


# An estimator of one's own, found by name, with a memory.

REMEMBERING = '''
import torch
from torch import nn

from dni_rnn.estimators import Estimate, Estimator
from dni_rnn.pytree import detach
from dni_rnn.window import window_loss


class Remembering(Estimator):
    """Draws each row's outputs to their own running mean, and counts the windows of each row."""

    def __init__(self, strength, penalty=None):
        super().__init__()
        self.strength, self.gain = strength, nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))

    def begin(self, model, batch_size):
        self.mean = torch.zeros(1, batch_size, model.core.rnn.output_size)
        self.counts = torch.arange(batch_size, dtype=torch.float32).reshape(-1, 1)

    def memory(self):
        return {"mean": self.mean, "counts": self.counts}

    def load_memory(self, tensors):
        for name, kept in self.memory().items():
            kept.copy_(tensors[name])

    def forward(self, model, windows, state, weight):
        losses = []
        for window in windows:
            outputs, state = model.unroll(window.inputs, model.reset(detach(state), window.start.done))
            loss = window_loss(model.readout(outputs), window.targets)
            drawn = (self.gain * outputs - self.mean).square().mean(0)
            (weight * loss + self.strength * (drawn / (1.0 + self.counts)).sum()).backward()
            self.mean.lerp_(outputs.detach().mean(0), 0.1)
            self.counts.add_(1.0)
            losses.append(loss.detach())
        self.calls += 1
        return Estimate(torch.stack(losses).sum(), detach(state))
'''


@pytest.fixture
def remembering(tmp_path, monkeypatch):
    (tmp_path / "estimators_own.py").write_text(REMEMBERING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "estimators_own", raising=False)
    return "estimators_own:Remembering,strength=0.05"


def learner(estimator: str, **settings: Any) -> RecurrentLearner:
    sizes: dict[str, Any] = {"hidden": 8, "embedding": 4, "batch_size": 4, "bptt": 3, "lr": 0.01}
    config = RecurrentConfig(**sizes, estimator=estimator, accumulate=2, **settings)
    return RecurrentLearner(config, Copy().load(None), torch.device("cpu"))


def test_what_an_estimator_remembers_goes_from_call_to_call(remembering):
    trained = learner(remembering)
    assert type(trained.estimator).__name__ == "Remembering"
    kept = trained.estimator.memory()
    assert kept["mean"].shape == (1, 4, 8)
    assert not kept["mean"].any()
    for _ in range(5):
        trained.update()
    kept = trained.estimator.memory()
    assert kept["counts"].flatten().tolist() == [10.0, 11.0, 12.0, 13.0]
    assert kept["mean"].any()
    saved = trained.state_dict()[0]
    assert torch.equal(saved["memory.mean"], kept["mean"])
    assert torch.equal(saved["memory.counts"], kept["counts"])
    # What the estimator learns and counts itself is trained and saved as well.
    assert trained.estimator.get_parameter("gain").item() != 1.0
    assert float(trained.estimator.get_buffer("calls")) == 5.0


@pytest.mark.parametrize("restore", [None, 0.1], ids=["plain", "with a penalty"])
def test_an_estimator_that_remembers_goes_on_bit_for_bit(restore, remembering):
    def everything(trained: RecurrentLearner) -> tuple[dict[str, Tensor], Any]:
        tensors, values = trained.state_dict()
        return {name: t.clone() for name, t in tensors.items()}, json.loads(json.dumps(values))

    one = learner(remembering, restore=restore)
    for _ in range(6):
        one.update()
    tensors, values = everything(one)
    resumed, forgetful = learner(remembering, restore=restore), learner(remembering, restore=restore)
    for other in (resumed, forgetful):
        for _ in range(2):
            other.update()
        other.load_state_dict(tensors, values)
    forgetful.estimator.begin(forgetful.model, 4)
    ends = []
    for trained in (one, resumed, forgetful):
        for _ in range(5):
            trained.update()
        ends.append(everything(trained))
    (wanted, counted), (got, recounted), (lost, _) = ends
    assert got.keys() == wanted.keys()
    assert {name: torch.equal(got[name], wanted[name]) for name in wanted if name != "random.cpu"} == {
        name: True for name in wanted if name != "random.cpu"
    }
    assert recounted == counted
    # What is remembered decides what is learnt.
    weight = "model.core.rnn.weight_hh_l0"
    assert not torch.equal(lost[weight], wanted[weight])
    assert not torch.equal(wanted[weight], tensors[weight])


def test_what_an_estimator_remembers_survives_a_run_that_is_stopped(remembering, tmp_path):
    """The command, in one go and in two."""
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 60)
    options = ["--hidden", "6", "--embedding", "4", "--batch-size", "4", "--bptt", "3", "--threads", "1"]
    options += ["--estimator", remembering, "--eval-every", "1000000"]
    ends = []
    for name, lengths in (("one", [12]), ("two", [5, 12])):
        for number, steps in enumerate(lengths):
            run = ["--steps", str(steps), "--out", str(tmp_path / name), *["--resume"] * (number > 0)]
            assert main(["train", "text", str(tmp_path / "text.txt"), *options, *run]) == 0
        tensors, _ = load_checkpoint(tmp_path / name / "checkpoint.safetensors")
        ends.append(tensors)
    assert ends[0].keys() == ends[1].keys()
    assert ends[0]["memory.mean"].any()
    for key in ends[0]:
        assert torch.equal(ends[0][key], ends[1][key]), key
