"""Make the relative links of a page absolute: PyPI shows the README alone, where they would lead nowhere.

python .ci/absolute_links.py README.md OWNER/REPOSITORY REVISION    (on GitHub; prints the page)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def absolute(page: str, repository: str, revision: str) -> str:
    """The page with links to files of that revision: pictures as they are, all else as GitHub shows it."""
    shown = f"https://github.com/{repository}/blob/{revision}/"
    raw = f"https://raw.githubusercontent.com/{repository}/{revision}/"
    return re.sub(
        r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)",
        lambda link: f"{link[1]}[{link[2]}]({raw if link[1] else shown}{link[3]})",
        page,
    )


if __name__ == "__main__":
    print(absolute(Path(sys.argv[1]).read_text(encoding="utf-8"), *sys.argv[2:4]), end="")
