"""Every Python block of README.md and docs/ runs, page by page; figures are those of the files, commands exist."""

import json
import pathlib
import re
import runpy

import matplotlib.pyplot
import pages
import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
TUTORIALS = sorted(path.name for path in ROOT.glob("docs/tutorials/*.py"))
CLIENTS = "docs/howto/libraries.md"  # tests/clients/test_libraries.py runs it
REPORT = runpy.run_path(str(ROOT / "benchmarks/report.py"))


def blocks(page, language="python"):
    return [code for code, _ in pages.printed((ROOT / page).read_text(), language)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page) and page != CLIENTS])
def test_python_blocks_run_and_print_what_is_shown(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # some write files
    torch.manual_seed(0)
    pages.run((ROOT / page).read_text(), page, capsys)


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorials_run(name, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    dtype = torch.get_default_dtype()
    try:
        runpy.run_path(str(ROOT / "docs/tutorials" / name))
    finally:
        torch.set_default_dtype(dtype)
        matplotlib.pyplot.close("all")


def test_the_list_of_tutorials_is_whole():
    text = (ROOT / "docs/tutorials/index.md").read_text()
    assert sorted(re.findall(r"\((\w+\.py)\)", text)) == TUTORIALS


def test_headline_figures_are_those_of_the_file():
    measured = json.loads((ROOT / "benchmarks/results/cpu-2core.json").read_text())
    assert REPORT["headline"](measured) in (ROOT / "README.md").read_text()


def test_the_lens_of_the_docs_is_the_one_measured():
    measured = json.loads((ROOT / "benchmarks/results/lens.json").read_text())["results"]
    page = (ROOT / "docs/benchmarks.md").read_text()
    for r in measured:
        flops, peak = r["flops"] / 1e9, r["peak_bytes"] / 1e6
        assert f"| {flops:.0f} | {r['seconds']['median']:.2f} | {peak:.0f} |" in page


SPARSE = ["sparse"] if (ROOT / "benchmarks/results/sparse.json").exists() else []


@pytest.mark.parametrize("name", ["cpu-2core", "penalty", "worst", *SPARSE])
def test_measured_tables_are_those_of_the_files(name):
    measured = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    assert REPORT["table"](measured) in (ROOT / "docs/benchmarks.md").read_text()


def commands():
    lines = [line for p in PAGES for block in blocks(p, "bash") for line in block.splitlines()]
    return sorted({line.split("#")[0] for line in lines if "python -m jactri " in line})


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line):
    from jactri.cli.commands import build_parser

    words = line.split("python -m jactri")[1].split()
    assert vars(build_parser().parse_args(words))  # argparse exits on words that it does not know


def test_links_to_files_hold():
    """Within README and CONTRIBUTING; mkdocs holds those of the site."""
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", (ROOT / page).read_text()):
            assert (ROOT / target).exists(), f"{page}: {target}"
