"""The README, the pages of the site and the examples do what they say: their commands and code are run."""

from __future__ import annotations

import difflib
import html
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from dni_rnn.cli import _parse, main
from dni_rnn.experiments import diagnose

ROOT = Path(__file__).parents[1]
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in sorted(ROOT.glob("docs/**/*.md"))}
README = (ROOT / "README.md").read_text()
GUIDES = [PAGES[f"docs/{name}.md"] for name in ("command-line", "sweeps", "layers", "processes")]
"""The pages whose commands are run, in this order; those of the others are only parsed."""
DATA = ROOT.parent / "shared" / "data"


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def programs(page: str) -> list[str]:
    """The Python that is meant to be run as it stands."""
    return [block for block in blocks("python", page) if "import torch" in block]


def commands(page: str = README) -> list[str]:
    lines = [line for block in blocks("bash", page) for line in block.replace("\\\n", "").splitlines()]
    return [re.split("[#<]", line)[0].strip() for line in lines if line.startswith("dni-rnn")]


def test_commands_of_the_guides_run_in_the_order_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (DATA / "ptb").is_dir() or not (DATA / "mnist").is_dir():
        pytest.skip("skipped: the guides' commands, because the Penn Treebank or MNIST files are not there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diagnose, "ROWS", 8)  # a sixteenth of what is measured otherwise
    typed = [command for page in GUIDES for command in commands(page)]
    assert len(typed) >= 12
    (grid,) = blocks("toml", PAGES["docs/sweeps.md"])
    (tmp_path / "results" / "mine").mkdir(parents=True)
    grid = grid.replace("[0, 1, 2]", "[0]").replace('"recall ', '"recall --steps 3 --hidden 8 ')
    (tmp_path / "results" / "mine" / "sweep.toml").write_text(grid)
    for command in typed:
        here = {"DATA": str(DATA), "cuda": "auto"}
        words = [here.get(word, word) for word in shlex.split(command)[1:]]
        if words[0] == "train":
            # The published command with a budget of moments; everything else is as typed.
            budgets = {"ptb": "--steps 3 --hidden 8", "counting": "--digits 3000 --hidden 8"}
            words += [*budgets.get(words[1], "--epochs 0.01 --width 4").split(), "--threads", "1"]
        if words[0] == "sample":
            words += ["--chars", "20"]
        if words[0] == "bench":
            words += shlex.split("--hidden 8 --bptt 2 --batch-size 2 --processes 1 --rounds 1")
        assert main(words) == 0, command
    written = capsys.readouterr().out
    assert "the company said" in written
    assert "ptb/char test:" in written
    assert (tmp_path / "runs" / "a" / "summary.json").exists()
    assert "<h1>Recall" in (tmp_path / "results" / "mine" / "report.html").read_text()


TUTORIALS = [name for name in PAGES if name.startswith("docs/tutorials/")]
BUDGETS = {
    "= 6000, 2, 64": "= 40, 2, 64",
    "[:200_000]": "[:2000]",
    "--steps 4000": "--steps 20",
    "--epochs 40": "--epochs 0.1",
}
"""What a tutorial gives its runs, and what it gives them here."""


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """All of its code, in the order given, with a budget of moments, up to its picture."""
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    monkeypatch.chdir(tmp_path)
    page = PAGES[name]
    for whole, small in BUDGETS.items():
        page = page.replace(whole, small)
    if page == PAGES[name]:
        pytest.fail("no budget of this page is known here: it would run for minutes")
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", page, re.DOTALL):
        if language == "python":
            exec(compile(block, name, "exec"), {"__name__": "__main__"})
            plt.close("all")
            continue
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            source = words.pop() if "<" in words else os.devnull
            words = [word for word in words[1:] if word != "<"]
            if words[0] == "train":
                words += ["--threads", "1", "--device", "cpu"]
            before = os.dup(0)
            with open(source) as heard:
                os.dup2(heard.fileno(), 0)
                if "--processes" in words:  # ends its process
                    subprocess.run([sys.executable, "-m", "dni_rnn", *words], check=True)
                else:
                    assert main(words) == 0, line
                os.dup2(before, 0)
            os.close(before)
    (picture,) = re.findall(r"`?(\w+\.png)`?", page.split("## From here")[0])[-1:]
    assert (tmp_path / picture).stat().st_size > 5000
    assert "## From here" in page
    assert len(re.sub(r"```.*?```", "", page, flags=re.DOTALL).split()) < 350, "links, in place of more"


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, text in {"README.md": README, **PAGES}.items()
        if programs(text) and name not in TUTORIALS
    ],
)
def test_python_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = {"README.md": README, **PAGES}[name]
    if "model.json" in page:  # its program runs where an exported text model is
        text, run = tmp_path / "text.txt", tmp_path / "run"
        text.write_text("The sea shells that she sells are sea shells of the sea shore.\n" * 60)
        small = "--hidden 8 --batch-size 4 --bptt 4 --steps 2 --threads 1 --device cpu"
        assert main(["train", "text", str(text), *small.split(), "--out", str(run)]) == 0
        assert main(["export", str(run)]) == 0
        monkeypatch.chdir(run / "export")
    for block in programs(page):
        exec(compile(block, name, "exec"), {"__name__": "__main__"})


def test_commands_of_the_pages_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    found = [command for page in PAGES.values() for command in commands(page)]
    assert len(found) >= 8
    for command in found:
        try:
            _parse(shlex.split(command)[1:])
        except SystemExit:
            pytest.fail(f"{command}: {capsys.readouterr()}")
    with pytest.raises(SystemExit):
        _parse(["diagnose", "runs/dni", "--bppt", "4"])


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Strictly, as it is published; every sweep's table is in it, as it stands.

    Not quietly: mkdocs counts no warning then.
    """
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    literal = [
        p.name for p in site.rglob("*.html") if re.search(r"--8\s*(<|&lt;)", html.unescape(p.read_text()))
    ]
    assert not literal, "a snippet is shown as its marker"
    for sweep in sorted(ROOT.glob("results/*/sweep.toml")):
        table = sweep.with_name("table.md")
        if table.exists():
            cell = next(iter(tomllib.loads(sweep.read_text())["cells"]))
            assert (
                f"<td>{html.escape(cell)}</td>"
                in (site / "results" / sweep.parent.name / "table" / "index.html").read_text()
            )
    import dni_rnn

    reference = "".join(page.read_text() for page in (site / "api").rglob("*.html"))
    for name in vars(dni_rnn)["__all__"]:
        assert re.search(rf'id="dni_rnn[.\w]+\.{name}"', reference), f"{name} is on no page of the reference"


def test_every_task_is_on_the_page_of_the_command_line() -> None:
    from dni_rnn.data.task import installed_tasks

    for name in installed_tasks():
        assert f"| `{name}` |" in PAGES["docs/command-line.md"]


def test_the_readme_is_a_front_page() -> None:
    assert len(README.split()) < 1000, "what is more belongs into docs/"


def test_links_of_all_pages_lead_somewhere() -> None:
    """In the repository itself; on the site, `docs/pages.py` moves them and mkdocs looks after them."""
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/**/*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"


def test_figures_of_the_readme_stand_in_the_tables() -> None:
    """Those of its table in the overview of the results, the others in a table: both made from rows."""
    table = "".join(line for line in README.splitlines() if line.startswith("| "))
    overview = (ROOT / "results" / "README.md").read_text()
    found = re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?(?: \(T = \d+\))?", table)
    assert len(found) >= 12
    for figure in found:
        assert figure in overview, figure
    table = (ROOT / "results" / "decoupled" / "table.md").read_text()
    speed = re.findall(r"\| 2 +\| +100 \| +(?:lock-step|decoupled) \| +([\d.]+) \|", table)
    sentence = "two parts process(?:ed)? {1} messages a second, in lock-step {0}".format(*speed)
    for page in (README, PAGES["docs/tutorials/layers.md"]):
        assert re.search(sentence, " ".join(page.split()))


def test_means_of_the_pages_stand_in_a_table() -> None:
    """Every mean ± sd of the README and the site is one of a table or the notes, or one of these rounded."""
    written = [*ROOT.glob("results/*/table.md"), ROOT / "results" / "what-was-tried.md"]
    pattern = r"(\d+(?:\.\d+)?) ± (\d+(?:\.\d+)?)"
    measured = {found for page in written for found in re.findall(pattern, page.read_text(encoding="utf-8"))}

    def rounded(text: str, like: str) -> str:
        return f"{float(text):.{len(like.partition('.')[2])}f}"

    for name, page in {"README.md": README, **PAGES}.items():
        for figure in re.findall(pattern, page):
            alike = ([rounded(a, b) for a, b in zip(each, figure, strict=True)] for each in measured)
            assert any(tuple(each) == figure for each in alike), f"{name}: {' ± '.join(figure)}"


def test_findings_rest_on_three_seeds() -> None:
    """What rests on fewer is a pilot, and called that."""
    about = tomllib.loads((ROOT / "results" / "about.toml").read_text(encoding="utf-8"))
    paragraphs = [*about["findings"], README]
    for path in sorted(ROOT.glob("results/*/*.toml")):
        paragraphs += tomllib.loads(path.read_text(encoding="utf-8")).get("shows", "").strip().split("\n\n")
    for paragraph in paragraphs:
        few = re.search(r"\b(one|two) seeds?\b|\bn = [12]\b", paragraph)
        assert not few or paragraph.startswith("Pilots, "), paragraph


def test_the_menu_tells_the_tables_apart() -> None:
    titles = [path.read_text().partition("\n")[0] for path in ROOT.glob("results/*/table.md")]
    assert len({title.partition(",")[0] for title in titles}) == len(titles)


BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""torch's LSTM refuses bfloat16 on processors that have no instructions for it."""


EXAMPLES = {
    "char_model_before.py": "",
    "char_model_after.py": "",
    "accelerate_loop.py": f"--precision {'bf16' if BF16 else 'no'} --accumulate 2",
    "lightning_module.py": f"--accelerator cpu --precision {'bf16-mixed' if BF16 else '32-true'} "
    "--accumulate 2",
    "precision_and_accumulation.py": f"--precision {'bf16' if BF16 else 'fp32'} --accumulate 2",
    "compiled_core.py": "--backend aot_eager",
}


@pytest.mark.filterwarnings("ignore:::lightning")
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated")  # torch.compile does so itself
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    monkeypatch.setattr(sys, "argv", [name, str(text), "--steps", "200", *EXAMPLES[name].split()])
    monkeypatch.syspath_prepend(ROOT / "examples")
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    bits = [float(b) for b in re.findall(r"([\d.]+) bits", capsys.readouterr().out)]
    assert len(bits) == 2
    assert bits[1] < 0.8 * bits[0], "the example learns"


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_word_models_learn(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 600)
    monkeypatch.setattr(sys, "argv", ["word_model.py", str(text), "--epochs", "2"])
    runpy.run_path(str(ROOT / "examples" / f"word_model_{when}.py"), run_name="__main__")
    perplexity = [float(p) for p in re.findall(r"perplexity ([\d.]+)", capsys.readouterr().out)]
    assert len(perplexity) == 3
    assert perplexity[0] > 8 > 4 > perplexity[-1]


def test_one_line_of_the_word_models_loop_changes() -> None:
    before, after = (
        (ROOT / "examples" / f"word_model_{when}.py").read_text().split('"""', 2)[2].splitlines()
        for when in ("before", "after")
    )
    changed = [line for line in difflib.ndiff(before, after) if line[:2] in ("+ ", "- ") and line[2:].strip()]
    assert [line[0] for line in changed] == ["+", "+", "-", "+"], "the import, the wrap and one line"


def test_the_actor_of_the_example_remembers_with_a_trace_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    arguments = f"--delay 6 --trace 16 --updates 600 --plot {tmp_path / 'plot.png'}"
    monkeypatch.setattr(sys, "argv", ["memory_actor_critic.py", *arguments.split()])
    runpy.run_path(str(ROOT / "examples" / "memory_actor_critic.py"), run_name="__main__")
    opened = re.findall(r"(truncated|trace).* (\d+)% of doors", capsys.readouterr().out)
    last = {name: int(percent) for name, percent in opened}
    assert last["truncated"] < 45 < 55 < last["trace"]
    assert (tmp_path / "plot.png").exists()


def test_the_net_of_the_addition_example_adds() -> None:
    made = runpy.run_path(str(ROOT / "examples" / "addition.py"))
    made["train"].__globals__["STEPS"] = 1500
    assert made["train"]("predicted loss") > 0.8


def test_the_cut_resnet_of_the_example_learns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["resnet_decoupled.py"])
    runpy.run_path(str(ROOT / "examples" / "resnet_decoupled.py"), run_name="__main__")
    (right,) = re.findall(r"(\d+)% of new pictures right", capsys.readouterr().out)
    assert int(right) > 80


def test_two_lines_of_the_example_loop_change() -> None:
    before, after = (
        (ROOT / "examples" / f"char_model_{when}.py").read_text().split("for step in", 1)[1]
        for when in ("before", "after")
    )
    difference = difflib.ndiff(before.splitlines(), after.splitlines())
    added = [line for line in difference if line.startswith("+ ")]
    assert len(added) == 2
