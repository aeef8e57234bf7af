"""The demo, end to end on a little text, and the sentence it ends with."""

from dataclasses import replace

import pytest

from dni_rnn.cli import main
from dni_rnn.experiments import demo
from dni_rnn.experiments.compare import RunSoFar
from dni_rnn.experiments.demo import METHODS, RECALL_METHODS, recall_verdict, verdict
from dni_rnn.training.recurrent import SAMPLED


def record(test, seconds, bptt=2):
    return RunSoFar("", "", "", bptt, 1000, seconds, [], test)


@pytest.mark.parametrize(
    ("tests", "told"),
    [
        ((2.0, 1.95, 1.8), "lowered the test BPC of T=2 by 0.050, at 1.5 times its training time; "
                           "that is 25% of what T=20 gains (0.200)."),
        ((2.0, 2.05, 1.8), "did not help: it raised the test BPC of T=2 by 0.050, at 1.5 times its "
                           "training time; T=20 lowered it by 0.200."),
        ((2.0, 2.004, 1.8), "made no clear difference to the test BPC of T=2 (+0.004), at 1.5 times its "
                            "training time; T=20 lowered it by 0.200."),
        ((2.0, 1.996, 2.1), "made no clear difference to the test BPC of T=2 (-0.004), at 1.5 times its "
                            "training time; T=20 was no better than T=2 itself (+0.100)."),
        ((2.0, 1.9, 2.0), "lowered the test BPC of T=2 by 0.100, at 1.5 times its training time; "
                          "T=20 was no better than T=2 itself (+0.000)."),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_numbers(tests, told):
    short, trace, long = tests
    sentence = verdict(record(short, 20.0), record(trace, 30.0), record(long, 5.0, bptt=20))
    assert sentence == f"In these runs, one seed each, a trace {told}"


def test_the_verdict_on_recall():
    said = recall_verdict(record(1.99, 5.0), record(0.9, 9.0), record(0.001, 9.0))
    assert "chance truncated BPTT leaves 1.99, a trace" in said
    assert "what comes, 0.90, and a synthetic gradient" in said
    assert said.endswith("recalled, 0.00.")


def test_a_demo_and_a_second_one_in_the_same_place(tmp_path, capsys, monkeypatch):
    out = tmp_path / "demo"
    for name, config in RECALL_METHODS.items():
        monkeypatch.setitem(demo.RECALL_METHODS, name, replace(config, chars=640, eval_every=640))
    assert main(["demo", "--out", str(out), "--chars", "2000"]) == 0
    printed = capsys.readouterr().out
    table = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    assert [line[0].strip() for line in table[2:5]] == list(RECALL_METHODS)
    assert [line[0].strip() for line in table[7:]] == list(METHODS)
    assert "unfinished" not in printed
    assert "In these runs, one seed each, a trace" in printed
    assert len(printed.partition(" writes:\n")[2]) > SAMPLED
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["demo.png", "recall.png", *METHODS, *RECALL_METHODS]
    )

    (out / "mine.txt").write_text("not the demo's")
    assert main(["demo", "--out", str(out), "--chars", "1000"]) == 0
    assert (out / "mine.txt").read_text() == "not the demo's"
    assert "1,280 |" in capsys.readouterr().out
