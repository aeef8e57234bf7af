"""Rows of a batch in processes of their own: the same numbers as in one. Real processes, over gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from reference import close

from dni_rnn.cli import main
from dni_rnn.data.generated import EpisodeStream, GeneratedStream
from dni_rnn.distributed.data_parallel import RowsOf
from dni_rnn.training.checkpoint import load_checkpoint
from dni_rnn_tasks.recall import Recall
from dni_rnn_tasks.repeat import Copy

SMALL = [
    "--hidden",
    "8",
    "--embedding",
    "4",
    "--batch-size",
    "4",
    "--bptt",
    "5",
    "--lr",
    "0.01",
    "--threads",
    "1",
    "--log-every",
    "5",
    "--eval-every",
    "400",
    "--dni",
    "--context",
    "next-tokens:3",
    "--audit",
    "7",
]
PATH = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
"""With the tests, of which one has an estimator of its own."""
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "no", "dog")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    random, path = Random(0), tmp_path / "words.txt"
    path.write_text(" ".join(WORDS[int(random.random() * len(WORDS))] for _ in range(800))[:2000])
    return path


TORCHRUN = (
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
    "--nproc-per-node", "2",
)  # fmt: skip


def start(*command: str) -> subprocess.Popen[str]:
    """In a session of its own, so that a test can end all of it."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LOGLEVEL": "CRITICAL", "PYTHONPATH": PATH},
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code and what was written; nothing is left behind, whatever happens."""
    try:
        out, error = process.communicate(timeout=200)
        return process.returncode, out, error
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


# Every row of what a process sees is a row of the whole.


@pytest.mark.parametrize("task", [Recall(delay=3), Copy(symbols=2)], ids=["generated", "episodes"])
def test_the_rows_of_a_stream(task: Any) -> None:
    data = task.load(None)
    whole: GeneratedStream | EpisodeStream = data.stream("train", 6, 0)
    halves = [RowsOf(data.stream("train", 6, 0), slice(first, first + 3)) for first in (0, 3)]
    ended = 0
    for _ in range(60):
        window, parts = whole.window(4, 5), [half.window(4, 5) for half in halves]
        assert [part.scored for part in parts] == [window.scored] * 2
        for name in ("inputs", "targets"):
            together = torch.cat([getattr(part, name) for part in parts], dim=-1)
            assert torch.equal(together, getattr(window, name))
        for name in ("start", "end"):
            for field, values in getattr(window, name)._asdict().items():
                shares = [getattr(getattr(part, name), field) for part in parts]
                if values is None:
                    assert shares == [None, None]
                else:
                    assert torch.equal(torch.cat(shares, dim=-1), values)
        ended += window.end.done is not None
    assert (ended > 0) == isinstance(task, Copy)
    assert halves[0].state_dict() == whole.state_dict()


# Numbers: float64, so that nothing but rounding differs.

TOGETHER = """
import sys, torch
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
SMALL = dict(hidden=6, embedding=4, batch_size=6, bptt=3, lr=0.02, clip=0.05)
DNI = dict(dni=True, context="next-tokens:3", scale=1.0, restore=0.5, synthesizer_lr=0.05)
text = Text(path=Path(sys.argv[1]))
CASES = {
    "bptt": (text, {}),
    "accumulate": (text, dict(accumulate=2, core="gru")),
    "dni": (text, DNI | dict(audit=3)),
    "aux, not centred": (text, DNI | dict(aux=True, centre=False)),
    "one row each": (text, DNI | dict(batch_size=2)),
    "generated": (Recall(delay=3), DNI),
    "critic": (Recall(delay=3), DNI | dict(critic=True)),
    "episodes": (Copy(symbols=2), DNI | dict(synthesizer_reads="state")),
    "penalty alone": (text, dict(restore=0.5)),
    "full": (Copy(symbols=2), dict(estimator="full", accumulate=2, restore=0.5)),
    "memory": (text, dict(estimator="test_training:Remembering,share=0.2", restore=0.5)),
    "episodes, audited": (Copy(symbols=2), DNI | dict(audit=3, centre=False)),
}

def same(a, b, name):
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11, msg=lambda text: f"{name}: {text}")

with joined(60) as processes:
    for name, (task, settings) in CASES.items():
        config, data, cpu = RecurrentConfig(**{**SMALL, **settings}), task.load(None), torch.device("cpu")
        alone, together = RecurrentLearner(config, data, cpu), RowsLearner(config, data, cpu, processes)
        for _ in range(12):
            alone.update()
        if processes.rank:
            together.follow()
        else:
            for _ in range(12):
                together.update()
            tensors, values = together.state_dict()
            measured = together.metrics()
            together.end(0)
            assert ("memory" in name) == ("mean" in together.estimator.memory())
            expected, there = alone.state_dict()
            losses = [each["stream"].get("curriculum", {}).pop("loss", 0.0) for each in (values, there)]
            assert abs(losses[0] - losses[1]) < 1e-8, (name, losses)
            assert values == there, (name, values, there)
            assert tensors.keys() == expected.keys()
            for key in tensors:
                same(tensors[key], expected[key], f"{name} {key}")
            for key, value in alone.metrics().items():
                assert abs(measured[key] - value) <= 1e-8 * abs(value) + 1e-12, (name, key)
        theirs = alone.model.state_dict()
        for key, mine in together.model.state_dict().items():
            same(mine, theirs[key], f"{name} {key}")
        print(processes.rank, name)
"""


def test_two_processes_are_one(text: Path, tmp_path: Path) -> None:
    """Weights, optimizer, synthesizer statistics, trust, recurrent state and metrics, in every process."""
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    code, out, error = finish(start(*TORCHRUN, str(script), str(text)))
    assert code == 0, error
    assert out.count("episodes, audited") == 2
    assert out.count("memory") == 2


# Runs.


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_rows(a: Path, b: Path) -> None:
    assert len(rows(a)) == len(rows(b))
    for mine, theirs in zip(rows(a), rows(b), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"seconds", "symbols_per_second"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_a_run_goes_on_with_another_number_of_processes(text: Path, tmp_path: Path) -> None:
    """Stopped after 40 of 80 updates: two processes, then one; one, then two. As one alone all the way."""
    shared = ["train", "text", str(text), *SMALL]
    whole, falling, rising = (tmp_path / name for name in ("whole", "falling", "rising"))
    assert main([*shared, "--steps", "40", "--out", str(rising)]) == 0
    jobs = [
        start(*TORCHRUN, "-m", "dni_rnn", *shared, "--steps", "40", "--out", str(falling)),
        start(*TORCHRUN, "-m", "dni_rnn", *shared, "--steps", "80", "--out", str(rising), "--resume"),
    ]
    assert main([*shared, "--steps", "40", "--out", str(whole)]) == 0
    assert main([*shared, "--steps", "80", "--out", str(whole), "--resume"]) == 0
    said = []
    for job in jobs:
        code, out, error = finish(job)
        assert code == 0, error
        said.append(out)
    assert [out.count("\n") for out in said] == [1, 1], "one process speaks"
    assert main([*shared, "--steps", "80", "--out", str(falling), "--resume"]) == 0
    for out in (falling, rising):
        same_rows(out, whole)
        for file in ("checkpoint", "best"):
            tensors, others = (load_checkpoint(run / f"{file}.safetensors")[0] for run in (out, whole))
            assert tensors.keys() == others.keys()
            for name in tensors.keys() - {"random.cpu"}:
                close(tensors[name], others[name], rtol=1e-2, atol=1e-4)
        assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert json.loads((rising / "config.json").read_text())["config"]["processes"] == 2


def test_a_process_that_dies_and_one_that_is_stopped(text: Path, tmp_path: Path) -> None:
    """After `kill -9` of one all are started anew from the checkpoint; a signal saves and ends all."""
    out = tmp_path / "run"
    words = ["--processes", "2", "--save-every", "0", "--steps", "1000000", "--out", str(out)]
    process = start(sys.executable, "-m", "dni_rnn", "train", "text", str(text), *SMALL, *words)

    def saved() -> int:
        path = out / "checkpoint.safetensors"
        return load_checkpoint(path)[1]["step"] if path.exists() else 0

    def workers(name: str, value: str) -> list[int]:
        return [pid for pid in children(process.pid) if environment_of(pid).get(name) == value]

    try:
        wait_for(lambda: saved() > 0, process)
        step = saved()
        os.kill(workers("RANK", "1")[0], signal.SIGKILL)
        wait_for(lambda: workers("DNI_RNN_ATTEMPT", "1"), process)
        later = saved()
        wait_for(lambda: saved() > later, process)
        os.kill(process.pid, signal.SIGINT)
    finally:
        code, _, error = finish(process)
    assert code == 130, error
    assert later >= step
    assert "process 1 died (killed by SIGKILL); starting all anew (1 of 3)" in error
    assert error.count("saved; go on with the same command and --resume") == 1
    assert rows(out)[-1]["step"] <= load_checkpoint(out / "checkpoint.safetensors")[1]["step"]
    steps = [row["step"] for row in rows(out) if "bpc" in row]
    assert steps == list(range(5, steps[-1] + 1, 5)), "no row is lost, and none written twice"


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                found.append(int(path.name))
        except OSError:
            continue
    return found


def environment_of(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--batch-size 3", "--batch-size 3 cannot be shared equally by 2 processes: give a multiple"),
        ("--batch-size 4000", "a text of 1800 symbols is too short for 4000 rows"),
    ],
)
def test_bad_launches(words: str, said: str, text: Path, tmp_path: Path) -> None:
    """One line from process 0, exit code 2, nothing written."""
    out = tmp_path / "run"
    train = ["-m", "dni_rnn", "train", "text", str(text), *SMALL, *words.split(), "--out", str(out)]
    torchrun, ours = start(*TORCHRUN, *train), start(sys.executable, *train, "--processes", "2")
    (_, printed, error), (code, *own) = finish(torchrun), finish(ours)
    assert printed == ""
    assert "exitcode  : 2" in error  # of the processes; torchrun's own is 1, whatever theirs
    lines = [line for line in error.splitlines() if line.startswith("dni-rnn:")]
    assert len(lines) == 1, error
    assert said in lines[0]
    assert (code, own) == (2, ["", lines[0] + "\n"])
    assert not out.exists()
