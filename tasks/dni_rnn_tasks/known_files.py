"""Known data files: found in a folder, in the user's cache or from a source, and always checked."""

from __future__ import annotations

import gzip
import hashlib
import os
import tempfile
import textwrap
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from dni_rnn.errors import UsageError

DEPTH = 4
"""Levels of sub-folders that are searched."""

ENVIRONMENT = "DNI_RNN_DATA"
"""Environment variable with the data folder, used without `--data-dir`."""


@dataclass(frozen=True)
class KnownFile:
    """A published file; copies must equal it byte for byte.

    Attributes:
      name: file name, without a folder.
      size: length in bytes.
      sha256: SHA-256 of the content, 64 lower-case hexadecimal digits.
    """

    name: str
    size: int
    sha256: str

    def mismatch(self, content: bytes) -> str | None:
        """How `content` differs from the published file, in a few words; None if it does not."""
        if len(content) != self.size:
            return f"{len(content):,} bytes instead of {self.size:,}"
        found = hashlib.sha256(content).hexdigest()
        return None if found == self.sha256 else f"SHA-256 {found[:12]}… instead of {self.sha256[:12]}…"


@dataclass(frozen=True)
class Unusable:
    """A common form of a data set that is not supported.

    Attributes:
      name: name of one of its files or folders.
      advice: what it is, and what to do.
    """

    name: str
    advice: str


@dataclass(frozen=True)
class Source:
    """A package that can download a data set.

    Attributes:
      package: the package's name, for messages.
      fetch: imports the package and returns the content of each file by name. It may raise anything:
        the next source is then tried.
    """

    package: str
    fetch: Callable[[], Mapping[str, bytes]]


def load_known(
    dataset: str,
    choices: Sequence[Sequence[KnownFile]],
    data_dir: Path | None,
    sources: Sequence[Source],
    advice: str,
    unusable: Sequence[Unusable] = (),
) -> dict[str, bytes]:
    """Find and check one complete choice of files.

    Searched in this order: `data_dir`; else the folder in `$DNI_RNN_DATA`; else the user's cache; else
    `sources`, whose files are then saved in the cache. A folder given by the user is never silently replaced
    by another place. In every folder a file may lie directly, in the sub-folder `dataset` or in others,
    compressed (.gz) or not, and with a dot instead of a hyphen before "idx": any copy that equals the
    published file is read.

    Args:
      dataset: name of the sub-folder and of the data set in messages.
      choices: sets of files, each sufficient by itself; the first that is complete in a folder is read.
        `sources` provide the last one.
      data_dir: the folder given by `--data-dir`.
      sources: tried in order.
      advice: what the user can do when nothing is found; ends the message.
      unusable: unsupported forms, named in the error if found instead.

    Returns:
      The checked content by file name, for one of `choices`.

    Raises:
      UsageError: no complete choice was found, or a file that was found is not the published one.
    """
    if data_dir is not None:
        return _from_named_folder(dataset, choices, data_dir, "--data-dir", unusable)
    if os.environ.get(ENVIRONMENT):
        folder = Path(os.environ[ENVIRONMENT])
        return _from_named_folder(dataset, choices, folder, f"${ENVIRONMENT}", unusable)
    cache = platformdirs.user_cache_path("dni_rnn")
    for files in choices:
        copies = [_copies([cache / dataset, cache], file) for file in files]
        if all(copies):
            contents, error = _read_all(files, copies)
            if error is not None:
                raise error
            return contents

    tried = [f"not in {cache}"]
    for source in sources:
        try:
            fetched = source.fetch()
        except ModuleNotFoundError as error:
            tried.append(f"no package {error.name}")
        except Exception as error:  # whatever a downloader raises, try the next source
            tried.append(textwrap.shorten(f"{source.package}: {type(error).__name__}: {error}", width=160))
        else:
            contents = {file.name: fetched[file.name] for file in choices[-1]}
            wrong = [file.name for file in choices[-1] if file.mismatch(contents[file.name])]
            if not wrong:
                for name, content in contents.items():
                    _keep(cache / dataset / name, content)
                return contents
            tried.append(f"{source.package}: not the published {wrong[0]}")
    raise UsageError(f"{dataset}: no data ({'; '.join(tried)}); {advice}")


def _from_named_folder(
    dataset: str,
    choices: Sequence[Sequence[KnownFile]],
    folder: Path,
    named_by: str,
    unusable: Sequence[Unusable],
) -> dict[str, bytes]:
    if not folder.is_dir():
        raise UsageError(f"{named_by} {folder}: not a folder; make it, or leave {named_by} out")
    near, far = [folder, folder / dataset], None
    absent, best, wrong = [], -1, None
    for files in choices:
        copies = [_copies(near, file) for file in files]
        if not all(copies):
            far = _folders(folder) if far is None else far
            copies = [_copies([*near, *far], file) for file in files]
        absent.append([file.name for file, found in zip(files, copies, strict=True) if not found])
        if all(copies):
            contents, error = _read_all(files, copies)
            if error is None:
                return contents
            if len(contents) > best:  # report the choice that is closest to complete
                best, wrong = len(contents), error
    if wrong is not None:
        raise wrong
    for other in unusable:
        for place in (folder, *(far or ())):
            if (place / other.name).exists():
                raise UsageError(f"{place / other.name}: {other.advice}")
    # Name the choice closest to complete; if nothing is there, the last one, which sources provide.
    partly = [names for names, files in zip(absent, choices, strict=True) if len(names) < len(files)]
    closest = min(partly or absent[-1:], key=len)
    raise UsageError(
        f"{named_by} {folder}: no {', '.join(closest)} there or in its folder {dataset}; "
        f"put the files there, or leave {named_by} out"
    )


def _folders(folder: Path) -> list[Path]:
    """The sub-folders of a folder, nearest first, without hidden and unreadable ones."""
    found, level, seen = [], [folder], {folder.resolve()}
    for _ in range(DEPTH):
        below = []
        for parent in level:
            try:
                entries = sorted(entry for entry in parent.iterdir() if not entry.name.startswith("."))
                inner = [(entry, entry.resolve()) for entry in entries if entry.is_dir()]
            except OSError:
                continue
            below += [entry for entry, real in inner if real not in seen]
            seen |= {real for _, real in inner}
        found += below
        level = below
    return found


def _copies(folders: Sequence[Path], file: KnownFile) -> list[Path]:
    """Candidates for a file, by name: as published, with a dot for a hyphen, compressed."""
    names = dict.fromkeys([file.name, file.name.replace("-idx", ".idx")])
    names = [ending for name in names for ending in (name, f"{name}.gz")]
    return [path for folder in folders for name in names if (path := folder / name).is_file()]


def _read_all(
    files: Sequence[KnownFile], copies: Sequence[Sequence[Path]]
) -> tuple[dict[str, bytes], UsageError | None]:
    """The files up to the first one without a good copy, and the error for that one."""
    contents = {}
    for file, found in zip(files, copies, strict=True):
        try:
            contents[file.name] = _read(file, found)
        except UsageError as error:
            return contents, error
    return contents, None


def _read(file: KnownFile, copies: Sequence[Path]) -> bytes:
    """The content of the first copy that equals the published file."""
    problems = []
    for path in copies:
        try:
            if path.name.endswith(".gz") and not file.name.endswith(".gz"):
                with gzip.open(path) as compressed:
                    content = compressed.read(file.size + 1)  # no more, however large it is
            else:
                content = path.read_bytes()
        except (OSError, EOFError, zlib.error) as error:
            why = getattr(error, "strerror", None) or error
            problems.append(f"{path}: cannot be read ({why}); repair or replace it")
            continue
        if (why := file.mismatch(content)) is None:
            return content
        problems.append(f"{path}: not the published file ({why}); replace or delete it")
    raise UsageError(problems[0])


def _keep(path: Path, content: bytes) -> None:
    """Write `content` to `path` whole or not at all, so that no reader sees an incomplete file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(content)
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise
    except OSError as error:
        raise UsageError(
            f"{path}: cannot write to the cache ({error.strerror}); make that folder writable"
        ) from error
