"""Files that are not what they were, or not what we would have written: one line, or the right answer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from dni_rnn.cli import main
from dni_rnn.data.labelled import Examples
from dni_rnn.data.task import Corpus, content_of
from dni_rnn.training.checkpoint import load_checkpoint, save_checkpoint
from dni_rnn.training.inference import load_run
from dni_rnn.training.recurrent import evaluate
from dni_rnn_tasks.recall import Recall
from dni_rnn_tasks.text import Text

TINY = "--hidden 8 --embedding 4 --batch-size 4 --bptt 4 --threads 1 --device cpu --log-every 5".split()  # noqa: SIM905
TEXT = "she sells sea shells by the sea shore, and the shells she sells are sea shells, I am sure.\n" * 60


def failing(capsys, *words) -> str:
    """The one line on standard error of a command that the user can mend."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("dni-rnn: ")
    return line


def train(text: Path, out: Path, steps: int, *words) -> int:
    words = [str(word) for word in words]
    return main(["train", "text", str(text), *TINY, "--steps", str(steps), *words, "--out", str(out)])


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Data that changed under a run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "sea.txt").write_text(TEXT)
    assert train(folder / "sea.txt", folder / "out", 10) == 0
    return folder / "sea.txt", folder / "out"


def moved(run, folder: Path) -> tuple[Path, Path]:
    """A copy of the text and of its run that may be damaged; the run names its text by a path of its own."""
    shutil.copy(run[0], folder / "sea.txt")
    shutil.copytree(run[1], folder / "out")
    about = json.loads((folder / "out" / "config.json").read_text())
    about["task_options"]["path"] = str(folder / "sea.txt")
    (folder / "out" / "config.json").write_text(json.dumps(about))
    return folder / "sea.txt", folder / "out"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(lambda text: text[: len(text) // 3], "5,460 symbols or examples then, 1,82", id="cut"),
        pytest.param(lambda text: text[:30], "give a longer text", id="too short"),
        pytest.param(lambda text: text + text[:1], "5,460 symbols or examples then, 5,461 now", id="longer"),
        pytest.param(lambda text: text[:-2] + ",\n", "changed inside", id="one symbol of the test split"),
        pytest.param(lambda text: text[1:] + text[0], "changed inside", id="turned round"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(change, said, run, tmp_path, capsys):
    text, out = moved(run, tmp_path)
    text.write_text(change(TEXT))
    before = held(out)
    capsys.readouterr()
    for command in (lambda: train(text, out, 20, "--resume"), lambda: main(["eval", str(out)])):
        assert command() == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert held(out) == before
    text.write_text(TEXT)
    assert train(text, out, 20, "--resume") == 0


def test_the_content_of_data_is_all_of_it():
    """By length and hash, whatever way the arrays lie in memory; nothing where nothing was loaded."""
    numbers = np.arange(24, dtype=np.uint8).reshape(6, 4)
    splits: list[Any] = [(numbers[i : i + 2], np.array([i, 1])) for i in (0, 2, 4)]

    def content(splits: list[Any], name: str = "x") -> Any:
        return content_of(Examples(name, ("a",), splits[0], splits[1], splits[2]))

    expected = content(splits)
    assert expected["length"] == 6
    assert content(splits, "y") == expected
    assert content([(np.asfortranarray(inputs), targets) for inputs, targets in splits]) == expected
    for split in range(3):
        for part in range(2):
            other = [tuple(array.copy() for array in pair) for pair in splits]
            other[split][part].flat[-1] += 1
            assert content(other) != expected
    assert content([(numbers[:0], numbers[:0, 0])] * 3) is None
    assert content_of(Recall().load(None)) is None


def test_a_checkpoint_says_itself_what_it_was_trained_on(run, tmp_path, capsys):
    """Also where config.json comes from a version that did not."""
    text, out = moved(run, tmp_path)
    about = json.loads((out / "config.json").read_text())
    del about["content"]
    (out / "config.json").write_text(json.dumps(about))
    text.write_text(TEXT[:-2] + ",\n")
    assert train(text, out, 20, "--resume") == 2
    assert "changed inside" in capsys.readouterr().err


def test_a_mark_at_the_beginning_of_a_text_is_no_symbol(tmp_path):
    """Editors on Windows put it there, in each file of a folder."""
    for name, mark in {"plain": "", "marked": "\ufeff"}.items():
        (tmp_path / name).mkdir()
        for part in "ab":
            (tmp_path / name / f"{part}.txt").write_text(mark + TEXT[:2000], encoding="utf-8")
    plain, marked = (Text(path=tmp_path / name).load(None) for name in ("plain", "marked"))
    assert plain.symbols == marked.symbols
    assert np.array_equal(plain.train, marked.train)
    as_bytes = Text(path=tmp_path / "marked", symbols="bytes").load(None)
    assert sum(map(len, (as_bytes.train, as_bytes.valid, as_bytes.test))) == 2 * (2000 + 3)


def test_paths_that_lead_nowhere(tmp_path, capsys, monkeypatch):
    """Links that lead round, and the empty path of a variable that is not set: not the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "round").symlink_to("round")
    for words in (["train", "text", "round"], ["compare", "round"], ["sweep", "round"], ["eval", "round"]):
        assert "round" in failing(capsys, *words)
    for words in (
        ["train", "text", ""],
        ["train", "text", "a.txt", "--out", ""],
        ["train", "text", "a.txt", "--out="],
        ["eval", ""],
    ):
        assert "is a shell variable not set" in failing(capsys, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "round"]


# Another text than the run's own


def test_a_run_meets_symbols_that_training_has_not_got(tmp_path, capsys):
    (tmp_path / "t.txt").write_text(TEXT + "THE END 🙂\n")
    assert train(tmp_path / "t.txt", tmp_path / "out", 5) == 0
    assert "7 symbols of validation and test are unknown to it" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["unknown_symbols"] == 7
    assert "unknown" not in summary["sample"]["text"]
    (tmp_path / "o.txt").write_text("she Sells\n" * 30)
    assert main(["eval", str(tmp_path / "out"), "--file", str(tmp_path / "o.txt")]) == 0
    assert capsys.readouterr().out.startswith("text/o.txt (300 symbols, 30 unknown to the run): ")


def test_the_score_elsewhere_is_that_of_what_the_run_knows(run, tmp_path, capsys):
    """All of the file counts, and what a run without an unknown symbol leaves out is said."""
    _, out = run
    (tmp_path / "same.txt").write_text(TEXT[:500])
    (tmp_path / "more.txt").write_text("Ω" + TEXT[:250] + "ΩΩ" + TEXT[250:500])
    capsys.readouterr()
    said = []
    for name in ("same", "more"):
        assert main(["eval", str(out), "--file", str(tmp_path / f"{name}.txt")]) == 0
        said.append(capsys.readouterr().out)
    assert said[0].startswith("text/same.txt (500 symbols, 0 unknown to the run): ")
    assert said[1].startswith("text/more.txt (500 symbols, 3 unknown to the run, left out): ")
    assert said[0].partition(": ")[2] == said[1].partition(": ")[2]
    loaded = load_run(out, torch.device("cpu"))
    symbols = sorted(set(TEXT))
    numbers = np.array([symbols.index(c) for c in TEXT[:500]], np.uint8)
    data = Corpus("t", tuple(symbols), numbers, numbers, numbers)
    bpc = evaluate(loaded.model, data, "test", torch.device("cpu"))
    assert f": {bpc:.4f} bpc after " in said[0]


def test_a_run_is_carried_away(run, tmp_path, monkeypatch, capsys):
    """Without its text it writes; with it in another folder it is evaluated; one without it is another."""
    text, out = run
    assert main(["eval", str(out)]) == 0
    expected = capsys.readouterr().out
    shutil.copytree(out, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    about["task_options"]["path"] = "gone/sea.txt"
    (tmp_path / "out" / "config.json").write_text(json.dumps(about))
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "out", "--chars", "30"]) == 0
    (tmp_path / "data").mkdir()
    shutil.copy(text, "data/sea.txt")
    capsys.readouterr()
    assert main(["eval", "out", "--data-dir", "data"]) == 0
    assert capsys.readouterr().out == expected
    (tmp_path / "data" / "sea.txt").rename(tmp_path / "data" / "lake.txt")
    assert main(["eval", "out", "--data-dir", "data"]) == 0
    assert capsys.readouterr().out.startswith("text/data (5,460 symbols, 0 unknown to the run): ")
    assert "no such file" in failing(capsys, "eval", "out", "--file", "nowhere.txt")
    assert "no such file" in failing(capsys, "eval", "out")


def test_a_run_on_bytes_writes_and_reads_text(tmp_path, capsys):
    (tmp_path / "t.bin").write_bytes(b"\xff\0\xfe" + "übel ".encode() * 300)
    assert train(tmp_path / "t.bin", tmp_path / "out", 20, "--symbols", "bytes") == 0
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "out"), "--prompt", "über", "--chars", "4"]) == 0
    assert capsys.readouterr().out.startswith("über")
    (tmp_path / "o.bin").write_bytes(bytes(range(256)))
    assert main(["eval", str(tmp_path / "out"), "--file", str(tmp_path / "o.bin")]) == 0
    assert "(256 symbols, 0 unknown to the run)" in capsys.readouterr().out


def test_symbols_that_a_damaged_run_makes_up_are_not_written(run, tmp_path, capsys):
    _, out = moved(run, tmp_path)
    content = (out / "config.json").read_text()
    (out / "config.json").write_text(content.replace('"h",', '"H",', 1))
    assert content != (out / "config.json").read_text()
    assert "config.json: damaged" in failing(capsys, "sample", out)


def test_text_is_for_runs_on_text(tmp_path, capsys):
    assert main(["train", "recall", *TINY, "--steps", "1", "--out", str(tmp_path / "out")]) == 0
    (tmp_path / "t.txt").write_text(TEXT)
    assert "is not text" in failing(capsys, "eval", tmp_path / "out", "--file", tmp_path / "t.txt")


# Damaged files


def test_every_byte_of_a_checkpoint_counts(tmp_path, capsys):
    path = tmp_path / "c"
    save_checkpoint(path, {"w": torch.arange(6.0), "n": torch.tensor(3)}, {"step": 1, "text": 'ü"\n\\'})
    content = path.read_bytes()
    tensors, values = load_checkpoint(path)
    assert tensors["w"].tolist() == [0, 1, 2, 3, 4, 5]
    assert values == {"step": 1, "text": 'ü"\n\\'}
    noticed = 0
    for place in range(len(content)):
        for flipped in (content[place] ^ 1, content[place] ^ 0x2A, 0x0A):
            if flipped == content[place]:
                continue
            path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
            with pytest.raises(Exception, match="not a checkpoint") as error:
                load_checkpoint(path)
            assert type(error.value).__name__ == "UsageError"
            noticed += 1
    assert noticed > 2 * len(content)


def test_a_checkpoint_of_an_earlier_version_goes_on(run, tmp_path, capsys):
    """Without a checksum, and without what says which data it was trained on."""
    text, out = moved(run, tmp_path)
    for name in ("checkpoint", "best"):
        tensors, values = load_checkpoint(out / f"{name}.safetensors")
        values.pop("content", None)
        (out / f"{name}.safetensors").write_bytes(save(tensors, metadata={"values": json.dumps(values)}))
    about = json.loads((out / "config.json").read_text())
    del about["content"]
    (out / "config.json").write_text(json.dumps(about))
    assert main(["eval", str(out)]) == 0
    assert train(text, out, 20, "--resume") == 0
    assert train(text, tmp_path / "whole", 20) == 0
    bpc = [json.loads((path / "summary.json").read_text())["test_bpc"] for path in (out, tmp_path / "whole")]
    assert bpc[0] == bpc[1]


@pytest.mark.parametrize("command", [["eval"], ["compare"], ["diagnose", "--bptt", "1"], ["resume"]])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden", "8"),
        ("hidden", -8),
        ("dni", 1),
        ("core", None),
        ("lr", [1]),
        ("seed", 0.5),
        ("device", "gpu"),
    ],
)
def test_a_setting_of_another_kind_is_named(command, name, value, run, tmp_path, capsys):
    text, out = moved(run, tmp_path)
    about = json.loads((out / "config.json").read_text())
    about["config"][name] = value
    (out / "config.json").write_text(json.dumps(about))
    if command == ["resume"]:
        command = ["train", "text", text, *TINY, "--steps", 20, "--resume", "--out", out]
    else:
        command = [*command, out]
    line = failing(capsys, *command)
    assert str(out / "config.json") in line
    assert name in line


# All of it, at random


def test_a_short_endurance(tmp_path):
    """`benchmarks/endurance` in small; it goes on where it was stopped."""
    script = Path(__file__).parents[1] / "benchmarks" / "endurance"
    words = [sys.executable, str(script), "--out", str(tmp_path / "all"), "--runs", "1", "--steps", "20"]
    words += ["--apart", "0", "--sweeps", "0", "--table", str(tmp_path / "table")]
    done = subprocess.run([*words, "--damaged", "9", "--full", "4"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    names = ("kills", "damaged", "full")
    kept = [(tmp_path / "all" / f"{name}.jsonl").read_text() for name in names]
    words = [*words, "--damaged", "10", "--full", "5", "--minutes", "0"]
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.stdout == done.stdout
    assert [(tmp_path / "all" / f"{name}.jsonl").read_text() for name in names] == kept
    assert done.stdout in (tmp_path / "table" / "table.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "table" / "rows.jsonl").read_text().splitlines()]
    assert Counter(row["of"].split()[0] for row in rows) == {"killed": 3, "damaged": 9, "command": 4}
    for row in rows:
        assert row.get("wrong", 0) == row.get("left behind", 0) == 0, row
        assert row.get("tried", 1) == row.get("runs", 1) == row.get("went on to the end", 1) == 1, row


def test_endurance_notices_what_is_wrong(tmp_path):
    """Its verdicts: an unhandled error, an answer from a damaged checkpoint, a file that was written."""
    script = Path(__file__).parents[1] / "benchmarks" / "endurance"
    code = (
        "import sys, runpy, pathlib\n"
        "sys.argv = ['e', '--out', sys.argv[1], *'--runs 0 --apart 0 --sweeps 0 --full 0'.split()]\n"
        "sys.argv += ['--damaged', '2']\n"
        "import dni_rnn.cli as cli\n"
        "def broken(words):\n"
        "    if 'run' in words and not pathlib.Path('run').exists(): return real(words)\n"
        "    if '--resume' in words and pathlib.Path('run/summary.json').exists(): raise KeyError('x')\n"
        "    return 0\n"
        "real, cli.main = cli.main, broken\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert [json.loads(line)["wrong"] for line in done.stderr.splitlines()] == ["exit code 99", "unnoticed"]
