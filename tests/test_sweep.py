"""Sweeps: every cell and seed becomes one row, whatever happens on the way."""

import contextlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from random import Random
from types import SimpleNamespace

import pytest

from dni_rnn import sweep
from dni_rnn.checkpoint import load_checkpoint
from dni_rnn.cli import main
from dni_rnn.errors import UsageError
from dni_rnn.sweep import Cell, read_rows, read_sweep, run_sweep

WORDS = ("the", "cat", "sat", "on", "a", "mat")
SETTINGS = "--hidden 8 --embedding 4 --batch-size 4 --bptt 5 --log-every 10 --save-every 0 --threads 1"
NOISE = ("seconds", "symbols_per_second", "peak_memory_mb", "commit")


@pytest.fixture(autouse=True)
def short_polls(monkeypatch):
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.02)


def write_sweep(folder, train, seeds, cells):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"train = '{train}'",
        f"seeds = {seeds}",
        "[cells]",
        *(f"'{k}' = '{v}'" for k, v in cells.items()),
    ]
    (folder / "sweep.toml").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep of two cells and two seeds that was never interrupted: its folder and where it ran."""
    folder = tmp_path_factory.mktemp("sweep")
    random = Random(0)
    text = folder / "words.txt"
    text.write_text(" ".join(WORDS[int(random.random() * len(WORDS))] for _ in range(600)))
    write_sweep(
        folder / "grid",
        f"text {text} {SETTINGS} --steps 240 --eval-every 1600",
        [0, 1],
        {"bptt T=5": "", "dni T=5": "--dni --context next-tokens:2"},
    )
    assert main(["sweep", str(folder / "grid"), "--work", str(folder / "work")]) == 0
    return folder / "grid", folder / "work"


def comparable(row):
    """A row without what a clock or a machine decides."""
    curve = [{k: v for k, v in point.items() if k != "seconds"} for point in row["curve"]]
    config = {k: v for k, v in row["config"].items() if k not in ("out", "resume")}
    return {k: v for k, v in row.items() if k not in NOISE} | {"curve": curve, "config": config}


def wait_for(condition, process, log):
    give_up = time.monotonic() + 300
    while not condition():
        if process.poll() is not None or time.monotonic() > give_up:
            process.kill()
            pytest.fail(f"it never came so far: {log.read_text()}")
        time.sleep(0.005)


def last_step(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


# A whole sweep


def test_every_cell_and_seed_has_a_whole_row(finished):
    folder, work = finished
    rows = read_rows(folder)
    # All cells of one seed before the next: a sweep that is stopped early has comparable rows.
    assert [(row["cell"], row["seed"]) for row in rows] == [
        ("bptt T=5", 0), ("dni T=5", 0), ("bptt T=5", 1), ("dni T=5", 1),
    ]  # fmt: skip
    assert sorted(p.name for p in work.iterdir() if p.is_dir()) == ["grid"]
    for row in rows:
        run = work / "grid" / f"{row['cell'].replace(' ', '-').replace('=', '-')}-seed{row['seed']}"
        summary = json.loads((run / "summary.json").read_text())
        assert {name: row[name] for name in summary} == summary
        assert row["method"] == ("bptt" if row["cell"] == "bptt T=5" else "dni+next-tokens:2")
        assert row["config"]["seed"] == row["seed"]
        assert row["config"]["bptt"] == 5
        assert row["config"]["task_options"]["valid_fraction"] == 0.05
        written = json.loads((run / "config.json").read_text())
        for name in ("versions", "python", "commit", "device", "threads"):
            assert row[name] == written[name]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curve = [(p["symbols"], p["seconds"], round(p["valid_bpc"], 5)) for p in lines if "valid_bpc" in p]
        assert [tuple(point.values()) for point in row["curve"]] == curve
        assert len(curve) >= 3
    assert len({row["test_bpc"] for row in rows}) == 4


def test_the_command_of_a_row_gives_the_row_again(finished, tmp_path, monkeypatch):
    row = read_rows(finished[0])[1]
    program, *words = shlex.split(row["command"])
    assert program == "dni-rnn"
    assert main([*words, "--out", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["test_bpc"] == row["test_bpc"]


def test_a_finished_sweep_runs_nothing(finished, monkeypatch, capsys):
    folder, work = finished
    before = (folder / "rows.jsonl").read_bytes()
    monkeypatch.setattr(sweep, "_start", lambda *_: pytest.fail("a process was started"))
    assert main(["sweep", str(folder), "--work", str(work)]) == 0
    assert "4 rows there, 0 to run" in capsys.readouterr().out
    assert (folder / "rows.jsonl").read_bytes() == before


def test_a_killed_sweep_goes_on(finished, tmp_path):
    """kill -9 of the sweep and of what it had started, in the middle of its second run."""
    shared = (finished[0] / "sweep.toml").read_text().replace("[0, 1]", "[1]")
    folder, work, log = tmp_path / "grid", tmp_path / "work", tmp_path / "log"
    folder.mkdir()
    (folder / "sweep.toml").write_text(shared)
    command = [sys.executable, "-m", "dni_rnn", "sweep", str(folder), "--work", str(work)]
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True
        )
    second = work / "grid" / "dni-T-5-seed1"
    wait_for(lambda: last_step(second) >= 30, process, log)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [row["cell"] for row in read_rows(folder)] == ["bptt T=5"]
    assert not (second / "summary.json").exists()
    saved = load_checkpoint(second / "checkpoint.safetensors")[1]["step"]
    lines = (second / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= saved]
    assert main(["sweep", str(folder), "--work", str(work)]) == 0
    expected = [comparable(row) for row in read_rows(finished[0]) if row["seed"] == 1]
    assert [comparable(row) for row in read_rows(folder)] == expected
    # It went on from its checkpoint: the rows before it are the first attempt's, times included.
    assert (second / "metrics.jsonl").read_text().splitlines()[: len(kept)] == kept


def test_a_row_that_a_crash_cut_short_is_run_again(finished, tmp_path, monkeypatch):
    folder = write_sweep(tmp_path / "grid", "recall", [0], {"a": "", "b": ""})
    row = json.dumps({"cell": "a", "seed": 0})
    (folder / "rows.jsonl").write_text(row + "\n" + row.replace('"a"', '"b"')[:-5])
    started = []
    monkeypatch.setattr(sweep, "_start", lambda cell, work: started.append(cell.name) or Finished(0))
    monkeypatch.setattr(sweep, "make_row", lambda cell, run: made(cell))
    assert run_sweep(folder, tmp_path / "work", 1) == 0
    assert started == ["b"]
    assert [row["cell"] for row in read_rows(folder)] == ["a", "b"]


# Failures, order and time, with processes that are not real


class Finished:
    """A process that has ended, or ends after some looks at it."""

    def __init__(self, code, looks=0):
        self.code, self.looks, self.terminated = code, looks, 0

    def poll(self):
        self.looks -= 1
        return None if self.looks >= 0 else self.code

    def terminate(self):
        self.terminated += 1

    def wait(self):
        return self.code


def made(cell):
    return {"cell": cell.name, "seed": cell.seed, "test_bpc": 1.0, "seconds": 1.0}


def pretend(monkeypatch, start):
    monkeypatch.setattr(sweep, "_start", start)
    monkeypatch.setattr(sweep, "make_row", lambda cell, run: made(cell))


def time_is_up(monkeypatch):
    """A clock that jumps past every deadline when the first run has started."""
    times = itertools.chain([0.0] * 4, itertools.repeat(1e9))
    clock = SimpleNamespace(monotonic=lambda: next(times), sleep=lambda _: None)
    monkeypatch.setattr(sweep, "time", clock)


def test_a_failing_cell_is_tried_once_more_and_reported(tmp_path, capsys):
    """Real processes: a setting that is refused. The other cell gets its row."""
    folder = write_sweep(
        tmp_path / "grid",
        f"recall --delay 1 {SETTINGS} --steps 2",
        [0],
        {"bad": "--dni --scale -1", "good": ""},
    )
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(folder), "--work", str(tmp_path / "work")])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert printed.count("bad, seed 0: failed with exit code 2, will be tried again") == 1
    log = tmp_path / "work" / "grid" / "bad-seed0.log"
    assert f"bad, seed 0: failed with exit code 2, see {log}" in printed
    assert log.read_text() == 2 * "dni-rnn: --scale must not be negative\n"
    assert [row["cell"] for row in read_rows(folder)] == ["good"]


def test_a_cell_that_fails_once_is_no_failure(tmp_path, monkeypatch):
    folder = write_sweep(tmp_path / "grid", "recall", [0, 1], {"a": "", "b": ""})
    seen = Counter()

    def start(cell, work):
        seen[cell] += 1
        return Finished(3 if cell == Cell("b", 0, ("recall",)) and seen[cell] == 1 else 0)

    pretend(monkeypatch, start)
    assert run_sweep(folder, tmp_path / "work", 1) == 0
    assert [(row["cell"], row["seed"]) for row in read_rows(folder)] == [
        ("a", 0),
        ("a", 1),
        ("b", 1),
        ("b", 0),
    ]


@pytest.mark.parametrize("parallel", [1, 2, 3])
def test_no_more_processes_than_asked_for(parallel, tmp_path, monkeypatch):
    folder = write_sweep(tmp_path / "grid", "recall", [0, 1, 2], {"a": "", "b": ""})
    running, most = [], []

    def start(cell, work):
        running[:] = [process for process in running if process.looks >= 0]
        running.append(Finished(0, looks=3))
        most.append(len(running))
        return running[-1]

    pretend(monkeypatch, start)
    assert run_sweep(folder, tmp_path / "work", parallel) == 0
    assert max(most) == parallel
    assert len(read_rows(folder)) == 6


def test_a_run_is_asked_to_stop_once(tmp_path, monkeypatch):
    """A second SIGTERM does not wait for a checkpoint, and a validation may take longer than one look."""
    folder = write_sweep(tmp_path / "grid", "recall", [0], {"a": "", "b": ""})
    processes = []

    def start(cell, work):
        processes.append(Finished(143, looks=6))
        return processes[-1]

    pretend(monkeypatch, start)
    time_is_up(monkeypatch)
    run_sweep(folder, tmp_path / "work", 1, minutes=1.0)
    assert [process.terminated for process in processes] == [1]


def test_out_of_time_is_no_failure(tmp_path, monkeypatch, capsys):
    folder = write_sweep(tmp_path / "grid", "recall", [0], {"a": "", "b": ""})
    time_is_up(monkeypatch)
    pretend(monkeypatch, lambda cell, work: Finished(143, looks=1))
    assert run_sweep(folder, tmp_path / "work", 1, minutes=1.0) == 0
    assert read_rows(folder) == []
    assert "a, seed 0: stopped, saved; 1 waiting" in capsys.readouterr().out


def test_what_was_started_is_stopped_with_the_sweep(tmp_path, monkeypatch):
    """An error or Ctrl-C in the sweep leaves no process behind."""
    folder = write_sweep(tmp_path / "grid", "recall", [0], {"a": "", "b": "", "c": ""})
    processes = []

    def start(cell, work):
        if len(processes) == 2:
            raise KeyboardInterrupt
        processes.append(Finished(0, looks=1000))
        return processes[-1]

    pretend(monkeypatch, start)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(folder, tmp_path / "work", 3)
    assert [process.terminated for process in processes] == [1, 1]


def test_what_was_started_is_stopped_when_the_sweep_is_terminated(tmp_path, monkeypatch):
    folder = write_sweep(tmp_path / "grid", "recall", [0], {"a": "", "b": ""})
    processes, before = [], signal.getsignal(signal.SIGTERM)

    def start(cell, work):
        if processes:
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # it would end this process
            signal.raise_signal(signal.SIGTERM)
        processes.append(Finished(143, looks=3))
        return processes[-1]

    pretend(monkeypatch, start)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        run_sweep(folder, tmp_path / "work", 2)
    assert [process.terminated for process in processes[:1]] == [1]
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_processes_at_a_time(tmp_path):
    folder = write_sweep(tmp_path / "grid", "recall", [0], {"a": ""})
    with pytest.raises(UsageError, match="--parallel"):
        run_sweep(folder, tmp_path / "work", 0, minutes=0.001)  # the minutes only bound this test


# What a sweep.toml says


def test_cells(tmp_path):
    folder = write_sweep(
        tmp_path, "ptb --hidden 4", [0, 5], {"dni T=2": '--dni --context "next-tokens:3"', "b": ""}
    )
    cells = read_sweep(folder)
    assert [(cell.name, cell.seed) for cell in cells] == [("dni T=2", 0), ("b", 0), ("dni T=2", 5), ("b", 5)]
    assert cells[0].arguments == ("ptb", "--hidden", "4", "--dni", "--context", "next-tokens:3")
    assert [cell.folder for cell in cells[:2]] == ["dni-T-2-seed0", "b-seed0"]
    assert cells[2].command == "dni-rnn train ptb --hidden 4 --dni --context next-tokens:3 --seed 5"


GOOD = "train = 'recall'\nseeds = [0]\n[cells]\na = ''\n"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(None, id="no file"),
        pytest.param(b"train =", id="not TOML"),
        pytest.param(b"", id="empty"),
        pytest.param(GOOD.replace("seeds = [0]\n", "").encode(), id="no seeds"),
        pytest.param(GOOD.replace("train = 'recall'\n", "").encode(), id="no train"),
        pytest.param(b"train = 'recall'\nseeds = [0]\n", id="no cells"),
        pytest.param(GOOD.replace("[0]", "3").encode(), id="seeds is a number"),
        pytest.param(b"train = 'recall'\nseeds = [0]\ncells = 3\n", id="cells is a number"),
        pytest.param(GOOD.replace("''", "'--a \"b'").encode(), id="open quotation mark"),
        pytest.param(GOOD.encode() + b"# \xff", id="not UTF-8"),
        pytest.param(GOOD.replace("[0]", "['x']").encode(), id="seed is a text"),
        pytest.param(GOOD.replace("''", "3").encode(), id="cell is a number"),
        pytest.param(GOOD.replace("[0]", "[0, 0]").encode(), id="a seed twice"),
        pytest.param(GOOD.replace("a = ''", "'a b' = ''\n'a-b' = '--dni'").encode(), id="one folder for two"),
    ],
)  # fmt: skip
def test_what_is_not_a_sweep(content, tmp_path, monkeypatch, capsys):
    assert [cell.name for cell in read_sweep(good(tmp_path / "good"))] == ["a"]
    folder = tmp_path / "grid"
    folder.mkdir()
    if content is not None:
        (folder / "sweep.toml").write_bytes(content)
    monkeypatch.setattr(sweep, "_start", lambda *_: pytest.fail("a process was started"))
    assert main(["sweep", str(folder), "--work", str(tmp_path / "work")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"dni-rnn: {folder / 'sweep.toml'}: ")
    assert not (tmp_path / "work").exists()


def good(folder):
    folder.mkdir()
    (folder / "sweep.toml").write_text(GOOD)
    return folder
