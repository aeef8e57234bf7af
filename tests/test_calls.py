"""Calls as the loops of other people make them: the right answer, or refused there and then, in words."""

from __future__ import annotations

import copy
import io
import os
import tempfile
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from reference import random
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn import (
    ContextMLP,
    Critic,
    Critique,
    Interface,
    LSTMState,
    MLPSynthesizer,
    OneHotTokens,
    Rows,
    StatePenalty,
    Traced,
    decouple,
)
from dni_rnn.cores.diagonal import DiagonalState
from dni_rnn.pytree import detach, flatten, has_rows, map_tree, unflatten
from dni_rnn.synthesizers import ErrorFeedback

B, H = 4, 6
ENDED = torch.tensor([True, False, True, False])


def shaken(module: nn.Module, generator: torch.Generator) -> Any:
    for parameter in module.parameters():
        parameter.data = random(generator, *parameter.shape).to(parameter.dtype)
    return module


def made(message: Any, generator: torch.Generator, **options: Any) -> Interface:
    """With an M that says something, in units of the loss."""
    batch_dim = options.pop("batch_dim", None)
    m = MLPSynthesizer(message, [5], batch_dim=batch_dim, **{"context": options.pop("context", None)})
    return shaken(Interface(m, normalize=False, **options).double(), generator)


class Echo(nn.Module):
    """M that answers with the message."""

    def forward(self, message: Any, context: Any) -> Any:
        return message


def grads(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def cubes(tree: Any) -> Tensor:
    return torch.stack([(leaf**3).sum() for leaf in flatten(tree, has_rows)[0]]).sum()


def gradients(module: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    assert found
    assert max(float(g.abs().max()) for g in found) > 1e-6
    return found


def same(one: Sequence[Any], other: Sequence[Any], tolerance: float = 1e-10) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Rows that are done.

FORMS = {
    "column": ENDED[:, None],
    "uint8": ENDED.to(torch.uint8),
    "int column": ENDED.long()[:, None],
    "float": ENDED.float(),
    "float64 array": ENDED.double().numpy(),
    "bool array column": ENDED.numpy()[:, None],
    "list": ENDED.tolist(),
    "list of numbers": [1, 0, 1.0, 0],
    "tuple": tuple(ENDED.tolist()),
    "array turned round": ENDED.flip(0).numpy()[::-1],
    "array of objects": ENDED.numpy().astype(object),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_done_of_any_type_is_one_truth_value_a_row(kind, form, generator):
    leaves = [random(generator, 1, B, H) for _ in range(1 if kind == "gru" else 2)]
    state = leaves[0] if kind == "gru" else tuple(leaves)
    interface, penalty = made(state, generator, centre=True), StatePenalty(1.0).double()
    core = {"gru": nn.GRU, "lstm": nn.LSTM}[kind](3, H).double()
    x = random(generator, 2, B, 3)
    found = []
    for done in (ENDED, FORMS[form]):
        sent = [leaf.clone().requires_grad_() for leaf in leaves]
        tree = sent[0] if kind == "gru" else tuple(sent)
        interface.send(tree, done=done).backward()
        (arrived,) = grads(sent[:1])
        assert not arrived[0, ENDED].any()
        assert arrived[0, ~ENDED].all()
        received = interface.receive(state, done=done)
        cubes(received).backward()
        penalty.mean_square.zero_()
        penalty.count.zero_()
        measured = penalty.measure(state, done)
        cubes(measured).backward()
        (10 * penalty(map_tree(lambda leaf: 10 * leaf, tree), done)).backward()
        traced = Traced(core, 8)
        _, after = traced(x, state)
        cubes(after).backward()
        core.zero_grad()
        _, after = traced(x, after, done)
        cubes(after).backward()
        traced.flush()
        found.append(
            [s.grad for s in sent] + gradients(interface) + gradients(core) + [penalty.mean_square.clone()]
        )
        found[-1] += flatten(interface.predict(state, done=done))[0]
    same(*found)


@pytest.mark.parametrize(
    "done",
    [
        ENDED[None],
        ENDED[:3],
        ENDED[:1],
        torch.tensor(True),
        torch.zeros(B, 2),
        True,
        "yes",
        [ENDED.tolist()] * 2,
        ENDED.to_sparse(),
    ],
    ids=["(1, B)", "too few", "one", "0-d", "(B, 2)", "a bool", "a str", "(2, B)", "sparse"],
)
def test_done_that_is_something_else_is_refused_at_the_call(done, generator):
    state = torch.zeros(1, B, H, dtype=torch.float64)
    interface, penalty, traced = made(state, generator), StatePenalty(1.0), Traced(nn.GRU(3, H).double())
    for call in (
        lambda: interface.receive(state, done=done),
        lambda: interface.send(state, done=done),
        lambda: interface.predict(state, done=done),
        lambda: interface.synthetic_gradient(state, done=done),
        lambda: interface.audit(state, state, done=done),
        lambda: penalty.measure(state, done),
        lambda: penalty(state, done),
        lambda: traced(torch.zeros(2, B, 3, dtype=torch.float64), state, done),
    ):
        with pytest.raises(ValueError, match="done must be"):
            call()


# What is known ahead.


@pytest.mark.parametrize("window", [B, 3])
@pytest.mark.parametrize("kind", ["tokens", "critic"])
def test_rows_first_is_said(kind, window, generator):
    """Where W = B, nothing but the argument can tell."""
    tokens = torch.randint(5, (window, B), generator=generator)
    x = random(generator, B, H)
    answers = []
    for batch_first, context in ((False, tokens), (True, tokens.t())):
        if kind == "tokens":
            m: nn.Module = ContextMLP(H, [7], H, OneHotTokens(5, window, batch_first=batch_first)).double()
        else:
            m = Critic(ContextMLP(H, [7], 5 * window).double(), 5, batch_first=batch_first)
        shaken(m, generator.manual_seed(1))
        answer = m(x, context)
        answers.append([*answer] if isinstance(answer, Critique) else [answer])
        if window == B:
            other = m(x, context.t())
            assert not torch.equal(other[0], answer[0])
        else:
            with pytest.raises(ValueError, match=r"the context must be integers \((3, B|B, 3)\)"):
                m(x, context.t())
    same(answers[0], answers[1])


@pytest.mark.parametrize("known", range(4))
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
def test_behind_the_end_of_a_text_nothing_is_known(known, batch_first, dtype, generator):
    tokens = torch.randint(5, (known, B), generator=generator)
    filled = torch.cat([tokens, torch.full((3 - known, B), -1)])
    given = (tokens.t() if batch_first else tokens).to(dtype)
    x = random(generator, B, H)
    said: list[list[Tensor]] = []
    for first, context in ((False, filled), (batch_first, given)):
        mlp = ContextMLP(H, [7], H, OneHotTokens(5, 3, batch_first=first)).double()
        critic = Critic(ContextMLP(H, [7], 15).double(), 5, batch_first=first)
        shaken(nn.ModuleList([mlp, critic]), generator.manual_seed(1))
        said.append([mlp(x, context), *critic(x, context)])
    same(said[0], said[1])


@pytest.mark.parametrize(
    "labels", [torch.tensor([[2], [0], [1], [4]]), torch.tensor([[2, 0, 1, 4]]), torch.tensor([2, 0, 1, 4])]
)
def test_labels_may_be_a_column(labels, generator):
    x = random(generator, B, H)
    m = shaken(ContextMLP(H, [7], H, OneHotTokens(5)).double(), generator)
    critic = shaken(Critic(ContextMLP(H, [7], 5).double(), 5), generator)
    wanted = m(x, torch.tensor([2, 0, 1, 4])), *critic(x, torch.tensor([2, 0, 1, 4]))
    same([m(x, labels), *critic(x, labels)], list(wanted))


@pytest.mark.parametrize(
    ("context", "why"),
    [
        (torch.zeros(2, B), "integers"),
        (torch.zeros(2, B, dtype=torch.bool), "integers"),
        (torch.zeros(2 * B, dtype=torch.long), "integers"),
        (torch.zeros(2, B, 1, dtype=torch.long), "integers"),
        (torch.zeros(3, B, dtype=torch.long), "integers"),
        ([[0] * B] * 2, "a tensor of integers"),
        (torch.zeros(2, B - 1, dtype=torch.long), "has 3 rows, the message 4"),
        (torch.zeros(2, 1, dtype=torch.long), "has 1 rows, the message 4"),
        (torch.zeros(2, B, dtype=torch.long, device="meta"), "the context is on meta"),
    ],
    ids=str,
)
def test_a_context_that_is_something_else_is_refused_at_the_call(context, why, generator):
    state = random(generator, 1, B, H)
    critic = Critic(nn.Sequential(Rows(), ContextMLP(H, [], 10)).double(), 5)
    for interface in (made(state, generator, context=OneHotTokens(5, 2)), Interface(critic).double()):
        for call in (interface.receive, interface.send):
            with pytest.raises(ValueError, match=why):
                call(state, context)


def test_a_symbol_beyond_the_last_is_not_one_of_the_next_position(generator):
    m = ContextMLP(H, [7], H, OneHotTokens(5, 2)).double()
    m(random(generator, B, H), torch.full((2, B), 4))
    with pytest.raises(RuntimeError, match="out of bounds"):
        m(random(generator, B, H), torch.full((2, B), 5))


# Trees.


class Named(NamedTuple):
    first: Any
    second: Any


class Strict(tuple):
    """A constructor of its own, and attributes."""

    def __new__(cls, one: Any, *, two: Any) -> Strict:
        return super().__new__(cls, (one, two))


class Noted(list):
    note = "class"


@dataclass(frozen=True)
class Memory:
    words: Any
    age: int = 0


def test_a_tree_comes_back_as_it_went_in(generator):
    h = random(generator, B, H)
    strict: Any = Strict(h, two=2 * h)
    noted: Any = Noted([h, None])
    strict.layer, noted.note = 7, "own"
    counts = defaultdict(list, {"b": h, "a": 3})
    message: OrderedDict[str, Any] = OrderedDict(z=strict, count=3, a=noted, step=torch.tensor(9), mask=h > 0)
    message.update(part=Memory(h, 5), both=Named(h, None), table={2: h, "1": h, (0,): h}, counts=counts)
    message.update(loss=torch.tensor(0.5), nothing={}, flag=True)
    interface = Interface(Echo(), centre=True, normalize=False, batch_dim=0)
    for back in (interface.receive(message), interface(message), interface.synthetic_gradient(message)):
        assert type(back) is OrderedDict
        assert list(back) == list(message)
        assert type(back["z"]) is Strict
        assert vars(back["z"]) == {"layer": 7}
        assert type(back["a"]) is Noted
        assert back["a"].note == "own"
        assert back["a"][1] is None
        assert type(back["part"]) is Memory
        assert back["part"].age == 5
        assert list(back["table"]) == [2, "1", (0,)]
        assert back["counts"].default_factory is list
        assert list(back["counts"]) == ["b", "a"]
        assert (back["count"], back["flag"], back["nothing"]) == (3, True, {})
        assert back["step"] is message["step"]
        assert back["mask"] is message["mask"]
        assert isinstance(back["both"], Named)
    assert message["z"][0] is h
    received = interface.receive(message)
    for one, other in zip(flatten(received, has_rows)[0], flatten(message, has_rows)[0], strict=True):
        assert torch.equal(one, other)
        assert one is not other


def test_a_lone_number_does_not_carry_the_past_along(generator):
    weight = torch.ones((), requires_grad=True)
    message = {"h": random(generator, B, H) * weight, "mean": 2.0 * weight}
    received = made(message, generator).receive(message)
    assert not received["mean"].requires_grad
    assert float(received["mean"]) == 2.0


def test_torchs_own_tuples_pass(generator):
    both = torch.max(random(generator, B, H), 0)
    back = detach(both)
    assert type(back) is type(both)
    assert torch.equal(back.indices, both.indices)


# A state that is not there yet.


def test_none_is_the_initial_state_of_a_first_window(generator):
    """Its gradient is that of zeros, and M is neither trained nor in the way."""
    lstm, x = nn.LSTM(3, H).double(), random(generator, 2, B, 3)
    zeros = (torch.zeros(1, B, H, dtype=torch.float64),) * 2
    interface, penalty = made(zeros, generator), StatePenalty(0.1).double()
    found = []
    for state in (zeros, None):
        received = interface.receive(state, done=ENDED)
        assert (received is None) == (state is None)
        if state is None:
            interface.zero_grad()
        _, after = lstm(x, received)
        (after[0].sum() + interface.send(after)).backward()
        found.append(gradients(lstm))
    assert all(p.grad is None for p in interface.parameters())
    same(*found)
    assert penalty.measure(None) is None
    assert float(penalty(None)) == float(interface.send(None).detach()) == 0.0
    assert interface(None) is interface.predict(None) is interface.synthetic_gradient(None) is None
    interface.audit(None, None)
    traced = Traced(lstm)
    _, after = traced(x, interface.receive(None))
    (after[0].sum() + interface.send(after)).backward()
    same(gradients(lstm), found[0])


@pytest.mark.parametrize("first", ["received", "not received"])
def test_data_parallel_training_may_begin_with_nothing(first, generator):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.interface = nn.GRU(3, H), Interface(MLPSynthesizer(torch.zeros(1, 1, H), [5]))

        def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            if state is not None or first == "received":
                state = self.interface.receive(state)
            out, state = self.gru(x, state)
            return out.square().mean() + self.interface.send(state), state

    alone, shared = Model(), Model()
    shared.load_state_dict(alone.state_dict())
    handle, path = tempfile.mkstemp()
    os.close(handle)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    try:
        found = []
        for model in (alone, nn.parallel.DistributedDataParallel(shared)):
            state = None
            for x in random(generator.manual_seed(1), 3, 2, B, 3).float():
                model.zero_grad()
                loss, state = model(x, state)
                loss.backward()
            found.append([p.grad for p in model.parameters() if p.grad is not None])
    finally:
        dist.destroy_process_group()
    assert len(found[0]) == len(list(alone.parameters()))
    same(*found, tolerance=1e-6)


# Changes in place.


@pytest.mark.parametrize("bounded", [True, False])
def test_what_is_received_may_be_changed_in_place(bounded, generator):
    """As if a new tensor had been made of it: the gradients, and the message, which does not change."""
    state = random(generator, 1, B, H), random(generator, 1, B, H)
    before = [leaf.clone() for leaf in state]
    keep = (~ENDED).double()[None, :, None]
    interface = shaken(
        Interface(MLPSynthesizer(state, [5], bounded=bounded), normalize=False).double(), generator
    )
    penalty, found = StatePenalty(1.0).double(), []
    for in_place in (False, True):
        for take in (interface.receive, penalty.measure):
            h, c = take(state if take is interface.receive else [leaf.clone() for leaf in state])
            if in_place:
                h *= keep
                c[:, 1] = 0.0
            else:
                h = h * keep
                c = torch.cat([c[:, :1], torch.zeros_like(c[:, 1:2]), c[:, 2:]], 1)
            (h**3 + c**2).sum().backward()
        found.append([*gradients(interface), penalty.mean_square.clone()])
        penalty.mean_square.zero_()
        penalty.count.zero_()
    same(*found)
    same(list(state), before)


@pytest.mark.parametrize("method", ["dni", "cdni", "critic"])
def test_a_layer_behind_a_cut_may_work_in_place(method, generator):
    x, labels = random(generator, B, 5), torch.tensor([0, 2, 1, 1])
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=in_place), nn.Linear(8, 3))
        model = decouple(net, [1], torch.zeros(1, 5), classes=3, method=method).double()
        for parameter in model.interfaces.parameters():
            parameter.data.add_(0.1)
        F.cross_entropy(model(x, labels), labels).backward()
        found.append(gradients(model))
    same(*found)


@pytest.mark.parametrize(
    ("change", "frozen"), [("in place", False), ("in place", True), ("one leaf", False)]
)  # what a frozen M returns has no history
def test_a_trace_notices_a_state_that_was_changed(change, frozen, generator):
    state = torch.zeros(1, B, H), torch.zeros(1, B, H)
    interface = Interface(MLPSynthesizer(state, [5]))
    interface.requires_grad_(not frozen)
    traced = Traced(nn.LSTM(3, H))
    h, c = interface.receive(state)
    if change == "in place":
        h *= 0.5
    else:
        h = h * 0.5
    with pytest.raises(ValueError, match=r"changed after Interface\.receive"):
        traced(torch.zeros(2, B, 3), (h, c))


# Types and devices.


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("whole", [False, True], ids=["interface in float32", "all"])
def test_nets_in_other_types(dtype, tolerance, whole, generator):
    """The same as in float32, to the precision of the type; the running size moves by finer steps."""
    state = random(generator, 1, B, H).float()
    interface = shaken(Interface(MLPSynthesizer(state, [5]), centre=True), generator)
    penalty = StatePenalty(1.0)
    found = []
    for here in (torch.float32, dtype):
        each, own = copy.deepcopy(interface), copy.deepcopy(penalty)
        each.target_square.fill_(1.2345678)
        each.target_count.fill_(1000.0)
        if whole:
            each, own = each.to(here), own.to(here)
        assert float(each.target_square) == pytest.approx(1.2345678, rel=1e-7)
        sent: Any = state.to(here, copy=True).requires_grad_()
        (each.send(sent, done=ENDED)).backward()
        assert sent.grad.dtype == here
        received = each.receive(state.to(here))
        assert received.dtype == here
        (received**2).sum().backward()
        own.measure(state.to(here)).sum().backward()
        assert float(own.mean_square) == 1.0
        assert each.predict(state.to(here)).dtype == here
        assert each.target_square.dtype == (dtype if whole and here == torch.float64 else torch.float32)
        moved = 1.2345678 + (4 * float((state**2).mean()) - 1.2345678) * 0.01
        assert float(each.target_square) == pytest.approx(moved, rel=1e-4)
        found.append([g.float() for g in [sent.grad, *gradients(each)]])
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm()) <= tolerance * float(a.norm())


@pytest.mark.parametrize("method", ["dni", "cdni", "critic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_cut_nets_in_other_types(method, dtype, generator):
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    model = decouple(net, [1], torch.zeros(1, 5), classes=3, method=method)
    for module in (model.parts, model):  # the net alone, then all
        module.to(dtype)
        F.cross_entropy(
            model(random(generator, B, 5).to(dtype), torch.arange(4) % 3), torch.arange(4) % 3
        ).backward()
        assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parts.parameters())
        gradients(model)


def test_a_batch_of_hundreds_is_centred_in_16_bits(generator):
    """257 is no number of bfloat16."""
    interface = Interface(Echo(), centre=True, normalize=False, batch_dim=0).bfloat16()
    message = (random(generator, 257, 3) + 4.0).bfloat16()
    done = torch.zeros(257, dtype=torch.bool)
    sent = interface.synthetic_gradient(message, done=done)
    wanted = message.double() - message.double().mean(0)
    torch.testing.assert_close(sent.double(), wanted, rtol=0.01, atol=0.002)


def test_a_message_elsewhere_is_refused(generator):
    interface = made(torch.zeros(B, H), generator)
    with pytest.raises(ValueError, match="the message is on meta, its interface on cpu"):
        interface.send(torch.zeros(B, H, device="meta"))
    with pytest.raises(ValueError, match="lies on one device"):
        interface.send((torch.zeros(B, H), torch.zeros(B, H, device="meta")))
    with pytest.raises(ValueError, match="view_as_real"):
        interface.receive(torch.zeros(B, H, dtype=torch.complex64))
    with pytest.raises(ValueError, match="dense"):
        interface.receive(torch.zeros(B, H).to_sparse())


# Where rows lie.


def test_rows_of_each_leaf_lie_where_they_are_said_to(generator):
    """The same gradients as of a message whose leaves all have their rows first."""
    dims = {"lstm": (1, -2), "memory": 0, "usage": 0, "wide": 3}
    rows_first = {
        "lstm": (random(generator, B, 2, H), random(generator, B, 2, H)),
        "memory": random(generator, B, 5, 2),
        "usage": random(generator, B),
        "wide": random(generator, B, 2, 3, 2),
    }

    def laid(tree: Any) -> Any:
        leaves, spec = flatten(tree)
        return unflatten(
            [leaf.movedim(0, dim) for leaf, dim in zip(leaves, (1, 1, 0, 0, 3), strict=True)], spec
        )

    found = []
    for message, batch_dim in ((rows_first, 0), (laid(rows_first), dims)):
        message = map_tree(lambda leaf: leaf.clone().requires_grad_(), message)
        interface = made(message, generator.manual_seed(1), batch_dim=batch_dim, centre=True)
        assert interface.batch_dim == batch_dim, "said once, to M"
        penalty = StatePenalty(1.0, batch_dim=batch_dim).double()
        interface.send(message, done=ENDED).backward()
        received = interface.receive(message, done=ENDED)
        cubes(received).backward()
        sent: list[Any] = [leaf.grad for leaf in flatten(message)[0]]
        if batch_dim != 0:
            sent = [g.movedim(dim, 0) for g, dim in zip(sent, (1, 1, 0, 0, 3), strict=True)]
        excess = penalty(map_tree(lambda leaf: 9 * leaf, message), ENDED, rms=torch.ones(()))
        found.append([*sent, *gradients(interface), excess.detach()])
    same(*found)


def test_rows_that_lie_elsewhere_are_noticed(generator):
    mixed = {"lstm": (torch.zeros(1, B, H),) * 2, "memory": torch.zeros(B, 5, 2)}
    for call in (lambda: MLPSynthesizer(mixed), lambda: StatePenalty(1.0)(mixed)):
        with pytest.raises(ValueError, match="the same number of rows"):
            call()
    with pytest.raises(ValueError, match="for 2 tensors, but 3 tensors have rows"):
        MLPSynthesizer(mixed, batch_dim={"lstm": (1, 1)})
    with pytest.raises(TypeError, match="batch_dim"):
        MLPSynthesizer(mixed, batch_dim={"lstm": 0.5})
    with pytest.raises(ValueError, match="no dimension"):
        MLPSynthesizer(torch.zeros(B, H), batch_dim=2)
    for module in (Interface(nn.Identity()), StatePenalty(1.0)):
        with pytest.raises(ValueError, match="say where the rows"):
            module(torch.zeros(B, 2, 5, 5))
    assert Interface(ContextMLP(2, [], 2, kernel=3)).batch_dim == 0, "maps have their rows there"
    m = MLPSynthesizer(torch.zeros(1, B, H))
    with pytest.raises(ValueError, match=r"built for a message \(B, 6\), not \(1, 24\)"):
        Interface(m).receive(torch.zeros(B, 1, H))
    with pytest.raises(ValueError, match=r"inputs.*go with a state \[\(1, 4, 6\)\], not \[\(1, 3, 6\)\]"):
        Traced(nn.GRU(3, H))(torch.zeros(2, B, 3), torch.zeros(1, 3, H))


def test_what_m_and_an_audit_say_has_the_shapes_of_the_message(generator):
    class Mean(nn.Module):
        def forward(self, message: Tensor, context: Any) -> Critique:
            return Critique(message, message.sum(1).mean())

    with pytest.raises(ValueError, match="one loss a row"):
        Interface(Mean()).receive(torch.zeros(B, H))
    with pytest.raises(ValueError, match="a real gradient must be tensors like the message"):
        made(torch.zeros(B, H), generator).audit(torch.zeros(B, H), torch.zeros(H))


class Answering(nn.Module):
    """M whose one layer is used by a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(H, H), function

    def forward(self, message: Tensor, context: Any) -> Tensor:
        return self.function(self.layer, message)


def test_an_m_that_would_do_harm_or_never_learn_is_refused(generator):
    """It shares the message with the sender, and is trained through its answer."""
    message = random(generator, B, H).float()
    for harm in (torch.relu_, lambda m: m.mul_(0.5), lambda m: m[:1].zero_()):
        working = Interface(Answering(lambda layer, m, harm=harm: layer(harm(m))))
        for call in (working.receive, working.send, working.predict):
            with pytest.raises(ValueError, match="changed its message in place"):
                call(message.clone())
    Interface(Answering(lambda layer, m: layer(m.clone().relu_()))).receive(message)
    cut = Interface(Answering(lambda layer, m: layer(m).detach()))
    with pytest.raises(ValueError, match="would never be trained"):
        cut.receive(message)
    cut.requires_grad_(False).receive(message)
    with torch.inference_mode():
        cut.predict(random(generator, B, H).float())


def test_an_example_without_rows_is_none():
    for example in (None, (), torch.zeros(2, 3).long(), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="nothing here has rows"):
            MLPSynthesizer(example)


@pytest.mark.parametrize("kind", ["lstm", "gru", "cell"])
def test_a_state_that_is_not_of_the_core_is_refused_where_it_enters(kind):
    """Also where a kernel would take what it needs of it, as the first layer of two."""
    core = {"lstm": nn.LSTM(3, H), "gru": nn.GRU(3, H), "cell": nn.GRUCell(3, H)}[kind]
    x = torch.zeros(2, B, 3) if kind != "cell" else torch.zeros(B, 3)
    shape = (1, B, H) if kind != "cell" else (B, H)
    right: Any = torch.zeros(shape)
    wrong = [torch.zeros(2, B, H), torch.zeros(*shape[:-1], H + 1), (right, right, right)]
    if kind == "lstm":
        wrong = [(w, w) for w in wrong[:2]] + [right, (torch.zeros(B, H), torch.zeros(B, H))]
    for mode in (True, False):
        for state in wrong:
            with pytest.raises(ValueError, match="go with a state"):
                Traced(core).train(mode)(x, state)
    if kind != "cell":
        for inputs, error in ((x[:0], "one step"), (nn.utils.rnn.pack_sequence([x[0]]), "are a tensor")):
            with pytest.raises((ValueError, TypeError), match=error):
                Traced(core)(inputs)


def test_a_core_that_does_more_than_torchs_is_not_traced_as_torchs():
    class Doubled(nn.LSTM):
        def forward(self, x: Tensor, state: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(2 * x, state)

    class Named(nn.LSTM):
        pass

    with pytest.raises(TypeError, match="a forward of its own"):
        Traced(Doubled(3, H))
    for normed in (nn.utils.parametrizations.weight_norm, torch.nn.utils.spectral_norm):
        with pytest.raises(ValueError, match="weight norm"):
            Traced(normed(nn.GRU(3, H), "weight_hh_l0"))
    Traced(Named(3, H))(torch.zeros(2, B, 3))


def test_a_batch_without_rows_passes(generator):
    state = torch.zeros(2, 0, H, dtype=torch.float64), torch.zeros(2, 0, H, dtype=torch.float64)
    interface = made(state, generator)
    received = interface.receive(state)
    (sum(leaf.sum() for leaf in received) + interface.send(state)).backward()
    assert [leaf.shape for leaf in received] == [(2, 0, H)] * 2


@pytest.mark.parametrize("method", ["dni", "cdni", "critic", "local", "local+critic", "error"])
def test_a_batch_without_rows_passes_a_cut(method):
    """It adds nothing."""
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    if method == "error":
        options: dict[str, Any] = {"synthesizer": lambda message: ErrorFeedback(message, 3)}
    else:
        options = {"method": method}
    model = decouple(net, [1], torch.zeros(1, 5), 3, **options)
    model(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)).sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    assert all(buffer.isfinite().all() for buffer in model.buffers())


# Nets of other ranks.

NETS = {
    "steps": (lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), (7, 5)),
    "normalized steps": (lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)), (7, 5)),
    "line": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(28, 3)), (2, 9)),
    "map": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)), (2, 3, 5)),
    "volume": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)),
        (2, 3, 3, 3),
    ),
}


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("method", ["dni", "cdni", "critic"])
@pytest.mark.parametrize("shape", NETS)
def test_what_a_part_gets_is_what_m_says_of_its_message(shape, method, rows, generator):
    """One row, the last of an epoch, is no exception."""
    build, size = NETS[shape]
    model = decouple(build(), [2], torch.zeros(1, *size), classes=3, method=method).double()
    shaken(model.interfaces, generator)
    x, labels = random(generator, rows, *size), torch.randint(3, (rows,), generator=generator)
    interface: Any = model.interfaces[0]
    below = model.parts[0]
    interface.target_square.fill_(1.0)
    statistics = copy.deepcopy(interface.state_dict())
    model(x, labels).square().sum().backward()
    got = [p.grad for p in below.parameters()]
    gradients(interface)
    interface.load_state_dict(statistics)
    message = below(x)
    said = interface.synthetic_gradient(message, labels)
    assert said.abs().max() > 0
    same(got, list(torch.autograd.grad(message, list(below.parameters()), said)))


def test_m_answers_a_sequence_step_by_step(generator):
    model = decouple(NETS["steps"][0](), [2], torch.zeros(1, 7, 5), classes=3, method="cdni").double()
    interface: Any = model.interfaces[0]
    m = shaken(interface.synthesizer, generator)
    message, labels = random(generator, B, 7, 8), torch.arange(B) % 3
    whole = m(message, labels)
    for t in range(7):
        same([m(message[:, t : t + 1], labels)], [whole[:, t : t + 1]])
    assert not torch.allclose(whole, m(message, (labels + 1) % 3))


@pytest.mark.parametrize(
    ("net", "example", "error", "why"),
    [
        (nn.Sequential(nn.LSTM(3, 4), nn.Identity()), torch.zeros(1, 2, 3), TypeError, "a tuple"),
        (nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 3)), torch.zeros(2, 4, 3), ValueError, "turns 2 into"),
        (nn.Sequential(nn.Tanh(), nn.Linear(3, 3)), torch.zeros(2, 4, 3), ValueError, "a sequence or a"),
        (nn.Sequential(nn.Flatten(0), nn.Tanh()), torch.zeros(4, 1), ValueError, "no synthesizer of"),
        (
            nn.Sequential(nn.Identity(), nn.Embedding(9, 3)),
            torch.zeros(2, 4).long(),
            ValueError,
            "no gradient",
        ),
    ],
    ids=["tuple", "rows", "unknown", "a number a row", "integers"],
)
def test_a_message_that_no_m_reads_is_refused_by_decouple(net, example, error, why):
    with pytest.raises(error, match=why):
        decouple(net, [1], example, method="dni")


# Copies, files, compilers.


class Keeps(nn.Module):
    """Keeps its state, detached, between the windows."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, H)
        self.state: Any = LSTMState(torch.zeros(1, B, H), torch.zeros(1, B, H))
        self.interface = Interface(MLPSynthesizer(self.state, [5]))
        self.core = Traced(self.lstm, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.core(x, self.interface.receive(self.state))
        loss = out.square().mean() + self.interface.send(state)
        self.state = detach(state)
        return loss


def test_a_model_that_keeps_its_state_is_copied_and_saved_at_any_time(generator):
    model = Keeps()
    x = random(generator, 3, 2, B, 3).float()
    model(x[0]).backward()
    waiting = model(x[1])
    again = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    waiting.backward()
    found = []
    for each in (again, loaded):
        each.zero_grad()
        each(x[2]).backward()
        found.append(gradients(each))
    same(*found)


def test_what_is_saved_is_loaded_as_weights_alone(generator):
    model = Keeps()
    received = model.interface.receive(model.state)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "state": model.state, "received": detach(received)}, file)
    torch.save({"received": received}, other := io.BytesIO())
    for each in (file, other):
        each.seek(0)
    loaded = torch.load(file, weights_only=True)
    model.load_state_dict(loaded["model"])
    assert type(loaded["state"]) is LSTMState
    assert type(torch.load(other, weights_only=True)["received"]) is LSTMState
    torch.save(DiagonalState(received[0], received[1]), last := io.BytesIO())
    last.seek(0)
    assert type(torch.load(last, weights_only=True)) is DiagonalState


def test_a_saved_interface_is_loaded_where_torchs_own_layers_are_allowed(generator):
    state = random(generator, 1, B, H)
    interface = made(state, generator, context=OneHotTokens(5, 2), centre=True)
    tokens = torch.randint(5, (2, B), generator=generator)
    cubes(interface.receive(state, tokens)).backward()
    file = io.BytesIO()
    torch.save(nn.ModuleList([interface, StatePenalty(0.1)]), file)
    file.seek(0)
    with torch.serialization.safe_globals([nn.ModuleList, nn.Linear, nn.Identity, nn.EmbeddingBag]):
        loaded, _ = torch.load(file, weights_only=True)
    assert torch.equal(loaded.synthetic_gradient(state, tokens), interface.synthetic_gradient(state, tokens))


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated")  # torch.compile does so itself
def test_a_compiled_critic_is_the_critic_and_says_that_it_is_not_compiled(generator):
    x, labels = random(generator, B, 5), torch.tensor([0, 2, 1, 1])
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    model = decouple(net, [1], torch.zeros(1, 5), classes=3).double()
    shaken(model.interfaces, generator)
    F.cross_entropy(model(x, labels), labels).backward()
    wanted = gradients(model)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.warns(UserWarning, match="a Critic runs outside"):
        loss = F.cross_entropy(compiled(x, labels), labels)
    loss.backward()
    same(gradients(model), wanted)


# A text to its end.


def test_a_loop_that_is_told_what_comes_runs_to_the_end_of_its_text(generator):
    """Windows of 4 steps, the last of 1, and nothing known at its end. In each the gradient of the detached
    loop, while M says nothing."""
    symbols, bptt, known = 7, 4, 8
    text = torch.randint(symbols, (22, B), generator=generator)
    embed, lstm, readout = nn.Embedding(symbols, 4), nn.LSTM(4, H), nn.Linear(H, symbols)
    net = nn.ModuleList([embed, lstm, readout])
    state = plain = (torch.zeros(1, B, H), torch.zeros(1, B, H))
    interface = Interface(MLPSynthesizer(state, [H], context=OneHotTokens(symbols, known)), centre=True)
    lengths = []
    for start in range(0, len(text) - 1, bptt):
        end = min(start + bptt, len(text) - 1)
        lengths.append(end - start)
        state = interface.receive(state, text[start : start + known])
        output, state = lstm(embed(text[start:end]), state)
        loss = F.cross_entropy(readout(output).flatten(0, 1), text[start + 1 : end + 1].flatten())
        (loss + interface.send(state, text[end : end + known])).backward()
        found = gradients(net)
        output, plain = lstm(embed(text[start:end]), detach(plain))
        F.cross_entropy(readout(output).flatten(0, 1), text[start + 1 : end + 1].flatten()).backward()
        same(found, gradients(net), tolerance=1e-6)
    assert lengths == [4, 4, 4, 4, 4, 1]
