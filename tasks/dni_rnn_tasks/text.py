"""Any text, character by character or byte by byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dni_rnn.data.task import Corpus
from dni_rnn.errors import UsageError
from dni_rnn.files import name_of

SHORTEST_SPLIT = 2
"""Symbols: one to read and one to predict."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Any text, one symbol per character: a file, a folder, or the text that comes with Python.

    Split by position: first training, then validation, then test. Characters that do not occur in training
    are read as one unknown symbol. The default text is the help of the running Python interpreter
    (`pydoc_data.topics`, about 0.5 million characters; printable ASCII and newlines only; symbols of
    validation and test that do not occur in training are dropped). It needs no download but differs between
    Python versions: compare numbers of one version only.
    """

    path: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[PATH]")] = None
    """A file, or a folder: all its text files concatenated in the order of their names, including sub-folders
    but no hidden files. With --data-dir it is searched there. The default is the text that comes with
    Python."""

    symbols: Literal["characters", "bytes"] = "characters"
    """characters: those of UTF-8 text. bytes: any file, 256 symbols."""

    valid_fraction: float = 0.05
    """Fraction of the characters for validation."""

    test_fraction: float = 0.05
    """Fraction of the characters for test, at the end."""

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
        """Read and split the text.

        Raises:
          UsageError: the text is missing, unreadable, not UTF-8 or too short.
        """
        from dni_rnn.data.texts import Numbers, code_points, read

        of_bytes = self.symbols == "bytes"
        if self.path is None:
            name, text = "text/default", python_help()
            train, valid = self._lengths(name, len(text))
            if not of_bytes:
                seen, parts = set(text[:train]), (text[train : train + valid], text[train + valid :])
                rest = ("".join(c for c in part if c in seen) for part in parts)
                return Corpus.from_texts(name, text[:train], *rest)
            numbers = Numbers()
            numbers.add(code_points(text))  # ASCII: its characters are its bytes
        else:
            path = self.find(data_dir)
            if path is None:
                raise UsageError(
                    f"--data-dir {data_dir}: no {self.path.name} there; put it there, or leave --data-dir out"
                )
            name = f"text/{name_of(path)}"
            numbers = read(path, of_bytes=of_bytes)
            train, valid = self._lengths(name, numbers.length)
        name = f"{name}/bytes" if of_bytes else name
        return Corpus.from_numbers(name, numbers, train, valid, of_bytes=of_bytes)

    def find(self, data_dir: Path | None) -> Path | None:
        """The path of the text: `path`, or that in a folder given by the user; None if it is not there."""
        if self.path is None or data_dir is None:
            return self.path
        places = [data_dir / self.path.name] if self.path.is_absolute() else []
        places = places or [data_dir / self.path, data_dir / self.path.name]
        return next((place for place in places if place.exists()), None)

    def _lengths(self, name: str, length: int) -> tuple[int, int]:
        valid, test = (int(length * part) for part in (self.valid_fraction, self.test_fraction))
        train = length - valid - test
        if min(train, valid, test) < SHORTEST_SPLIT:
            raise UsageError(
                f"{name}: {length} characters split into {train} / {valid} / {test}, and each split "
                f"needs {SHORTEST_SPLIT}; give a longer text"
            )
        return train, valid


def python_help() -> str:
    """The help topics of the running Python, in alphabetical order; printable ASCII and newlines only."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError("text: this Python comes without its help texts; give a path to a text") from error
    text = "\n".join(topics[name] for name in sorted(topics))
    return "".join(c for c in text if c == "\n" or " " <= c <= "~")
