"""Streams, against slow indexing of the text they were made from."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dni_rnn.data.curriculum import Curriculum
from dni_rnn.data.generated import GeneratedStream, Segment
from dni_rnn.data.streams import TokenStream
from dni_rnn.errors import UsageError
from dni_rnn.window import UNSCORED, Boundary, Window


def text(length: int, seed: int = 0) -> np.ndarray:
    """No symbol twice within 251 places, so that an index that is off by any little shows."""
    return ((np.arange(length) + seed) % 251).astype(np.uint8)


def rows_of(tokens: np.ndarray, rows: int) -> list[list[int]]:
    """The pieces, each with the one symbol after it that is its last target."""
    length = (len(tokens) - 1) // rows
    return [[int(s) for s in tokens[row * length : (row + 1) * length + 1]] for row in range(rows)]


def assert_same(a: Boundary, b: Boundary) -> None:
    for one, other in zip(a, b, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one, other)


def assert_same_window(a: Window, b: Window) -> None:
    assert torch.equal(a.inputs, b.inputs)
    assert torch.equal(a.targets, b.targets)
    assert a.scored == b.scored
    assert_same(a.start, b.start)
    assert_same(a.end, b.end)


def check_boundary(boundary: Boundary, pieces: list[list[int]], position: int, context: int) -> None:
    """`position` counts inputs; at 0 and at the end, the pieces begin anew and nothing more is known."""
    length = len(pieces[0]) - 1
    turn = position in (0, length)
    if turn:
        assert boundary.done is not None
        assert boundary.done.dtype == torch.bool
        assert boundary.done.tolist() == [True] * len(pieces)
    else:
        assert boundary.done is None
    if context == 0:
        assert boundary.context is None
        return
    assert boundary.context is not None
    assert boundary.context.shape == (context, len(pieces))
    for ahead in range(context):
        known = not turn and position + ahead <= length
        wanted = [piece[position + ahead] if known else -1 for piece in pieces]
        assert boundary.context[ahead].tolist() == wanted


@given(
    length=st.integers(2, 80),
    rows=st.integers(1, 7),
    steps=st.integers(1, 20),
    context=st.integers(0, 25),
    seed=st.integers(0, 250),
)
def test_windows_are_slices_of_the_text(length, rows, steps, context, seed):
    tokens = text(length, seed)
    if (length - 1) // rows < 1:
        with pytest.raises(UsageError):
            TokenStream(tokens, rows)
        return
    stream, pieces = TokenStream(tokens, rows), rows_of(tokens, rows)
    piece_length = len(pieces[0]) - 1
    assert stream.size == piece_length * rows
    assert stream.batch_size == rows
    position, before = 0, None
    for _ in range(3 * -(-piece_length // steps)):  # three passes
        window = stream.window(steps, context)
        taken = min(steps, piece_length - position)
        assert window.inputs.shape == window.targets.shape == (taken, rows)
        assert window.scored == taken * rows
        for row, piece in enumerate(pieces):
            assert window.inputs[:, row].tolist() == piece[position : position + taken]
            assert window.targets[:, row].tolist() == piece[position + 1 : position + taken + 1]
        check_boundary(window.start, pieces, position, context)
        check_boundary(window.end, pieces, position + taken, context)
        if before is not None:
            assert_same(before, window.start)
        before = window.end
        position = (position + taken) % piece_length


@pytest.mark.parametrize("steps", [1, 4, 5, 19, 100])
def test_a_pass_covers_the_text_once(steps):
    """61 symbols, 3 rows: 20 steps; the 60 targets are symbols 1 to 60, each once."""
    stream = TokenStream(text(61), 3)
    inputs, targets, seen = [], [], 0
    while seen < stream.size:
        window = stream.window(steps, 0)
        inputs.append(window.inputs)
        targets.append(window.targets)
        seen += window.scored
    assert seen == 60
    assert torch.cat(inputs).T.flatten().tolist() == list(range(60))
    assert torch.cat(targets).T.flatten().tolist() == list(range(1, 61))


def test_what_does_not_fill_all_rows_is_left_out():
    for length in (61, 62, 63):
        assert TokenStream(text(length), 3).size == 60
    assert TokenStream(text(64), 3).size == 63


def test_the_context_begins_with_the_next_input_and_reaches_the_last_target():
    stream = TokenStream(text(11), 1)
    window = stream.window(7, 5)
    assert window.end.context is not None
    assert window.end.context[:, 0].tolist() == [7, 8, 9, 10, -1]
    assert window.end.done is None


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_symbols_come_as_indices_whatever_the_text_is_kept_in(dtype):
    window = TokenStream(text(20).astype(dtype), 2).window(4, 3)
    for tensor in (window.inputs, window.targets, window.end.context):
        assert tensor is not None
        assert tensor.dtype == torch.int64


def test_a_stream_goes_on_where_another_stood():
    stream, other = TokenStream(text(100), 4), TokenStream(text(100), 4)
    for _ in range(3):
        stream.window(5, 2)
    saved = json.loads(json.dumps(stream.state_dict()))
    wanted = [stream.window(5, 2) for _ in range(6)]  # over the end
    other.window(7, 0)
    other.load_state_dict(saved)
    for window in wanted:
        assert_same_window(other.window(5, 2), window)


def test_a_stream_of_one_step():
    stream = TokenStream(text(4), 3)
    window = stream.window(10, 2)
    assert window.inputs.tolist() == [[0, 1, 2]]
    assert window.targets.tolist() == [[1, 2, 3]]
    assert window.start.done is not None
    assert window.end.done is not None


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_text_that_is_too_short_is_refused(length):
    with pytest.raises(UsageError, match=f"a text of {length} symbols is too short for 3 rows"):
        TokenStream(text(length), 3)


def test_moving_keeps_the_place():
    stream = TokenStream(text(100), 4)
    stream.window(5, 2)
    assert stream.to(torch.device("cpu")) is stream
    assert stream.window(5, 2).inputs[0, 0] == 5


# Generated streams.


def generated(block: int, rows: int, seed: int = 0, curriculum: Curriculum | None = None) -> GeneratedStream:
    def generate(number: int, level: int) -> Segment:
        random = np.random.default_rng([seed, number, level])
        inputs, targets = random.integers(100, size=(2, block, rows))
        targets[random.random((block, rows)) < 0.3] = UNSCORED
        return Segment(inputs, targets, random.integers(0, 2 * block, block))

    return GeneratedStream(generate, rows, size=10 * block * rows, curriculum=curriculum)


@given(
    block=st.integers(1, 12),
    rows=st.integers(1, 4),
    steps=st.integers(1, 15),
    context=st.integers(0, 15),
    seed=st.integers(0, 1000),
)
def test_generated_windows_are_slices_of_the_blocks(block, rows, steps, context, seed):
    stream, source = generated(block, rows, seed), generated(block, rows, seed)
    count = 4 + 12 * steps // block
    inputs, targets, delay = (
        np.concatenate(parts)
        for parts in zip(*[source._generate(number, 0) for number in range(count)], strict=True)
    )
    before = None
    for position in range(0, 10 * steps, steps):
        window = stream.window(steps, context)
        assert window.inputs.tolist() == inputs[position : position + steps].tolist()
        assert window.targets.tolist() == targets[position : position + steps].tolist()
        assert window.scored == int((window.targets != UNSCORED).sum())
        for boundary, at in ((window.start, position), (window.end, position + steps)):
            assert boundary.done is None
            assert (boundary.context is None) == (context == 0)
            if boundary.context is not None:
                assert boundary.context.tolist() == told(targets, delay, at, context)
        if before is not None:
            assert_same(before, window.start)
        before = window.end


def told(targets: np.ndarray, delay: np.ndarray, at: int, context: int) -> list[list[int]]:
    """Place by place, with a search: the next target that the input so many steps back decides."""
    rows = []
    for input_step in range(at - 1, at - 1 - context, -1):
        decided = [step for step in range(at, len(delay)) if step - delay[step] == input_step]
        coming = targets[decided[0]] if decided else np.full(targets.shape[1], UNSCORED)
        rows.append(np.where(coming == UNSCORED, -1, coming).tolist())
    return rows


def test_a_generated_stream_goes_on_where_another_stood():
    stream, other = generated(7, 3), generated(7, 3)
    for _ in range(5):
        stream.window(4, 6)
    saved = json.loads(json.dumps(stream.state_dict()))
    wanted = [stream.window(4, 6) for _ in range(6)]
    other.window(4, 6)
    other.load_state_dict(saved)
    for window in wanted:
        assert_same_window(other.window(4, 6), window)


def test_a_generated_stream_can_be_asked_for_more_than_before():
    stream, source = generated(10, 2), generated(10, 2)
    inputs, targets, delay = (
        np.concatenate(parts) for parts in zip(*[source._generate(n, 0) for n in range(12)], strict=True)
    )
    position = 0
    for steps, context in ((2, 0), (30, 4), (1, 25), (3, 0)):
        window = stream.window(steps, context)
        assert window.inputs.tolist() == inputs[position : position + steps].tolist()
        position += steps
        assert (window.end.context is None) == (context == 0)
        if window.end.context is not None:
            assert window.end.context.tolist() == told(targets, delay, position, context)


# Each boundary is worked out once.


def counted(stream: GeneratedStream) -> list[int]:
    """The places of the boundaries that a stream works out from now on, in order."""
    places: list[int] = []
    inner = stream._boundary

    def boundary(at: int, context: int) -> Boundary:
        places.append(stream._held[0] * stream._block + at)
        return inner(at, context)

    stream._boundary = boundary  # type: ignore[method-assign]
    return places


def test_the_end_of_a_window_is_the_start_of_the_next():
    stream = generated(7, 3)
    places = counted(stream)
    windows = [stream.window(steps, 6) for steps in (4, 1, 9, 4, 4)]
    assert places == [0, 4, 5, 14, 18, 22]
    for before, after in pairwise(windows):
        assert before.end is after.start
        assert after.start.context is not None


def test_what_moves_a_stream_has_its_boundary_worked_out_anew():
    """Another context, another level, another place: then the end of the last window is not the start."""
    curriculum = Curriculum(1, 0.5, lambda level: 10)
    stream = generated(7, 3, curriculum=curriculum)
    places = counted(stream)

    def check(steps: int, context: int, wanted: list[int]) -> None:
        del places[:]
        window = stream.window(steps, context)
        assert places == wanted
        fresh = generated(7, 3, curriculum=curriculum)
        fresh.position = stream.position - steps
        assert_same_window(window, fresh.window(steps, context))

    check(4, 6, [0, 4])
    check(4, 6, [8])
    check(4, 2, [8, 12])
    curriculum.level = 2
    check(4, 2, [12, 16])
    check(4, 2, [20])
    place = stream.state_dict()
    check(4, 2, [24])
    stream.load_state_dict(place)
    check(4, 2, [20, 24])
    stream.to(torch.device("cpu"))
    check(4, 2, [24, 28])
