"""Parts in processes of their own: messages and queues, what they learn, bad launches, and sudden deaths."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import in_processes

from dni_rnn.cli import main
from dni_rnn.distributed.chain import FORGET, ChainPart
from dni_rnn.distributed.processes import joined
from dni_rnn.distributed.train_parts import train_part
from dni_rnn.distributed.transport import GRADIENT, MESSAGE, SAVE, Mailbox, Packet, PacketLayout
from dni_rnn.errors import LostError, ReportedElsewhere, UsageError
from dni_rnn.training import checkpoint
from dni_rnn.training.loop import train
from dni_rnn.training.run_directory import Run
from dni_rnn_tasks.addition import Addition, AdditionConfig
from dni_rnn_tasks.surface import Surface, SurfaceConfig
from dni_rnn_tasks.surface_learner import SurfaceLearner

TASK = Addition(bits=4)
TYPES = [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float16]

# Packets and queues


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(TYPES)), max_size=4),
    st.integers(0, 2**40),
    st.tuples(*[st.floats(allow_nan=False)] * 3),
)
def test_a_packet_comes_out_as_it_went_in(shapes, number, notes):
    tensors = [(torch.rand(shape) * 5).to(dtype) for shape, dtype in shapes]
    layout = PacketLayout(tensors)
    came = layout.unpack(layout.pack(Packet(MESSAGE, number, tensors, notes, 1.5)))
    assert (came.kind, came.number, came.notes, came.sent) == (MESSAGE, number, notes, 1.5)
    for sent, received in zip(tensors, came.tensors, strict=True):
        assert sent.dtype == received.dtype
        assert torch.equal(sent, received)
    order = layout.unpack(layout.pack(Packet(SAVE, number)))
    assert (order.kind, order.number, list(order.tensors)) == (SAVE, number, [])


@given(st.integers(1, 4), st.lists(st.sampled_from(["message"] * 3 + ["order", "take"]), max_size=40))
def test_a_full_mailbox_loses_its_oldest_message_and_no_order(capacity, steps):
    box, expected = Mailbox(capacity), []
    for number, step in enumerate(steps):
        if step == "take":
            packet = box.take(0.0)
            assert (packet and packet.number) == (expected.pop(0)[0] if expected else None)
            continue
        box.put(Packet(SAVE if step == "order" else GRADIENT, number))
        expected.append((number, step))
        messages = [each for each in expected if each[1] == "message"]
        if len(messages) > capacity:
            expected.remove(messages[0])
    left = [packet.number for packet in iter(lambda: box.take(0.0), None)]
    assert left == [number for number, _ in expected]


def test_what_came_before_a_connection_was_lost_can_still_be_taken():
    box = Mailbox(2)
    box.put(Packet(MESSAGE, 7))
    box.fail(LostError("gone"))
    packet = box.take(0.0)
    assert packet is not None
    assert packet.number == 7
    with pytest.raises(LostError, match="gone"):
        box.take(None)
    with pytest.raises(LostError, match="gone"):
        box.put(Packet(MESSAGE, 8))


# What parts learn


def config(**changes) -> AdditionConfig:
    values = {"width": 16, "epochs": 20.0, "eval_every": 600, "log_every": 5, "threads": 1, "decoupled": True}
    return AdditionConfig(**(values | changes))  # type: ignore[arg-type]


def train_in_processes(rank, folder, settings):
    with joined(60.0) as processes:
        return train_part(Run(folder, "addition", TASK, settings.for_world_size(processes.size)), processes)


@pytest.mark.parametrize(
    ("size", "method", "queue"),
    [
        (2, "bprop", 4),
        (3, "bprop", 4),
        (3, "critic", 1),
        (2, "cdni", 1),
        (3, "cdni error", 1),
        (3, "none", 1),
        (3, "local", 4),
        (2, "local+critic", 1),
    ],
)
def test_parts_that_wait_are_the_same_net_in_one_process(tmp_path, size, method, queue):
    """Lock-step is backpropagation; with one message under way, synthetic gradients are as in one process,
    corrections alone are backpropagation, and local losses are theirs however many are under way.
    """
    method, _, synthesizer = method.partition(" ")
    correct = method == "none"
    cuts = "1" if size == 2 else "all"
    settings = config(method=method, synthesizer=synthesizer or None, queue=queue, cuts=cuts, correct=correct)
    alone = dataclasses.replace(settings, decoupled=False, queue=type(settings).queue, correct=False)
    if correct:
        alone = dataclasses.replace(alone, method="bprop")
    expected = train(Run(tmp_path / "alone", "addition", TASK, alone), quiet=True)
    summary, *others = in_processes(size, train_in_processes, tmp_path / "parts", settings)
    assert summary.error is None, summary
    assert [other.result for other in others] == [None] * (size - 1)
    assert summary.result["steps"] == expected["steps"] > 20
    for key in ("valid_error", "best_valid_error", "test_error"):
        assert summary.result[key] == expected[key]
    theirs, _ = checkpoint.load_checkpoint(tmp_path / "parts" / "best.safetensors")
    ours, _ = checkpoint.load_checkpoint(tmp_path / "alone" / "best.safetensors")
    # By place: an uncut net calls its layers otherwise.
    for our, their in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(their, our, rtol=1e-4, atol=1e-6)


class Witness(ChainPart):
    """Notes what it sent and learnt from."""

    def learn(self, x, targets):
        if self.rank:
            time.sleep(0.02)  # a slower part, on a busy machine too
        super().learn(x, targets)
        self.most = max(getattr(self, "most", 0), len(self.kept))
        if self.rank:
            self.served = getattr(self, "served", {})
            self.served[self.counters.step] = (float(x.sum()), int(targets.sum()))

    def take_gradient(self, packet):
        kept = self.kept.get(packet.number)
        if kept is not None:
            self.taught = getattr(self, "taught", {})
            gradient = packet.tensors[0]
            self.taught[packet.number] = (float(kept.message.sum()), int(kept.context.sum()))
            assert gradient.shape == kept.message.shape
        super().take_gradient(packet)


def witness(rank, folder, settings):
    with joined(60.0) as processes:
        settings = settings.for_world_size(processes.size).resolved
        run = Run(folder / f"part{rank}", "addition", TASK, settings)
        run.path.mkdir()
        learner = Witness(run, settings, TASK.load(None), torch.device("cpu"), processes)
        learner.connect()
        learner.connect_weights()
        if rank:
            learner.follow()
            return learner.served
        for _ in range(60):
            learner.update()
        stale = learner.stale
        learner.end(0)
        return learner.taught, learner.lost, learner.most, stale


@pytest.mark.parametrize(
    ("policy", "correct"), [("wait", False), ("drop-oldest", False), ("drop-oldest", True)]
)
def test_gradients_meet_the_messages_they_are_of_and_queues_stay_bounded(tmp_path, policy, correct):
    # What is lost is lost because of the delay, also on a machine that takes 20 ms for an update.
    delay = 2.0 if policy == "wait" else 200.0
    settings = config(queue=3, when_full=policy, delay=delay, correct=correct)
    first, last = in_processes(2, witness, tmp_path, settings)
    assert first.error is None, first
    taught, lost, most, stale = first.result
    served = last.result
    assert taught
    for number, seen in taught.items():
        assert seen == pytest.approx(served[number], abs=1e-4)
    assert len(taught) + lost == 60
    if policy == "wait":
        assert lost == 0
        assert most == max(stale) + 1 == 3
        assert list(served) == list(range(60))
    else:
        assert lost > 0
        assert 3 < most <= FORGET * 3
        assert list(served) == sorted(served)


def test_decoupled_parts_learn(tmp_path):
    outcomes = in_processes(2, train_in_processes, tmp_path / "run", config(epochs=400.0, layers=2, width=32))
    assert outcomes[0].error is None, outcomes[0]
    assert outcomes[0].result["test_error"] < 60  # chance: 97 percent
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["staleness"] <= row["staleness_max"] <= 1 for row in rows if "staleness" in row)
    assert any("staleness" in row for row in rows)
    assert main(["eval", str(tmp_path / "run")]) == 0
    last = [json.loads(line) for line in (tmp_path / "run/part1/metrics.jsonl").read_text().splitlines()]
    assert last[-1]["loss"] < last[0]["loss"]


# Bad launches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--processes 2", "leave out --processes"),
        ("--decoupled", "each part takes one: --processes 2"),
        ("--decoupled --processes 5", "3 layers cannot form 5 parts"),
        ("--decoupled --processes 3 --cuts 1", "--cuts 1 makes 2 parts, but 3"),
        ("--queue 3", "does nothing without --decoupled"),
        ("--decoupled --processes 2 --method none", "only the last part would learn"),
        ("--decoupled --processes 2 --unlock --model mlp", "leave out --decoupled"),
    ],
)
def test_what_cannot_be_cut_is_said_before_anything_starts(arguments, message, capsys):
    assert main(["train", "addition", *arguments.split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said


def command(rank, arguments):
    return main(["train", "addition", "--decoupled", *arguments[rank % len(arguments)].split()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr 0.01", "--lr 0.02"], "processes 0 and 1 differ in --lr: 0.01 and 0.02"),
        (["--cuts 1,2"], "--cuts 1,2 makes 3 parts, but 2 processes were started"),
        (["", "--lr -1"], "process 1: --lr must be positive"),
        (["--out /dev/null/x"], "cannot be written"),
    ],
)
def test_a_bad_launch_ends_with_one_error_of_process_0(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = in_processes(2, command, arguments)
    assert (first.result, second.result) == (2, 2), (first, second)
    assert message in first.stderr
    assert first.stderr.count("dni-rnn:") == 1
    assert "dni-rnn:" not in second.stderr


def fail_together(rank):
    def action():
        if rank == 1:
            raise UsageError("no data here")

    with joined(60.0) as processes:
        processes.together(action)


def test_a_failure_in_one_process_is_one_in_all():
    errors = [outcome.error for outcome in in_processes(3, fail_together)]
    assert str(errors[0]) == "process 1: no data here"
    assert [type(error) for error in errors] == [UsageError, ReportedElsewhere, ReportedElsewhere]


# Sudden deaths


TORCHRUN = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 --max-restarts 1"


class Training:
    """`dni-rnn train` in two processes, and the processes that were started."""

    def __init__(self, folder: Path, epochs: int, launcher: str = "", arguments: str = "") -> None:
        self.folder, self.mark = folder, str(uuid.uuid4())
        options = f"{arguments} --layers 2 --decoupled --queue 4 --save-every 0 --timeout 4 --threads 1"
        options += f" --epochs {epochs} --out {folder}"
        environment = {"MARK": self.mark, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}
        self.launcher = subprocess.Popen(
            [sys.executable, *launcher.split(), "-m", "dni_rnn", "train", "addition", *options.split()],
            env=os.environ | environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [self.launcher.pid, *self.parts().values()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.launcher.communicate()

    def parts(self, attempt: int | None = None) -> dict[int, int]:
        """Process numbers by rank."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "environ").read_bytes().decode().split("\0")
            except OSError:
                continue
            values = {name: value for name, _, value in (word.partition("=") for word in words)}
            if values.get("MARK") != self.mark or "RANK" not in values:
                continue
            if attempt in (None, int(values.get("DNI_RNN_ATTEMPT", 0))):
                found[int(values["RANK"])] = int(path.name)
        return found

    def rows(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def wait_for_rows(self, count: int) -> None:
        deadline = time.monotonic() + 300
        while self.rows() < count:
            assert self.launcher.poll() is None, self.launcher.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self) -> tuple[int, str]:
        said = self.launcher.communicate(timeout=300)[1]
        return self.launcher.returncode, said


linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


@linux
def test_a_part_that_is_killed_is_restarted_from_its_checkpoint(tmp_path):
    """By torchrun itself; what --processes starts is in the next test."""
    with Training(tmp_path / "run", epochs=60, launcher=TORCHRUN, arguments="--correct") as training:
        training.wait_for_rows(3)
        os.kill(training.parts()[1], signal.SIGKILL)
        code, said = training.end()
        assert code == 0, said
        assert not training.parts()
    run = Run.open(tmp_path / "run")
    steps = [row["step"] for row in run.rows() if "loss" in row]
    assert steps == sorted(set(steps))
    assert steps[-1] == json.loads(run.summary.read_text())["steps"] == 2280
    assert json.loads((run.path / "config.json").read_text())["config"]["resume"] is True


@linux
def test_a_part_that_hangs_is_named_and_ctrl_c_ends_all_with_checkpoints(tmp_path):
    with Training(tmp_path / "run", epochs=10_000, arguments="--processes 2") as training:
        training.wait_for_rows(3)
        os.kill(training.parts()[1], signal.SIGSTOP)
        deadline = time.monotonic() + 300
        while len(training.parts(attempt=1)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        training.wait_for_rows(training.rows() + 3)
        training.launcher.send_signal(signal.SIGINT)
        code, said = training.end()
        assert "process 1 hangs: no sign of life" in said, said
        assert "(--timeout 4)" in said
        assert "starting all anew (1 of 3)" in said
        assert code == 128 + signal.SIGINT, said
        assert "saved; go on with the same command and --resume" in said
        assert not training.parts()
    run = Run.open(tmp_path / "run")
    _, values = checkpoint.load_checkpoint(run.checkpoint)
    _, others = checkpoint.load_checkpoint(run.path / "part1" / f"{values['step']}.safetensors")
    assert values["step"] == others["step"] > 0


# An oracle


def train_surface(rank, folder, settings):
    with joined(60.0) as processes:
        return train_part(
            Run(folder, "surface", Surface(lumps=2), settings.for_world_size(processes.size)), processes
        )


def test_input_part_oracle_and_output_part_learn_a_surface(tmp_path):
    settings = SurfaceConfig(width=16, steps=600, batch_size=64, lr=1e-2, threads=1, eval_every=10_000)
    outcomes = in_processes(3, train_surface, tmp_path / "run", settings)
    assert outcomes[0].error is None, outcomes
    assert outcomes[0].result["test_rmse"] < 0.8  # saying the mean: 1
    assert (tmp_path / "run" / "surface.png").stat().st_size > 10_000
    assert main(["eval", str(tmp_path / "run")]) == 0
    # What the input part was told is what made it learn: without it, that part would be as it was.
    tensors, _ = checkpoint.load_checkpoint(tmp_path / "run" / "best.safetensors")
    torch.manual_seed(settings.seed)
    fresh = SurfaceLearner.build(settings, Surface(lumps=2).load(None)).state_dict()
    assert not torch.allclose(tensors["parts.0.0.weight"], fresh["parts.0.0.weight"], atol=0.05)


def test_the_surface_is_standardised_and_its_points_are_repeatable():
    data = Surface().load(None)
    _, y = data.grid("test")
    assert float(y.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(y.std()) == pytest.approx(1.0, abs=0.02)
    third, again, fourth = (data.batch(number, 5, 0, torch.device("cpu")) for number in (3, 3, 4))
    for a, b in zip(third, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(third[0], fourth[0])


def test_a_surface_takes_one_process_or_three(capsys):
    assert main(["train", "surface", "--processes", "2"]) == 2
    assert "in one process, or in three" in capsys.readouterr().err


# A recurrent net


def run_example(rank, windows, frozen):
    made = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "encoder_and_core.py"))
    with joined(60.0) as processes:
        return made["run"](processes, windows, frozen)


def test_an_encoder_learns_from_a_recurrent_net_in_another_process():
    shares = []
    for frozen in (False, True):
        encoder, core = in_processes(2, run_example, 1000, frozen)
        assert encoder.error is None, encoder
        shares.append(core.result)
    assert shares[0] > shares[1] + 0.1
