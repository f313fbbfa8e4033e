"""What mkdocs is told beside its configuration: README.md, CONTRIBUTING.md and CHANGELOG.md are pages as they stand.

Their links are turned into the site's.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
}

WIDE = "---\nhide:\n  - navigation\n---\n"  # a page without siblings


def on_files(files: Files, config) -> Files:
    for source, page in PAGES.items():
        text = relinked((ROOT / source).read_text(), page)
        if page == "index.md":
            text = WIDE + text
        files.append(File.generated(config, page, content=text))
    return files


def relinked(text: str, page: str) -> str:
    """``text`` of the repository's root as the site's ``page``: links to docs/ and to `PAGES` hold there."""

    def link(found: re.Match) -> str:
        target, mark, anchor = found[1].partition("#")
        there = PAGES.get(target) or (target.removeprefix("docs/") if "docs/" in target else None)
        if there is None:  # another site, or an anchor of this page
            return found[0]
        return f"]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{mark}{anchor})"

    return re.sub(r"\]\((?![a-z]+://)([^)\s]*)\)", link, text)
