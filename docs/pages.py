"""Pages from outside docs/: tables and notes are read where they are, so that none is a copy."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("results", "benchmarks", "examples", "dni_rnn", "tasks", "CONTRIBUTING.md", "CHANGELOG.md")
SUFFIXES = {".md", ".svg", ".png", ".csv", ".py", ".toml", ".jsonl", ".json"}


def on_config(config: MkDocsConfig) -> None:
    """Lists every table in the navigation."""
    tables = sorted(ROOT.glob("results/*/table.md"), key=_title)
    section: list[Any] = next(entry["Results"] for entry in config.nav or [] if "Results" in entry)
    section.insert(
        1, {"All tables": [{_title(table): table.relative_to(ROOT).as_posix()} for table in tables]}
    )


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds what lies elsewhere in the repository."""
    for name in ELSEWHERE:
        paths = [ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*")
        for path in paths:
            if path.suffix in SUFFIXES:
                where = path.relative_to(ROOT).as_posix()
                files.append(File(where, str(ROOT), config.site_dir, config.use_directory_urls))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links are those of the repository; on the site the pages of docs/ stand one folder higher.

    A link to a folder leads to its README. A table that a benchmark wrote gets what its about.toml says of
    it, and a table has the width of the page to itself.
    """
    source = Path(page.file.abs_src_path or "").relative_to(ROOT)
    if source.name == "table.md":
        page.meta["hide"] = ["toc"]
        markdown = _with_about(markdown, (ROOT / source).with_name("about.toml"))

    def moved(link: re.Match[str]) -> str:
        target = normpath((source.parent / link[1]).as_posix())
        if not (ROOT / target).exists():
            return link[0]  # mkdocs reports it
        if (ROOT / target).is_dir():
            target = f"{target}/README.md"
        return f"]({relpath(target.removeprefix('docs/'), Path(page.file.src_uri).parent)}{link[2] or ''})"

    return re.sub(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)", moved, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Short code is not broken at its hyphens (site.css); a picture of results leads to itself, in large."""
    html = re.sub(r"(?<!</span>)<code>([^<]{1,28})</code>", r'<code class="short">\1</code>', html)
    return re.sub(r'<img\b[^>]*\bsrc="([^"]+\.svg)"[^>]*>', r'<a class="picture" href="\1">\g<0></a>', html)


def _with_about(markdown: str, path: Path) -> str:
    about = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    title, _, rest = markdown.partition("\n")
    return "\n\n".join([title, about.get("note", "").strip(), rest.strip(), about.get("shows", "").strip()])


def _title(table: Path) -> str:
    return table.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")
