"""A report as one self-contained HTML page: no other file, no network, no script."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
:root { color-scheme: light dark;
  --ink: #1f2328; --paper: #fff; --line: #d0d7de; --faint: #f6f8fa; --link: #0969da }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --faint: #161b22; --link: #58a6ff }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
a { color: var(--link) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th { border-bottom-width: 2px; text-align: left }
tr:hover td { background: var(--faint) }
code, pre { font: .85em/1.45 ui-monospace, monospace; background: var(--faint) }
pre { padding: .7rem; overflow-x: auto }
svg { max-width: 100%; height: auto }
"""


def render_page(markdown: str, folder: Path) -> str:
    """The contents of report.html: a report in Markdown with its SVG pictures inlined.

    Args:
      markdown: the contents of table.md.
      folder: where the pictures are.
    """
    title = markdown.partition("\n")[0].removeprefix("# ")
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    pictures = iter(range(len(body)))
    body = re.sub(
        r'<img src="([^"/]+\.svg)" alt="([^"]*)" */>',
        lambda found: _inline(folder / found[1], found[2], f"p{next(pictures)}-"),
        body,
    )
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n{body}</html>\n"
    )


def _inline(path: Path, description: str, prefix: str) -> str:
    """An SVG file as an element of a page, with ids that are unique in the page."""
    picture = path.read_text(encoding="utf-8")
    picture = picture[picture.index("<svg") :]
    picture = re.sub(r"<metadata>.*?</metadata>\s*", "", picture, flags=re.DOTALL)
    picture = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{prefix}", picture)
    return picture.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
