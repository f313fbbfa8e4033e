"""The inputs of `benchmarks.worst` at small sizes: every contender is right, and what is found is told. No times."""

import json

import pytest
import torch

from benchmarks import checks, naive, report, worst, worst_cases
from jactri._src.base.memory import MemoryLimitTooSmall

CASES = worst_cases.CASES
QUICK = ["--quick", "--rounds", "1", "--budget", "0.01"]


@pytest.mark.filterwarnings("ignore:a hook on gradients")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_contender_is_right(case):
    want, given = worst.truth(case, quick=True), case.given(quick=True)
    assert want.dtype is torch.float64 and given.forward() is not None
    for limit, name in ((None, "jactri"), ("1GB", "jactri"), *((None, n) for n in given.peers)):
        answer = worst.contenders(given, limit)[name]()
        assert checks.distance(answer, want, case.dtype) <= checks.TOLERANCE, name
    assert given.plan is None or given.plan().peak_bytes >= 0


def test_sizes_are_those_of_the_same_case():
    for case in CASES:
        assert case.sizes.keys() == case.quick.keys(), case.name
        assert all(case.quick[k] <= n for k, n in case.sizes.items())


def test_cases_are_chosen_by_name_or_beginning():
    assert worst_cases.select([]) == list(CASES)
    found = worst_cases.select(["ode", "function-", "function-jvp"])
    assert [c.name for c in found] == [
        "ode",
        "function-jvp",
        "function-divergence",
        "function-diagonal",
    ]
    assert worst.main(["function"]) == 2


def test_one_contender_in_a_fresh_process():
    found = worst.in_subprocess(CASES[0], "jactri", "1MB", quick=True)
    assert found["seconds"] > 0 and found["peak_bytes"] >= 0 and found["stderr_lines"] == 0


def test_the_command_measures_and_prints_a_table(tmp_path, capsys, monkeypatch):
    def here(*given):
        return worst.alone(*given) | {"stderr_lines": 0}

    monkeypatch.setattr(worst, "in_subprocess", here)
    file = tmp_path / "worst.json"
    assert worst.main(["function-jvp", *QUICK, "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    (row,) = data["results"]
    assert data["kind"] == "worst" and row["peer"] == "functional.jvp" and not row["rejected"]
    assert set(row["alone"]) == {"forward", "jactri", "functional.jvp"}
    assert row["peak_ratio"] == 1 and row["limits"]["10MB"]["kept"]  # below what a process needs
    capsys.readouterr()
    assert report.main([str(file), "--plots", str(tmp_path)]) == 0
    assert f"\n| {row['title']} | " in capsys.readouterr().out


def test_a_wrong_answer_fails_the_run(monkeypatch, capsys):
    case = CASES[0]
    given = case.given(quick=True)
    made = naive.Given(given.forward, lambda limit: 1.01 * given.ours(limit), given.peers)
    monkeypatch.setattr(worst, "CASES", ())
    monkeypatch.setattr(worst_cases.Case, "given", lambda self, quick, dtype=None: made)
    assert worst.main([case.name, *QUICK, "--no-memory"]) == 1
    assert "of the largest entry" in capsys.readouterr().out


def test_a_limit_that_refuses_is_told(monkeypatch):
    def refuse(self, quick, dtype=None):
        def ours(limit):
            raise MemoryLimitTooSmall("too small", 1)

        return naive.Given(lambda: None, ours if not quick else lambda limit: None, {})

    monkeypatch.setattr(worst_cases.Case, "given", refuse)
    assert worst.alone(CASES[0], "jactri", "1KB", quick=False) == {"refused": "too small"}


def measured(**more):
    spread = {"median": 2.0, "p20": 1.0, "p80": 3.0, "count": 3}
    times = {n: {"seconds": {**spread, "median": s}} for n, s in (("jactri", 0.2), ("loop", 0.1))}
    return {"case": "a", "title": "A", "contenders": times, "peer": "loop", "ratio": spread, **more}


def test_the_table_says_what_passed_its_limit():
    run = {"seconds": 1.0, "peak_bytes": 8_000_000, "stderr_lines": 0}
    row = measured(
        alone={"jactri": {**run, "stderr_lines": 2}, "loop": run, "forward": run}, peak_ratio=1.0,
        first_ratio=12.3, planned_bytes=5_000_000, above_forward_bytes=6_000_000,
        limits={
            "1MB": {"peak_bytes": 9, "above_forward_bytes": 7_500_000, "kept": False},
            "2MB": {"refused": "no"}, "3MB": {"failed": "no"},
        },
    )  # fmt: skip
    text = report.table({
        "kind": "worst", "results": [row, measured()],
        "machine": {"cpu": "c", "threads": 1, "torch": "2", "date": "2030-01-02"},
    })  # fmt: skip
    assert (
        "| A | 200 | 100 (loop) | 2 | 12 | 8 | 8 | 1 | 5, was 6 "
        "| 1MB: 7.5 PASSED; 2MB: refused; 3MB: failed |" in text
    )
    assert "| A | 200 | 100 (loop) | 2 | - | - | - | - | - | - |" in text
    assert text.endswith("Written to stderr: a 2 lines.")
