"""A call does what benchmarks/results/counts.json says, op for op: a regression that no clock is needed to see."""

import json
from importlib.util import find_spec

import pytest
import torch

from benchmarks import counts, report
from benchmarks.gpu.sizes import sized
from jactri._src.run.executor import Store

# filled memory is one more setting of torch that could change which ops run
pytestmark = pytest.mark.clean_memory
KEPT = json.loads(counts.FILE.read_text())
SMALL = next(w for w in counts.WORKLOADS if w.name == "W1-batch1")


@pytest.mark.parametrize("workload", counts.WORKLOADS, ids=lambda w: w.name)
def test_a_call_does_what_the_file_says(workload):
    found = counts.measure(workload)
    differ = counts.changes(found, KEPT["workloads"][workload.name], counts.comparable(KEPT))
    assert not differ, "if that is meant: python -m benchmarks.counts --write"


@pytest.mark.filterwarnings("ignore:a hook on gradients")
@pytest.mark.parametrize("case", counts.CASES, ids=lambda c: c.name)
def test_a_call_of_the_worst_inputs_does_what_the_file_says(case):
    differ = counts.moved({case.name: counts.measure_case(case)}, KEPT, "worst", counts.OF_CASES)
    assert not differ, "if that is meant: python -m benchmarks.counts --write"


@pytest.mark.skipif(find_spec("triton") is None, reason="the kernels are Triton's")
def test_traffic_on_a_gpu_is_what_the_file_says():
    found = counts.traffic()
    differ = counts.moved(found, KEPT)
    assert not differ, "if that is meant: python -m benchmarks.counts --write"
    assert list(found) == list(KEPT["gpu"])


def test_a_pass_too_many_on_a_gpu_is_seen():
    kept = {"W4 triton": {"ops": 8, "bytes_moved": 800, "launches": 4, "launch_bytes": 400}}
    more = {"W4 triton": {**kept["W4 triton"], "ops": 9, "bytes_moved": 900}, "W9": {"ops": 1}}
    file = {"torch": counts.version(), "gpu": kept}
    assert counts.moved(kept, file) == {}
    assert counts.moved(more, file) == {
        "W4 triton": {"ops": "+1", "bytes_moved": "+100"},
        "W9": {"ops": "was -"},
    }
    assert counts.moved(more, {**file, "torch": "0.1"}) == {}


def test_the_file_is_whole():
    assert list(KEPT["workloads"]) == [w.name for w in counts.WORKLOADS]
    for figures in KEPT["workloads"].values():
        assert set(counts.FIGURES[:-1]) <= set(figures) <= set(counts.FIGURES)
        assert all(type(n) is int for n in figures.values())
    assert list(KEPT["worst"]) == [c.name for c in counts.CASES]
    for figures in KEPT["worst"].values():
        assert tuple(figures) == counts.OF_CASES
    names = [f"{s.name} {backend}" for s in sized([]) for backend in ("triton", "torch")]
    assert list(KEPT["gpu"]) == names
    for figures in KEPT["gpu"].values():
        assert tuple(figures) == counts.ON_GPU


def test_figures_are_the_same_at_any_number_of_threads(one_thread):
    workload = next(w for w in counts.WORKLOADS if w.name == "W5")
    once = counts.measure(workload)
    torch.set_num_threads(2)
    assert counts.measure(workload) == once


def test_another_torch_is_held_to_the_plans_only():
    assert counts.comparable({"torch": counts.version()}) == counts.FIGURES
    assert counts.comparable({"torch": "0.1"}) == counts.PLANNED


@pytest.mark.parametrize("name", ["W1-batch1", "W1-tanh"])  # one chunk, and several
def test_a_copy_too_many_is_seen(name, monkeypatch):
    def wasteful(store, data, own, sel, real=Store.put):
        real(store, data.clone(), own, sel)

    workload = next(w for w in counts.WORKLOADS if w.name == name)
    before = counts.measure(workload)
    monkeypatch.setattr(Store, "put", wasteful)
    differ = counts.changes(counts.measure(workload), before)
    assert set(differ) >= {"ops", "bytes_moved", "allocations", "allocated_bytes"}
    assert not set(differ) & set(counts.PLANNED)


t, row = torch.ones(8, 16), torch.ones(16)  # 512 and 64 bytes


@pytest.mark.parametrize(
    ("call", "want"),  # ops, bytes moved, allocations, bytes allocated
    [
        (lambda: t.t().view(16, 2, 4)[3:].detach(), (0, 0, 0, 0)),
        (lambda: t * row, (1, 512 + 64 + 512, 1, 512)),
        (lambda: t * t, (1, 2 * 512, 1, 512)),
        (lambda: t * row.expand(8, 16), (1, 512 + 64 + 512, 1, 512)),
        (lambda: t.as_strided((15, 16), (8, 1)).clone(), (1, 512 + 960, 1, 960)),
        (lambda: t.mul_(row), (1, 512 + 64 + 512, 0, 0)),
        (lambda: t.copy_(row), (1, 64 + 512, 0, 0)),
        (lambda: t[:, 0].fill_(1.0), (1, 32, 0, 0)),
        (lambda: torch.add(row, row, out=t[0]), (1, 64 + 64, 0, 0)),
        (lambda: torch.cat([t, t[:4]]), (1, 512 + 256 + 768, 1, 768)),
        (lambda: torch.empty(100), (0, 0, 1, 400)),
        (lambda: torch.zeros_like(t), (1, 512, 1, 512)),
        (lambda: t.new_empty(0).resize_(0), (0, 0, 0, 0)),
    ],
)
def test_the_counter(call, want):
    with counts.Counter() as counter:
        call()
    assert tuple(counter.counts.values()) == want


def test_the_function_itself_is_not_counted():
    x = torch.ones(4, 16)
    net = torch.nn.Linear(16, 16)
    found = counts.counted(lambda f: f(f(x)) @ x.t(), net)
    assert found["ops"] == 1 and found["flops"] == 2 * 4 * 16 * 4


@pytest.fixture
def own_file(monkeypatch, tmp_path):
    monkeypatch.setattr(counts, "FILE", tmp_path / "counts.json")
    monkeypatch.setattr(counts, "WORKLOADS", (SMALL,))
    monkeypatch.setattr(counts, "CASES", counts.CASES[:1])
    monkeypatch.setattr(counts, "traffic", lambda: {"W4 triton": dict.fromkeys(counts.ON_GPU, 8)})
    return tmp_path / "counts.json"


def test_the_command(own_file, capsys):
    assert counts.main([]) == 1  # nothing is kept yet
    assert counts.main(["--write"]) == 0
    kept = json.loads(own_file.read_text())
    assert kept["workloads"] == {SMALL.name: counts.measure(SMALL)}
    capsys.readouterr()
    assert counts.main([]) == 0 and "(" not in capsys.readouterr().out
    kept["workloads"][SMALL.name]["planned_bytes"] -= 1024
    own_file.write_text(json.dumps(kept))
    assert counts.main([]) == 1 and "(+1,024)" in capsys.readouterr().out
    kept["workloads"][SMALL.name] = counts.measure(SMALL)
    kept["gpu"]["W4 triton"]["launches"] = 7
    own_file.write_text(json.dumps(kept))
    assert counts.main([]) == 1 and "8 (+1)" in capsys.readouterr().out
    kept["gpu"]["W4 triton"]["launches"] = 8
    kept["worst"][counts.CASES[0].name]["naive_ops"] -= 3
    own_file.write_text(json.dumps(kept))
    assert counts.main([]) == 1 and "(+3)" in capsys.readouterr().out
    kept["worst"][counts.CASES[0].name]["naive_ops"] += 3
    kept["workloads"] = {SMALL.name: counts.measure(SMALL), "gone": {}}
    own_file.write_text(json.dumps(kept))
    assert counts.main([]) == 1 and "gone" in capsys.readouterr().out


def test_the_report_of_all_files_leaves_counts_out(capsys):
    assert report.main([]) == 0
    assert "| workload |" in capsys.readouterr().out
