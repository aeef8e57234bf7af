"""What a task is, and how one is found by name. The library itself knows no task."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from dni_rnn.config import RecurrentConfig, RunConfig
from dni_rnn.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from dni_rnn.data.streams import Stream

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
GROUP = "dni_rnn.tasks"


class Data(Protocol):
    """What a loaded task offers to a recurrent learner: symbols, and streams of them."""

    @property
    def name(self) -> str:
        """What was loaded, as results call it: `ptb/char`, `text/default`, `recall/8`."""
        ...

    @property
    def input_symbols(self) -> int:
        """Number of distinct input symbols."""
        ...

    @property
    def target_symbols(self) -> int:
        """Number of distinct target symbols."""
        ...

    def stream(self, split: Split, batch_size: int, seed: int) -> Stream:
        """Open a stream of windows over `split`, `batch_size` rows side by side."""
        ...


@runtime_checkable
class Task(Protocol):
    """A task is a frozen dataclass: its fields are its command-line options.

    Registered under the entry-point group `dni_rnn.tasks`; the class docstring is its help text.
    A module that defines a task must not import torch at its top: `dni-rnn --help` reads them all.

    It may have `presets`, a class attribute: names for `--preset` -> `dni_rnn.config.Preset`. The one
    named "default" holds without `--preset`.
    Its runs are described by a class attribute `config`, a subclass of `dni_rnn.config.RunConfig`; without
    one it is a task for a recurrent net, `RecurrentConfig`. What trains it is the learner of that kind of
    configuration, or what its static method `learner` returns (a `dni_rnn.training.learner.Learner`); in
    processes of their own, its parts are trained by `dni_rnn.distributed.chain.ChainPart`, or by what its
    static method `part` returns. Both import what they return when they are called.
    """

    def load(self, data_dir: Path | None) -> Any:
        """Find, check and read the data. Raises `UsageError` when it cannot."""
        ...


@dataclass(frozen=True)
class Corpus:
    """A text as symbol numbers, in three splits.

    Attributes:
      name: what was loaded, convention included, for example `ptb/char`.
      symbols: the vocabulary in the order of its numbers; what `dni-rnn sample` prints.
      train: one-dimensional array of symbol numbers (`uint8`, or `int32` when the vocabulary needs it).
      valid: the same for validation.
      test: the same for the test.
    """

    name: str
    symbols: tuple[str, ...]
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    @property
    def input_symbols(self) -> int:
        return len(self.symbols)

    @property
    def target_symbols(self) -> int:
        return len(self.symbols)

    def stream(self, split: Split, batch_size: int, seed: int) -> Stream:
        """The text cut into `batch_size` pieces of equal length, read side by side (`seed` unused)."""
        from dni_rnn.data.streams import TokenStream

        return TokenStream(getattr(self, split), batch_size)

    @classmethod
    def from_texts(cls, name: str, train: str, valid: str, test: str) -> Corpus:
        """Number the symbols of `train` in sorted order and encode the three splits.

        Raises:
          UsageError: a split is empty, or `valid` or `test` holds a symbol that `train` does not.
        """
        import numpy as np

        symbols = tuple(sorted(set(train)))
        number = {symbol: i for i, symbol in enumerate(symbols)}
        dtype = np.uint8 if len(symbols) <= 256 else np.int32
        encoded = []
        for split, text in zip(SPLITS, (train, valid, test), strict=True):
            if not text:
                raise UsageError(f"{name}: the {split} split is empty; give a longer text")
            unseen = sorted(set(text) - set(symbols))
            if unseen:
                raise UsageError(
                    f"{name}: the {split} split holds {unseen[0]!r}, which never occurs in training; "
                    f"remove it or add it to the training text ({len(unseen)} such symbols)"
                )
            encoded.append(np.fromiter((number[s] for s in text), dtype=dtype, count=len(text)))
        return cls(name, symbols, *encoded)


def content_of(data: Any) -> dict[str, Any] | None:
    """Length and SHA-256 of all that was loaded; None where nothing was: it is generated, or a live stream."""
    digest, length = hashlib.sha256(), 0
    for split in SPLITS:
        held = getattr(data, split, ())
        arrays = held if isinstance(held, tuple) else (held,)
        for array in arrays:
            digest.update(f"{split} {array.dtype} {array.shape}".encode())
            digest.update(memoryview(array).cast("B") if array.flags.c_contiguous else array.tobytes())
        length += len(arrays[0]) if arrays else 0
    return {"length": length, "sha256": digest.hexdigest()} if length else None


def config_of(task: type) -> type[RunConfig]:
    """The configuration that a task is trained with: its `config`, or that of a recurrent net."""
    return getattr(task, "config", RecurrentConfig)


def installed_tasks() -> dict[str, type]:
    """Every task registered by an installed package, by name, in alphabetical order.

    One that cannot be imported is left out, with a line on standard error: somebody else's broken
    package must not take the other tasks away.
    """
    tasks = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            tasks[entry.name] = entry.load()
        except Exception as error:
            reason = " ".join(str(error).split())
            print(f"dni-rnn: task {entry.name!r} is registered but cannot be used: {reason}", file=sys.stderr)
    return tasks
