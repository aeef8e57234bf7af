"""The interface alone, in plain torch nets: its gradients and M's against slow equations and arithmetic."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import reference
import torch
from reference import close, distance, grad, gradients, laid_out, mean_square, random, randomize, running_size
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.interface import Interface
from dni_rnn.pytree import LSTMState, Tree, flatten, map_tree, unflatten
from dni_rnn.synthesizers import ContextMLP, Critic, MLPSynthesizer, OneHotTokens, Rows

RNNS: dict[str, Callable[..., nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CORES = [(kind, layers) for kind in RNNS for layers in (1, 2)]
every_core = pytest.mark.parametrize(("kind", "layers"), CORES)
either_unit = pytest.mark.parametrize("normalize", [True, False])


# Synthesizers whose answers can be worked out by hand.


class Constant(nn.Module):
    """M(message, context) = parameters of the message's shape, whose gradient is 2(value − g/size)/n."""

    def __init__(self, message: Tree, fill: Callable[[Tensor], Tensor] = torch.zeros_like) -> None:
        super().__init__()
        leaves, self.spec = flatten(message)
        self.values = nn.ParameterList(fill(leaf) for leaf in leaves)

    def forward(self, message: Tree, context: Any = None) -> Tree:
        return unflatten(list(self.values), self.spec)

    def observed(self, size: Tensor | float = 1.0) -> list[Tensor]:
        """The target g, solved from the gradient it left."""
        elements = sum(value.numel() for value in self.values)
        return [size * (value.detach() - 0.5 * elements * grad(value)) for value in self.values]


class Affine(nn.Module):
    """M(message, context) = a·message + b, tensor by tensor."""

    def __init__(self, a: float = 0.0, b: float = 0.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(b, dtype=torch.float64))

    def forward(self, message: Tree, context: Any = None) -> Tree:
        return map_tree(lambda leaf: self.a * leaf + self.b, message)


class Fixed(nn.Module):
    """M(message, context) = function(message, context): no parameters."""

    def __init__(self, function: Callable[[Tree, Any], Tree]) -> None:
        super().__init__()
        self.function = function

    def forward(self, message: Tree, context: Any = None) -> Tree:
        return self.function(message, context)


class Oracle(nn.Module):
    """M(message, k) = the true gradient at boundary k, and a parameter at the right value, zero."""

    def __init__(self, problem: reference.Problem) -> None:
        super().__init__()
        self.problem = problem
        self.error = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, message: Tree, context: int) -> Tree:
        leaves, spec = flatten(message)
        true = reference.future_gradient(self.problem, context, tuple(leaves))
        return unflatten([g + self.error for g in true], spec)


def learned(interface: Interface, name: str) -> Tensor:
    """The gradient of a parameter of M."""
    return grad(interface.get_parameter(f"synthesizer.{name}"))


def feed(
    interface: Interface,
    gradient: Tree,
    message: Tree = None,
    context: Any = None,
    done: Tensor | None = None,
) -> Tree:
    """Let `gradient` arrive at `message` (default zeros) and return what was received."""
    message = map_tree(torch.zeros_like, gradient) if message is None else message
    received = interface.receive(message, context, done)
    pairs = zip(flatten(received)[0], flatten(gradient)[0], strict=True)
    torch.stack([(r * g.detach()).sum() for r, g in pairs]).sum().backward()
    return received


# A recurrent net in windows: the loop of the class docstring.


class Net(nn.Module):
    """Embedding, torch's own recurrent layers, readout; parameters named as the oracle's."""

    def __init__(self, problem: reference.Problem) -> None:
        super().__init__()
        p = problem.parameters
        (symbols, embedding), hidden = p["embedding.weight"].shape, p["readout.weight"].shape[1]
        self.embedding = nn.Embedding(symbols, embedding)
        self.rnn = RNNS[problem.kind](embedding, hidden, problem.state[0].shape[0])
        self.readout = nn.Linear(hidden, symbols)
        self.double().load_state_dict(p)

    def forward(self, window: reference.Window, state: Tree) -> tuple[Tensor, Tree]:
        outputs, state = self.rnn(self.embedding(window.inputs), state)
        logits = self.readout(outputs).flatten(0, 1)
        return F.cross_entropy(logits, window.targets.flatten(), reduction="sum"), state


def message(problem: reference.Problem, state: reference.State | None = None) -> Tree:
    state = problem.state if state is None else state
    return LSTMState(*state) if problem.kind == "lstm" else state[0]


def run(
    net: Net,
    interface: Interface,
    problem: reference.Problem,
    objective: Callable[[Tensor, Tensor], Tensor] = torch.add,
    after: Callable[[], None] = lambda: None,
) -> None:
    """All windows, each with one backward pass; gradients add up. The context is the boundary's number."""
    state = message(problem)
    for number, window in enumerate(problem.windows):
        state = interface.receive(state, number)
        loss, state = net(window, state)
        objective(loss, interface.send(state, number + 1)).backward()
        after()


def assert_the_past_matters(problem: reference.Problem) -> None:
    """Else a wrong gradient through the boundaries could not be told from a right one."""
    full, truncated = reference.full_bptt(problem), reference.truncated_bptt(problem)
    assert distance(truncated, full) > 0.05
    for state in reference.state_gradients(problem)[1:-1]:
        assert mean_square(state) > 0.01


@every_core
@either_unit
def test_zero_synthesizer_is_truncated_bptt_bit_for_bit(kind, layers, normalize, generator):
    problem = reference.random_problem(kind, generator, layers=layers)
    net, plain = Net(problem), Net(problem)
    synthesizer = MLPSynthesizer(message(problem), [8]).double()  # says zero until it is stepped
    run(net, Interface(synthesizer, normalize=normalize).double(), problem)
    state = message(problem)
    for window in problem.windows:
        loss, state = plain(window, map_tree(torch.Tensor.detach, state))
        loss.backward()
    got, wanted = gradients(net), gradients(plain)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    close(got, reference.truncated_bptt(problem))
    assert distance(got, reference.full_bptt(problem)) > 0.05
    assert any(bool(p.grad is not None and p.grad.any()) for p in synthesizer.parameters())


@every_core
@pytest.mark.parametrize("window", [1, 2, 3, 4, 6, 12])
def test_oracle_gives_full_bptt(kind, layers, window, generator):
    problem = reference.random_problem(kind, generator, layers=layers, window=window)
    if window < 12:
        assert_the_past_matters(problem)
    net, oracle = Net(problem), Oracle(problem)
    run(net, Interface(oracle, normalize=False).double(), problem)
    close(gradients(net), reference.full_bptt(problem))
    # The oracle is what M converges to: what arrives at each boundary is what it said.
    assert abs(float(grad(oracle.error))) < 1e-12


@pytest.mark.parametrize("kind", list(RNNS))
def test_oracle_gives_finite_differences(kind, generator):
    """Without autograd anywhere in the expected value."""
    problem = reference.random_problem(kind, generator, layers=2, window=1)
    net = Net(problem)
    run(net, Interface(Oracle(problem), normalize=False).double(), problem)
    direction = {name: random(generator, *p.shape) for name, p in problem.parameters.items()}

    def loss(distance: float) -> Tensor:
        moved = {name: p + distance * direction[name] for name, p in problem.parameters.items()}
        return reference.total_loss(kind, moved, problem.windows, problem.state)[0]

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    along = torch.stack([(direction[name] * g).sum() for name, g in gradients(net).items()]).sum()
    close(along, slope, rtol=1e-6)


@every_core
@either_unit
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_target_is_the_local_gradient_and_what_the_next_boundary_says(
    kind, layers, normalize, scale, generator
):
    problem = reference.random_problem(kind, generator, layers=layers)
    synthesizer = Constant(message(problem), lambda leaf: random(generator, *leaf.shape))
    interface = Interface(synthesizer, normalize=normalize, scale=scale).double()
    net, state, squares, size = Net(problem), message(problem), [], 0.0 if normalize else 1.0
    nothing = tuple(map(torch.zeros_like, problem.state))
    for number, window in enumerate(problem.windows):
        start = tuple(flatten(state)[0])
        net.zero_grad()
        synthesizer.zero_grad()
        loss, state = net(window, interface.receive(state))
        (loss + interface.send(state)).backward()
        injected = tuple(scale * size * value.detach() for value in synthesizer.values)
        parameters, target = reference.injected(problem, number, start, injected)
        close(gradients(net), parameters)
        squares.append(mean_square(target))
        size = running_size(squares) if normalize else 1.0
        close(synthesizer.observed(size), list(target))
        if scale and size and number:
            local = reference.injected(problem, number, start, nothing)[1]
            bootstrapped = [a - b for a, b in zip(target, local, strict=True)]
            assert mean_square(bootstrapped) > 1e-4


@either_unit
@pytest.mark.parametrize("hidden", [(), (7,)], ids=["linear", "mlp"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_synthesizer_gets_the_gradient_of_the_stated_loss(kind, hidden, normalize, generator):
    problem = reference.random_problem(kind, generator, layers=2)
    synthesizer = MLPSynthesizer(message(problem), hidden).double()
    randomize(synthesizer, generator)
    interface = Interface(synthesizer, normalize=normalize).double()
    net, state, squares, size = Net(problem), message(problem), [], 0.0 if normalize else 1.0
    for number, window in enumerate(problem.windows):
        start = state
        synthesizer.zero_grad()
        loss, state = net(window, interface.receive(state))
        (loss + interface.send(state)).backward()

        with torch.no_grad():
            end_gradient = tuple(size * p for p in laid_out(synthesizer(state), flatten(state)[0]))
        start_leaves = tuple(flatten(start)[0])
        _, target = reference.injected(problem, number, start_leaves, end_gradient)
        squares.append(mean_square(target))
        size = running_size(squares) if normalize else 1.0
        predictions = laid_out(synthesizer(map_tree(torch.Tensor.detach, start)), start_leaves)
        errors = [(p - g / size).flatten() for p, g in zip(predictions, target, strict=True)]
        stated = torch.cat(errors).square().mean()
        wanted = torch.autograd.grad(stated, list(synthesizer.parameters()))
        close([grad(p) for p in synthesizer.parameters()], list(wanted))
        close(interface.regression_loss, stated.detach())


def test_synthesizer_gradient_is_the_slope_of_the_reported_loss(generator):
    """Finite differences of `regression_loss` itself; scale 0, so that the target does not move with M."""
    problem = reference.random_problem("lstm", generator, window=12)
    net, synthesizer = Net(problem), MLPSynthesizer(message(problem), [5]).double()
    randomize(synthesizer, generator)
    interface = Interface(synthesizer, normalize=False, scale=0.0).double()
    run(net, interface, problem)
    before = [p.detach().clone() for p in synthesizer.parameters()]
    direction = [random(generator, *p.shape) for p in before]
    along = sum(float((grad(p) * d).sum()) for p, d in zip(synthesizer.parameters(), direction, strict=True))

    def loss(distance: float) -> float:
        with torch.no_grad():
            for p, b, d in zip(synthesizer.parameters(), before, direction, strict=True):
                p.copy_(b + distance * d)
        run(net, interface, problem)
        return float(interface.regression_loss)

    assert along == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-6)


# The two halves, by arithmetic.


def test_receive_passes_the_values_and_nothing_of_the_history(generator):
    producer = random(generator, 3, 4).requires_grad_()
    interface = Interface(Affine()).double()
    received = feed(interface, random(generator, 3, 4), producer * 2)
    assert torch.equal(received, producer * 2)
    assert producer.grad is None


def test_send_is_zero_and_its_gradient_is_the_prediction(generator):
    state = random(generator, 3, 4).requires_grad_()
    interface = Interface(Affine(2.0, 1.0), normalize=False).double()
    sent = interface.send(state)
    assert sent.shape == ()
    assert sent.item() == 0.0
    sent.backward()
    close(grad(state), 2.0 * state.detach() + 1.0)
    # What is sent is a constant: it does not train M.
    assert all(p.grad is None for p in interface.parameters())


def test_a_factor_before_sent_changes_nothing(generator):
    state = random(generator, 3, 4).requires_grad_()
    interface = Interface(Affine(2.0, 1.0), normalize=False).double()
    ((state.square().sum() + interface.send(state)) / 4).backward()
    close(grad(state), state.detach() / 2 + (2.0 * state.detach() + 1.0))


def test_scale_multiplies_what_is_sent_and_not_what_is_learned(generator):
    problem = reference.random_problem("gru", generator)
    state = problem.state[0]
    targets, sent = {}, {}
    for scale in (1.0, 0.25):
        synthesizer = Constant(state, lambda leaf: torch.full_like(leaf, 3.0))
        interface = Interface(synthesizer, scale=scale, normalize=False).double()
        sent[scale] = interface.synthetic_gradient(state)
        close(interface.predict(state), torch.full_like(state, 3.0))
        feed(interface, state)
        targets[scale] = synthesizer.observed()
    close(sent[1.0], torch.full_like(state, 3.0))
    close(sent[0.25], torch.full_like(state, 0.75))
    close(targets[1.0], targets[0.25])


@pytest.mark.parametrize("kind", ["regression", "critic"])
def test_a_discount_multiplies_what_is_sent_here_and_nothing_else(kind, generator):
    state, labels = random(generator, 6, 4), torch.randint(2, (6,), generator=generator)
    synthesizer = Critic(ContextMLP(4, [3], 2), 2) if kind == "critic" else MLPSynthesizer(state, [3])
    interface = Interface(synthesizer, scale=0.5, centre=True).double()
    randomize(interface, generator)
    feed(interface, random(generator, 6, 4), state, labels)
    plain = interface.synthetic_gradient(state, labels)
    assert plain.any()
    before = copy.deepcopy(interface.state_dict())
    for discount in (1.0, 0.3, 0.0):
        leaf = state.clone().requires_grad_()
        interface.send(leaf, labels, discount=discount).backward()
        close(grad(leaf), discount * plain)
    close(interface.state_dict(), before, rtol=0, atol=0)


def test_scale_zero_is_truncation_that_trains_the_synthesizer(generator):
    problem = reference.random_problem("lstm", generator)
    synthesizer = MLPSynthesizer(message(problem), [8]).double()
    randomize(synthesizer, generator)
    net = Net(problem)
    run(net, Interface(synthesizer, scale=0.0).double(), problem)
    close(gradients(net), reference.truncated_bptt(problem))
    assert all(bool(grad(p).any()) for p in synthesizer.parameters())


def test_what_is_sent_is_what_m_says_now(generator):
    """A later step of M or of the size does not reach into a graph that is already built."""
    state = random(generator, 3, 4).requires_grad_()
    interface = Interface(Affine(b=1.0)).double()
    feed(interface, torch.full((3, 4), 2.0, dtype=torch.float64))
    sent = interface.send(state)
    with torch.no_grad():
        interface.get_parameter("synthesizer.b").fill_(100.0)
    feed(interface, torch.full((3, 4), 50.0, dtype=torch.float64))
    sent.backward()
    close(grad(state), torch.full((3, 4), 2.0, dtype=torch.float64))


def test_sending_a_message_that_wants_no_gradient_is_harmless(generator):
    interface = Interface(Affine(1.0, 1.0)).double()
    weight = random(generator, 4).requires_grad_()
    (weight.sum() + interface.send(random(generator, 3, 4))).backward()
    close(grad(weight), torch.ones(4, dtype=torch.float64))


# The running RMS of the targets.


def test_the_unit_is_the_rms_of_all_targets_at_first_and_of_the_last_ones_later(generator):
    interface = Interface(Affine(), decay=0.75).double()
    assert float(interface.target_rms()) == 0.0
    squares = []
    for factor in (1.0, 10.0, 0.1, 3.0, 1.0, 0.0, 7.0):
        target = factor * random(generator, 2, 5, 3)
        feed(interface, target)
        squares.append(mean_square([target]))
        assert float(interface.target_rms()) == pytest.approx(running_size(squares, 0.75))
    # In numbers: squares 5, 1, 0, 8 are averaged; the fifth, 3.5, enters with weight 1/4.
    interface = Interface(Affine(), decay=0.75).double()
    for target in ([3.0, 1.0], [1.0, 1.0], [0.0, 0.0], [4.0, 0.0]):
        feed(interface, torch.tensor([target], dtype=torch.float64))
    assert float(interface.target_rms()) == pytest.approx(math.sqrt(14 / 4))
    feed(interface, torch.tensor([[0.0, math.sqrt(7.0)]], dtype=torch.float64))
    assert float(interface.target_rms()) == pytest.approx(math.sqrt(3.5))
    feed(interface, torch.zeros(1, 2, dtype=torch.float64))
    assert float(interface.target_rms()) == pytest.approx(math.sqrt(0.75 * 3.5))


@pytest.mark.parametrize(
    "m", [Fixed(lambda message, _: message + 2.0), Affine(1.0, 2.0)], ids=["fixed", "frozen"]
)
def test_the_unit_of_an_m_that_is_not_trained_is_measured_too(m, generator):
    interface = Interface(m).double().requires_grad_(False)
    target, message = random(generator, 2, 5, 3), random(generator, 2, 5, 3)
    feed(interface, target)
    size = math.sqrt(mean_square([target]))
    assert float(interface.target_rms()) == pytest.approx(size)
    close(interface.synthetic_gradient(message), size * (message + 2.0))
    assert [p.grad for p in interface.parameters()] in ([], [None, None])


def test_the_unit_is_over_all_tensors_of_the_message_together(generator):
    interface = Interface(Affine()).double()
    feed(interface, (torch.full((2, 3), 2.0, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)))
    assert float(interface.target_rms()) == pytest.approx(math.sqrt(6 * 4.0 / 8))


def test_predicting_zero_has_loss_one_and_predicting_well_zero(generator):
    target = random(generator, 4, 3)
    interface = Interface(Affine()).double()
    feed(interface, target)
    assert float(interface.regression_loss) == pytest.approx(1.0)
    interface = Interface(Affine(a=1.0), normalize=False).double()
    feed(interface, target, message=target)
    assert float(interface.regression_loss) == pytest.approx(0.0, abs=1e-30)


def test_the_unit_survives_a_state_dict(generator):
    interface, copied = Interface(Affine(), decay=0.9).double(), Interface(Affine(), decay=0.9).double()
    for _ in range(3):
        feed(interface, random(generator, 4, 3))
    copied.load_state_dict(interface.state_dict())
    assert float(copied.target_rms()) > 0
    target = random(generator, 4, 3)
    for each in (interface, copied):
        each.zero_grad()
        feed(each, target)
    assert torch.equal(copied.target_rms(), interface.target_rms())
    assert torch.equal(learned(copied, "b"), learned(interface, "b"))


def test_targets_that_are_all_zero_give_no_nan():
    interface = Interface(Affine(b=0.5)).double()
    zeros = torch.zeros(4, 3, dtype=torch.float64)
    feed(interface, zeros)
    assert float(interface.target_rms()) == 0.0
    close(learned(interface, "b"), torch.tensor(1.0, dtype=torch.float64))  # 2·(0.5 − 0)
    assert torch.equal(interface.synthetic_gradient(zeros), zeros)
    feed(interface, zeros + 2.0)
    assert float(interface.target_rms()) == pytest.approx(math.sqrt(2.0))  # the zero counts
    assert math.isfinite(float(learned(interface, "b")))


@pytest.mark.parametrize("target", [1e-18, 1e-22, 1e-23, 1e-26, 1e-36])
def test_targets_whose_squares_underflow_do_not_blow_up(target):
    """In float32, g² is 0 below about 1e-23, and so is the size; then g counts as 0."""
    interface = Interface(Constant(torch.zeros(4, 3)))
    feed(interface, torch.full((4, 3), target))
    (value,) = interface.synthesizer.parameters()
    elements = 4 * 3
    assert float(grad(value).abs().max()) * elements / 2 == pytest.approx(
        1.0 if target > 5e-23 else 0.0, abs=0.05
    )


@either_unit
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_is_not_finite_is_passed_over(bad, first, normalize, generator):
    """As a loss scaler makes them now and then."""
    interface = Interface(Affine(0.5, 0.5), normalize=normalize).double()
    if not first:
        feed(interface, random(generator, 4, 3))
        interface.zero_grad()
    before = copy.deepcopy(interface.state_dict())
    spoilt = (random(generator, 4, 3), random(generator, 4, 3))
    spoilt[1][2, 1] = bad
    feed(interface, spoilt)
    close(interface.state_dict(), before, rtol=0, atol=0)
    assert float(learned(interface, "a")) == float(learned(interface, "b")) == 0.0
    assert math.isfinite(float(interface.regression_loss))  # it goes into the metrics
    feed(interface, random(generator, 4, 3))
    assert float(learned(interface, "b")) != 0.0
    assert math.isfinite(float(interface.target_rms()))


# Rows whose sequence ended.

DONE = torch.tensor([True, False, True, False, False])


def test_no_synthetic_gradient_in_rows_that_end(generator):
    state = LSTMState(
        random(generator, 2, 5, 3).requires_grad_(), random(generator, 2, 5, 3).requires_grad_()
    )
    interface = Interface(Affine(2.0, 1.0), normalize=False).double()
    interface.send(state, done=DONE).backward()
    for leaf in state:
        wanted = 2.0 * leaf.detach() + 1.0
        wanted[:, DONE] = 0.0
        close(grad(leaf), wanted)


@either_unit
@pytest.mark.parametrize("garbage", [7.0, math.nan, math.inf])
def test_rows_that_ended_are_as_if_absent(garbage, normalize, generator):
    """Training on five rows of which two ended is training on the other three."""
    state = LSTMState(random(generator, 2, 5, 3), random(generator, 2, 5, 3))
    target = LSTMState(random(generator, 2, 5, 3), random(generator, 2, 5, 3))
    with_ended, without = (Interface(Affine(0.7, -0.2), normalize=normalize).double() for _ in range(2))
    for _ in range(2):
        spoilt = map_tree(lambda g: g.masked_fill(DONE.reshape(1, 5, 1), garbage), target)
        feed(with_ended, spoilt, state, done=DONE)
        feed(without, map_tree(lambda g: g[:, ~DONE], target), map_tree(lambda s: s[:, ~DONE], state))
    close(gradients(with_ended), gradients(without))
    close(with_ended.target_rms(), without.target_rms())
    close(with_ended.regression_loss, without.regression_loss)


def test_each_row_is_trained_on_its_own_target(generator):
    target = random(generator, 2, 5, 3)
    synthesizer = Constant(target, lambda leaf: random(generator, *leaf.shape))
    feed(Interface(synthesizer, normalize=False).double(), target, done=DONE)
    (value,) = synthesizer.values
    wanted = 2.0 * (value.detach() - target) / (2 * 3 * 3)
    wanted[:, DONE] = 0.0
    close(grad(value), wanted)


@either_unit
def test_when_every_row_ends_nothing_is_learned_or_sent(normalize, generator):
    state = random(generator, 2, 5, 3).requires_grad_()
    interface = Interface(Affine(0.7, -0.2), normalize=normalize).double()
    feed(interface, random(generator, 2, 5, 3))
    interface.zero_grad()
    before = copy.deepcopy(interface.state_dict())
    everyone = torch.ones(5, dtype=torch.bool)
    feed(interface, random(generator, 2, 5, 3), state, done=everyone)
    close(interface.state_dict(), before, rtol=0, atol=0)
    assert float(learned(interface, "a")) == float(learned(interface, "b")) == 0.0
    assert math.isfinite(float(interface.regression_loss))
    interface.send(state, done=everyone).backward()
    assert not grad(state).any()


def test_nobody_done_is_no_mask(generator):
    state, target = random(generator, 2, 5, 3), random(generator, 2, 5, 3)
    masked, plain = (Interface(Affine(0.7, -0.2)).double() for _ in range(2))
    feed(masked, target, state, done=torch.zeros(5, dtype=torch.bool))
    feed(plain, target, state)
    close(gradients(masked), gradients(plain))
    close(masked.target_rms(), plain.target_rms())


def test_rows_of_feature_maps_are_their_first_dimension(generator):
    maps = random(generator, 5, 2, 3, 4).requires_grad_()
    synthesizer = Constant(maps.detach(), lambda leaf: random(generator, *leaf.shape))
    interface = Interface(synthesizer, normalize=False, batch_dim=0).double()
    (value,) = synthesizer.values
    interface.send(maps, done=DONE).backward()
    wanted = value.detach().clone()
    wanted[DONE] = 0.0
    close(grad(maps), wanted)
    target = random(generator, 5, 2, 3, 4)
    feed(interface, target, done=DONE)
    wanted = 2.0 * (value.detach() - target) / (3 * 2 * 3 * 4)
    wanted[DONE] = 0.0
    close(grad(value), wanted)


# What keeps a state from running away.


@pytest.mark.parametrize("done", [None, DONE], ids=["no row ends", "rows end"])
def test_centring_takes_the_mean_over_the_rows_away(done, generator):
    state = LSTMState(
        random(generator, 2, 5, 3).requires_grad_(), random(generator, 2, 5, 3).requires_grad_()
    )
    interface = Interface(Affine(2.0, 100.0), centre=True, scale=0.5, normalize=False).double()
    interface.send(state, done=done).backward()
    rows = [0, 1, 2, 3, 4] if done is None else [1, 3, 4]
    for leaf in state:
        values, wanted = leaf.detach(), torch.zeros_like(leaf)
        for row in rows:
            mean = torch.stack([values[:, other] for other in rows]).mean(0)
            wanted[:, row] = 0.5 * 2.0 * (values[:, row] - mean)
        close(grad(leaf), wanted)
    # M itself, and what it learns, stay as they are.
    close(interface.predict(state).hidden, 2.0 * state.hidden.detach() + 100.0)
    centred, plain = (Interface(Affine(2.0, 1.0), centre=c, normalize=False).double() for c in (True, False))
    for each in (centred, plain):
        feed(each, map_tree(torch.ones_like, state), state, done=done)
    close(gradients(centred), gradients(plain), rtol=0, atol=0)


def test_centring_feature_maps_is_over_their_first_dimension(generator):
    maps = random(generator, 5, 2, 3, 4)
    interface = Interface(Affine(1.0, 100.0), centre=True, normalize=False, batch_dim=0).double()
    close(interface.synthetic_gradient(maps), maps - sum(maps[row] for row in range(5)) / 5.0)


def test_a_row_alone_has_no_mean_and_is_sent_as_it_is(generator):
    """Minus its own mean it would be nothing, without a word."""
    interface = Interface(Affine(2.0, 1.0), centre=True, normalize=False).double()
    one = random(generator, 1, 1, 3)
    close(interface.synthetic_gradient(one), 2.0 * one + 1.0)
    several = random(generator, 1, 5, 3)
    all_but_one = torch.tensor([True, True, False, True, True])
    sent = interface.synthetic_gradient(several, done=all_but_one)
    close(sent[:, 2], 2.0 * several[:, 2] + 1.0)
    assert not sent[:, all_but_one].any()
    everyone = torch.ones(5, dtype=torch.bool)
    assert not interface.synthetic_gradient(several, done=everyone).any()


def test_what_is_sent_has_no_history(generator):
    state = (5.0 * random(generator, 2, 5, 3)).requires_grad_()
    interface = Interface(Affine(1.0, 1.0), centre=True, normalize=False).double()
    assert not interface.synthetic_gradient(state).requires_grad
    assert not interface.predict(state).requires_grad


# Messages and contexts.


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def _messages(generator: torch.Generator) -> dict[str, Tree]:
    a, b, c = random(generator, 3, 4), random(generator, 2, 3, 2), random(generator, 3, 1)
    return {
        "tensor": a,
        "tuple": (a, b),
        "list": [a, b],
        "named tuple": Pair(a, b),
        "dict": {"a": a, "b": b},
        "nested": {"inner": Pair(a, b), "others": (c, [a + 1.0])},
        "with nothing in places": {"z": None, "b": (a, None), "a": b},
    }


@pytest.mark.parametrize(
    "shape", ["tensor", "tuple", "list", "named tuple", "dict", "nested", "with nothing in places"]
)
def test_messages_of_every_shape(shape, generator):
    values = _messages(generator)[shape]
    sent = map_tree(lambda leaf: leaf.clone().requires_grad_(), values)
    interface = Interface(Affine(2.0, 1.0), normalize=False).double()

    received = feed(interface, map_tree(lambda leaf: 5.0 * leaf, values), sent)
    assert type(received) is type(values)
    assert flatten(received)[1] == flatten(values)[1]
    close(flatten(received)[0], flatten(values)[0], rtol=0, atol=0)
    flat = torch.cat([leaf.flatten() for leaf in flatten(values)[0]])
    close(learned(interface, "b"), (2.0 * (2.0 * flat + 1.0 - 5.0 * flat)).mean())

    synthetic = interface.synthetic_gradient(sent)
    assert type(synthetic) is type(values)
    interface.send(sent).backward()
    for leaf, g in zip(flatten(sent)[0], flatten(synthetic)[0], strict=True):
        close(g, 2.0 * leaf.detach() + 1.0)
        close(grad(leaf), g)


@pytest.mark.parametrize("method", ["receive", "send", "forward", "predict", "synthetic_gradient"])
@pytest.mark.parametrize("leaf", [{1}, object(), "h"], ids=["set", "object", "str"])
def test_a_leaf_that_is_not_a_tensor_is_refused(method, leaf):
    interface = Interface(Affine())
    with pytest.raises(TypeError, match=f"a message is a tensor.*found a {type(leaf).__name__}"):
        getattr(interface, method)({"state": torch.zeros(2, 3), "other": leaf})


@pytest.mark.parametrize("method", ["receive", "send", "forward", "predict", "synthetic_gradient"])
@pytest.mark.parametrize(
    "answer", [torch.zeros(3, 2), torch.zeros(3), (torch.zeros(2, 3), torch.zeros(2, 3))], ids=str
)
def test_a_synthesizer_of_the_wrong_shape_is_refused(method, answer):
    """(3,) would broadcast: a wrong gradient without a word."""
    interface = Interface(Fixed(lambda message, context: answer))
    with pytest.raises(ValueError, match=r"returns must be tensors like the message, \[\(2, 3\)\]"):
        getattr(interface, method)(torch.zeros(2, 3))


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        Interface(Affine(), decay=decay)


@pytest.mark.parametrize("context", [None, "anything", torch.arange(3)], ids=str)
def test_the_synthesizer_is_told_the_message_and_the_context(context, generator):
    told = []
    interface = Interface(Fixed(lambda message, context: told.append((message, context)) or message))
    state = random(generator, 2, 3).requires_grad_()
    for method in (interface.receive, interface.send, interface.forward):
        method(state) if context is None else method(state, context)
    assert len(told) == 3
    for seen, given in told:
        assert given is context
        assert torch.equal(seen, state)
        assert not seen.requires_grad


def test_predictions_depend_on_the_context(generator):
    """A context that does not come through would give both rows of windows the same answer."""
    state = random(generator, 2, 3).requires_grad_()
    interface = Interface(Fixed(lambda message, context: message + context), normalize=False).double()
    for context in (1.0, -4.0):
        state.grad = None
        interface.send(state, context).backward()
        close(grad(state), state.detach() + context)


# Without gradients.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_is_the_identity_and_does_not_call_the_synthesizer(mode, generator):
    def refuse(message: Tree, context: Any) -> Tree:
        raise AssertionError("called")

    interface = Interface(Fixed(refuse)).double()
    state = LSTMState(random(generator, 1, 2, 3).requires_grad_(), random(generator, 1, 2, 3))
    with mode():
        received, passed = interface.receive(state), interface(state)
        sent = interface.send(state)
    for result in (received, passed):
        assert isinstance(result, LSTMState)
        close(tuple(result), tuple(leaf.detach() for leaf in state), rtol=0, atol=0)
    assert sent.shape == ()
    assert float(sent) == 0.0


# Between the layers of a feed-forward net.


class Cut(nn.Module):
    """Three stages with an interface behind the first two, or, without, ordinary backprop."""

    def __init__(self, stages: Sequence[nn.Module], interfaces: Sequence[Interface] = ()) -> None:
        super().__init__()
        self.stages, self.interfaces = nn.ModuleList(stages), nn.ModuleList(interfaces)

    def rest(self, x: Tensor, first: int, labels: Tensor) -> Tensor:
        """The loss from the input of stage `first` on, uncut."""
        for stage in self.stages[first:]:
            x = stage(x)
        return F.cross_entropy(x.flatten(1), labels)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.stages[0](x)
        for number, stage in enumerate(self.stages[1:]):
            x = stage(self.interfaces[number](x, labels) if self.interfaces else x)
        return F.cross_entropy(x.flatten(1), labels)


class TrueGradient(nn.Module):
    """M(activation, labels) = the gradient of the rest of the net, and a parameter at the right value."""

    def __init__(self, net: Cut, first: int) -> None:
        super().__init__()
        self.net, self.first = [net], first
        self.error = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, message: Tensor, context: Tensor) -> Tensor:
        x = message.detach().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(self.net[0].rest(x, self.first, context), x)
        return g + self.error


def _stages(shape: str, generator: torch.Generator) -> list[nn.Module]:
    if shape == "mlp":
        stages = [
            nn.Sequential(nn.Linear(5, 8), nn.Tanh()),
            nn.Sequential(nn.Linear(8, 6), nn.Tanh()),
            nn.Linear(6, 3),
        ]
    else:
        stages = [
            nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh()),
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()),
            nn.Conv2d(4, 3, 2),
        ]
    return [randomize(stage.double(), generator, 0.5) for stage in stages]


def _batch(shape: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    inputs = random(generator, 6, 5) if shape == "mlp" else random(generator, 6, 2, 4, 4)
    return inputs, torch.randint(3, (6,), generator=generator)


@pytest.mark.parametrize("shape", ["mlp", "maps"])
def test_feed_forward_oracle_is_backprop(shape, generator):
    stages, (x, labels) = _stages(shape, generator), _batch(shape, generator)
    plain = Cut(copy.deepcopy(stages))
    plain(x, labels).backward()
    cut = Cut(stages)
    oracles = [TrueGradient(cut, first) for first in (1, 2)]
    batch_dim = -2 if shape == "mlp" else 0
    cut.interfaces.extend(Interface(o, normalize=False, batch_dim=batch_dim).double() for o in oracles)
    cut(x, labels).backward()
    close(gradients(cut.stages), gradients(plain.stages))
    assert min(mean_square([g]) for g in gradients(plain.stages).values()) > 1e-8
    assert max(abs(float(grad(oracle.error))) for oracle in oracles) < 1e-12


@pytest.mark.parametrize("shape", ["mlp", "maps"])
def test_feed_forward_zero_lets_only_the_last_part_learn_and_trains_every_m(shape, generator):
    stages, (x, labels) = _stages(shape, generator), _batch(shape, generator)
    plain = Cut(copy.deepcopy(stages))
    activation = stages[1](stages[0](x)).detach().requires_grad_()
    true = torch.autograd.grad(plain.rest(activation, 2, labels), activation)[0]
    plain(x, labels).backward()
    messages = [stages[0](x).detach(), activation.detach()]
    constants = [Constant(m) for m in messages]
    batch_dim = -2 if shape == "mlp" else 0
    cut = Cut(stages, [Interface(c, normalize=False, batch_dim=batch_dim).double() for c in constants])
    cut(x, labels).backward()
    for name, g in gradients(cut.stages).items():
        if name.startswith("2."):
            close(g, gradients(plain.stages)[name])
        else:
            assert not g.any()
    close(constants[1].observed(), [true])  # what the last part says
    close(constants[0].observed(), [torch.zeros_like(messages[0])])  # what the second M says: zero
    assert grad(constants[1].values[0]).any()


def test_feed_forward_passes_on_in_the_size_of_before(generator):
    """The size moves in the same backward pass; what is passed on does not wait for that."""
    x = random(generator, 4, 3).requires_grad_()
    interface = Interface(Affine(b=1.0), scale=0.5).double()
    for target, wanted in ((4.0, 0.0), (8.0, 0.5 * 4.0), (1.0, 0.5 * math.sqrt(40.0))):
        x.grad = None
        (target * interface(x)).sum().backward()
        close(grad(x), torch.full_like(x, wanted))


# Steps.


@pytest.mark.parametrize(
    "other",
    [lambda loss, sent: 1000.0 * loss + sent, lambda loss, sent: (loss + sent) / 4.0],
    ids=["1000·loss + sent", "(loss + sent)/4"],
)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_the_unit_of_the_loss_does_not_change_an_adam_trajectory(kind, other, generator):
    problem = reference.random_problem(kind, generator, steps=60, window=3, rows=4, hidden=6)
    example = MLPSynthesizer(message(problem), [8]).double()
    randomize(example.mlp.layers[0], generator)
    ends = []
    for objective in (torch.add, other):
        net, interface = Net(problem), Interface(copy.deepcopy(example)).double()
        optimizer = torch.optim.Adam([*net.parameters(), *interface.parameters()], lr=3e-3, eps=1e-30)

        def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        run(net, interface, problem, objective, step)
        ends.append(
            (dict(net.named_parameters()), dict(interface.named_parameters()), interface.target_rms())
        )
    for one, two in zip(*[end[:2] for end in ends], strict=True):
        close(one, two, rtol=1e-6, atol=1e-8)
    # It went somewhere, and the synthesizer took part.
    assert distance(problem.parameters, ends[0][0]) > 0.01
    assert float(ends[0][1]["synthesizer.mlp.layers.1.weight"].detach().abs().max()) > 0.01
    factor = float(other(torch.tensor(1.0), torch.tensor(0.0)))
    assert float(ends[1][2] / ends[0][2]) == pytest.approx(factor, rel=1e-8)


def test_one_step_changes_the_net_and_the_synthesizer(generator):
    problem = reference.random_problem("lstm", generator, layers=2)
    net, interface = Net(problem), Interface(MLPSynthesizer(message(problem), [8])).double()
    before = copy.deepcopy(net.state_dict()), copy.deepcopy(dict(interface.named_parameters()))
    optimizer = torch.optim.SGD([*net.parameters(), *interface.parameters()], lr=0.1)
    for _ in range(2):  # the first step of a net that says zero reaches its last layer only
        run(net, interface, problem, after=optimizer.step)
    for name, parameter in net.named_parameters():
        assert not torch.equal(parameter, before[0][name]), name
    for name, parameter in interface.named_parameters():
        assert not torch.equal(parameter, before[1][name]), name


@either_unit
def test_a_synthesizer_converges_to_the_true_gradient_of_a_linear_net(normalize, generator):
    """s' = A s, loss ½ sᵀQs at every step for ever: the true gradient is Σₖ (Aᵀ)ᵏ Q Aᵏ s. M sees one step."""
    angle, width = 0.7, 3
    A = 0.8 * torch.tensor(
        [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0], [0.0, 0.0, 1.0]],
        dtype=torch.float64,
    )
    root = random(generator, width, width)
    Q = root @ root.T
    P, power = torch.zeros_like(Q), torch.eye(width, dtype=torch.float64)
    for _ in range(200):
        P, power = P + power.T @ Q @ power, A @ power
    assert float((P - Q).norm() / P.norm()) > 0.5  # one step alone is far from it

    state = random(generator, 32, width)
    synthesizer = MLPSynthesizer(state, bounded=False).double()
    interface = Interface(synthesizer, normalize=normalize).double()
    optimizer = torch.optim.SGD(interface.parameters(), lr=0.5)
    for _ in range(600):
        optimizer.zero_grad()
        now = interface.receive(state)
        loss = 0.5 * torch.einsum("bi,ij,bj->", now, Q, now)
        (loss + interface.send(now @ A.T)).backward()
        optimizer.step()
    truth = state @ P
    assert float((interface.synthetic_gradient(state) - truth).norm() / truth.norm()) < 1e-3
    fresh = random(generator, 8, width)
    assert float((interface.synthetic_gradient(fresh) - fresh @ P).norm() / (fresh @ P).norm()) < 1e-2


# As a module among modules.


def test_autocast(generator):
    """Predictions in bfloat16: gradients and the size stay in float32 and close to those without."""
    results = []
    weight = torch.randn(6, 6, generator=generator)
    x = torch.randn(5, 6, generator=generator)
    target = torch.randn(5, 6, generator=generator)
    example = MLPSynthesizer(x, [16])
    randomize(example, generator)
    for enabled in (False, True):
        producer, interface = nn.Linear(6, 6, bias=False), Interface(copy.deepcopy(example))
        with torch.no_grad():
            producer.weight.copy_(weight)
        for _ in range(2):
            producer.zero_grad()
            interface.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                hidden = interface.receive(x) @ producer.weight.T
                assert hidden.dtype == (torch.bfloat16 if enabled else torch.float32)
                loss = (hidden.float() - target).square().sum() + interface.send(hidden)
            loss.backward()
        results.append(
            (grad(producer.weight), [grad(p) for p in interface.parameters()], interface.target_rms())
        )
        assert grad(producer.weight).dtype == interface.target_rms().dtype == torch.float32
    for plain, mixed in zip(
        [results[0][0], *results[0][1], results[0][2]],
        [results[1][0], *results[1][1], results[1][2]],
        strict=True,
    ):
        assert float((plain - mixed).norm() / plain.norm()) < 0.05
    assert not torch.equal(results[0][0], results[1][0])


def test_autocast_trains_an_m_that_answered_before(generator):
    """torch 2.6 keeps weights that were converted for an answer without a graph, as that of `send` is."""
    message, tokens = torch.randn(5, 6, generator=generator), torch.randint(3, (5,), generator=generator)
    interface = Interface(MLPSynthesizer(message, [16], context=OneHotTokens(3)))
    randomize(interface, generator)
    found = []
    for before in (False, True):
        interface.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if before:
                interface.send(message, tokens)
                interface.predict(message, tokens)
            loss = (interface.receive(message, tokens) ** 2).sum()
        loss.backward()
        found.append(gradients(interface.synthesizer))
    close(found[1], found[0])


def scaled_run(interface: Interface, scale: torch.amp.GradScaler | None, told: bool = True) -> list[Tensor]:
    """Six windows of a recurrent net, one update each, below a cut; its parameters and M's afterwards."""
    random_numbers = torch.Generator().manual_seed(1)
    net = nn.GRU(3, 4).double()
    randomize(net, random_numbers)
    interface = copy.deepcopy(interface)
    parameters = [*net.parameters(), *interface.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    state = torch.zeros(1, 5, 4, dtype=torch.float64)
    for _ in range(6):
        if scale is not None and told:
            interface.loss_scale = scale.scale(torch.ones(()))
        x, targets = random(random_numbers, 3, 5, 3), torch.randint(2, (5,), generator=random_numbers)
        _, state = net(x, interface.receive(state, targets))
        middle = interface(state.tanh(), targets)  # as between layers
        loss = (middle - x.mean()).square().sum() + interface.send(state, targets)
        optimizer.zero_grad()
        if scale is None:
            loss.backward()
            optimizer.step()
        else:
            scale.scale(loss).backward()
            scale.step(optimizer)
            scale.update()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("kind", ["regression", "critic"])
def test_a_loss_scaler_changes_nothing_when_the_interface_is_told(kind, generator):
    """Powers of two, so bit for bit; the scale doubles after every second step."""
    rows = torch.zeros(1, 5, 4, dtype=torch.float64)
    if kind == "critic":
        classifier = nn.Sequential(Rows(), ContextMLP(4, [6], 2))
        randomize(classifier, generator)
        synthesizer: nn.Module = Critic(classifier, 2)
    else:
        synthesizer = MLPSynthesizer(rows, [6], context=OneHotTokens(2))
        randomize(synthesizer, generator)
    interface = Interface(synthesizer, scale=0.5).double()

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)

    plain = scaled_run(interface, None)
    for ours, wanted in zip(scaled_run(interface, scaler()), plain, strict=True):
        assert torch.equal(ours, wanted)
    untold = scaled_run(interface, scaler(), told=False)
    assert not all(torch.allclose(a, b) for a, b in zip(untold, plain, strict=True))


def test_a_scaled_synthetic_gradient_does_not_underflow_in_half_precision():
    """ĝ = 1e-9 vanishes in float16, and times 2^20 it does not."""
    interface = Interface(Says(torch.ones(2, 3, dtype=torch.float16)))
    interface.target_square.fill_(1e-18)
    message = torch.full((2, 3), 4.0, dtype=torch.float16)
    assert not injected(interface, message).any()
    interface.loss_scale = 2.0**20
    close(injected(interface, message).double(), torch.full((2, 3), 1e-9 * 2.0**20).double(), rtol=1e-3)
    # And as the user reads it, it is in the units of the loss, whatever the scaler.
    interface.target_square.fill_(1.0)
    assert torch.equal(interface.synthetic_gradient(message), torch.full_like(message, 1.0))


def test_a_copy_is_a_separate_interface(generator):
    interface = Interface(MLPSynthesizer(random(generator, 4, 3), [5]), scale=0.5, decay=0.9).double()
    randomize(interface, generator)
    feed(interface, random(generator, 4, 3))
    copied = copy.deepcopy(interface)
    state = random(generator, 4, 3)
    assert torch.equal(copied.synthetic_gradient(state), interface.synthetic_gradient(state))
    size, before = interface.target_rms(), gradients(interface)
    feed(copied, 100.0 * random(generator, 4, 3))
    close(gradients(interface), before, rtol=0, atol=0)
    assert torch.equal(interface.target_rms(), size)
    assert float(copied.target_rms()) > float(size)


def test_one_backward_is_enough_and_a_second_is_refused(generator):
    problem = reference.random_problem("lstm", generator)
    net, interface = Net(problem), Interface(MLPSynthesizer(message(problem), [8])).double()
    loss, state = net(problem.windows[0], interface.receive(message(problem)))
    total = loss + interface.send(state)
    total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_two_interfaces_do_not_meet(generator):
    """Their windows interleaved in one graph give what each gives alone."""
    problems = [
        reference.random_problem(kind, generator, rows=rows) for kind, rows in (("lstm", 3), ("gru", 2))
    ]
    synthesizers = [MLPSynthesizer(message(p), [4]).double() for p in problems]
    for synthesizer in synthesizers:
        randomize(synthesizer, generator)
    alone = []
    for problem, synthesizer in zip(problems, synthesizers, strict=True):
        net, interface = Net(problem), Interface(copy.deepcopy(synthesizer)).double()
        run(net, interface, problem)
        alone.append((gradients(net), gradients(interface), interface.target_rms()))

    nets = [Net(problem) for problem in problems]
    interfaces = [Interface(synthesizer).double() for synthesizer in synthesizers]
    first, second = map(message, problems)
    for one, two in zip(problems[0].windows, problems[1].windows, strict=True):
        first, second = interfaces[0].receive(first), interfaces[1].receive(second)
        loss_two, second = nets[1](two, second)
        loss_one, first = nets[0](one, first)
        sent = interfaces[0].send(first) + interfaces[1].send(second)
        (loss_one + loss_two + sent).backward()
    for net, interface, wanted in zip(nets, interfaces, alone, strict=True):
        close((gradients(net), gradients(interface), interface.target_rms()), wanted)


class Says(nn.Module):
    """M that says what it is told to."""

    def __init__(self, gradient: torch.Tensor) -> None:
        super().__init__()
        self.gradient = gradient

    def forward(self, message, context):
        return self.gradient


def injected(interface: Interface, message: torch.Tensor, done: torch.Tensor | None = None) -> torch.Tensor:
    leaf = message.clone().requires_grad_()
    return torch.autograd.grad(interface.send(leaf, None, done), leaf)[0]


@pytest.mark.parametrize(
    ("real", "trust"),
    [(1.0, 1.0), (0.5, 0.5), (3.0, 1.0), (-1.0, 0.0), (0.0, 0.0)],
)
def test_trust_is_the_multiple_that_comes_nearest_to_the_real_gradient(real, trust, generator):
    said = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    message = torch.full((4, 3), 5.0, dtype=torch.float64)
    interface = Interface(Says(said), scale=0.7, normalize=False).double()
    ours = injected(interface, message)
    close(ours, 0.7 * said)
    interface.audit(message, real * ours)
    close(interface.trust, torch.tensor(trust, dtype=torch.float64))
    close(injected(interface, message), trust * ours)


def test_an_audit_compares_what_is_sent_at_that_boundary(generator):
    """With a discount, whatever it was at the boundaries before."""
    said, message = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    interface = Interface(Says(said), scale=0.8, normalize=False).double()
    interface.audit(message, 0.1 * said, discount=0.5)  # 0.1 of 0.4 is 1/4
    assert float(interface.trust) == pytest.approx(0.25)
    interface.audit(message, 0.1 * said, discount=0.25)  # and 0.1 of 0.2 one half
    products, squares = 0.8 * 0.04 + 0.02, 0.8 * 0.16 + 0.04
    assert float(interface.trust) == pytest.approx(products / squares)
    leaf = message.clone().requires_grad_()
    interface.send(leaf, discount=0.5).backward()
    close(grad(leaf), products / squares * 0.4 * said)


def test_trust_is_least_squares_over_fading_audits_of_the_rows_that_go_on(generator):
    said, message = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    done = torch.tensor([False, True, False, False])
    interface = Interface(Says(said), normalize=False, centre=True).double()
    ours = injected(interface, message, done)
    assert not ours[1].any()
    noise = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    reals = [(0.4 * ours + 0.2 * each) * ~done.unsqueeze(1) for each in noise]
    products, squares = 0.0, 0.0
    for real in reals:
        interface.audit(message, real, done=done)
        products = 0.8 * products + float((ours * real).sum())
        squares = 0.8 * squares + float((ours * ours).sum())
    assert 0.1 < products / squares < 0.9
    assert float(interface.trust) == pytest.approx(products / squares, rel=1e-9)


def test_an_audit_of_nothing_said_gives_no_trust():
    interface = Interface(Says(torch.zeros(2, 3)))
    assert interface.trust == 1.0
    interface.audit(torch.ones(2, 3), torch.ones(2, 3))
    assert interface.trust == 0.0
