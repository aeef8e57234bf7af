"""What a task is, and how one is found by name. The library itself knows no task."""

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
    A task whose data are a file that the user names may have a method `find(data_dir)`: where that file is in
    a folder, None where it is not.
    """

    def load(self, data_dir: Path | None) -> Any:
        """Find, check and read the data. Raises `UsageError` when it cannot."""
        ...


class _OfSymbols:
    """What predicts the symbols that it reads."""

    symbols: tuple[str, ...]

    @property
    def input_symbols(self) -> int:
        return len(self.symbols)

    @property
    def target_symbols(self) -> int:
        return len(self.symbols)


@dataclass(frozen=True)
class Alphabet(_OfSymbols):
    """The symbols of a text, without the text: what a model needs to write.

    Attributes:
      name: of the text.
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
        `dni_rnn.data.texts.UNKNOWN`: all that training has not got.
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
        """How many symbols of validation and test training has not got."""
        from dni_rnn.data.texts import UNKNOWN, counted

        if self.symbols[-1] != UNKNOWN:
            return 0
        return sum(int(counted(split, len(self.symbols))[-1]) for split in (self.valid, self.test))

    def stream(self, split: Split, batch_size: int, seed: int) -> Stream:
        """The text cut into `batch_size` pieces of equal length, read side by side (`seed` unused)."""
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

        Symbols that occur only behind it become `UNKNOWN`. `numbers` are used up.

        Args:
          train: how many symbols train.
          valid: how many more are for validation; the rest is for test.
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
    """Length and SHA-256 of all that was loaded; None where nothing was: it is generated, or live."""
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
        except (Exception, SystemExit) as error:
            print(
                f"dni-rnn: task {entry.name!r} is registered but cannot be used: {why(error)}",
                file=sys.stderr,
            )
    return tasks
