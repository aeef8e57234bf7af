"""Two networks at different rates: identities of their gradients, what is counted, and runs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from reference import Parameters, close, grad, gradients, random, randomize
from torch import Tensor, nn
from torch.nn import functional as F

from dni_rnn.cli import main, parse_train
from dni_rnn.penalty import StatePenalty
from dni_rnn.pytree import LSTMState, Tree, flatten
from dni_rnn.training.checkpoint import load_checkpoint
from dni_rnn.training.loop import Interrupted, train
from dni_rnn.training.run_directory import Run
from dni_rnn.two_rates import Cut, DigitBlock, TwoRates
from dni_rnn_tasks.counting import CountedDigits, Counting, CountingConfig
from dni_rnn_tasks.counting_learner import CountingLearner, build_model

DATA = Path(__file__).parents[2] / "shared" / "data"
CPU = torch.device("cpu")
METHODS: dict[str, dict[str, Any]] = {
    "lock-step": {},
    "decoupled": {"decoupled": True},
    "decoupled, with a penalty": {"decoupled": True, "restore": 0.5},
    "dni": {"dni": True},
    "dni, B in single ticks": {"dni": True, "ticks": 1},
}


def digits(held_out: int = 40) -> CountedDigits:
    """Pictures of 2 × 3 pixels, each of which shows its label."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 255, (10, 1, 2, 3))

    def some(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = random.integers(0, 10, n)
        return patterns[labels].astype(np.uint8), labels.astype(np.uint8)

    return CountedDigits("made up", tuple("0123456789"), some(60), some(held_out), some(50))


# What is counted.


def test_counts_by_hand():
    labels = torch.tensor([[3, 3, 1, 2], [0, 3, 8, 7]]).reshape(2, 2, 2)  # two windows, two steps, two rows
    fast, slow = digits().answers(labels)
    assert fast.tolist() == [[2, 1], [2, 3]]  # odd digits from the beginning of the block
    assert slow.tolist() == [1, 2]  # 3s in all of it


def test_a_block_is_the_next_digits_of_a_shuffled_pass():
    data = digits()
    learner = CountingLearner(CountingConfig(bptt=2, batch_size=3), data, CPU)
    blocks = [CountingLearner.block(data, learner.batches, number, 2) for number in range(10)]
    assert blocks[0].inputs.shape == (2, 2, 3, 1, 2, 3)
    counted = np.bincount(data.train[1], minlength=10)
    for one_pass in (blocks[:5], blocks[5:]):  # 60 digits, 12 in a block
        assert sum(int(b.slow.sum()) for b in one_pass) == counted[3]
        assert sum(int(b.fast[-1].sum()) for b in one_pass) == counted[1::2].sum()
    assert not torch.equal(blocks[0].inputs, blocks[5].inputs)


def test_contexts_hold_what_is_to_come_and_no_more():
    block = DigitBlock(torch.zeros(3, 3, 2, 1), torch.tensor([[0, 1], [2, 2], [3, 4]]), torch.tensor([5, 6]))
    assert block.coming_slow(1).tolist() == [[-1, -1], [5, 6], [-1, -1]]
    assert block.coming(2).tolist() == [[-1, -1], [-1, -1], [3, 4], [-1, -1], [-1, -1], [5, 6]]


# Gradients.


class Truth(NamedTuple):
    """The objective of a block, differentiated at once: of the parameters, and where messages pass."""

    parameters: Parameters
    fast_states: list[LSTMState]  # before each window of A
    slow_states: list[LSTMState]  # before each tick of B
    messages: list[Tensor]


def truth(model: TwoRates, block: DigitBlock) -> Truth:
    """Written out step by step, with nothing cut."""
    period, rows = len(block.inputs), len(block.slow)
    model.zero_grad()
    fast_state, slow_state = (net.core.initial_state(rows) for net in (model.fast, model.slow))
    kept: list[Tensor] = []
    fast_states, slow_states, messages = [], [], []
    objective = torch.zeros((), dtype=torch.float64)
    for tick in range(period):
        fast_states.append(fast_state)
        x = model.fast.encoder(block.inputs[tick])
        outputs, fast_state = model.fast.core(x, fast_state)
        logits = model.fast.readout(outputs[-1])
        objective = objective + F.cross_entropy(logits, block.fast[tick]) / period
        messages.append(model.fast.message(outputs[-1]))
    for tick in range(period):
        slow_states.append(slow_state)
        outputs, slow_state = model.slow.core(messages[tick].unsqueeze(0), slow_state)
    objective = objective + F.cross_entropy(model.slow.readout(outputs[-1]), block.slow)
    kept = [leaf for s in (*fast_states[1:], *slow_states[1:], *messages) for leaf in flatten(s)[0]]
    for leaf in kept:
        leaf.retain_grad()
    objective.backward()
    nothing = [LSTMState(torch.zeros(0), torch.zeros(0))]
    return Truth(
        {name: g for name, g in gradients(model).items() if "interface" not in name},
        nothing + [LSTMState(grad(s.hidden), grad(s.cell)) for s in fast_states[1:]],
        nothing + [LSTMState(grad(s.hidden), grad(s.cell)) for s in slow_states[1:]],
        [grad(m) for m in messages],
    )


class Oracle(nn.Module):
    """M = the given gradients, by the tick that the context tells."""

    def __init__(self, answers: list[Any], period: int) -> None:
        super().__init__()
        self.answers, self.period = answers, period

    def forward(self, message: Tree, context: Tensor) -> Tree:
        (tick,) = (context[-self.period :, 0] >= 0).nonzero()
        return self.answers[int(tick)]


def small(generator: torch.Generator, **settings: Any) -> tuple[TwoRates, DigitBlock]:
    config = CountingConfig(**{"bptt": 3, "hidden": 4, **settings})
    model = build_model(config, digits()).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "interface" not in name:
                parameter.copy_(0.6 * random(generator, *parameter.shape))
            if name.endswith("bias_ih_l0"):  # open forget gates: the gradient survives the way back
                parameter[config.hidden : 2 * config.hidden] += 2.0
    period, rows = config.bptt, 5
    targets = torch.randint(period**2, (period + 1, rows), generator=generator)
    return model, DigitBlock(random(generator, period, period, rows, 1, 2, 3), targets[:-1], targets[-1])


def net_gradients(model: TwoRates) -> Parameters:
    return {name: g for name, g in gradients(model).items() if "interface" not in name}


def differentiate(model: TwoRates, turns: Any) -> None:
    model.zero_grad()
    for turn in turns:
        turn.backward()


def relative(got: Parameters, wanted: Parameters, part: str) -> float:
    """‖got − wanted‖ / ‖wanted‖ over the parameters of a network."""
    names = [name for name in wanted if name.startswith(part)]
    apart = sum(float((got[name] - wanted[name]).square().sum()) for name in names)
    return (apart / sum(float(wanted[name].square().sum()) for name in names)) ** 0.5


def test_lock_step_is_joint_backpropagation(generator):
    model, block = small(generator)
    true = truth(model, block)
    differentiate(model, model.lock_step(block))
    close(net_gradients(model), true.parameters)


@pytest.mark.parametrize("ticks", [1, 3])
def test_with_exact_synthesizers_the_turns_add_up_to_joint_backpropagation(ticks, generator):
    model, block = small(generator, dni=True, ticks=ticks, restore=0.0, centre=False)
    true = truth(model, block)
    assert min(float(g.norm()) for g in true.messages) > 1e-3, "a gradient worth the name"
    answers = {"fast": true.fast_states, "slow": true.slow_states, "message": true.messages}
    for name, interface in model.interfaces().items():
        interface.synthesizer, interface.normalize = Oracle(answers[name], 3), False
    differentiate(model, model.decoupled(block))
    close(net_gradients(model), true.parameters)
    # One of the three alone would not do: each is needed.
    for name, interface in model.interfaces().items():
        interface.scale = 0.0
        differentiate(model, model.decoupled(block))
        part = "slow" if name == "slow" else "fast"
        assert relative(net_gradients(model), true.parameters, part) > 1e-3, name
        interface.scale = 1.0


@pytest.mark.parametrize("settings", [{"decoupled": True}, {"dni": True}, {"dni": True, "ticks": 1}], ids=str)
def test_corrected_turns_add_up_to_joint_backpropagation_whatever_m_is(settings, generator):
    model, block = small(generator, restore=0.0, **settings)
    true = truth(model, block)
    for interface in model.interfaces().values():
        randomize(interface.synthesizer, generator)
    for correct in (False, True):
        differentiate(model, model.decoupled(block, correct))
        apart = relative(net_gradients(model), true.parameters, "fast")
        assert (apart < 1e-10) if correct else (apart > 1e-2), apart
    close(net_gradients(model), true.parameters)


def test_a_correction_is_at_the_weights_of_the_forward_pass(generator):
    """Whatever steps were made meanwhile: here A's weights become useless before the last turn."""
    model, block = small(generator, decoupled=True)
    differentiate(model, model.decoupled(block, correct=True))
    wanted = net_gradients(model)
    model.zero_grad()
    for turn in model.decoupled(block, correct=True):
        if turn.late:
            with torch.no_grad():
                for p in model.fast.parameters():
                    p.zero_()
        turn.backward()
    close(net_gradients(model), wanted)


def test_a_correction_is_of_what_was_sent(generator):
    """Also if M has changed since: by dropout, or by an optimizer that goes on without a new gradient."""
    model, block = small(generator, restore=0.0, dni=True, ticks=1)
    true = truth(model, block)
    for interface in model.interfaces().values():
        interface.target_square.fill_(1.0)
    model.zero_grad()
    for turn in model.decoupled(block, correct=True):
        turn.backward()
        for interface in model.interfaces().values():
            randomize(interface.synthesizer, generator)
    close(net_gradients(model), true.parameters)


def test_what_does_not_divide_is_refused(generator):
    """B would never answer, and windows would be left out."""
    model, block = small(generator)
    for ticks in (0, 2, 4):
        with pytest.raises(ValueError, match="must divide the period, 3"):
            TwoRates(model.fast, model.slow, {}, 3, ticks)
    for windows in (2, 4):
        wrong = TwoRates(model.fast, model.slow, {}, windows, windows)
        with pytest.raises(ValueError, match=f"a block has {windows} windows, not 3"):
            next(wrong.decoupled(block))


def test_what_arrives_at_the_message_is_the_true_gradient(generator):
    """B's window is the whole block, so the synthesizer of the message is never bootstrapped."""
    model, block = small(generator, dni=True)
    true = truth(model, block)
    differentiate(model, model.decoupled(block))
    interface = model.interfaces()["message"]
    rms = torch.stack(true.messages).square().mean().sqrt()
    close(interface.target_rms(), rms, rtol=1e-6)  # the running RMS is kept in float64 here, its rate is not


def reached(objective: Tensor, net: nn.Module) -> list[str]:
    """Parameters of `net` that the graph of `objective` leads to."""
    named = dict(net.named_parameters())
    found = torch.autograd.grad(objective, list(named.values()), allow_unused=True, retain_graph=True)
    return [name for name, gradient in zip(named, found, strict=True) if gradient is not None]


@pytest.mark.parametrize("method", METHODS)
def test_what_the_loss_of_b_reaches(method, generator):
    """In lock-step every parameter of A; decoupled none of them, with synthetic gradients either."""
    model, block = small(generator, **METHODS[method])
    turns = model.lock_step(block) if method == "lock-step" else model.decoupled(block)
    for turn in turns:
        if turn.slow is None:
            turn.backward()
            continue
        loss = F.cross_entropy(*turn.slow)
        nets = {net: reached(loss, getattr(model, net)) for net in ("fast", "slow")}
        assert nets["slow"]
        if method == "lock-step":
            assert {name.split(".")[0] for name in nets["fast"]} == {"encoder", "core", "message"}
        else:
            assert nets["fast"] == []


def test_without_synthetic_gradients_the_message_is_never_trained(generator):
    """With them it is, as soon as M predicts something."""
    for dni in (False, True):
        model, block = small(generator, decoupled=True, dni=dni)
        for interface in model.interfaces().values():
            randomize(interface.synthesizer, generator)
            interface.target_square.fill_(1.0)
        differentiate(model, model.decoupled(block))
        for name, parameter in model.fast.message.named_parameters():
            assert (parameter.grad is not None and float(parameter.grad.norm()) > 0) == dni, name


def test_a_synthesizer_that_predicts_zero_changes_nothing(generator):
    model, block = small(generator, dni=True)
    differentiate(model, model.decoupled(block))
    silent = net_gradients(model)
    plain = TwoRates(model.fast, model.slow, {name: Cut() for name in model.cuts}, 3, 3)
    differentiate(plain, plain.decoupled(block))
    close(net_gradients(plain), {name: silent[name] for name in net_gradients(plain)})
    assert relative(silent, truth(model, block).parameters, "fast") > 0.01


@pytest.mark.parametrize("dni", [False, True])
def test_a_penalty_pushes_back_what_is_beyond_its_bound(dni, generator):
    """It is all that trains a message where M predicts zero: strength · RMS · ½ Σ max(|m| − 3, 0)²."""
    model, block = small(generator, decoupled=True, dni=dni, restore=0.5)
    scale = dict(model.fast.message.named_parameters())["1.weight"]
    with torch.no_grad():
        scale.fill_(10.0)
    cut = model.cut("message")
    assert cut.penalty is not None
    (cut.penalty.mean_square if cut.interface is None else cut.interface.target_square).fill_(4.0)
    next(model.decoupled(block)).backward()
    net = model.fast
    outputs, _ = net.core(net.encoder(block.inputs[0]), net.core.initial_state(len(block.slow)))
    excess = (net.message(outputs[-1]).abs() - 3.0).clamp_min(0.0)
    assert 0 < int((excess > 0).sum()) < excess.numel()
    parameters = dict(net.message.named_parameters())
    term = 0.5 * 2.0 * 0.5 * excess.square().sum()
    expected = torch.autograd.grad(term, list(parameters.values()))
    close({name: grad(p) for name, p in parameters.items()}, dict(zip(parameters, expected, strict=True)))


def test_where_a_penalty_stands_by_default():
    """On all that is sent where --dni is given; the interface, where there is one, says the RMS."""
    given: list[tuple[dict[str, Any], float | None]] = [
        ({"dni": True}, 0.1),
        ({"dni": True, "restore": 0.0}, None),
        ({"decoupled": True}, None),
        ({"decoupled": True, "restore": 0.3}, 0.3),
        ({}, None),
    ]
    for settings, strength in given:
        config = CountingConfig(bptt=2, hidden=4, **settings)
        cuts = build_model(config, digits()).cuts
        penalties = {name: getattr(cut, "penalty", None) for name, cut in cuts.items()}
        assert {name for name, penalty in penalties.items() if penalty is not None} == (
            {"fast", "message"} if strength else set()
        )
        assert {p.strength for p in penalties.values() if isinstance(p, StatePenalty)} <= {strength}


def test_the_names_of_methods():
    given = ["", "--decoupled", "--decoupled --restore 0.5", "--dni", "--dni --context none --no-critic"]
    assert [parse_train(["counting", *words.split()])[2].method for words in given] == [
        "lock-step", "decoupled", "decoupled+restore", "dni+targets", "dni-online",
    ]  # fmt: skip


def test_every_net_is_stepped_at_its_own_rate():
    counts = {}
    for method, settings in METHODS.items():
        learner = CountingLearner(CountingConfig(bptt=2, batch_size=3, hidden=4, **settings), digits(), CPU)
        learner.update()
        learner.update()
        state = learner.record.optimizer.state
        parts = ("fast.encoder", "fast.message", "slow.core.", "interface.")
        counts[method] = [
            {
                int(state[p]["step"])
                for name, p in learner.model.named_parameters()
                if part in name and p in state
            }
            for part in parts
        ]
    assert counts == {
        "lock-step": [{2}, {2}, {2}, set()],
        "decoupled": [{4}, set(), {2}, set()],
        "decoupled, with a penalty": [{4}, {4}, {2}, set()],
        "dni": [{4}, {4}, {2}, {2}],  # A's own interface and that of the message
        "dni, B in single ticks": [
            {4},
            {4},
            {4},
            {2, 4},
        ],  # B's own is trained once in a block, at its middle
    }


# Runs.


def run_of(path: Path, **settings: Any) -> Run:
    small = {"bptt": 2, "hidden": 6, "batch_size": 3, "digits": 240, "log_every": 3, "eval_every": 60}
    return Run(path, "counting", Counting(), CountingConfig(**{**small, "threads": 1, **settings}, out=path))


@pytest.fixture(autouse=True)
def _made_up(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "real" not in request.node.name:
        monkeypatch.setattr(Counting, "load", lambda self, data_dir: digits())


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(method, tmp_path, monkeypatch):
    settings = METHODS[method]
    whole = train(run_of(tmp_path / "whole", **settings), quiet=True)
    update = CountingLearner.update

    def stop_in_the_middle(self: CountingLearner) -> None:
        update(self)
        if self.counters.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(CountingLearner, "update", stop_in_the_middle)
    with pytest.raises(Interrupted):
        train(run_of(tmp_path / "parts", **settings), quiet=True)
    monkeypatch.setattr(CountingLearner, "update", update)
    parts = train(run_of(tmp_path / "parts", **settings, resume=True), quiet=True)
    timed = ("seconds", "symbols_per_second", "peak_memory_mb")

    def lasting(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in timed}

    assert lasting(parts) == lasting(whole)
    rows = [list(map(lasting, run_of(tmp_path / name).rows())) for name in ("whole", "parts")]
    assert rows[0] == rows[1]
    weights = [load_checkpoint(tmp_path / name / "checkpoint.safetensors")[0] for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert {"valid_error", "valid_error_fast", "valid_error_slow"} <= rows[0][-1].keys()
    assert whole["test_error"] == (whole["test_error_fast"] + whole["test_error_slow"]) / 2


def test_errors_of_a_net_that_always_says_the_same():
    data = digits(4000)
    model = build_model(CountingConfig(bptt=2, hidden=4), data)
    with torch.no_grad():
        for net, answer in ((model.fast, 1), (model.slow, 0)):
            net.readout.weight.zero_()
            net.readout.bias.copy_(torch.arange(5) == answer)
    found = CountingLearner.score(model, data, "valid", CPU)
    share = float((data.valid[1] % 2).mean())
    # Odd digits after 2 and after 4 of them; 3s among 4.
    once = [2 * share * (1 - share), 4 * share * (1 - share) ** 3]
    assert found["error_fast"] == pytest.approx(100 * (1 - sum(once) / 2), abs=4)
    assert found["error_slow"] == pytest.approx(100 * (1 - (data.valid[1] != 3).mean() ** 4), abs=4)
    assert found == CountingLearner.score(model, data, "valid", CPU)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--bptt 1", "--bptt"),
        ("--ticks 3", "--ticks 3"),
        ("--ticks 2", "--ticks does nothing without"),
        ("--scale 0.5", "--scale does nothing without --dni"),
        ("--dni --batch-size 1", "--no-centre"),
        ("--dni --synthesizer deep", "--synthesizer deep"),
        ("--dni --synthesizer my.place:Mine", "--synthesizer my.place:Mine: give linear, mlp"),
        ("--dni --context none", "--no-critic"),
        ("--digits 0", "--digits must be positive"),
        ("--digits 9 --steps 9", "give one of --digits, --minutes and --steps"),
        ("--restore 0.5", "--restore works where nets are cut: add --dni or --decoupled"),
        ("--dni --restore -1", "--restore must not be negative"),
    ],
)
def test_settings_that_cannot_be(flags, message, tmp_path, capsys):
    assert main(["train", "counting", *flags.split(), "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def test_real_digits_from_the_command_line(tmp_path, capsys):
    """A real run learns something at once, and what it says is what `eval` says."""
    if not (DATA / "mnist").is_dir():
        pytest.skip("skipped: a run on MNIST, because its files are not there")
    out = str(tmp_path / "run")
    words = ["--digits", "30000", "--hidden", "16", "--batch-size", "32", "--lr", "3e-3", "--threads", "1"]
    assert (
        main(["train", "counting", "--bptt", "2", "--dni", *words, "--data-dir", str(DATA), "--out", out])
        == 0
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["method"] == "dni+targets"
    assert summary["test_error_fast"] < 50  # always saying the likeliest: 56
    capsys.readouterr()
    assert main(["eval", out]) == 0
    said = capsys.readouterr().out
    assert f"{summary['test_error_fast']:.4f} error_fast, {summary['test_error_slow']:.4f} error_slow" in said
