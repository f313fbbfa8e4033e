"""`benchmarks.sparse` at small sizes: all contenders are right, counted and compared; a wrong one is told. No times."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import machine, report, sparse, sparse_peers
from benchmarks.sparse_problems import PROBLEMS, select

QUICK = ["--quick", "--rounds", "1", "--budget", "0.01"]


@pytest.mark.filterwarnings("ignore:Coloring used")  # asdex, of an arrowhead
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_every_contender_is_right(problem):
    want = sparse.truth(problem)
    made = sparse_peers.ours(problem, quick=True)
    assert sparse.gap(made.call().to_dense(), want) <= sparse.TOLERANCE
    entries = sparse_peers.entries_of(made.call())
    assert len(entries) == made.facts["entries"]
    coloured = sparse_peers.Coloured.of(entries)
    assert 0 < made.facts["products"] <= min(entries.shape)
    for name, build in sparse_peers.peers(problem, True, entries, coloured).items():
        if sparse_peers.missing(name) is None:
            peer = build()
            error = sparse.gap(peer.matrix(peer.call()).to_dense(), want)
            assert error <= sparse.TOLERANCE, name


def test_sizes_are_those_of_the_same_problem():
    for problem in PROBLEMS:
        assert problem.sizes.keys() == problem.quick.keys(), problem.name
        assert all(problem.quick[k] <= n for k, n in problem.sizes.items())


def test_a_vector_has_the_same_jacobian():
    (problem,) = select(["brusselator"])
    function, x = problem.flat(True, sparse_peers.TORCH)
    found = torch.autograd.functional.jacobian(function, torch.from_numpy(x))
    torch.testing.assert_close(found, sparse.truth(problem), rtol=0, atol=0)


def test_colours_keep_apart_what_meets():
    rng = np.random.default_rng(0)
    row, column = np.nonzero(rng.random((9, 14)) < 0.3)
    entries = sparse_peers.Entries.of(row[::-1], column[::-1], (9, 14))
    np.testing.assert_array_equal(entries.row, row)
    for rows in (False, True):
        colour = sparse_peers.largest_first(entries, rows)
        own, other = (entries.row, entries.column)[:: 1 if rows else -1]
        seen = set(zip(colour[own].tolist(), other.tolist(), strict=True))
        assert len(seen) == len(entries) and len(colour) == entries.shape[not rows]


def test_the_command_measures_and_prints_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        sparse, "missing", lambda n: "not installed" if n in sparse_peers.JAX else None
    )
    file = tmp_path / "sparse.json"
    assert sparse.main(["arrowhead", "bundle", *QUICK, "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    assert data["kind"] == "sparse" and not data["failures"]
    for row in data["results"]:
        assert set(row["left_out"]) == set(sparse_peers.JAX) and not row["rejected"]
        assert (
            list(row["ratios"]) == ["jactri", "jactri.compile"] and row["peer"] in row["contenders"]
        )
        assert row["contenders"]["jactri"]["error"] <= sparse.TOLERANCE
    capsys.readouterr()
    assert report.main([str(file), "--plots", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (text for text in lines if text.startswith("| arrowhead"))
    assert line.count("|") == lines[2].count("|") == 18 and "| - |" in line  # no asdex


def test_a_wrong_answer_fails_the_run(monkeypatch, capsys):
    right = sparse_peers.ours

    def wrong(problem, quick):
        made = right(problem, quick)
        return replace(made, matrix=lambda answer: 1.001 * answer)

    monkeypatch.setattr(sparse, "ours", wrong)
    assert sparse.main(["arrowhead", *QUICK]) == 1
    assert "of the largest entry" in capsys.readouterr().out


def test_an_entry_in_the_wrong_place_is_seen_at_full_size():
    (problem,) = select(["bundle"])
    probes, matrix = sparse.Probes(problem, True), sparse.truth(problem)
    moved = matrix.clone()
    moved[0] = matrix[0].roll(1)
    assert probes.error(matrix.to_sparse_csr()) <= sparse.TOLERANCE
    with pytest.raises(sparse.WrongResult):
        probes.error(moved.to_sparse_csr())


@pytest.mark.parametrize("name", ["heat", "brusselator", "arrowhead", "rosenbrock", "line"])
def test_products_are_as_few_as_the_page_says(name):
    (problem,) = select([name])
    facts = sparse_peers.ours(problem, quick=False).facts
    page = (machine.ROOT / "docs/benchmarks.md").read_text()
    assert f"| {problem.title} | {facts['entries']:,} | {facts['products']} |" in page


def test_problems_are_chosen_by_name(capsys):
    assert select([]) == list(PROBLEMS)
    assert sparse.main(["nothing"]) == 2
    assert "no problem nothing" in capsys.readouterr().err
    assert sparse.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(PROBLEMS)


def test_the_table_tells_what_a_peer_has_less_of():
    spread = {"median": 0.002, "p20": 0.001, "p80": 0.003, "count": 3}
    ours = {"entries": 1200, "products": 5, "first_s": 0.5, "seconds": spread}
    other = {**ours, "entries": 1100, "products": 4, "seconds": {**spread, "median": 0.005}}
    row = {
        "title": "A", "largest_first": 6, "contenders": {"jactri": ours, "asdex": other},
        "ratios": {"jactri": {**spread, "median": 2.5}}, "peer": "asdex",
    }  # fmt: skip
    text = report.table({
        "kind": "sparse", "results": [row],
        "machine": {
            "cpu": "c", "threads": 1, "torch": "2", "date": "2030-01-02", "jax": "1", "asdex": "0.5", "sparsejac": None,
        },
    })  # fmt: skip
    assert "jax 1, asdex 0.5, float64" in text
    assert text.endswith(
        "| A | 1,200 (asdex 1,100) | 5 | 4 | 6 | 2 | - | 5 | - | - | - | asdex | 2.5 | - | 0.5 | - | 0.5 |"
    )
