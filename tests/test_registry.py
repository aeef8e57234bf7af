"""Cores and estimators by name: ours, those of other packages, and what is neither."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dni_rnn.config import RecurrentConfig
from dni_rnn.cores.gru import GRU
from dni_rnn.cores.lstm import LSTM
from dni_rnn.cores.rnn import RNN
from dni_rnn.data.task import Corpus
from dni_rnn.errors import UsageError
from dni_rnn.estimators.bptt import TruncatedBPTT
from dni_rnn.estimators.dni import DNI
from dni_rnn.estimators.full import FullBPTT
from dni_rnn.registry import Kind, check, find, names
from dni_rnn.training.builders import build_core, build_estimator, build_model

OURS: list[tuple[Kind, str, type]] = [
    ("cores", "gru", GRU),
    ("cores", "lstm", LSTM),
    ("cores", "rnn", RNN),
    ("estimators", "bptt", TruncatedBPTT),
    ("estimators", "dni", DNI),
    ("estimators", "full", FullBPTT),
]
KINDS: list[Kind] = ["cores", "estimators"]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with modules of somebody else; what is imported from it is forgotten again."""
    (tmp_path / "registry_own.py").write_text(
        "from torch import nn\n"
        "from dni_rnn.cores.gru import GRU\n"
        "from dni_rnn.estimators import Estimator\n"
        "from dni_rnn.estimators.bptt import TruncatedBPTT\n"
        "class Family:\n"
        "    class Cell(GRU):\n"
        "        pass\n"
        "class Plain(nn.GRU):\n"
        "    pass\n"
        "class Strict(TruncatedBPTT):\n"
        "    def __init__(self, strength, name='x'):\n"
        "        super().__init__()\n"
        "        self.strength, self.name = strength, name\n"
        "class Bare(Estimator):\n"
        "    pass\n"
        "def number(*sizes):\n"
        "    return 3\n"
    )
    (tmp_path / "registry_broken.py").write_text("import registry_that_is_nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("registry_own", "registry_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def refusal(kind: Kind, name: str) -> str:
    with pytest.raises(UsageError) as refused:
        find(kind, name)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"--{kind[:-1]} {name}: ")
    return str(refused.value)


@pytest.mark.parametrize(("kind", "name", "wanted"), OURS)
def test_ours_are_found_by_name(kind, name, wanted):
    check(kind, name)
    assert name in names(kind)
    assert find(kind, name) is wanted


@every_kind
def test_names_are_in_order_and_hold_nothing_else(kind):
    ours = [name for each, name, _ in OURS if each == kind]
    assert set(ours) <= set(names(kind))
    assert names(kind) == sorted(names(kind))
    assert not any(name.startswith("_") for name in names(kind))
    for name in names(kind):
        assert callable(find(kind, name))


def test_names_are_listed_and_checked_without_torch():
    code = (
        "import sys\n"
        "from dni_rnn.registry import check, names\n"
        "assert 'lstm' in names('cores') and 'dni' in names('estimators')\n"
        "check('cores', 'lstm'); check('estimators', 'anything.at_all:Name')\n"
        "assert 'torch' not in sys.modules and 'anything' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@every_kind
@pytest.mark.parametrize(
    "name",
    [
        "", "nothing", "LSTM", "lstm ", "__init__", "lstm.py", "../cores/lstm", "dni_rnn.cores.lstm", ":Cell",
        "own:", "own:1x", "my-own:Cell", "own::Cell", "a b:Cell", "own:Cell()",
    ],
)  # fmt: skip
def test_unknown_names_are_refused_in_one_line(kind, name):
    said = refusal(kind, name)
    assert "not known" in said
    assert all(known in said for known in names(kind))
    assert "package.module:Name" in said
    with pytest.raises(UsageError):
        check(kind, name)


def test_a_configuration_refuses_what_nobody_knows():
    for kind in KINDS:
        given: dict[str, Any] = {kind[:-1]: "nothing"}
        with pytest.raises(UsageError) as refused:
            RecurrentConfig(**given)
        known = ", ".join(names(kind))
        wanted = f"--{kind[:-1]} nothing: not known; give one of {known}, or package.module:Name"
        assert str(refused.value) == wanted


@every_kind
def test_a_module_and_a_name_in_it(kind, package):
    found = find(kind, "registry_own:Family.Cell")
    assert found.__qualname__ == "Family.Cell"
    assert found is sys.modules["registry_own"].Family.Cell


@every_kind
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("registry_nowhere:Cell", "No module named 'registry_nowhere'"),
        ("registry_own.inner:Cell", "not a package"),
        ("registry_own:Missing", "has no attribute 'Missing'"),
        ("registry_own:Family.Missing", "has no attribute 'Missing'"),
        ("registry_broken:Cell", "No module named 'registry_that_is_nowhere'"),
    ],
)
def test_what_cannot_be_imported_says_why_in_one_line(kind, name, reason, package):
    check(kind, name)  # it may be there later
    said = refusal(kind, name)
    assert "cannot be imported" in said
    assert reason in said


@pytest.fixture
def installed(package: Path) -> None:
    """The modules as an installed package that registers some of them."""
    folder = package / "registry_own-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: registry-own\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[dni_rnn.cores]\nfamily = registry_own:Family.Cell\nbroken-one = registry_broken:Cell\n"
        "[dni_rnn.estimators]\nstrict = registry_own:Strict\n"
    )


def test_what_an_installed_package_registers_is_found_by_name(installed, monkeypatch):
    assert {"broken-one", "family", "gru", "lstm", "rnn"} <= set(names("cores"))
    assert {"bptt", "dni", "full", "strict"} <= set(names("estimators"))
    assert names("cores") == sorted(names("cores"))
    assert "registry_own" not in sys.modules  # listing imports nothing
    assert find("cores", "family") is sys.modules["registry_own"].Family.Cell
    assert find("estimators", "strict") is sys.modules["registry_own"].Strict
    with pytest.raises(UsageError, match="not known"):
        find("estimators", "family")
    with pytest.raises(UsageError, match=r"cannot be imported.*registry_that_is_nowhere") as refused:
        find("cores", "broken-one")
    assert "\n" not in str(refused.value)


# From a configuration to what it names.

DATA = Corpus.from_texts("made up", "abcab", "ab", "ab")


def test_a_core_that_is_registered_is_built_and_trained(installed):
    config = RecurrentConfig(core="family", hidden=6, embedding=3, layers=2)
    core = build_core(config)
    assert type(core) is sys.modules["registry_own"].Family.Cell
    assert core.output_size == 6
    assert core.initial_state(4).shape == (2, 4, 6)
    logits, _ = build_model(config, DATA)(torch.zeros(5, 4, dtype=torch.int64), core.initial_state(4))
    assert logits.shape == (5, 4, 3)


@pytest.mark.parametrize("name", ["Plain", "number"])
def test_what_is_no_core_is_refused(name, package):
    with pytest.raises(
        UsageError, match=r"not a core; it must be an nn\.Module with initial_state"
    ) as refused:
        build_core(RecurrentConfig(core=f"registry_own:{name}"))
    assert "\n" not in str(refused.value)


def estimator(text: str, **settings: Any) -> Any:
    config = RecurrentConfig(hidden=4, embedding=3, estimator=text, **settings)
    return build_estimator(config, build_model(config, DATA), DATA)


def test_an_estimator_gets_its_options(package):
    made = estimator("registry_own:Strict,strength=0.5,name=y")
    assert type(made) is sys.modules["registry_own"].Strict
    assert (made.strength, made.name) == (0.5, "y")
    assert type(estimator("full")) is FullBPTT
    assert type(estimator("registry_own:Bare")) is sys.modules["registry_own"].Bare


def test_a_penalty_is_handed_on():
    made = estimator("full", restore=0.25)
    assert made.penalty.strength == 0.25
    assert estimator("full").penalty is None


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        ("registry_own:Strict", {}, "missing a required argument: 'strength'"),
        ("registry_own:Strict,strength=1,other=2", {}, "unexpected keyword argument 'other'"),
        ("registry_own:Bare,a=1", {}, "unexpected keyword argument 'a'"),
        ("bptt,strength=2", {}, "unexpected keyword argument 'strength'"),
        ("registry_own:Strict,strength=1", {"restore": 0.1}, "unexpected keyword argument 'penalty'"),
    ],
)
def test_options_that_an_estimator_does_not_take_are_refused_in_one_line(text, settings, reason, package):
    with pytest.raises(UsageError, match=reason) as refused:
        estimator(text, **settings)
    assert str(refused.value).startswith(f"--estimator {text}: ")
    assert "\n" not in str(refused.value)
