"""A slow oracle, written from the equations. It imports torch and nothing else.

Every gradient is one `torch.autograd.grad` of a summed cross entropy (nats) that was unrolled step by
step. Names of parameters, order of gates and orientation of weights are torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
State = tuple[Tensor, ...]
"""(h, c) of an LSTM, (h,) of the others: each (layers, B, H)."""

GATES = {"lstm": 4, "gru": 3, "rnn": 1}


class Window(NamedTuple):
    """T steps: inputs and targets (T, B), target −100 where a step does not count.

    `done` (B,): rows that start anew, from the zero state, at the window's first step.
    """

    inputs: Tensor
    targets: Tensor
    done: Tensor | None = None


class Problem(NamedTuple):
    """Weights, a text of windows, and the state before it."""

    kind: str
    parameters: Parameters
    windows: list[Window]
    state: State


# Forward.


def lstm_cell(x: Tensor, state: State, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> State:
    """c' = σ(f)·c + σ(i)·tanh(g);  h' = σ(o)·tanh(c')."""
    h, c = state
    i, f, g, o = (x @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_cell(x: Tensor, state: State, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> State:
    """h' = (1 − z)·n + z·h with n = tanh(n_x + r·n_h)."""
    (h,) = state
    r_x, z_x, n_x = (x @ w_ih.T + b_ih).chunk(3, dim=1)
    r_h, z_h, n_h = (h @ w_hh.T + b_hh).chunk(3, dim=1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return ((1 - z) * n + z * h,)


def rnn_cell(x: Tensor, state: State, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> State:
    """h' = tanh(W x + U h + b)."""
    (h,) = state
    return (torch.tanh(x @ w_ih.T + b_ih + h @ w_hh.T + b_hh),)


CELLS: dict[str, Callable[..., State]] = {"lstm": lstm_cell, "gru": gru_cell, "rnn": rnn_cell}


def step(kind: str, p: Parameters, symbols: Tensor, state: State) -> tuple[Tensor, State]:
    """One step of all layers on symbols (B,): the top layer's output (B, H), and the state after it."""
    x, after = p["embedding.weight"][symbols], []
    for layer in range(state[0].shape[0]):
        weights = [p[f"rnn.{name}_l{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        here = CELLS[kind](x, tuple(leaf[layer] for leaf in state), *weights)
        x = here[0]
        after.append(here)
    return x, tuple(torch.stack(leaves) for leaves in zip(*after, strict=True))


def reset(state: State, done: Tensor | None) -> State:
    """Zeros in the rows of `done`."""
    if done is None:
        return state
    keep = 1.0 - done.to(state[0].dtype).reshape(1, -1, 1)
    return tuple(leaf * keep for leaf in state)


def unroll(kind: str, p: Parameters, window: Window, state: State) -> tuple[list[Tensor], State]:
    """The outputs (B, H) of every step, and the state after the last. `state` is already reset."""
    outputs = []
    for symbols in window.inputs:
        output, state = step(kind, p, symbols, state)
        outputs.append(output)
    return outputs, state


def window_loss(p: Parameters, window: Window, outputs: Sequence[Tensor]) -> Tensor:
    """Sum over scored targets of −log p(target), in nats."""
    total = (0.0 * outputs[0]).sum()  # differentiable even when nothing is scored
    for output, targets in zip(outputs, window.targets, strict=True):
        logits = output @ p["readout.weight"].T + p["readout.bias"]
        for row, target in enumerate(targets.tolist()):
            if target != -100:
                total = total + torch.logsumexp(logits[row], dim=0) - logits[row, target]
    return total


def total_loss(kind: str, p: Parameters, windows: Sequence[Window], state: State) -> tuple[Tensor, State]:
    """Loss summed over consecutive windows, and the state after them."""
    total = state[0].new_zeros(())
    for window in windows:
        outputs, state = unroll(kind, p, window, reset(state, window.done))
        total = total + window_loss(p, window, outputs)
    return total, state


def states(problem: Problem) -> list[State]:
    """The carried state at boundaries 0, ..., K, before any reset, without history."""
    carried = [problem.state]
    for window in problem.windows:
        with torch.no_grad():
            carried.append(total_loss(problem.kind, problem.parameters, [window], carried[-1])[1])
    return carried


# Backward.


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def leaves(p: Parameters) -> Parameters:
    return {name: leaf(tensor) for name, tensor in p.items()}


def _gradients(total: Tensor, p: Parameters) -> Parameters:
    return dict(zip(p, torch.autograd.grad(total, list(p.values()), materialize_grads=True), strict=True))


def add(*terms: Parameters) -> Parameters:
    return {name: sum((term[name] for term in terms[1:]), terms[0][name]) for name in terms[0]}


def full_bptt(problem: Problem) -> Parameters:
    """∂/∂θ of the loss of all windows, through all of them."""
    p = leaves(problem.parameters)
    return _gradients(total_loss(problem.kind, p, problem.windows, problem.state)[0], p)


def truncated_bptt(problem: Problem) -> Parameters:
    """The sum over windows of ∂/∂θ of its own loss, the state it starts from held constant."""
    terms = []
    for window, state in zip(problem.windows, states(problem)[:-1], strict=True):
        p = leaves(problem.parameters)
        terms.append(_gradients(total_loss(problem.kind, p, [window], state)[0], p))
    return add(*terms)


def injected(
    problem: Problem,
    number: int,
    state: State,
    end_gradient: State,
    weight: float = 1.0,
    extra: Callable[[list[Tensor]], Tensor] | None = None,
) -> tuple[Parameters, State]:
    """Of window `number`, begun in `state` (already reset), with `end_gradient` at the state it ends in:

        ∂/∂θ weight·loss + (∂end/∂θ)ᵀ end_gradient,   ∂/∂state weight·loss + (∂end/∂state)ᵀ end_gradient

    The second is what a synthesizer is to learn at the window's start. `extra` is a term of the
    objective beside the loss, a function of the outputs.
    """
    p, start = leaves(problem.parameters), tuple(leaf(s) for s in state)
    window = problem.windows[number]
    outputs, end = unroll(problem.kind, p, window, start)
    total = weight * window_loss(p, window, outputs)
    for e, g in zip(end, end_gradient, strict=True):
        total = total + (e * g.detach()).sum()
    if extra is not None:
        total = total + extra(outputs)
    target = torch.autograd.grad(total, start, retain_graph=True)
    return _gradients(total, p), target


def future_gradient(problem: Problem, number: int, state: State) -> State:
    """∂/∂state of the loss of windows `number`, ..., K − 1, begun in the carried `state`.

    Zero at the end of the text, and in rows that start anew at this boundary.
    """
    start = tuple(leaf(s) for s in state)
    rest = problem.windows[number:]
    if not rest:
        return tuple(torch.zeros_like(s) for s in start)
    with torch.enable_grad():
        total = total_loss(problem.kind, problem.parameters, rest, start)[0]
    return torch.autograd.grad(total, start, materialize_grads=True)


def state_gradients(problem: Problem) -> list[State]:
    """`future_gradient` at boundaries 0, ..., K along the text."""
    return [future_gradient(problem, number, state) for number, state in enumerate(states(problem))]


def running_size(squares: Sequence[float], decay: float = 0.99) -> float:
    """√ of the running mean of a target's mean squares: plain at first, exponential later."""
    running = 0.0
    for number, square in enumerate(squares, start=1):
        rate = 1.0 / number if number * (1.0 - decay) < 1.0 else 1.0 - decay
        running = (1.0 - rate) * running + rate * square
    return math.sqrt(running)


# Tools of the tests.


def close(got: Any, wanted: Any, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """Equal to rounding in float64; the defaults of torch allow 1e-7."""
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)


def distance(a: Parameters, b: Parameters) -> float:
    """‖a − b‖ / ‖b‖."""
    difference = sum(float((a[name] - b[name]).detach().square().sum()) for name in b)
    return math.sqrt(difference / sum(float(tensor.detach().square().sum()) for tensor in b.values()))


def mean_square(tensors: Sequence[Tensor]) -> float:
    """Over all elements of all tensors."""
    return float(torch.cat([t.detach().flatten() for t in tensors]).square().mean())


def grad(tensor: Tensor) -> Tensor:
    """Its gradient, which must be there."""
    assert tensor.grad is not None
    return tensor.grad


def gradients(module: torch.nn.Module) -> Parameters:
    """By name; zero where nothing arrived."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
    }


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def randomize(module: torch.nn.Module, generator: torch.Generator, std: float = 0.3) -> torch.nn.Module:
    """Give all parameters random values, those that start at zero too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(std * random(generator, *parameter.shape))
    return module


# A problem whose gradient through time is worth the name.


def random_parameters(
    kind: str, symbols: int, embedding: int, hidden: int, layers: int, generator: torch.Generator
) -> Parameters:
    """Recurrent weights are scaled orthogonal matrices and LSTM forget gates are open, so that the
    gradient survives the way back; in a net of small weights it dies in a few steps."""

    p = {
        "embedding.weight": random(generator, symbols, embedding),
        "readout.weight": random(generator, symbols, hidden),
        "readout.bias": random(generator, symbols),
    }
    gates = GATES[kind]
    for layer in range(layers):
        width = hidden if layer else embedding
        blocks = [torch.linalg.qr(random(generator, hidden, hidden))[0] for _ in range(gates)]
        p[f"rnn.weight_hh_l{layer}"] = (1.0 if kind == "rnn" else 1.5) * torch.cat(blocks)
        p[f"rnn.weight_ih_l{layer}"] = 0.5 * random(generator, gates * hidden, width)
        p[f"rnn.bias_ih_l{layer}"] = 0.1 * random(generator, gates * hidden)
        p[f"rnn.bias_hh_l{layer}"] = 0.1 * random(generator, gates * hidden)
        if kind == "lstm":
            p[f"rnn.bias_ih_l{layer}"][hidden : 2 * hidden] += 2.0
        if kind == "gru":
            p[f"rnn.bias_ih_l{layer}"][hidden : 2 * hidden] += 1.0
    return p


def random_problem(
    kind: str,
    generator: torch.Generator,
    *,
    layers: int = 1,
    steps: int = 12,
    window: int | Sequence[int] = 3,
    rows: int = 3,
    hidden: int = 4,
    embedding: int = 3,
    symbols: int = 5,
    unscored: bool = False,
    resets: bool = False,
) -> Problem:
    """A random text of `steps` steps in windows of `window`, or of such lengths one after the other, begun
    in a state that is not zero.

    `unscored`: some targets do not count. `resets`: some rows start anew at some boundaries.
    """
    parameters = random_parameters(kind, symbols, embedding, hidden, layers, generator)
    inputs = torch.randint(symbols, (steps, rows), generator=generator)
    targets = torch.randint(symbols, (steps, rows), generator=generator)
    if unscored:
        targets[torch.rand(steps, rows, generator=generator) < 0.3] = -100
    windows, lengths = [], [window] * (steps // window) if isinstance(window, int) else window
    for here, there in zip(inputs.split(list(lengths)), targets.split(list(lengths)), strict=True):
        done = torch.rand(rows, generator=generator) < 0.4 if resets else None
        windows.append(Window(here, there, done))
    count = 2 if kind == "lstm" else 1
    state = tuple(0.5 * random(generator, layers, rows, hidden) for _ in range(count))
    return Problem(kind, parameters, windows, state)


def laid_out(rows: Tensor, leaves: Sequence[Tensor], batch_dim: int = -2) -> list[Tensor]:
    """What an M says as rows (B, features), as tensors of the shapes of `leaves`, element by element."""
    parts, first = [], 0
    for leaf in leaves:
        size = leaf.numel() // leaf.shape[batch_dim]
        shape = leaf.select(batch_dim, 0).shape
        each = [row[first : first + size].reshape(shape) for row in rows]
        parts.append(torch.stack(each, dim=batch_dim if batch_dim >= 0 else leaf.dim() + batch_dim))
        first += size
    return parts


class CellOfAnLSTM:
    """`dni_rnn.traces.lstm.StepKernel` in torch's own operations: where its kernels are not, on a CPU."""

    @staticmethod
    def forward(of_x: Tensor, of_h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        i, f, g, o = (of_x + of_h).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        return o * c.tanh(), c, torch.cat([i, f, g, o], -1)

    @staticmethod
    def backward(
        at_h: Tensor | None, at_c: Tensor, before: Tensor, after: Tensor, gates: Tensor
    ) -> tuple[Tensor, Tensor]:
        (i, f, g, o), tanh = gates.chunk(4, -1), after.tanh()
        at_h = torch.zeros_like(at_c) if at_h is None else at_h
        at_c = at_c + at_h * o * (1 - tanh**2)
        at_gates = [at_c * g * i * (1 - i), at_c * before * f * (1 - f), at_c * i * (1 - g**2)]
        return torch.cat([*at_gates, at_h * tanh * o * (1 - o)], -1), at_c * f
