"""Reports and comparisons: numbers that can be worked out by hand, and tables that are not stale."""

import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest

from dni_rnn.cli import main
from dni_rnn.config import RecurrentConfig, to_json
from dni_rnn.errors import UsageError
from dni_rnn.experiments.about import About, read_about
from dni_rnn.experiments.headline import PICTURE, dot_panels, read_headline
from dni_rnn.experiments.method_summary import summary_text, used_by
from dni_rnn.experiments.plots import (
    COLOURS,
    Curve,
    Point,
    fingerprint,
    fingerprint_of,
    mean_curve,
    save_curves,
)
from dni_rnn.experiments.report import (
    INSIDE,
    amount_to,
    by_cell,
    curves_of,
    logged_of,
    mean_sd,
    render_csv,
    render_table,
    report_sweep,
)
from dni_rnn.experiments.results_page import render_index, result_folders
from dni_rnn.experiments.sweep import read_failures, read_rows, read_sweep
from dni_rnn.files import read_jsonl
from dni_rnn.metrics import BPC, Metric, metrics_of

RESULTS = Path(__file__).parents[1] / "results"
ACCURACY = Metric("accuracy", "accuracy", "share of right answers", lower_is_better=False)

SWEEP = """
train = "ptb --hidden 8"
seeds = [0, 1]
title = "A made-up sweep"
note = "Nothing here was trained."
reference = "bptt T=20"

[cells]
"bptt T=2" = "--bptt 2"
"bptt T=20" = "--bptt 20"
"dni T=2" = "--bptt 2 --dni"
"dni T=4" = "--bptt 4 --dni"

[published]
"bptt T=20" = "1.42 | theirs"
"""

# Of each seed: characters, seconds and validation BPC.
CURVES = {
    "bptt T=20": [[(100, 10, 3.0), (200, 20, 1.0)], [(100, 10, 3.0), (200, 24, 2.0)]],
    "dni T=2": [[(100, 30, 2.0), (200, 60, 1.6)]],
    "bptt T=2": [[(100, 20, 2.0), (200, 40, 1.0)], [(100, 20, 3.0), (200, 60, 1.0)]],
}

# The reference ends at (1.0 + 2.0) / 2 = 1.5, after 20 and 24 s. bptt T=2 is there half-way from 20 to 40 s
# and three quarters of the way from 20 to 60 s: 30 and 50 s, mean 40, sample sd √200 = 14.
TABLE = """\
| cell      |      n | best valid BPC |      test BPC | characters/s | seconds |     seconds to 1.500 |      published |
| --------- | -----: | -------------: | ------------: | -----------: | ------: | -------------------: | -------------: |
| bptt T=2  |      2 |  1.000 ± 0.000 | 1.500 ± 0.000 |            4 |      50 |              40 ± 14 |                |
| bptt T=20 |      2 |  1.500 ± 0.707 | 2.000 ± 0.707 |            9 |      22 |               22 ± 3 | 1.42 \\| theirs |
| dni T=2   | 1 of 2 |      1.600 ± – |     2.100 ± – |            3 |      60 | not reached (1 of 1) |                |
| dni T=4   | 0 of 2 |    no rows yet |               |              |         |                      |                |
"""  # noqa: E501


def made_up_row(cell, curve):
    values = [value for _, _, value in curve]
    symbols, seconds, final = curve[-1]
    return {
        "cell": cell.name,
        "seed": cell.seed,
        "command": cell.command,
        "method": cell.name.partition(" ")[0],
        "steps": symbols // 10,
        "symbols": symbols,
        "seconds": seconds,
        "symbols_per_second": round(symbols / seconds),
        "valid_bpc": final,
        "best_valid_bpc": min(values),
        "test_bpc": min(values) + 0.5,
        "config": {"bptt": int(cell.name.partition("=")[2])},
        "curve": [{"symbols": n, "seconds": s, "valid_bpc": v} for n, s, v in curve],
        "versions": {"torch": "2.13.0", "numpy": "2.3.0"},
        "python": "3.12.0",
        "commit": "abc",
        "device": "cpu",
        "threads": 1,
    }


def points(*numbers):
    return [Point(*each) for each in numbers]


def cells_of(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]


@pytest.fixture
def folder(tmp_path):
    """A sweep with rows of three of its four cells, not in the order of the cells."""
    (tmp_path / "sweep.toml").write_text(SWEEP)
    cells = {(cell.name, cell.seed): cell for cell in read_sweep(tmp_path)}
    rows = [
        made_up_row(cells[name, seed], curve)
        for name, curves in CURVES.items()
        for seed, curve in reversed(list(enumerate(curves)))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def render(folder, rows=None):
    cells, rows = read_sweep(folder), read_rows(folder) if rows is None else rows
    metrics = metrics_of(rows[0]) if rows else [BPC]
    return render_table(cells, rows, read_about(folder, cells), metrics, read_failures(folder))


FOLDERS = sorted(path for path in RESULTS.glob("*") if path.is_dir())
SWEEPS = [path for path in FOLDERS if (path / "sweep.toml").exists() and (path / "rows.jsonl").exists()]


def stale(folder):
    return f"stale: run dni-rnn report {folder}"


@pytest.mark.parametrize("folder", SWEEPS, ids=lambda folder: folder.name)
def test_committed_tables_are_what_their_rows_say(folder):
    cells, rows = read_sweep(folder), read_rows(folder)
    if not (folder / "table.md").exists() and len(rows) < len(cells):
        pytest.skip("a sweep that is still running and was never reported")
    about, metrics = read_about(folder, cells), metrics_of(rows[0])
    assert (folder / "table.md").read_text(encoding="utf-8") == render(folder), stale(folder)
    assert (folder / "table.csv").read_text(encoding="utf-8") == render_csv(cells, rows), stale(folder)
    groups = by_cell(cells, about.timed(rows))
    pictures = {metric.key: fingerprint(curves_of(groups, metric), metric) for metric in metrics}
    if logged_of(groups):
        pictures[INSIDE] = fingerprint(curves_of(groups, metrics[0]), logged_of(groups))
    for name, content in pictures.items():
        for ending in ("png", "svg"):
            assert fingerprint_of(folder / f"{name}.{ending}") == content, stale(folder)


@pytest.mark.parametrize(
    ("folder", "benchmark", "made"),
    [
        ("live", "live", lambda made, rows: made.render(rows, ["play", "log", "manual"])),
        ("trace-quality", "trace_quality", lambda made, rows: made.render(rows)),
        ("do-no-harm", "do_no_harm", lambda made, rows: made.render(made.all_pairs(RESULTS))),
    ],
)
def test_committed_tables_of_benchmarks_are_what_their_rows_say(folder, benchmark, made, monkeypatch):
    if not RESULTS.exists():
        pytest.skip("results come with the repository alone")
    monkeypatch.syspath_prepend(RESULTS.parent / "benchmarks")
    path = RESULTS / folder / "rows.jsonl"
    table = made(import_module(benchmark), read_jsonl(path) if path.exists() else [])
    told = f"stale: make it again from its rows with benchmarks/{benchmark}.py"
    assert (RESULTS / folder / "table.md").read_text(encoding="utf-8") == table, told


def test_runs_that_differ_in_the_trace_alone_are_a_pair(monkeypatch):
    if not RESULTS.exists():
        pytest.skip("benchmarks come with the repository alone")
    monkeypatch.syspath_prepend(RESULTS.parent / "benchmarks")
    do_no_harm = import_module("do_no_harm")
    row = {"task": "ptb", "data": "ptb", "cell": "a", "seed": 0, "config": {"lr": 1.0}, "test_bpc": 2.0}
    rows = [
        row | {"command": "dni-rnn train ptb --seed 0"},
        row | {"command": "dni-rnn train ptb --trace 32 --seed 0", "test_bpc": 2.5},
        row | {"command": "dni-rnn train ptb --trace all --seed 0", "config": {"lr": 2.0}},
        row | {"command": "dni-rnn train ptb --trace 32 --seed 1", "seed": 1},
        row | {"command": "dni-rnn train ptb --trace 32 --bptt 2 --seed 0"},
    ]
    (pair,) = do_no_harm.pairs_of_sweep("folder", rows)
    assert (pair.traced, pair.plain, pair.difference, pair.worse) == (2.5, 2.0, 0.5, True)
    assert pair.at_equal_updates is None
    shorter = {"climbs": [{"step": 1, "solved": 2}, {"step": 30, "solved": 5}], "curve": [{"step": 40}]}
    longer = {"climbs": [{"step": 9, "solved": 1}, {"step": 41, "solved": 6}], "curve": [{"step": 60}]}
    again = do_no_harm.at_equal_updates(pair, shorter, longer)
    assert (again.traced, again.plain) == (5, 1)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_folder_says_what_it_is(folder):
    assert folder in result_folders(RESULTS), "what no sweep has made needs an about.toml: title, note, shows"


def test_the_committed_overview_is_what_the_folders_say():
    if not RESULTS.exists():
        pytest.skip("results come with the repository alone")
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == render_index(RESULTS), stale(RESULTS)
    for link in re.findall(r"\]\(([^)#:]+)\)", render_index(RESULTS)):
        assert (RESULTS / link).exists(), link
    panels = dot_panels(RESULTS, read_headline(RESULTS).panels)
    assert fingerprint_of(RESULTS / PICTURE) == fingerprint(panels), stale(RESULTS)


def test_the_numbers_of_a_table(folder):
    text = render(folder)
    assert TABLE in text
    assert text.startswith("# A made-up sweep\n\nNothing here was trained.\n\n![BPC](bpc.svg)\n")
    assert "- bptt T=2: `dni-rnn train ptb --hidden 8 --bptt 2 --seed 0`\n" in text
    assert "- dni T=4: `dni-rnn train ptb --hidden 8 --bptt 4 --dni --seed 0`\n" in text
    made = "numpy 2.3.0; torch 2.13.0; Python 3.12.0; commit abc; device cpu; threads 1."
    assert f"5 rows, made with {made}" in text


def test_without_the_optional_keys(folder):
    cells = SWEEP[SWEEP.index("[cells]") : SWEEP.index("[published]")]
    (folder / "sweep.toml").write_text(f'train = "ptb"\nseeds = [0, 1]\n{cells}')
    assert read_about(folder, read_sweep(folder)) == About(folder.name)
    text = render(folder)
    header = ["cell", "n", "best valid BPC", "test BPC", "characters/s", "seconds"]
    assert cells_of(text)[0] == header
    assert text.startswith(f"# {folder.name}\n\n![")
    assert "Seconds to" not in text


def test_the_order_of_the_rows_changes_nothing(folder):
    rows = read_rows(folder)
    assert render(folder, rows[::-1]) == render(folder, rows)
    assert render_csv(read_sweep(folder), rows[::-1]) == render_csv(read_sweep(folder), rows)


def test_what_differs_between_rows_is_told(folder):
    rows = read_rows(folder)
    rows[0] |= {"commit": "def+", "threads": 2}
    rows[1] |= {"command": rows[1]["command"] + " --lr 0.1"}
    text = render(folder, rows)
    assert "commit abc (4 rows), def+ (1 rows); device cpu; threads 1 (4 rows), 2 (1 rows)" in text
    assert "(+: with uncommitted changes)" in text
    assert text.count("\n- bptt T=20: ") == 2


def test_the_csv_holds_every_row(folder):
    lines = list(csv.DictReader(io.StringIO(render_csv(read_sweep(folder), read_rows(folder)))))
    assert [(line["cell"], line["seed"]) for line in lines] == [
        ("bptt T=2", "0"),
        ("bptt T=2", "1"),
        ("bptt T=20", "0"),
        ("bptt T=20", "1"),
        ("dni T=2", "0"),
    ]
    assert lines[1]["command"] == "dni-rnn train ptb --hidden 8 --bptt 2 --seed 1"
    assert (lines[4]["test_bpc"], lines[4]["torch version"]) == ("2.1", "2.13.0")


def test_no_rows_no_report(folder):
    (folder / "rows.jsonl").unlink()
    with pytest.raises(UsageError, match="no rows yet; run dni-rnn sweep"):
        report_sweep(folder)
    assert render(folder).count("no rows yet") == 4


@pytest.mark.parametrize(
    ("old", "new"),
    [('reference = "bptt T=20"', 'reference = "bptt T=21"'), ('"bptt T=20" = "1.42', '"bptt T=21" = "1.42')],
)
def test_a_cell_that_is_only_spoken_of(folder, old, new):
    (folder / "sweep.toml").write_text(SWEEP.replace(old, new))
    with pytest.raises(UsageError, match="'bptt T=21' is not one of its cells"):
        report_sweep(folder)


def test_a_row_of_no_cell(folder):
    (folder / "sweep.toml").write_text(SWEEP.replace('"dni T=2"', '"dni T=3"'))
    with pytest.raises(UsageError, match="a row of 'dni T=2', which is no cell"):
        report_sweep(folder)


def test_mean_and_sample_standard_deviation():
    assert mean_sd([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert mean_sd([1.25], 2) == "1.25 ± –"
    assert mean_sd([1000.0, 3000.0], 0) == "2,000 ± 1,414"


@pytest.mark.parametrize(
    ("target", "seconds"),
    [(3.0, 10.0), (2.5, 15.0), (2.0, 20.0), (1.5, 40.0), (1.0, 45.0), (0.9, None), (4.0, 10.0)],
)
def test_seconds_to_a_target(target, seconds):
    # Down, up again, and down: what counts is the first time.
    curve = points((1, 10.0, 3.0), (2, 20.0, 2.0), (3, 30.0, 2.5), (4, 40.0, 1.5), (5, 45.0, 1.0))
    assert amount_to(curve, target, BPC) == seconds


def test_symbols_to_a_target():
    curve = points((100, 10.0, 3.0), (200, 20.0, 2.0))
    assert amount_to(curve, 2.5, BPC, "symbols") == 150.0


def test_two_nets_have_a_table_each(folder):
    """Against seconds and, where asked for, against what they are counted in."""
    rows = []
    for row in read_rows(folder):
        # The second net is the first with twice the error.
        of_each = {"fast": 1.0, "slow": 2.0}
        curve = [
            {"symbols": p["symbols"], "seconds": p["seconds"], f"valid_error_{net}": factor * p["valid_bpc"]}
            for net, factor in of_each.items()
            for p in row["curve"]
        ]
        values = {
            f"{name}_error_{net}": factor * row[f"{name}_bpc"]
            for net, factor in of_each.items()
            for name in ("valid", "best_valid", "test")
        }
        rows.append({k: v for k, v in row.items() if "bpc" not in k} | {"curve": curve} | values)
    (folder / "sweep.toml").write_text(SWEEP.replace("[cells]", "counted = true\n[cells]", 1))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report_sweep(folder)
    text = (folder / "table.md").read_text()
    lines = cells_of(text)
    half = len(lines) // 2
    assert lines[0][2:] == [
        "best valid A error %", "test A error %", "digits/s", "seconds",
        "digits to 1.500", "seconds to 1.500", "published",
    ]  # fmt: skip
    assert lines[half][2] == "best valid B error %"
    assert lines[half][6:8] == ["digits to 3.000", "seconds to 3.000"]
    reached = [
        [line[6:8] for line in table if line[0] == "bptt T=2"] for table in (lines[:half], lines[half:])
    ]
    assert (
        reached == [[["162 ± 18", "40 ± 14"]]] * 2
    )  # half-way and three quarters of the way from 100 to 200
    assert "Digits and seconds to 3.000: until" in text
    assert {path.name for path in folder.glob("*.svg")} == {"error_fast.svg", "error_slow.svg"}


def surface_row(seed):
    """What a run of the surface leaves: neither T nor layers, and an error that is no share."""
    return {
        "cell": "a",
        "seed": seed,
        "command": "dni-rnn train surface",
        "task": "surface",
        "method": "dni",
        "steps": 2,
        "symbols": 200,
        "seconds": 4.0,
        "symbols_per_second": 50,
        "valid_rmse": 0.25 + seed,
        "best_valid_rmse": 0.25 + seed,
        "test_rmse": 0.5 + seed,
        "config": {"width": 8, "steps": 2},
        "curve": [{"symbols": 200, "seconds": 4.0, "valid_rmse": 0.25 + seed, "step": 2}],
        "versions": {},
        "python": "3.12.0",
        "commit": "abc",
        "device": "cpu",
        "threads": 1,
    }


def test_the_surface_is_judged_by_its_root_mean_square_error(tmp_path):
    rows = [surface_row(seed) for seed in (0, 1)]
    (tmp_path / "sweep.toml").write_text("train = 'surface'\nseeds = [0, 1]\n[cells]\na = ''\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report_sweep(tmp_path)
    lines = cells_of((tmp_path / "table.md").read_text())
    assert lines[0] == ["cell", "n", "best valid RMS error", "test RMS error", "points/s", "seconds"]
    assert lines[2] == ["a", "2", "0.750 ± 0.707", "1.000 ± 0.707", "50", "4"]
    assert (tmp_path / "rmse.svg").exists()
    with pytest.raises(UsageError, match="task 'chess' holds no test score"):
        metrics_of({"task": "chess", "test_elo": 2800})


def test_a_sweep_that_has_no_row_yet_stops_no_report_of_all(tmp_path, capsys):
    """A sweep that was stopped before its first run ended leaves an empty rows.jsonl."""
    (tmp_path / "about.toml").write_text("title = 'All'\n")
    for name in ("begun", "ended"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sweep.toml").write_text("train = 'surface'\nseeds = [0, 1]\n[cells]\na = ''\n")
    (tmp_path / "begun" / "rows.jsonl").write_text("")
    (tmp_path / "ended" / "rows.jsonl").write_text(json.dumps(surface_row(0)) + "\n")
    assert main(["report", str(tmp_path)]) == 0
    assert f"- begun: `dni-rnn sweep {tmp_path.name}/begun`" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "ended" / "table.md").exists()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "begun")]) == 2
    assert "no rows yet" in capsys.readouterr().err


def test_a_metric_that_rises():
    curve = points((1, 10.0, 0.5), (2, 20.0, 0.75))
    assert amount_to(curve, 0.625, ACCURACY) == 15.0
    assert amount_to(curve, 0.8, ACCURACY) is None
    assert ACCURACY.best([0.5, 0.75]) == 0.75


def test_an_upper_bound_is_marked(folder):
    rows = read_rows(folder)
    for row in rows:
        if row["cell"] == "dni T=2":
            row["curve"][0]["valid_bpc"] = 1.25
    assert cells_of(render(folder, rows))[4][6] == "≤ 30 ± –"


def test_the_mean_of_curves():
    # Only the first run was validated after 150 characters, only the second after 300.
    first = points((100, 10.0, 3.0), (150, 15.0, 2.0), (200, 20.0, 1.0))
    second = points((100, 14.0, 3.0), (200, 24.0, 2.0), (300, 30.0, 1.0))
    means = [(100, 12.0, 3.0, 0.0, None), (200, 22.0, 1.5, pytest.approx(0.5**0.5), None)]
    assert mean_curve([first, second]) == means
    assert mean_curve([second]) == [(p.symbols, p.seconds, p.value, 0.0, None) for p in second]
    first, second = points((100, 10.0, 3.0, 5)), points((100, 14.0, 3.0, 10))
    assert mean_curve([first, second]) == [(100, 12.0, 3.0, 0.0, 7.5)]


def test_a_report_is_the_same_file_every_time(folder, capsys):
    names = ("table.md", "table.csv", "bpc.svg", "bpc.png", "report.html")
    assert main(["report", str(folder)]) == 0
    first = {name: (folder / name).read_bytes() for name in names}
    assert main(["report", str(folder)]) == 0
    assert {name: (folder / name).read_bytes() for name in names} == first
    assert first["table.md"].decode() == render(folder)
    assert "5 of 8 rows" in capsys.readouterr().out


def test_a_picture_says_what_it_was_drawn_from(tmp_path):
    curves = [Curve("run", "bptt", 2, [points((100, 10.0, 3.0, 7), (200, 20.0, 1.0, 14))])]
    pictures = [tmp_path / "a.png", tmp_path / "a.svg"]
    save_curves(pictures, curves, BPC)
    assert {fingerprint_of(path) for path in pictures} == {fingerprint(curves, BPC)}
    assert "prefers-color-scheme: dark" in pictures[1].read_text()
    moved = [Curve("run", "bptt", 2, [points((100, 10.0, 3.0, 7), (200, 20.0, 1.1, 14))])]
    assert fingerprint(moved, BPC) != fingerprint(curves, BPC)
    (tmp_path / "b.svg").write_text("<svg/>")
    assert fingerprint_of(tmp_path / "b.svg") is None


class Elements(HTMLParser):
    """What a page consists of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.text = Counter(), [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags[tag] += 1
        self.ids += [values["id"]] if "id" in values else []
        self.links += [
            values[name] for name in ("src", "href", "xlink:href") if name in values and tag != "a"
        ]

    def handle_data(self, data):
        self.text += data


def with_insides(folder):
    """The rows of `folder` with what newer ones have: traces, a text, a machine, a budget in minutes."""
    rows = read_rows(folder)
    for row in rows:
        row["traces"] = {"trust": [[1, 0.5], [9, 0.25 + row["seed"]]]}
        row["sample"] = {"text": f"<script>&{row['seed']}\n~~~~ _end_ " + "long " * 40, "temperature": 0.8}
        row["machine"] = "Abacus, 2 cores"
        row["config"]["minutes"] = 10
    rows[0].pop("machine")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_a_page_needs_nothing_else(folder):
    with_insides(folder)
    report_sweep(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    found = Elements(page)
    assert found.tags["svg"] == 2
    assert (found.tags["script"], found.tags["img"], found.tags["link"]) == (0, 0, 0)
    assert all(link.startswith("#") for link in found.links), "all of it is in the page"
    assert len(set(found.ids)) == len(found.ids) > 10
    assert {link[1:] for link in found.links} <= set(found.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(found.ids)
    assert "<script>&0\n~~~~ _end_ long" in found.text, "what a net wrote is shown as it is"
    assert found.tags["table"] == 1
    assert "1.42 | theirs" in found.text
    assert "url(" not in re.sub(r"url\(#", "", page)


def test_what_went_on_inside(folder):
    rows = with_insides(folder)
    groups = by_cell(read_sweep(folder), rows)
    assert logged_of(groups) == {
        "trust: coefficient of the true on the synthetic gradient": {
            name: [(1, 0.5), (9, 0.25)] for name in ("bptt T=2", "bptt T=20", "dni T=2")
        }
    }
    for cut in (1, 2):
        groups["dni T=2"][0]["traces"][f"cosine_{cut}"] = [[5, 0.2 * cut], [10, 0.5]]
    assert logged_of(groups)["cosine similarity with the true gradient"] == {
        "dni T=2": [(5, pytest.approx(0.3)), (10, 0.5)]
    }


def test_the_machine_is_part_of_a_result_in_minutes(folder):
    assert "machine" not in render(folder)
    text = render(folder, with_insides(folder))
    made = "cpu, threads 1, machine Abacus, 2 cores (4 rows), cpu, threads 1, machine not recorded (1 rows)"
    assert f"The budget is in minutes, so the machine is part of the result: {made}." in text
    assert "machine Abacus, 2 cores (4 rows), unknown (1 rows)." in text


def test_failures_are_told(folder):
    (folder / "failed.jsonl").write_text(
        json.dumps({"cell": "dni T=4", "seed": 0, "exit_code": 3, "reason": "dni-rnn: stopped: why"}) + "\n"
    )
    assert "dni T=4, seed 0, failed with exit code 3 (`stopped: why`)." in render(folder)


HEADLINE = """
title = "All of it"
note = "As follows."
findings = ["It is made up.", "See [there](made-up/table.md)."]

[comparison]
note = "What n is."
columns = ["truncated", "synthetic", "longer", "published"]
[comparison.rows]
"Made up, T = 2" = ["made-up/bptt T=2", "made-up/dni T=2", "made-up/bptt T=20",
                    "made-up/bptt T=20 (published)"]
"Not yet" = ["made-up/bptt T=2", "made-up/dni T=4", "", ""]

[[panels]]
title = "Yes"
points = { "short" = "made-up/bptt T=2", "none" = "made-up/dni T=4" }
"""


def test_all_results_at_a_glance(folder, tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    shutil.copytree(folder, results / "made-up")
    (results / "planned").mkdir()
    (results / "planned" / "sweep.toml").write_text("train = 'recall'\nseeds = [0]\n[cells]\na = ''\n")
    (results / "other").mkdir()
    (results / "other" / "about.toml").write_text("title = 'By hand'\nsummary = 'in a line.'\n")
    (results / "other" / "table.md").write_text("# Counted\n\n| a |\n| - |\n| 1 |\n")
    (results / "about.toml").write_text(HEADLINE)
    assert main(["report", str(results)]) == 0
    text = (results / "README.md").read_text()
    opening = "# All of it\n\nAs follows.\n\n![When it helps and when it does not](headline.svg)\n"
    assert text.startswith(
        f"{opening}\n## Findings\n\n1. It is made up.\n2. See [there](made-up/table.md).\n"
    )
    assert cells_of(text)[0] == ["", "truncated", "synthetic", "longer", "published"]
    # Both seeds of the first cell; one of the second; another T in the third; the last is not ours.
    (line,) = [line for line in text.splitlines() if line.startswith("| Made up")]
    assert [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] == [
        "Made up, T = 2: BPC, lower is better",
        "1.500 ± 0.000 (n = 2)",
        "2.100",
        "2.000 ± 0.707 (n = 2, T = 20)",
        "*1.42 \\| theirs*",
    ]
    assert "| Not yet: BPC, lower is better " in text
    assert "\nWhat n is.\n\n## All tables\n\n- [A made-up sweep](made-up/table.md) (5 of 8 runs)\n" in text
    assert "- [By hand](other/table.md): in a line.\n" in text
    assert text.endswith("## Not run yet\n\n- planned: `dni-rnn sweep " + f"{results.name}/planned`\n")
    drawn = (results / "headline.svg").read_text()
    assert all(shown in drawn for shown in ("Yes", "test BPC", "short", "1.500 ± 0.000"))
    assert "<td>1</td>" in (results / "other" / "report.html").read_text()
    assert (results / "made-up" / "report.html").exists()
    assert render_index(results) == text


def test_a_headline_of_a_cell_that_is_not_there(folder, tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    shutil.copytree(folder, results / "made-up")
    (results / "about.toml").write_text(HEADLINE.replace("made-up/dni T=2", "made-up/dni T=3"))
    with pytest.raises(UsageError, match="'made-up/dni T=3' is no cell of made-up"):
        render_index(results)


def test_nothing_to_report(tmp_path, capsys):
    (tmp_path / "about.toml").write_text("title = 'Nothing'\n")
    assert main(["report", str(tmp_path)]) == 2
    assert "no table.md there yet" in capsys.readouterr().err
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "about.toml").write_text("title =")
    assert main(["report", str(tmp_path)]) == 2
    assert "part/about.toml: not TOML" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no sweep there" in capsys.readouterr().err


def test_a_plot_of_alike_curves_and_one_of_a_single_validation(tmp_path):
    line, dot = points((100, 10.0, 3.0), (200, 20.0, 1.0)), points((100, 10.0, 2.0))
    curves = [Curve(f"run {i}", "bptt", 2, [line]) for i in range(9)]
    curves += [Curve("dot", "dni", 20, [dot]), Curve("not begun", "dni", 20, [[]])]
    save_curves([tmp_path / "a.svg"], curves, BPC)
    drawn = (tmp_path / "a.svg").read_text()
    assert COLOURS[0].lower() in drawn
    assert COLOURS[1].lower() in drawn
    assert "run 8" in drawn
    assert "not begun" not in drawn


def test_plots_that_cannot_be_written(tmp_path):
    curves = [Curve("run", "bptt", 2, [points((100, 10.0, 3.0))])]
    with pytest.raises(UsageError, match=r"must end in \.png, \.svg or \.pdf"):
        save_curves([tmp_path / "plot.bmp"], curves, BPC)
    with pytest.raises(FileNotFoundError, match=r"nowhere.plot\.png"):
        save_curves([tmp_path / "nowhere" / "plot.png"], curves, BPC)


def write_run(path, validations, *, test=None, tail="", **options):
    """A run directory as `dni-rnn train` leaves it, or as it looks when it is stopped before its end."""
    path.mkdir(parents=True)
    config = {"data": "text/made-up", "config": to_json(RecurrentConfig(**options))}
    (path / "config.json").write_text(json.dumps(config))
    rows = [{"symbols": n, "seconds": s, "valid_bpc": v} for n, s, v in validations]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    if test is not None:
        (path / "summary.json").write_text(json.dumps({"symbols": 200, "test_bpc": test}))
    return path


def test_compare_runs_that_ended_and_that_did_not(tmp_path, capsys):
    curve = [(100, 10.0, 3.0), (200, 20.0, 1.5)]
    runs = [
        write_run(tmp_path / "ended", curve, test=1.25),
        write_run(tmp_path / "stopped", curve[:1], tail='{"symbols": 1', bptt=2, dni=True),
        write_run(tmp_path / "resumed", [*curve, (300, 30.0, 1.75)], test=1.25),
        write_run(tmp_path / "begun", []),
    ]
    plot = tmp_path / "compare.svg"
    assert main(["compare", *map(str, runs), "--out", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert cells_of(printed)[0][:5] == ["run", "data", "method", "T", "characters"]
    assert cells_of(printed)[2:] == [
        ["ended", "text/made-up", "bptt", "20", "200", "1.500", "1.250", "10", "20.0"],
        ["stopped", "text/made-up", "dni+next-tokens:8", "2", "100", "3.000", "unfinished", "10", "10.0"],
        ["resumed", "text/made-up", "bptt", "20", "300", "1.500", "unfinished", "10", "30.0"],
        ["begun", "text/made-up", "bptt", "20", "0", "–", "unfinished", "–", "0.0"],
    ]
    assert str(plot) in printed
    drawn = plot.read_text()
    assert "stopped" in drawn
    assert "begun" not in drawn


def test_compare_tells_runs_of_one_name_apart(tmp_path, capsys):
    runs = [write_run(tmp_path / parent / "run", [(100, 10.0, 3.0)]) for parent in ("a", "b")]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "compare.png")]) == 0
    assert [line[0] for line in cells_of(capsys.readouterr().out)[2:]] == [str(run) for run in runs]


def test_compare_what_cannot_be_compared(tmp_path, capsys):
    run, plot = write_run(tmp_path / "begun", []), tmp_path / "compare.png"
    assert main(["compare", str(run), "--out", str(plot)]) == 0
    assert "no validation yet: no plot" in capsys.readouterr().out
    assert not plot.exists()
    assert main(["compare", str(run), "--out", str(tmp_path / "plot.bmp")]) == 2
    assert main(["compare", str(tmp_path / "nothing"), "--out", str(plot)]) == 2
    (run / "config.json").write_text("{")
    assert main(["compare", str(run), "--out", str(plot)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert "must end in" in told[0]
    assert "no run there (config.json is missing)" in told[1]
    assert "cannot be read" in told[2]


def test_neither_report_nor_compare_imports_torch(folder):
    run = write_run(folder / "run", [(100, 10.0, 3.0)])
    code = f"""
import sys
from dni_rnn.files import read_jsonl
from dni_rnn.cli import main
assert main(["report", {str(folder)!r}]) == 0
assert main(["compare", {str(run)!r}, "--out", {str(folder / "compare.png")!r}]) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_task_that_grows_is_judged_by_what_it_solved(folder):
    rows = []
    for row in read_rows(folder):
        solved = {"T=2": 2, "T=4": 4}.get(row["cell"].split()[-1], 3) + row["seed"]
        climbs = [{"symbols": 100 * n, "seconds": 10.0 * n, "solved": n} for n in range(solved + 1)]
        rows.append(row | {"solved": solved, "climbs": climbs})
    about = About("Growing", reference=rows[0]["cell"])
    text = render_table(read_sweep(folder), rows, about, metrics_of(rows[0]))
    groups = {name: [r for r in rows if r["cell"] == name] for name in dict.fromkeys(r["cell"] for r in rows)}
    target = sum(r["solved"] for r in groups[rows[0]["cell"]]) / len(groups[rows[0]["cell"]])
    for name, found in groups.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
        assert f" {mean_sd([r['solved'] for r in found], 1)} " in line
        times = [10.0 * math.ceil(target) for r in found if r["solved"] >= target]
        reached = mean_sd(times, 0) if len(times) == len(found) else "not reached"
        assert reached in line
    assert "Best valid" not in text


def test_what_a_method_uses_besides_truncated_bptt_is_said_under_its_table():
    plain = {"bptt": 2, "dni": False, "context": "next-tokens:8"}
    told = {**plain, "dni": True, "lookahead": 0, "trace": 32}
    assert used_by({"layers": 3}) is None
    assert used_by(plain) == "nothing"
    assert used_by(told) == "a learnt M, conditioned on the next 8 symbols, and a trace of 32 steps"
    assert used_by({**told, "context": "none", "trace": 0}) == "a learnt M, unconditioned"
    assert used_by({**plain, "lookahead": 4}) == "the next 4 symbols"
    assert used_by({**plain, "trace": "all"}) == "a trace of all earlier steps"
    groups = {name: [{"config": config}] for name, config in (("a", plain), ("b", told), ("c", plain))}
    assert "— nothing: `a`, `c`; a learnt M, conditioned" in summary_text({**groups, "none yet": []})
    assert summary_text({"cnn": [{"config": {"layers": 3}}]}) == ""
