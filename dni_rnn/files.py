"""Files that are replaced whole or not at all, files of JSON lines, and locks on folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dni_rnn.errors import UsageError


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, then rename it over `path`.

    Whenever it is killed, and on a full disk, `path` is either unchanged or complete.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        # Not every error names its file.
        raise type(error)(error.errno, error.strerror, str(path)) from None
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def name_of(path: Path) -> str:
    """The file name of a path after following links, in symbols that can be encoded."""
    return os.path.basename(os.path.realpath(path)).encode(errors="replace").decode()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UsageError: it cannot be read, or holds anything else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); put a good copy in its place") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: cannot be read (not an object); put a good copy in its place")
    return values


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a last line that a crash cut short is left out.

    Raises:
      UsageError: it cannot be read, or another line is not a JSON object.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            raise UsageError(f"{path}, line {number}: not JSON; remove it") from None
        if not isinstance(rows[-1], dict):
            raise UsageError(f"{path}, line {number}: not a row; remove it")
    return rows


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Report errors in the use of what was read from `path` as a `UsageError`: the file is damaged."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        why = " ".join(f"{type(error).__name__} {error}".split())[:160]
        raise UsageError(
            f"{path}: damaged, or made by another version ({why}); put a good copy in its place"
        ) from error


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a file of JSON lines, whole or not at all."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone, by a lock on `folder/.lock` that ends with the process.

    Raises:
      UsageError: another process holds it.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f"{folder}: another process is at work there; let it end, or stop it") from None
    try:
        yield
    finally:
        lock.release()
