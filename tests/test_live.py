"""Live streams: against slow indexing, through real pipes, stopped, resumed and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dni_rnn.cli import main, parse_train
from dni_rnn.errors import UsageError
from dni_rnn_tasks import live_learner
from dni_rnn_tasks.live import Live
from dni_rnn_tasks.live_learner import READ_BYTES, LiveStream, StandardInput, ThreadedInput

SMALL = [
    "live", "--hidden", "8", "--embedding", "4", "--batch-size", "4", "--stretch", "16", "--bptt", "5",
    "--log-every", "5", "--eval-every", "400", "--threads", "1", "--dni",
]  # fmt: skip
TEXT = ("the cat sat on a mat and saw no dog but an owl; " * 60).encode()


class Pieces:
    """A source that gives a text piece by piece."""

    def __init__(self, text: np.ndarray, pieces: list[int]) -> None:
        self.text, self.pieces = text, list(pieces)

    def read(self, seconds: float) -> np.ndarray | None:
        if not len(self.text):
            return None
        size = self.pieces.pop(0) if self.pieces else len(self.text)
        piece, self.text = self.text[:size], self.text[size:]
        return piece


def numbers(length: int) -> np.ndarray:
    return np.arange(length) % 251


def rows_of(text: np.ndarray, rows: int, stretch: int) -> list[list[int]]:
    """The inputs of each row, symbol by symbol; the last stretch is a short one."""
    found: list[list[int]] = [[] for _ in range(rows)]
    left = [int(s) for s in text[:-1]]
    while len(left) >= rows:
        length = min(stretch, len(left) // rows)
        for row in found:
            row += left[:length]
            left = left[length:]
    return found


def read_all(stream: LiveStream, steps: int, context: int) -> list:
    windows = []
    while not stream.ended:
        if stream.ready(steps, context, 0.0):
            windows.append(stream.window(steps, context))
    return windows


@given(
    length=st.integers(0, 200),
    rows=st.integers(1, 4),
    stretch=st.integers(1, 20),
    steps=st.integers(1, 7),
    context=st.integers(0, 9),
    pieces=st.lists(st.integers(0, 30), max_size=8),
)
def test_every_symbol_once_each_with_its_successor_and_what_comes(
    length, rows, stretch, steps, context, pieces
):
    text = numbers(length)
    windows = read_all(LiveStream(Pieces(text, pieces), rows, stretch), steps, context)
    expected = rows_of(text, rows, length if rows == 1 else stretch)
    total = len(expected[0])
    assert sum(len(w.inputs) for w in windows) == total
    assert all(len(w.inputs) == steps for w in windows[:-1])
    at = 0
    for window in windows:
        for place in (at, at + len(window.inputs)):
            boundary = window.start if place == at else window.end
            assert (boundary.done is not None) == (place == total)
            if context:
                told = [(row + [-1] * context)[place : place + context] for row in expected]
                assert boundary.context is not None
                assert boundary.context.t().tolist() == told
        assert window.inputs.t().tolist() == [row[at : at + len(window.inputs)] for row in expected]
        assert torch.equal(window.targets, (window.inputs + 1) % 251)
        at += len(window.inputs)


def test_a_window_waits_until_what_follows_it_has_come_and_no_longer():
    stream = LiveStream(Pieces(numbers(100), [8, 1, 1]), 1, 1)
    assert not stream.ready(4, 4, 0.0)  # symbols 0 to 7: the boundary after input 3 is told 4 to 7, whose
    assert stream.ready(4, 4, 0.0)  # successors are not all known: 8 has to come
    assert len(stream.window(4, 4).inputs) == 4


def test_what_was_read_and_not_learnt_is_in_the_state():
    text = numbers(150)
    whole = read_all(LiveStream(Pieces(text, []), 3, 8), 5, 4)
    source = Pieces(text, [70])
    first = LiveStream(source, 3, 8)
    assert first.ready(5, 4, 0.0)
    windows = [first.window(5, 4)]
    second = LiveStream(Pieces(source.text, []), 3, 8)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    windows += read_all(second, 5, 4)
    assert len(windows) == len(whole)
    for ours, theirs in zip(windows, whole, strict=True):
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.targets, theirs.targets)


def test_memory_does_not_grow_with_the_stream():
    stream = LiveStream(Pieces(numbers(100_000), [64] * 1600), 2, 16)
    held = 0
    while not stream.ended:
        if stream.ready(5, 8, 0.0):
            stream.window(5, 8)
            held = max(held, stream._dealt.numel() + len(stream._coming))
    assert held < 400


@pytest.mark.parametrize("kind", [StandardInput, ThreadedInput])
def test_a_pipe_gives_what_was_written_and_ends(kind):
    read, write = os.pipe()
    source = kind(read)
    nothing = source.read(0.0)
    assert nothing is not None
    assert not len(nothing)
    os.write(write, b"abc")
    come = source.read(1.0)
    assert come is not None
    assert come.tobytes() == b"abc"
    os.close(write)
    assert source.read(1.0) is None
    os.close(read)
    with pytest.raises(UsageError, match="pipe a stream into it"):
        source.read(5.0)


def test_a_thread_takes_no_more_from_a_pipe_than_was_asked_for():
    read, write = os.pipe()
    source = ThreadedInput(read)
    os.write(write, b"a" * READ_BYTES)
    os.set_blocking(write, False)
    come = source.read(10.0)
    assert come is not None
    assert len(come) == READ_BYTES
    os.write(write, b"b" * 10)
    time.sleep(0.2)  # time enough for a thread that reads on
    assert os.read(read, 10) == b"b" * 10
    os.close(write)
    assert source.read(10.0) is None
    os.close(read)


def test_a_run_reads_through_a_thread_as_through_select(tmp_path, piped, monkeypatch):
    for name, kind in (("select", StandardInput), ("thread", ThreadedInput)):
        piped(TEXT)
        monkeypatch.setattr(live_learner, "standard_input", kind)
        assert main(["train", *SMALL, "--out", str(tmp_path / name)]) == 0
    assert rows_of_metrics(tmp_path / "thread") == rows_of_metrics(tmp_path / "select")


def command(out: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "dni_rnn", "train", *SMALL, "--out", str(out), *words]


@pytest.fixture
def piped(tmp_path):
    """Puts bytes on this process's standard input."""
    before = os.dup(0)

    def put(data: bytes) -> None:
        (tmp_path / "input").write_bytes(data)
        with open(tmp_path / "input", "rb") as file:
            os.dup2(file.fileno(), 0)

    yield put
    os.dup2(before, 0)
    os.close(before)


def rows_of_metrics(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "symbols_per_second")} for row in rows]


def test_the_score_is_that_of_each_symbol_before_it_is_learnt(tmp_path, piped, capsys):
    piped(TEXT)
    assert main(["train", *SMALL, "--out", str(tmp_path / "a")]) == 0
    rows, summary = (
        rows_of_metrics(tmp_path / "a"),
        json.loads((tmp_path / "a" / "summary.json").read_text()),
    )
    training = [(row["symbols"], row["bpc"]) for row in rows if "bpc" in row]
    before, bits = 0, 0.0
    for symbols, bpc in training:
        bits += (symbols - before) * bpc
        before = symbols
    assert before == summary["symbols"] == (len(TEXT) - 1) // 4 * 4
    assert summary["test_bpc"] == pytest.approx(bits / before, rel=1e-5)
    assert summary["method"] == "dni+next-tokens:8+lag"
    looks = [(row["symbols"], row["valid_bpc"]) for row in rows if "valid_bpc" in row]
    lengths = np.diff([0, *(symbols for symbols, _ in looks)])
    assert np.average([bpc for _, bpc in looks], weights=lengths) == pytest.approx(
        summary["test_bpc"], rel=1e-5
    )
    # The weights that are kept are the last ones, whether or not the last stretch was the easiest.
    assert summary["best_symbols"] == summary["symbols"]
    assert main(["eval", str(tmp_path / "a")]) == 2
    assert "no held-out part" in capsys.readouterr().err


def test_stopped_while_it_waits_and_resumed_it_learns_as_if_never_stopped(tmp_path):
    subprocess.run(command(tmp_path / "whole"), input=TEXT, check=True, capture_output=True)
    out = tmp_path / "parts"
    process = subprocess.Popen(
        command(out), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin
    process.stdin.write(TEXT[:1501])
    process.stdin.flush()
    deadline = time.monotonic() + 120
    while (
        "valid_bpc" not in (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else True
    ):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)  # now, or a little later, it waits for more
    process.send_signal(signal.SIGINT)  # the pipe stays open: a blocking read would go on
    assert process.wait(timeout=120) == 130  # before the pipe is closed, which would end the stream
    process.communicate()
    subprocess.run(command(out, "--resume"), input=TEXT[1501:], check=True, capture_output=True)
    assert [r for r in rows_of_metrics(out) if "bpc" in r] == [
        r for r in rows_of_metrics(tmp_path / "whole") if "bpc" in r
    ]


def test_an_endless_stream_ends_with_the_budget(tmp_path):
    with subprocess.Popen(["yes", "on and on"], stdout=subprocess.PIPE) as endless:
        words = command(tmp_path / "a", "--chars", "2000")
        subprocess.run(words, stdin=endless.stdout, check=True, capture_output=True, timeout=120)
        endless.kill()
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["symbols"] == 2000


def test_minutes_end_a_stream_from_which_nothing_comes_any_more(tmp_path):
    """It ends as every run does, though the pipe stays open."""
    before, (read, write) = os.dup(0), os.pipe()
    os.dup2(read, 0)
    try:
        os.write(write, TEXT[:1501])
        assert main(["train", *SMALL, "--minutes", "0.02", "--out", str(tmp_path / "a")]) == 0
    finally:
        os.dup2(before, 0)
        for descriptor in (before, read, write):
            os.close(descriptor)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert 1.2 <= summary["seconds"] < 15.0
    last = rows_of_metrics(tmp_path / "a")[-1]
    assert last["valid_bpc"] == summary["valid_bpc"]
    assert last["symbols"] == summary["symbols"] > 400


def test_too_little_to_learn_from_is_an_error_of_one_line(tmp_path, piped, capsys):
    piped(b"abc")
    assert main(["train", *SMALL, "--out", str(tmp_path / "a")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("dni-rnn: the stream ended before")


@pytest.mark.parametrize(
    ("words", "method", "window"),
    [
        (["--dni"], "dni+next-tokens:8+lag", 8),
        (["--dni", "--lag", "3"], "dni+next-tokens:3+lag", 3),
        (["--dni", "--lag", "0"], "dni-online", 0),
        (["--dni", "--context", "next-tokens:5"], "dni+next-tokens:5+lag", 5),
        (["--dni", "--context", "next-tokens:5", "--lag", "5"], "dni+next-tokens:5+lag", 5),
        (["--dni", "--context", "none"], "dni-online", 0),
        ([], "bptt", 8),
        (["--restore", "0.1"], "bptt+restore", 8),
    ],
)
def test_the_lag_is_what_the_synthesizer_is_conditioned_on(words, method, window):
    _, task, config = parse_train(["live", *words])
    assert isinstance(task, Live)
    assert config.method == method
    assert config.context_window == window
    assert config.lag == (window if "--dni" in words else None)
    assert config.resolved == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lag", "3"], "add --dni"),
        (["--anneal"], "--anneal must know the end of a stream: add --chars or --steps"),
        (["--dni", "--lag", "-1"], "must not be negative"),
        (["--dni", "--lag", "3", "--context", "next-tokens:5"], "disagree"),
        (["--stretch", "0"], "must be positive"),
    ],
)
def test_lags_that_make_no_sense(words, message, capsys):
    assert main(["train", "live", *words]) == 2
    assert message in capsys.readouterr().err


def test_readings_of_the_memory(tmp_path):
    """`benchmarks/live_memory.py` in small."""
    script = Path(__file__).parents[1] / "benchmarks" / "live_memory.py"
    words = [sys.executable, str(script), "--out", str(tmp_path), "--minutes", "0.1", "--rate", "400"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    readings = [json.loads(line) for line in (tmp_path / "readings.jsonl").read_text().splitlines()]
    assert len(readings) > 3
    assert all(50 < reading["mb"] < 5000 for reading in readings)
    assert "| minutes | bytes learnt | MB, mean |" in (tmp_path / "table.md").read_text()
