"""Every public name is in the reference once, has examples that run, and a docstring that names what is there."""

import dataclasses
import doctest
import inspect
import operator
import pathlib
import re
from collections import Counter

import pytest
import torch

import jactri

PAGES = pathlib.Path(__file__).parents[2] / "docs/reference"
NAMES = [
    *jactri.__all__,
    *(
        f"{m.__name__.rpartition('.')[2]}.{name}"
        for m in (jactri.func, jactri.distributed)
        for name in m.__all__
    ),
]
PUBLIC = {name: operator.attrgetter(name)(jactri) for name in NAMES}
CLASSES = {name: it for name, it in PUBLIC.items() if inspect.isclass(it)}


def members(cls):
    """The public methods and properties of a class, by name."""
    found = {n: it for n, it in vars(cls).items() if not n.startswith("_")}
    return {n: it for n, it in found.items() if inspect.isfunction(it) or isinstance(it, property)}


def named_in(section, it):
    """What a section of a docstring has entries for."""
    found = re.search(rf"^{section}:\n((?:    .*\n?|\n)+)", inspect.getdoc(it) or "", re.M)
    return re.findall(r"^    (\w+):", found[1], re.M) if found else None


def test_every_public_name_is_in_the_reference_once():
    pages = {path.name: path.read_text() for path in PAGES.glob("*.md")}
    found = Counter(re.findall(r"^::: jactri\.(?!_src)(\S+)", "\n".join(pages.values()), re.M))
    assert found == Counter(NAMES)
    rows = re.findall(r"^\| \[`(\S+)`\]\((\w+\.md)#jactri\.(\S+)\) \|", pages["index.md"], re.M)
    assert Counter(name for name, _, _ in rows) == Counter(NAMES)
    for name, page, anchor in rows:
        assert name == anchor and f"\n::: jactri.{name}\n" in pages[page], name


@pytest.mark.parametrize("name", NAMES)
def test_examples_of_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = {"torch": torch, "nn": torch.nn, "jactri": jactri}
    (test,) = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs=scope)
    assert test.examples
    said = []
    assert not doctest.DocTestRunner().run(test, out=said.append).failed, "".join(said)


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_name_what_is_there(name):
    it = PUBLIC[name]
    calls = {name: it} if inspect.isfunction(it) else {}
    if name in CLASSES:
        assert [n for n, member in members(it).items() if not inspect.getdoc(member)] == []
        calls = {n: member for n, member in members(it).items() if inspect.isfunction(member)}
        if dataclasses.is_dataclass(it):
            assert named_in("Attributes", it) == [f.name for f in dataclasses.fields(it)]
    for call in calls.values():
        given = [p for p in inspect.signature(call).parameters if p != "self"]
        assert (named_in("Args", call) or []) == given, call
