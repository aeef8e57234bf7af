"""Cores and estimators by name. Listing names imports neither them nor torch.

A name is one of
  a module of this package:  `lstm` of the kind `cores` is the `CORE` of `dni_rnn/cores/lstm.py`,
                             `dni` of the kind `estimators` the `ESTIMATOR` of `dni_rnn/estimators/dni.py`;
  an entry point of an installed package, in the group `dni_rnn.cores` or `dni_rnn.estimators`;
  `package.module:Name`, anything that can be imported.
"""

from __future__ import annotations

import inspect
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from dni_rnn.errors import UsageError

Kind = Literal["cores", "estimators"]


def names(kind: Kind) -> list[str]:
    """All known names, in alphabetical order; others are given as `package.module:Name`."""
    return sorted({*_ours(kind)} | {entry.name for entry in entry_points(group=f"dni_rnn.{kind}")})


@cache
def _ours(kind: Kind) -> dict[str, str]:
    """The modules of this package, by name."""
    stems = [path.stem for path in (Path(__file__).parent / kind).glob("[a-z]*.py")]
    return {stem.replace("_", "-"): f"dni_rnn.{kind}.{stem}" for stem in stems}


def check(kind: Kind, name: str) -> None:
    """Raises `UsageError` when `name` is neither known nor of the form `package.module:Name`."""
    # Entry points last: every configuration calls this, and they are searched in all installed packages.
    if name not in _ours(kind) and not is_import(name) and name not in names(kind):
        raise UsageError(
            f"--{kind[:-1]} {name}: not known; give one of {', '.join(names(kind))}, or package.module:Name"
        )


def find(kind: Kind, name: str) -> Any:
    """The class, or other callable, that `name` stands for.

    Raises:
      UsageError: there is none, or it cannot be imported.
    """
    check(kind, name)
    if name in _ours(kind):
        return getattr(import_module(_ours(kind)[name]), kind[:-1].upper())
    for entry in entry_points(group=f"dni_rnn.{kind}", name=name):
        return imported(f"--{kind[:-1]}", entry.value)
    return imported(f"--{kind[:-1]}", name)


def is_import(text: str) -> bool:
    """Whether an option is `package.module:Name`."""
    module, colon, name = text.partition(":")
    if module == "mlp":  # `mlp:WIDTH`
        return False
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), *name.split(".")])


def imported(flag: str, text: str) -> Any:
    """What `package.module:Name` stands for.

    Raises:
      UsageError: it cannot be imported; `flag` is the user's option.
    """
    module, _, name = text.partition(":")
    with theirs(f"{flag} {text}: cannot be imported"):
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found


def built(flag: str, text: str, kind: Any, *arguments: Any, **options: Any) -> Any:
    """`kind(*arguments, **options)`, where `text` may name a user's class.

    Raises:
      UsageError: it does not accept these, or a user's class fails.
    """
    if not is_import(text.partition(",")[0]):
        try:
            inspect.signature(kind).bind(*arguments, **options)
            return kind(*arguments, **options)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{flag} {text}: {error}") from None
    with theirs(f"{flag} {text}: cannot be made"):
        return kind(*arguments, **options)


@contextmanager
def theirs(failing: str) -> Iterator[None]:
    """Turn errors of a user's code inside into one line, with file and line number."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{failing} ({why(error)})") from error


def why(error: BaseException) -> str:
    """The message of an error in one line, with its location in the user's own files."""
    said, place = " ".join(str(error).split()) or type(error).__name__, None
    if isinstance(error, SyntaxError):
        said, place = f"{type(error).__name__}: {error.msg}", (error.filename, error.lineno)
    else:
        if not isinstance(error, ImportError | AttributeError):
            said = f"{type(error).__name__}: {said}"
        libraries = tuple(
            sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")
        )
        ours = (*libraries, str(Path(__file__).parent), "<frozen ")
        for frame, line in traceback.walk_tb(error.__traceback__):
            if not frame.f_code.co_filename.startswith(ours):
                place = (frame.f_code.co_filename, line)
    return said[:300] if place is None else f"{place[0]}, line {place[1]}: {said[:300]}"
