"""Output wherever it goes, and the code of others: nothing ends in a traceback."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from dni_rnn.cli import main
from dni_rnn.commands.output import Output
from dni_rnn.training import progress_bar
from dni_rnn.training.progress_bar import ProgressBar

TINY = "--hidden 8 --embedding 4 --batch-size 4 --bptt 4 --threads 1 --device cpu".split()  # noqa: SIM905
DNI_RNN = [sys.executable, "-m", "dni_rnn"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With a text of 300 Chinese characters whose name is not ASCII."""
    (tmp_path / "naïve.txt").write_text(
        "".join(chr(0x4E00 + i * i % 300) for i in range(9000)), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Encodings and pipes


def test_output_in_encodings_that_lack_the_symbols(folder):
    for encoding, words in (
        ("ascii", ["train", "text", "naïve.txt", *TINY, "--steps", "3", "--out", "run"]),
        ("cp1252", ["sample", "run", "--chars", "5"]),
        ("ascii:strict", ["train", "text", "--help"]),
        ("ascii", ["report", "naïve"]),
    ):
        done = subprocess.run(
            [*DNI_RNN, *words], capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}
        )
        assert done.returncode == (2 if words[0] == "report" else 0), done.stderr
        assert b"Traceback" not in done.stderr
        if words[0] == "sample":
            assert done.stdout.strip() == b"??????"
        elif words[0] == "report":
            assert b"dni-rnn: na?ve" in done.stderr
        elif words[1:] == ["text", "--help"]:
            assert b"--core" in done.stdout
        else:
            assert b"text/na?ve.txt bptt" in done.stdout


@pytest.mark.parametrize("words", [["tasks"], ["train", "text", "--help"]])
def test_a_reader_that_has_gone(words):
    process = subprocess.Popen([*DNI_RNN, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    process.stderr.close()


def test_training_outlives_the_reader_of_its_output(folder):
    read, write = os.pipe()
    os.close(read)
    words = ["train", "text", "naïve.txt", *TINY, "--steps", "30", "--out", "run"]
    done = subprocess.run([*DNI_RNN, *words], stdout=write, stderr=write)
    os.close(write)
    assert done.returncode == 0
    assert (folder / "run" / "summary.json").exists()


def test_streams_that_are_closed(folder):
    """Files that are opened then do not take their places, where messages would be written into them."""
    words = [*DNI_RNN, "train", "text", "naïve.txt", *TINY, "--steps", "2", "--out", "closed"]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words])
    assert done.returncode == 0
    kept = (folder / "closed" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["step"] for line in kept)


def test_a_full_disk_under_the_output_is_said():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full: output to a full device was not tested")
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*DNI_RNN, "tasks"], stdout=full, stderr=subprocess.PIPE)
    assert done.stderr == b"dni-rnn: output is lost (No space left on device)\n"


def test_a_file_name_that_is_no_text_is_written():
    stream = Output(io.BytesIO(), encoding="utf-8", errors="replace")
    stream.write("na\udcefve 🙂\n")
    stream.flush()
    assert stream.buffer.getvalue().decode() == "na?ve 🙂\n"  # pyright: ignore[reportAttributeAccessIssue]


# Progress


def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(progress_bar, "LOG_SECONDS", 0.05)
    bar = ProgressBar(100, 0, "run", "update", quiet=False)
    for done in range(10, 50, 10):
        time.sleep(0.06)
        bar.show(done, 2.0 + 1 / done, "bpc", "1k characters/s")
    bar.close()
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert len(lines) >= 3
    assert all(line.startswith("run: ") and " bpc, 1k characters/s" in line for line in lines)
    assert "40%" in lines[-1]


def test_a_short_run_says_nothing_in_a_log(tmp_path, capsys):
    words = ["train", "recall", *TINY, "--steps", "3", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    assert capsys.readouterr().err == ""


def test_a_terminal_of_60_columns(folder):
    """What is drawn fits in, is drawn over, and says how far the run is and how well it does."""
    words = [
        "train",
        "text",
        "naïve.txt",
        *TINY,
        "--steps",
        "40",
        "--log-every",
        "5",
        "--out",
        "a-name-" + "long" * 12,
    ]
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    code = (
        "from dni_rnn.cli import script; from dni_rnn.training import progress_bar as p\n"
        "p.REFRESH_SECONDS = 0.0; script()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stderr=secondary, stdout=subprocess.DEVNULL
    )
    os.close(secondary)
    said = b""
    while True:
        try:
            piece = os.read(primary, 4096)
        except OSError:  # how a terminal ends on Linux
            break
        said += piece
        if not piece:
            break
    os.close(primary)
    assert process.wait() == 0
    drawn = [line for line in re.split("[\r\n]+", said.decode()) if line.strip()]
    assert len(drawn) > 2
    assert max(map(len, drawn)) <= 60
    assert re.search(r"a-name-longlonglongl.*%\|.*<.*, \d\.\d{3} bpc", drawn[-1])


# Words, and modules of others


@pytest.mark.parametrize(
    "words",
    [
        ["train", "tex"],
        ["trian", "text"],
        ["train", "--bptt", "4", "text"],
        ["train", "a\nb"],
        ["train", "--preset=x"],
    ],
)
def test_words_that_are_none_are_refused_in_a_line(words, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) <= 2
    assert "known: " in said.err


MODULES = {
    "own_syntax": ("x = 1\ndef f(:\n    pass\n", "own_syntax.py, line 2: SyntaxError: "),
    "own_error": ("import os\n\nos.environ['NO SUCH THING']\n", "own_error.py, line 3: KeyError: "),
    "own_inner": ("import own_error\n", "own_error.py, line 3: KeyError: "),
    "own_exit": (
        "import sys\nsys.exit('usage: own\\nmore')\n",
        "own_exit.py, line 2: SystemExit: usage: own",
    ),
    "own_import": ("\nimport no_such_thing_at_all\n", "own_import.py, line 2: No module named"),
    "own_bytes": ("# coding: nonsense\n", "SyntaxError: "),
    "own_sizes": ("class Cell:\n    def __init__(self):\n        pass\n", "TypeError: "),
    "own_init": (
        "class Cell:\n    def __init__(self, *sizes):\n        self.x = sizes[9]\n",
        "own_init.py, line 3: IndexError: ",
    ),
}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("flag", [["--core"], ["--estimator"], ["--dni", "--no-critic", "--synthesizer"]])
def test_a_module_of_somebody_else_that_fails(module, flag, tmp_path, monkeypatch, capsys):
    for name, (source, _) in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    capsys.readouterr()
    if module in ("own_sizes", "own_init") and flag == ["--estimator"]:
        pytest.skip("an estimator is made without sizes")
    words = ["train", "recall", *TINY, "--steps", "1", "--out", str(tmp_path / "run")]
    assert main([*words, *flag, f"{module}:Cell"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dni-rnn: {flag[-1]} {module}:Cell: cannot be ")
    assert MODULES[module][1] in line
    assert not (tmp_path / "run").exists()
