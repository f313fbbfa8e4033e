"""``python -m benchmarks.gpu`` and its report, tried on the CPU: the same code, with another clock."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.gpu import bench, cache, check, counters, items, suite
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.device import Cpu, precision
from benchmarks.gpu.sizes import GOALS, bound_ms, distance, problem, sized, truth
from benchmarks.peers import Peer
from benchmarks.record import Record

ROOT = Path(__file__).resolve().parents[2]
CARD = {
    "tf32_flops_per_s": 400e12, "ieee_flops_per_s": 50e12, "bf16_flops_per_s": 800e12, "copy_bytes_per_s": 3e12
}  # fmt: skip


class Graphs(Cpu):
    """A device that has graphs: a replay is the call again, into what the capture gave."""

    def graph(self, call):
        call()
        return call


def one(name, shrink=2000):
    return next(s for s in sized([name], shrink) if s.name == name)


@pytest.fixture
def found(tmp_path):
    """What an item's function found, by its record."""

    def call(function, *arguments, seconds=600.0):
        record = Record(tmp_path / "results" / "item.json", seconds, line="")
        function(*(record if a is Record else a for a in arguments))
        code = record.close()
        return code, json.loads(record.path.read_text())

    return call


# ---- the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_no_device_is_an_error(capsys):
    assert main(["lease"]) == 2
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bench:W99", "bench:W", "W1", "ben"])
def test_an_unknown_item_is_an_error(name, capsys, tmp_path):
    assert (
        main(["lease", "--device", "cpu", "--only", name, "--json", str(tmp_path / "x.json")]) == 2
    )
    error = capsys.readouterr().err
    assert repr(name) in error and "W1-tanh" in error and "capture" in error
    assert not list(tmp_path.iterdir())


def test_a_file_to_go_on_from_that_is_not_there_is_an_error(capsys, tmp_path):
    assert main(["lease", "--device", "cpu", "--skip-done", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_a_lease_for_real(tmp_path, capsys):
    """Two processes at tiny sizes; then once more, where one of them is done."""
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    tiny = [
        "lease",
        "--device",
        "cpu",
        "--shrink",
        "4000",
        "--only",
        "bench:W2",
        "--seconds",
        "400",
    ]
    assert main([*tiny, "--json", str(first)]) == 0
    data = json.loads(first.read_text())
    assert [(i["name"], i["state"]) for i in data["items"]] == [
        ("card", "done"),
        ("bench:W2", "done"),
    ]
    assert {"device", "torch", "triton", "commit", "date"} <= set(data["machine"])
    assert data["card"]["copy_bytes_per_s"] > 0 and data["kernels"] == cache.kernels_hash()
    out = capsys.readouterr().out
    assert "ieee bound" in out and out.rstrip().splitlines()[-1].endswith(" s")
    assert {f.name for f in tmp_path.iterdir()} == {"first.json", "first.log"}
    assert main([*tiny, "--json", str(second), "--skip-done", str(first)]) == 0
    again = json.loads(second.read_text())["items"][1]
    assert again == data["items"][1] | {"earlier": True}
    assert report.main(["--gpu", str(second), "--plot", str(tmp_path / "plot.png")]) == 0
    assert capsys.readouterr().out.count("\n| classifier MLP") == 2
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# ---- the list


def listed(monkeypatch, tools=(), **more):
    monkeypatch.setattr(
        items.shutil, "which", lambda name: f"/bin/{name}" if name in tools else None
    )
    return items.listed("cuda", 1, Path("lease.json"), **more)


def test_the_most_valuable_comes_first(monkeypatch):
    kinds = list(dict.fromkeys(i.kind for i in listed(monkeypatch, archive=Path("pack"))))
    assert kinds == [
        "card", "cache", "smoke", "capture", "accuracy", "bench", "limits", "kernels", "suite", "memcheck",
        "racecheck", "compiled",
    ]  # fmt: skip
    assert set(kinds) == set(items.KINDS)
    assert "cache" not in {i.kind for i in listed(monkeypatch)}


def test_every_item_can_be_run_and_has_a_limit(monkeypatch):
    found = listed(monkeypatch, ("ncu", "compute-sanitizer"))
    assert len({i.name for i in found}) == len(found)
    for i in found:
        at = i.command.index("benchmarks.gpu.items")
        assert i.command[at + 1] == i.name and not i.lacks
        assert 0 < i.seconds <= 180 and i.environment["TRITON_CACHE_DIR"]
    watched = [i for i in found if i.kind in ("memcheck", "racecheck")]
    assert all(i.command[:3] == ["/bin/compute-sanitizer", "--tool", i.kind] for i in watched)
    assert all(i.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" for i in watched)
    assert sum(len(suite.SMOKE) for i in watched) and len(watched) == 2 * items.SANITIZED


def test_tools_that_are_not_there_are_named(monkeypatch):
    lacking = {i.kind: i.lacks for i in listed(monkeypatch) if i.lacks}
    assert set(lacking) == {"limits", "memcheck", "racecheck"}
    assert "ncu" in lacking["limits"] and "compute-sanitizer" in lacking["racecheck"]


def test_some_items_can_be_asked_for(monkeypatch):
    every = listed(monkeypatch)
    names = [
        i.name for i in items.chosen(every, ["bench:W1", "bench:W6", "kernels:3of14", "limits"])
    ]
    assert names == [
        "card", "bench:W1-tanh", "bench:W1-silu", "bench:W6", "limits:W1-tanh", "limits:W5", "limits:W6",
        "kernels:3of14",
    ]  # fmt: skip
    assert items.chosen(every, []) == every


def test_an_item_that_raises_says_so_in_its_file(tmp_path):
    file = tmp_path / "item.json"
    assert items.main(["capture:none", "--device", "cpu", "--json", str(file)]) == 1
    (failure,) = json.loads(file.read_text())["failures"]
    assert failure["what"] == "capture" and "none" in failure["error"]


def test_a_cache_that_does_not_fit_is_a_failure_that_names_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FOLDER", tmp_path)

    def unpack(archive, folder, target):
        raise cache.Mismatch("packed for other kernels")

    monkeypatch.setattr(cache, "unpack", unpack)
    file = tmp_path / "item.json"
    assert items.main(["cache", "--device", "cpu", "--json", str(file), "--cache", "pack"]) == 1
    assert "other kernels" in json.loads(file.read_text())["failures"][0]["error"]


def test_a_cache_is_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FOLDER", tmp_path)
    calls = []

    def unpack(archive, folder, target):
        calls.append((archive, folder, target))
        folder.mkdir()
        (folder / cache.MANIFEST).write_text(json.dumps(cache.here()))
        return cache.here() | {"notes": ["no launchers"]}

    monkeypatch.setattr(cache, "unpack", unpack)
    (tmp_path / "lease.json").write_text(json.dumps({"machine": {"capability": "9.0"}}))
    file = tmp_path / "item.json"
    words = ["cache", "--device", "cpu", "--json", str(file), "--cache", "pack"]
    assert items.main([*words, "--lease", str(tmp_path / "lease.json")]) == 0
    assert calls == [(Path("pack"), tmp_path / "kernels", "sm_90")]
    assert json.loads(file.read_text())["line"] == "unpacked; no launchers"
    assert items.main(words) == 0 and len(calls) == 1
    assert json.loads(file.read_text())["line"] == "unpacked already"


# ---- times


@pytest.mark.parametrize("name", ["W1-tanh", "W2", "W8-divergence"])
def test_bench(name, found):
    code, data = found(bench.run, Graphs(), Record, one(name), CARD)
    assert code == 0 and not data["failures"] and not data["not_run"]
    assert [r["setting"] for r in data["results"]] == ["ieee", "tf32"]
    for row in data["results"]:
        own = row["contenders"]["jactri auto"]
        assert own["error"] < 1e-5 and own["ms"]["median"] > 0 and own["graph"]["median"] > 0
        assert own["kernel_ms"] == pytest.approx(
            sum(k["us"] for k in own["kernels"]) / 1e3, rel=0.9
        )
        assert own["launches"] >= len(own["kernels"]) / 2
        assert row["contenders"]["jactri compile"]["ms"]["median"] > 0
        assert row["best"]["ratio"] == row["best"]["peer_ms"] / row["best"]["own_ms"]
        assert 3 <= len(row["contenders"]) <= 6
    assert "ieee bound" in data["line"] and "times" in data["line"]


def test_peers_are_the_best_known_ones():
    names = {n: [p.name for p in bench.rivals(one(n).workload)] for n in ("W1-tanh", "W2", "W3")}
    forward, reverse = ["vmap(jacfwd)", "jacfwd of f(x+e)"], ["vmap(jacrev)", "jacrev of sum"]
    assert set(names["W1-tanh"]) == {*forward, *reverse}
    assert names["W2"] == reverse and names["W3"] == forward
    assert all(2 <= len(bench.rivals(s.workload)) <= 4 or "W9" in s.name for s in sized([], 4000))


def test_the_fastest_peer_is_compiled(found, monkeypatch):
    asked = []

    def compiled(peer):
        asked.append(peer.name)
        return Peer(f"compile {peer.name}", "compiled", peer.make)

    monkeypatch.setattr(bench, "compiled", compiled)
    times = {"vmap(jacrev)": 2.0, "jacrev of sum": 1.0, "jactri auto": 0.1}
    contenders = {n: {"ms": {"median": t}} for n, t in times.items()}
    rows = [{"setting": "ieee", "contenders": contenders}]
    code, data = found(bench.against_compiled, Cpu(), Record, one("W2"), CARD, rows)
    assert code == 0 and asked == ["jacrev of sum", "vmap(jacrev)"]
    assert set(data["results"][0]["contenders"]) == {"jactri auto", "compile jacrev of sum"}


def planted(make):
    return lambda w: [Peer("planted", "torch", make), bench.TORCH[4]]


def test_a_wrong_result_is_a_failure_and_is_not_timed(found, monkeypatch, traced_only):
    def wrong(w, net):
        jacobian = bench.TORCH[4].make(w, net)
        return lambda x: jacobian(x) * 1.001

    monkeypatch.setattr(bench, "rivals", planted(wrong))
    code, data = found(bench.run, Cpu(), Record, one("W2"), CARD)
    assert code == 1
    assert [f["what"] for f in data["failures"]] == ["ieee planted"]
    fact = data["results"][0]["contenders"]["planted"]
    assert "off by" in fact["failed"] and "ms" not in fact
    assert data["results"][0]["best"]["peer"] == "vmap(jacrev)"


def test_an_exception_in_a_peer_is_recorded_and_the_run_goes_on(found, monkeypatch, traced_only):
    def broken(w, net):
        raise MemoryError("too large")

    monkeypatch.setattr(bench, "rivals", planted(broken))
    code, data = found(bench.run, Cpu(), Record, one("W2"), CARD)
    assert code == 1 and data["failures"][0]["type"] == "MemoryError"
    assert data["results"][1]["best"]["peer"] == "vmap(jacrev)"


def test_a_profiler_that_fails_costs_its_own_figures_only(found, monkeypatch, traced_only):
    def broken(device, call):
        raise RuntimeError("CUPTI")

    monkeypatch.setattr(bench, "kernels_of", broken)
    code, data = found(bench.run, Cpu(), Record, one("W2"), CARD)
    fact = data["results"][0]["contenders"]["jactri auto"]
    assert code == 0 and "CUPTI" in fact["kernels_failed"] and fact["ms"]["median"] > 0
    assert "no CUDA graphs" in fact["graph"]["failed"]


def test_what_time_does_not_suffice_for_is_noted(found):
    code, data = found(bench.run, Cpu(), Record, one("W2"), CARD, seconds=0.0)
    assert code == 0 and not data["results"] and data["not_run"] == ["ieee", "tf32"]


# ---- accuracy and captures


def test_accuracy(found, traced_only):
    code, data = found(check.accuracy, Cpu(), Record, one("W2"))
    assert code == 0
    assert [r["setting"] for r in data["results"]] == ["ieee", "tf32", "bf16"]
    assert all(
        r["auto"] <= 2 * r["torch.func"] + check.SLACK[r["setting"]] for r in data["results"]
    )
    assert "compiled" in data["results"][0] and data["line"].startswith("off by ieee")


def test_a_wrong_jacobian_fails_the_check(found, monkeypatch, traced_only):
    plain = check.jactri.jacobian
    monkeypatch.setattr(check.jactri, "jacobian", lambda *a, **k: plain(*a, **k) * 1.1)
    code, data = found(check.accuracy, Cpu(), Record, one("W2"))
    assert code == 1 and "off by 1.0e-01" in data["failures"][0]["error"]


@pytest.mark.parametrize("name", ["W2", "W9-parameters", "W8-laplacian"])
def test_captures(name, found):
    code, data = found(check.capture, Graphs(), Record, one(name))
    auto, made = data["results"]
    assert code == 0 and auto["captured"] and not made["captured"] and auto["error"] < 1e-5
    assert "auto captured; compiled not captured: jactri.compile" in data["line"]
    code, data = found(check.capture, Cpu(), Record, one(name))
    assert code == 0 and "no CUDA graphs" in data["results"][0]["how"]


def test_a_graph_that_does_not_read_its_input_is_found(found):
    class Stale(Cpu):
        def graph(self, call):
            call()
            return lambda: None

    code, data = found(check.capture, Stale(), Record, one("W2"))
    assert code == 1 and "when replayed" in data["failures"][0]["error"]


# ---- sizes, devices


def test_sizes_are_those_of_the_goals():
    all_of_them = sized([])
    assert [s.name.split("-n")[0] for s in all_of_them] == [n.split("-n")[0] for n in GOALS]
    w1 = all_of_them[0].workload
    assert w1.samples == 16384 and w1.shape == (16384, 32, 32)
    # W1 moves 69 MB of J, and multiplies 77 GFLOP beside its forward pass
    assert w1.answer_bytes == 67_108_864
    assert bound_ms(w1, CARD, "ieee") == pytest.approx(0.615, rel=0.03)
    assert bound_ms(w1, CARD, "tf32") == pytest.approx(0.20, rel=0.03)


def test_truth_is_float64_of_the_first_samples():
    w = sized(["W3"], 300)[0].workload
    net, x = problem(w, torch.device("cpu"))
    want = truth(w, net, x, 2)
    got = torch.func.vmap(torch.func.jacfwd(net.double()))(x.double())
    assert want.dtype is torch.float64 and distance(got, want) < 1e-12
    with pytest.raises(AssertionError, match="shape"):
        distance(got.mT, want)


def test_precision_is_set_and_restored():
    before = torch.backends.cuda.matmul.fp32_precision
    with precision("tf32"):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert Cpu().milliseconds(lambda: None) >= 0


def test_importing_the_command_needs_no_plotting():
    code = (
        "import benchmarks.gpu.items, benchmarks.report, sys; sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, cwd=ROOT).returncode == 0


# ---- counters

RAW = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed",\
"sm__warps_active.avg.pct_of_peak_sustained_active"
"","","","ns","%","%"
"0","1","_step","2,000","80.5","50"
"1","1","_step","6,000","60.5","10"
"2","1","copy","1,000","5","12"
"3","1","wait","500","5","n/a"
""".replace("\\\n", "")


def fake(tmp_path, name, code):
    path = tmp_path / name
    path.write_text(f"#!{sys.executable}\nimport sys\n{code}")
    path.chmod(0o755)
    return str(path)


def test_counters_are_added_up_by_kernel(tmp_path):
    # a card that knows neither of these counters: they are left out, and the call is repeated
    code = (
        "asked = sys.argv[sys.argv.index('--metrics') + 1]\n"
        "for m in ('sm__issue_active', 'sm__pipe_tensor_cycles_active'):\n"
        "    if m in asked:\n"
        "        sys.exit('==ERROR== Failed to find metric ' + next(a for a in asked.split(',') if m in a))\n"
        f"print({RAW!r})\n"
    )
    found = counters._profiled(fake(tmp_path, "ncu", code), "W1-tanh", "ieee", 1, 60)
    step, copy, wait = found
    assert step["name"] == "_step" and step["us"] == 8.0 and step["count"] == 2
    assert step["memory"] == pytest.approx((2 * 80.5 + 6 * 60.5) / 8)
    assert [k["bound by"] for k in found] == ["memory", "occupancy", "latency"]
    assert "occupancy" not in wait and "tensor pipe" not in step
    assert counters.line(copy).startswith("copy 1.0 us, 1 x, bound by occupancy (memory 5%")


def test_a_failing_profiler_is_a_failure(tmp_path):
    ncu = fake(tmp_path, "ncu", "sys.exit('ERR_NVGPUCTRPERM')")
    with pytest.raises(ValueError, match="ended with 1: ERR_NVGPUCTRPERM"):
        counters._profiled(ncu, "W2", "ieee", 1, 60)
    ncu = fake(tmp_path, "ncu", "print('no kernels were profiled')")
    with pytest.raises(ValueError, match="no table in what ncu printed"):
        counters._profiled(ncu, "W2", "ieee", 1, 60)


def test_limits(found, tmp_path, monkeypatch):
    ncu = fake(tmp_path, "ncu", f"print({RAW!r})")
    monkeypatch.setattr(counters.shutil, "which", lambda name: ncu)
    code, data = found(counters.run, Record, one("W2"), 1)
    assert code == 0 and data["results"][0]["kernels"][0]["name"] == "_step"
    assert data["line"].startswith("_step 8.0 us, 2 x, bound by memory (memory 66%")
