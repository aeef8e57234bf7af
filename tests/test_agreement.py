"""How well one gradient stands for another, by arithmetic; and measuring without leaving a mark."""

from __future__ import annotations

import math

import pytest
import torch
from reference import close, grad, random
from torch import Tensor, nn

from dni_rnn.agreement import Agreement, agreement_of, cosine_similarity, frozen, trust_of
from dni_rnn.interface import Interface
from dni_rnn.synthesizers import MLPSynthesizer


def test_agreement_in_numbers():
    synthetic = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    true = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    found = agreement_of(synthetic, true)
    assert isinstance(found, Agreement)
    assert found == pytest.approx((2 / (2 * 2), 1 - (1 + 1 + 1 + 1) / 4, 2 / 4))


@pytest.mark.parametrize(
    ("factor", "explained", "trust"),
    [(1.0, 1.0, 1.0), (0.5, 0.75, 1.0), (2.0, 0.0, 0.5), (4.0, -8.0, 0.25), (-1.0, -3.0, 0.0)],
)
def test_agreement_of_a_multiple(factor, explained, trust, generator):
    true = random(generator, 3, 4)
    found = agreement_of(factor * true, true)
    assert found == pytest.approx((math.copysign(1.0, factor), explained, trust))


def test_trust_is_the_nearest_multiple_from_0_to_1(generator):
    """No other weight in between brings ĝ nearer."""
    true = random(generator, 3, 4)
    for mix in (0.2, 1.0, 5.0):
        synthetic = mix * true + random(generator, 3, 4)
        trust = agreement_of(synthetic, true).trust
        assert 0.0 < trust <= 1.0
        distance = (trust * synthetic - true).norm()
        for other in torch.linspace(0.0, 1.0, 21, dtype=torch.float64):
            assert distance <= (other * synthetic - true).norm() + 1e-12
    assert float(trust_of(torch.tensor(0.0), torch.tensor(0.0))) == 0.0  # ĝ is 0


def test_a_similarity_is_of_vectors(generator):
    a, b = random(generator, 2, 3), random(generator, 2, 3)
    product = sum(float(x * y) for x, y in zip(a.flatten(), b.flatten(), strict=True))
    assert cosine_similarity(a, b) == pytest.approx(product / float(a.norm() * b.norm()))
    assert cosine_similarity(a, 7.0 * a) == pytest.approx(1.0)


class FailedError(Exception):
    pass


class Counting(nn.Module):
    """Makes a new buffer of its old one, as running means often do."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return x


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_frozen_is_afterwards_as_before(fails, generator):
    norm = nn.BatchNorm1d(4)
    net = nn.Sequential(nn.Linear(3, 4), norm, Counting()).double()
    interface = Interface(MLPSynthesizer(torch.zeros(5, 4), [3])).double()
    modules = (net, interface)
    for parameter in net.parameters():
        parameter.grad = random(generator, *parameter.shape)
    kept = [(p, p.grad, None if p.grad is None else p.grad.clone()) for m in modules for p in m.parameters()]
    before = {name: b.clone() for m in modules for name, b in m.state_dict().items()}
    places = {name: b.data_ptr() for m in modules for name, b in m.named_buffers()}

    def measure() -> None:
        with frozen(*modules):
            assert all(p.grad is None for p, _, _ in kept)
            x = random(generator, 5, 3)
            interface.receive(net(x)).square().sum().backward()
            (net(x).square().sum() + interface.send(net(x))).backward()
            assert float(interface.target_rms()) > 0
            assert norm.get_buffer("running_mean").any()
            assert grad(net.get_parameter("0.weight")).any()
            if fails:
                raise FailedError

    if fails:
        with pytest.raises(FailedError):
            measure()
    else:
        measure()
    for parameter, gradient, values in kept:
        assert parameter.grad is gradient
        if values is not None:
            assert torch.equal(grad(parameter), values)
    after = {name: b for m in modules for name, b in m.state_dict().items()}
    close(after, before, rtol=0, atol=0)
    # In place: a CUDA graph reads a buffer where it is.
    assert {name: b.data_ptr() for m in modules for name, b in m.named_buffers()} == places
