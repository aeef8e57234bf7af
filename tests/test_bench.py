"""The report of `dni-rnn bench`; its figures are not asserted."""

import re

import pytest
import torch

from dni_rnn.cli import main
from dni_rnn.experiments import bench
from dni_rnn.experiments.bench import METHODS, PLAIN, Size, learner, memory, plain_step, report, time_in_turns

TINY = Size(hidden=8, bptt=2, batch_size=4, device="cpu", threads=1, precision="float32")


def test_methods_take_turns_and_ratios_are_to_the_first():
    time, turns = [0.0], []

    def step(name, seconds):
        def work():
            time[0] += seconds
            turns.append(name)

        return work

    costs = time_in_turns(
        {"a": step("a", 0.5), "b": step("b", 2.0)}, rounds=3, block=2, clock=lambda: time[0]
    )
    assert costs == {"a": (500.0, 1.0), "b": (2000.0, 4.0)}
    assert "".join(turns) == "aabb" + 3 * "aaabbb"


def test_the_report_has_a_line_for_every_method():
    torch.set_num_threads(1)
    text = "".join(report([TINY], 1, 1, elsewhere=lambda function, *arguments: function(*arguments)))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    found = {row[2]: row for row in rows if row[0] == "8"}
    assert list(found) == [PLAIN, *METHODS]
    assert found[PLAIN][4] == "1.000"
    for row in found.values():
        per_second = float(row[6].replace(",", ""))
        assert per_second == pytest.approx(1e3 * TINY.symbols / float(row[3]), rel=0.05)
    shares = [int(share) for share in re.findall(r"(\d+) %", text)]
    assert len(shares) >= 7
    assert sum(shares) == pytest.approx(100, abs=4)


def test_both_sides_do_the_same_work():
    """The same parameters, and the same products: what a ratio compares."""
    sides = learner(TINY, METHODS["bptt"]), plain_step(TINY)
    sizes = sorted(tuple(p.shape) for p in sides[0].record.net)
    cells = dict(zip(sides[1].__code__.co_freevars, sides[1].__closure__ or (), strict=True))
    assert sizes == sorted(tuple(p.shape) for p in cells["parameters"].cell_contents)


def test_a_larger_net_needs_more_memory():
    """Each in a process of its own: a peak is never forgotten, nor that of the process it is started from."""
    large = Size(2048, 2, 4, "cpu", 1, "float32")
    held = torch.ones(2**28)  # a gigabyte, more than either needs
    assert held.sum() > 0
    assert bench._elsewhere(memory, TINY, PLAIN) < bench._elsewhere(memory, large, PLAIN)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--hidden 0", "--hidden must be positive"),
        ("--rounds 0", "--rounds must be positive"),
        ("--batch-size 1", "--batch-size at least 2"),
        ("--out {missing}/report.md", "cannot be written"),
    ],
)
def test_what_cannot_be_measured(words, said, tmp_path, capsys):
    assert main(["bench", *words.format(missing=tmp_path / "missing").split()]) == 2
    assert said in capsys.readouterr().err
