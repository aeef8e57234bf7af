"""Texts of any size as symbol numbers: read piece by piece, and held in the narrowest integer type.

A symbol is a character or a byte. Special symbols have several characters, unlike those of a text.
"""

from __future__ import annotations

import codecs
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dni_rnn.errors import UsageError

UNKNOWN = "<unknown>"
"""The symbol for all that does not occur in training; last in an alphabet that has it."""
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""The alphabet of a text that is read byte by byte."""
PIECE = 1 << 20
"""Symbols or bytes that are processed at a time."""

Passed = defaultdict[str, list[Path]]
"""Skipped paths, by reason."""


def narrowest(symbols: int) -> type[np.integer]:
    """The smallest integer type that can number so many symbols, of those that torch supports."""
    return np.uint8 if symbols <= 1 << 8 else np.int16 if symbols <= 1 << 15 else np.int32


class Numbers:
    """A growing text as numbers: each new symbol gets the next number.

    Args:
      capacity: length up to which the text is not reallocated.

    Attributes:
      codes: the code point, or byte, of each number.
      length: length of the text; may be reduced.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.codes: list[int] = []
        self.length = 0
        self._number = np.full(sys.maxunicode + 1, -1, np.int32)
        self._held = np.empty(capacity, np.uint8)

    @property
    def values(self) -> np.ndarray:
        """The text."""
        return self._held[: self.length]

    def add(self, codes: np.ndarray) -> None:
        """Append the symbols with these code points."""
        new = np.unique(codes[self._number[codes] < 0])
        self._number[new] = np.arange(len(self.codes), len(self.codes) + len(new))
        self.codes += new.tolist()
        end, kind = self.length + len(codes), narrowest(len(self.codes))
        if end > len(self._held) or self._held.dtype != kind:
            size = len(self._held) if end <= len(self._held) else end + end // 8
            moved = np.empty(size, kind)
            moved[: self.length] = self.values
            self._held = moved
        self._held[self.length : end] = self._number[codes]
        self.length = end


def code_points(text: str) -> np.ndarray:
    """The code point of every character."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))


def counted(values: np.ndarray, symbols: int) -> np.ndarray:
    """How often each of so many symbols occurs."""
    counts = np.zeros(symbols, np.int64)
    for start in range(0, len(values), PIECE):
        counts += np.bincount(values[start : start + PIECE], minlength=symbols)
    return counts


def renumbered(values: np.ndarray, table: np.ndarray, symbols: int) -> np.ndarray:
    """`table[values]` without negative entries, in place if so many symbols need no other type."""
    kind, end = narrowest(symbols), 0
    found = values if values.dtype == kind else np.empty(len(values), kind)
    for start in range(0, len(values), PIECE):
        piece = table[values[start : start + PIECE]]
        piece = piece[piece >= 0]
        found[end : end + len(piece)] = piece
        end += len(piece)
    return found[:end]


def read_under(path: Path, symbols: tuple[str, ...]) -> tuple[np.ndarray, int, bool]:
    """A text encoded with an existing alphabet.

    Returns:
      The numbers; how many symbols of the text are not in the alphabet; and whether the numbers hold these as
      `UNKNOWN`, or leave them out because the alphabet has no such symbol.
    """
    numbers = read(path, of_bytes=symbols == BYTES)
    known = {symbol: number for number, symbol in enumerate(symbols)}
    if symbols == BYTES:
        known = {chr(byte): byte for byte in range(256)}
    elif " " not in known and "_" in known:
        known[" "] = known["_"]  # the convention of the Penn Treebank
    table = np.array([known.get(chr(code), -1) for code in numbers.codes], np.int64)
    counts = counted(numbers.values, len(numbers.codes))
    unknown, has = int(counts[table < 0].sum()), UNKNOWN in known
    if has:
        table[table < 0] = known[UNKNOWN]
    return renumbered(numbers.values, table, len(symbols)), unknown, has


def read(path: Path, *, of_bytes: bool = False) -> Numbers:
    """The text of a file, or of all text files of a folder joined in order; line ends are kept as they are.

    A folder includes its sub-folders, linked ones too, each once. Hidden files, Python caches, run
    directories, and files that cannot be read or are not UTF-8 are skipped; one line on standard error says
    so.

    Raises:
      UsageError: nothing is there, the file or the folder cannot be read, the file is not UTF-8, or there is
        no text.
    """
    passed: Passed = defaultdict(list)
    folder = path.is_dir()
    files = _files(path, passed) if folder else [path]
    numbers = Numbers(sum(file.stat().st_size for file in files if file.is_file()))
    for file in files:
        before = numbers.length
        try:
            for codes in _pieces(file, of_bytes, folder):
                numbers.add(codes)
        except (OSError, ValueError) as error:
            numbers.length = before
            if not folder:
                raise UsageError(f"{path}: {_why(error)}") from error
            passed["unreadable" if isinstance(error, OSError) else "not UTF-8 text"].append(file)
    said = ", ".join(
        f"{len(found)} {why} ({os.path.relpath(found[0], path)}{', ...' * (len(found) > 1)})"
        for why, found in sorted(passed.items())
    )
    if not numbers.length:
        raise UsageError(
            f"{path}: no text there; give a file or folder with some" + f" (passed over: {said})" * bool(said)
        )
    if said and os.environ.get("RANK", "0") == "0":  # of several processes one says it
        print(f"dni-rnn: {path}: passed over: {said}", file=sys.stderr)
    return numbers


def _files(folder: Path, passed: Passed) -> list[Path]:
    """The files of a folder in the order of their names, each once however many links lead to it."""

    def fail(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise UsageError(f"{folder}: cannot be read ({error.strerror})") from error
        passed["unreadable"].append(Path(error.filename))

    found, entered = [], set()
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        here, real = Path(parent), os.path.realpath(parent)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        if {"config.json", "metrics.jsonl"} <= {*names}:
            passed["a run directory"].append(here)
            folders.clear()
            continue
        aside = [name for name in (*folders, *names) if name.startswith(".") or name == "__pycache__"]
        if aside:
            passed["hidden or a cache"] += [here / name for name in sorted(aside)]
        folders[:] = sorted({*folders} - {*aside})
        for path in (here / name for name in names if name not in aside):
            (found if path.is_file() else passed["not a file"]).append(path)
    first: dict[str, Path] = {}
    for path in sorted(found):
        first.setdefault(os.path.realpath(path), path)
    return list(first.values())


def _pieces(path: Path, of_bytes: bool, only_text: bool) -> Iterator[np.ndarray]:
    """Code points, or bytes, of a file. Raises `ValueError` where it is not UTF-8."""
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while True:
            data = file.read(PIECE)
            if not of_bytes and not before and data.startswith(codecs.BOM_UTF8):
                before = len(codecs.BOM_UTF8)  # it says that this is UTF-8, and nothing else
                data = data[before:]
            if of_bytes:
                yield np.frombuffer(data, np.uint8)
            elif only_text and b"\0" in data:
                raise ValueError("a zero byte, which no text has")
            else:
                left = len(decoder.getstate()[0])
                try:
                    yield code_points(decoder.decode(data, final=not data))
                except UnicodeDecodeError as error:
                    place = before - left + error.start
                    raise ValueError(
                        f"not UTF-8 at byte {place}; convert it, or read it with --symbols bytes"
                    ) from error
            if not data:
                return
            before += len(data)


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file or folder; check the path"
    return f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
