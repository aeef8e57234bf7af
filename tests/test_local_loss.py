"""Local losses: their value and gradients against loops, and in a cut net."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from reference import close, grad, random, randomize
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn import local_loss
from dni_rnn.feedforward import Decoupled, agreement, decouple
from dni_rnn.local_loss import LocalLoss
from dni_rnn.nets import cnn, fcn

ROWS, SYMBOLS = 5, 3
MESSAGES = {
    "vector": (4,),
    "stretch": (3, 5),
    "map": (3, 5, 4),
    "volume": (3, 2, 3, 2),
    "one place": (4, 1, 1),
}
POOLED = 9


def by_loops(loss: LocalLoss, message: Tensor, targets: Tensor) -> Tensor:
    """The loss of targets (B, W) row by row and pair by pair."""
    weights = dict(loss.named_parameters())
    pred, known = message.new_zeros(()), [b for b in range(len(message)) if (targets[b] >= 0).all()]
    rows, sides, size, most = [], message.shape[2:], 1, max([1, *message.shape[2:]])
    while message.shape[1] * math.prod(math.ceil(n / size) for n in sides) > POOLED and size < most:
        size += 1
    for row, wanted in zip(message, targets, strict=True):
        squares = [[slice(i, i + size) for i in range(0, side, size)] for side in sides]
        pooled = [channel[square].mean() for channel in row for square in itertools.product(*squares)]
        logits = weights["classifier.weight"] @ torch.stack(pooled) + weights["classifier.bias"]
        for position, symbol in enumerate(wanted.tolist()):
            if symbol >= 0:
                chances = logits[position * SYMBOLS : (position + 1) * SYMBOLS].softmax(0)
                pred = pred - chances[symbol].log() / len(message)
        if not loss.similarity:
            continue
        if sides:
            convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[len(sides) - 1]
            maps = convolution(row.unsqueeze(0), weights["projection.weight"], padding=1)[0].flatten(1)
            single = maps.shape[1] == 1
            rows.append(maps[:, 0] if single else (maps - maps.mean(1, keepdim=True)).square().mean(1).sqrt())
        else:
            rows.append(weights["projection.weight"] @ row)
    if not loss.similarity:
        return pred
    sim = message.new_zeros(())
    for a, b in itertools.product(known, known):
        wanted = torch.corrcoef(F.one_hot(targets[[a, b]], SYMBOLS).flatten(1).to(message))[0, 1]
        found = torch.corrcoef(torch.stack([rows[a], rows[b]]))[0, 1]
        sim = sim + (found - wanted).square() / len(known) ** 2
    return (1 - loss.similarity) * pred + loss.similarity * sim


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("similarity", [0.0, 0.7, 1.0])
def test_value_and_gradients_are_those_of_loops(kind, similarity, generator, monkeypatch):
    monkeypatch.setattr(local_loss, "POOLED", POOLED)
    message = random(generator, ROWS, *MESSAGES[kind]).requires_grad_()
    for window in (1, 2):
        loss = LocalLoss(message, SYMBOLS, window, similarity=similarity, projected=3).double()
        randomize(loss, generator)
        targets = torch.randint(SYMBOLS, (ROWS, window), generator=generator)
        targets[3, 0] = -1
        got = loss(message, targets[:, 0] if window == 1 else targets.t())
        wanted = by_loops(loss, message, targets)
        close(got.detach(), wanted.detach())
        close(loss.value, wanted.detach())
        inputs = [message, *loss.parameters()]
        found = torch.autograd.grad(got, inputs, allow_unused=True, materialize_grads=True)
        close(list(found), list(torch.autograd.grad(wanted, inputs)))
        assert sum(float(g.abs().max()) > 1e-6 for g in found) == {0.0: 3, 0.7: 4, 1.0: 2}[similarity]


def test_a_row_that_is_constant_has_finite_gradients(generator):
    for shape in ((4,), (4, 3, 3)):
        message = random(generator, ROWS, *shape)
        message[1] = 0.0
        message.requires_grad_()
        loss = LocalLoss(message, SYMBOLS, similarity=0.5).double()
        loss(message, torch.arange(ROWS) % SYMBOLS).backward()
        assert all(torch.isfinite(grad(t)).all() for t in (message, *loss.parameters()))


def test_similarities_are_of_vectors_alone_unless_asked_for():
    assert LocalLoss(torch.zeros(2, 4), SYMBOLS).similarity == 0.99
    assert LocalLoss(torch.zeros(2, 4, 3, 3), SYMBOLS).similarity == 0.0


NETS = {"mlp": (5,), "cnn": (2, 9, 9)}


def cut_net(kind: str, method: Any, generator: torch.Generator, **options: Any) -> Decoupled:
    net = fcn(5, SYMBOLS, 4, 7) if kind == "mlp" else cnn(NETS["cnn"], SYMBOLS, 4, 3)
    model = decouple(net, [1, 2, 3], torch.zeros(2, *NETS[kind]), SYMBOLS, method, **options).double()
    randomize(model, generator)
    return model


@pytest.mark.parametrize("kind", NETS)
def test_each_part_learns_from_its_own_loss(kind, generator, monkeypatch):
    monkeypatch.setattr(local_loss, "POOLED", POOLED)
    model = cut_net(kind, "local", generator)
    x, labels = random(generator, 6, *NETS[kind]), torch.randint(SYMBOLS, (6,), generator=generator)
    plain = copy.deepcopy(model)
    logits = model(x, labels)
    F.cross_entropy(logits, labels).backward()
    message = x
    for number, part in enumerate(plain.parts):
        out = part(message)
        last = number == 3
        own = F.cross_entropy(out, labels) if last else by_loops(plain.losses[number], out, labels[:, None])  # type: ignore[arg-type]
        theirs = [model.parts[number]] if last else [model.parts[number], model.losses[number]]
        ours = [part] if last else [part, plain.losses[number]]
        wanted = torch.autograd.grad(own, [p for each in ours for p in each.parameters()])
        close([grad(p) for each in theirs for p in each.parameters()], list(wanted))
        assert all(g.abs().max() > 1e-8 for g in wanted if g.dim() > 1)
        message = out.detach()
    close(logits.detach(), message)


@pytest.mark.parametrize("kind", NETS)
def test_with_a_critic_a_part_gets_the_sum_and_the_critic_what_comes_from_there(kind, generator):
    model = cut_net(kind, "local+critic", generator)
    x, labels = random(generator, 6, *NETS[kind]), torch.randint(SYMBOLS, (6,), generator=generator)
    local, critic, slow = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    local.interfaces, critic.losses = nn.ModuleList(), nn.ModuleList()
    for each in (model, local, critic):
        F.cross_entropy(each(x, labels), labels).backward()
    for both, one, other in zip(model.parts, local.parts, critic.parts, strict=True):
        last = both is model.parts[3]
        for p, q, r in zip(both.parameters(), one.parameters(), other.parameters(), strict=True):
            close(grad(p), grad(q) if last else grad(q) + grad(r))
    message, interfaces = x, slow.interfaces
    for number in range(3):
        out = slow.parts[number](message).detach()
        message = out.clone().requires_grad_()
        above = slow.parts[number + 1](message)
        if number == 2:
            gradient = torch.autograd.grad(F.cross_entropy(above, labels), message)[0]
        else:
            said = slow.gradient(number + 1, above.detach(), labels)
            gradient = torch.autograd.grad(above, message, said)[0]
        interface: Any = interfaces[number]
        interface.receive(out, labels).backward(gradient)
        message = out
        got = list(model.interfaces[number].parameters())
        close([grad(p) for p in got], [grad(p) for p in interface.parameters()])


def test_agreement_is_of_what_a_cut_gets(generator):
    """With the last part linear in what the local classifier sees, both have one gradient."""
    model = decouple(fcn(5, SYMBOLS, 2, 7), [1], torch.zeros(2, 5), SYMBOLS, "local").double()
    randomize(model, generator)
    loss: Any = model.losses[0]
    loss.similarity = 0.0
    loss.classifier.load_state_dict(model.parts[1][0].state_dict())  # type: ignore[index]
    x, labels = random(generator, 6, 5), torch.randint(SYMBOLS, (6,), generator=generator)
    (found,) = agreement(model, x, labels, lambda out: F.cross_entropy(out, labels))
    close(torch.tensor(found).double(), torch.ones(3).double())


def test_a_gradient_scaler_does_not_shrink_it(generator):
    message = random(generator, ROWS, 4).requires_grad_()
    loss, labels = LocalLoss(message, SYMBOLS).double(), torch.arange(ROWS) % SYMBOLS
    plain = torch.autograd.grad(loss(message, labels), message)[0]
    loss.loss_scale = 1024.0
    sent = loss.send(message, labels)
    close(torch.autograd.grad(1024.0 * sent, message)[0], 1024.0 * plain)
    assert float(sent.detach()) == 0.0


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Linear(4, 4), nn.Linear(4, 3)], "reads no sequences"),
        ([nn.Unflatten(1, (1, 5, 1, 1)), nn.Flatten()], "give their number"),
    ],
)
def test_refused(layers, message):
    classes = 0 if "number" in message else SYMBOLS
    with pytest.raises(ValueError, match=message):
        decouple(nn.Sequential(*layers), [1], torch.zeros(2, 5, 4), classes, "local")


def test_what_it_cannot_read_is_refused():
    vector = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="vectors and feature maps"):
        LocalLoss(torch.zeros(2), SYMBOLS)
    with pytest.raises(ValueError, match="between 0 and 1"):
        LocalLoss(vector, SYMBOLS, similarity=1.5)
    loss = LocalLoss(vector, SYMBOLS)
    with pytest.raises(ValueError, match="with the targets as context"):
        loss(vector)
    with pytest.raises(ValueError, match="has 3 rows, the message 2"):
        loss(vector, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="has no synthesizer"):
        decouple(fcn(5, SYMBOLS, 2, 7), [1], torch.zeros(2, 5), SYMBOLS, "local", hidden=[3])
