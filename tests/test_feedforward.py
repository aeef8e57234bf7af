"""Cut feed-forward nets against the uncut ones: gradients, statistics, sparse updates, unlock."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from reference import close, grad, gradients, random, randomize
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.agreement import Agreement
from dni_rnn.feedforward import Decoupled, agreement, decouple, split
from dni_rnn.interface import Interface
from dni_rnn.nets import cnn, fcn, sigmoid_net, vgg
from dni_rnn.synthesizers import ContextMLP, Critic

ROWS, CLASSES = 6, 3
SHAPES = {"mlp": (5,), "cnn": (2, 9, 9)}
every_net = pytest.mark.parametrize("kind", list(SHAPES))
every_method = pytest.mark.parametrize("method", ["dni", "cdni", "critic"])
or_local = pytest.mark.parametrize("method", ["dni", "cdni", "critic", "local", "local+critic"])


def make_net(kind: str, generator: torch.Generator) -> nn.Sequential:
    net = fcn(5, CLASSES, 4, 7) if kind == "mlp" else cnn(SHAPES["cnn"], CLASSES, 4, 3)
    net.double()
    randomize(net, generator)
    return net


def batch(kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return random(generator, ROWS, *SHAPES[kind]), torch.randint(CLASSES, (ROWS,), generator=generator)


def cut(net: nn.Sequential, method: Any, kind: str, generator: torch.Generator, **options: Any) -> Decoupled:
    """With synthesizers and local losses that say something."""
    if method != "local":
        options = {"hidden": [4], "norm": False, **options}
    model = decouple(net, [1, 2, 3], torch.zeros(2, *SHAPES[kind]).double(), CLASSES, method, **options)
    for module in (model.interfaces, model.losses, model.guesses):
        module.double()
        randomize(module, generator)
    for interface in model.interfaces:
        interface.get_buffer("target_square").fill_(0.25)
        interface.get_buffer("target_count").fill_(3.0)
    return model


class Oracle(nn.Module):
    """M(message, labels) = the true gradient there, found by running copies of the parts that follow."""

    def __init__(self, rest: Sequence[nn.Module]) -> None:
        super().__init__()
        self.rest = [rest]  # a list hides it: its parameters are not M's
        self.error = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, message: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = out = message.detach().requires_grad_()
            for part in copy.deepcopy(self.rest[0]):
                out = part(out)
            return torch.autograd.grad(F.cross_entropy(out, labels), leaf)[0] + self.error


def with_oracles(net: nn.Sequential, cuts: Sequence[int]) -> Decoupled:
    parts = split(net, cuts)
    made = [
        Interface(Oracle(parts[i + 1 :]), normalize=False, batch_dim=0).double() for i in range(len(cuts))
    ]
    return Decoupled(parts, made)


def part_gradients(model: Decoupled) -> list[list[Tensor | None]]:
    return [[p.grad for p in part.parameters()] for part in model.parts]


@every_net
@pytest.mark.parametrize("cuts", [[1], [2], [1, 3], [1, 2, 3]])
def test_oracle_gives_the_gradients_of_backpropagation(kind, cuts, generator):
    net = make_net(kind, generator)
    plain = copy.deepcopy(net)
    x, labels = batch(kind, generator)
    model = with_oracles(net, cuts)
    F.cross_entropy(model(x, labels), labels).backward()
    F.cross_entropy(plain(x), labels).backward()
    close(gradients(net), gradients(plain))
    assert all(float(g.abs().max()) > 1e-8 for name, g in gradients(plain).items() if name.endswith("weight"))
    # What arrives at each cut is what the oracle said: it is the fixed point of its own training.
    for interface in model.interfaces:
        assert abs(float(grad(interface.get_parameter("synthesizer.error")))) < 1e-12


@every_net
@every_method
def test_zero_synthesizers_leave_only_the_last_part_to_learn(kind, method, generator):
    net = make_net(kind, generator)
    plain = copy.deepcopy(net)
    x, labels = batch(kind, generator)
    model = decouple(net, [1, 2, 3], x, CLASSES, method)  # they say zero until they are stepped
    model.double()
    F.cross_entropy(model(x, labels), labels).backward()
    F.cross_entropy(plain(x), labels).backward()
    *before, last = part_gradients(model)
    assert all(not g.any() for part in before for g in part if g is not None)
    close(last, [p.grad for p in plain[3].parameters()])
    assert any(g is not None and g.any() for g in last)
    # And the synthesizer before the last part has begun to learn.
    assert any(p.grad is not None and p.grad.any() for p in model.interfaces[2].parameters())


@every_net
def test_method_none_trains_the_last_part_alone(kind, generator):
    net = make_net(kind, generator)
    plain = copy.deepcopy(net)
    x, labels = batch(kind, generator)
    model = decouple(net, [2], x, method="none")
    F.cross_entropy(model(x, labels), labels).backward()
    F.cross_entropy(plain(x), labels).backward()
    assert all(p.grad is None for p in model.parts[0].parameters())
    close([p.grad for p in model.parts[1].parameters()], [p.grad for p in plain[2:].parameters()])


@every_net
def test_method_bprop_is_the_net_itself(kind, generator):
    net = make_net(kind, generator)
    plain = copy.deepcopy(net)
    x, labels = batch(kind, generator)
    model = decouple(net, [1, 2, 3], x, method="bprop")
    assert not model.synthesizer_parameters()
    F.cross_entropy(model(x, labels), labels).backward()
    F.cross_entropy(plain(x), labels).backward()
    close(gradients(net), gradients(plain))


@every_net
@or_local
def test_batch_statistics_and_values_are_those_of_the_uncut_net(kind, method, generator):
    net = make_net(kind, generator)
    plain = copy.deepcopy(net)
    x, labels = batch(kind, generator)
    model = cut(net, method, kind, generator)
    for _ in range(3):
        assert torch.equal(model(x, labels), plain(x))
    for (name, got), wanted in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(got, wanted), name
    assert any(name.endswith("running_mean") and b.any() for name, b in plain.named_buffers())
    model.eval()
    assert torch.equal(model(x), plain.eval()(x))


@every_net
@or_local
def test_the_order_of_updates_does_not_matter(kind, method, generator):
    """Each part's objective alone, one backward each, in every order: the gradients of the one backward."""
    model = cut(make_net(kind, generator), method, kind, generator)
    x, labels = batch(kind, generator)
    whole = copy.deepcopy(model)
    F.cross_entropy(whole(x, labels), labels).backward()
    wanted = gradients(whole)
    assert all(any(g is not None and g.any() for g in part) for part in part_gradients(whole))
    for order in itertools.permutations(range(4)):
        fresh, message, objectives = copy.deepcopy(model), x, []
        cuts: Any = [list(each) for each in (fresh.interfaces, fresh.losses) if each]
        for number, part in enumerate(fresh.parts):
            out = part(message)
            if number == 3:
                objectives.append(F.cross_entropy(out, labels))
            else:
                objectives.append(torch.stack([each[number].send(out, labels) for each in cuts]).sum())
                message = fresh.interfaces[number].receive(out, labels) if fresh.interfaces else out.detach()  # pyright: ignore
        for number in order:
            objectives[number].backward()
        close(gradients(fresh), wanted)


@or_local
def test_full_probability_is_the_plain_update_and_draws_nothing(method, generator):
    model = cut(make_net("mlp", generator), method, "mlp", generator)
    sparse = copy.deepcopy(model)
    sparse.update_probability = 1.0
    x, labels = batch("mlp", generator)
    before = torch.get_rng_state()
    for each in (model, sparse):
        F.cross_entropy(each(x, labels), labels).backward()
    assert torch.equal(torch.get_rng_state(), before)
    close(gradients(sparse), gradients(model))


@or_local
@pytest.mark.parametrize("drawn", list(itertools.product([False, True], repeat=4)), ids=str)
def test_sparse_updates(method, drawn, generator, monkeypatch):
    """Who takes part gets the gradient of the full update; who does not gets none at all."""
    model = cut(make_net("mlp", generator), method, "mlp", generator)
    full = copy.deepcopy(model)
    model.update_probability = 0.5
    monkeypatch.setattr(model, "_draw", lambda: list(drawn))
    x, labels = batch("mlp", generator)
    out = model(x, labels)
    assert torch.equal(out, full(x, labels))
    F.cross_entropy(out, labels).backward()
    F.cross_entropy(full(x, labels), labels).backward()
    for number, takes_part in enumerate(drawn):
        got = [p.grad for p in model.parts[number].parameters()]
        if takes_part:
            close(got, [p.grad for p in full.parts[number].parameters()])
        else:
            assert got == [None] * len(got)
    for taking, modules in ((drawn[1:], model.interfaces), (drawn, model.losses)):
        for takes_part, module in zip(taking, modules, strict=False):
            got = [p.grad for p in module.parameters()]
            assert all(g is not None for g in got) if takes_part else got == [None] * len(got)


def test_draws_have_the_probability_asked_for():
    torch.manual_seed(0)
    parts = [nn.Linear(2, 2) for _ in range(3)]
    interfaces = [Interface(ContextMLP(2, [], 2), batch_dim=0) for _ in range(2)]
    model = Decoupled(parts, interfaces, update_probability=0.3)
    draws = torch.tensor([model._draw() for _ in range(4000)]).double()
    assert float((draws.mean(0) - 0.3).abs().max()) < 0.03
    assert abs(float((draws[:, 0] * draws[:, 1]).mean()) - 0.09) < 0.02  # independent


def leaves_of(tensor: Tensor) -> set[int]:
    """Parameters that the graph of `tensor` can reach."""
    found, seen, waiting = set(), set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        waiting += [following for following, _ in node.next_functions]
    return found


@or_local
def test_unlock_no_graph_of_one_part_reaches_another(method, generator):
    model = cut(make_net("mlp", generator), method, "mlp", generator, unlock=[4])
    outs: list[Tensor] = []
    for part in model.parts:
        part.register_forward_hook(lambda module, inputs, out: outs.append(out))  # pyright: ignore[reportArgumentType]
    x, labels = batch("mlp", generator)
    logits = model(x, labels)
    ids = [{id(p) for p in part.parameters()} for part in model.parts]
    for number, out in enumerate(outs):
        reached = leaves_of(out)
        assert ids[number] <= reached
        assert not any(other & reached for i, other in enumerate(ids) if i != number)
        assert not {id(p) for p in model.guesses.parameters()} & reached
    # Yet one backward of the loss trains everything.
    F.cross_entropy(logits, labels).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_unlock_by_hand(generator):
    """Each part runs on its synthetic input; the synthetic input is regressed on what comes out."""
    model = cut(make_net("mlp", generator), "cdni", "mlp", generator, unlock=[4])
    x, labels = batch("mlp", generator)
    plain = copy.deepcopy(model)
    logits = model(x, labels)
    F.cross_entropy(logits, labels).backward()
    guesses = [guess(x) for guess in plain.guesses]
    outs = [part(h) for part, h in zip(plain.parts, [x, *(g.detach() for g in guesses)], strict=True)]
    close(logits.detach(), outs[-1].detach())
    for guess, out, after, module in zip(guesses, outs, outs[1:], model.guesses, strict=False):
        wanted = torch.autograd.grad((guess - out.detach()).square().mean(), list(_of(plain, model, module)))
        close([grad(p) for p in module.parameters()], list(wanted))
        assert after is not out
    interfaces: Any = plain.interfaces
    for number in range(3):
        said = interfaces[number].synthetic_gradient(outs[number], labels)
        wanted = torch.autograd.grad(outs[number], list(plain.parts[number].parameters()), said)
        close([grad(p) for p in model.parts[number].parameters()], list(wanted))


def _of(plain: Decoupled, model: Decoupled, module: nn.Module) -> Any:
    return plain.guesses[list(model.guesses).index(module)].parameters()


def test_in_evaluation_unlocked_parts_are_chained(generator):
    model = cut(make_net("mlp", generator), "cdni", "mlp", generator, unlock=[4])
    x, labels = batch("mlp", generator)
    model.eval()
    out = x
    for part in model.parts:
        out = part(out)
    assert torch.equal(model(x), out)
    model.train()
    assert not torch.allclose(model(x, labels), out)


@every_net
def test_agreement(kind, generator):
    net = make_net(kind, generator)
    x, labels = batch(kind, generator)
    model = with_oracles(net, [1, 3])
    before = {name: b.clone() for name, b in model.named_buffers()}
    for each in agreement(model, x, labels, lambda out: F.cross_entropy(out, labels)):
        close(torch.tensor(each).double(), torch.ones(3).double())
    interfaces: Any = model.interfaces
    for interface in interfaces:
        interface.scale = 4.0  # too large: a quarter of it is right, as an audit finds too
    for each in agreement(model, x, labels, lambda out: F.cross_entropy(out, labels)):
        close(torch.tensor(each).double(), torch.tensor([1.0, -8.0, 0.25]).double())
    for interface in interfaces:
        interface.scale = 1.0
        nn.init.constant_(interface.get_parameter("synthesizer.error"), 0.1)
    for each in agreement(model, x, labels, lambda out: F.cross_entropy(out, labels)):
        assert isinstance(each, Agreement)
        assert each.cosine < 0.99
        assert each.explained < 0.9
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_agreement_below_which_nothing_is_trained(generator):
    """A frozen part has a gradient to agree with, and a local loss one without a graph around it."""
    x, labels = batch("mlp", generator)
    model = cut(make_net("mlp", generator), "local+critic", "mlp", generator)
    whole = agreement(model, x, labels, lambda out: F.cross_entropy(out, labels))
    model.parts[:2].requires_grad_(False)
    found = agreement(model, x, labels, lambda out: F.cross_entropy(out, labels))
    close(torch.tensor(found), torch.tensor(whole), rtol=1e-10)
    message = model.parts[0](x)
    with torch.no_grad():
        said = model.gradient(0, message, labels)
    close(said, model.gradient(0, message, labels))


@pytest.mark.parametrize(("method", "floor"), [("cdni", 0.5), ("critic", 0.1)])
def test_synthesizers_learn_the_gradient_of_a_net_that_stands_still(method, floor, generator):
    """Trained while the net is not, they explain the true gradient at every cut (0: what zero explains).

    A critic's gradient is that of a classifier, and a net of random weights is none: it explains less.
    """
    net = make_net("mlp", generator)
    model = decouple(net, [1, 2, 3], torch.zeros(2, 5).double(), CLASSES, method, hidden=[32]).double()
    for module in model.interfaces.modules():
        if isinstance(module, Critic):
            module.loss_weight = 0.01  # the match decides
    optimizer = torch.optim.Adam(model.synthesizer_parameters(), 1e-2)
    x = random(generator, 64, 5)
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    for _ in range(600):
        optimizer.zero_grad()
        F.cross_entropy(model(x, labels), labels).backward()
        optimizer.step()
    found = agreement(model, x, labels, lambda out: F.cross_entropy(out, labels))
    assert min(each.explained for each in found) > floor


def test_a_user_synthesizer_and_a_net_of_the_user(generator):
    head = [nn.Flatten(), nn.Linear(48, 4), nn.ReLU(), nn.Linear(4, 2)]
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), *head)
    x = torch.randn(5, 2, 6, 6, generator=generator)
    seen = []

    def make(message: Tensor) -> nn.Module:
        seen.append(tuple(message.shape))
        kernel = 3 if message.dim() == 4 else None
        return ContextMLP(message.shape[1], [], message.shape[1], kernel=kernel)

    model = decouple(net, [2, 4], x[:1], synthesizer=make, method="dni")
    assert seen == [(1, 3, 4, 4), (1, 4)]
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_published_nets():
    x = torch.zeros(2, 3, 32, 32)
    assert len(fcn(3072, 10, 6, 8)) == 6
    assert fcn(3072, 10, 3, 8)(x).shape == (2, 10)
    assert sigmoid_net(3072, 7, 3, 8)(x.flatten(1)).shape == (2, 7)
    made = cnn((3, 32, 32), 10, 4, 8)
    assert [tuple(made[:i](x).shape) for i in (1, 2, 3)] == [(2, 8, 16, 16), (2, 8, 8, 8), (2, 8, 4, 4)]
    assert made(x).shape == (2, 10)
    made = vgg((3, 32, 32), 10, 4)
    assert [made[:i](x).shape[1:] for i in (3, 6, 9)] == [(8, 16, 16), (16, 8, 8), (32, 4, 4)]
    assert made(x).shape == (2, 10)
    assert sum(isinstance(m, nn.Conv2d) for m in made.modules()) == 11


def test_the_critic_is_the_default_and_a_classifier(generator):
    model = decouple(make_net("cnn", generator), [1, 2], torch.zeros(1, 2, 9, 9).double(), CLASSES)
    assert all(isinstance(interface.synthesizer, Critic) for interface in model.interfaces)


def test_hidden_layers_may_be_parts_of_the_message(generator):
    model = decouple(
        make_net("mlp", generator),
        [1],
        torch.zeros(1, 5).double(),
        CLASSES,
        "cdni",
        hidden=[Fraction(1, 2), 3],
    )
    layers: Any = model.interfaces[0].get_submodule("synthesizer.layers")
    features = layers[0].in_features
    assert [layer.out_features for layer in layers] == [max(1, round(features / 2)), 3, features]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuts": [2, 2]}, "cuts must rise"),
        ({"cuts": [0]}, "cuts must rise"),
        ({"cuts": [4]}, "between 1 and 3"),
        ({"classes": 0}, "give their number"),
        ({"method": "none", "unlock": [3]}, "needs parts that learn"),
        ({"method": "bprop", "update_probability": 0.5}, "need a cut net"),
        ({"method": "none", "update_probability": 0.5}, "with interfaces"),
        ({"update_probability": 0.0}, "above 0"),
        ({"hidden": [0]}, "must be positive"),
        ({"hidden": [Fraction(-1, 2)]}, "must be positive"),
    ],
)
def test_what_does_not_go_together(options, message, generator):
    settings = {"cuts": [1], "classes": CLASSES, "example": torch.zeros(1, 5).double()} | options
    with pytest.raises(ValueError, match=message):
        decouple(make_net("mlp", generator), **settings)


@pytest.mark.parametrize("method", ["cdni", "local"])
def test_a_gradient_scaler_that_is_told_changes_nothing(method, generator):
    """Of synthetic inputs too, which are trained on a loss of their own."""
    model = cut(make_net("mlp", generator), method, "mlp", generator, unlock=[4])
    x, labels = batch("mlp", generator)
    found = []
    for factor in (1.0, 1024.0):
        each = copy.deepcopy(model)
        for cutting in (*each.interfaces, *each.losses):
            cutting.loss_scale = factor  # type: ignore[assignment]
        (factor * F.cross_entropy(each(x, labels), labels)).backward()
        found.append({name: g / factor for name, g in gradients(each).items()})
    assert any(name.startswith("guesses") and g.any() for name, g in found[0].items())
    close(found[1], found[0], rtol=1e-10)


@pytest.mark.parametrize("method", ["critic", "local+critic"])
def test_what_decouple_makes_lies_where_the_net_lies(method):
    net = fcn(5, CLASSES, 3, 7).to("meta", torch.float64)
    x = torch.zeros(2, 5, device="meta", dtype=torch.float64)
    model = decouple(net, [1, 2], x, CLASSES, method, unlock=[4])
    assert all(each.is_meta for each in (*model.parameters(), *model.buffers()))
    own = [*model.losses.parameters(), *model.guesses.parameters()]
    assert {each.dtype for each in own} == {torch.float64}  # an M is given messages in its own type


def test_unlock_needs_vectors(generator):
    with pytest.raises(ValueError, match="feature maps"):
        decouple(make_net("cnn", generator), [1], torch.zeros(1, 2, 9, 9).double(), CLASSES, unlock=[3])


def test_counts_must_match():
    parts = [nn.Linear(2, 2) for _ in range(3)]
    interface = Interface(ContextMLP(2, [], 2))
    with pytest.raises(ValueError, match="3 parts need 2 interfaces, not 1"):
        Decoupled(parts, [interface])
    with pytest.raises(ValueError, match="2 synthetic inputs, not 1"):
        Decoupled(parts, [interface, interface], guesses=[nn.Linear(2, 2)])
