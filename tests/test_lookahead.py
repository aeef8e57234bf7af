"""Backpropagation through T + W steps of which T advance: against slow equations, and in training."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import reference
import torch
from reference import close, distance, gradients
from test_estimators import WEIGHT, as_message, build, library, net_gradients, scaled
from test_training import make_text
from torch import Tensor

from dni_rnn.cli import main, parse_train
from dni_rnn.config import RecurrentConfig
from dni_rnn.cores import diagonal, mingru
from dni_rnn.estimators.bptt import TruncatedBPTT
from dni_rnn.estimators.full import FullBPTT
from dni_rnn.estimators.lookahead import LookaheadBPTT, first_steps
from dni_rnn.penalty import StatePenalty
from dni_rnn.recurrent import RecurrentCore, SequenceModel
from dni_rnn.training.checkpoint import load_checkpoint
from dni_rnn.training.cuda_graph import Recorded
from dni_rnn.training.recurrent import RecurrentLearner
from dni_rnn.window import Window
from dni_rnn_tasks.recall import Recall
from dni_rnn_tasks.repeat import Copy
from dni_rnn_tasks.text import Text

CPU = torch.device("cpu")


def cut(windows: Sequence[reference.Window], steps: int) -> list[reference.Window]:
    """Their first `steps` steps, window by window."""
    found = []
    for window in windows:
        if steps > 0:
            found.append(window._replace(inputs=window.inputs[:steps], targets=window.targets[:steps]))
        steps -= len(window.inputs)
    return found


def lookahead_by_hand(problem: reference.Problem, steps: int) -> reference.Parameters:
    """The docstring as arithmetic: one window after the other, weights constant in the steps behind it."""
    terms = []
    for number, state in enumerate(reference.states(problem)[:-1]):
        p = reference.leaves(problem.parameters)
        loss, end = reference.total_loss(problem.kind, p, [problem.windows[number]], state)
        coming = cut(problem.windows[number + 1 :], steps)
        if coming:
            loss = loss + reference.total_loss(problem.kind, problem.parameters, coming, end)[0]
        terms.append(reference._gradients(loss, p))
    return reference.add(*terms)


def looking_back(problem: reference.Problem, window: int, steps: int) -> reference.Parameters:
    """BPTT(T + W; T) as published: the losses of each window, through the T + W steps up to its end."""
    every, back, states = problem.windows, steps // window, reference.states(problem)
    terms = []
    for number in range(len(every)):
        first, p = max(0, number - back), reference.leaves(problem.parameters)
        state = states[first]
        for each in every[first:number]:
            _, state = reference.unroll(problem.kind, p, each, reference.reset(state, each.done))
        loss, _ = reference.total_loss(problem.kind, p, [every[number]], state)
        terms.append(reference._gradients(loss, p))
    return reference.add(*terms)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(
    ("window", "steps"), [(1, 1), (1, 5), (3, 2), (3, 3), (3, 4), (4, 7), ((1, 5, 2, 4), 3)]
)
def test_it_is_what_it_says(kind, resets, window, steps, generator):
    problem = reference.random_problem(kind, generator, layers=2, window=window, resets=resets, unscored=True)
    wanted = lookahead_by_hand(problem, steps)
    model = build(problem)
    estimate = LookaheadBPTT(steps)(model, library(problem), as_message(problem), WEIGHT)
    close(net_gradients(model), scaled(wanted), rtol=1e-10)
    close(estimate.loss, reference.total_loss(kind, problem.parameters, problem.windows, problem.state)[0])
    assert distance(wanted, reference.truncated_bptt(problem)) > 0.03
    assert resets or distance(wanted, reference.full_bptt(problem)) > 0.03
    if isinstance(window, int) and steps % window == 0:
        close(wanted, looking_back(problem, window, steps))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("window", [1, 3])
def test_with_all_the_rest_it_is_full_bptt_and_with_nothing_truncated(kind, resets, window, generator):
    problem = reference.random_problem(kind, generator, window=window, resets=resets, unscored=True)
    for steps, wanted in (
        (0, reference.truncated_bptt(problem)),
        (12 - window, reference.full_bptt(problem)),
        (100, reference.full_bptt(problem)),
    ):
        model = build(problem)
        LookaheadBPTT(steps)(model, library(problem), as_message(problem), WEIGHT)
        close(net_gradients(model), scaled(wanted), rtol=1e-10)


def test_what_is_ahead_of_an_update_counts_as_if_it_were_in_it(generator):
    """Window by window with the rest ahead, or all windows at once."""
    problem = reference.random_problem("gru", generator, resets=True)
    windows, whole, parts = library(problem), build(problem), build(problem)
    LookaheadBPTT(4)(whole, windows, as_message(problem), WEIGHT)
    state, estimator = as_message(problem), LookaheadBPTT(4)
    for number, window in enumerate(windows):
        ahead = first_steps(windows[number + 1 :], 4)
        state = estimator(parts, [window], state, WEIGHT, ahead).state
    close(net_gradients(parts), net_gradients(whole))


def test_the_steps_ahead_are_joined_where_no_row_starts_anew(generator):
    windows = library(reference.random_problem("gru", generator))
    done = torch.tensor([True, False, False])
    windows[2] = windows[2]._replace(start=windows[2].start._replace(done=done))
    found = first_steps(windows, 10)
    assert [len(window.inputs) for window in found] == [6, 4]
    assert torch.equal(torch.cat([w.targets for w in found]), torch.cat([w.targets for w in windows])[:10])
    assert [window.start.done is None for window in found] == [True, False]
    assert not first_steps(windows, 0)


@pytest.mark.parametrize("core", [diagonal.Diagonal, mingru.MinGRU])
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("resets", [False, True])
def test_a_trace_carries_what_it_left_out(core, steps, resets, generator):
    """An exact trace makes full BPTT of it, however far it sees."""
    problem = reference.random_problem("gru", generator, window=2, resets=resets, unscored=True)
    windows = library(problem)
    torch.manual_seed(0)
    model = SequenceModel(5, 5, 3, RecurrentCore(core(3, 4))).double()
    found = []
    for estimator in (FullBPTT(), LookaheadBPTT(steps, trace=20), LookaheadBPTT(steps)):
        each = copy.deepcopy(model)
        state = each.initial_state(3)
        estimator.begin(each, 3)
        for update in [windows] if isinstance(estimator, FullBPTT) else [windows[:3], windows[3:]]:
            ahead = [] if update[-1] is windows[-1] else [windows[3:]]
            state = estimator(each, update, state, WEIGHT, *ahead).state
        estimator.flush()
        found.append(gradients(each))
    full, traced, plain = found
    close(traced, full, rtol=1e-10)
    assert distance(plain, full) > 1e-3


def test_a_penalty_is_added_at_the_end_of_each_window(generator):
    """As in truncated BPTT; what it measures is the gradient that arrives, from the steps ahead too."""
    problem = reference.random_problem("lstm", generator)
    problem = problem._replace(state=tuple(8.0 * leaf for leaf in problem.state))
    windows, state = library(problem), as_message(problem)
    size, found = 0.3, []
    for steps, strength in ((0, 0.0), (0, 2.0), (5, 0.0), (5, 2.0)):
        penalty, model = StatePenalty(strength), build(problem)
        penalty.mean_square.fill_(size**2)
        LookaheadBPTT(steps, penalty)(model, windows[:1], state, WEIGHT, *([windows[1:]] if steps else []))
        found.append(net_gradients(model))
        assert penalty.count == 1
    plain, with_it, ahead, both = found
    of_penalty = {name: with_it[name] - plain[name] for name in plain}
    assert distance(with_it, plain) > 1e-3
    close(both, reference.add(ahead, of_penalty))


# In training.

SMALL: dict[str, Any] = {"hidden": 6, "embedding": 4, "batch_size": 4, "bptt": 3, "lr": 0.02, "clip": 0.0}
TASKS: dict[str, Callable[[Any], Any]] = {
    "text": lambda folder: Text(path=make_text(folder / "words.txt", 200)),
    "recall": lambda _: Recall(delay=3),
    "copy": lambda _: Copy(symbols=2),
    "growing": lambda _: Recall(grow=True),
}
every_task = pytest.mark.parametrize("name", TASKS)


def learner(task: Any, **settings: Any) -> RecurrentLearner:
    return RecurrentLearner(RecurrentConfig(**{**SMALL, **settings}), task.load(None), CPU)


def seen(trained: RecurrentLearner, updates: int) -> list[tuple[list[Window], list[Window], int | None]]:
    """The windows of some updates, what lies ahead of them, and the level."""
    found, windows = [], trained._windows

    def watched() -> tuple[list[Window], list[Window]]:
        level = trained.level
        found.append((*windows(), level))
        return found[-1][:2]

    trained._windows = watched
    for _ in range(updates):
        trained.update()
    del trained._windows
    return found


@every_task
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "random_truncation": 0.5}], ids=["plain", "drawn"])
def test_it_reads_what_truncated_bptt_reads_and_sees_what_comes_then(name, options, tmp_path):
    """Of a task that grows too: where the level rises, what was fetched ahead comes anew."""
    task, steps = TASKS[name](tmp_path), 7
    plain, looking = learner(task, **options), learner(task, lookahead=steps, **options)
    if name in ("growing", "copy"):
        for each in (plain, looking):
            curriculum = each.stream.curriculum
            assert curriculum is not None
            curriculum.limit = 100.0  # all is good enough
    wanted, got = seen(plain, 90), seen(looking, 90)
    for (ours, ahead, level), (theirs, _, its) in zip(got, wanted, strict=True):
        assert level == its
        assert sum(len(w.inputs) for w in ahead) == steps
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine.inputs, other.inputs)
            assert torch.equal(mine.targets, other.targets)
            for a, b in zip((mine.start, mine.end), (other.start, other.end), strict=True):
                assert (a.done is None) == (b.done is None)
                assert a.done is None or b.done is None or torch.equal(a.done, b.done)
    if name in ("growing", "copy"):
        levels = [level or 0 for *_, level in got]
        assert levels[-1] > levels[0]
    levels = [level for *_, level in got]
    for number, (_, ahead, level) in enumerate(got[:-10]):
        following = [w for windows, *_ in got[number + 1 : number + 11] for w in windows]
        if levels[number + 10] != level:
            continue
        for mine, other in zip(ahead, first_steps(following, steps), strict=True):
            assert torch.equal(mine.inputs, other.inputs)
            assert torch.equal(mine.targets, other.targets)
            assert (mine.start.done is None) == (other.start.done is None)


def everything(trained: RecurrentLearner) -> tuple[dict[str, Tensor], Any]:
    tensors, values = trained.state_dict()
    return {name: t.clone() for name, t in tensors.items()}, json.loads(json.dumps(values))


@every_task
@pytest.mark.parametrize(
    "options",
    [{}, {"trace": 8, "restore": 0.5}, {"accumulate": 2, "random_truncation": 0.5, "trace": 8}],
    ids=["plain", "trace", "drawn"],
)
def test_it_goes_on_bit_for_bit(name, options, tmp_path):
    """Saving changes nothing, and what was saved goes on as what was not stopped."""
    task = TASKS[name](tmp_path)
    one, saved, resumed = (learner(task, lookahead=7, **options) for _ in range(3))
    for _ in range(20):
        one.update()
        saved.update()
    for _ in range(2):
        resumed.update()
    resumed.load_state_dict(*everything(saved))
    for _ in range(20):
        for each in (one, saved, resumed):
            each.update()
    (wanted, there), *others = (everything(each) for each in (one, saved, resumed))
    assert ("memory.sent.0" in wanted) == ("trace" in options)
    for got, values in others:
        assert values == there
        assert got.keys() == wanted.keys()
        for key in wanted.keys() - {"random.cpu"}:
            assert torch.equal(got[key], wanted[key]), key


def test_an_update_can_be_recorded(tmp_path):
    """Everything that goes from update to update stays in its place."""
    task = TASKS["text"](tmp_path)
    one, other = (learner(task, lookahead=7, trace=8, restore=0.5) for _ in range(2))
    calls: list[Any] = []

    def record(work: Callable[[], object]) -> Callable[[], object]:
        calls.append(work)
        return work

    other._run = Recorded(other._work, record)
    for _ in range(15):
        one.update()
        other.update()
        assert other.estimator._sent is not None
    assert calls
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_command(tmp_path):
    """In one go and in two."""
    path = make_text(tmp_path / "words.txt", 3000)
    words = ["train", "text", str(path), "--hidden", "6", "--embedding", "4", "--batch-size", "4", "--bptt"]
    words += ["3", "--threads", "1", "--lookahead", "8", "--trace", "8", "--eval-every", "1000000"]
    ends = []
    for name, lengths in (("one", [12]), ("two", [5, 12])):
        for number, steps in enumerate(lengths):
            run = ["--steps", str(steps), "--out", str(tmp_path / name), *["--resume"] * (number > 0)]
            assert main([*words, *run]) == 0
        ends.append(load_checkpoint(tmp_path / name / "checkpoint.safetensors")[0])
    assert ends[0].keys() == ends[1].keys()
    for key in ends[0]:
        assert torch.equal(ends[0][key], ends[1][key]), key
    assert json.loads((tmp_path / "one" / "summary.json").read_text())["method"] == "bptt+lookahead:8+trace"


@pytest.mark.parametrize(
    ("words", "method"),
    [
        (["--lookahead", "8"], "bptt+lookahead:8"),
        (["--lookahead", "8", "--restore", "0.1"], "bptt+lookahead:8+restore"),
        (["--lookahead", "3", "--restore", "0.1", "--trace", "8"], "bptt+lookahead:3+restore+trace"),
        (["--estimator", "lookahead,steps=8"], "lookahead,steps=8"),
        (["--lookahead", "0"], "bptt"),
    ],
)
def test_what_it_is_called(words, method, tmp_path):
    _, task, config = parse_train(["recall", *words])
    assert isinstance(task, Recall)
    assert config.method == method
    estimator = learner(task, lookahead=config.lookahead, estimator=config.estimator).estimator
    assert isinstance(estimator, TruncatedBPTT)
    assert estimator.lookahead == (8 if "8" in method else 3 if "3" in method else 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recall", "--lookahead", "-1"], "--lookahead must not be negative"),
        (["recall", "--lookahead", "8", "--dni"], "leave out --dni or --lookahead"),
        (["recall", "--lookahead", "8", "--estimator", "full"], "leave out --estimator or --lookahead"),
        (["recall", "--estimator", "lookahead"], "missing a required argument: 'steps'"),
        (["live", "--lookahead", "8"], "which a stream does not have"),
        (["live", "--estimator", "lookahead,steps=8"], "which a stream does not have"),
    ],
)
def test_what_cannot_work(words, message, tmp_path, capsys):
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="negative"):
        LookaheadBPTT(-1)
