"""Traces in the training program: the numbers of a loop by hand, saved and resumed, shared out, refused."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import close
from test_data_parallel import TORCHRUN, finish
from test_data_parallel import start as start_process
from test_training import make_text, same_run, wait_for_step
from test_training import start as start_training
from torch import Tensor

from dni_rnn.cli import main, parse_train
from dni_rnn.config import RecurrentConfig
from dni_rnn.estimators.bptt import TruncatedBPTT
from dni_rnn.interface import Interface
from dni_rnn.penalty import StatePenalty
from dni_rnn.pytree import detach, flatten
from dni_rnn.traces import Traced
from dni_rnn.training.checkpoint import load_checkpoint
from dni_rnn.training.recurrent import RecurrentLearner
from dni_rnn.window import window_loss
from dni_rnn_tasks.recall import Recall
from dni_rnn_tasks.repeat import Copy
from dni_rnn_tasks.text import Text

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden": 6, "embedding": 4, "batch_size": 4, "bptt": 3, "lr": 0.02, "clip": 0.0, "trace": 8
}  # fmt: skip
DNI: dict[str, Any] = {"dni": True, "context": "next-tokens:3", "synthesizer_lr": 0.05, "scale": 1.0}
CASES: dict[str, dict[str, Any]] = {
    "bptt": {"task": "text"},
    "penalty": {"task": "text", "restore": 0.5},
    "decay": {"task": "text", "trace_decay": 0.9, "trace": 7},
    "GRU, two layers": {"task": "text", "core": "gru", "layers": 2, "restore": 0.5},
    "diagonal": {"task": "recall", "core": "diagonal", "restore": 0.5},
    "minGRU": {"task": "recall", "core": "mingru"},
    "tanh": {"task": "recall", "core": "rnn", "layers": 2},
    "episodes": {"task": "copy", "accumulate": 2},
    "drawn": {"task": "copy", "random_truncation": 0.6, "bptt": 5, "core": "mingru", "layers": 2},
    "all steps, diagonal": {"task": "text", "core": "diagonal,inner=0.9", "trace": "all"},
    "all steps, dni": {"task": "text", "trace": "all", "dni": True, "context": "next-tokens:2"},
    "one step": {"task": "text", "bptt": 1, "trace": 1, "restore": 0.5},
    "dni": {"task": "text", **DNI},
    "dni, no penalty": {"task": "text", **DNI, "restore": 0.0, "centre": False},
    "dni, accumulate": {"task": "text", **DNI, "accumulate": 2, "core": "gru", "layers": 2},
    "dni, episodes": {"task": "copy", **DNI, "synthesizer_reads": "state", "layers": 2},
    "dni, drawn": {"task": "copy", **DNI, "random_truncation": 0.6, "bptt": 5, "core": "diagonal"},
    "dni, recall": {"task": "recall", **DNI, "core": "mingru", "audit": 3},
    "aux, discounted": {"task": "recall", **DNI, "aux": True, "discount": 0.9},
    "critic": {"task": "recall", **DNI, "critic": True},
    "ahead": {"task": "copy", "lookahead": 4, "restore": 0.5},
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = make_text(tmp_path_factory.mktemp("text") / "words.txt", 260)  # several passes
    return {"text": Text(path=path), "recall": Recall(delay=3), "copy": Copy(symbols=2)}


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def learner(tasks: dict[str, Any], case: str, **settings: Any) -> RecurrentLearner:
    options = {**SMALL, **CASES[case], **settings}
    data = tasks[options.pop("task")].load(None)
    return RecurrentLearner(RecurrentConfig(**options), data, CPU)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("case", [name for name in CASES if name not in ("aux, discounted", "ahead")])
def test_a_run_has_the_gradients_of_a_loop_by_hand(case, tasks):
    """`Traced` as the docstring says, around the same core with the same weights."""
    trained = learner(tasks, case)
    config, model = trained.config, copy.deepcopy(trained.model)
    core: Any = model.core.rnn
    steps = None if config.trace == "all" else config.trace
    traced = Traced(core, steps, config.trace_decay, embedding=model.embedding)
    interface, restore = model.core.interface, config.resolved.restore
    penalty = StatePenalty(restore) if restore else None
    state = model.initial_state(config.batch_size)
    reached, lengths, ended = 0.0, set(), 0
    for _ in range(40):
        model.load_state_dict(trained.model.state_dict())
        if interface is not None and config.audit:
            trained._audit()  # moves the trust, which belongs to the weights
            model.load_state_dict(trained.model.state_dict())
        windows, fetch = [], trained.stream.window

        def fetched(steps: int, context: int, windows: Any = windows, fetch: Any = fetch) -> Any:
            windows.append(fetch(steps, context))
            return windows[-1]

        trained.stream.window = fetched
        trained.config = _unaudited(config)
        trained.update()
        del trained.stream.window
        model.zero_grad()
        for window in windows:
            lengths.add(len(window.inputs))
            ended += window.start.done is not None
            state = detach(model.reset(state, window.start.done))
            if interface is not None:
                state = interface.receive(state, window.start.context, window.start.done)
            elif penalty is not None:
                state = penalty.measure(state, window.start.done)
            output, state = traced(window.inputs, state, window.start.done)
            loss = config.weight * window_loss(model.readout(output), window.targets)
            if interface is not None:
                loss = loss + interface.send(state, window.end.context, window.end.done)
            if penalty is not None:
                rms = None if interface is None else interface.target_rms()
                loss = loss + penalty(state, window.end.done, rms=rms)
            loss.backward()
        wanted = {name: p.grad for name, p in model.named_parameters()}
        for name, parameter in trained.model.named_parameters():
            close(parameter.grad, wanted[name], rtol=1e-10, atol=1e-13)
        close(flatten(trained.state)[0], [leaf.detach() for leaf in flatten(state)[0]])
        own = trained.estimator
        assert isinstance(own, TruncatedBPTT)
        if own.penalty is not None and penalty is not None and interface is None:
            close(own.penalty.mean_square, penalty.mean_square)
        reached = max(reached, *(float(t.abs().max()) for t in traced.named_state().values()))
    assert reached > 0
    assert penalty is None or interface is not None or penalty.count > 0
    assert ended or CASES[case]["task"] == "recall"
    if CASES[case]["task"] == "copy":
        assert len(lengths) > 1


def _unaudited(config: RecurrentConfig) -> RecurrentConfig:
    changed = copy.copy(config)
    object.__setattr__(changed, "audit", 0)
    return changed


@every_case
def test_a_trace_changes_what_is_learnt_and_none_changes_nothing(case, tasks):
    """trace=0 is the estimator that knows of no trace, bit for bit."""
    with_it, without = learner(tasks, case), learner(tasks, case, trace=0, trace_decay=1.0)
    plain = learner(tasks, case, trace=0, trace_decay=1.0)
    options: dict[str, Any] = {"penalty": plain.estimator.penalty}
    if CASES[case].get("dni"):
        options |= {"discount": plain.config.discount, "aux": plain.estimator.aux}
    if "lookahead" in CASES[case]:
        options |= {"steps": plain.config.lookahead}
    plain.estimator = type(plain.estimator)(**options)
    plain.estimator.begin(plain.model, 4)
    assert not without.estimator.memory()
    for _ in range(15):
        for each in (with_it, without, plain):
            each.update()
    ends = [dict(each.model.named_parameters()) for each in (with_it, without, plain)]
    assert all(torch.equal(ends[1][name], ends[2][name]) for name in ends[1])
    weights = [name for name in ends[0] if name.startswith("core.rnn")]
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in weights)


def everything(trained: RecurrentLearner) -> tuple[dict[str, Tensor], Any]:
    tensors, values = trained.state_dict()
    return {name: t.clone() for name, t in tensors.items()}, json.loads(json.dumps(values))


@every_case
def test_it_goes_on_bit_for_bit(case, tasks):
    """The trace, and what the interface has sent, are in a checkpoint; saving changes nothing."""
    one, saved, resumed, forgetful = (learner(tasks, case) for _ in range(4))
    for _ in range(11):
        one.update()
        saved.update()
    for other in (resumed, forgetful):
        for _ in range(2):
            other.update()
        other.load_state_dict(*everything(saved))
    assert any(name.startswith("memory.trace.") for name in everything(saved)[0])
    forgetful.estimator.begin(forgetful.model, 4)
    for _ in range(9):
        for each in (one, saved, resumed, forgetful):
            each.update()
    (wanted, there), *others, (lost, _) = (everything(each) for each in (one, saved, resumed, forgetful))
    told = CASES[case].get("dni") or "lookahead" in CASES[case]
    assert bool([name for name in wanted if name.startswith("memory.sent.")]) == bool(told)
    for got, values in others:
        assert values == there
        assert got.keys() == wanted.keys()
        for name in wanted.keys() - {"random.cpu"}:
            assert torch.equal(got[name], wanted[name]), name
    weights = [name for name in wanted if name.startswith("model.core.rnn")]
    assert any(not torch.equal(lost[name], wanted[name]) for name in weights)


@pytest.mark.parametrize("case", ["bptt", "drawn", "dni, drawn", "ahead"])
def test_wherever_it_was_stopped(case, tasks):
    """The first window afterwards may be of another length than the first of all."""
    one, saves, lengths = learner(tasks, case), [], []
    for _ in range(30):
        saves.append(everything(one))
        one.update()
    wanted, _ = everything(one)
    fetch = RecurrentLearner._windows
    for number in range(12, 28):
        resumed = learner(tasks, case)
        resumed.load_state_dict(*saves[number])
        lengths.append(len(fetch(resumed)[0][0].inputs))
        resumed.load_state_dict(*saves[number])
        for _ in range(30 - number):
            resumed.update()
        got, _ = everything(resumed)
        for name in wanted.keys() - {"random.cpu"}:
            assert torch.equal(got[name], wanted[name]), (number, name)
    assert len(set(lengths)) > 1


# Real processes.


def test_a_process_is_killed_and_its_run_resumed(tmp_path):
    text = make_text(tmp_path / "words.txt", 4000)
    command = ["train", "text", str(text), "--hidden", "8", "--embedding", "4", "--batch-size", "4"]
    command += ["--bptt", "3", "--lr", "0.01", "--threads", "1", "--log-every", "10", "--save-every", "0"]
    command += [
        "--eval-every",
        "2000",
        "--steps",
        "300",
        "--trace",
        "8",
        "--dni",
        "--context",
        "next-tokens:3",
    ]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    out, log = tmp_path / "run", tmp_path / "log"
    process = start_training([*command, "--out", str(out)], log)
    wait_for_step(process, out, 60, log)
    process.kill()
    assert process.wait(120) == -signal.SIGKILL, log.read_text()
    assert not (out / "summary.json").exists()
    assert main([*command, "--out", str(out), "--resume"]) == 0
    same_run(out, tmp_path / "whole")
    tensors, _ = load_checkpoint(out / "checkpoint.safetensors")
    assert any(t.any() for name, t in tensors.items() if name.startswith("memory.trace."))


TOGETHER = """
import json, sys, torch
from pathlib import Path
from dni_rnn.config import RecurrentConfig
from dni_rnn.distributed.data_parallel import RowsLearner
from dni_rnn.distributed.processes import joined
from dni_rnn.training.recurrent import RecurrentLearner
from dni_rnn_tasks.recall import Recall
from dni_rnn_tasks.repeat import Copy
from dni_rnn_tasks.text import Text

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
CASES = json.loads(sys.argv[2])
TASKS = {"text": Text(path=Path(sys.argv[1])), "recall": Recall(delay=3), "copy": Copy(symbols=2)}
CPU = torch.device("cpu")

def same(a, b, name):
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11, msg=lambda text: f"{name}: {text}")

with joined(60) as processes:
    for name, settings in CASES.items():
        data = TASKS[settings.pop("task")].load(None)
        config = RecurrentConfig(**settings)
        alone, other = RecurrentLearner(config, data, CPU), RecurrentLearner(config, data, CPU)
        together, resumed = (RowsLearner(config, data, CPU, processes) for _ in range(2))
        for _ in range(5):
            alone.update()
        # One process, then two; two, then one.
        tensors, values = alone.state_dict()
        saved = {key: t.clone() for key, t in tensors.items()}, json.loads(json.dumps(values))
        resumed.load_state_dict(*saved)
        for _ in range(6):
            alone.update()
        wanted, _ = alone.state_dict()
        if processes.rank:
            together.follow()
            resumed.follow()
        else:
            for _ in range(5):
                together.update()
            tensors, values = together.state_dict()
            other.load_state_dict({key: t.clone() for key, t in tensors.items()}, values)
            for _ in range(6):
                together.update()
            tensors, _ = together.state_dict()
            together.end(0)
            found = [tensors]
            for _ in range(6):
                other.update()
                resumed.update()
            found += [other.state_dict()[0], resumed.state_dict()[0]]
            resumed.end(0)
            assert any(key.startswith("memory.trace.") for key in wanted)
            for each in found:
                assert each.keys() == wanted.keys()
                for key in wanted:
                    same(each[key], wanted[key], f"{name} {key}")
        print(processes.rank, name, flush=True)
"""


def test_two_processes_are_one(tasks, tmp_path):
    """All of a run with its trace; and a run goes on with one more process, or one less."""
    shared = {}
    for name in (
        "penalty",
        "GRU, two layers",
        "diagonal",
        "episodes",
        "dni",
        "dni, drawn",
        "critic",
        "ahead",
    ):
        shared[name] = {**SMALL, "clip": 0.05, **CASES[name]}
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    code, out, error = finish(
        start_process(*TORCHRUN, str(script), str(tasks["text"].path), json.dumps(shared))
    )
    assert code == 0, error
    assert out.count("ahead") == 2


# The command line.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--core", "diagonal,inner=0.9,outer=0.5"],
            "--core diagonal,inner=0.9,outer=0.5: inner and outer must",
        ),
        (["--core", "diagonal,radius=0.9"], "--core diagonal,radius=0.9: got an unexpected keyword argument"),
        (["--trace", "-1"], "--trace must not be negative"),
        (["--trace", "8", "--trace-decay", "2"], "--trace-decay must lie between 0 and 1, not 2.0"),
        (["--trace-decay", "0.5"], "--trace-decay does nothing without --trace; add --trace 32"),
        (["--trace", "8", "--core", "test_training:Forgetful"], "Forgetful does not say how it is traced"),
        (
            ["--trace", "8", "--core", "test_training:Forgetful", "--dni"],
            "--trace 8 with --core test_training",
        ),
        (["--trace", "8", "--estimator", "full"], "--estimator full"),
        (["--trace", "8", "--estimator", "test_training:Remembering,share=0.2"], "unexpected keyword"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(words, message, tmp_path, capsys):
    assert main(["train", "recall", *words, "--steps", "2", "--out", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not captured.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ([], "bptt"),
        (["--trace", "8"], "bptt+trace"),
        (["--trace", "8", "--restore", "0.1"], "bptt+restore+trace"),
        (["--trace", "8", "--dni"], "dni+next-tokens:8+trace"),
        (["--trace", "8", "--dni", "--context", "none"], "dni-online+trace"),
        (["--trace", "0", "--dni"], "dni+next-tokens:8"),
    ],
)
def test_what_it_is_called(words, method):
    assert parse_train(["ptb", *words])[2].method == method


# A stream that comes.

STREAM = ("the cat sat on a mat and saw no dog but an owl; " * 30).encode()
LIVE = [
    "train", "live", "--hidden", "8", "--embedding", "4", "--batch-size", "1", "--bptt", "1",
    "--log-every", "50", "--eval-every", "400", "--threads", "1",
]  # fmt: skip


@pytest.fixture
def piped(tmp_path: Path) -> Iterator[Callable[[bytes], None]]:
    before = os.dup(0)

    def put(data: bytes) -> None:
        (tmp_path / "input").write_bytes(data)
        with open(tmp_path / "input", "rb") as file:
            os.dup2(file.fileno(), 0)

    yield put
    os.dup2(before, 0)
    os.close(before)


def test_a_stream_is_learnt_strictly_online(tmp_path, piped):
    """A window of one step is learnt when its target has come, and nothing else is waited for."""
    found = {}
    for name, words in (("plain", []), ("trace", ["--trace", "8"])):
        piped(STREAM)
        assert main([*LIVE, "--lag", "0", *words, "--out", str(tmp_path / name)]) == 0
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())
    assert [found[name]["method"] for name in found] == ["bptt", "bptt+trace"]
    assert found["plain"]["symbols"] == found["trace"]["symbols"] == len(STREAM) - 1
    assert found["trace"]["test_bpc"] != found["plain"]["test_bpc"]
    _, task, config = parse_train(["live", "--lag", "0", "--trace", "8"])
    assert (config.context_window, config.lag, config.resolved) == (0, 0, config)
    assert task.load(None) is not None
    _, _, config = parse_train(["live", "--lag", "0", "--trace", "8", "--dni"])
    assert (config.context_window, config.method) == (0, "dni-online+trace")


def test_a_stream_is_stopped_and_resumed_with_its_trace(tmp_path, piped):
    """What had come is in the checkpoint, the trace of it too."""
    piped(STREAM)
    assert main([*LIVE, "--lag", "0", "--trace", "8", "--chars", "1000", "--out", str(tmp_path / "a")]) == 0
    for number, chars in enumerate(("437", "1000")):
        piped(STREAM if not number else b"")
        more = [*LIVE, "--lag", "0", "--trace", "8", "--chars", chars, "--out", str(tmp_path / "b")]
        assert main([*more, *["--resume"] * number]) == 0
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.safetensors")[0] for name in "ab")
    assert one.keys() == two.keys()
    assert any(name.startswith("memory.trace.") for name in one)
    for name in one.keys() - {"recent"}:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize(
    ("lag", "message"), [("3", "--lag 3 does nothing without --dni"), ("-1", "negative")]
)
def test_a_lag_that_nothing_is_told_of_is_refused(lag, message, tmp_path, capsys):
    words = ["train", "live", "--lag", lag, "--trace", "8", "--out", str(tmp_path / "run")]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_interface_is_asked_to_keep_what_it_sends_only_beside_a_trace(tasks):
    for trace in (0, 8):
        trained = learner(tasks, "dni", trace=trace)
        trained.update()
        interface = trained.model.core.interface
        assert isinstance(interface, Interface)
        assert (interface.sent is not None) == bool(trace)
