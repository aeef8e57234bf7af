"""The gradient-quality benchmark: what it commits is what it measured, and it counts what is computed."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from dni_rnn.data.task import Corpus
from dni_rnn.experiments.plots import fingerprint, fingerprint_of
from dni_rnn.files import read_jsonl

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "results" / "gradient-quality"

if not FOLDER.exists():
    pytest.skip("skipped: benchmarks and results come with the repository alone", allow_module_level=True)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("gradient_quality")


def test_the_committed_table_is_what_its_rows_say(benchmark: ModuleType) -> None:
    rows = read_jsonl(FOLDER / "rows.jsonl")
    seconds = benchmark.read_seconds(FOLDER / "seconds.jsonl")
    stale = "stale: run python benchmarks/gradient_quality.py --report"
    assert (FOLDER / "table.md").read_text(encoding="utf-8") == benchmark.render(rows, seconds), stale
    for ending in ("png", "svg"):
        assert fingerprint_of(FOLDER / f"error.{ending}") == fingerprint(benchmark.panels(rows)), stale
    found = [(benchmark.candidate_of(row), row["seed"]) for row in rows]
    planned = [*benchmark.PLAN, *((candidate, 1) for candidate in benchmark.RETIRED)]
    assert set(found) <= {(candidate, seed) for candidate, seeds in planned for seed in range(seeds)}
    assert len(set(found)) == len(found) >= 9


@pytest.mark.parametrize(
    ("synthesizer", "context", "reads", "products"),
    [
        ("linear", "next-tokens:3", "hidden", 3 * 128 * 256),  # what is read asks for no gradient
        ("mlp:7", "none", "state", 3 * 256 * 7 + 4 * 7 * 256),
        ("mlp:7,5", "next-tokens:3", "state", 3 * 256 * 7 + 4 * 7 * 5 + 4 * 5 * 256),
        ("mlp:7", "next-tokens:3", "hidden", 3 * 128 * 7 + 4 * 7 * 256),  # nor a row of the table a product
    ],
)
@pytest.mark.parametrize("bptt", [1, 3])
def test_products_are_those_one_counts_by_hand(
    benchmark: ModuleType, bptt: int, synthesizer: str, context: str, reads: str, products: int
) -> None:
    data = Corpus.from_texts("made up", "abcde" * 9, "a", "a")
    candidate = benchmark.Candidate(bptt, synthesizer, context, reads)
    recurrent, inputs, readout = 4 * 128 * 128, 4 * 128 * 32, 128 * 5
    # Forward, weights, and what came before: all but the state that a window of truncated BPTT starts from.
    window = bptt * 3 * (recurrent + inputs + readout) - recurrent
    assert benchmark.multiply_adds(candidate, data) == pytest.approx(
        (products / window, (products + recurrent) / window)
    )
