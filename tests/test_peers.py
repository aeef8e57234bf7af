"""The benchmark of the peers: it commits what it measured, and a peer that is not there is said to be."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from dni_rnn.errors import UsageError
from dni_rnn.files import read_jsonl

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "results" / "peers"

if not FOLDER.exists():
    pytest.skip("skipped: benchmarks and results come with the repository alone", allow_module_level=True)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("peers")


def test_the_committed_table_is_what_its_rows_say(benchmark: ModuleType) -> None:
    stale = "stale: run python benchmarks/peers.py --report"
    rows = read_jsonl(FOLDER / "rows.jsonl")
    assert (FOLDER / "table.md").read_text(encoding="utf-8") == benchmark.render(rows), stale


def test_our_step_trains(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "HIDDEN", 16)
    nets = []
    monkeypatch.setattr(benchmark, "Net", lambda kind=benchmark.Net: nets.append(kind()) or nets[-1])
    step = benchmark.our_step()
    losses = []
    for _ in range(60):
        step()
        losses.append(nets[0](benchmark.zero_state())[0].item())
    assert losses[-1] < 0.95 * losses[0]


def test_peers_that_are_not_there(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"--koz4k .*nowhere.py: no file there; clone the repository"):
        benchmark.koz4k_step(tmp_path / "nowhere.py", 1)
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(UsageError, match="pip could not fetch pytorch-dni"):
        benchmark.fetch_pytorch_dni()


def test_a_stray_quotation_mark_is_mended(benchmark: ModuleType, tmp_path: Path) -> None:
    """A file that does not compile as it is, as that of the last commit."""
    (tmp_path / "dni.py").write_text('def Synthesizer(size):\n    raise ValueError("put it before""\n    )\n')
    with pytest.raises(ValueError, match="put it before"):
        benchmark.mtanghu_step(tmp_path / "dni.py")
