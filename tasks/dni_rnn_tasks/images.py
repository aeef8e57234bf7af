"""MNIST and CIFAR-10."""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dni_rnn.config import FeedforwardConfig, Preset
from dni_rnn.data.labelled import Examples, hold_out
from dni_rnn_tasks.known_files import KnownFile, Source, Unusable, load_known

if TYPE_CHECKING:
    import numpy as np

# The four files of yann.lecun.com/exdb/mnist, compressed as published and unpacked, in the order train
# images, train labels, test images, test labels.
IDX_GZ = (
    KnownFile(
        "train-images-idx3-ubyte.gz",
        9_912_422,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    KnownFile(
        "train-labels-idx1-ubyte.gz",
        28_881,
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    KnownFile(
        "t10k-images-idx3-ubyte.gz",
        1_648_877,
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    KnownFile(
        "t10k-labels-idx1-ubyte.gz",
        4_542,
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
)
IDX = (
    KnownFile(
        "train-images-idx3-ubyte",
        47_040_016,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    KnownFile(
        "train-labels-idx1-ubyte",
        60_008,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    KnownFile(
        "t10k-images-idx3-ubyte",
        7_840_016,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    KnownFile(
        "t10k-labels-idx1-ubyte",
        10_008,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
)
# The binary version of CIFAR-10: records of one label byte and 3,072 pixels, red, green, blue.
CIFAR = (
    KnownFile(
        "data_batch_1.bin",
        30_730_000,
        "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    ),
    KnownFile(
        "data_batch_2.bin",
        30_730_000,
        "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    ),
    KnownFile(
        "data_batch_3.bin",
        30_730_000,
        "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    ),
    KnownFile(
        "data_batch_4.bin",
        30_730_000,
        "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    ),
    KnownFile(
        "data_batch_5.bin",
        30_730_000,
        "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    ),
    KnownFile(
        "test_batch.bin",
        30_730_000,
        "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    ),
)
RECORD = 1 + 3 * 32 * 32
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
PRESETS = {"paper": Preset(run={"recipe": "paper"})}
VALIDATION = 5_000
"""Training examples held out, always the same."""
MNIST_ADVICE = (
    "put the four idx files (train-images-idx3-ubyte.gz, ...) in a folder and pass it with --data-dir, "
    "or pip install 'dni-rnn[datasets]' to download them"
)
CIFAR_ADVICE = (
    "put the files of the CIFAR-10 binary version (data_batch_1.bin, ..., test_batch.bin) in a folder and "
    "pass it with --data-dir, or pip install 'dni-rnn[datasets]' to download them"
)
BINARY = (
    "get the binary version (cifar-10-binary.tar.gz of www.cs.toronto.edu/~kriz/cifar.html), unpacked, or "
    "leave --data-dir out with 'dni-rnn[datasets]' installed"
)
PICKLED = f"the Python version of CIFAR-10, which is pickled, and to load a pickle is to run it; {BINARY}"
NOT_CIFAR = (
    Unusable("cifar-10-binary.tar.gz", "still packed; unpack it there (tar xzf)"),
    Unusable("cifar-10-batches-py", PICKLED),
    Unusable("data_batch_1", PICKLED),
    Unusable("cifar-10-python.tar.gz", PICKLED),
    Unusable("cifar-100-binary", f"CIFAR-100, other pictures; {BINARY}"),
    Unusable("cifar-100-python", f"CIFAR-100, other pictures; {BINARY}"),
    Unusable("cifar-10-batches-mat", f"the Matlab version of CIFAR-10; {BINARY}"),
)
NOT_MNIST = (
    Unusable("mnist.npz", f"MNIST as Keras has it, which is not read; {MNIST_ADVICE}"),
    Unusable("training.pt", f"MNIST as old torchvision had it, which is pickled; {MNIST_ADVICE}"),
    Unusable("mnist.pkl.gz", f"a pickled MNIST, and to load a pickle is to run it; {MNIST_ADVICE}"),
)


@dataclass(frozen=True, kw_only=True)
class CIFARConfig(FeedforwardConfig):
    """A feed-forward run on CIFAR-10, with the published widths."""

    widths: ClassVar[dict[str, int]] = {"mlp": 1000, "cnn": 128, "vgg": 64, "sigmoid": 1000}
    paper_synthesizers: ClassVar[dict[tuple[str, str], str]] = {
        ("mlp", "dni"): "mlp:4000",
        ("mlp", "cdni"): "linear",
        ("cnn", "dni"): "mlp:128,128",
        ("cnn", "cdni"): "linear",
    }


@dataclass(frozen=True, kw_only=True)
class MNIST:
    """Handwritten digits, 28 x 28: a feed-forward net, cut between its layers.

    55,000 training examples, 5,000 of the training set held out for validation, 10,000 test examples.
    """

    config: ClassVar[type[FeedforwardConfig]] = FeedforwardConfig
    presets: ClassVar = PRESETS

    def load(self, data_dir: Path | None) -> Examples:
        """Read the idx files; see `load_known` for where they are looked for.

        Raises:
          UsageError: the files are not found, or are not the published ones.
        """
        import numpy as np

        source = Source("datasets", mnist_datasets)
        contents = load_known("mnist", (IDX_GZ, IDX), data_dir, (source,), MNIST_ADVICE, NOT_MNIST)
        raw = [gzip.decompress(c) if name.endswith(".gz") else c for name, c in contents.items()]
        images = [np.frombuffer(raw[i], np.uint8, offset=16).reshape(-1, 1, 28, 28) for i in (0, 2)]
        labels = [np.frombuffer(raw[i], np.uint8, offset=8) for i in (1, 3)]
        train, valid = hold_out(images[0], labels[0], VALIDATION)
        digits = tuple(str(digit) for digit in range(10))
        return Examples("mnist", digits, train, valid, (images[1].copy(), labels[1].copy()))


@dataclass(frozen=True, kw_only=True)
class CIFAR10:
    """Small colour photographs, 32 x 32, of ten classes: a feed-forward net, cut between its layers.

    45,000 training examples, 5,000 of the training set held out for validation, 10,000 test examples.
    """

    config: ClassVar[type[FeedforwardConfig]] = CIFARConfig
    presets: ClassVar = PRESETS

    def load(self, data_dir: Path | None) -> Examples:
        """Read the six files of the binary version; see `load_known` for where they are looked for.

        Raises:
          UsageError: the files are not found, or are not the published ones.
        """
        import numpy as np

        source = Source("datasets", cifar_datasets)
        contents = load_known("cifar-10-batches-bin", (CIFAR,), data_dir, (source,), CIFAR_ADVICE, NOT_CIFAR)
        records = np.frombuffer(b"".join(contents.values()), np.uint8).reshape(-1, RECORD)
        images, labels = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]
        train, valid = hold_out(images[:50_000], labels[:50_000], VALIDATION)
        test = (images[50_000:].copy(), labels[50_000:].copy())
        return Examples("cifar10", CIFAR_CLASSES, train, valid, test, flips=True)


def _from_hub(name: str, image: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images (N, height, width, ...) and labels of both splits of a data set of Hugging Face `datasets`."""
    import numpy as np
    from datasets import load_dataset  # pyright: ignore[reportMissingImports]

    found = {}
    for split, rows in load_dataset(name).items():
        pictures = np.stack([np.asarray(picture) for picture in rows[image]])
        found[split] = (pictures.astype(np.uint8), np.asarray(rows["label"], np.uint8))
    return found


def mnist_datasets() -> dict[str, bytes]:
    """Download MNIST with Hugging Face `datasets`, as the unpacked idx files."""
    splits = _from_hub("ylecun/mnist", "image")
    contents = {}
    for (images, labels), split in zip((IDX[:2], IDX[2:]), ("train", "test"), strict=True):
        pictures, numbers = splits[split]
        sizes = b"".join(int(size).to_bytes(4, "big") for size in pictures.shape)
        contents[images.name] = b"\0\0\x08\x03" + sizes + pictures.tobytes()
        contents[labels.name] = b"\0\0\x08\x01" + len(numbers).to_bytes(4, "big") + numbers.tobytes()
    return contents


def cifar_datasets() -> dict[str, bytes]:
    """Download CIFAR-10 with Hugging Face `datasets`, as the files of the binary version."""
    import numpy as np

    splits = _from_hub("uoft-cs/cifar10", "img")
    file = io.BytesIO()
    for split in ("train", "test"):
        pictures, numbers = splits[split]
        rows = pictures.transpose(0, 3, 1, 2).reshape(len(pictures), -1)
        file.write(np.concatenate([numbers[:, None], rows], axis=1).tobytes())
    whole, size = file.getvalue(), CIFAR[0].size
    return {known.name: whole[i * size : (i + 1) * size] for i, known in enumerate(CIFAR)}
