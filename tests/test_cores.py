"""The `Core` protocol: torch's three kinds behind it, and a cell that this project did not write."""

from __future__ import annotations

import copy
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from reference import close, distance, grad, gradients, random, randomize
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.config import RecurrentConfig
from dni_rnn.cores import Core
from dni_rnn.cores.gru import GRU
from dni_rnn.cores.lstm import LSTM
from dni_rnn.cores.rnn import RNN
from dni_rnn.errors import UsageError
from dni_rnn.estimators.bptt import TruncatedBPTT
from dni_rnn.estimators.dni import DNI
from dni_rnn.estimators.full import FullBPTT, state_gradients
from dni_rnn.interface import Interface
from dni_rnn.penalty import StatePenalty
from dni_rnn.pytree import LSTMState, Tree, flatten, flatten_rows, map_tree, part, unflatten
from dni_rnn.recurrent import RecurrentCore, SequenceModel
from dni_rnn.synthesizers import MLPSynthesizer
from dni_rnn.training.recurrent import RecurrentLearner
from dni_rnn.window import UNSCORED, Boundary, Window
from dni_rnn_tasks.text import Text

ROOT = Path(__file__).parents[1]
SYMBOLS, WIDTH, HIDDEN, ROWS = 5, 3, 4, 3
WEIGHT = 0.37


class Own(nn.Module):
    """A cell with a dict as its state, in an order that is not that of its keys, begun at what is not zero.

        slow' = f·slow + (1 − f)·v,  f, v = σ, tanh of W x + U out;   out' = tanh(A slow')

    slow (2, B, H): the halves of f and v; out (B, H).
    """

    output_leaf = "out"

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1) -> None:
        super().__init__()
        assert num_layers == 1
        self.output_size = hidden_size
        self.enter = nn.Linear(input_size + hidden_size, 4 * hidden_size)
        self.leave = nn.Linear(2 * hidden_size, hidden_size)

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        weight = self.leave.weight
        slow = torch.linspace(-1.0, 1.0, 2 * self.output_size).to(weight).reshape(2, 1, self.output_size)
        out = weight.new_full((batch_size, self.output_size), 0.25)
        return {"slow": slow.expand(2, batch_size, self.output_size).clone(), "out": out}

    def forward(self, inputs: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        slow, out, outputs = state["slow"], state["out"], []
        for x in inputs:
            f, v = self.enter(torch.cat([x, out], dim=1)).chunk(2, dim=1)
            f, v = (torch.stack(t.chunk(2, dim=1)) for t in (f.sigmoid(), v.tanh()))
            slow = f * slow + (1.0 - f) * v
            out = self.leave(torch.cat(list(slow), dim=1)).tanh()
            outputs.append(out)
        return torch.stack(outputs), {"slow": slow, "out": out}


class Risen(LSTM):
    """An LSTM that begins at ones."""

    def initial_state(self, batch_size: int) -> LSTMState:
        return LSTMState(*(torch.ones_like(leaf) for leaf in super().initial_state(batch_size)))


TORCHS: dict[str, Callable[..., Any]] = {"lstm": LSTM, "gru": GRU, "rnn": RNN}
STRANGE: dict[str, Callable[..., Any]] = {"own": Own, "risen": Risen}
every_core = pytest.mark.parametrize("name", [*TORCHS, *STRANGE])
strange_cores = pytest.mark.parametrize("name", list(STRANGE))


def make_core(name: str, generator: torch.Generator, std: float = 0.8) -> Any:
    core = (TORCHS | STRANGE)[name](WIDTH, HIDDEN, 1).double()
    randomize(core, generator, std)
    return core


# The protocol.


@every_core
def test_every_core_fulfils_the_protocol(name, generator):
    core = make_core(name, generator)
    assert isinstance(core, Core)
    assert isinstance(core, nn.Module)
    assert core.output_size == HIDDEN
    state = core.initial_state(ROWS)
    assert all(leaf.shape[-2] == ROWS and leaf.dtype == torch.float64 for leaf in flatten(state)[0])
    inputs = random(generator, 6, ROWS, WIDTH)
    outputs, after = core(inputs, state)
    assert outputs.shape == (6, ROWS, HIDDEN)
    assert flatten(after)[1] == flatten(state)[1]
    assert [leaf.shape for leaf in flatten(after)[0]] == [leaf.shape for leaf in flatten(state)[0]]
    # The part that is the output of the last step is that.
    assert torch.equal(part(after, core.output_leaf).reshape(ROWS, HIDDEN), outputs[-1])
    # Two halves, the state carried, are the whole; a row knows nothing of the others.
    first, middle = core(inputs[:2], state)
    rest, end = core(inputs[2:], middle)
    close(torch.cat([first, rest]), outputs)
    close(flatten(end)[0], flatten(after)[0])
    alone, _ = core(inputs[:, :1], core.initial_state(1))
    close(alone, outputs[:, :1])


@pytest.mark.parametrize("kind", list(TORCHS))
@pytest.mark.parametrize("layers", [1, 2])
def test_the_output_of_torchs_kinds_is_their_top_layer(kind, layers, generator):
    core = TORCHS[kind](WIDTH, HIDDEN, layers).double()
    randomize(core, generator)
    outputs, after = core(random(generator, 4, ROWS, WIDTH), core.initial_state(ROWS))
    assert torch.equal(part(after, core.output_leaf)[-1], outputs[-1])


@every_core
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_initial_state_is_like_the_weights(name, dtype, generator):
    core = make_core(name, generator).to(dtype)
    assert {leaf.dtype for leaf in flatten(core.initial_state(2))[0]} == {dtype}
    core = core.to("meta")
    assert {leaf.device.type for leaf in flatten(core.initial_state(2))[0]} == {"meta"}


def test_what_lacks_a_member_is_no_core():
    assert not isinstance(nn.LSTM(2, 3), Core)
    assert not isinstance(nn.Linear(2, 3), Core)


# Through the package: the same identities as of torch's own.


def make_model(core: Any, generator: torch.Generator, synthesizer: nn.Module | None = None, **options: Any):
    interface = None if synthesizer is None else Interface(synthesizer, **options)
    model = SequenceModel(SYMBOLS, SYMBOLS, WIDTH, RecurrentCore(core, interface)).double()
    for module in (model.embedding, model.readout):
        randomize(module, generator, 1.0)
    return model


def make_windows(lengths: Sequence[int], resets: bool, generator: torch.Generator) -> list[Window]:
    """Each boundary's context is its number. Of three rows, one is done at the second, two at the last."""
    done: list[Tensor | None] = [None] * (len(lengths) + 1)
    if resets:
        done[1], done[-2] = torch.tensor([False, True, False]), torch.tensor([True, False, True])
    windows = []
    for number, steps in enumerate(lengths):
        inputs, targets = torch.randint(SYMBOLS, (2, steps, ROWS), generator=generator)
        if steps > 1:
            targets[0, 1] = UNSCORED
        start, end = (Boundary(torch.full((1, ROWS), n), done[n]) for n in (number, number + 1))
        windows.append(Window(inputs, targets, start, end, int((targets != UNSCORED).sum())))
    return windows


def slow_loss(model: SequenceModel, windows: Sequence[Window], state: Tree, detached: bool = False) -> Tensor:
    """Step by step and row by row; with `detached`, every window from a state without a history."""
    losses = []
    for window in windows:
        leaves, spec = flatten(state)
        if window.start.done is not None:
            fresh = flatten(model.core.rnn.initial_state(ROWS))[0]
            for row in window.start.done.nonzero().flatten().tolist():
                leaves = [
                    torch.cat([old[..., :row, :], new[..., row : row + 1, :], old[..., row + 1 :, :]], dim=-2)
                    for old, new in zip(leaves, fresh, strict=True)
                ]
        state = unflatten([leaf.detach() if detached else leaf for leaf in leaves], spec)
        for symbols, targets in zip(window.inputs, window.targets, strict=True):
            outputs, state = model.core.rnn(model.embedding(symbols)[None], state)
            logits = model.readout(outputs[0])
            losses += [F.cross_entropy(logits[r], t) for r, t in enumerate(targets) if t != UNSCORED]
    return torch.stack(losses).sum()


def by_hand(model: SequenceModel, windows: Sequence[Window], state: Tree, detached: bool = False) -> Any:
    names, parameters = zip(*net_named(model), strict=True)
    loss = WEIGHT * slow_loss(model, windows, state, detached)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def net_named(model: SequenceModel) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if ".interface." not in name]


def net_gradients(model: SequenceModel) -> reference.Parameters:
    return {name: g for name, g in gradients(model).items() if ".interface." not in name}


def begun(core: Any, generator: torch.Generator) -> Tree:
    """A state that is not the initial one."""
    return map_tree(lambda leaf: leaf + 0.5 * random(generator, *leaf.shape), core.initial_state(ROWS))


LENGTHS = [(1,) * 6, (2, 1, 4, 2)]
every_length = pytest.mark.parametrize("lengths", LENGTHS, ids=str)
with_and_without_resets = pytest.mark.parametrize("resets", [False, True])


@strange_cores
@every_length
@with_and_without_resets
def test_full_and_truncated_bptt_of_any_core(name, lengths, resets, generator):
    core = make_core(name, generator)
    state, windows = begun(core, generator), make_windows(lengths, resets, generator)
    model = make_model(core, generator)
    full, truncated = by_hand(model, windows, state), by_hand(model, windows, state, detached=True)
    for estimator, wanted in ((FullBPTT(), full), (TruncatedBPTT(), truncated)):
        model.zero_grad()
        estimate = estimator(model, windows, state, WEIGHT)
        close(net_gradients(model), wanted)
        close(estimate.loss, slow_loss(model, windows, state).detach())
        assert type(estimate.state) is type(state)
        if isinstance(state, dict):
            assert list(estimate.state) == list(state) == ["slow", "out"]
    assert distance(truncated, full) > 0.05


class Answers(nn.Module):
    """M(state, number of the boundary) = the true gradient of all that follows, by plain autograd."""

    def __init__(self, model: SequenceModel, windows: Sequence[Window], state: Tree) -> None:
        super().__init__()
        self.answers = []
        for number in range(len(windows) + 1):
            leaves, spec = flatten(map_tree(lambda leaf: leaf.detach().requires_grad_(), state))
            if number == len(windows):
                self.answers.append(map_tree(torch.zeros_like, state))
                break
            loss = WEIGHT * slow_loss(model, windows[number:], unflatten(leaves, spec))
            found = torch.autograd.grad(loss, leaves, materialize_grads=True)
            self.answers.append(unflatten(list(found), spec))
            with torch.no_grad():
                state = model.reset(state, windows[number].start.done)
                _, state = model.unroll(windows[number].inputs, state)

    def forward(self, message: Tree, context: Tensor) -> Tree:
        return self.answers[int(context[0, 0])]


@strange_cores
@every_length
@with_and_without_resets
def test_oracle_dni_of_any_core_is_full_bptt(name, lengths, resets, generator):
    core = make_core(name, generator)
    state, windows = begun(core, generator), make_windows(lengths, resets, generator)
    model = make_model(core, generator)
    full, truncated = by_hand(model, windows, state), by_hand(model, windows, state, detached=True)
    assert distance(truncated, full) > 0.05
    model.core.interface = Interface(Answers(model, windows, state), normalize=False)
    DNI()(model, windows, state, WEIGHT)
    close(net_gradients(model), full)


@strange_cores
@with_and_without_resets
def test_fresh_dni_of_any_core_is_truncated_bptt_bit_for_bit(name, resets, generator):
    core = make_core(name, generator)
    state, windows = begun(core, generator), make_windows((2, 1, 4, 2), resets, generator)
    plain = make_model(core, generator)
    synthesizer = MLPSynthesizer(core.initial_state(1), [6], leaf=core.output_leaf)
    model = copy.deepcopy(plain)
    model.core.interface = Interface(synthesizer).double()
    DNI()(model, windows, state, WEIGHT)
    TruncatedBPTT()(plain, windows, state, WEIGHT)
    got, wanted = net_gradients(model), net_gradients(plain)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert grad(synthesizer.mlp.get_parameter("layers.1.weight")).any()
    assert synthesizer.mlp.get_parameter("layers.0.weight").shape == (6, HIDDEN)  # the output alone


@strange_cores
def test_state_gradients_of_any_core_are_those_of_plain_autograd(name, generator):
    core = make_core(name, generator)
    state, windows = begun(core, generator), make_windows((2, 1, 4, 2), True, generator)
    model = make_model(core, generator)
    leaves, spec = flatten(map_tree(lambda leaf: leaf.clone().requires_grad_(), state))
    found = state_gradients(model, windows, state, WEIGHT, (0, 2))
    for horizon, coming in ((0, windows), (2, windows[:2])):
        loss = WEIGHT * slow_loss(model, coming, unflatten(leaves, spec))
        wanted = torch.autograd.grad(loss, leaves)
        close(flatten(found[horizon])[0], list(wanted))
        assert type(found[horizon]) is type(state)


@strange_cores
def test_emit_of_any_core_gives_a_synthetic_gradient_like_its_state(name, generator):
    core = make_core(name, generator)
    synthesizer = MLPSynthesizer(core.initial_state(1), [6], leaf=core.output_leaf)
    model = make_model(core, generator, synthesizer, normalize=False)
    randomize(synthesizer, generator)
    state, inputs = begun(core, generator), random(generator, 4, ROWS, WIDTH)
    emitted = model.core.emit(inputs, state, Boundary(done=torch.tensor([False, True, False])))
    output, after = core(inputs, state)
    assert torch.equal(emitted.output, output)
    assert type(emitted.synthetic_gradient) is type(emitted.state) is type(state)
    if isinstance(after, dict):
        assert list(emitted.synthetic_gradient) == list(after)
    for leaf, like in zip(flatten(emitted.synthetic_gradient)[0], flatten(after)[0], strict=True):
        assert leaf.shape == like.shape
        assert not leaf[..., 1, :].any()
        assert leaf[..., 0, :].any()
    rows = flatten_rows(part(after, core.output_leaf))
    said = model.core.interface.predict(after)  # type: ignore[union-attr]
    close(flatten_rows(said), synthesizer.mlp(torch.tanh(rows)))


@every_core
def test_reset_puts_the_initial_state_into_the_rows_that_are_done(name, generator):
    core = make_core(name, generator)
    model, state = make_model(core, generator), begun(core, generator)
    after = model.reset(state, torch.tensor([False, True, False]))
    assert type(after) is type(state)
    initial = flatten(core.initial_state(ROWS))[0]
    for got, before, fresh in zip(flatten(after)[0], flatten(state)[0], initial, strict=True):
        assert torch.equal(got[..., 1, :], fresh[..., 1, :])
        assert torch.equal(got[..., [0, 2], :], before[..., [0, 2], :])
        assert not torch.equal(got[..., 1, :], before[..., 1, :])
        assert bool(fresh.any()) == (name in STRANGE)
    assert model.reset(state, None) is state
    assert torch.equal(flatten_rows(model.initial_state(ROWS)), flatten_rows(core.initial_state(ROWS)))


@strange_cores
def test_a_penalty_of_any_core(name, generator):
    core = make_core(name, generator)
    state = map_tree(lambda leaf: leaf.clone().requires_grad_(), begun(core, generator))
    leaves, _ = flatten(state)
    with torch.no_grad():
        leaves[-1][..., 0, 0] = 5.0
    penalty = StatePenalty(0.1).double()
    penalty.mean_square.fill_(4.0)
    assert float(penalty(state).detach()) == pytest.approx(
        0.1 * 2.0 * 0.5 * 4.0 * leaves[-1][..., 0, 0].numel()
    )
    received = flatten(penalty.measure(state))[0]
    torch.stack([leaf.sum() for leaf in received]).sum().backward()
    assert all(leaf.grad is None for leaf in leaves)
    assert float(penalty.mean_square) == pytest.approx(1.0)


# From the command line.


def test_the_example_is_trained_by_the_command_it_shows(tmp_path: Path) -> None:
    (command,) = [
        line.strip()
        for line in (ROOT / "examples" / "own_cell.py").read_text().splitlines()
        if "dni-rnn train" in line
    ]
    setting, program, *options = shlex.split(command)
    assert (setting, program) == ("PYTHONPATH=examples", "dni-rnn")
    assert "own_cell:Cell" in options
    assert "--dni" in options
    path = os.pathsep.join(filter(None, ["examples", str(ROOT), os.environ.get("PYTHONPATH")]))
    extra = ["--threads", "1", "--hidden", "24", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "dni_rnn", *options, *extra],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "valid" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 50
    assert summary["best_valid_bpc"] < 6.0  # a guess among 90 symbols is 6.5
    weights = load_file(tmp_path / "run" / "best.safetensors")
    assert {name for name in weights if name.startswith("core.rnn.")} == {
        "core.rnn.inputs.weight", "core.rnn.inputs.bias", "core.rnn.recurrent.weight"
    }  # fmt: skip
    assert weights["core.interface.synthesizer.mlp.layers.1.weight"].any()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "own_cell:Cell" in json.dumps(config)


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")


def test_the_example_is_the_cell_that_it_describes(examples, generator):
    from own_cell import Cell  # pyright: ignore[reportMissingImports]

    assert isinstance(Cell(WIDTH, HIDDEN), Core)
    cell = Cell(WIDTH, HIDDEN).double()
    randomize(cell, generator)
    x, state = random(generator, 5, ROWS, WIDTH), cell.initial_state(ROWS)
    assert not flatten_rows(state).any()
    outputs, after = cell(x, state)
    W, b, U = cell.inputs.weight, cell.inputs.bias, cell.recurrent.weight
    m = h = torch.zeros(ROWS, HIDDEN, dtype=torch.float64)
    for step in range(5):
        inner, outer = x[step] @ W.T + b, h @ U.T
        f = torch.sigmoid(inner[:, :HIDDEN] + outer[:, :HIDDEN])
        o = torch.sigmoid(inner[:, HIDDEN : 2 * HIDDEN] + outer[:, HIDDEN:])
        m = f * m + (1 - f) * torch.tanh(inner[:, 2 * HIDDEN :])
        h = o * torch.tanh(m)
        close(outputs[step], h)
    close(after, {"memory": m, "output": h})
    with pytest.raises(UsageError, match="one layer"):
        Cell(WIDTH, HIDDEN, 2)


@pytest.mark.parametrize(
    "settings", [{}, {"dni": True}, {"dni": True, "synthesizer_reads": "state"}], ids=str
)
def test_a_run_of_ones_own_cell_goes_on_bit_for_bit(settings, examples):
    def learner() -> RecurrentLearner:
        config = RecurrentConfig(
            core="own_cell:Cell", hidden=8, embedding=4, batch_size=4, bptt=3, lr=0.01, **settings
        )
        return RecurrentLearner(config, Text().load(None), torch.device("cpu"))

    one, other = learner(), learner()
    for _ in range(4):
        one.update()
    tensors, values = one.state_dict()
    tensors, values = {k: t.clone() for k, t in tensors.items()}, json.loads(json.dumps(values))
    other.update()
    other.load_state_dict(tensors, values)
    for each in (one, other):
        torch.manual_seed(5)
        for _ in range(4):
            each.update()
    ours, theirs = one.state_dict()[0], other.state_dict()[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not torch.equal(ours["model.core.rnn.inputs.weight"], tensors["model.core.rnn.inputs.weight"])
    assert list(one.state) == ["memory", "output"]
