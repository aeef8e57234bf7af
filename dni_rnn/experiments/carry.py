"""Pack unfinished runs of a sweep for transfer to another machine."""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from glob import escape
from pathlib import Path

from dni_rnn.errors import UsageError
from dni_rnn.experiments.sweep import progress
from dni_rnn.files import write_atomically

PART_BYTES = 15_000_000
CARRIED = ("config.json", "metrics.jsonl", "checkpoint.safetensors", "best.safetensors")
"""The files that an unfinished run needs to resume."""


def pack_runs(folder: Path, work: Path, runs: Iterable[str]) -> None:
    """Write what `runs` in `work` need to resume to `folder`, as a tar archive in parts of up to 15 MB.

    Other outputs and runs without a checkpoint are left out. Parts that an earlier call wrote for this `work`
    are replaced.
    """
    begun = [run for run in runs if (work / run / "checkpoint.safetensors").exists()]
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for run in begun:
            for name in filter(lambda name: (work / run / name).exists(), CARRIED):
                tar.add(work / run / name, f"{run}/{name}")
    content = archive.getvalue() if begun else b""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(content), PART_BYTES)
    for number, start in enumerate(starts):
        write_atomically(folder / f"{work.name}.tar.{number:03}", content[start : start + PART_BYTES])
    for part in _parts(folder, work)[len(starts) :]:
        part.unlink()


def _parts(folder: Path, work: Path) -> list[Path]:
    return sorted(folder.glob(f"{escape(work.name)}.tar.[0-9]*"))


def unpack_runs(folder: Path, work: Path) -> None:
    """Restore the runs of `pack_runs` in `work`, except those that have got as far there.

    Raises:
      UsageError: a part is missing or not whole.
    """
    content = b"".join(part.read_bytes() for part in _parts(folder, work))
    if not content:
        return
    with tempfile.TemporaryDirectory(dir=work) as unpacked:
        try:
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                _extract(tar, Path(unpacked))
        except (tarfile.TarError, EOFError) as error:
            raise UsageError(
                f"{folder}: its {work.name}.tar.* do not belong together ({error}); copy them again"
            ) from None
        for run in sorted(Path(unpacked).iterdir()):
            if progress(run) > progress(work / run.name):
                shutil.rmtree(work / run.name, ignore_errors=True)
                run.rename(work / run.name)


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    """Extract only what `pack_runs` puts into an archive: files RUN/NAME."""
    for member in tar:
        run, _, name = member.name.partition("/")
        content = tar.extractfile(member) if member.isfile() and name in CARRIED else None
        if content is not None and run not in ("", ".", ".."):
            (folder / run).mkdir(exist_ok=True)
            with content, open(folder / run / name, "wb") as file:
                shutil.copyfileobj(content, file)
