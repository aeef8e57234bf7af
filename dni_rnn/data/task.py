"""The `Task` protocol, and look-up of tasks by name. The library itself contains no task."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from dni_rnn.config import RecurrentConfig, RunConfig
from dni_rnn.errors import UsageError
from dni_rnn.registry import why

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from dni_rnn.data.streams import Stream
    from dni_rnn.data.texts import Numbers

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
GROUP = "dni_rnn.tasks"


class Data(Protocol):
    """Data of a task for a recurrent learner: symbols, and streams of them."""

    @property
    def name(self) -> str:
        """Name of the data in results: `ptb/char`, `text/default`, `recall/8`."""
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
        """Open a stream of windows over `split`, with `batch_size` rows."""
        ...


@runtime_checkable
class Task(Protocol):
    """A task is a frozen dataclass: its fields are its command-line options.

    Registered under the entry-point group `dni_rnn.tasks`; the class docstring is its help text.
    A module that defines a task must not import torch at its top: `dni-rnn --help` reads them all.

    Optional class attributes: `presets` maps names for `--preset` to `dni_rnn.config.Preset`, of which
    "default" applies without `--preset`; `config` is a subclass of `dni_rnn.config.RunConfig`, by default
    `RecurrentConfig`.
    Optional static methods: `learner` returns the `dni_rnn.training.learner.Learner` that trains the task, by
    default that of its kind of configuration; `part` returns what trains a part in its own process, by
    default `dni_rnn.distributed.chain.ChainPart`. Both import what they return when they are called.
    A task that reads a file named by the user may have a method `find(data_dir)`: the path of that file in a
    folder, or None.
    """

    def load(self, data_dir: Path | None) -> Any:
        """Find, check and read the data. Raises `UsageError` when it cannot."""
        ...


class _OfSymbols:
    """Data whose targets are symbols of the input."""

    symbols: tuple[str, ...]

    @property
    def input_symbols(self) -> int:
        return len(self.symbols)

    @property
    def target_symbols(self) -> int:
        return len(self.symbols)


@dataclass(frozen=True)
class Alphabet(_OfSymbols):
    """The symbols of a text, without the text: enough for sampling.

    Attributes:
      name: name of the text.
      symbols: in the order of their numbers.
      counts: how often each occurs in training.
    """

    name: str
    symbols: tuple[str, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Corpus(_OfSymbols):
    """A text as symbol numbers, in three splits.

    Attributes:
      name: what was loaded, convention included, for example `ptb/char`.
      symbols: the vocabulary in the order of its numbers; what `dni-rnn sample` prints. The last one may be
        `dni_rnn.data.texts.UNKNOWN`, for all symbols that do not occur in training.
      train: one-dimensional array of symbol numbers (`uint8`, `int16` or `int32`, as the vocabulary needs).
      valid: the same for validation.
      test: the same for the test.
    """

    name: str
    symbols: tuple[str, ...]
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    @property
    def alphabet(self) -> Alphabet:
        """The symbols, and how often they occur in training."""
        from dni_rnn.data.texts import counted

        counts = counted(self.train, len(self.symbols))
        return Alphabet(self.name, self.symbols, tuple(counts.tolist()))

    @property
    def unknown(self) -> int:
        """Number of validation and test symbols that do not occur in training."""
        from dni_rnn.data.texts import UNKNOWN, counted

        if self.symbols[-1] != UNKNOWN:
            return 0
        return sum(int(counted(split, len(self.symbols))[-1]) for split in (self.valid, self.test))

    def stream(self, split: Split, batch_size: int, seed: int) -> Stream:
        """The text cut into `batch_size` pieces of equal length, read in parallel (`seed` unused)."""
        from dni_rnn.data.streams import TokenStream

        return TokenStream(getattr(self, split), batch_size)

    @classmethod
    def from_texts(cls, name: str, train: str, valid: str, test: str) -> Corpus:
        """Number the symbols of `train` in sorted order and encode the three splits.

        Raises:
          UsageError: a split is empty.
        """
        from dni_rnn.data.texts import PIECE, Numbers, code_points

        numbers = Numbers(len(train) + len(valid) + len(test))
        for split, text in zip(SPLITS, (train, valid, test), strict=True):
            if not text:
                raise UsageError(f"{name}: the {split} split is empty; give a longer text")
            for start in range(0, len(text), PIECE):
                numbers.add(code_points(text[start : start + PIECE]))
        return cls.from_numbers(name, numbers, len(train), len(valid))

    @classmethod
    def from_numbers(
        cls, name: str, numbers: Numbers, train: int, valid: int, *, of_bytes: bool = False
    ) -> Corpus:
        """Split a text by position, and number the symbols of its beginning in sorted order.

        Symbols that occur only after it become `UNKNOWN`. `numbers` may be overwritten.

        Args:
          train: number of training symbols.
          valid: number of validation symbols; the rest is for test.
          of_bytes: the symbols are `BYTES`, whether they occur or not.
        """
        import numpy as np

        from dni_rnn.data.texts import BYTES, UNKNOWN, counted, renumbered

        codes = np.array(numbers.codes)
        seen, later = (counted(part, len(codes)) > 0 for part in np.split(numbers.values, [train]))
        known = np.arange(len(BYTES)) if of_bytes else np.sort(codes[seen])
        table = np.where(np.isin(codes, known), np.searchsorted(known, codes), len(known))
        symbols = BYTES if of_bytes else tuple(map(chr, known.tolist()))
        if (later & (table == len(known))).any():
            symbols = (*symbols, UNKNOWN)
        values = renumbered(numbers.values, table, len(symbols))
        return cls(name, symbols, *np.split(values, [train, train + valid]))


def content_of(data: Any) -> dict[str, Any] | None:
    """Length and SHA-256 of the loaded data; None for generated or live data."""
    digest, length = hashlib.sha256(), 0
    for split in SPLITS:
        held = getattr(data, split, ())
        arrays = [each for each in (held if isinstance(held, tuple) else (held,)) if hasattr(each, "tobytes")]
        for array in arrays:
            digest.update(f"{split} {array.dtype} {array.shape}".encode())
            whole = array.flags.c_contiguous and array.size  # then it need not be copied
            digest.update(memoryview(array).cast("B") if whole else array.tobytes())
        length += len(arrays[0]) if arrays else 0
    return {"length": length, "sha256": digest.hexdigest()} if length else None


def config_of(task: type) -> type[RunConfig]:
    """The kind of configuration of a task: its `config`, or `RecurrentConfig`."""
    return getattr(task, "config", RecurrentConfig)


def installed_tasks() -> dict[str, type]:
    """Every task registered by an installed package, by name, in alphabetical order.

    A task that cannot be imported is skipped with a line on standard error, so that a broken package does
    not disable the others.
    """
    tasks = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            tasks[entry.name] = entry.load()
        except (Exception, SystemExit) as error:
            print(
                f"dni-rnn: task {entry.name!r} is registered but cannot be used: {why(error)}",
                file=sys.stderr,
            )
    return tasks
