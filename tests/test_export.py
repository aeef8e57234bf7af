"""`dni-rnn export`: what it writes is loaded by torch and safetensors alone, and gives what the run gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dni_rnn.cli import main
from dni_rnn.errors import UsageError
from dni_rnn.feedforward import decouple
from dni_rnn.nets import cnn, vgg
from dni_rnn.training import export
from dni_rnn.training.inference import load_run
from dni_rnn_tasks import live_learner

TINY = ["--threads", "1", "--device", "cpu", "--seed", "1"]
SMALL = [*TINY, "--hidden", "12", "--embedding", "6", "--batch-size", "4", "--bptt", "4", "--steps", "4"]
TEXT = "The sea shells that she sells are, she is sure, sea shells of the sea shore.\n" * 60
ROOT = Path(__file__).parents[1]

ALONE = """
import os, re, sys
sys.modules["dni_rnn"] = sys.modules["dni_rnn_tasks"] = None  # an import of them fails
import torch
for folder in sys.argv[1:]:
    os.chdir(folder)
    (program,) = re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.DOTALL)
    exec(program)
    x = torch.load("x.pt")
    torch.save(net(x) if isinstance(net, nn.Sequential) else step(x)[0], "logits.pt")
    print("####")
assert not [name for name, module in sys.modules.items() if name.startswith("dni_rnn") and module]
"""


def trained(folder: Path, *words: str) -> Path:
    text = folder / "sea.txt"
    text.write_text(TEXT)
    command = [str(text) if word == "TEXT" else word for word in words]
    assert main(["train", *command, "--out", str(folder / "run")]) == 0
    return folder / "run"


def failing(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


RUNS = [
    (["text", "TEXT", *SMALL, "--layers", "2", "--trace", "4", "--restore", "0.1"], "The "),
    (["text", "TEXT", *SMALL, "--symbols", "bytes", "--core", "gru", "--dni"], "The "),
    (["recall", "--delay", "2", *SMALL, "--core", "rnn"], "tensor("),
    (["addition", *TINY, "--model", "mlp", "--width", "8", "--steps", "4"], "tensor([["),
]


def test_torch_alone_gives_what_the_run_gives(tmp_path):
    folders, ours = [], []
    for number, (words, _) in enumerate(RUNS):
        (tmp_path / str(number)).mkdir()
        run = trained(tmp_path / str(number), *words)
        assert main(["export", str(run)]) == 0
        folder = run / "export"
        assert {file.name for file in folder.iterdir()} == {"README.md", "model.json", "model.safetensors"}
        loaded = load_run(run, torch.device("cpu"))
        model = loaded.model.eval()
        with torch.no_grad():
            if hasattr(model, "embedding"):
                x = torch.randint(loaded.data.input_symbols, (7, 3))
                ours.append(model(x, model.initial_state(3))[0])
            else:
                x = torch.randn(5, *getattr(loaded.data, "shape", (2,)))
                ours.append(model(x))
        torch.save(x, folder / "x.pt")
        folders.append(folder)
        # The figures are the run's, and nothing says where things lay.
        summary = json.loads((run / "summary.json").read_text())
        metric = next(name for name in ("test_bpc", "test_error") if name in summary)
        card, sizes = (folder / "README.md").read_text(), json.loads((folder / "model.json").read_text())
        assert f"test | {summary[metric]:.4f} |" in card
        assert sizes["figures"][metric] == summary[metric]
        assert sizes["trained"]["settings"]["seed"] == 1
        assert "--threads" not in card
        assert str(run) not in card
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, folders)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    written = done.stdout.split("####\n")
    for (_, says), folder, logits, said in zip(RUNS, folders, ours, written[:-1], strict=True):
        theirs = torch.load(folder / "logits.pt")
        assert theirs.shape == logits.shape
        assert (theirs - logits).abs().max() < 1e-6
        assert said.startswith(says)


def test_the_program_of_the_docs_is_that_of_the_card():
    page = (ROOT / "docs" / "command-line.md").read_text()
    symbols = ["T", "h", "e", " "]
    assert f"```python\n{export.example({'symbols': symbols})}```" in page


@pytest.mark.parametrize("net", [cnn((1, 8, 8), 3, 3, 4), vgg((3, 8, 8), 3, 2)], ids=["cnn", "vgg"])
def test_pictures(net):
    """The nets of pictures, whose data are not at hand here: rebuilt from what JSON keeps of them."""
    shape = (net[0][0].in_channels, 8, 8)
    model = decouple(net, [1, 2], torch.zeros(2, *shape), 3)
    x = torch.randn(4, *shape)
    for _ in range(2):
        model(x, torch.tensor([0, 1, 2, 0]))  # running statistics
    made = []
    for module in export.plain_modules(model).values():
        kind, arguments = json.loads(json.dumps(export.describe(module)))
        made.append(getattr(torch.nn, kind)(**arguments))
        made[-1].load_state_dict(module.state_dict())
    torch.testing.assert_close(torch.nn.Sequential(*made).eval()(x), model.eval()(x))


def test_what_torch_has_no_module_for():
    class Wide(torch.nn.Linear):
        pass

    with pytest.raises(UsageError, match=r"a Wide, which torch\.nn alone cannot build"):
        export.describe(Wide(2, 3))


def test_a_core_that_torch_has_not_is_refused(tmp_path, capsys):
    run = trained(tmp_path, "recall", "--delay", "2", *SMALL, "--core", "diagonal")
    assert "torch has no module for the core Diagonal" in failing(capsys, "export", run)
    assert not (run / "export").exists()


def test_a_folder_is_made_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    run = trained(tmp_path, "text", "TEXT", *SMALL)
    out = tmp_path / "deep" / "model"
    assert main(["export", str(run), "--out", str(out)]) == 0
    before = (out / "README.md").stat().st_ino
    assert "already there; add --overwrite" in failing(capsys, "export", run, "--out", out)
    assert main(["export", str(run), "--out", str(out), "--overwrite"]) == 0
    assert (out / "README.md").stat().st_ino != before
    # A disk that is full in the middle leaves the old one, and nothing beside it.
    whole = export.write_atomically

    def full(path: Path, content: bytes) -> None:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        whole(path, content)

    monkeypatch.setattr(export, "write_atomically", full)
    held = {file.name: file.read_bytes() for file in out.iterdir()}
    assert "cannot be written (No space left" in failing(capsys, "export", run, "--out", out, "--overwrite")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == held
    assert os.listdir(out.parent) == ["model"]
    # What is not an export is not replaced.
    (out / "notes.txt").write_text("mine")
    assert "holds other things" in failing(capsys, "export", run, "--out", out, "--overwrite")
    assert (out / "notes.txt").read_text() == "mine"


def test_a_run_whose_text_is_gone_and_that_has_not_ended(tmp_path):
    run = trained(tmp_path, "text", "TEXT", *SMALL)
    (tmp_path / "sea.txt").unlink()
    (run / "summary.json").unlink()
    made = export.exported(run)
    assert "test_bpc" not in made.sizes["figures"]
    assert "| test | the run had not ended |" in made.card


def test_a_stream_is_of_bytes(tmp_path, monkeypatch):
    class Log:
        def __init__(self):
            self.pieces = [np.frombuffer(b"a line of a log\n" * 40, np.uint8), None]

        def read(self, seconds: float):
            return self.pieces.pop(0)

    monkeypatch.setattr(live_learner, "standard_input", Log)
    made = export.exported(trained(tmp_path, "live", *SMALL))
    assert made.sizes["symbols"] == "bytes"
    assert "all, each predicted before it was learnt | " in made.card
