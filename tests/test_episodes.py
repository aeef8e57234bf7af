"""Episodes, curricula, and the tasks that grow, against slow rows of Python lists."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dni_rnn.config import RecurrentConfig
from dni_rnn.data.curriculum import Curriculum
from dni_rnn.data.generated import EpisodeStream, Segment
from dni_rnn.training.recurrent import RecurrentLearner, evaluate
from dni_rnn.window import UNSCORED, Window
from dni_rnn_tasks.recall import Recall
from dni_rnn_tasks.repeat import Copy, EpisodeData, RepeatCopy

IDLE = 99


def counted(batch_size: int, seed: int = 0) -> EpisodeStream:
    """Episodes of 3 + level steps whose inputs count from the episode's number · 100; odd ones are scored."""
    made = [0]

    def generate(random: np.random.Generator, count: int, level: int) -> Segment:
        numbers = np.arange(made[0], made[0] + count)
        made[0] += count
        inputs = numbers * 100 + np.arange(3 + level)[:, None] + 1000
        return Segment(inputs, np.where(inputs % 2, inputs, UNSCORED), np.arange(3 + level) // 2)

    return EpisodeStream(generate, batch_size, 1000, idle=IDLE, seed=[seed])


@given(rows=st.integers(1, 4), steps=st.integers(1, 9), context=st.integers(0, 6), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_a_row_is_whole_episodes_one_after_the_other_each_begun_with_a_window(rows, steps, context, seed):
    stream = counted(rows, seed)
    windows = [stream.window(steps, context) for _ in range(30)]
    assert windows[0].start.done is not None
    assert windows[0].start.done.all()
    for before, after in pairwise(windows):
        assert before.end is after.start
    for row in range(rows):
        episodes: list[list[int]] = []
        for window in windows:
            if starts(window, row):
                episodes.append([])
            episodes[-1] += window.inputs[:, row].tolist()
            scored = window.inputs[:, row] % 2 == 1
            scored &= window.inputs[:, row] != IDLE
            assert torch.equal(window.targets[:, row] != UNSCORED, scored)
            assert torch.equal(window.targets[scored, row], window.inputs[scored, row])
        assert set(episodes[0]) == {IDLE}  # waits for its turn
        assert len(episodes) > 2
        for episode in episodes[1:-1]:
            first = episode[0]
            assert first % 100 == 0
            assert episode[:3] == [first, first + 1, first + 2]
            assert set(episode[3:]) <= {IDLE}
            assert len(episode) < 3 + steps  # done at the end of the window it ends in
    for window in windows:
        assert window.scored == int((window.targets != UNSCORED).sum())


def starts(window: Window, row: int) -> bool:
    return window.start.done is not None and bool(window.start.done[row])


@pytest.mark.parametrize("task", [Copy(), RepeatCopy()])
@given(steps=st.integers(1, 5), context=st.integers(1, 30), level=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_the_context_is_what_has_been_read_and_will_be_asked(task, steps, context, level):
    """Against a search in the whole episode, by the rules of the task."""
    data = task.load(None)
    stream = data.stream("train", 3, 0)
    stream.curriculum.level = level
    (n, r), repeats = data.shape(level), data.repeats
    begins = n + 1 + repeats
    windows = [stream.window(steps, context) for _ in range(4 * data.length(level) // steps + 8)]
    for row in range(3):
        starts_at = [number for number, w in enumerate(windows) if starts(w, row)]
        assert len(starts_at) > 2
        for first, after in pairwise(starts_at[1:]):  # the first one idles
            word = torch.cat([w.inputs[:, row] for w in windows[first:after]])[:n].tolist()
            for number in range(first, after):
                position = steps * (number - first)
                asked = {}  # step -> (input that decides it, target)
                for turn in range(r):
                    asked |= {begins + turn * n + k: (k, word[k]) for k in range(n)}
                asked[begins + n * r] = (n + repeats, data.distinct)
                wanted = [-1] * context
                for step in sorted(asked, reverse=True):
                    read, target = asked[step]
                    if read < position <= step:
                        wanted[read % context] = target
                known = windows[number].start.context
                assert known is not None
                assert known[:, row].tolist() == wanted


def test_episodes_go_on_where_another_stood():
    data = RepeatCopy().load(None)
    stream, other = data.stream("train", 5, 0), data.stream("train", 5, 7)
    assert stream.curriculum is not None
    stream.curriculum.level = 5
    for _ in range(9):
        stream.window(4, 6)
    saved = json.loads(json.dumps(stream.state_dict()))
    wanted = [stream.window(4, 6) for _ in range(12)]
    other.window(3, 2)
    other.load_state_dict(saved)
    for window in wanted:
        found = other.window(4, 6)
        assert torch.equal(found.inputs, window.inputs)
        assert torch.equal(found.targets, window.targets)
        for a, b in zip([*found.start, *found.end], [*window.start, *window.end], strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)


def feed(curriculum: Curriculum, bits: float, steps: int) -> int:
    """One step at a time, one scored symbol each; how many until the level rises."""
    level = curriculum.level
    for count in range(1, steps + 1):
        curriculum.note(torch.tensor(bits * math.log(2.0)), 1, 1)
        if curriculum.level != level:
            return count
    return 0


def test_a_level_rises_by_one_after_a_period_left_out_and_one_under_the_limit():
    curriculum = Curriculum(3, 0.5, lambda level: 10 * level)
    assert feed(curriculum, 0.51, 1000) == 0
    assert feed(Curriculum(3, 0.5, lambda level: 10 * level), 0.49, 1000) == 60
    climbed = Curriculum(3, 0.5, lambda level: 10 * level)
    assert feed(climbed, 0.49, 1000) == 60
    assert climbed.level == 4
    assert feed(climbed, 0.49, 1000) == 80


def test_a_curriculum_averages_and_survives_json():
    curriculum = Curriculum(1, 0.5, lambda level: 10)
    for _ in range(10):
        curriculum.note(torch.tensor(100.0), 1, 1)  # left out
    for bits in [0.8] * 5 + [0.1] * 4:
        curriculum.note(torch.tensor(bits * math.log(2.0)), 1, 1)
    other = Curriculum(7, 0.5, lambda level: 10)
    other.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    for each in (curriculum, other):
        each.note(torch.tensor(0.1 * math.log(2.0)), 1, 1)
        assert each.level == 2


def test_nothing_scored_is_nothing_learnt():
    curriculum = Curriculum(1, 0.5, lambda level: 5)
    for _ in range(100):
        curriculum.note(torch.tensor(0.0), 0, 1)
    assert curriculum.level == 1


def episode(data: EpisodeData, level: int) -> tuple[list[int], list[int]]:
    """One whole episode of a level, without the idling around it."""
    stream = data.stream("train", 1, 0)
    assert stream.curriculum is not None
    stream.curriculum.level = level
    stream.window(1000, 0)  # waiting
    window = stream.window(1000, 0)
    assert len(window.inputs) == data.length(level)
    return window.inputs[:, 0].tolist(), window.targets[:, 0].tolist()


def test_copy():
    inputs, targets = episode(Copy(symbols=5).load(None), 4)
    stop, blank = 5, 6
    assert inputs[4:] == [stop] + [blank] * 5
    assert max(inputs[:4]) < 5
    assert targets == [UNSCORED] * 5 + inputs[:4] + [stop]


@pytest.mark.parametrize(("level", "n", "r"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (4, 3, 2), (15, 8, 8)])
def test_repeat_copy(level, n, r):
    data = RepeatCopy(symbols=5).load(None)
    inputs, targets = episode(data, level)
    stop, blank = 5, 6
    assert inputs[n : n + 2] == [stop, blank + r]
    assert inputs[n + 2 :] == [blank] * (n * r + 1)
    assert targets == [UNSCORED] * (n + 2) + inputs[:n] * r + [stop]
    assert data.score(level) == n * r + 3


def test_recall_grows():
    stream = Recall(grow=True, symbols=9).load(None).stream("train", 2, 0)
    assert stream.curriculum is not None
    seen: list[list[int]] = []
    for delay in (2, 3, 7):
        stream.curriculum.level = delay
        for _ in range(50):
            window = stream.window(23, 5)
            seen += window.inputs.tolist()
            recalled = [seen[t - delay] for t in range(len(seen) - 23, len(seen)) if t >= delay]
            assert window.targets.tolist()[-len(recalled) :] == recalled


CONFIG = RecurrentConfig(hidden=8, embedding=4, bptt=2, batch_size=4, lr=0.01)


def test_the_loop_tells_the_curriculum_what_was_learnt(monkeypatch):
    learner = RecurrentLearner(CONFIG, Copy().load(None), torch.device("cpu"))
    curriculum = learner.stream.curriculum
    assert curriculum is not None
    noted: list[tuple[float, int, int]] = []
    monkeypatch.setattr(
        curriculum, "note", lambda loss, scored, steps: noted.append((float(loss), scored, steps))
    )
    for _ in range(5):
        learner.update()
    assert sum(loss for loss, _, _ in noted) == pytest.approx(float(learner.record.averages["loss"]))
    assert sum(scored for _, scored, _ in noted) == learner.counters.scored > 0
    assert sum(steps for _, _, steps in noted) * 4 == learner.counters.symbols
    assert learner.metrics()["level"] == 1


def test_a_level_is_evaluated_on_its_own():
    """The sum of target counts tells which level was read: N symbols and a stop of every episode."""
    data, model = Copy().load(None), RecurrentLearner(CONFIG, Copy().load(None), torch.device("cpu")).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        # Says "stop" with probability 1/2: an episode of level N costs N log2(16) + 1 bits.
        model.readout.bias[-1] = math.log(8.0)
    for level in (1, 5):
        bits = evaluate(model, data, "valid", torch.device("cpu"), level)
        assert bits == pytest.approx((4 * level + 1) / (level + 1), rel=0.01)
