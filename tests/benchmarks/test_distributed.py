"""`benchmarks.distributed` at tiny sizes: answers are checked, collectives counted; the model by itself. No times."""

import json
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks import distributed
from benchmarks.distributed import Card, Counts, model, predicted, verdict

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without torch.distributed"
)

TINY = 32
whole = distributed.measured


@cache
def ran(ranks):
    """The smallest problems, by real processes where there are two."""
    if ranks > 1:
        return whole(ranks, TINY, 1)
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        distributed.run_rank(0, 1, folder, TINY, 1)
        found = json.loads(Path(folder, "0.json").read_text())
    torch.set_num_threads(before)
    return {name: [f] for name, f in found.items()}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(distributed, "measured", lambda ranks, smaller, repeats: ran(ranks))


def test_workloads_are_run_checked_and_counted(quick, tmp_path, capsys):
    path = tmp_path / "ranks.json"
    assert distributed.main(["--smaller", "32", "--json", str(path)]) == 0
    found = {r["workload"]: r for r in json.loads(path.read_text())["results"]}
    assert list(found) == [w.name for w in distributed.WORKLOADS]
    for r in found.values():
        ((one,), two) = r["one"], r["two"]
        assert len(two) == 2 and all(rank["flops"] < one["flops"] for rank in two)
        assert [m["cards"] for m in r["model"]["as it was run"]] == list(distributed.CARDS)
    assert found["seeds"]["two"][0]["sent"] == {"allgather": [1, 584]}
    assert found["samples"]["two"][0]["sent"] == {}
    net, _ = distributed.problem(distributed.WORKLOADS[2], TINY)
    assert found["sums"]["two"][0]["sent"]["allreduce"] == [
        1,
        8 * sum(p.numel() for p in net.parameters()),
    ]
    assert found["kernel"]["two"][0]["sent"]["send"][1] > 0
    text = capsys.readouterr().out
    assert "1 allreduce of" in text and "1024" in text and "cards on: " in text


def test_a_wrong_answer_is_told(quick, monkeypatch, capsys):
    two = {name: [dict(r) for r in each] for name, each in ran(2).items()}
    two["sums"][1]["error"] = float("nan")
    monkeypatch.setattr(
        distributed, "measured", lambda ranks, *_: two if ranks == 2 else ran(ranks)
    )
    assert distributed.main(["--smaller", "32"]) == 1
    assert "FAILED sums: an error of nan against one process" in capsys.readouterr().out


def test_the_model_is_the_formula_that_it_prints():
    sent = {"allreduce": 8e6, "send": 4e6, "allgather": 100.0}
    counts = Counts(1e9, 64e9, {"allreduce": 1, "send": 1, "allgather": 2}, sent)
    card = Card(flops=1e12, link=1e9, latency=1e-5, host=1e-3)
    assert sum(predicted(counts, card, 1).values()) == pytest.approx(1e-3 + 65e-3)
    parts = predicted(counts, card, 8)
    assert parts["arithmetic"] == pytest.approx(9e-3)
    assert parts["latency"] == pytest.approx((6 + 7 + 6) * 1e-5)
    assert parts["link"] == pytest.approx((2 * 7 / 8 * 8e6 + 7 / 8 * 4e6 + 700) / 1e9)
    rows = list(model(counts, card))
    assert rows[0]["efficiency"] == 1.0 and rows[-1]["efficiency"] < 0.01
    assert rows[1]["limit"] == "link"
    assert verdict(rows).startswith("below 50% from 8 cards on: link, 17.5 of ")


def test_counts_and_how_they_grow():
    one, two = [{"flops": 110, "sent": {}}], [{"flops": 60, "sent": {"send": [2, 30]}}] * 2
    counts = Counts.of(one, two)
    assert (counts.own, counts.shared) == (10, 100)
    assert counts.sent == {"send": 60} and counts.calls == {"send": 2}
    grown = counts.grown(Counts(5, 12.5, {"send": 2}, {"send": 15}), 4)
    assert (grown.own, grown.shared, grown.sent["send"]) == pytest.approx((40, 6400, 960))
    alone = Counts(0, 1e15, {}, {})
    assert verdict(list(model(alone, Card(1e12, 1e9, 1e-5, 1e-3)))) == "above 50% to 1024 cards"
