"""``python -m benchmarks.gpu`` and its report, tried on the CPU: the same code, with another clock."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import record as records
from benchmarks import report
from benchmarks.gpu import bench, check, counters
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.device import Cpu, precision
from benchmarks.gpu.sizes import GOALS, bound_ms, distance, problem, sized, truth
from benchmarks.peers import Peer

TINY = ["--device", "cpu", "--shrink", "2000", "--no-compile"]


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "results" / "run.json"

    def call(*arguments):
        code = main([*arguments, *TINY, "--json", str(path)])
        return code, json.loads(path.read_text())

    return call


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_no_device_is_an_error(capsys):
    assert main(["bench"]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_an_unknown_workload_is_an_error(capsys):
    assert main(["bench", "W99", *TINY]) == 2
    assert "W1-tanh" in capsys.readouterr().err


def test_bench(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "LAUNCH_BOUND_MS", float("inf"))  # however slow this machine is now
    code, found = run("bench", "W1-tanh", "W2")
    assert code == 0 and not found["failures"] and not found["not_run"]
    assert {r["workload"] for r in found["results"]} == {"W1-tanh", "W2"}
    for row in found["results"]:
        assert row["setting"] in ("ieee", "tf32")
        assert row["contenders"]["jactri auto"]["error"] < 1e-5
        assert row["best"]["ratio"] == row["best"]["peer_ms"] / row["best"]["own_ms"]
        assert "no CUDA graphs" in row["contenders"]["jactri auto"]["graph"]["failed"]
        assert "left_out" in row["contenders"]["vmap(jacfwd)"] or row["workload"] != "W2"
    assert found["card"]["copy_bytes_per_s"] > 0
    assert {"device", "torch", "triton", "commit", "date"} <= set(found["machine"])
    assert "ratio" in capsys.readouterr().out
    text = report.table(found)
    assert text.count("\n| dynamics MLP") == 2 and "| ieee |" in text
    report.plot([found], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_profile(run, tmp_path):
    code, found = run("profile", "W2", "--traces", str(tmp_path / "traces"))
    assert code == 0 and found["results"][0]["kernels"][0]["us"] > 0
    assert (tmp_path / "traces" / "W2.trace.json").exists()


def test_check_accuracy(run):
    code, found = run("check", "W2", "W7", "--parts", "accuracy")
    assert code == 0
    assert {(r["workload"], r["setting"]) for r in found["results"]} == {
        (w, s) for w in ("W2", "W7") for s in ("ieee", "tf32", "bf16")
    }
    assert all(
        r["auto"] <= 2 * r["torch.func"] + check.SLACK[r["setting"]] for r in found["results"]
    )


def test_a_wrong_result_is_a_failure_and_is_not_timed(run, monkeypatch):
    right = bench.TORCH[4]

    def wrong(w, net):
        jacobian = right.make(w, net)
        return lambda x: jacobian(x) * 1.001

    monkeypatch.setattr(bench, "TORCH", (Peer("planted", "torch", wrong),))
    code, found = run("bench", "W2")
    assert code == 1
    assert [f["what"] for f in found["failures"]] == ["W2 ieee planted"]
    fact = found["results"][0]["contenders"]["planted"]
    assert "off by" in fact["failed"] and "ms" not in fact
    assert "best" not in found["results"][0]


def test_a_wrong_jacobian_fails_the_check(run, monkeypatch):
    plain = check.jactri.jacobian
    monkeypatch.setattr(check.jactri, "jacobian", lambda *a, **k: plain(*a, **k) * 1.1)
    code, found = run("check", "W2", "--parts", "accuracy")
    assert code == 1 and "off by 1.0e-01" in found["failures"][0]["error"]


def test_an_exception_in_a_peer_is_recorded_and_the_run_goes_on(run, monkeypatch):
    def broken(w, net):
        raise MemoryError("too large")

    monkeypatch.setattr(bench, "TORCH", (Peer("broken", "torch", broken), bench.TORCH[4]))
    code, found = run("bench", "W2")
    assert code == 1 and found["failures"][0]["type"] == "MemoryError"
    assert found["results"][0]["best"]["peer"] == "vmap(jacrev)"


def test_what_time_does_not_suffice_for_is_noted(run):
    code, found = run("bench", "W1", "W2", "--budget", "1")
    assert code == 0 and not found["results"]
    assert found["not_run"] == [
        f"{w} {s}" for w in ("W1-tanh", "W2", "W1-silu") for s in ("ieee", "tf32")
    ]


def test_tests_are_run_in_processes_and_their_failures_listed(tmp_path, monkeypatch):
    (tmp_path / "test_planted.py").write_text(
        "def test_good(): pass\ndef test_bad(): assert 1 == 2\n"
    )
    record = records.Record(tmp_path / "r.json", "check", {}, 60)
    check._finish(record, *check._pytest("planted", [str(tmp_path / "test_planted.py")], {}))
    (found,) = record.data["results"]
    assert (found["tests"], found["failed"], found["code"]) == (2, 1, 1)
    assert "test_bad" in record.data["failures"][0]["what"]
    assert record.close() == 1


def test_a_pytest_that_does_not_start_is_a_failure(tmp_path):
    record = records.Record(tmp_path / "r.json", "check", {}, 60)
    check._finish(record, *check._pytest("nothing", [str(tmp_path / "no_such_file.py")], {}))
    assert record.data["failures"]


def test_files_that_need_what_is_missing_are_left_out(monkeypatch):
    files, left_out = check.suite_files()
    assert {f.name for f in files} >= {"test_ops.py", "test_parity.py"}
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    files, left_out = check.suite_files()
    assert left_out["test_layout.py"] == "needs hypothesis"
    assert "test_ops.py" in {f.name for f in files}


def test_sizes_are_those_of_the_goals():
    all_of_them = sized([])
    assert [s.name.split("-n")[0] for s in all_of_them] == [n.split("-n")[0] for n in GOALS]
    w1 = all_of_them[0].workload
    assert w1.samples == 16384 and w1.shape == (16384, 32, 32)
    # W1 moves 69 MB of J, and multiplies 77 GFLOP beside its forward pass
    assert w1.answer_bytes == 67_108_864
    rates = {
        "tf32_flops_per_s": 400e12, "ieee_flops_per_s": 50e12, "bf16_flops_per_s": 800e12, "copy_bytes_per_s": 3e12
    }  # fmt: skip
    assert bound_ms(w1, rates, "ieee") == pytest.approx(0.615, rel=0.03)
    assert bound_ms(w1, rates, "tf32") == pytest.approx(0.20, rel=0.03)


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
    code = "import benchmarks.gpu.__main__, benchmarks.report, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, cwd=check.ROOT).returncode == 0


def test_the_report_takes_all_files_by_default(capsys, tmp_path):
    assert report.main(["--plot", str(tmp_path / "all.png")]) == 0
    assert "| workload | answer | jactri | `compile` | `static=True` |" in capsys.readouterr().out
    assert (tmp_path / "all.png").exists()


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
    assert counters.line(copy).startswith("      1.0 us    1 x  bound by occupancy    (memory 5%")


def test_a_failing_profiler_is_a_failure(tmp_path):
    ncu = fake(tmp_path, "ncu", "sys.exit('ERR_NVGPUCTRPERM')")
    with pytest.raises(ValueError, match="ended with 1: ERR_NVGPUCTRPERM"):
        counters._profiled(ncu, "W2", "ieee", 1, 60)
    ncu = fake(tmp_path, "ncu", "print('no kernels were profiled')")
    with pytest.raises(ValueError, match="no table in what ncu printed"):
        counters._profiled(ncu, "W2", "ieee", 1, 60)


def test_limits_without_the_tool_fails(run, monkeypatch):
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    code, found = run("limits", "W2")
    assert code == 1 and "ncu" in found["failures"][0]["error"]


def test_the_sanitizer_runs_the_kernel_tests(tmp_path, monkeypatch):
    log = tmp_path / "calls"
    code = (
        f"open({str(log)!r}, 'a').write(' '.join(sys.argv) + '\\n')\n"
        f"sys.exit('racecheck' in sys.argv and {check.FOUND})"
    )
    tool = fake(tmp_path, "compute-sanitizer", code)
    monkeypatch.setattr(check.shutil, "which", lambda name: tool)
    record = records.Record(tmp_path / "r.json", "check", {}, 60)
    check._sanitize(record)
    memory, race = record.data["results"]
    assert (memory["code"], race["code"]) == (0, check.FOUND)
    assert [f["what"] for f in record.data["failures"]] == ["kernel tests, racecheck"]
    first = log.read_text().splitlines()[0]
    assert "--tool memcheck" in first and "-m pytest" in first and "tests/kernels" in first


def test_without_a_sanitizer_that_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(check.shutil, "which", lambda name: None)
    record = records.Record(tmp_path / "r.json", "check", {}, 60)
    check._sanitize(record)
    assert record.data["not_run"] == ["sanitizer: compute-sanitizer is not on the PATH"]
