"""Sweeps: every cell and seed becomes one row, whatever happens on the way."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from filelock import FileLock

from dni_rnn.cli import main, parse_train
from dni_rnn.errors import UsageError
from dni_rnn.experiments import carry, sweep_runner
from dni_rnn.experiments.carry import pack_runs, unpack_runs
from dni_rnn.experiments.sweep import Cell, read_failures, read_rows, read_sweep
from dni_rnn.experiments.sweep_progress import duration
from dni_rnn.experiments.sweep_runner import parse_duration, run_sweep
from dni_rnn.training.checkpoint import load_checkpoint
from dni_rnn.training.run_directory import machine_name

RESULTS = Path(__file__).parents[1] / "results"
WORDS = ("the", "cat", "sat", "on", "a", "mat")
SETTINGS = "--hidden 8 --embedding 4 --batch-size 4 --bptt 5 --log-every 10 --save-every 0 --threads 1"
NOISE = ("seconds", "symbols_per_second", "peak_memory_mb", "commit")


@pytest.fixture(autouse=True)
def short_polls(monkeypatch):
    monkeypatch.setattr(sweep_runner, "POLL_SECONDS", 0.02)


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
        curve = [
            (p["symbols"], p["seconds"], round(p["valid_bpc"], 5), p["step"])
            for p in lines
            if "valid_bpc" in p
        ]
        assert row["machine"] == machine_name()
        assert len(row["sample"]["text"]) == 201
        assert set(row["sample"]["text"]) <= set("".join(WORDS) + " ")
        traced = [[p["step"], float(f"{p['state_rms']:.4g}")] for p in lines if "state_rms" in p]
        assert row["traces"]["state_rms"] == traced
        assert ("synthesizer_loss" in row["traces"]) == (row["cell"] == "dni T=5")
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
    monkeypatch.setattr(sweep_runner, "_start", lambda *_: pytest.fail("a process was started"))
    assert main(["sweep", str(folder), "--work", str(work)]) == 0
    assert "4 rows there, 0 to run" in capsys.readouterr().out
    assert (folder / "rows.jsonl").read_bytes() == before


def test_rows_of_other_seeds_do_not_count(finished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "fewer"
    shutil.copytree(finished[0], folder)
    text = (folder / "sweep.toml").read_text()
    (folder / "sweep.toml").write_text(re.sub(r"^seeds = .*", "seeds = [0]", text, flags=re.M))
    monkeypatch.setattr(sweep_runner, "_start", lambda *_: pytest.fail("a process was started"))
    assert run_sweep(folder, tmp_path / "work") == 0
    assert "2 rows there, 0 to run" in capsys.readouterr().out
    assert len(read_rows(folder)) == 4


def test_a_killed_sweep_goes_on_elsewhere(finished, tmp_path, capsys):
    """kill -9 of the sweep, in the middle of its second run, which then ends too; what is left is
    carried to another folder. While it runs, nobody else gets at its folders.
    """
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
    os.killpg(process.pid, signal.SIGSTOP)  # both hold what they hold, and the run does not end meanwhile
    assert main(["sweep", str(folder), "--work", str(tmp_path / "other")]) == 2
    _, *words = shlex.split(read_sweep(folder)[1].command)
    assert main([*words, "--resume", "--out", str(second)]) == 2
    there = "another process is at work there; let it end, or stop it"
    assert capsys.readouterr().err == f"dni-rnn: {folder}: {there}\ndni-rnn: {second}: {there}\n"
    process.kill()
    process.wait()
    os.killpg(process.pid, signal.SIGCONT)
    with FileLock(second / ".lock", timeout=60):  # what it had started has ended
        pass
    assert [row["cell"] for row in read_rows(folder)] == ["bptt T=5"]
    assert not (second / "summary.json").exists()
    saved = load_checkpoint(second / "checkpoint.safetensors")[1]["step"]
    lines = (second / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= saved]
    carried, work = tmp_path / "carried", tmp_path / "elsewhere"
    pack_runs(carried, second.parent, [second.name])
    second = work / "grid" / second.name
    assert main(["sweep", str(folder), "--work", str(work), "--carry", str(carried)]) == 0
    expected = [comparable(row) for row in read_rows(finished[0]) if row["seed"] == 1]
    assert [comparable(row) for row in read_rows(folder)] == expected
    # It went on from its checkpoint: the rows before it are the first attempt's, times included.
    assert (second / "metrics.jsonl").read_text().splitlines()[: len(kept)] == kept


STARTS = """
import os, subprocess, sys
from dni_rnn.parent_process import environment
child = '''
import os, sys, time
from dni_rnn.parent_process import end_with_starter
end_with_starter()
os.write(int(sys.argv[1]), b"x")
time.sleep(2)
print("there")
'''
env = {"sweep": environment(), "torchrun": os.environ | {"TORCHELASTIC_RUN_ID": "x"}, "shell": None}
read, write = os.pipe()
subprocess.Popen([sys.executable, "-c", child, str(write)], env=env[sys.argv[1]], pass_fds=[write])
os.read(read, 1)
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(os.name != "posix", reason="a process does not learn of the end of what started it")
def test_what_was_started_ends_with_what_started_it():
    """But for what a shell has started."""
    starters = {
        kind: subprocess.Popen([sys.executable, "-c", STARTS, kind], stdout=subprocess.PIPE)
        for kind in ("sweep", "torchrun", "shell")
    }
    said = {kind: process.communicate()[0] for kind, process in starters.items()}  # to the end of the child
    assert said == {"sweep": b"", "torchrun": b"", "shell": b"there\n"}


def test_a_row_that_a_crash_cut_short_is_run_again(finished, tmp_path, monkeypatch):
    folder = write_sweep(tmp_path / "grid", "recall", [0], {"a": "", "b": ""})
    row = json.dumps(made(Cell("a", 0, ())))
    (folder / "rows.jsonl").write_text(row + "\n" + row.replace('"a"', '"b"')[:-5])
    started = []
    monkeypatch.setattr(sweep_runner, "_start", lambda cell, *_: started.append(cell.name) or Finished(0))
    monkeypatch.setattr(sweep_runner, "make_row", lambda cell, run: made(cell))
    assert run_sweep(folder, tmp_path / "work", 1) == 0
    assert started == ["b"]
    assert [row["cell"] for row in read_rows(folder)] == ["a", "b"]


# Failures, order and time, with processes that are not real


class Finished:
    """A process that has ended, or ends after some looks at it."""

    def __init__(self, code, looks=0):
        self.code, self.looks, self.terminated, self.returncode = code, looks, 0, None

    def poll(self):
        self.looks -= 1
        self.returncode = None if self.looks >= 0 else self.code
        return self.returncode

    def terminate(self):
        self.terminated += 1

    def wait(self):
        return self.code


class Endless(Finished):
    """A process that ends some looks after it was asked to."""

    def __init__(self, code=143):
        super().__init__(code, looks=10**9)

    def terminate(self):
        super().terminate()
        self.looks = 3


def made(cell):
    return {"cell": cell.name, "seed": cell.seed, "best_valid_bpc": 1.0, "test_bpc": 1.0, "seconds": 1.0}


def pretend(monkeypatch, start):
    def begin(cell, work, device):
        (work / f"{cell.folder}.log").touch()
        return start(cell, work, device)

    monkeypatch.setattr(sweep_runner, "_start", begin)
    monkeypatch.setattr(sweep_runner, "make_row", lambda cell, run: made(cell))


def test_a_failing_cell_is_tried_once_more_and_recorded(tmp_path, capsys, monkeypatch):
    """Real processes: a state that is called run away. The other cell gets its row."""
    folder, work = tmp_path / "grid", tmp_path / "work"
    bad = "--log-every 1 --state-limit 1e-9"
    write_sweep(folder, f"recall --delay 1 {SETTINGS} --steps 2", [0], {"bad": bad, "good": ""})
    command = ["sweep", str(folder), "--work", str(work)]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert printed.count("bad, seed 0: failed with exit code 3, will be tried again") == 1
    assert f"bad, seed 0: failed with exit code 3, see {work / 'grid' / 'bad-seed0.log'}" in printed
    assert [row["cell"] for row in read_rows(folder)] == ["good"]
    (record,) = read_failures(folder)
    assert (record["cell"], record["seed"], record["times"], record["exit_code"]) == ("bad", 0, 2, 3)
    assert record["command"].endswith(f"{bad} --seed 0")
    assert record["reason"].startswith("dni-rnn: stopped: update 1: the recurrent state has run away")
    # It would diverge again, so it waits for another command.
    started = []
    pretend(monkeypatch, lambda cell, *_: started.append(cell.name) or Finished(0))
    assert main(command) == 0
    assert started == []
    assert "bad, seed 0: diverged twice and is left out" in capsys.readouterr().out
    write_sweep(folder, f"recall --delay 1 {SETTINGS} --steps 2", [0], {"bad": "--log-every 1", "good": ""})
    assert main(command) == 0
    assert started == ["bad"]
    assert read_failures(folder) == []


def test_a_cell_that_fails_once_is_no_failure(tmp_path, monkeypatch):
    folder = write_sweep(tmp_path / "grid", "recall", [0, 1], {"a": "", "b": ""})
    seen = Counter()

    def start(cell, *_):
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


def test_a_retired_cell_keeps_its_rows_and_is_not_run(tmp_path, monkeypatch, capsys):
    folder = write_sweep(tmp_path / "grid", "recall", [0, 1], {"a": "", "b": ""})
    with open(folder / "sweep.toml", "a") as file:
        file.write("\n[retired]\n'old' = '--gone 1'\n")
    (folder / "rows.jsonl").write_text(json.dumps(made(Cell("old", 0, ()))) + "\n")
    started = []
    pretend(monkeypatch, lambda cell, *_: started.append((cell.name, cell.seed)) or Finished(0))
    assert run_sweep(folder, tmp_path / "work") == 0
    assert started == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert "1 rows there, 4 to run" in capsys.readouterr().out
    assert [(row["cell"], row["seed"]) for row in read_rows(folder)] == [("old", 0), *started]


@pytest.mark.parametrize("parallel", [1, 2, 3])
def test_no_more_processes_than_asked_for(parallel, tmp_path, monkeypatch):
    folder = write_sweep(tmp_path / "grid", "recall", [0, 1, 2], {"a": "", "b": ""})
    running, most = [], []

    def start(cell, *_):
        running[:] = [process for process in running if process.looks >= 0]
        running.append(Finished(0, looks=3))
        most.append(len(running))
        return running[-1]

    pretend(monkeypatch, start)
    assert run_sweep(folder, tmp_path / "work", parallel) == 0
    assert max(most) == parallel
    assert len(read_rows(folder)) == 6


def test_a_run_is_asked_to_stop_once(tmp_path, monkeypatch, capsys):
    """A second SIGTERM does not wait for a checkpoint, and a validation may take longer than one look."""
    folder = write_sweep(tmp_path / "grid", "recall", [0], {"a": "", "b": ""})
    processes = []
    pretend(monkeypatch, lambda *_: processes.append(Endless()) or processes[-1])
    assert run_sweep(folder, tmp_path / "work", budget=0.5) == 0
    # Nothing says that it has begun to train, so it keeps its turn to the end of the budget.
    assert [process.terminated for process in processes] == [1]
    assert read_rows(folder) == read_failures(folder) == []
    printed = capsys.readouterr().out
    assert "a, seed 0: saved at 0%; 2 unfinished" in printed
    assert "time is up, 2 unfinished" in printed


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_budget_is_shared_in_rounds(parallel, tmp_path, monkeypatch):
    folder = write_sweep(tmp_path / "grid", "recall", [0], dict.fromkeys("abcde", ""))
    work, started = tmp_path / "work", []
    monkeypatch.setattr(sweep_runner, "LEAST_TURN", 0.1)

    def start(cell, *_):
        """It has got as far as it has had turns, but `a` takes less to do."""
        started.append(cell.name)
        run = work / cell.folder
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps({"budget": ["steps", 20 if cell.name == "a" else 40]}))
        row = {"step": started.count(cell.name), "symbols": 0, "seconds": 0}
        (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        os.utime(
            run / "config.json", ns=(len(started), len(started))
        )  # however coarse the clock of the files is
        return Endless()

    pretend(monkeypatch, start)
    assert run_sweep(folder, work, parallel, budget=4.0) == 0
    counts = Counter(started)
    assert started[:5] == list("abcde")
    assert started[5:10] == list("bcdea")[: len(started) - 5], "those that have got least far come first"
    assert len(started) > 5, "more than one round"
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_budget_goes_to_the_first_cells_where_the_order_says_what_they_are_worth(tmp_path, monkeypatch):
    folder = write_sweep(tmp_path / "grid", "recall", [0], dict.fromkeys("abc", ""))
    path = folder / "sweep.toml"
    path.write_text("in_order = true\n" + path.read_text())
    started = []
    monkeypatch.setattr(sweep_runner, "LEAST_TURN", 0.1)

    def start(cell, work, _):
        started.append(cell.name)
        (work / cell.folder).mkdir()
        (work / cell.folder / "config.json").write_text("{}")
        return Endless()

    pretend(monkeypatch, start)
    assert run_sweep(folder, tmp_path / "work", 2, budget=2.0) == 0
    assert started == ["a", "b"]
    path.write_text(path.read_text().replace("in_order = true", 'in_order = "yes"'))
    with pytest.raises(UsageError, match=r"in_order is 'yes'; give true or false"):
        run_sweep(folder, tmp_path / "work", 2, budget=2.0)
    assert len(started) == 2


def test_time_of_a_run_that_has_not_begun_is_not_over(tmp_path, monkeypatch):
    """A process that is still starting could not make a checkpoint."""
    folder = write_sweep(tmp_path / "grid", "recall", [0], {"a": "", "b": ""})
    monkeypatch.setattr(sweep_runner, "LEAST_TURN", 0.01)
    processes = {}

    def start(cell, work, _):
        processes[cell.name] = Endless()
        if cell.name == "a":
            (work / cell.folder).mkdir()
            (work / cell.folder / "config.json").write_text("{}")
        return processes[cell.name]

    pretend(monkeypatch, start)
    run_sweep(folder, tmp_path / "work", 2, budget=1.0)
    assert processes["b"].terminated == 1
    assert len(processes) == 2


def test_what_was_started_is_stopped_with_the_sweep(tmp_path, monkeypatch):
    """An error or Ctrl-C in the sweep leaves no process behind."""
    folder = write_sweep(tmp_path / "grid", "recall", [0], {"a": "", "b": "", "c": ""})
    processes = []

    def start(cell, *_):
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

    def start(cell, *_):
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
        run_sweep(folder, tmp_path / "work", 0, budget=0.1)  # the budget only bounds this test


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("9m", 540), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400), ("1m5s", 65)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds
    assert parse_duration(duration(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "9", "m", "9 m", "m9", "0s", "-9m", "1.2.3s", "9d", "nan"])
def test_what_is_no_duration(text):
    with pytest.raises(UsageError, match="90s, 9m or 1h30m"):
        parse_duration(text)


# On another machine


def test_parts_that_do_not_belong_together(tmp_path, monkeypatch):
    monkeypatch.setattr(carry, "PART_BYTES", 1000)
    run = tmp_path / "work" / "a"
    run.mkdir(parents=True)
    content = {"config.json": b"{}", "checkpoint.safetensors": bytes(range(256)) * 40, "other": b"left out"}
    for name, data in content.items():
        (run / name).write_bytes(data)
    pack_runs(tmp_path / "carried", run.parent, ["a", "never begun"])
    parts = sorted((tmp_path / "carried").iterdir())
    assert max(part.stat().st_size for part in parts) == 1000
    assert len(parts) > 10
    parts[3].unlink()
    elsewhere = tmp_path / "elsewhere" / "work"
    elsewhere.mkdir(parents=True)
    with pytest.raises(UsageError, match="copy them again"):
        unpack_runs(tmp_path / "carried", elsewhere)
    assert list(elsewhere.iterdir()) == []
    pack_runs(tmp_path / "carried", tmp_path / "of another sweep", [])
    assert len(list((tmp_path / "carried").iterdir())) == len(parts) - 1
    pack_runs(tmp_path / "carried", run.parent, [])
    assert list((tmp_path / "carried").iterdir()) == [], "parts of an earlier call are replaced"


def test_of_an_archive_only_what_was_packed_is_taken(tmp_path):
    work, carried = tmp_path / "at" / "work", tmp_path / "carried"
    work.mkdir(parents=True)
    carried.mkdir()
    with tarfile.open(carried / "work.tar.000", "w") as tar:
        for name in ("../config.json", "./config.json", "/config.json", "run/other", "run/config.json"):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"{}"))
        link = tarfile.TarInfo("run/metrics.jsonl")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    unpack_runs(carried, work)
    found = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert set(found) <= {"carried/work.tar.000", "at/work/run/config.json"}


def test_what_has_got_further_stays(tmp_path):
    def write(run, step):
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"budget": ["steps", 10]}))
        (run / "metrics.jsonl").write_text(json.dumps({"step": step, "symbols": 0, "seconds": 0}) + "\n")
        (run / "checkpoint.safetensors").write_text(str(step))

    there, here = tmp_path / "there" / "grid", tmp_path / "here" / "grid"
    write(there / "a", 3)
    write(there / "b", 5)
    pack_runs(tmp_path / "carried", there, ["a", "b"])
    write(here / "a", 4)
    write(here / "b", 4)
    unpack_runs(tmp_path / "carried", here)
    assert (here / "a" / "checkpoint.safetensors").read_text() == "4"
    assert (here / "b" / "checkpoint.safetensors").read_text() == "5"


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
    monkeypatch.setattr(sweep_runner, "_start", lambda *_: pytest.fail("a process was started"))
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


# What is committed


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("*/sweep.toml")), ids=lambda path: path.parent.name)
def test_every_cell_of_a_committed_sweep_is_a_valid_command(folder):
    """But those that are retired: they have their rows, and an option that is gone."""
    there = {row["cell"] for row in read_rows(folder.parent)}
    for cell in read_sweep(folder.parent):
        if cell.retired:
            assert cell.name in there
            with pytest.raises((SystemExit, UsageError)):
                parse_train(list(cell.arguments))
        elif cell.seed == 0:
            parse_train(list(cell.arguments))
