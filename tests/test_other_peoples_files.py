"""Files that are not what they were, or not what we would have written: one line, or the right answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from dni_rnn.cli import main
from dni_rnn.training.checkpoint import load_checkpoint, save_checkpoint

TINY = (
    "--hidden 8 --embedding 4 --batch-size 4 --bptt 4 --threads 1 --device cpu --log-every 5 "
    "--eval-every 1000000"
).split()
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
        pytest.param(lambda text: text[: len(text) // 3], "5,460 symbols or examples then, 1,820 now", id="cut"),
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


def test_a_checkpoint_says_itself_what_it_was_trained_on(run, tmp_path, capsys):
    """Also where config.json comes from a version that did not."""
    text, out = moved(run, tmp_path)
    about = json.loads((out / "config.json").read_text())
    del about["content"]
    (out / "config.json").write_text(json.dumps(about))
    text.write_text(TEXT[:-2] + ",\n")
    assert train(text, out, 20, "--resume") == 2
    assert "changed inside" in capsys.readouterr().err


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
    [("hidden", "8"), ("hidden", -8), ("dni", 1), ("core", None), ("lr", [1]), ("seed", 0.5), ("device", "gpu")],
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
