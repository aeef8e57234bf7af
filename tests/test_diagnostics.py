"""Gradient quality: the measure itself is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from dni_rnn.cli import main
from dni_rnn.config import PUBLISHED_DNI, RecurrentConfig
from dni_rnn.cores.lstm import LSTM
from dni_rnn.data.task import Corpus, Data
from dni_rnn.errors import UsageError
from dni_rnn.estimators.bptt import TruncatedBPTT
from dni_rnn.estimators.dni import DNI
from dni_rnn.estimators.full import FullBPTT, state_gradients
from dni_rnn.experiments.diagnose import diagnose_model, held_out_stretches
from dni_rnn.gradient_quality import core_gradient, diagnose
from dni_rnn.interface import Interface
from dni_rnn.pytree import LSTMState, Tree, flatten_rows, map_tree
from dni_rnn.recurrent import SequenceModel
from dni_rnn.training.builders import build_model
from dni_rnn.window import Boundary, Window


def text(generator: torch.Generator, length: int = 1000) -> Corpus:
    letters = "".join("abcd"[int(i)] for i in torch.randint(4, (length,), generator=generator))
    return Corpus.from_texts("made up", letters, letters, letters)


def make(data: Data) -> SequenceModel:
    torch.manual_seed(0)
    config = RecurrentConfig(hidden=6, embedding=3, dni=True, **{**PUBLISHED_DNI, "scale": 1.0})
    model = build_model(config, data).double()
    assert isinstance(model.core.rnn, LSTM)
    for parameter in model.core.rnn.parameters():
        torch.nn.init.normal_(parameter, std=0.7)  # gradients that reach far
    return model


def windows(generator: torch.Generator, count: int, steps: int) -> list[Window]:
    symbols = torch.randint(4, (count * steps + 1, 3), generator=generator)
    cut = [slice(k * steps, (k + 1) * steps) for k in range(count)]
    nothing = Boundary()
    return [Window(symbols[:-1][c], symbols[1:][c], nothing, nothing, 3 * steps) for c in cut]


def numbered(stretch: list[Window]) -> list[Window]:
    """The context of every boundary is its number, and of every row its own."""

    def at(number: int) -> Boundary:
        return Boundary(context=torch.stack([torch.full((3,), number), torch.arange(3)]))

    return [w._replace(start=at(n), end=at(n + 1)) for n, w in enumerate(stretch)]


def test_one_window_is_exact_and_several_are_not(generator: torch.Generator) -> None:
    model = make(text(generator))
    state = model.initial_state(3)
    one, six = windows(generator, 1, 12), windows(generator, 6, 2)
    full = core_gradient(model, FullBPTT(), one, state, 0.1)
    torch.testing.assert_close(core_gradient(model, TruncatedBPTT(), one, state, 0.1), full)
    full = core_gradient(model, FullBPTT(), six, state, 0.1)
    short = core_gradient(model, TruncatedBPTT(), six, state, 0.1)
    assert (short - full).norm() > 0.05 * full.norm()


def test_the_model_is_left_as_it_was(generator: torch.Generator) -> None:
    model = make(text(generator))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    core_gradient(model, DNI(), windows(generator, 3, 2), model.initial_state(3), 0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all((parameter.grad == 1).all() for parameter in model.parameters())


def test_a_measurement_between_two_windows_of_a_trace_changes_nothing(generator: torch.Generator) -> None:
    data, stretch, found = text(generator), windows(generator, 4, 2), []
    for measured in (False, True):
        model, estimator = make(data), DNI(trace="all")
        assert model.core.interface is not None
        torch.nn.init.normal_(next(model.core.interface.synthesizer.parameters()), std=0.1)
        estimator.begin(model, 3)
        state = model.initial_state(3)
        for window in stretch:
            state = estimator(model, [window], state, 0.1).state
            if measured:
                core_gradient(model, DNI(trace=4), stretch[:2], state, 0.1)
        found.append(torch.cat([p.grad.flatten() for p in model.net_parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_state_gradients_are_those_of_finite_differences(generator: torch.Generator) -> None:
    model = make(text(generator))
    stretch = windows(generator, 3, 2)
    zeros = model.initial_state(3)
    state = LSTMState(*(0.3 * torch.randn(s.shape, generator=generator, dtype=s.dtype) for s in zeros))
    found = {n: flatten_rows(g) for n, g in state_gradients(model, stretch, state, 0.5, (0, 1)).items()}

    @torch.no_grad()
    def loss(cell: torch.Tensor, count: int) -> torch.Tensor:
        inputs = torch.cat([w.inputs for w in stretch[:count]])
        targets = torch.cat([w.targets for w in stretch[:count]])
        logits, _ = model(inputs, LSTMState(state.hidden, cell))
        return -0.5 * logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).sum()

    for horizon, count in ((0, 3), (1, 1)):
        for row, unit in ((0, 0), (2, 5)):
            step = torch.zeros_like(state.cell)
            step[0, row, unit] = 1e-6
            slope = (loss(state.cell + step, count) - loss(state.cell - step, count)) / 2e-6
            assert abs(slope) > 1e-6
            torch.testing.assert_close(found[horizon][row, 6 + unit], slope, rtol=1e-5, atol=1e-9)
    assert found[0].shape == flatten_rows(state).shape


def test_a_synthesizer_that_says_nothing_is_truncated_bptt(generator: torch.Generator) -> None:
    data = text(generator)
    with pytest.raises(UsageError, match="too short"):
        diagnose_model(make(data), data, context=0, weight=0.01, bptts=[4])
    data = text(generator, 9000)
    found = diagnose_model(make(data), data, context=0, weight=0.01, bptts=[4, 20])
    quality = {(q.estimator, q.bptt): q for q in found.parameters}
    for bptt in (4, 20):
        assert quality["synthetic", bptt].relative_error == quality["truncated", bptt].relative_error
    assert quality["truncated", 4].relative_error > quality["truncated", 20].relative_error > 0
    assert {(b.cosine, b.explained) for b in found.boundaries} == {(0.0, 0.0)}


def test_held_out_stretches_are_the_text_with_the_states_carried_there(generator: torch.Generator) -> None:
    data = text(generator, 9000)
    model = make(data)
    stretches = held_out_stretches(model, data, context=3)
    stream = data.stream("valid", 6, 0)
    state = model.initial_state(6)
    first = []
    for whole, cut in zip(stretches(120), stretches(7), strict=True):
        windows, at = cut
        assert [len(w.inputs) for w in windows] == [7] * 17
        assert torch.equal(torch.cat([w.inputs for w in windows]), whole[0][0].inputs[:119])
        assert all(w.start.context is not None and len(w.start.context) == 3 for w in windows)
        for one, other, wanted in zip(at, whole[1], state, strict=True):
            torch.testing.assert_close(one, wanted)
            torch.testing.assert_close(other, wanted)
        with torch.no_grad():  # a stretch of 240 from one to the next, of which the first half is measured
            passed = stream.window(120, 3), stream.window(120, 3)
            assert torch.equal(passed[0].inputs, whole[0][0].inputs)
            for window in passed:
                _, state = model(window.inputs, state)
        first.append(stream.state_dict()["position"])
    assert first == [240 * n for n in range(1, 7)]


class Exact(nn.Module):
    """M(state, number of the boundary) = half of the true gradient of all that follows."""

    def __init__(self, trues: list[Tree]) -> None:
        super().__init__()
        self.trues = trues

    def forward(self, message: Tree, context: torch.Tensor) -> Tree:
        return map_tree(lambda g: 0.5 * g[:, context[1]], self.trues[int(context[0, 0])])


def test_bias_gain_and_error_by_hand(generator: torch.Generator) -> None:
    """Of truncated BPTT, on halves of one row and of two."""
    model = make(text(generator))
    model.core.interface = None
    stretches = [([_alike(w) for w in windows(generator, 6, 2)], model.initial_state(3)) for _ in range(2)]
    found = {q.estimator: q for q in diagnose(model, lambda bptt: stretches, 0.5, [2]).parameters}
    assert set(found) == {"truncated", "lookahead:8", "trace"}
    assert found["lookahead:8"].relative_error < found["truncated"].relative_error
    product, power, errors, gains = 0.0, 0.0, [], []
    for stretch, state in stretches:
        parts = []
        for rows in (slice(0, 1), slice(1, 3)):
            half = [w._replace(inputs=w.inputs[:, rows], targets=w.targets[:, rows]) for w in stretch]
            at = LSTMState(*(leaf[:, rows] for leaf in state))
            full = core_gradient(model, FullBPTT(), half, at, 0.5)
            parts.append((core_gradient(model, TruncatedBPTT(), half, at, 0.5) - full, full))
        (e1, g1), (e2, g2) = parts
        product, power = product + float(e1 @ e2), power + float(g1 @ g2)
        errors.append(float((e1 + e2).norm() / (g1 + g2).norm()))
        gains.append(1 + float((e1 + e2) @ (g1 + g2) / (g1 + g2).square().sum()))
    truncated = found["truncated"]
    assert truncated.relative_error == pytest.approx(sum(errors) / 2)
    assert sum(errors) > 0.1
    assert truncated.gain == pytest.approx(sum(gains) / 2)
    assert truncated.bias == pytest.approx(product**0.5 / power**0.5)
    assert truncated.bias > 0.05
    assert truncated.cost == 1.0


def _alike(window: Window) -> Window:
    """Three rows that read the same: what one row errs in, the others do."""
    return window._replace(inputs=window.inputs[:, [0, 0, 0]], targets=window.targets[:, [0, 0, 1]])


def test_an_exact_trace_has_no_error(generator: torch.Generator) -> None:
    data = text(generator)
    model = build_model(RecurrentConfig(core="mingru", hidden=6, embedding=3), data).double()
    for parameter in model.core.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    stretch = windows(generator, 6, 2)
    found = diagnose(model, lambda bptt: [(stretch, model.initial_state(3))], 0.5, [2])
    quality = {q.estimator: q for q in found.parameters}
    assert quality["trace"].relative_error < 1e-9 < 0.05 < quality["truncated"].relative_error
    assert quality["trace"].gain == pytest.approx(1.0)


def test_what_is_measured_at_the_boundaries_by_hand(generator: torch.Generator) -> None:
    """M says half of the true gradient of the rest: 1 − |ĝ − s|² / |s|² is 3/4, and less far less."""
    model = make(text(generator))
    stretch = numbered(windows(generator, 4, 3))
    state, trues = model.initial_state(3), []
    for number, window in enumerate(stretch):
        trues.append(state_gradients(model, stretch[number:], state, 0.5, (0,))[0])
        with torch.no_grad():
            _, state = model.unroll(window.inputs, state)
    trues.append(map_tree(torch.zeros_like, state))
    model.core.interface = Interface(Exact(trues), normalize=False).double()
    found = diagnose(model, lambda bptt: [(stretch, model.initial_state(3))], 0.5, [3])
    whole = {b.horizon: b for b in found.boundaries}
    assert whole[0].cosine == pytest.approx(1.0)
    assert whole[0].explained == pytest.approx(0.75)
    # Of the next window alone: at the two boundaries that have more behind it.
    cosines, explained = [], []
    state = model.initial_state(3)
    for number in (1, 2):
        with torch.no_grad():
            _, state = model.unroll(stretch[number - 1].inputs, state)
        true = flatten_rows(state_gradients(model, stretch[number : number + 1], state, 0.5, (0,))[0])
        said = 0.5 * flatten_rows(trues[number])
        cosines.append(float((said * true).sum() / (said.norm() * true.norm())))
        explained.append(float(1 - (said - true).square().sum() / true.square().sum()))
    assert whole[1].cosine == pytest.approx(sum(cosines) / 2)
    assert whole[1].explained == pytest.approx(sum(explained) / 2)
    assert whole[1].cosine < 0.999
    assert set(whole) == {0, 1, 2}


def test_a_discount_is_that_of_training(generator: torch.Generator) -> None:
    """What M says is twice the true gradient; γ³ = 1/2 makes it right behind a window of three steps."""
    model = make(text(generator))
    stretch = numbered(windows(generator, 2, 3))
    state = model.initial_state(3)
    with torch.no_grad():
        _, after = model.unroll(stretch[0].inputs, state)
    true = state_gradients(model, stretch[1:], after, 0.5, (0,))[0]
    trues = [map_tree(lambda g: 4.0 * g, each) for each in (state, true, map_tree(torch.zeros_like, state))]
    model.core.interface = Interface(Exact(trues), normalize=False).double()
    errors = []
    for discount in (0.5 ** (1 / 3), 1.0):
        found = diagnose(model, lambda bptt: [(stretch, state)], 0.5, [3], discount)
        errors.append({q.estimator: q.relative_error for q in found.parameters})
    assert errors[0]["synthetic"] < 1e-9
    assert errors[1]["synthetic"] == pytest.approx(errors[1]["truncated"], rel=1e-9)  # as far beyond
    assert errors[1]["truncated"] > 0.05


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, run = tmp_path / "text.txt", tmp_path / "run"
    source.write_text("to be or not to be, that is the question\n" * 800)
    options = ["--hidden", "6", "--steps", "20", "--batch-size", "4", "--threads", "1", "--out", str(run)]
    assert main(["train", "text", str(source), "--bptt", "4", "--dni", "--audit", "3", *options]) == 0
    assert main(["diagnose", str(run), "--bptt", "4,20"]) == 0
    assert "relative error" in capsys.readouterr().out
    saved = json.loads((run / "diagnostics.json").read_text())
    assert {(q["estimator"], q["bptt"]) for q in saved["parameters"]} == {
        (name, bptt)
        for name in ("truncated", "lookahead:8", "trace", "synthetic", "synthetic+trace")
        for bptt in (4, 20)
    }
    assert (run / "diagnostics.png").stat().st_size > 1000
    assert main(["diagnose", str(run), "--bptt", "0,4"]) == 2
    assert "--bptt 0,4" in capsys.readouterr().err
