"""Parts that correct themselves: what they learn from a message sums to its true gradient, whatever M is."""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path

import pytest
import torch
from processes import in_processes
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.func import functional_call

from dni_rnn.cli import main
from dni_rnn.distributed.chain import ChainPart
from dni_rnn.distributed.processes import Processes, joined
from dni_rnn.distributed.transport import GATHER, GRADIENT, MESSAGE
from dni_rnn.training.feedforward import loss_of
from dni_rnn.training.run_directory import Run
from dni_rnn_tasks.addition import Addition, AdditionConfig

TASK = Addition(bits=4)
STILL, MOVING = 1e-30, 1e-2
"""Learning rates of the net. The smaller one is lost against any weight in float64."""
COUNT = 12
"""Messages."""


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Recorded(ChainPart):
    """In float64; notes the weights of each forward pass, and sums the gradients that it makes steps with."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        draw = self.batches.batch
        self.batches.batch = lambda number: (draw(number)[0].double(), draw(number)[1])
        self.used, self.total, self.messages = {}, {}, {}
        self.record.optimizer.register_step_pre_hook(self.add)

    def add(self, *_):
        for name, p in self.part.named_parameters():
            if p.grad is not None:
                self.total[name] = self.total.get(name, 0.0) + p.grad

    def learn(self, x, targets):
        number = self.counters.step
        weights = {name: p.detach().clone() for name, p in self.part.named_parameters()}
        super().learn(x, targets)
        # Of a part that corrects itself those that it kept: it may have made a step just before.
        made = self.kept[number].made if number in self.kept else None
        self.used[number] = weights if made is None else {n: w.detach() for n, w in made.weights.items()}

    def outcome(self):
        assert not self.kept
        return self.used, self.total, dict(self.part.named_buffers()), self.lost


class Line:
    """One direction between two parts in one process. Whoever waits at its end lets the others work."""

    def __init__(self, others=lambda: False):
        self.packets, self.others = deque(), others

    def put(self, packet):
        self.packets.append(packet._replace(tensors=[tensor.clone() for tensor in packet.tensors]))

    def take(self, timeout, *serving):
        while not self.packets:
            assert self.others(), "all wait for each other"
        return self.packets.popleft()

    def poll(self):
        if self.packets and self.packets[0].kind in (MESSAGE, GRADIENT):
            return self.packets.popleft()
        return None


def chain(folder, config, order):
    """Parts in one process, the later ones at work in an order drawn from `order`."""
    size = len(config.cut_positions) + 1
    store, parts = HashStore(), []
    for rank in range(size):
        run = Run(folder / str(rank), "addition", TASK, config)
        data, device = TASK.load(None), torch.device("cpu")
        parts.append(Recorded(run, config, data, device, Processes(rank, size, rank, store)))

    def work(*ranks):
        """Let one of the parts do one thing; whether any could."""
        for rank in order.sample(ranks, len(ranks)):
            part = parts[rank]
            for link in order.sample([part.source, *part.awaited], 1 + len(part.awaited)):
                if link.packets:
                    packet = link.packets.popleft()
                    if packet.kind == MESSAGE:
                        part.counters.step = packet.number
                        part.take_message(packet)
                    elif packet.kind == GRADIENT:
                        part.take_gradient(packet)
                    else:
                        part._obey(packet)
                    return True
        return False

    for rank in range(size - 1):
        behind = range(rank + 1, size)
        forth, back = Line(), Line(lambda behind=behind: work(*behind))
        parts[rank].onward, parts[rank].awaited = [forth], [back]
        parts[rank + 1].source, parts[rank + 1].back = forth, [back]
        parts[rank + 1].weights = {0: Line()}
    return parts, lambda: work(*range(1, size))


def true_gradients(config, used):
    """Full backpropagation, message by message, at the weights that each part had; the statistics after."""
    fresh = Recorded(
        Run(Path(), "addition", TASK, config), config, TASK.load(None), torch.device("cpu"),
        Processes(0, len(used), 0, HashStore()),
    )  # fmt: skip
    totals = [{} for _ in used]
    for number in range(COUNT):
        x, targets = fresh.batches.batch(number)
        weights = [{n: w.requires_grad_() for n, w in part[number].items()} for part in used]
        for part, own in zip(fresh.parts, weights, strict=True):
            x = functional_call(part, own, (x,))
        loss_of(x, targets, config.smoothing or 0.0).backward()
        for total, own in zip(totals, weights, strict=True):
            for name, weight in own.items():
                total[name] = total.get(name, 0.0) + weight.grad
                weight.grad = None
    return totals, [dict(part.named_buffers()) for part in fresh.parts]


def compare(config, outcomes, rate):
    used = [outcome[0] for outcome in outcomes]
    assert all(list(numbers) == list(range(COUNT)) for numbers in used)
    expected, statistics = true_gradients(config, used)
    for (own, total, buffers, lost), true, after in zip(outcomes, expected, statistics, strict=True):
        assert lost == 0
        assert total.keys() == true.keys()
        for name, gradient in true.items():
            torch.testing.assert_close(total[name], gradient, rtol=1e-10, atol=1e-10)
            if name.endswith("weight"):  # batch normalisation takes away what a bias does
                assert gradient.abs().max() > 1e-4
                moved = (own[COUNT - 1][name] - own[0][name]).abs().max()
                assert (moved < 1e-25) if rate == STILL else (moved > 1e-3)
        for name, buffer in after.items():
            torch.testing.assert_close(buffers[name], buffer)


def settings(size, method, queue, rate, **changes):
    return AdditionConfig(
        method=method, queue=queue, lr=rate, model="mlp", width=16, layers=size + 1, synthesizer_lr=0.1,
        batch_size=16, decoupled=True, correct=True, threads=1, steps=COUNT, **changes,
    ).for_world_size(size).resolved  # fmt: skip


@pytest.mark.parametrize("rate", [STILL, MOVING])
@pytest.mark.parametrize(
    ("size", "method", "queue"),
    [(2, "none", 1), (2, "critic", 5), (3, "none", 4), (3, "dni", 7), (3, "cdni", 2), (4, "critic", 3)],
)
def test_what_each_part_learns_sums_to_backpropagation(tmp_path, size, method, queue, rate):
    """In an order of events that is drawn; M learns fast, and is wrong."""
    config, order = settings(size, method, queue, rate), random.Random(size * queue)
    parts, work = chain(tmp_path, config, order)
    most = 0
    for _ in range(COUNT):
        parts[0].update()
        for _ in range(order.randrange(size)):
            work()
        assert all(len(part.kept) <= queue for part in parts)
        most = max(most, len(parts[0].kept))
    assert most == queue
    parts[0].order(GATHER, COUNT)
    compare(config, [part.outcome() for part in parts], rate)


def test_without_correction_they_do_not(tmp_path):
    """Or the test above would prove nothing."""
    config = settings(3, "critic", 4, STILL)
    parts, _ = chain(tmp_path, config, random.Random(0))
    for part in parts:
        part.corrects = False
    for _ in range(COUNT):
        parts[0].update()
    parts[0].order(GATHER, COUNT)
    with pytest.raises(AssertionError, match="not close"):
        compare(config, [part.outcome() for part in parts], STILL)


def train_in_processes(rank, folder, config):
    with joined(60.0) as processes:
        run = Run(folder / str(rank), "addition", TASK, config)
        run.path.mkdir()
        part = Recorded(run, config, TASK.load(None), torch.device("cpu"), processes)
        part.connect()
        part.connect_weights()
        if rank:
            part.follow()
        else:
            for _ in range(COUNT):
                part.update()
            part.end(0)
        torch.save(part.outcome(), folder / f"{rank}.pt")


@pytest.mark.parametrize("method", ["none", "critic"])
def test_so_it_is_in_processes(tmp_path, method):
    config = settings(3, method, 3, MOVING, delay=2.0)
    ends = in_processes(3, train_in_processes, tmp_path, config)
    assert not any(end.error for end in ends), ends
    compare(config, [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)], MOVING)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--correct", "--correct does nothing without --decoupled"),
        ("--decoupled --processes 2 --correct --method bprop", "leave out one of the two"),
        ("--decoupled --processes 2 --correct --method local+critic", "has losses at its cuts"),
        ("--decoupled --processes 2 --method none", "add --correct"),
    ],
)
def test_where_nothing_can_be_corrected_one_line_says_so(arguments, message, capsys):
    assert main(["train", "addition", *arguments.split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
