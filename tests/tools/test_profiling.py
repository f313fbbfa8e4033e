"""`jactri.profile`: the rows of `explain` with times, a trace, and errors before anything is computed."""

import errno
import gzip
import json
from dataclasses import replace

import pytest
import torch
from common import F64, steps, unfollowed
from torch import nn
from torch.autograd import DeviceType

import jactri
from jactri._src.read import ranges
from jactri._src.tools import profiling


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "reverse-mode"},
        {"strategy": "forward-mode", "chunk_size": 2},
        {"strategy": "mixed", "per_sample": True},
    ],
)
def test_rows_are_those_of_explain(options):
    net = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 2), nn.Linear(2, 8), nn.Tanh())
    x = torch.randn(5, 12)
    found = jactri.profile(net, x, repeats=3, **options)
    plan = jactri.explain(net, x, **options)
    for mine, theirs in zip(found.steps, plan.steps, strict=True):
        for name in ("op", "structure", "shape", "columns", "flops", "bytes", "backend"):
            assert getattr(mine.step, name) == getattr(theirs, name)
        assert mine.step.layer or mine.step.op == "product"
        assert mine.predicted_ms > 0 and mine.measured_ms > 0
        assert (mine.roofline is None) == (mine.step.flops == mine.step.bytes == 0)
    assert sum(s.measured_ms for s in found.steps) <= found.accumulation_ms
    parts = found.function_ms + found.planning_ms + found.accumulation_ms
    assert parts == pytest.approx(found.total_ms)
    assert found.repeats == 3 and found.trace is None
    text = str(found)
    assert text.startswith(options["strategy"]) and len(text.splitlines()) == len(plan.steps) + 4
    assert "0 Linear" in text and "roofline" in text and "median of 3 calls" in text


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_the_trace(name, tmp_path):
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))
    found = jactri.profile(net, torch.randn(5, 4), tmp_path / name, repeats=1)
    data = (tmp_path / name).read_bytes()
    trace = json.loads(gzip.decompress(data) if name.endswith(".gz") else data)
    names = [e.get("name", "") for e in trace["traceEvents"]]
    assert sorted(steps(names)) == list(range(len(found.steps)))
    assert "jactri function" in names and any("2 Linear AddmmBackward0" in n for n in names)
    assert str(found).endswith(f"trace: {tmp_path / name}")


@pytest.mark.parametrize(
    "where, error", [("no/such/folder/t.json", FileNotFoundError), (".", IsADirectoryError)]
)
def test_an_unwritable_path(where, error, tmp_path):
    called = []
    with pytest.raises(error, match="trace cannot be written") as caught:
        jactri.profile(called.append, torch.ones(3), tmp_path / where)
    assert caught.value.filename == str(tmp_path / where) and str(tmp_path) in str(caught.value)
    assert not called


def test_no_permission(monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "t.json")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied.*'t.json'"):
        jactri.profile(torch.sin, torch.ones(3), "t.json")


def test_an_error_leaves_no_empty_trace(tmp_path):
    def function(x):
        raise KeyError("mine")

    path = tmp_path / "t.json"
    with pytest.raises(KeyError):
        jactri.profile(function, torch.ones(3), path)
    assert not path.exists()
    path.write_text("theirs")
    with pytest.raises(KeyError):
        jactri.profile(function, torch.ones(3), path)
    assert path.read_text() == "theirs"


@pytest.mark.parametrize(
    "options, error, told",
    [
        ({"repeats": 0}, ValueError, "repeats"),
        ({"repeats": 1.5}, ValueError, "repeats"),
        ({"strategy": "sideways"}, AssertionError, "strategy"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
    ],
)
def test_wrong_arguments(options, error, told):
    with pytest.raises(error, match=told):
        jactri.profile(torch.sin, torch.ones(3), **options)


def test_a_profiler_inside_of_a_profiler():
    with torch.profiler.profile(), pytest.raises(RuntimeError, match="one is on"):
        jactri.profile(torch.sin, torch.ones(3))
    with pytest.raises(TypeError, match="profile"):
        jactri.profile(torch.sin, [1.0])


def test_ranges_of_samples_are_added_up():
    net = nn.Sequential(
        nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.SiLU(), nn.Linear(40, 7)
    ).double()
    x = torch.randn(36, 6, dtype=F64)
    options = {"per_sample": True, "strategy": "reverse-mode"}
    whole = jactri.profile(net, x, repeats=1, **options)
    split = jactri.profile(net, x, repeats=1, memory_limit=36 * 6 * 7 * 8 + 30_000, **options)
    assert "ranges of samples" in split.plan
    count = len(whole.steps)
    assert len(split.steps) % count == 0
    for i, step in enumerate(whole.steps):
        assert sum(s.step.flops for s in split.steps[i::count]) == step.step.flops
        assert {s.step.layer for s in split.steps[i::count]} == {step.step.layer} != {""}


def test_a_function_that_does_something_else_every_time():
    net, calls = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), []

    def function(x):
        calls.append(x)
        return net(x) if len(calls) % 2 else net(x).sin()

    assert jactri.profile(function, torch.ones(3), repeats=2).steps


def test_nothing_to_show():
    found = jactri.profile(lambda x: unfollowed(torch.fft.fft(x)).abs(), torch.ones(4), repeats=1)
    assert found.steps == () and str(found).startswith("no steps: autograd")
    found = jactri.profile(
        lambda x: torch.ones(2, requires_grad=True) * 2, torch.ones(4), repeats=1
    )
    assert found.steps == ()


def test_inference_mode():
    net = nn.Linear(3, 2)
    with torch.inference_mode():
        assert jactri.profile(net, torch.ones(4, 3), repeats=1).steps[0].step.layer == "Linear"


class Event:
    """An event of kineto, as a CUDA device would give it."""

    def __init__(self, name, start, duration, device=DeviceType.CPU, correlation=0):
        self.name, self.start_ns, self.duration_ns = (
            (lambda: name),
            (lambda: start),
            (lambda: duration),
        )
        self.device_type, self.correlation_id = (lambda: device), (lambda: correlation)


def test_device_times_are_those_of_the_kernels_launched_inside():
    session = ranges.Session()
    session.runs.append(None)
    for numbers in [(0,), (1, 2)]:
        with session.clock(numbers):
            pass
    gpu = DeviceType.CUDA
    profiling._on_device(
        session,
        [
            Event("jactri #1-2 reverse", 200, 50), Event("jactri #0 reverse", 100, 50),
            Event("jactri #0 reverse", 1000, 999, gpu),  # as the device saw it
            Event("aten::mm", 105, 20, correlation=7),  # ops count for themselves
            Event("cudaLaunchKernel", 110, 5, correlation=7), Event("gemm", 1000, 400, gpu, 7),
            Event("cuLaunchKernelEx", 120, 5, correlation=8), Event("triton_", 1400, 30, gpu, 8),
            Event("cudaLaunchKernel", 160, 5, correlation=9), Event("between", 1500, 1, gpu, 9),
            Event("cudaMemcpyAsync", 210, 5, correlation=10), Event("Memcpy", 1600, 70, gpu, 10),
            Event("lost", 1700, 5, gpu, 11),
        ],
    )  # fmt: skip
    assert [e.seconds for e in session.entries] == pytest.approx([430e-9, 70e-9])


def test_more_than_the_roofline_is_explained():
    found = jactri.profile(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), torch.ones(4, 3), repeats=1)
    row = replace(found.steps[-1], roofline=0.5)
    assert "above 100%" not in str(replace(found, steps=(row,)))
    assert "above 100%" in str(replace(found, steps=(replace(row, roofline=1.2),)))
