"""CONTRIBUTING.md is true: its worked diffs stand in the files, its map is the contract's."""

import configparser
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]


def test_what_is_shown_to_contributors_is_there():
    shown = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert len(shown) == 4
    for block in shown:
        for part in block.split("+++ ")[1:]:
            path, *lines = part.splitlines()
            there = (ROOT / path).read_text().splitlines()
            assert lines and all(line.removeprefix("+") in there for line in lines), path


def test_the_map_of_folders_is_that_of_the_contract():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    layers = config["importlinter:contract:folders"]["layers"].replace("|", " ").split()
    held = {n.removeprefix("jactri._src.") for n in layers if n.startswith("jactri._src.")}
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    named = {n for row in rows for n in re.findall(r"`(\w+)`", row)}
    folders = {p.parent.name for p in (ROOT / "jactri/_src").glob("*/__init__.py")}
    assert held == named == folders
