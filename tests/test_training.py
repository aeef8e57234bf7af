"""Training runs: interrupted and resumed, stopped, killed, diverged, out of disk; what they write."""

import dataclasses
import errno
import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dni_rnn.cli import main
from dni_rnn.config import RecurrentConfig
from dni_rnn.errors import DivergedError, UsageError
from dni_rnn.estimators.bptt import TruncatedBPTT
from dni_rnn.estimators.full import FullBPTT
from dni_rnn.penalty import StatePenalty
from dni_rnn.training import checkpoint
from dni_rnn.training import loop as training
from dni_rnn.training import run_directory as runs
from dni_rnn.training.checkpoint import load_checkpoint
from dni_rnn.training.loop import Interrupted, train
from dni_rnn.training.recurrent import SAMPLED, RecurrentLearner
from dni_rnn.training.run_directory import Run
from dni_rnn.training.sampling import sample
from dni_rnn_tasks.recall import Recall
from dni_rnn_tasks.repeat import Copy
from dni_rnn_tasks.text import Text

REAL_PTB = Path(__file__).parents[2] / "shared" / "data" / "ptb"
SMALL = {
    "hidden": 8,
    "embedding": 4,
    "batch_size": 4,
    "bptt": 5,
    "lr": 0.01,
    "log_every": 5,
    "eval_every": 400,
    "threads": 1,
}
PER_UPDATE = 4 * 5
TIMES = {"seconds", "symbols_per_second"}
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "no", "dog", "but", "an", "owl")


def make_text(path, characters=2000, seed=0):
    """Random words; the same on every machine."""
    random = Random(seed)
    text = " ".join(WORDS[int(random.random() * len(WORDS))] for _ in range(characters))
    path.write_text(text[:characters])
    return path


@pytest.fixture
def text(tmp_path):
    return make_text(tmp_path / "words.txt")


def open_run(out, task, **settings):
    name = type(task).__name__.lower()
    return Run(out, name, task, RecurrentConfig(**{**SMALL, **settings}, out=out).resolved)


def fit(out, task, **settings):
    return train(open_run(out, task, **settings), quiet=True)


def learner_of(task, **settings):
    """A learner as `train` makes it."""
    return RecurrentLearner(RecurrentConfig(**{**SMALL, **settings}), task.load(None), torch.device("cpu"))


def flags(**settings):
    """The settings as command-line flags."""
    words = []
    for name, value in {**SMALL, **settings}.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words


def rows(out):
    """The rows of metrics.jsonl without what a clock decides."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def validations(out):
    return [row for row in rows(out) if "valid_bpc" in row]


def same_file(a, b):
    (tensors, values), (others, theirs) = load_checkpoint(a), load_checkpoint(b)
    assert tensors.keys() == others.keys()
    for name in tensors:
        assert tensors[name].dtype == others[name].dtype
        assert torch.equal(tensors[name], others[name]), name
    for clock in TIMES:
        for each in (values, theirs):
            each.pop(clock, None)
    assert values == theirs


def same_run(a, b):
    """Metrics, last and best weights, optimizer, random state and results are those of one history."""
    assert rows(a) == rows(b)
    same_file(a / "checkpoint.safetensors", b / "checkpoint.safetensors")
    same_file(a / "best.safetensors", b / "best.safetensors")
    summaries = [json.loads((out / "summary.json").read_text()) for out in (a, b)]
    for summary in summaries:
        for name in (*TIMES, "peak_memory_mb"):
            del summary[name]
    assert summaries[0] == summaries[1]


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def message(capsys):
    """The one line that a failed command leaves on standard error, without the progress bar before it."""
    lines = capsys.readouterr().err.split("\r")[-1].splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("dni-rnn: ")
    return lines[0]


def after_update(monkeypatch, step, act):
    """Do something right after one update, as the outside world would."""
    update = RecurrentLearner.update

    def hooked(self):
        update(self)
        if self.counters.step == step:
            act(self)

    monkeypatch.setattr(RecurrentLearner, "update", hooked)


# Interrupted and resumed: the same numbers to the last bit


class Forgetful(nn.Module):
    """A core that this project did not write: its state is a dict, and it does not begin at zeros."""

    output_leaf = "h"

    def __init__(self, input_size, hidden_size, num_layers):
        super().__init__()
        self.output_size = hidden_size
        self.cell = nn.GRUCell(input_size, hidden_size)

    def initial_state(self, batch_size):
        return {"age": torch.zeros(batch_size, 1), "h": torch.full((batch_size, self.output_size), 0.5)}

    def forward(self, inputs, state):
        outputs, h = [], state["h"]
        for x in inputs:
            h = self.cell(x, h)
            outputs.append(h)
        return torch.stack(outputs), {"age": state["age"] + len(inputs), "h": h}


class Remembering(TruncatedBPTT):
    """An estimator with a memory: each row is pulled to the mean of its outputs so far."""

    def __init__(self, share, penalty=None):
        super().__init__(penalty)
        self.share = share

    def begin(self, model, batch_size):
        self.mean = torch.zeros(batch_size, model.core.rnn.output_size)

    def memory(self):
        return {"mean": self.mean}

    def load_memory(self, tensors):
        self.mean.copy_(tensors["mean"])

    def leave(self, model, window, outputs, state, weight):
        mean = outputs.mean(0)
        apart = (mean - self.mean).square().sum()
        self.mean = torch.lerp(self.mean, mean.detach(), self.share)
        return [weight * apart]


METHODS = {
    "bptt": {},
    "dni": {
        "dni": True,
        "context": "next-tokens:3",
        "centre": True,
        "restore": 0.5,
        "scale": 0.5,
        "audit": 7,
    },
    "aux": {"dni": True, "aux": True, "context": "next-tokens:2"},
    "whole state": {"dni": True, "synthesizer_reads": "state", "layers": 2},
    "accumulate": {"dni": True, "accumulate": 2, "core": "gru", "clip": 0.0},
    "restore": {"restore": 0.5, "lr": 0.05},
    "full": {"estimator": "full", "accumulate": 2, "restore": 0.5},
    "own core": {"dni": True, "core": "test_training:Forgetful"},
    "own estimator": {"estimator": "test_training:Remembering,share=0.2"},
    "critic": {"dni": True, "critic": True, "context": "next-tokens:3", "synthesizer": "mlp:7"},
    "several passes": {"dni": True, "context": "next-tokens:3", "eval_every": 300, "log_every": 1},
    "annealed": {"dni": True, "context": "next-tokens:3", "synthesizer_lr": 0.02, "anneal": True},
    "shortened": {"dni": True, "context": "next-tokens:3", "random_truncation": 0.6, "accumulate": 2},
    "recall": {"dni": True, "context": "next-tokens:4", "bptt": 60, "eval_every": 2400},
    "copy": {"dni": True, "context": "next-tokens:4", "lr": 0.02, "bptt": 3, "eval_every": 100},
}


@pytest.fixture(params=METHODS, scope="module")
def uninterrupted(request, tmp_path_factory):
    """A task, settings of a run over it, how many updates it has, and such a run."""
    folder, settings = tmp_path_factory.mktemp("method"), METHODS[request.param]
    if request.param == "recall":  # 40 updates of 60 steps: more than two blocks of the generated stream
        task, steps = Recall(delay=3), 40
    elif request.param == "copy":
        task, steps = Copy(symbols=2), 150
    else:
        short = request.param == "several passes"
        task = Text(path=make_text(folder / "words.txt", 700 if short else 3000))
        steps = 100 if short else 60
    fit(folder / "whole", task, steps=steps, **settings)
    assert rows(folder / "whole")[-1]["step"] == steps
    return task, settings, steps, folder / "whole"


def test_stopped_by_its_budget_and_resumed(uninterrupted, tmp_path):
    task, settings, steps, whole = uninterrupted
    out = tmp_path / "run"
    # At its end a run validates: stopped where validation is due anyhow, it adds no row of its own.
    due = [row["step"] for row in validations(whole) if row["step"] % settings.get("log_every", 5) == 0]
    stop = next(step for step in due if 0.35 * steps < step < steps)
    fit(out, task, steps=stop, **settings)
    if settings.get("anneal"):  # the rates go by it
        with pytest.raises(UsageError, match=f"--steps {stop}, not {steps}"):
            fit(out, task, steps=steps, resume=True, **settings)
        return
    assert rows(out) == [row for row in rows(whole) if row["step"] <= stop]
    fit(out, task, steps=steps, resume=True, **settings)
    same_run(out, whole)


def test_stopped_by_signals_and_resumed(uninterrupted, tmp_path, monkeypatch):
    """Between two metrics rows and between two validations; twice."""
    task, settings, steps, whole = uninterrupted
    out = tmp_path / "run"
    for number, stop in ((signal.SIGINT, 13), (signal.SIGTERM, steps - 7)):
        with monkeypatch.context() as patch:
            after_update(patch, stop, lambda _, number=number: signal.raise_signal(number))
            with pytest.raises(Interrupted) as error:
                fit(out, task, steps=steps, resume=True, **settings)
        assert error.value.signal == number
        assert load_checkpoint(out / "checkpoint.safetensors")[1]["step"] == stop
        assert not (out / "summary.json").exists()
    fit(out, task, steps=steps, resume=True, **settings)
    same_run(out, whole)


def test_stopped_at_the_end_of_a_pass_and_resumed(tmp_path, monkeypatch):
    """M is not trained where every row starts anew: its loss is the one before."""
    task, whole, out = Text(path=make_text(tmp_path / "words.txt", 700)), tmp_path / "whole", tmp_path / "run"
    fit(whole, task, steps=40, dni=True, log_every=1)
    with monkeypatch.context() as patch:
        after_update(patch, 32, lambda _: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            fit(out, task, steps=40, dni=True, log_every=1)
    assert load_checkpoint(out / "checkpoint.safetensors")[1]["stream"] == {"position": 0}
    fit(out, task, steps=40, dni=True, log_every=1, resume=True)
    same_run(out, whole)


def test_the_handlers_of_signals_are_put_back(text, tmp_path, monkeypatch):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    after_update(monkeypatch, 3, lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", Text(path=text), steps=20)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_interrupt_stops_at_once(text, tmp_path, monkeypatch):
    def twice(_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    after_update(monkeypatch, 3, twice)
    # Python leaves SIGINT ignored in a background job of a shell, where nothing would stop at once.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "run", Text(path=text), steps=20)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stop_off_the_grid_changes_no_weight(text, tmp_path):
    """A budget that ends between rows adds a row and a validation there, and nothing else."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(whole, Text(path=text), steps=50)
    fit(parts, Text(path=text), steps=33)
    fit(parts, Text(path=text), steps=50, resume=True)
    added = [row for row in rows(parts) if row["step"] == 33]
    assert ["valid_bpc" in row for row in added] == [False, True]
    assert [r for r in rows(parts) if r["step"] not in (33, 35)] == [
        r for r in rows(whole) if r["step"] != 35
    ]
    same_file(parts / "checkpoint.safetensors", whole / "checkpoint.safetensors")


def test_the_best_weights_outlive_an_interruption(text, tmp_path, monkeypatch):
    """A rate so high that validation worsens after the best, before which and after which it stops."""
    whole, out, settings = tmp_path / "whole", tmp_path / "run", {"lr": 0.3, "eval_every": 100, "dni": True}
    fit(whole, Text(path=text), steps=80, **settings)
    best = load_checkpoint(whole / "best.safetensors")[1]["step"]
    assert 10 < best < 70
    for stop in (best - 2, best + 2):
        with monkeypatch.context() as patch:
            after_update(patch, stop, lambda _: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(Interrupted):
                fit(out, Text(path=text), steps=80, resume=True, **settings)
    fit(out, Text(path=text), steps=80, resume=True, **settings)
    same_run(out, whole)


def test_resume_needs_no_run_and_a_finished_one_stays(text, tmp_path):
    out = tmp_path / "run"
    first = fit(out, Text(path=text), steps=20, resume=True)
    before = rows(out)
    for steps in (20, 10):  # also a budget that was met long ago
        again = fit(out, Text(path=text), steps=steps, resume=True)
        assert rows(out) == before
        assert {k: v for k, v in again.items() if k not in (*TIMES, "peak_memory_mb")} == {
            k: v for k, v in first.items() if k not in (*TIMES, "peak_memory_mb")
        }


def test_rows_after_the_checkpoint_are_written_again(text, tmp_path):
    """A crash after rows were written and before they were saved; the last one is cut short."""
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    fit(whole, Text(path=text), steps=40)
    fit(crashed, Text(path=text), steps=20)
    with open(crashed / "metrics.jsonl", "a") as file:
        file.write('{"step": 25, "symbols": 500, "bpc": 1.0}\n{"step": 30, "symb')
    fit(crashed, Text(path=text), steps=40, resume=True)
    same_run(crashed, whole)


# Real processes and real signals


def start(arguments, log):
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "dni_rnn", *arguments], stdout=file, stderr=file, stdin=subprocess.DEVNULL
        )


def wait_for_step(process, out, step, log):
    """Return as soon as metrics.jsonl has a row of update `step` or later."""
    give_up = time.monotonic() + 300
    while True:
        lines = (
            (out / "metrics.jsonl").read_bytes().splitlines(True) if (out / "metrics.jsonl").exists() else []
        )
        if any(line.endswith(b"\n") and json.loads(line)["step"] >= step for line in lines[-2:]):
            return
        if process.poll() is not None or time.monotonic() > give_up:
            process.kill()
            pytest.fail(f"the process never wrote update {step}: {log.read_text()}")
        time.sleep(0.003)


LONG = {
    "dni": True,
    "context": "next-tokens:3",
    "log_every": 10,
    "save_every": 0,
    "eval_every": 2000,
    "steps": 500,
}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """A run that was never interrupted: its command without --out, and its folder."""
    folder = tmp_path_factory.mktemp("long")
    command = ["train", "text", str(make_text(folder / "words.txt", 4000)), *flags(**LONG)]
    assert main([*command, "--out", str(folder / "run")]) == 0
    return command, folder / "run"


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param([(signal.SIGKILL, 10), (signal.SIGKILL, 120), (signal.SIGKILL, 220)], id="kill -9"),
        pytest.param([(signal.SIGINT, 60), (signal.SIGTERM, 200)], id="ctrl-c and kill"),
    ],
)
def test_a_process_is_killed_and_its_run_resumed(kills, long_run, tmp_path):
    command, whole = long_run
    out, log = tmp_path / "run", tmp_path / "log"
    for number, step in kills:
        process = start([*command, "--out", str(out), "--resume"], log)
        wait_for_step(process, out, step, log)
        process.send_signal(number)
        code = process.wait(120)
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL, f"it ended before it was killed: {log.read_text()}"
        else:
            assert code == 128 + number, log.read_text()
            saved = load_checkpoint(out / "checkpoint.safetensors")[1]["step"]
            assert step <= saved < LONG["steps"]
            assert f"--resume --out {out}" in log.read_text()
        assert not (out / "summary.json").exists()
    assert main([*command, "--out", str(out), "--resume"]) == 0
    same_run(out, whole)


# Divergence


@pytest.mark.parametrize("step", [3, 12])
def test_a_loss_that_is_not_a_number_stops_the_run(step, text, tmp_path, monkeypatch, capsys):
    def poison(learner):
        learner.model.readout.bias.data[0] = math.nan

    after_update(monkeypatch, step, poison)
    out = tmp_path / "run"
    assert main(["train", "text", str(text), *flags(steps=60, save_every=0), "--out", str(out)]) == 3
    line = message(capsys)
    assert f"update {5 * (step // 5 + 1)}: the loss is not finite" in line
    saved = out / "checkpoint.safetensors"
    if step < 5:
        assert "no checkpoint yet" in line
        assert not saved.exists()
    else:
        assert f"last good checkpoint: {saved}" in line
        tensors, values = load_checkpoint(saved)
        assert values["step"] == 10
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        assert rows(out)[-1]["step"] == 10
        monkeypatch.undo()
        fit(out, Text(path=text), steps=15, save_every=0, resume=True)  # good enough to go on from


def test_a_checkpoint_with_weights_that_are_not_numbers_is_never_kept(text, tmp_path, monkeypatch):
    """The update itself breaks the weights, after its loss was measured, and a checkpoint is due."""

    def poison(learner):
        learner.model.readout.bias.data[0] = math.nan

    after_update(monkeypatch, 10, poison)
    with pytest.raises(DivergedError):
        fit(tmp_path / "run", Text(path=text), steps=60, save_every=0)
    tensors, _ = load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_huge_learning_rate(text, tmp_path):
    with pytest.raises(DivergedError, match=r"update 5: the loss is not finite; no checkpoint yet") as error:
        fit(tmp_path / "run", Text(path=text), steps=60, lr=1e38)
    one_line(error)


def test_a_state_that_runs_away(text, tmp_path, monkeypatch, capsys):
    """From update 13 on the gates of the cell stand open, and it grows by almost one per step."""

    def open_gates(learner):
        learner.model.core.rnn.bias_ih_l0.data[: 3 * 8] = 50.0

    after_update(monkeypatch, 12, open_gates)
    out = tmp_path / "run"
    settings = flags(steps=60, save_every=0, state_limit=3.0)
    assert main(["train", "text", str(text), *settings, "--out", str(out)]) == 3
    line = message(capsys)
    found = re.search(
        r"update 15: the recurrent state has run away \(root mean square (\S+), limit 3\)", line
    )
    assert found
    assert 3 < float(found[1]) < 15
    assert f"last good checkpoint: {out / 'checkpoint.safetensors'}" in line
    tensors, values = load_checkpoint(out / "checkpoint.safetensors")
    assert values["step"] == rows(out)[-1]["step"] == 10
    assert torch.cat([tensors["state.0"], tensors["state.1"]]).square().mean().sqrt() <= 3


def test_a_diverged_run_is_not_saved_on_its_way_out(text, tmp_path, monkeypatch):
    """A signal arrives after the loss went wrong and before a row showed it."""

    def poison(learner):
        learner.state.hidden[:] = math.nan
        signal.raise_signal(signal.SIGTERM)

    after_update(monkeypatch, 13, poison)
    with pytest.raises(DivergedError, match="update 13: the recurrent state has run away"):
        fit(tmp_path / "run", Text(path=text), steps=60, save_every=0)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] == 10


def test_a_validation_loss_that_is_not_a_number(text, tmp_path, monkeypatch):
    monkeypatch.setattr(RecurrentLearner, "evaluate", lambda *_: {"bpc": math.nan})
    with pytest.raises(
        DivergedError, match="update 20: the validation loss is not finite; no checkpoint yet"
    ):
        fit(tmp_path / "run", Text(path=text), steps=60)
    assert not (tmp_path / "run" / "best.safetensors").exists()


# A directory that holds a run


def test_an_existing_run_is_not_overwritten(text, tmp_path, capsys):
    out = tmp_path / "run"
    fit(out, Text(path=text), steps=10)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["train", "text", str(text), *flags(steps=20), "--out", str(out)]) == 2
    line = message(capsys)
    assert "--resume" in line
    assert str(out) in line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"hidden": 9}, "--hidden 8, not 9"),
        ({"seed": 1}, "--seed 0, not 1"),
        ({"lr": 0.02}, "--lr 0.01, not 0.02"),
        ({"bptt": 6}, "--bptt 5, not 6"),
        ({"dni": True}, "--dni False, not True"),
        ({"eval_every": 401}, "--eval-every 400, not 401"),
    ],
)
def test_resuming_with_other_settings_is_refused(changed, named, text, tmp_path, capsys):
    out = tmp_path / "run"
    fit(out, Text(path=text), steps=5)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    command = ["train", "text", str(text), *flags(steps=10, **changed), "--out", str(out), "--resume"]
    assert main(command) == 2
    assert named in message(capsys)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_run_of_an_older_version_is_refused_in_one_line(text, tmp_path, capsys):
    """With settings that are gone, as the version before wrote them."""
    out = tmp_path / "run"
    fit(out, Text(path=text), steps=5)
    about = json.loads((out / "config.json").read_text())
    about["config"] |= {"reading": "boundary", "shorten": 0.0, "restore": 0.1}
    del about["config"]["random_truncation"], about["config"]["estimator"]
    (out / "config.json").write_text(json.dumps(about))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    resume = ["train", "text", str(text), *flags(steps=10), "--out", str(out), "--resume"]
    for command in (resume, *([verb, str(out)] for verb in ("eval", "sample", "diagnose"))):
        assert main(command) == 2
        assert message(capsys) == "dni-rnn: this run was made by another version: unknown setting reading"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("task", [Text(path=Path("words.txt"), test_fraction=0.1), Recall(delay=2)])
def test_resuming_another_task_is_refused(task, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(tmp_path / "run", Text(path=Path("words.txt")), steps=5)
    with pytest.raises(UsageError, match="holds a run of another task: text") as error:
        fit(tmp_path / "run", task, steps=10, resume=True)
    one_line(error)


def test_what_may_change_when_a_run_is_resumed(text, tmp_path):
    """Where it is written, how long it is, how often it logs: not what an update does."""
    out, moved = tmp_path / "run", tmp_path / "moved"
    fit(out, Text(path=text), chars=10 * PER_UPDATE)
    out.rename(moved)
    summary = fit(moved, Text(path=text), steps=20, resume=True, log_every=1, save_every=0, device="cpu")
    assert summary["steps"] == 20
    assert [row["step"] for row in rows(moved) if "bpc" in row] == [5, 10, *range(11, 21)]
    assert json.loads((moved / "config.json").read_text())["config"]["log_every"] == 1


def test_every_other_setting_is_checked():
    """A new setting is checked on resume unless it is listed as harmless."""
    harmless = RecurrentConfig.changeable
    assert harmless < {field.name for field in dataclasses.fields(RecurrentConfig)}
    assert not harmless & {"seed", "lr", "hidden", "eval_every", "accumulate", "context", "batch_size"}


# A place that cannot be written


def test_a_file_in_the_way(text, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert main(["train", "text", str(text), *flags(steps=5), "--out", str(out)]) == 2
        line = message(capsys)
        assert f"--out {out}: cannot be written" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_a_read_only_folder(text, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere: a read-only folder was not tested")
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(UsageError, match=r"cannot be written \(Permission denied\)") as error:
        fit(tmp_path / "locked" / "run", Text(path=text), steps=5)
    one_line(error)


def test_too_little_space_is_noticed_before_training(text, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(RecurrentLearner, "update", lambda _: pytest.fail("it trained"))
    with pytest.raises(UsageError, match=r"0 MB free, but checkpoints need") as error:
        fit(tmp_path / "run", Text(path=text), steps=5)
    one_line(error)
    assert not (tmp_path / "run" / "config.json").exists()


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("file", ["checkpoint.safetensors", "best.safetensors"])
def test_a_full_disk_costs_no_checkpoint(file, text, tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "run", tmp_path / "whole"
    fit(whole, Text(path=text), steps=60)
    kept = {}

    def replace(source, target):
        if Path(target).name == file and Path(target).exists():
            kept.update({path: path.read_bytes() for path in out.glob("*.safetensors")})
            no_space()
        os.rename(source, target)

    command = ["train", "text", str(text), *flags(steps=60), "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert main(command) == 2
    line = message(capsys)
    assert f"writing failed at update 40 ({os.strerror(errno.ENOSPC)})" in line
    assert "--resume" in line
    assert len(kept) == 2
    # best.safetensors is written first: the new one may be there already
    unchanged = out / "checkpoint.safetensors"
    assert unchanged.read_bytes() == kept[unchanged]
    assert load_checkpoint(unchanged)[1]["step"] == 20
    assert list(out.glob("*.tmp")) == []
    assert main([*command, "--resume"]) == 0
    same_run(out, whole)


def test_a_full_disk_under_metrics(text, tmp_path, monkeypatch):
    """A real full device in the place of metrics.jsonl."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full: writing metrics to a full device was not tested")
    monkeypatch.setattr(runs, "open", lambda _, mode: open("/dev/full", mode), raising=False)  # noqa: SIM115
    with pytest.raises(UsageError, match=r"writing failed at update 5") as error:
        fit(tmp_path / "run", Text(path=text), steps=60)
    one_line(error)


@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl", "summary.json"])
def test_a_full_disk_under_the_small_files(file, text, tmp_path, monkeypatch):
    def replace(source, target):
        if Path(target).name == file:
            no_space()
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UsageError, match=os.strerror(errno.ENOSPC)) as error:
        fit(tmp_path / "run", Text(path=text), steps=60)
    one_line(error)


@pytest.mark.parametrize(
    "arguments",
    [
        ["text", "missing.txt"],
        ["text", "empty.txt"],
        ["text", "short.txt"],
        ["ptb", "--data-dir", "nowhere"],
        ["text", "words.txt", "--device", "cuda"],
        ["text", "words.txt", "--batch-size", "2000"],
    ],
)
def test_nothing_is_written_when_the_run_cannot_start(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("ab" * 21)
    before = sorted(tmp_path.iterdir())
    extra = [] if "--batch-size" in arguments else ["--batch-size", "64"]
    assert main(["train", *arguments, *extra, "--out", "runs/new"]) == 2
    message(capsys)
    assert sorted(tmp_path.iterdir()) == before


# Budgets


def fake_clock(monkeypatch, tick=0.0):
    """Time that passes only when it is looked at, or when a test says so."""
    clock = SimpleNamespace(now=0.0)

    def read():
        clock.now += tick
        return clock.now

    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=read))
    return clock


def test_the_default_is_one_pass(text, tmp_path):
    summary = fit(tmp_path / "run", Text(path=text))
    assert summary["symbols"] == (1800 - 1) // 4 * 4
    assert summary["steps"] == math.ceil((1800 - 1) // 4 / 5)


def test_budgets_in_symbols_and_updates(text, tmp_path):
    summary = fit(tmp_path / "chars", Text(path=text), chars=10 * PER_UPDATE + 1)
    assert (summary["steps"], summary["symbols"]) == (11, 11 * PER_UPDATE)
    assert fit(tmp_path / "steps", Text(path=text), steps=7)["steps"] == 7
    whole = fit(tmp_path / "accumulate", Text(path=text), steps=7, accumulate=3)
    assert (whole["steps"], whole["symbols"]) == (7, 7 * 3 * PER_UPDATE)


@pytest.mark.parametrize(("budget", "updates"), [({"steps": 8}, 8), ({"chars": 8 * 2 * PER_UPDATE}, 8)])
def test_annealed_rates_follow_a_cosine_over_the_budget(budget, updates, text):
    learner = learner_of(Text(path=text), dni=True, synthesizer_lr=0.03, anneal=True, accumulate=2, **budget)
    for step in range(updates):
        learner.update()
        factor = math.cos(math.pi * step / updates / 2) ** 2  # half angle
        assert [group["lr"] for group in learner.record.optimizer.param_groups] == pytest.approx(
            [0.01 * factor, 0.03 * factor]
        )


def test_shortened_windows_miss_no_symbol_and_have_every_length(text):
    """Read one after the other they are the stream; their lengths are as asked, and another seed's differ."""

    def windows(updates=200, **settings):
        learner, found = learner_of(Text(path=text), bptt=4, **settings), []
        whole, taken = learner.stream, learner.stream.window
        whole.window = lambda steps, context: found.append(taken(steps, context)) or found[-1]
        for _ in range(updates):
            learner.update()
        assert learner.counters.symbols == sum(w.inputs.numel() for w in found)
        return found

    cut = windows(random_truncation=0.6)
    lengths = [len(w.inputs) for w in cut]
    assert 0.4 < sum(n < 4 for n in lengths) / len(lengths) < 0.5  # 0.6 of them, of which a quarter draws 4
    assert set(lengths) == {1, 2, 3, 4}
    assert lengths != [len(w.inputs) for w in windows(random_truncation=0.6, seed=1)]
    read = torch.cat([w.inputs for w in cut])
    even = torch.cat([w.inputs for w in windows()])[: len(read)]
    assert torch.equal(read[: len(even)], even)


def test_annealing_without_a_budget_ends_with_the_pass(text):
    learner = learner_of(Text(path=text), anneal=True)
    while learner.counters.symbols < learner.one_pass:
        learner.update()
    assert learner.record.optimizer.param_groups[0]["lr"] < 0.01 * 0.002


@pytest.mark.parametrize("stopped", [False, True])
def test_a_budget_in_minutes_is_training_time(stopped, text, tmp_path, monkeypatch):
    """Updates of one second each, and validations of an hour, which are not counted."""
    clock = fake_clock(monkeypatch)
    update, evaluate_ = RecurrentLearner.update, RecurrentLearner.evaluate

    def timed_update(self):
        clock.now += 1.0
        update(self)

    def timed_evaluate(self, split, level):
        clock.now += 3600.0
        return evaluate_(self, split, level)

    monkeypatch.setattr(RecurrentLearner, "update", timed_update)
    monkeypatch.setattr(RecurrentLearner, "evaluate", timed_evaluate)
    out = tmp_path / "run"
    if stopped:
        with monkeypatch.context() as patch:
            after_update(patch, 23, lambda _: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(Interrupted):
                fit(out, Text(path=text), minutes=1.0)
        clock.now += 1e6
    assert fit(out, Text(path=text), minutes=1.0, resume=stopped)["steps"] == 60
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["seconds"] for row in lines if "bpc" in row] == [5.0 * i for i in range(1, 13)]
    assert lines[-1]["valid_bpc"]


def test_a_budget_in_minutes_ends_with_a_validation(text, tmp_path, monkeypatch):
    """Wherever in the loop the time runs out: it passes with every look at the clock."""
    fake_clock(monkeypatch, tick=0.3)
    for looks in range(50, 58):
        out = tmp_path / str(looks)
        summary = fit(out, Text(path=text), minutes=0.3 * (looks + 0.5) / 60)
        assert validations(out)[-1]["step"] == summary["steps"]
        assert load_checkpoint(out / "checkpoint.safetensors")[1]["step"] == summary["steps"]


def test_seconds_count_training_alone(text, tmp_path, monkeypatch):
    clock = fake_clock(monkeypatch)
    evaluate_ = RecurrentLearner.evaluate

    def timed(self, split, level):
        clock.now += 3600.0
        return evaluate_(self, split, level)

    update = RecurrentLearner.update

    def timed_update(self):
        clock.now += 1.0
        update(self)

    monkeypatch.setattr(RecurrentLearner, "evaluate", timed)
    monkeypatch.setattr(RecurrentLearner, "update", timed_update)
    summary = fit(tmp_path / "run", Text(path=text), steps=50)
    assert summary["seconds"] == 50.0
    assert summary["symbols_per_second"] == PER_UPDATE


@pytest.mark.parametrize(("every", "saved"), [(0, [5, 10, 15, 20, 25]), (7, [10, 20, 25]), (30, [20, 25])])
def test_how_often_a_run_is_saved(every, saved, text, tmp_path, monkeypatch):
    """Never between metrics rows; always with a validation (updates 20 and 25)."""
    clock, steps, save = fake_clock(monkeypatch), [], checkpoint.save_checkpoint

    def note(path, tensors, values):
        if path.name == "checkpoint.safetensors":
            steps.append(values["step"])
        save(path, tensors, values)

    def second(_):
        clock.now += 1.0

    for step in range(1, 26):
        after_update(monkeypatch, step, second)
    monkeypatch.setattr(checkpoint, "save_checkpoint", note)
    fit(tmp_path / "run", Text(path=text), steps=25, save_every=every)
    assert steps == saved


# What a run writes


def test_results_of_a_run(text, tmp_path, monkeypatch, capsys):
    """Best weights, results and what `dni-rnn eval` says about them; the rate is so high that it worsens."""
    splits, evaluate_ = [], RecurrentLearner.evaluate

    def note(self, split, level):
        splits.append(split)
        return evaluate_(self, split, level)

    monkeypatch.setattr(RecurrentLearner, "evaluate", note)
    out = tmp_path / "run"
    summary = fit(
        out,
        Text(path=text),
        steps=80,
        lr=0.3,
        dni=True,
        synthesizer="mlp:5",
        context="next-tokens:2",
        eval_every=100,
    )
    curve = validations(out)
    best = min(curve, key=lambda row: row["valid_bpc"])
    assert best["step"] < curve[-1]["step"] == 80  # else best and last could be mixed up unseen
    assert splits == ["valid"] * len(curve) + ["test"]

    tensors, values = load_checkpoint(out / "best.safetensors")
    assert values == best
    plain = learner_of(Text(path=text))
    plain.model.load_state_dict({name: t for name, t in tensors.items() if "interface" not in name})
    assert evaluate_(plain, "valid", None) == {"bpc": best["valid_bpc"]}

    symbols = plain.data.input_symbols
    net = symbols * 4 + 4 * 8 * (4 + 8 + 2) + 8 * symbols + symbols
    m = (8 + 2 * symbols + 1) * 5 + 5 + 5 * 16 + 16  # one more row, of zeros, for what is not known
    how = {"characters": SAMPLED, "temperature": 0.8, "seed": 0}
    expected = {
        "task": "text",
        "data": "text/words.txt",
        "method": "dni+next-tokens:2",
        "steps": 80,
        "symbols": rows(out)[-1]["symbols"],
        "valid_bpc": curve[-1]["valid_bpc"],
        "best_valid_bpc": best["valid_bpc"],
        "best_symbols": best["symbols"],
        "test_bpc": evaluate_(plain, "test", None)["bpc"],
        "state_rms": rows(out)[-2]["state_rms"],
        "sample": {"text": sample(plain.model, plain.data, "", **how), **how},
        "net_parameters": net,
        "synthesizer_parameters": m,
    }
    assert {name: summary[name] for name in expected} == expected
    assert summary.keys() - expected.keys() == {*TIMES, "peak_memory_mb"}
    assert 50 < summary["peak_memory_mb"] < 100_000
    assert json.loads((out / "summary.json").read_text()) == summary
    # The last weights are what the checkpoint holds, not the best ones.
    last = checkpoint.under("model", load_checkpoint(out / "checkpoint.safetensors")[0])
    assert not torch.equal(last["readout.weight"], tensors["readout.weight"])

    for split, bits in (("test", summary["test_bpc"]), ("valid", best["valid_bpc"])):
        assert main(["eval", str(out), "--split", split, "--device", "cpu"]) == 0
        printed = capsys.readouterr().out
        said = f"text/words.txt {split}: {bits:.4f} bpc after {best['symbols']:,} training characters\n"
        assert printed == said


def test_what_is_printed_at_the_end(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "text", str(text), *flags(steps=20), "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert f"test {summary['test_bpc']:.4f} bpc after {summary['symbols']:,} characters" in printed
    assert printed.endswith(f"-> {out}\n")


def test_config_json(text, tmp_path):
    out = tmp_path / "run"
    run = open_run(out, Text(path=text), steps=5, dni=True, scale=0.5)
    train(run, quiet=True)
    written = json.loads((out / "config.json").read_text())
    assert written["config"].keys() == {field.name for field in dataclasses.fields(RecurrentConfig)}
    assert {name: written["config"][name] for name in SMALL} == SMALL
    assert written["config"]["scale"] == 0.5
    assert written["config"]["clip"] == 1.0  # a default, resolved
    options = {"path": str(text), "symbols": "characters", "valid_fraction": 0.05, "test_fraction": 0.05}
    assert written["task_options"] == options
    assert (written["task"], written["data"], written["device"], written["threads"]) == (
        "text", "text/words.txt", "cpu", 1,
    )  # fmt: skip
    assert "".join(written["symbols"]) == "".join(sorted(set(text.read_text())))
    assert torch.__version__.startswith(written["versions"]["torch"])  # which may lack the +build
    assert written["versions"].keys() == {"dni-rnn", "torch", "numpy", "safetensors"}
    assert all(written["versions"].values())
    assert written["python"] == ".".join(map(str, sys.version_info[:3]))
    if (Path(runs.__file__).parents[2] / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{12}\+?", written["commit"])
    else:
        assert written["commit"] is None
    again = Run.open(out)
    assert (again.task_name, again.task, again.config) == ("text", run.task, run.config)


def test_metrics_rows(text, tmp_path):
    out = tmp_path / "run"
    fit(out, Text(path=text), steps=42, dni=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    training_rows = [row for row in lines if "bpc" in row]
    assert [row["step"] for row in training_rows] == [*range(5, 41, 5), 42]
    assert [row["symbols"] for row in training_rows] == [PER_UPDATE * row["step"] for row in training_rows]
    names = {"step", "symbols", "bpc", "state_rms", "gradient_norm", "synthesizer_loss", "target_rms"}
    assert all(row.keys() == names | TIMES for row in training_rows)
    assert [row["step"] for row in lines if "valid_bpc" in row] == [20, 40, 42]
    assert all(
        isinstance(value, (int, float)) and math.isfinite(value) for row in lines for value in row.values()
    )


def test_a_row_averages_its_own_updates(text, tmp_path):
    """Rows of every update average to the rows of every fifth."""
    single, five = tmp_path / "single", tmp_path / "five"
    fit(single, Text(path=text), steps=20, log_every=1)
    fit(five, Text(path=text), steps=20)
    each = [row for row in rows(single) if "bpc" in row]
    for i, row in enumerate(row for row in rows(five) if "bpc" in row):
        own = each[5 * i : 5 * i + 5]
        for name in ("bpc", "gradient_norm"):
            assert row[name] == pytest.approx(sum(r[name] for r in own) / 5, rel=1e-5)
        assert row["state_rms"] == own[-1]["state_rms"]


def test_evaluation_is_in_bits_per_symbol(text):
    learner = learner_of(Text(path=text))
    learner.model.readout.weight.data.zero_()
    learner.model.readout.bias.data.zero_()
    assert learner.evaluate("valid", None)["bpc"] == pytest.approx(
        math.log2(learner.data.input_symbols), rel=1e-6
    )


def test_real_ptb(tmp_path, capsys):
    if not (REAL_PTB / "ptb.train.txt").is_file():
        pytest.skip("no Penn Treebank files in ../shared/data/ptb: a run on PTB was not tested")
    out = tmp_path / "run"
    assert main(["train", "ptb", "--data-dir", str(REAL_PTB), *flags(steps=3), "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["data"] == "ptb/char"
    assert 4.0 < summary["test_bpc"] < 6.0  # 50 symbols: 5.6 bits when nothing is known
    assert "ptb/char bptt T=5" in capsys.readouterr().out


# Memory


def saved_bytes(learner, windows, estimator):
    """The largest number of bytes that autograd held at once during one call of an estimator."""
    now = peak = 0

    class Held:
        def __init__(self, tensor):
            nonlocal now, peak
            self.tensor = tensor
            now += tensor.nbytes
            peak = max(peak, now)

        def __del__(self):
            nonlocal now
            now -= self.tensor.nbytes

    stretch = [
        learner.stream.window(learner.config.bptt, learner.config.context_window) for _ in range(windows)
    ]
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        estimator(learner.model, stretch, learner.state, learner.config.weight)
    assert now == 0
    return peak


@pytest.mark.parametrize(
    "settings", [METHODS["bptt"], METHODS["dni"], METHODS["aux"]], ids=["bptt", "dni", "aux"]
)
def test_memory_does_not_grow_with_the_stream(settings, text):
    one = learner_of(Text(path=text), **settings)
    peaks = [saved_bytes(one, windows, one.estimator) for windows in (5, 50)]
    assert peaks[0] == peaks[1] > 0
    # What it is compared with does grow, so this would have been seen.
    full = [saved_bytes(one, windows, FullBPTT()) for windows in (5, 50)]
    assert full[1] > 8 * full[0]
    assert full[0] > 2 * peaks[0]


def live_tensors():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.mark.parametrize(
    "settings", [METHODS["bptt"], METHODS["dni"], METHODS["aux"]], ids=["bptt", "dni", "aux"]
)
def test_no_tensor_outlives_its_update(settings, text):
    learner = learner_of(Text(path=text), **settings)
    counts = []
    for step in range(1, 51):
        learner.update()
        assert all(leaf.grad_fn is None for leaf in learner.state)
        if step in (5, 50):
            counts.append(live_tensors())
    assert counts[0] == counts[1]
    kept = [learner.record.averages["loss"] + i for i in range(3)]
    assert live_tensors() == counts[1] + len(kept)


def test_the_state_penalty_is_the_same_with_and_without_synthetic_gradients(text):
    """The same updates as with an M that has no weight; other ones than without the penalty."""
    weights = {}
    for name, settings in {
        "penalty": {"restore": 0.5},
        "weightless": {"dni": True, "synthesizer": "linear", "scale": 0.0, "restore": 0.5},
        "weightless, no penalty": {"dni": True, "synthesizer": "linear", "scale": 0.0, "restore": 0.0},
        "truncated": {},
    }.items():
        learner = learner_of(Text(path=text), **settings)
        assert bool(learner.record.synthesizer) == learner.config.dni
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in learner.record.net:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            biases = dict(learner.model.named_parameters())["core.rnn.bias_hh_l0"]
            biases.chunk(4)[1].fill_(5.0)  # cells that keep what is beyond ±3
        for leaf in learner.state:
            leaf.copy_(6.0 * torch.randn(leaf.shape, generator=generator))
        for _ in range(5):
            learner.update()
        weights[name] = torch.cat([parameter.detach().flatten() for parameter in learner.record.net])
    torch.testing.assert_close(weights["penalty"], weights["weightless"])
    torch.testing.assert_close(weights["weightless, no penalty"], weights["truncated"])
    assert (weights["penalty"] - weights["truncated"]).abs().max() > 1e-3


def test_what_the_strength_of_the_penalty_is_by_default(text):
    """Of `build_estimator`, whoever made the configuration: 0.1 with --dni, none without."""
    for settings, strength in (
        ({"dni": True}, 0.1),
        ({"dni": True, "restore": 0.0}, None),
        ({"dni": True, "restore": 0.7}, 0.7),
        ({}, None),
        ({"restore": 0.7}, 0.7),
        ({"estimator": "full", "restore": 0.7}, 0.7),
    ):
        modules = learner_of(Text(path=text), **settings).estimator.modules()
        found = [module.strength for module in modules if isinstance(module, StatePenalty)]
        assert found == ([] if strength is None else [strength]), settings


def test_an_audit_changes_nothing_but_the_trust(text):
    learner = RecurrentLearner(
        RecurrentConfig(**SMALL, dni=True, synthesizer="mlp", audit=1000),
        Text(path=text).load(None),
        torch.device("cpu"),
    )
    for _ in range(5):
        learner.update()
    before, values = learner.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    gradients = [p.grad.clone() for p in learner.record.net if p.grad is not None]
    assert len(gradients) == len(learner.record.net)
    learner._audit()
    after, values_after = learner.state_dict()
    assert values_after == values
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.core.interface.audited", "model.core.interface.trust"}
    kept = [p.grad for p in learner.record.net if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(kept, gradients, strict=True))
    assert 0.0 <= learner.metrics()["trust"] <= 1.0
