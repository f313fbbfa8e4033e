"""Names in docstrings lead to their place in the reference: what stands in single backticks, as `jactri.jacobian`."""

import re
from pathlib import Path

import griffe

PAGES = Path(__file__).parent / "reference"
NAMES = re.findall(r"^::: (\S+)", "\n".join(p.read_text() for p in PAGES.glob("*.md")), re.M)
PLACES = {name.removeprefix("jactri."): name for name in NAMES}
PLACES |= {name.rpartition(".")[2]: name for name in NAMES}


def place(name: str) -> str | None:
    """Where the reference has a name, or a member of one."""
    name = name.removeprefix("jactri.")
    owner, _, member = name.rpartition(".")
    if name in PLACES or owner not in PLACES or owner == "func":
        return PLACES.get(name)
    return f"{PLACES[owner]}.{member}"


def linked(found: re.Match) -> str:
    there = place(found[1])
    return f"[{found[0]}][{there}]" if there else found[0]


class Links(griffe.Extension):
    def on_object(self, *, obj, **_) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?<!`)`([\w.]+)`(?!`)", linked, obj.docstring.value)
