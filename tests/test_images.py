"""Labelled examples: files that are checked, batches made on the device, and runs on them."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from reference import close

from dni_rnn.cli import main
from dni_rnn.config import FeedforwardConfig
from dni_rnn.data.labelled import Batches, Examples, hold_out, shifted
from dni_rnn.errors import UsageError
from dni_rnn.training.checkpoint import load_checkpoint, save_checkpoint
from dni_rnn.training.feedforward import FeedforwardLearner, loss_of, rate_factor, wrong
from dni_rnn.training.loop import Interrupted, train
from dni_rnn.training.run_directory import Run
from dni_rnn_tasks import images
from dni_rnn_tasks.addition import Addition, AdditionConfig
from dni_rnn_tasks.known_files import KnownFile

DATA = Path(__file__).parents[2] / "shared" / "data"
CPU = torch.device("cpu")


def pictures(count: int, seed: int = 0) -> Examples:
    """Random pictures whose class is the brightest of their three channels."""
    random = np.random.default_rng(seed)

    def some(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = random.integers(0, 3, n)
        made = random.integers(0, 100, (n, 3, 8, 8))
        made[np.arange(n), labels] += 100
        return made.astype(np.uint8), labels.astype(np.uint8)

    return Examples("made up", ("red", "green", "blue"), some(count), some(40), some(50), flips=True)


# Files.


def small_idx(folder: Path) -> None:
    for file in images.IDX_GZ:
        (folder / file.name).write_bytes(b"\0" * 100)


def test_a_truncated_image_file_is_refused(tmp_path):
    small_idx(tmp_path)
    with pytest.raises(UsageError, match=r"train-images-idx3-ubyte.gz: not the published file \(100 bytes"):
        images.MNIST().load(tmp_path)


def test_a_corrupted_image_file_is_refused(tmp_path):
    for file in images.CIFAR:
        with open(tmp_path / file.name, "wb") as sparse:
            sparse.truncate(file.size)  # the right length, and nothing in it
    with pytest.raises(UsageError, match=r"data_batch_1.bin: not the published file \(SHA-256"):
        images.CIFAR10().load(tmp_path)


def test_a_missing_image_file_is_named(tmp_path):
    small_idx(tmp_path)
    (tmp_path / images.IDX_GZ[2].name).unlink()
    with pytest.raises(UsageError, match=r"no t10k-images-idx3-ubyte.gz there"):
        images.MNIST().load(tmp_path)


def test_one_flipped_byte_of_the_real_files_is_refused(tmp_path):
    if not (DATA / "mnist").is_dir():
        pytest.skip("skipped: a damaged MNIST file, because the real ones are not there")
    shutil.copytree(DATA / "mnist", tmp_path / "mnist")
    path = tmp_path / "mnist" / images.IDX_GZ[1].name
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(UsageError, match="SHA-256"):
        images.MNIST().load(tmp_path)


@pytest.fixture
def tiny_mnist(monkeypatch) -> dict[str, bytes]:
    """Files that stand for the published ones, by their names; each checked as those are."""
    random = np.random.default_rng(0)
    digits, contents = {"train": 5_010, "t10k": 20}, {}
    for split, count in digits.items():
        contents[f"{split}-images-idx3-ubyte"] = bytes(16) + random.bytes(count * 784)
        contents[f"{split}-labels-idx1-ubyte"] = bytes(8) + bytes(i % 10 for i in range(count))
    known = [KnownFile(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in contents.items()]
    monkeypatch.setattr(images, "IDX", tuple(known))
    return contents


LAYOUTS = {
    "torchvision": ("MNIST/raw/{}", True),
    "torchvision, and another data set of the same names": ("MNIST/raw/{}", True),
    "dots": ("{}", False),
    "a folder too deep, dots": ("download/mnist/mnist/{}", True),
    "packed anew": ("mnist/{}.gz", False),
    "half of them packed": ("{}", False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mnist_as_people_have_it(layout, tiny_mnist, tmp_path):
    for number, (name, content) in enumerate(tiny_mnist.items()):
        place = LAYOUTS[layout][0].format(name.replace("-idx", ".idx") if "dots" in layout else name)
        packed = place.endswith(".gz") or (layout.startswith("half") and number % 2)
        path = tmp_path / (place if place.endswith(".gz") or not packed else f"{place}.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content, 1) if packed else content)
        if "another" in layout:
            (tmp_path / "FashionMNIST" / "raw").mkdir(parents=True, exist_ok=True)
            (tmp_path / "FashionMNIST" / "raw" / name).write_bytes(content[::-1])
    data = images.MNIST().load(tmp_path)
    assert data.test[0].tobytes() == tiny_mnist["t10k-images-idx3-ubyte"][16:]
    assert data.test[1].tobytes() == tiny_mnist["t10k-labels-idx1-ubyte"][8:]


def test_a_bomb_in_place_of_a_picture_file_stays_packed(tiny_mnist, tmp_path):
    for name, content in tiny_mnist.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content, 1))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(10_000_000)))
    with pytest.raises(UsageError, match="15,697 bytes instead of 15,696"):
        images.MNIST().load(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(50))[:-9])
    with pytest.raises(UsageError, match=r"t10k-images-idx3-ubyte\.gz: cannot be read"):
        images.MNIST().load(tmp_path)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (
            "cifar-10-batches-py/data_batch_1",
            "pickled, and to load a pickle is to run it; get the binary",
        ),
        ("tv/cifar-10-batches-py/data_batch_1", "pickled"),
        ("data_batch_1", "pickled"),
        ("cifar-10-python.tar.gz", "pickled"),
        ("cifar-10-binary.tar.gz", "unpack it there"),
        ("cifar-100-binary/train.bin", "other pictures"),
    ],
)
def test_other_forms_of_cifar_are_named(there, said, tmp_path):
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).write_bytes(b"cos\nsystem\n(S'touch loaded'\ntR.")
    with pytest.raises(UsageError, match=said) as error:
        images.CIFAR10().load(tmp_path)
    assert "\n" not in str(error.value)


def test_cifar_a_folder_too_deep(tmp_path, monkeypatch):
    contents = {file.name: bytes([i]) * images.RECORD * 10_000 for i, file in enumerate(images.CIFAR)}
    known = [KnownFile(n, len(c), hashlib.sha256(c).hexdigest()) for n, c in contents.items()]
    monkeypatch.setattr(images, "CIFAR", tuple(known))
    folder = tmp_path / "cifar-10-batches-bin" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (tmp_path / "cifar-10-batches-py").mkdir()
    data = images.CIFAR10().load(tmp_path)
    assert (set(data.test[1].tolist()), len(data.train[0])) == ({5}, 45_000)


def test_mnist():
    if not (DATA / "mnist").is_dir():
        pytest.skip("skipped: MNIST, because its files are not there")
    data = images.MNIST().load(DATA)
    assert [len(data.split(s)[0]) for s in ("train", "valid", "test")] == [55_000, 5_000, 10_000]
    assert data.shape == (1, 28, 28)
    assert np.bincount(data.test[1]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    together = np.bincount(np.concatenate([data.train[1], data.valid[1]]))
    assert together.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def hub(monkeypatch, name: str, splits: dict[str, dict[str, list]]) -> None:
    """A `datasets` that serves `splits` under `name`, its rows as the real one gives them."""
    module = ModuleType("datasets")

    def load_dataset(asked: str) -> dict[str, dict[str, list]]:
        assert asked == name
        return splits

    vars(module)["load_dataset"] = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_mnist_from_the_hub_is_the_published_one(monkeypatch):
    if not (DATA / "mnist").is_dir():
        pytest.skip("skipped: MNIST, because its files are not there")
    raw = [gzip.decompress((DATA / "mnist" / file.name).read_bytes()) for file in images.IDX_GZ]
    rows = [
        {
            "image": list(np.frombuffer(raw[i], np.uint8, offset=16).reshape(-1, 28, 28)),
            "label": list(raw[i + 1][8:]),
        }
        for i in (0, 2)
    ]
    hub(monkeypatch, "ylecun/mnist", {"train": rows[0], "test": rows[1]})
    contents = images.mnist_datasets()
    assert [file.mismatch(contents[file.name]) for file in images.IDX] == [None] * 4


def test_cifar_from_the_hub_has_the_layout_of_the_binary_version(monkeypatch):
    """By hand: a record is the label, then 1,024 pixels of red, of green, of blue, row by row."""
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    rows = {"img": list(pictures[:5]), "label": [3, 1, 4, 1, 5]}
    hub(
        monkeypatch,
        "uoft-cs/cifar10",
        {"test": {"img": [pictures[5]], "label": [9]}, "train": rows},
    )
    monkeypatch.setattr(images, "CIFAR", [KnownFile(f.name, images.RECORD, "") for f in images.CIFAR])
    contents = list(images.cifar_datasets().values())
    assert [content[0] for content in contents] == [3, 1, 4, 1, 5, 9]
    for content, picture in zip(contents, pictures, strict=True):
        for channel, row, column in ((0, 0, 0), (1, 2, 31), (2, 31, 5)):
            assert content[1 + 1024 * channel + 32 * row + column] == picture[row, column, channel]


# Batches.


def test_what_is_held_out_is_neither_lost_nor_shared():
    inputs, targets = np.arange(50, dtype=np.uint8)[:, None], np.arange(50, dtype=np.uint8)
    (train_x, train_y), (valid_x, valid_y) = hold_out(inputs, targets, 8)
    assert len(valid_x) == 8
    assert sorted([*train_y, *valid_y]) == list(range(50))
    assert (train_x[:, 0] == train_y).all()
    assert (valid_x[:, 0] == valid_y).all()
    again = hold_out(inputs, targets, 8)
    assert (again[1][1] == valid_y).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_pass_shows_every_example_once_in_an_order_of_its_own(seed):
    nothing = (np.zeros((1, 1), np.uint8), np.zeros(1))
    some = (np.arange(20, dtype=np.uint8)[:, None], np.arange(20))
    data = Examples("numbers", ("a",), some, nothing, nothing)
    batches = Batches(data, "train", 5, CPU, seed)
    assert batches.per_pass == 4
    passes = [[int(y) for i in range(4) for y in batches.batch(4 * n + i)[1]] for n in range(2)]
    assert [sorted(each) for each in passes] == [list(range(20))] * 2
    assert passes[0] != passes[1]
    other = Batches(data, "train", 5, CPU, seed)
    assert other.batch(6)[1].tolist() == passes[1][10:15]  # the number of a batch alone says what is in it
    assert Batches(data, "train", 5, CPU, seed + 1).batch(0)[1].tolist() != passes[0][:5]


def test_inputs_are_normalised_channel_by_channel():
    batches = Batches(pictures(64), "train", 64, CPU)
    x, _ = batches.batch(0)
    assert x.dtype == torch.float32
    close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    close(x.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-4)
    valid = torch.cat([x for x, _ in Batches(pictures(64), "valid", 1, CPU).in_order(7)])
    assert valid.shape == (40, 3, 8, 8)
    assert 0 < float(valid.mean().abs()) < 0.1  # by the training pictures' numbers


def test_shifts_move_whole_pictures_and_flips_mirror_them():
    torch.manual_seed(0)
    first = torch.zeros(500, 1, 8, 8, dtype=torch.uint8)
    first[:, 0, 4, 2], first[:, 0, 4, 3] = 7, 9
    moved = shifted(first, flips=True)
    assert moved.shape == first.shape
    seen = set()
    for picture in moved[:, 0]:
        (y, x), (other_y, other_x) = ((picture == v).nonzero()[0].tolist() for v in (7, 9))
        assert int((picture > 0).sum()) == 2
        assert y == other_y
        seen.add((y - 4, other_x - x))
    assert seen == {(dy, step) for dy in (-1, 0, 1) for step in (-1, 1)}
    assert {
        int((p == 9).nonzero()[0, 1] - (p == 7).nonzero()[0, 1]) for p in shifted(first, False)[:, 0]
    } == {1}


def test_batches_are_augmented_before_they_are_normalised():
    data = pictures(16)
    plain, augmented = (Batches(data, "train", 8, CPU, augment=on) for on in (False, True))
    torch.manual_seed(3)
    inputs, targets = augmented.batch(0)
    torch.manual_seed(3)
    plain.batch(0)  # draws the order of the first pass
    raw = torch.from_numpy(data.train[0])[plain._order][:8]
    assert torch.equal(inputs, plain._numbers(shifted(raw, data.flips)))
    assert torch.equal(targets, plain.batch(0)[1])
    assert not torch.equal(inputs, plain.batch(0)[0])


def test_losses_and_errors_by_arithmetic():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0])
    softplus = torch.nn.functional.softplus
    one, two = softplus(torch.tensor(-2.0).double()), softplus(torch.tensor(1.0).double())
    close(loss_of(logits, labels), (one + two) / 2)
    assert int(wrong(logits, labels)) == 1
    bits = torch.tensor([[1, 0], [0, 0]])
    zero = softplus(torch.tensor(0.0).double())
    close(loss_of(logits, bits), (one + zero + zero + two) / 2)
    assert int(wrong(logits, bits)) == 1
    # Smoothing pulls the best answer to 1 − s + s / classes.
    best = torch.tensor([[np.log(0.95 / 0.05), 0.0]], requires_grad=True, dtype=torch.float64)
    loss_of(best, labels[:1], 0.1).backward()
    assert best.grad is not None
    assert float(best.grad.abs().max()) < 1e-12


# Runs.


def run_of(path: Path, **settings: object) -> Run:
    defaults = {"width": 8, "epochs": 3.0, "batch_size": 32, "log_every": 3, "eval_every": 400, "threads": 1}
    config = AdditionConfig(**{**defaults, **settings}, out=path).resolved  # pyright: ignore[reportArgumentType]
    return Run(path, "addition", Addition(bits=4), config)


@pytest.mark.parametrize(
    "method", ["bprop", "none", "dni", "cdni", "cdni error", "critic", "local", "local+critic"]
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(method, tmp_path, monkeypatch):
    method, _, synthesizer = method.partition(" ")
    settings = {"method": method, "synthesizer": synthesizer or None}
    if method not in ("bprop", "none", "dni"):
        settings |= {"update_probability": 0.6, "unlock": True, "agreement_every": 2}
    whole = train(run_of(tmp_path / "whole", **settings), quiet=True)
    update = FeedforwardLearner.update

    def stop_in_the_middle(self: FeedforwardLearner) -> None:
        update(self)
        if self.counters.step == 7:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(FeedforwardLearner, "update", stop_in_the_middle)
    with pytest.raises(Interrupted):
        train(run_of(tmp_path / "parts", **settings), quiet=True)
    monkeypatch.setattr(FeedforwardLearner, "update", update)
    parts = train(run_of(tmp_path / "parts", **settings, resume=True), quiet=True)
    timed = ("seconds", "symbols_per_second", "peak_memory_mb")
    assert {k: v for k, v in parts.items() if k not in timed} == {
        k: v for k, v in whole.items() if k not in timed
    }
    rows = [
        [{k: v for k, v in row.items() if k not in timed} for row in run_of(tmp_path / name).rows()]
        for name in ("whole", "parts")
    ]
    assert rows[0] == rows[1]
    assert any("valid_error" in row for row in rows[0])


def test_a_convolutional_net_goes_on_bit_for_bit(tmp_path):
    """Its weights have a layout of their own in memory, which Adam's state must share."""
    config = FeedforwardConfig(model="cnn", layers=3, width=4, epochs=2.0, batch_size=16)
    first, second = (FeedforwardLearner(config, pictures(64), CPU) for _ in range(2))
    assert first.record.net[0].is_contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        first.update()
    save_checkpoint(tmp_path / "c", *first.state_dict())
    second.load_state_dict(*load_checkpoint(tmp_path / "c"))
    for learner in (first, second):
        for _ in range(3):
            learner.update()
    for ours, theirs in zip(first.record.net, second.record.net, strict=True):
        assert torch.equal(ours, theirs)


def test_the_metrics_say_how_the_synthesizers_do(tmp_path):
    train(run_of(tmp_path, method="critic", agreement_every=2), quiet=True)
    row = next(row for row in run_of(tmp_path).rows() if "loss" in row)
    for cut in (1, 2):
        logged = ("cosine", "explained", "trust", "synthesizer_loss")
        assert {f"{name}_{cut}" for name in logged} <= row.keys()
        assert -1.0 <= row[f"cosine_{cut}"] <= 1.0


def test_rates_of_the_recipes():
    data = Addition(bits=4).load(None)
    fast = FeedforwardLearner(AdditionConfig(epochs=100.0, width=4), data, CPU)
    factors = [rate_factor(fast.config, step, fast.steps) for step in range(fast.steps)]
    peak = factors.index(max(factors))
    assert peak / fast.steps == pytest.approx(0.15, abs=0.02)
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert max(factors) <= 1.0
    assert factors[-1] < 0.01
    paper = FeedforwardLearner(AdditionConfig(epochs=100.0, width=4, recipe="paper"), data, CPU)
    steps = [0, 0.59, 0.61, 0.79, 0.81]
    found = [round(rate_factor(paper.config, round(share * paper.steps), paper.steps), 6) for share in steps]
    assert found == [1.0, 1.0, 0.1, 0.1, 0.01]


@pytest.mark.parametrize(
    ("budget", "steps"), [({"epochs": 0.2}, 6), ({"steps": 7}, 7), ({"epochs": 0.2, "minutes": 60.0}, 6)]
)
def test_rates_follow_what_says_how_long(budget, steps):
    """Passes or updates; with --minutes the passes, which it only ends earlier."""
    learner = FeedforwardLearner(
        AdditionConfig(width=4, batch_size=5, threads=1, **budget), Addition(bits=4).load(None), CPU
    )
    assert (learner.steps, learner.one_pass) == (steps, 5 * steps)
    rates, base = [], [group["base"] for group in learner.record.optimizer.param_groups]
    while not learner.ended:
        learner.update()
        rates.append([group["lr"] for group in learner.record.optimizer.param_groups])
    factors = [rate_factor(learner.config, step, steps) for step in range(steps)]
    assert np.array(rates) == pytest.approx(np.outer(factors, base))
    assert max(factors) > 4 * factors[-1]


def test_the_published_recipe():
    config = images.CIFARConfig(recipe="paper", method="dni").resolved
    assert (config.width, config.lr, config.synthesizer) == (1000, 3e-5, "mlp:4000")
    config = FeedforwardConfig(recipe="paper", method="cdni", model="cnn").resolved
    assert (config.width, config.synthesizer) == (64, "linear")
    assert FeedforwardConfig(recipe="paper", width=3).resolved.width == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--layers 1", "at least 2"),
        ("--cuts 0", "--cuts 0: give all"),
        ("--cuts 2,1", "rising"),
        ("--cuts x", "rising"),
        ("--method bprop --update-probability 0.5", "needs learning parts"),
        ("--method none --unlock", "needs learning parts"),
        ("--method local --synthesizer mlp", "has no synthesizer"),
        ("--method critic --synthesizer error", "needs --method cdni or local+critic"),
        ("--update-probability 0", "above 0"),
        ("--synthesizer deep", "--synthesizer deep"),
        ("--synthesizer my.place:Mine", "--synthesizer my.place:Mine: give linear, mlp"),
        ("--epochs 0", "must be positive"),
        ("--steps 0", "--steps must be positive"),
        ("--minutes 0", "--minutes must be positive"),
        ("--smoothing 1", "--smoothing"),
    ],
)
def test_settings_that_cannot_be(flags, message, tmp_path, capsys):
    assert main(["train", "addition", *flags.split(), "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def test_the_command_line_in_a_process_of_its_own(tmp_path):
    """Train, evaluate and compare, as a user does."""

    def say(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dni_rnn", *words],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shared = ["--bits", "3", "--epochs", "2", "--threads", "1", "--log-every", "1"]
    for method in ("bprop", "critic"):
        words = ["--method", method, "--out", method]
        if method == "critic":
            words += ["--agreement-every", "1"]
        assert "addition/3 " in say("train", "addition", *shared, *words)
        summary = json.loads((tmp_path / method / "summary.json").read_text())
        assert f"{summary['test_error']:.4f} error" in say("eval", method)
    assert (tmp_path / "critic" / "best.safetensors").exists()
    table = say("compare", "bprop", "critic", "--out", "curves.svg")
    assert "test error %" in table
    assert (tmp_path / "curves.svg").exists()
    assert (tmp_path / "critic" / "layers.svg").exists()
    assert not (tmp_path / "bprop" / "layers.svg").exists()


def test_mnist_from_the_command_line(tmp_path):
    if not (DATA / "mnist").is_dir():
        pytest.skip("skipped: a run on MNIST, because its files are not there")
    words = ["--data-dir", str(DATA), "--epochs", "0.3", "--width", "16", "--threads", "1"]
    assert main(["train", "mnist", *words, "--layers", "3", "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_error"] < 40
