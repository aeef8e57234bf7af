"""Synthesizers and the encoders of their context, against explicit sums and products."""

from __future__ import annotations

import copy
import itertools
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from reference import close, grad, laid_out, random, randomize
from torch import Tensor, nn

from dni_rnn.interface import Interface
from dni_rnn.pytree import LSTMState, Tree, flatten, flatten_rows, map_tree, part, unflatten
from dni_rnn.synthesizers import (
    ContextEncoder,
    ContextMLP,
    Critic,
    ErrorFeedback,
    MLPSynthesizer,
    OneHotTokens,
    Rows,
    units,
)

SYMBOLS, WINDOW, ROWS, WIDTH = 5, 3, 4, 6


def tokens(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(SYMBOLS, shape or (WINDOW, ROWS), generator=generator)


def encoder(window: int = WINDOW) -> OneHotTokens:
    return OneHotTokens(SYMBOLS, window)


with_or_without_context = pytest.mark.parametrize("conditioned", [False, True])


def built(generator: torch.Generator, window: int = WINDOW) -> OneHotTokens:
    """With weights all of which count, but for the padding's, which is the encoder's business."""
    made = encoder(window)
    made.build(WIDTH, zero=False)
    made.double()
    with torch.no_grad():
        for parameter in made.parameters():
            factor = random(generator, *parameter.shape)
            parameter.copy_(torch.where(parameter == 0, parameter, factor))
    return made


def messages(generator: torch.Generator) -> dict[str, tuple[Tree, int]]:
    """A message of every shape, and where its rows lie."""
    return {
        "LSTM": (LSTMState(random(generator, 2, ROWS, 3), random(generator, 2, ROWS, 3)), -2),
        "GRU": (random(generator, 2, ROWS, 3), -2),
        "vector": (random(generator, ROWS, 7), -2),
        "maps": (random(generator, ROWS, 2, 3, 5), 0),
        "dict": ({"a": random(generator, ROWS, 2), "b": random(generator, 3, ROWS, 2)}, -2),
    }


every_message = pytest.mark.parametrize("shape", ["LSTM", "GRU", "vector", "maps", "dict"])


# Encoders.


@pytest.mark.parametrize("window", [1, WINDOW])
def test_one_hot_tokens_are_a_product_with_one_hot_rows(window, generator):
    made = built(generator, window)
    given = tokens(generator, window, ROWS)
    one_hot = torch.zeros(ROWS, window, SYMBOLS, dtype=torch.float64)
    for position, row in itertools.product(range(window), range(ROWS)):
        one_hot[row, position, given[position, row]] = 1.0
    close(made(given), one_hot.flatten(1) @ made.get_parameter("table.weight")[: window * SYMBOLS])
    assert len(made(given).unique(dim=0)) > 1


def test_an_unknown_token_adds_nothing(generator):
    """What is left is the sum over the positions that are known."""
    made = built(generator)
    given = tokens(generator)
    nothing = torch.full_like(given, -1)
    assert not made(nothing).any()
    alone = []
    for position in range(WINDOW):
        one = nothing.clone()
        one[position] = given[position]
        alone.append(made(one))
    close(made(given), alone[0] + alone[1] + alone[2])
    given[1, 2] = -1
    close(made(given)[2], (alone[0] + alone[2])[2])
    close(made(given)[0], (alone[0] + alone[1] + alone[2])[0])


def test_where_nothing_is_known_nothing_is_added_even_after_learning(generator):
    made = built(generator)
    optimizer = torch.optim.SGD(made.parameters(), lr=1.0)
    given = tokens(generator)
    given[1] = -1
    before = [p.detach().clone() for p in made.parameters()]
    made(given).square().sum().backward()
    optimizer.step()
    assert any(not torch.equal(b, p) for b, p in zip(before, made.parameters(), strict=True))
    assert not made(torch.full_like(given, -1)).any()


def test_labels_are_a_window_of_one(generator):
    made = built(generator, window=1)
    labels = tokens(generator, ROWS)
    assert torch.equal(made(labels), made(labels.unsqueeze(0)))
    assert made(labels).shape == (ROWS, WIDTH)


def test_integers_of_any_width_will_do(generator):
    made, given = built(generator), tokens(generator)
    assert torch.equal(made(given.to(torch.int32)), made(given))


def test_an_encoder_says_how_it_is_built():
    with pytest.raises(NotImplementedError):
        ContextEncoder().build(WIDTH, zero=True)


def test_widths_may_be_parts_of_the_core():
    assert units([7, Fraction(1, 4), Fraction(1)], 30) == [7, 8, 30]
    assert units([Fraction(1, 100)], 30) == [1]
    assert units([], 30) == []


# The perceptron.


@pytest.mark.parametrize("hidden", [(), (7,), (7, 5)], ids=str)
@with_or_without_context
def test_context_mlp_is_its_equation(hidden, conditioned, generator):
    mlp = ContextMLP(3, hidden, 2, encoder() if conditioned else None).double()
    randomize(mlp, generator)
    x, context = random(generator, ROWS, 3), tokens(generator)
    weights = [
        (mlp.get_parameter(f"layers.{i}.weight"), mlp.get_parameter(f"layers.{i}.bias"))
        for i in range(len(hidden) + 1)
    ]
    a = x @ weights[0][0].T + weights[0][1]
    if mlp.context is not None:
        a = a + mlp.context(context)
        assert mlp.context(context).any()
    for weight, bias in weights[1:]:
        a = torch.clamp(a, min=0.0) @ weight.T + bias
    close(mlp(x, context), a)


def test_a_missing_context_is_refused():
    mlp = ContextMLP(3, [4], 2, encoder())
    with pytest.raises(ValueError, match="must be called with a context"):
        mlp(torch.zeros(ROWS, 3))
    synthesizer = MLPSynthesizer(torch.zeros(ROWS, 3), [4], context=encoder())
    with pytest.raises(ValueError, match="must be called with a context"):
        synthesizer(torch.zeros(ROWS, 3))


def test_without_an_encoder_a_context_is_not_looked_at(generator):
    mlp = ContextMLP(3, [4], 2).double()
    randomize(mlp, generator)
    x = random(generator, ROWS, 3)
    assert torch.equal(mlp(x, "anything"), mlp(x))


def test_an_encoder_of_ones_own(generator):
    class Ones(ContextEncoder):
        def build(self, width: int, *, zero: bool) -> None:
            self.asked = width, zero
            self.weight = nn.Parameter(torch.ones(width, dtype=torch.float64))

        def forward(self, context: Any) -> Tensor:
            return context * self.weight

    own = Ones()
    mlp = ContextMLP(3, [], 2, own).double()
    assert own.asked == (2, True)
    close(mlp(random(generator, ROWS, 3), 5.0), torch.full((ROWS, 2), 5.0, dtype=torch.float64))
    other = Ones()
    ContextMLP(3, [7, 9], 2, other)
    assert other.asked == (7, False)


# The synthesizer.


def says(synthesizer: MLPSynthesizer, message: Tree, context: Any = None, batch_dim: int = -2) -> Any:
    """What M says of a message, like the message."""
    leaves, spec = flatten(message)
    return unflatten(laid_out(synthesizer(message, context), leaves, batch_dim), spec)


@every_message
@pytest.mark.parametrize("hidden", [(), (7,), (7, 5)], ids=str)
@with_or_without_context
def test_it_starts_by_saying_zero_and_can_learn(shape, hidden, conditioned, generator):
    message, batch_dim = messages(generator)[shape]
    context = encoder() if conditioned else None
    synthesizer = MLPSynthesizer(message, hidden, context=context, batch_dim=batch_dim).double()
    interface = Interface(synthesizer, normalize=False, batch_dim=batch_dim).double()
    told = tokens(generator)
    for leaf in flatten(interface.synthetic_gradient(message, told))[0]:
        assert not leaf.any()
    # Not because it is all zero: where there is a hidden layer, one step of its last layer is enough.
    received = flatten(interface.receive(message, told))[0]
    torch.stack([leaf.square().sum() for leaf in received]).sum().backward()
    with torch.no_grad():
        for parameter in synthesizer.parameters():
            parameter -= 0.1 * grad(parameter)
    for leaf in flatten(interface.synthetic_gradient(message, told))[0]:
        assert leaf.any()
    if conditioned:
        other = (told + 1) % SYMBOLS
        said = [flatten(says(synthesizer, message, each, batch_dim))[0] for each in (told, other)]
        assert not any(torch.equal(a, b) for a, b in zip(*said, strict=True))


@every_message
def test_what_it_says_lies_where_the_message_lies(shape, generator):
    """With W = 1 and b = 0, it says the message itself."""
    message, batch_dim = messages(generator)[shape]
    synthesizer = MLPSynthesizer(message, bounded=False, batch_dim=batch_dim).double()
    weight = synthesizer.mlp.get_parameter("layers.0.weight")
    with torch.no_grad():
        weight.copy_(torch.eye(len(weight)))
    said = says(synthesizer, message, batch_dim=batch_dim)
    assert type(said) is type(message)
    close(said, message)


@every_message
@pytest.mark.parametrize("hidden", [(), (7,)], ids=str)
def test_a_row_depends_on_its_own_row_alone(shape, hidden, generator):
    message, batch_dim = messages(generator)[shape]
    synthesizer = MLPSynthesizer(message, hidden, batch_dim=batch_dim).double()
    randomize(synthesizer, generator)
    changed = map_tree(torch.clone, message)
    for leaf in flatten(changed)[0]:
        leaf.select(batch_dim, 1).add_(1.0)
    both = [flatten(says(synthesizer, each, batch_dim=batch_dim))[0] for each in (message, changed)]
    for before, after in zip(*both, strict=True):
        moved = (before - after).abs().movedim(batch_dim, 0).flatten(1).amax(1) > 1e-6
        assert moved.tolist() == [False, True, False, False]


def test_the_number_of_rows_is_free(generator):
    example, message = random(generator, 2, 1, 3), random(generator, 2, ROWS, 3)
    synthesizer = MLPSynthesizer(example, [4]).double()
    randomize(synthesizer, generator)
    rows = [says(synthesizer, message[:, row : row + 1]) for row in range(ROWS)]
    close(says(synthesizer, message), torch.cat(rows, dim=1))


def test_it_reads_the_tanh_of_the_message(generator):
    message = LSTMState(random(generator, 2, ROWS, 3), 3.0 * random(generator, 2, ROWS, 3))
    bounded = MLPSynthesizer(message, [4]).double()
    randomize(bounded, generator)
    unbounded = copy.deepcopy(bounded)
    unbounded.rows.bounded = False
    close(bounded(message), unbounded(map_tree(torch.tanh, message)))
    assert not torch.allclose(says(bounded, message).cell, says(unbounded, message).cell)


@pytest.mark.parametrize("runaway", [1e6, -1e6, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_cell_that_ran_away_does_not_reach_the_perceptron(runaway, dtype, generator):
    hidden = random(generator, 1, ROWS, 3).to(dtype)
    message = LSTMState(hidden, torch.full_like(hidden, runaway))
    synthesizer = MLPSynthesizer(message, [4]).to(dtype)
    with torch.no_grad():
        for parameter in synthesizer.parameters():
            parameter.copy_(random(generator, *parameter.shape))
    seen = []
    synthesizer.mlp.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    said = synthesizer(message)
    assert float(seen[0].abs().max()) <= 1.0
    at_the_bound = synthesizer(LSTMState(hidden, torch.full_like(hidden, 30.0 if runaway > 0 else -30.0)))
    close(said, at_the_bound, rtol=1e-5)


class Own(NamedTuple):
    memory: Tensor
    output: Tensor


READ = {"LSTM": "hidden", "named tuple": "output", "dict": "z", "nested": "deep", "tuple": 1, "last": -1}


def states(generator: torch.Generator) -> dict[str, Tree]:
    """States of several tensors; `READ` names the one that is read, which is not always the first."""
    a, b, c = random(generator, 2, ROWS, 3), random(generator, 2, ROWS, 3), random(generator, ROWS, 5)
    return {
        "LSTM": LSTMState(a, b),
        "named tuple": Own(c, a),
        "dict": {"z": a, "b": b, "c": c},
        "nested": {"shallow": c, "deep": (b, c.clone())},
        "tuple": (c, b),
        "last": [c, a, b],
    }


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("kind", list(READ))
def test_reading_one_part_it_does_not_see_the_others(kind, bounded, generator):
    message, leaf = states(generator)[kind], READ[kind]
    read = part(message, leaf)
    synthesizer = MLPSynthesizer(message, [4], leaf=leaf, bounded=bounded).double()
    randomize(synthesizer, generator)
    assert synthesizer.mlp.get_parameter("layers.0.weight").shape == (4, flatten_rows(read).shape[1])
    said = says(synthesizer, message)
    assert type(said) is type(message)
    assert [t.shape for t in flatten(said)[0]] == [t.shape for t in flatten(message)[0]]
    assert all(t.any() for t in flatten(said)[0])
    # What is said is that of an M on this part alone.
    rows = flatten_rows(read)
    close(synthesizer(message), synthesizer.mlp(torch.tanh(rows) if bounded else rows))
    seen = {id(t) for t in flatten(read)[0]}
    others = map_tree(lambda t: t if id(t) in seen else t + 1.0, message)
    close(says(synthesizer, others), said, rtol=0, atol=0)
    this = map_tree(lambda t: t + 1.0 if id(t) in seen else t, message)
    assert not torch.allclose(synthesizer(this), synthesizer(message))


@pytest.mark.parametrize("bounded", [False, True])
def test_rows_are_the_tensors_side_by_side_or_one_of_them(bounded, generator):
    message = LSTMState(random(generator, 2, ROWS, 3), 3.0 * random(generator, 2, ROWS, 3))
    whole, alone = Rows(bounded=bounded)(message), Rows(leaf="cell", bounded=bounded)(message)
    for row in range(ROWS):
        cell = torch.cat([message.cell[layer, row] for layer in range(2)])
        hidden = torch.cat([message.hidden[layer, row] for layer in range(2)])
        both = torch.cat([hidden, cell])
        close(alone[row], cell.tanh() if bounded else cell)
        close(whole[row], both.tanh() if bounded else both)


# Feature maps.


def test_a_convolutional_perceptron_of_a_1x1_kernel_is_a_perceptron_at_every_place(generator):
    maps = random(generator, ROWS, 4, 3, 5)
    labels = tokens(generator, ROWS)
    made = ContextMLP(4, [6], 2, OneHotTokens(SYMBOLS), kernel=1).double()
    randomize(made, generator)
    plain = ContextMLP(4, [6], 2, OneHotTokens(SYMBOLS)).double()
    plain.load_state_dict(
        {name: t.flatten(1) if t.dim() == 4 else t for name, t in made.state_dict().items()}
    )
    everywhere = plain(maps.permute(0, 2, 3, 1).reshape(-1, 4), labels.repeat_interleave(15))
    close(made(maps, labels), everywhere.reshape(ROWS, 3, 5, 2).permute(0, 3, 1, 2))


def test_labels_of_maps_are_label_planes(generator):
    """Inside the rim, a convolution that is given the one-hot planes as further channels says the same."""
    maps, labels = random(generator, ROWS, 4, 7, 7), tokens(generator, ROWS)
    made = ContextMLP(4, [], 2, OneHotTokens(SYMBOLS), kernel=3).double()
    randomize(made, generator)
    weight = torch.cat([made.get_parameter("layers.0.weight"), random(generator, 2, SYMBOLS, 3, 3)], dim=1)
    with torch.no_grad():
        table = made.get_parameter("context.table.weight")
        table[:SYMBOLS] = weight[:, 4:].sum((2, 3)).t()
    planes = nn.functional.one_hot(labels, SYMBOLS).double()[:, :, None, None].expand(-1, -1, 7, 7)
    bias = made.get_parameter("layers.0.bias")
    wanted = nn.functional.conv2d(torch.cat([maps, planes], dim=1), weight, bias)
    close(made(maps, labels)[:, :, 1:-1, 1:-1], wanted)


def test_an_even_kernel_is_refused():
    with pytest.raises(ValueError, match="must be odd"):
        ContextMLP(2, [], 2, kernel=4)


@pytest.mark.parametrize("kernel", [None, 3])
def test_hidden_layers_are_normalised(kernel, generator):
    shape = (ROWS, 3) if kernel is None else (ROWS, 3, 4, 4)
    made = ContextMLP(3, [5], 2, norm=True, kernel=kernel).double()
    randomize(made, generator)
    x = random(generator, *shape)
    said = made(x)
    with torch.no_grad():  # whatever scale and offset the first layer has is divided out
        for parameter in made.layers[0].parameters():
            parameter.mul_(1e4)
    torch.testing.assert_close(made(x), said, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(said, ContextMLP(3, [5], 2, kernel=kernel).double()(x))


# The critic.


def critic_of(message: Tree, window: int, generator: torch.Generator, **options: Any) -> Critic:
    states = isinstance(message, LSTMState) or message.shape[0] != ROWS  # else rows come first
    rows = Rows(bounded=True) if states else Rows(batch_dim=0)
    classifier = ContextMLP(rows(message).shape[1], [5], window * SYMBOLS)
    made = Critic(nn.Sequential(rows, classifier), SYMBOLS, **options).double()
    randomize(made, generator)
    return made


critic_messages = pytest.mark.parametrize("shape", ["LSTM", "GRU", "vector", "maps"])


@critic_messages
@pytest.mark.parametrize("window", [1, WINDOW])
@pytest.mark.parametrize("weight", [None, 0.3])
def test_a_critic_is_the_gradient_of_the_loss_it_predicts(shape, window, weight, generator):
    """Row by row and position by position, written out; of a mean over rows, or of a weighted sum."""
    message, _ = messages(generator)[shape]
    made = critic_of(message, window, generator, weight=weight, loss_weight=7.0)
    given = tokens(generator, window, ROWS)
    given[0, 1] = -1
    leaves, spec = flatten(message)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    logits = made.classifier(unflatten(leaves, spec)).log_softmax(1) if window == 1 else None
    raw = made.classifier(unflatten(leaves, spec))
    losses = []
    for row in range(ROWS):
        total = raw.new_zeros(())
        for position in range(window):
            if given[position, row] >= 0:
                some = raw[row, position * SYMBOLS : (position + 1) * SYMBOLS]
                total = total + some.logsumexp(0) - some[given[position, row]]
        losses.append(total)
    if logits is not None:
        close(losses[0], -logits[0, given[0, 0]])
    whole = torch.stack(losses).sum()
    wanted = torch.autograd.grad(whole / ROWS if weight is None else weight * whole, leaves)
    said = made(message, given)
    close(flatten(said.gradient)[0], list(wanted))
    close(said.losses, 7.0 * torch.stack(losses))
    assert all(float(g.abs().max()) > 1e-6 for g in wanted)
    with torch.no_grad():
        said = made(message, given)
    close(flatten(said.gradient)[0], list(wanted))
    assert not any(leaf.requires_grad for leaf in flatten(said.gradient)[0])


def test_a_critic_of_a_fresh_classifier_says_zero_and_begins_to_learn(generator):
    message, labels = random(generator, ROWS, 3), tokens(generator, ROWS)
    made = Critic(ContextMLP(3, [5], SYMBOLS), SYMBOLS).double()
    interface = Interface(made).double()
    sent = message.clone().requires_grad_()
    assert not interface.synthetic_gradient(message, labels).any()
    interface(sent, labels).square().sum().backward()
    assert not grad(sent).any()
    assert grad(made.get_parameter("classifier.layers.1.weight")).any()


def test_a_critic_needs_targets(generator):
    with pytest.raises(ValueError, match="coming targets as context"):
        Critic(ContextMLP(3, [], SYMBOLS), SYMBOLS)(torch.zeros(2, 3))


@critic_messages
@pytest.mark.parametrize("some_done", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_a_critic_is_trained_on(shape, some_done, normalize, generator):
    """Its own loss and the match of its gradient, by a second derivative written out."""
    message, batch_dim = messages(generator)[shape]
    made = critic_of(message, 1, generator)
    interface = Interface(made, normalize=normalize, batch_dim=batch_dim).double()
    labels = tokens(generator, ROWS)
    done = torch.tensor([False, True, False, False]) if some_done else None
    target = map_tree(lambda leaf: random(generator, *leaf.shape), message)
    received = interface.receive(message, labels, done)
    pairs = zip(flatten(received)[0], flatten(target)[0], strict=True)
    torch.stack([(r * t).sum() for r, t in pairs]).sum().backward()

    keep = torch.ones(ROWS, dtype=torch.bool) if done is None else ~done
    leaves, spec = flatten(message)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    logits = made.classifier(unflatten(leaves, spec))
    each = nn.functional.cross_entropy(logits, labels, reduction="none")
    said = torch.autograd.grad(each.sum() / ROWS, leaves, create_graph=True)

    def kept(leaf: Tensor) -> Tensor:
        return leaf.movedim(batch_dim, 0)[keep].flatten()

    wanted = torch.cat([kept(t) for t in flatten(target)[0]])
    size = wanted.square().mean().sqrt() if normalize else 1.0
    errors = (torch.cat([kept(s) for s in said]) - wanted) / size
    stated = errors.square().mean() + made.loss_weight * each[keep].mean()
    parameters = list(made.parameters())
    close([grad(p) for p in parameters], list(torch.autograd.grad(stated, parameters)))
    close(interface.regression_loss, errors.square().mean().detach())


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_what_a_critic_sends_is_in_units_of_the_loss(scale, generator):
    """Whatever size the targets had."""
    message, labels = random(generator, ROWS, 3), tokens(generator, ROWS)
    made = critic_of(message, 1, generator)
    interface = Interface(made, scale=scale).double()
    interface.target_square.fill_(16.0)
    interface.target_count.fill_(5.0)
    wanted = scale * made(message, labels).gradient.detach()
    close(interface.synthetic_gradient(message, labels), wanted)
    close(interface.predict(message, labels), wanted / scale / 4.0)
    sent = message.clone().requires_grad_()
    interface.send(sent, labels).backward()
    close(grad(sent), wanted)
    passed = message.clone().requires_grad_()
    (3.0 * interface(passed, labels)).sum().backward()
    close(grad(passed), wanted)


# The error of a local classifier.


@pytest.mark.parametrize("shape", ["vector", "maps"])
@pytest.mark.parametrize("window", [1, WINDOW])
@pytest.mark.parametrize("weight", [None, 0.3])
def test_error_feedback_is_its_equation(shape, window, weight, generator):
    message, _ = messages(generator)[shape]
    made = ErrorFeedback(message, SYMBOLS, window, weight=weight, loss_weight=7.0).double()
    randomize(made, generator)
    given = tokens(generator, window, ROWS)
    given[0, 1] = -1
    back = made.classifier.weight.t() + made.feedback.weight
    losses, wanted = [], []
    for row in range(ROWS):
        logits = made.classifier.weight @ message[row].flatten() + made.classifier.bias
        each, loss = logits.view(window, SYMBOLS), message.new_zeros(())
        errors = torch.zeros(window, SYMBOLS, dtype=torch.float64)
        for position, target in enumerate(given[:, row].tolist()):
            if target >= 0:
                errors[position] = each[position].softmax(0)
                errors[position, target] -= 1.0
                loss = loss - each[position].log_softmax(0)[target]
        losses.append(7.0 * loss)
        wanted.append((1 / ROWS if weight is None else weight) * back @ errors.flatten())
    said = made(message, given)
    close([said.gradient, said.losses], [torch.stack(wanted), torch.stack(losses)])
    alone = made(message, given[0]) if window == 1 else said
    close(alone.gradient, said.gradient)


@pytest.mark.parametrize("shape", ["vector", "maps"])
def test_error_feedback_without_feedback_is_the_gradient_of_a_local_loss(shape, generator):
    """And its parts are trained apart: the classifier on the targets, the feedback on what arrives."""
    message, labels = messages(generator)[shape][0], tokens(generator, ROWS)
    made = ErrorFeedback(message, SYMBOLS).double()
    interface = Interface(made).double()
    assert not interface.synthetic_gradient(message, labels).any()
    randomize(made.classifier, generator)
    sent = message.clone().requires_grad_()
    target = random(generator, *message.shape)
    (interface(sent, labels) * target).sum().backward()
    local = message.clone().requires_grad_()
    weights = list(made.classifier.parameters())
    loss = nn.functional.cross_entropy(made.classifier(local.flatten(1)), labels)
    wanted, *trained = torch.autograd.grad(loss, [local, *weights])
    close(grad(sent), wanted)
    close([grad(w) for w in weights], [made.loss_weight * each for each in trained])
    # d/dU of the mean of (e U / B − g)² / (target RMS)², at U = 0 where e W / B is `wanted`.
    error = made.classifier(message.flatten(1)).softmax(1).detach()
    error = (error - nn.functional.one_hot(labels, SYMBOLS)) / ROWS
    residual = (wanted - target).flatten(1) / target.square().mean()
    close(grad(made.feedback.weight), 2.0 / target.numel() * residual.t() @ error)


def test_error_feedback_needs_targets(generator):
    with pytest.raises(ValueError, match="an error needs targets"):
        ErrorFeedback(torch.zeros(2, 3), SYMBOLS)(torch.zeros(2, 3))
