"""Every Python block of the documentation runs, page by page; what a page shows is there."""

import pathlib
import re

import pytest
import torch

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def blocks(page):
    """Code of a page; a block's ``hl_lines`` and the like may follow the language."""
    return re.findall(r"^```python.*?\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.M)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    torch.manual_seed(0)
    scope = {"__name__": page}
    for code in blocks(page):
        exec(compile(code, page, "exec"), scope)
