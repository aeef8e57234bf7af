"""What a release says of itself: one version everywhere, what is stable, and what is in its files."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import dni_rnn

ROOT = Path(__file__).parents[1]
CHECK = ROOT / ".ci" / "check_distributions.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def imported(folder: Path) -> set[str]:
    """The packages that the code of a folder imports."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((node.module or "").partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"dni_rnn", "dni_rnn_tasks"}


def declared(requirements: list[str]) -> set[str]:
    names = {re.split(r"[\[<>=~ ]", each)[0].replace("-", "_") for each in requirements}
    return {name.removesuffix("_py").replace("markdown_it_py", "markdown_it") for name in names}


def test_what_is_imported_is_declared():
    extras = PROJECT["optional-dependencies"]
    of_package = declared(PROJECT["dependencies"])
    optional = {"datasets", "torchtext", "tensorboard"}
    assert declared([each for name in optional for each in extras[name]]) == optional
    # tensorboard is imported by torch, when it is there.
    assert imported(ROOT / "dni_rnn") <= of_package
    assert imported(ROOT / "tasks") <= of_package | optional
    own = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert imported(ROOT / "examples") - own <= of_package | declared(extras["examples"])


def test_the_stable_names_are_the_public_ones():
    page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    (names,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert sorted(names.split()) == sorted(vars(dni_rnn)["__all__"])
    assert f"Python {PROJECT['requires-python'].removeprefix('>=')} to 3.14 and torch from 2.6" in page
    assert "torch>=2.6" in PROJECT["dependencies"]
    assert [each[-4:] for each in PROJECT["classifiers"] if "Python :: 3." in each] == [
        "3.11",
        "3.12",
        "3.13",
        "3.14",
    ]


@pytest.fixture
def check() -> dict[str, Any]:
    if not CHECK.exists():
        pytest.skip("skipped: the check of distributions comes with the repository alone")
    return runpy.run_path(str(CHECK))


def test_every_version_is_the_same(check):
    assert set(check["versions"]().values()) == {PROJECT["version"]}


def test_a_wheel_is_looked_through(check, tmp_path):
    info = f"dni_rnn-{PROJECT['version']}.dist-info"
    extras = "".join(f"Provides-Extra: {name}\n" for name in PROJECT["optional-dependencies"])

    def wrong(leave_out: str = "", add: str = "", version: str = PROJECT["version"]) -> list[str]:
        path = tmp_path / "a.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for name in check["modules"]() - {leave_out} | ({add} if add else set()):
                wheel.writestr(name, "")
            wheel.writestr(f"{info}/METADATA", f"Version: {version}\n{extras}")
            wheel.writestr(f"{info}/entry_points.txt", "dni-rnn = dni_rnn.cli:script\n[dni_rnn.tasks]\n")
        return check["check_wheel"](path, PROJECT["version"])

    assert wrong() == []
    assert wrong(leave_out="dni_rnn/py.typed") == ["dni_rnn/py.typed is missing"]
    assert wrong(add="tests/test_cli.py") == ["tests/test_cli.py is too much"]
    assert wrong(version="0.1.0") == ["METADATA is of 0.1.0"]


def test_on_pypi_the_links_of_the_readme_are_absolute():
    path = ROOT / ".ci" / "absolute_links.py"
    if not path.exists():
        pytest.skip("skipped: the script comes with the repository alone")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = runpy.run_path(str(path))["absolute"](readme, "owner/name", "abc123")
    link = r"\]\(([^)\s]+)\)"
    before, after = re.findall(link, readme), re.findall(link, page)
    assert all(target.startswith("https://") for target in after)
    assert "https://raw.githubusercontent.com/owner/name/abc123/results/headline.svg" in after
    places = (
        "https://github.com/owner/name/blob/abc123/",
        "https://raw.githubusercontent.com/owner/name/abc123/",
    )
    files = {target.removeprefix(places[0]).removeprefix(places[1]) for target in after}
    assert files == set(before), "nothing else has changed"
    assert re.sub(link, "", page) == re.sub(link, "", readme)
    assert sum((ROOT / name).exists() for name in files) > 20


def test_the_release_publishes_what_was_checked():
    path = ROOT / ".github" / "workflows" / "release.yml"
    if not path.exists():
        pytest.skip("skipped: the workflow comes with the repository alone")
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    runs = [step.get("run", "") for step in jobs["build"]["steps"]]
    first = {
        word: next(i for i, run in enumerate(runs) if word in run) for word in ("absolute_links", "-m build")
    }
    assert first["absolute_links"] < first["-m build"]
    assert set(jobs["publish"]["needs"]) == {"build", "install"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    tried = jobs["install"]["strategy"]["matrix"]["include"]
    assert {each.get("extra", "") for each in tried} - {""} == {
        f"[{extra}]" for extra in PROJECT["optional-dependencies"]
    }
    assert {each["python"] for each in tried} == {"3.11", "3.12", "3.13", "3.14"}
