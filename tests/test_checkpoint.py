"""Checkpoint files: what goes in comes out, and nothing that goes wrong costs the file that was there."""

import ast
import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dni_rnn.errors import UsageError
from dni_rnn.files import write_atomically
from dni_rnn.training.checkpoint import (
    load_checkpoint,
    load_optimizer_state,
    nest,
    optimizer_state,
    save_checkpoint,
    under,
)

ROOT = Path(__file__).parents[1]

TENSORS = {
    "float32": torch.tensor([[1.5, -0.0], [float("inf"), 1e-45]]),
    "float64": torch.tensor([0.1, 1e-320], dtype=torch.float64),
    "bfloat16": torch.tensor([1.0, -2.5], dtype=torch.bfloat16),
    "int64": torch.tensor([-(2**63), 2**63 - 1]),
    "uint8": torch.arange(256, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(3.25),
    "empty": torch.zeros(2, 0),
    "names.with.dots": torch.ones(1),
}
VALUES = {"step": 3, "best": None, "seconds": 0.1, "stream": {"position": 2**40}, "text": 'é\n"'}


def same(a, b):
    """Bit for bit: names, types, shapes and values."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert torch.equal(raw(a[name]), raw(b[name])), name


def raw(tensor):
    return tensor.detach().flatten().view(torch.uint8)


def refused(path):
    with pytest.raises(UsageError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_round_trip(tmp_path):
    save_checkpoint(tmp_path / "c", TENSORS, VALUES)
    tensors, values = load_checkpoint(tmp_path / "c")
    assert values == VALUES
    assert tensors["scalar"].shape == ()
    assert list(tensors) == sorted(TENSORS)
    same(tensors, TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_tensors_come_in_the_order_of_their_names_and_numbers(tmp_path):
    """What reads a list of them one after the other relies on it."""
    names = [f"layer{i}.{j}" for i in (0, 1, 10) for j in range(12)]
    save_checkpoint(tmp_path / "c", {name: torch.zeros(1) for name in reversed(names)}, {})
    assert list(load_checkpoint(tmp_path / "c")[0]) == names


def test_views_parameters_and_shared_memory(tmp_path):
    """What a model's state holds: parameters, slices, transposes, one tensor under two names."""
    matrix = torch.arange(6.0).reshape(2, 3)
    held = {"t": matrix.t(), "row": matrix[1], "again": matrix, "p": torch.nn.Parameter(matrix)}
    save_checkpoint(tmp_path / "c", held, {})
    tensors, _ = load_checkpoint(tmp_path / "c")
    same(tensors, {name: tensor.detach().contiguous() for name, tensor in held.items()})
    assert not tensors["p"].requires_grad


def test_loaded_tensors_lie_in_memory_as_new_ones_do(tmp_path):
    """Not inside the mapped file, at any address: there, matrix products may round differently."""
    odd = {f"{length}": torch.ones(length, dtype=torch.uint8) for length in (1, 3, 7)}
    save_checkpoint(tmp_path / "c", {**odd, "x": torch.ones(5), "y": torch.ones(4, 4)}, VALUES)
    tensors, _ = load_checkpoint(tmp_path / "c")
    aligned = {name: tensor.data_ptr() % 64 == 0 for name, tensor in tensors.items()}
    assert all(torch.ones(n).data_ptr() % 64 == 0 for n in (1, 5, 16))
    assert aligned == dict.fromkeys(tensors, True)


@settings(max_examples=15)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"),
        st.lists(st.floats(width=32), max_size=4),
        max_size=3,
    ),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
)
def test_any_names_numbers_and_values(tmp_path_factory, numbers, value):
    path = tmp_path_factory.getbasetemp() / "any"
    tensors = {name: torch.tensor(row) for name, row in numbers.items()}
    save_checkpoint(path, tensors, {"value": value})
    loaded, values = load_checkpoint(path)
    same(loaded, tensors)
    assert values == {"value": value}


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["write", "fsync", "rename"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failing_write_leaves_the_earlier_file(where, existing, tmp_path, monkeypatch):
    path = tmp_path / "c"
    if existing:
        save_checkpoint(path, TENSORS, VALUES)
        before = path.read_bytes()
    if where == "write":  # a real full device, in the place of the temporary file
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full: writing to a full device was not tested")
        (tmp_path / "c.tmp").symlink_to("/dev/full")
    else:
        monkeypatch.setattr(os, {"fsync": "fsync", "rename": "replace"}[where], full_disk)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        save_checkpoint(path, {"other": torch.zeros(1000)}, {})
    assert [p.name for p in tmp_path.iterdir()] == (["c"] if existing else [])
    if existing:
        assert path.read_bytes() == before


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """fsync of the file, then rename, then fsync of the folder: a power cut finds the old or the new."""
    order = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(number):
        order.append(Path(os.readlink(f"/proc/self/fd/{number}")).name if Path("/proc").exists() else "")
        fsync(number)

    def note_replace(source, target):
        order.append(f"{Path(source).name} -> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_atomically(tmp_path / "c", b"content")
    names = ["c.tmp", tmp_path.name] if Path("/proc").exists() else ["", ""]
    assert order == [names[0], "c.tmp -> c", names[1]]


def test_what_a_killed_writer_left_is_no_hindrance(tmp_path):
    (tmp_path / "c.tmp").write_bytes(b"half a checkpo")
    save_checkpoint(tmp_path / "c", TENSORS, VALUES)
    assert load_checkpoint(tmp_path / "c")[1] == VALUES
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    save_checkpoint(tmp_path / "c", TENSORS, VALUES)
    content = (tmp_path / "c").read_bytes()
    for length in [*range(0, len(content), 29), len(content) - 1]:
        (tmp_path / "cut").write_bytes(content[:length])
        assert "not a checkpoint" in refused(tmp_path / "cut")


def bare_safetensors(values=None):
    """A safetensors file of somebody else: no values, or values that are not JSON."""
    from safetensors.torch import save

    return save({"x": torch.zeros(1)}, metadata=values)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: pickle.dumps({"x": 1}), id="pickle"),
        pytest.param(lambda: b"PK\x03\x04" + bytes(100), id="zip, as torch.save writes"),
        pytest.param(lambda: b"Dear reader,\nthis is a text.\n" * 20, id="text"),
        pytest.param(lambda: b"", id="empty"),
        pytest.param(bare_safetensors, id="safetensors without metadata"),
        pytest.param(lambda: bare_safetensors({"format": "pt"}), id="safetensors of another program"),
        pytest.param(lambda: bare_safetensors({"values": "{"}), id="values are not JSON"),
    ],
)
def test_other_files_are_refused(content, tmp_path):
    (tmp_path / "c").write_bytes(content())
    assert "not a checkpoint" in refused(tmp_path / "c")


def test_no_file_and_a_folder_are_refused(tmp_path):
    assert "no checkpoint there" in refused(tmp_path / "c")
    assert "not a checkpoint" in refused(tmp_path)


def test_names_under_a_prefix():
    tensors = {"a.x": torch.zeros(1), "ab.x": torch.ones(1), "a.b.x": torch.ones(2)}
    assert under("a", tensors).keys() == {"x", "b.x"}
    assert under("ab", nest("ab", TENSORS)) == TENSORS


@pytest.mark.parametrize("trained", [3, 0])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(lambda groups: torch.optim.Adam(groups, fused=True), id="adam fused"),
        pytest.param(lambda groups: torch.optim.Adam(groups, amsgrad=True), id="amsgrad"),
        pytest.param(lambda groups: torch.optim.SGD(groups), id="sgd without state"),
    ],
)
def test_an_optimizer_goes_on_bit_for_bit(kind, trained, tmp_path, generator):
    gradients = torch.randn(trained + 3, 3, generator=generator)

    def build(values):
        net, synthesizer, never_used = (torch.nn.Parameter(v.clone()) for v in values)
        groups = [{"params": [net, never_used], "lr": 0.1}, {"params": [synthesizer], "lr": 0.01}]
        return [net, synthesizer, never_used], kind(groups)

    def steps(parameters, optimizer, rows):
        for row in rows:
            for parameter, size in zip(parameters[:2], (1.0, 1e-3), strict=True):
                parameter.grad = size * row
            optimizer.step()

    parameters, optimizer = build([torch.ones(3)] * 3)
    steps(parameters, optimizer, gradients[:trained])
    save_checkpoint(tmp_path / "c", optimizer_state(optimizer), {})
    others, other = build([p.detach() for p in parameters])
    load_optimizer_state(other, load_checkpoint(tmp_path / "c")[0])
    steps(parameters, optimizer, gradients[trained:])
    steps(others, other, gradients[trained:])
    for parameter, copy in zip(parameters, others, strict=True):
        assert torch.equal(parameter, copy)
    same(optimizer_state(other), optimizer_state(optimizer))
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.01]
    if optimizer_state(optimizer):
        fresh, without = build([torch.ones(3)] * 3)
        steps(fresh, without, gradients[trained:])
        assert trained == 0 or not torch.equal(fresh[0], parameters[0])  # the state matters here


# No pickle

PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {("torch", "load"), ("torch", "save"), ("np", "load"), ("np", "save"), ("numpy", "load")}


def pickling(source):
    """The lines of `source` that bring in a pickler, or call one that hides in torch or numpy."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            bad = any(alias.name.split(".")[0] in PICKLERS for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            bad = module in PICKLERS or any((module, alias.name) in CALLS for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            bad = (node.value.id, node.attr) in CALLS
        else:
            continue
        if bad:
            lines.append(node.lineno)
    return lines


def test_the_package_never_pickles():
    example = "import os, pickle\nfrom torch import load\ntorch.load(f)\njson.load(f)\nimport pickler"
    assert pickling(example) == [1, 2, 3]
    files = [*ROOT.glob("dni_rnn/**/*.py"), *ROOT.glob("tasks/**/*.py")]
    assert len(files) > 20
    assert {str(f): pickling(f.read_text()) for f in files if pickling(f.read_text())} == {}
