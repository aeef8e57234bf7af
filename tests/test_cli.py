"""The command line: help, errors of one line and exit code 2, and what reads a finished run.

The help texts are kept in tests/golden/help_*.txt. To renew them after a change that was meant:

    DNI_RNN_RENEW=1 pytest tests/test_cli.py
"""

import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from dni_rnn import cli
from dni_rnn.cli import main, parse_train
from dni_rnn.config import PUBLISHED_DNI, FeedforwardConfig, RecurrentConfig, from_json, to_json
from dni_rnn.config.spelling import parse_call, parse_context, parse_synthesizer
from dni_rnn.data import task
from dni_rnn.data.labelled import Examples
from dni_rnn.data.task import Corpus, config_of, installed_tasks
from dni_rnn.errors import UsageError
from dni_rnn.registry import names
from dni_rnn.synthesizers import units
from dni_rnn.training.checkpoint import load_checkpoint, save_checkpoint
from dni_rnn.training.inference import load_run
from dni_rnn.training.sampling import sample
from dni_rnn_tasks.images import CIFAR10, MNIST
from dni_rnn_tasks.ptb import PTB

GOLDEN = Path(__file__).parent / "golden"
RENEW = os.environ.get("DNI_RNN_RENEW") == "1"
BUNDLED = (
    "addition", "cifar", "copy", "counting", "live", "mnist", "ptb", "recall", "repeat-copy", "surface",
    "text",
)  # fmt: skip
COMMANDS = (
    "train",
    "eval",
    "sample",
    "export",
    "compare",
    "diagnose",
    "demo",
    "sweep",
    "report",
    "bench",
    "tasks",
)
SMALL = shlex.split(
    "--hidden 8 --embedding 4 --batch-size 4 --bptt 5 --log-every 5 --eval-every 400 --threads 1"
)


def make_text(path, characters=2000, words=("the", "cat", "sat", "on", "a", "mat")):
    """Random words; the same on every machine."""
    random = Random(0)
    text = " ".join(words[int(random.random() * len(words))] for _ in range(characters))
    path.write_text(text[:characters])
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A text and a small run over it."""
    folder = tmp_path_factory.mktemp("trained")
    text, out = make_text(folder / "words.txt"), folder / "run"
    assert main(["train", "text", str(text), *SMALL, "--steps", "60", "--lr", "0.02", "--out", str(out)]) == 0
    return text, out


def failing(capsys, arguments, code=2):
    """What a failing command says: one line on standard error, nothing on standard output."""
    assert main([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.split("\r")[-1].splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("dni-rnn: ")
    return lines[0]


# Help


def helped(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


HELPS = [
    [],
    ["train"],
    *(["train", name] for name in BUNDLED),
    *([name] for name in COMMANDS if name != "train"),
]


@pytest.mark.parametrize("arguments", HELPS, ids=" ".join)
def test_help(arguments, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(cli, "TASKS", {name: cli.TASKS[name] for name in BUNDLED})
    text = "".join(line.rstrip() + "\n" for line in helped(arguments, capsys).splitlines())
    assert "\x1b" not in text
    path = GOLDEN / f"help_{'_'.join(arguments) or 'dni-rnn'}.txt"
    written_by = f"tyro {version('tyro')}\n"
    if RENEW:
        path.write_text(written_by + text)
    first, expected = path.read_text().split("\n", 1)
    if first + "\n" != written_by:
        pytest.skip(f"the help texts were written with {first}; the layout of this tyro was not compared")
    assert text == expected, "help has changed; if that was meant: DNI_RNN_RENEW=1 pytest tests/test_cli.py"


def test_every_command_has_a_golden_help(capsys):
    listed = re.search(r"\{(\S+)\}", helped([], capsys))
    assert listed
    assert tuple(listed[1].split(",")) == COMMANDS
    assert {f"help_{'_'.join(a) or 'dni-rnn'}.txt" for a in HELPS} == {p.name for p in GOLDEN.glob("help_*")}


@pytest.mark.parametrize("name", BUNDLED)
def test_every_setting_is_in_the_help_with_an_explanation(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text = helped(["train", name], capsys)
    for field in dataclasses.fields(config_of(cli.TASKS[name])):
        flag = f"--{field.name.replace('_', '-')}"
        line = re.search(rf"\n\W +{flag}[ ,].*(\n. {{10,}}.*)*?\(default: ", text)
        assert line, flag
        assert len(re.sub(rf"{flag}\S*|\W|default", "", line[0])) > 15, flag


@pytest.mark.parametrize(
    ("text", "core", "widths"),
    [
        ("linear", 100, []),
        ("mlp", 100, [100]),
        ("mlp:1/4", 100, [25]),
        ("mlp:1/4", 1, [1]),
        ("mlp:300", 100, [300]),
        ("mlp:1/2,64", 100, [50, 64]),
    ],
)
def test_widths_of_a_synthesizer(text, core, widths):
    assert units(parse_synthesizer(text), core) == widths


def test_options_with_a_grammar_of_their_own():
    assert [parse_context(text) for text in ("none", "next-tokens:1", "next-tokens:12")] == [0, 1, 12]
    assert {"lstm", "gru", "rnn"} <= set(names("cores"))
    assert {"bptt", "dni", "full"} <= set(names("estimators"))
    assert parse_call("--estimator", "full") == ("full", {})
    assert parse_call("--estimator", "my.place:Mine,a=1,b=0.5,c=no,d=True") == (
        "my.place:Mine", {"a": 1, "b": 0.5, "c": "no", "d": True},
    )  # fmt: skip
    with pytest.raises(UsageError, match="is not argument=value"):
        parse_call("--core", "diagonal,0.9")


def test_no_torch_for_help():
    """Help, tasks, version and mistakes answer at once: they must not wait for torch."""
    code = """
import sys
from dataclasses import replace
from dni_rnn.cli import main, parse_train
for arguments in {commands}:
    try:
        assert main(arguments) in (0, 2)
    except SystemExit as stop:
        assert stop.code in (0, 2), stop.code
    heavy = [name for name in ("torch", "numpy", "matplotlib", "safetensors") if name in sys.modules]
    assert not heavy, (arguments, heavy)
print("light")
"""
    commands = [
        *([*a, "--help"] for a in HELPS),
        ["--version"],
        ["tasks"],
        ["train", "text", "--bptt", "0"],
        ["train", "text", "--unknown"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", code.format(commands=commands)], capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("light\n"), done.stderr


def test_no_compiler_for_commands_that_do_not_train():
    """Its import takes as long as torch's own: eval, sample, export and diagnose must not wait for it."""
    modules = "training.recurrent, training.feedforward, training.inference, training.export, traces"
    names = ", ".join(
        f"dni_rnn.{name}" for name in [*modules.split(", "), "experiments.diagnose", "two_rates"]
    )
    code = f"import sys, {names}\nassert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dni-rnn {version('dni-rnn')}\n"


def test_tasks(capsys):
    assert main(["tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(cli.TASKS)
    assert set(BUNDLED) <= set(cli.TASKS)
    assert all(len(line.split()) > 4 for line in lines)


def test_as_a_module():
    """`python -m dni_rnn` is the command, with its exit codes."""
    good, bad = (
        subprocess.run([sys.executable, "-m", "dni_rnn", *words], capture_output=True, text=True, check=False)
        for words in (["--version"], ["train", "text", "--bptt", "0"])
    )
    assert (good.returncode, good.stdout) == (0, f"dni-rnn {version('dni-rnn')}\n")
    assert (bad.returncode, bad.stdout, bad.stderr) == (2, "", "dni-rnn: --bptt must be positive, not 0\n")


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "train, eval, sample"),
        (["train"], "addition, cifar, copy, counting, live"),
        (["train", "text", "--nope"], "--nope"),
        (["train", "text", "--bptt", "many"], "many"),
        (["train", "text", "--dni", "--reading", "next-output"], "--reading"),
        (["train", "text", "--shorten", "0.5"], "--shorten"),
        (["eval"], "PATH"),
        (["eval", "run", "--split", "train"], "train"),
    ],
)
def test_unknown_words_are_refused(arguments, named, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(cli, "TASKS", {name: cli.TASKS[name] for name in BUNDLED})
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert named in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], f"dni-rnn: trian: no such command; known: {', '.join(COMMANDS)}"),
        (["trian", "text"], f"dni-rnn: trian: no such command; known: {', '.join(COMMANDS)}"),
        (["train", "nope"], f"dni-rnn: nope: no such task; known: {', '.join(BUNDLED)}"),
        (["train", "nope", "--steps", "5"], f"dni-rnn: nope: no such task; known: {', '.join(BUNDLED)}"),
    ],
)
def test_an_unknown_command_or_task_is_refused_in_one_line(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(cli, "TASKS", {name: cli.TASKS[name] for name in BUNDLED})
    assert failing(capsys, arguments) == said


POSITIVE = (
    "hidden", "layers", "embedding", "bptt", "accumulate", "batch-size", "lr", "synthesizer-lr", "chars",
    "minutes", "steps", "threads", "log-every", "eval-every", "state-limit", "aux-weight",
)  # fmt: skip
NOT_NEGATIVE = ("clip", "scale", "restore", "audit", "save-every")
ONLY_WITH_DNI = (
    ["--synthesizer", "linear"],
    ["--synthesizer-reads", "state"],
    ["--critic"],
    ["--context", "next-tokens:3"],
    ["--scale", "0.5"],
    ["--discount", "0.9"],
    ["--no-centre"],
    ["--audit", "5"],
    ["--aux"],
    ["--synthesizer-lr", "0.01"],
)
BUDGETS = (("chars", "minutes"), ("chars", "steps"), ("minutes", "steps"))
SYNTHESIZERS = (
    "none",
    "mpl",
    "mlp:",
    "mlp:0",
    "mlp:-1",
    "mlp:a",
    "mlp:1,2,3",
    "mlp:1,",
    "linear:5",
    "mlp:1.5",
    "mlp:1/0",
    "mlp:3/2",
    "mlp:-1/4",
)
CONTEXTS = (
    "all", "next-tokens", "next-tokens:", "next-tokens:0", "next-tokens:-2", "next-tokens:2:-1",
    "next-tokens:a", "next-tokens:2:", "next-tokens:2:3:4", "none:3", "next-token:2",
    "gru", "gru:4", "gru:4:8", "next-tokens:2:3",
)  # fmt: skip
CORES, ESTIMATORS = (", ".join(names(kind)) for kind in ("cores", "estimators"))
SHARES = ("-0.1", "1.5", "nan")
MISTAKES = [
    *((["--dni", "--aux", f"--{name}", "0"], f"--{name} must be positive, not 0") for name in POSITIVE),
    *((["--dni", f"--{name}", "-1"], f"--{name} must not be negative") for name in NOT_NEGATIVE),
    (["--lr", "nan"], "--lr must be positive, not nan"),
    (["--dni", "--batch-size", "1"], "--batch-size 1: there is no mean over rows to subtract"),
    (["--beta2", "1"], "--beta2 must lie between 0 and 1, not 1.0"),
    (["--clip", "nan"], "--clip must not be negative"),
    *((["--dni", "--discount", d], "--discount must lie above 0") for d in ("0", "-0.5", "1.01", "nan")),
    *((["--seed", s], "--seed must lie between 0 and 2^63 - 1") for s in ("-1", str(2**63), str(2**70))),
    (["--steps", "-3"], "--steps must be positive, not -3"),
    *(
        (words, f"{words[0].replace('no-', '')} does nothing without --dni; add --dni")
        for words in ONLY_WITH_DNI
    ),
    (["--dni", "--aux-weight", "0.5"], "--aux-weight does nothing without --aux; add --aux"),
    (["--aux-weight", "0.5"], "--aux-weight does nothing without --aux; add --aux"),
    *(([f"--{a}", "1", f"--{b}", "1"], "give one of --chars, --minutes and --steps") for a, b in BUDGETS),
    *(
        (["--random-truncation", s], f"--random-truncation is a share of windows, from 0 to 1, not {s}")
        for s in SHARES
    ),
    (["--anneal", "--minutes", "1"], "--anneal needs --chars or --steps"),
    *(
        (["--dni", "--synthesizer", t], f"--synthesizer {t}: give linear, mlp, mlp:WIDTH")
        for t in SYNTHESIZERS
    ),
    *((["--dni", "--context", t], f"--context {t}: give none, or next-tokens:W with W") for t in CONTEXTS),
    *(
        (["--core", t], f"--core {t}: not known; give one of {CORES}, or package.module:Name")
        for t in ("transformer", "LSTM", ":Cell", "cells:", "my cells:Cell", "cells:Cell:Cell")
    ),
    *(
        (["--estimator", t], f"--estimator {t}: not known; give one of {ESTIMATORS}, or package.module:Name")
        for t in ("rtrl", "cells:")
    ),
    (["--estimator", "full,penalty"], "--estimator full,penalty: 'penalty' is not argument=value"),
    (["--estimator", "full,a b=1"], "--estimator full,a b=1: 'a b=1' is not argument=value"),
    (["--dni", "--estimator", "full"], "--dni is an estimator of its own: leave out --estimator or --dni"),
    (
        ["--dni", "--critic", "--context", "none"],
        "--context none: a critic predicts the loss of known targets",
    ),
    (
        ["--dni", "--synthesizer", "my.place:Mine"],  # a critic by default, as this task is learnt
        "--synthesizer my.place:Mine: a critic has a classifier of its own; add --no-critic",
    ),
]


@pytest.mark.parametrize(("wrong", "said"), MISTAKES, ids=[" ".join(wrong) for wrong, _ in MISTAKES])
def test_settings_that_make_no_sense(wrong, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in failing(capsys, ["train", "recall", *wrong])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["text", "--valid-fraction", "2"], "valid_fraction is 2.0"),
        (["recall", "--delay", "0"], "--delay must lie between 1 and 1024, not 0"),
        (["recall", "--symbols", "1"], "--symbols must be at least 2, not 1"),
    ],
)
def test_options_of_a_task_that_make_no_sense(arguments, said, capsys):
    assert said in failing(capsys, ["train", *arguments])


def test_settings_survive_json():
    config = RecurrentConfig(
        dni=True, context="next-tokens:3", out=Path("a/b"), data_dir=Path("c"), minutes=0.5
    )
    assert from_json(RecurrentConfig, json.loads(json.dumps(to_json(config)))) == config
    assert from_json(RecurrentConfig, {"hidden": 3}) == RecurrentConfig(hidden=3)
    with pytest.raises(UsageError, match="another version: unknown setting wings"):
        from_json(RecurrentConfig, {"wings": 2})
    assert set(to_json(config)) > config.changeable


def test_the_names_of_methods():
    dni: dict[str, Any] = {"dni": True}
    given: list[tuple[str, dict[str, Any]]] = [
        ("bptt", {}),
        ("bptt", {"restore": 0.0}),
        ("bptt+restore", {"restore": 0.1}),
        ("full", {"estimator": "full"}),
        ("full+restore", {"estimator": "full", "restore": 0.1}),
        ("dni-online", {**dni, "context": "none"}),
        ("dni+next-tokens:8", dni),
        ("dni+next-tokens:8", {**dni, "restore": 0.0}),
        ("dni+next-tokens:8+aux", {**dni, "aux": True}),
        ("dni+next-tokens:3+critic", {**dni, "critic": True, "context": "next-tokens:3"}),
    ]
    for name, settings in given:
        assert RecurrentConfig(**settings).resolved.method == name


def test_the_penalty_on_the_state_is_on_with_synthetic_gradients_and_off_without():
    assert RecurrentConfig().restore is None
    given: list[dict[str, Any]] = [
        {},
        {"dni": True},
        {"restore": 0.5},
        {"dni": True, "restore": 0.0},
        {"dni": True, "restore": 2.0},
    ]
    assert [RecurrentConfig(**settings).resolved.restore for settings in given] == [0.0, 0.1, 0.5, 0.0, 2.0]
    assert parse_train(["text", "--dni"])[2].restore == 0.1


def test_a_preset_gives_defaults_that_options_replace():
    default = parse_train(["copy"])[2]
    paper = parse_train(["copy", "--preset", "paper"])[2]
    assert (default.hidden, default.batch_size) == (256, 32)
    assert (paper.hidden, paper.batch_size, paper.lr, default.lr) == (256, 256, 7e-5, 3e-3)
    assert parse_train(["copy", "--hidden", "9", "--preset=paper"])[2] == replace(paper, hidden=9)
    published = parse_train(["ptb", "--preset", "paper", "--dni"])[2]
    assert {name: getattr(published, name) for name in PUBLISHED_DNI} == dict(PUBLISHED_DNI)
    assert parse_train(["copy", "--dni", "--context", "none"])[2].synthesizer == "linear"
    assert default.minutes == 10.0
    assert (
        parse_train(["copy", "--steps=5"])[2].minutes,
        parse_train(["copy", "--chars", "5"])[2].steps,
    ) == (
        None,
        None,
    )


def test_where_a_run_goes_without_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = make_text(tmp_path / "words.txt")
    arguments = [
        "train",
        "text",
        text,
        *SMALL,
        "--steps",
        5,
        "--dni",
        "--context",
        "next-tokens:2",
        "--seed",
        7,
    ]
    assert main([str(a) for a in arguments]) == 0
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["text-dni+next-tokens2-T5-seed7"]
    assert capsys.readouterr().out.endswith("-> runs/text-dni+next-tokens2-T5-seed7\n")
    assert "--resume" in failing(capsys, arguments)


# How long: in minutes, in updates and in its own unit, whatever the task


def made_up(monkeypatch):
    """The tasks whose files are not in every checkout, on data of the same kind."""
    random = np.random.default_rng(0)

    def examples(name, shape):
        def some(n):
            return random.integers(0, 256, (n, *shape), dtype=np.uint8), random.integers(0, 10, n)

        data = Examples(name, tuple("0123456789"), some(200), some(60), some(60))
        return lambda self, data_dir: data

    monkeypatch.setattr(MNIST, "load", examples("mnist", (1, 28, 28)))
    monkeypatch.setattr(CIFAR10, "load", examples("cifar10", (3, 32, 32)))
    corpus = Corpus.from_texts("ptb/char", *["the cat sat on a mat " * n for n in (300, 30, 30)])
    monkeypatch.setattr(PTB, "load", lambda self, data_dir: corpus)


@pytest.fixture
def endless():
    """Standard input that never ends."""
    before, source = os.dup(0), os.open("/dev/zero", os.O_RDONLY)
    os.dup2(source, 0)
    yield
    os.dup2(before, 0)
    for descriptor in (before, source):
        os.close(descriptor)


def small_run(name):
    """Flags of a small net, and how many symbols an update takes."""
    kind, shared = config_of(cli.TASKS[name]), ["--threads", "1", "--batch-size", "4", "--log-every", "1"]
    if issubclass(kind, RecurrentConfig):
        return [*shared, "--hidden", "8", "--embedding", "4", "--bptt", "5", "--accumulate", "2"], 40
    if issubclass(kind, FeedforwardConfig) or name == "surface":
        return [*shared, "--width", "8"], 4
    return [*shared, "--hidden", "8", "--bptt", "2"], 16


OWN_UNIT = {"chars": 81, "digits": 33, "epochs": None, "steps": 3}
"""So much of a task's own unit as three updates of `small_run` take; of epochs it depends on the data."""


@pytest.mark.parametrize("unit", ["steps", "minutes", "its own"])
@pytest.mark.parametrize("name", BUNDLED)
def test_how_long_every_task_trains(name, unit, tmp_path, monkeypatch, capsys, endless):
    made_up(monkeypatch)
    out, (words, per_update) = tmp_path / "run", small_run(name)
    monkeypatch.setattr("sys.argv", ["dni-rnn"])
    if unit == "its own":
        unit = config_of(cli.TASKS[name]).amount
        examples = {"addition": 2458}.get(name, 200)
        amount = {**OWN_UNIT, "epochs": 3 / (examples // 4)}[unit]
    else:
        amount = {"steps": 3, "minutes": 0.002}[unit]
    assert main(["train", name, *words, f"--{unit}", str(amount), "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    if name in ("copy", "repeat-copy"):  # windows end where episodes do
        assert summary["steps"] < summary["symbols"] < summary["steps"] * per_update
    else:
        assert summary["symbols"] == summary["steps"] * per_update
    if unit == "minutes":
        assert json.loads((out / "config.json").read_text())["budget"] == ["minutes", 0.002]
        assert 0.12 <= summary["seconds"] < 10
        assert summary["steps"] > 1
    else:
        assert summary["steps"] == 3


@pytest.mark.parametrize("name", [name for name in BUNDLED if name != "surface"])
def test_minutes_and_steps_are_one_too_many(name, capsys):
    said = failing(capsys, ["train", name, "--minutes", "1", "--steps", "1"])
    assert "give one of " in said
    assert "--minutes and --steps" in said


# Tasks of other people's packages


def install(folder, name, source):
    """Put a package with one task into `folder`, as an installer would."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{task.GROUP}]\n{name} = {name}:Theirs\n")


def test_a_task_of_another_package(tmp_path, monkeypatch, capsys):
    source = (
        "from dataclasses import dataclass\nfrom dni_rnn_tasks.recall import Recall\n\n"
        '@dataclass(frozen=True, kw_only=True)\nclass Theirs(Recall):\n    """What they do."""\n\n'
        '    twist: int = 1\n    """How far."""\n'
    )
    install(tmp_path, "theirs_works", source)
    monkeypatch.syspath_prepend(tmp_path)
    tasks = installed_tasks()
    assert set(tasks) >= {*BUNDLED, "theirs_works"}
    monkeypatch.setattr(cli, "TASKS", tasks)
    assert main(["tasks"]) == 0
    assert "What they do." in capsys.readouterr().out
    out = tmp_path / "run"
    words = ["--delay", "1", "--twist", "2", *SMALL, "--steps", "1", "--out", str(out)]
    assert main(["train", "theirs_works", *words]) == 0
    capsys.readouterr()
    assert main(["eval", str(out)]) == 0
    assert capsys.readouterr().out.startswith("recall/1 test: ")
    assert json.loads((out / "config.json").read_text())["task_options"]["twist"] == 2
    monkeypatch.undo()
    assert "its task 'theirs_works' is not installed; known: " in failing(capsys, ["eval", out])


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("import no_such_module_anywhere", id="missing dependency"),
        pytest.param("Ours = 1", id="missing name"),
        pytest.param("def broken(:", id="syntax error"),
        pytest.param("raise RuntimeError('no licence')", id="runtime error"),
        pytest.param("Theirs = undefined", id="name error"),
    ],
)
def test_a_broken_package_takes_no_other_task_away(source, tmp_path, monkeypatch, capsys):
    install(tmp_path, "theirs_broken", source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "theirs_broken", raising=False)
    tasks = installed_tasks()
    assert set(tasks) >= set(BUNDLED)
    assert "theirs_broken" not in tasks
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "theirs_broken" in captured.err


# Cores, estimators and synthesizers of other people's modules

THEIRS = """
import torch
from torch import nn
from dni_rnn import MLPSynthesizer, TruncatedBPTT


class Cell(nn.Module):
    output_leaf = None

    def __init__(self, input_size, hidden_size, num_layers):
        super().__init__()
        self.output_size = 2 * hidden_size
        self.first = nn.Linear(input_size, 2 * hidden_size)
        self.again = nn.Linear(2 * hidden_size, 2 * hidden_size)

    def initial_state(self, batch_size):
        return torch.zeros(batch_size, self.output_size)

    def forward(self, inputs, state):
        outputs = []
        for x in inputs:
            state = torch.tanh(self.first(x) + self.again(state))
            outputs.append(state)
        return torch.stack(outputs), state


class Half(TruncatedBPTT):
    def __init__(self, share=1.0):
        super().__init__()
        self.share = share

    def forward(self, model, windows, state, weight):
        return super().forward(model, windows, state, self.share * weight)


class Predictor(MLPSynthesizer):
    def __init__(self, state, context):
        super().__init__(state, [3], context=context)


not_a_core = dict
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    (tmp_path / "their_modules.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_modules", raising=False)


def test_a_core_an_estimator_and_a_synthesizer_of_another_package(theirs, tmp_path, capsys):
    """Trained, resumed and evaluated; the estimator with an option that counts."""
    bits = []
    for number, words in enumerate(
        (
            ["--dni", "--no-critic", "--synthesizer", "their_modules:Predictor"],
            ["--estimator", "their_modules:Half"],
            ["--estimator", "their_modules:Half,share=0.0", "--clip", "0"],
        )
    ):
        out = tmp_path / str(number)
        command = ["train", "recall", "--delay", "1", *SMALL, "--lr", "0.02", "--out", str(out)]
        command += ["--core", "their_modules:Cell", *words]
        assert main([*command, "--steps", "5"]) == 0
        assert main([*command, "--steps", "150", "--resume"]) == 0
        summary = json.loads((out / "summary.json").read_text())
        assert summary["steps"] == 150
        bits.append(summary["test_bpc"])
        capsys.readouterr()
        assert main(["eval", str(out)]) == 0
        assert f"{summary['test_bpc']:.4f} bpc" in capsys.readouterr().out
    assert max(bits[:2]) < bits[2] - 0.1, "what gets no gradient has learnt nothing"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--core", "no_such_module:Cell"], "--core no_such_module:Cell: cannot be imported (No module"),
        (["--core", "their_modules:Nothing"], "--core their_modules:Nothing: cannot be imported (module"),
        (["--core", "torch.nn:GRU"], "--core torch.nn:GRU: not a core; it must be an nn.Module with initial"),
        (
            ["--estimator", "full,wings=2"],
            "--estimator full,wings=2: got an unexpected keyword argument 'wings'",
        ),
        (
            ["--estimator", "their_modules:Half", "--restore", "0.1"],
            "--estimator their_modules:Half: got an unexpected keyword argument 'penalty'",
        ),
        (["--estimator", "no_such_module:E"], "--estimator no_such_module:E: cannot be imported (No module"),
        (
            ["--dni", "--no-critic", "--synthesizer", "no_such_module:S"],
            "--synthesizer no_such_module:S: cannot be imported (No module",
        ),
    ],
)
def test_what_another_package_does_not_have(words, said, theirs, tmp_path, capsys):
    assert said in failing(capsys, ["train", "recall", *words, "--out", tmp_path / "run"])
    assert not (tmp_path / "run").exists()


# Evaluate


def test_eval_is_exact_and_repeatable(trained, capsys):
    """The printed numbers are those of summary.json."""
    _, out = trained
    said = []
    for split in ("test", "valid"):
        assert main(["eval", str(out), "--split", split]) == 0
        said.append(capsys.readouterr().out)
    summary = json.loads((out / "summary.json").read_text())
    symbols = f"after {summary['best_symbols']:,} training characters"
    assert said == [
        f"text/words.txt test: {summary['test_bpc']:.4f} bpc {symbols}\n",
        f"text/words.txt valid: {summary['best_valid_bpc']:.4f} bpc {symbols}\n",
    ]


def copied(trained, folder):
    """The run and its text elsewhere, to be damaged."""
    text, out = trained
    (folder / "run").mkdir()
    for path in out.iterdir():
        (folder / "run" / path.name).write_bytes(path.read_bytes())
    (folder / "words.txt").write_bytes(text.read_bytes())
    config = json.loads((folder / "run" / "config.json").read_text())
    config["task_options"]["path"] = str(folder / "words.txt")
    (folder / "run" / "config.json").write_text(json.dumps(config))
    return folder / "words.txt", folder / "run"


def without(file):
    return lambda text, run: (run / file).unlink()


def contents(file, content):
    return lambda text, run: (run / file).write_text(content)


def rewritten(*words):
    return lambda text, run: make_text(text, words=words)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(without("config.json"), "config.json is missing", id="no config"),
        pytest.param(contents("config.json", "{"), "config.json: cannot be read", id="config is not JSON"),
        pytest.param(contents("config.json", "{}"), "config.json", id="config is empty"),
        pytest.param(contents("config.json", "[1]"), "config.json", id="config is a list"),
        pytest.param(without("best.safetensors"), "no checkpoint there", id="no best weights"),
        pytest.param(contents("best.safetensors", "not"), "not a checkpoint", id="best weights are text"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "sample"])
def test_a_damaged_run(command, damage, said, trained, tmp_path, capsys):
    text, run = copied(trained, tmp_path)
    damage(text, run)
    assert said in failing(capsys, [command, run])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(lambda text, run: text.unlink(), "no such file or folder", id="no text"),
        pytest.param(rewritten("zebra", "x"), "words.txt", id="other text"),
        pytest.param(rewritten("sonm", "thexy"), "words.txt", id="as many symbols"),
    ],
)
def test_a_run_whose_text_is_gone_can_only_write(damage, said, trained, tmp_path, capsys):
    text, run = copied(trained, tmp_path)
    expected = sampled(capsys, run, "--chars", 20)
    damage(text, run)
    assert said in failing(capsys, ["eval", run])
    assert sampled(capsys, run, "--chars", 20) == expected


def test_no_run_there(tmp_path, capsys):
    assert "no run there" in failing(capsys, ["eval", tmp_path / "nothing"])


def test_no_cuda_device(trained, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "use --device cpu or auto" in failing(capsys, ["eval", trained[1], "--device", "cuda"])


# Sample


def sampled(capsys, *arguments):
    assert main(["sample", *map(str, arguments)]) == 0
    text = capsys.readouterr().out
    assert text.endswith("\n")
    return text[:-1]


def test_sampling_is_decided_by_its_seed(trained, capsys):
    _, out = trained
    torch.manual_seed(1)
    first = sampled(capsys, out, "--seed", 3, "--chars", 50)
    torch.manual_seed(2)
    assert sampled(capsys, out, "--seed", 3, "--chars", 50) == first
    assert sampled(capsys, out, "--seed", 4, "--chars", 50) != first
    assert set(first) <= set("the cat sat on a mat")


@pytest.mark.parametrize("prompt", ["the cat", "t"])
@pytest.mark.parametrize("chars", [1, 40])
def test_length_and_prompt_of_a_sample(prompt, chars, trained, capsys):
    text = sampled(capsys, trained[1], "--prompt", prompt, "--chars", chars)
    assert text.startswith(prompt)
    assert len(text) == len(prompt) + chars
    assert len(sampled(capsys, trained[1], "--chars", chars)) == 1 + chars


def test_low_temperature_takes_the_likeliest(trained, capsys):
    """At a temperature near 0 the seed decides nothing, and each character is the model's first choice."""
    options = ["--prompt", "the ", "--chars", 30]
    texts = {
        sampled(capsys, trained[1], *options, "--temperature", temperature, "--seed", seed)
        for seed, temperature in enumerate((1e-6, 1e-6, 1e-310))
    }
    assert len(texts) == 1
    (text,) = texts
    run = load_run(trained[1], torch.device("cpu"))
    symbols = sorted(set(trained[0].read_text()))
    ids = torch.tensor([symbols.index(c) for c in text]).unsqueeze(1)
    with torch.no_grad():
        logits, _ = run.model(ids, run.model.initial_state(1))
    choices = "".join(symbols[int(i)] for i in logits[:, 0].argmax(dim=1))
    assert choices[3:-1] == text[4:]


def test_samples_follow_the_models_distribution(trained):
    """First characters after a prompt, at temperature 1, against the model's own probabilities."""
    run = load_run(trained[1], torch.device("cpu"))
    with torch.no_grad():
        symbols = sorted(set(trained[0].read_text()))
        logits, _ = run.model(torch.tensor([[symbols.index("t")]]), run.model.initial_state(1))
        expected = torch.softmax(logits[-1, 0], dim=0)
    draws = [sample(run.model, run.data, "t", 1, 1.0, seed)[1] for seed in range(400)]
    counts = torch.tensor([draws.count(symbol) for symbol in symbols]) / len(draws)
    assert (counts - expected).abs().max() < 4 * math.sqrt(0.25 / len(draws))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "the dog"], "'d' does not occur in the training text"),
        (["--prompt", "té"], "'é' does not occur"),
        (["--temperature", "0"], "--temperature must be positive, not 0.0"),
        (["--temperature", "-1"], "--temperature must be positive, not -1.0"),
        (["--temperature", "nan"], "--temperature must be positive, not nan"),
        (["--chars", "-1"], "--chars must not be negative, not -1"),
    ],
)
def test_samples_that_cannot_be_written(arguments, said, trained, capsys):
    assert said in failing(capsys, ["sample", trained[1], *arguments])


def test_no_sample_of_what_is_not_text(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "recall", *SMALL, "--steps", "1", "--out", str(out)]) == 0
    capsys.readouterr()
    assert "recall/8 is not text" in failing(capsys, ["sample", out])


def test_spaces_of_the_treebank(tmp_path, capsys):
    """Where `_` stands for a space, prompts and samples have spaces."""
    text = make_text(tmp_path / "words.txt")
    text.write_text(text.read_text().replace(" ", "_"))
    out = tmp_path / "run"
    assert main(["train", "text", str(text), *SMALL, "--steps", "40", "--lr", "0.02", "--out", str(out)]) == 0
    capsys.readouterr()
    written = sampled(capsys, out, "--prompt", "the cat ", "--chars", 100)
    assert written.startswith("the cat ")
    assert "_" not in written
    assert " " in written[8:]


def test_the_best_weights_are_used(trained, tmp_path, capsys):
    """Not those of checkpoint.safetensors; and the number of characters is theirs."""
    _, run = copied(trained, tmp_path)
    tensors, values = load_checkpoint(run / "best.safetensors")
    tensors["readout.weight"].zero_()
    tensors["readout.bias"].zero_()
    save_checkpoint(run / "best.safetensors", tensors, {**values, "symbols": 1234567})
    assert main(["eval", str(run)]) == 0
    bits = math.log2(len(tensors["readout.bias"]))
    assert (
        capsys.readouterr().out
        == f"text/words.txt test: {bits:.4f} bpc after 1,234,567 training characters\n"
    )
