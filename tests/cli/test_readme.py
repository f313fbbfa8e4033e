"""Every Python block of the README runs, in order, in one namespace; its commands exist. CONTRIBUTING is true, too."""

import configparser
import json
import pathlib
import re
import runpy

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]
README = ROOT / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_python_blocks_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one writes a file
    found = blocks("python")
    assert len(found) >= 4
    scope = {}
    for code in found:
        exec(compile(code, "README.md", "exec"), scope)
    assert scope["file"].shape == (64, 8, 32) and scope["file"].any()
    assert scope["J"].shape == (65536, 65536) and scope["band"].values.shape[-1] == 49
    assert scope["mask"]._nnz() == scope["J"].values().numel() < 3.3e6
    assert scope["lap"].allclose(torch.full((100,), 6.0))
    assert "fallbacks: none" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["cpu-2core", "penalty"])
def test_the_measured_tables_are_those_of_the_files(file):
    program = runpy.run_path(str(ROOT / "benchmarks/report.py"))
    measured = json.loads((ROOT / f"benchmarks/results/{file}.json").read_text())
    assert program["table"](measured) in README.read_text()


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


def commands():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line.split("#")[0] for line in lines if "python -m jactri" in line]


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line):
    from jactri.cli.commands import build_parser

    words = line.split("python -m jactri")[1].split()
    assert vars(build_parser().parse_args(words))  # argparse exits on words that it does not know
