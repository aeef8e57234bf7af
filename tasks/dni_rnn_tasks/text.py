"""Any text, character by character."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dni_rnn.data.task import Corpus
from dni_rnn.errors import UsageError

SHORTEST_SPLIT = 2
"""Symbols: one to read and one to predict."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Any UTF-8 text, one symbol per character: a file, a folder, or the text that comes with Python.

    Split by position: the beginning trains, then validation, then test. The default text is the help of
    the Python interpreter that runs (`pydoc_data.topics`, about 0.5 million characters; printable ASCII
    and newlines only; symbols of validation and test that training lacks are dropped). It needs no
    download but differs between Python versions: compare numbers within one. --data-dir is not used.
    """

    path: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[PATH]")] = None
    """A file, or a folder: all its files joined end to end in the order of their names, sub-folders
    included, hidden ones not. Without it, the text that comes with Python."""

    valid_fraction: float = 0.05
    """Share of the characters for validation."""

    test_fraction: float = 0.05
    """Share of the characters for test, at the end."""

    def __post_init__(self) -> None:
        for name in ("valid_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"text: {name} is {getattr(self, name)}; give a number between 0 and 1")
        if not self.valid_fraction + self.test_fraction < 1:
            raise UsageError(
                f"text: valid_fraction {self.valid_fraction} and test_fraction {self.test_fraction} "
                "leave nothing to train on; give less"
            )

    def load(self, data_dir: Path | None) -> Corpus:
        """Read and split the text. `data_dir` is ignored.

        Raises:
          UsageError: the text is missing, unreadable, not UTF-8 or too short, or validation or test holds
            a symbol that training does not.
        """
        if self.path is None:
            train, valid, test = self._split("text/default", python_help())
            seen = set(train)
            valid, test = ("".join(c for c in part if c in seen) for part in (valid, test))
            return Corpus.from_texts("text/default", train, valid, test)
        name = f"text/{self.path.resolve().name}"
        return Corpus.from_texts(name, *self._split(name, read(self.path)))

    def _split(self, name: str, text: str) -> tuple[str, str, str]:
        valid, test = (int(len(text) * part) for part in (self.valid_fraction, self.test_fraction))
        train = len(text) - valid - test
        if min(train, valid, test) < SHORTEST_SPLIT:
            raise UsageError(
                f"{name}: {len(text)} characters split into {train} / {valid} / {test}, and each split "
                f"needs {SHORTEST_SPLIT}; give a longer text"
            )
        return text[:train], text[train : train + valid], text[train + valid :]


def read(path: Path) -> str:
    """The text of a file, or of all files of a folder joined in order; line ends are kept as they are.

    Raises:
      UsageError: nothing is there, a file cannot be read or is not UTF-8, or the text is empty.
    """
    text = "".join(_decode(file) for file in (_files(path) if path.is_dir() else [path]))
    if not text:
        raise UsageError(f"{path}: no text there; give a file or folder with some")
    return text


def _files(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise UsageError(f"{error.filename}: cannot be read ({error.strerror})") from error

    found = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file or folder; check the path") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}; convert or remove it") from error


def python_help() -> str:
    """The help topics of the running Python, in alphabetical order; printable ASCII and newlines only."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError("text: this Python comes without its help texts; give a path to a text") from error
    text = "\n".join(topics[name] for name in sorted(topics))
    return "".join(c for c in text if c == "\n" or " " <= c <= "~")
