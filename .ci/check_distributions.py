"""What is in a built sdist and wheel, and that all that names a version names the same one.

python .ci/check_distributions.py DIST [TAG]
"""

from __future__ import annotations

import re
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("dni_rnn", "dni_rnn_tasks")
ALONGSIDE = (
    "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "constraints.txt",
    "pyproject.toml", "mkdocs.yml",
)  # fmt: skip
FOLDERS = ("tests", "examples", "docs")
MOST_BYTES = {".whl": 1_000_000, ".gz": 3_000_000}


def modules() -> set[str]:
    """The files of both packages, by their place in a wheel."""
    places = (ROOT / "dni_rnn", ROOT / "tasks" / "dni_rnn_tasks")
    return {
        f"{place.name}/{path.relative_to(place).as_posix()}"
        for place in places
        for path in place.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def versions() -> dict[str, str]:
    """The version by who names it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {"pyproject.toml": project["version"]}
    patterns = {"CITATION.cff": r"^version: (\S+)", "CHANGELOG.md": r"^## (\d\S*)"}
    for name, pattern in patterns.items():
        match = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        found[name] = match[1] if match else "none"
    return found


def check_wheel(path: Path, version: str) -> list[str]:
    """What is wrong with a wheel."""
    with zipfile.ZipFile(path) as wheel:
        names, info = set(wheel.namelist()), f"dni_rnn-{version}.dist-info"
        wrong = [f"{name} is missing" for name in sorted(modules() - names)]
        wrong += [f"{name} is too much" for name in sorted(names - modules()) if not name.startswith(info)]
        metadata = message_from_bytes(wheel.read(f"{info}/METADATA"))
        points = wheel.read(f"{info}/entry_points.txt").decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if metadata["Version"] != version:
        wrong.append(f"METADATA is of {metadata['Version']}")
    extras = set(project["optional-dependencies"])
    if set(metadata.get_all("Provides-Extra") or ()) != extras:
        wrong.append(f"extras are not {sorted(extras)}")
    if "dni-rnn = dni_rnn.cli:script" not in points or "[dni_rnn.tasks]" not in points:
        wrong.append("entry points are missing")
    return wrong


def check_sdist(path: Path, version: str) -> list[str]:
    """What is wrong with an sdist."""
    with tarfile.open(path) as sdist:
        names = {name.removeprefix(f"dni_rnn-{version}/") for name in sdist.getnames()}
    wanted = {name.replace("dni_rnn_tasks/", "tasks/dni_rnn_tasks/") for name in modules()} | {*ALONGSIDE}
    wrong = [f"{name} is missing" for name in sorted(wanted - names)]
    tops = {name.partition("/")[0] for name in names}
    known = {*ALONGSIDE, *FOLDERS, "dni_rnn", "tasks", "PKG-INFO", ".gitignore"}
    wrong += [f"{folder}/ is missing" for folder in FOLDERS if folder not in tops]
    return wrong + [f"{name} is too much" for name in sorted(tops - known)]


def check(dist: Path, tag: str = "") -> list[str]:
    """What is wrong with the distributions in a folder, each with the file's name."""
    found = versions()
    version = found["pyproject.toml"]
    wrong = [f"{name} is of {other}, not {version}" for name, other in found.items() if other != version]
    if tag and tag.removeprefix("v") != version:
        wrong.append(f"the tag is {tag}, not v{version}")
    files = sorted(dist.iterdir())
    expected = {f"dni_rnn-{version}-py3-none-any.whl", f"dni_rnn-{version}.tar.gz"}
    if {file.name for file in files} != expected:
        return [*wrong, f"{dist} holds {[file.name for file in files]}, not {sorted(expected)}"]
    for file in files:
        each = check_wheel if file.suffix == ".whl" else check_sdist
        wrong += [f"{file.name}: {what}" for what in each(file, version)]
        if file.stat().st_size > MOST_BYTES[file.suffix]:
            wrong.append(f"{file.name}: {file.stat().st_size:,} bytes")
    return wrong


if __name__ == "__main__":
    problems = check(Path(sys.argv[1]), *sys.argv[2:3])
    print("\n".join(problems) or "sdist and wheel are as they should be")
    sys.exit(bool(problems))
