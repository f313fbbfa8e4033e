"""Named ranges for profilers, and `jactri.profile`: every step is there, under its layer, and nothing else changes."""

import collections
import errno
import gzip
import json
import re
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from common import F64, MODES, Cube
from torch import nn
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.nn.modules import module as modules

import jactri
from jactri import layers, profiling, ranges
from jactri.fusion import Fused
from jactri.profiling import named_layers

STEP = re.compile(r"jactri #(\d+)(?:-(\d+))? (forward|reverse|product)( .*) \[.*FLOP .*B.*\]")


class Block(nn.Module):
    """Nested, with a module that is called twice, and a functional op."""

    def __init__(self, width=5):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, width), nn.Tanh())
        self.twice = nn.Linear(width, width)

    def forward(self, x):
        h = self.first(x)
        return F.silu(self.twice(self.twice(h))) + h


def traced(function):
    """The names of jactri's ranges while a function runs, in order, and its result."""
    with torch.profiler.profile() as profiler:
        result = function()
    events = sorted(profiler.events(), key=lambda e: e.time_range.start)
    return [e.name for e in events if e.name.startswith("jactri ")], result


def steps(names):
    """By step number, what its ranges say: the direction, layer and op."""
    found = collections.defaultdict(list)
    for name in names:
        match = STEP.fullmatch(name)
        if match:
            first, last, direction, what = match.groups()
            for number in range(int(first), int(last or first) + 1):
                found[number].append(direction + what)
    return dict(found)


def hooks():
    return len(modules._global_forward_hooks) + len(modules._global_forward_pre_hooks)


def everything(function, x, **options):
    """The ranges of a call, after checks that every step of `explain` has one and that values stay as they are."""
    plain = jactri.jacobian(function, x, **options)
    names, J = traced(lambda: jactri.jacobian(function, x, **options))
    assert torch.equal(J, plain)
    assert hooks() == 0
    assert names[0] == "jactri function"
    plan = jactri.explain(function, x, **options)
    found = steps(names)
    assert sorted(found) == list(range(len(plan.steps)))
    for number, step in enumerate(plan.steps):
        for said in found[number]:
            assert step.op == "product" or step.op in said
            assert step.direction.removesuffix("-mode") in said or step.op == "product"
    return names


# names


def test_paths_in_a_sequential():
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Sequential(nn.Linear(9, 6), nn.ReLU()))
    names = everything(net, torch.randn(5, 4), per_sample=True, strategy="reverse-mode")
    said = [words for _, (words,) in sorted(steps(names).items())]
    assert said == [
        "reverse 2.1 ReLU ReluBackward0",
        "reverse 2.0 Linear AddmmBackward0",
        "reverse 1 Tanh TanhBackward0",
        "reverse 0 Linear AddmmBackward0",
    ]


def test_the_predicted_cost():
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 6))
    names = everything(net, torch.randn(5, 4), per_sample=True, strategy="reverse-mode")
    last = jactri.explain(net, torch.randn(5, 4), per_sample=True, strategy="reverse-mode").steps[2]
    assert (last.flops, last.bytes) == (2 * 5 * 6 * 9 * 4, 5 * 6 * 4 * 4)
    assert names[-1] == "jactri #2 reverse 0 Linear AddmmBackward0 [2.16 kFLOP 480 B]"
    assert names[1].startswith("jactri sweep reverse [")


@pytest.mark.parametrize("mode", MODES)
def test_nested_shared_and_functional(mode):
    names = everything(Block(), torch.randn(3, 4), strategy=mode)
    said = " | ".join(words for many in steps(names).values() for words in many)
    assert "first.0 Linear AddmmBackward0" in said
    assert said.count("twice Linear") == 2  # in reverse, one of them in a sum
    assert "Block SiluBackward0" in said


def test_modules_are_named_by_the_variables_that_hold_them():
    net, made = Block(), []

    def function(x):
        made.append(nn.Sequential(nn.Tanh()))
        return torch.sin(made[-1](net(x)))

    said = " | ".join(
        w for many in steps(everything(function, torch.randn(3, 4))).values() for w in many
    )
    assert "net.first.0 Linear" in said and "net Block SiluBackward0" in said
    assert "Sequential.0 Tanh TanhBackward0" in said  # in no variable: by its class
    assert re.search(r"(forward|reverse) SinBackward0", said)  # of no module


def test_a_method_and_a_function_that_lacks_a_variable():
    assert "first.1 Tanh" in str(everything(Block().forward, torch.randn(3, 4)))

    def function(x):
        return net(x) if x.dim() < 9 else later

    net = Block()
    assert "Block.first.1 Tanh" in str(everything(function, torch.randn(3, 4)))
    later = None


def test_a_module_that_fails_inside_is_left():
    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError

    broken, net = Broken(), nn.Tanh()

    def function(x):
        try:
            return broken(x)
        except KeyError:
            return net(x.sin())

    said = [w for many in steps(everything(function, torch.randn(3))).values() for w in many]
    assert any(re.fullmatch("(forward|reverse) SinBackward0", w) for w in said)
    assert any("net Tanh TanhBackward0" in w for w in said)


def test_an_op_without_a_rule_and_a_function_of_the_user():
    names = everything(lambda x: Cube.apply(x).cumsum(0).cumprod(0), torch.rand(4, dtype=F64))
    assert "CubeBackward" in str(names) and "CumprodBackward0" in str(names)


def test_other_threads_are_not_noted():
    net, other = nn.Tanh(), nn.Sigmoid()

    def function(x):
        def elsewhere():
            other(torch.zeros(2, requires_grad=True))

        with_thread = threading.Thread(target=elsewhere)
        with_thread.start()
        with_thread.join()
        return net(x).sin()

    said = str(everything(function, torch.randn(3)))
    assert "net Tanh" in said and "Sigmoid" not in said


# plans


@pytest.mark.parametrize("mode", ["forward-mode", "reverse-mode"])
def test_chunks(mode):
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    names = everything(net, torch.randn(3, 6), per_sample=True, strategy=mode, chunk_size=2)
    by_step = steps(names)
    assert {len(many) for many in by_step.values()} == {3}
    assert all("in 3 chunks]" in n for n in names if n.startswith("jactri #"))


def test_mixed():
    net = nn.Sequential(
        nn.Linear(40, 20),
        nn.Tanh(),
        nn.Linear(20, 2),
        nn.Linear(2, 20),
        nn.Tanh(),
        nn.Linear(20, 40),
    )
    names = everything(net, torch.randn(3, 40), per_sample=True, strategy="mixed")
    assert sum(n.startswith("jactri part ") for n in names) == 2
    assert sum(n.startswith("jactri sweep product ") for n in names) == 1
    assert re.fullmatch(r"jactri #\d+ product at 3x2 \[19.2 kFLOP 19.2 kB\]", names[-1])
    assert "0 Linear" in str(names) and "5 Linear" in str(names)


def test_several_inputs_and_outputs():
    a, b = nn.Linear(3, 4), nn.Linear(3, 5)
    names, _ = traced(
        lambda: jactri.jacobian(
            lambda x, z: (a(x + z), b(x * z)), (torch.ones(2, 3), torch.ones(2, 3))
        )
    )
    plan = jactri.explain(lambda x, z: (a(x + z), b(x * z)), (torch.ones(2, 3), torch.ones(2, 3)))
    assert sorted(steps(names)) == list(range(len(plan.steps)))
    assert sum(n.startswith("jactri sweep ") for n in names) == 2


def test_what_runs_as_one_has_one_range(monkeypatch):
    """Fused items, without a kernel: one that takes them all, and none that takes any."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(7, 4)
    plain = jactri.jacobian(net, x, per_sample=True, strategy="reverse-mode")
    from jactri import backends, executor, launch

    monkeypatch.setattr(backends, "kernels_on", lambda device: True)
    kinds = []

    def refused(graph, item, data, reverse, columns, out):
        assert item.__class__ is Fused
        kinds.append(len(item.steps))

    monkeypatch.setattr(launch, "run", refused)
    names, J = traced(lambda: jactri.jacobian(net, x, per_sample=True, strategy="reverse-mode"))
    assert torch.equal(J, plain)
    assert kinds == [4]
    (fused,) = [n for n in names if n.startswith("jactri #1-4 ")]
    assert "3 ReLU 2 Linear 1 Tanh 0 Linear" in fused
    assert [n for n in range(5) if f"jactri #{n} " in str(names)] == [0, 1, 2, 3, 4]

    def taken(graph, item, data, reverse, columns, out):
        value = graph.values[item.value]
        return torch.zeros(columns, *value.shape)

    monkeypatch.setattr(launch, "run", taken)
    names, _ = traced(lambda: jactri.jacobian(net, x, per_sample=True, strategy="reverse-mode"))
    assert [n.split()[1] for n in names if n.startswith("jactri #")] == ["#0", "#1-4"]
    assert executor.launch is launch
    monkeypatch.setattr("jactri.report.launch.described", lambda *_: ("triton", "test"))
    rows = jactri.profile(net, x, per_sample=True, strategy="reverse-mode", repeats=1).steps
    assert [s.measured_ms is None for s in rows] == [False, True, True, True, False]
    assert "in a step below" in str(
        jactri.profile(net, x, per_sample=True, strategy="reverse-mode", repeats=1)
    )


def test_jacobian_of():
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh())
    x = torch.randn(5, 4, requires_grad=True)
    y = net(x)
    plain = jactri.jacobian_of(y, x)
    names, J = traced(lambda: jactri.jacobian_of(y, x, strategy="reverse-mode"))
    assert torch.equal(J, plain)
    assert [w.split() for (w,) in steps(names).values()] == [
        ["reverse", "TanhBackward0"], ["reverse", "AddmmBackward0"],
    ]  # fmt: skip
    with named_layers(net):
        y = net(x)
    assert hooks() == 0
    names, _ = traced(lambda: jactri.jacobian_of(y, x, strategy="reverse-mode"))
    assert "1 Tanh TanhBackward0" in names[1] and "0 Linear AddmmBackward0" in names[2]


def test_create_graph_under_a_profiler():
    net, x = nn.Sequential(nn.Linear(3, 2), nn.Tanh()), torch.randn(4, 3)
    plain = torch.autograd.grad(
        jactri.jacobian(net, x, create_graph=True).square().sum(), net[0].weight
    )
    names, J = traced(lambda: jactri.jacobian(net, x, create_graph=True))
    assert "0 Linear" in str(names)
    assert torch.equal(torch.autograd.grad(J.square().sum(), net[0].weight)[0], plain[0])


# while nobody looks


def test_no_hooks_and_no_ranges(monkeypatch):
    def never(*_):
        raise AssertionError("somebody looked")

    for name in ("call", "Marks", "_range", "_kinds"):
        monkeypatch.setattr(ranges, name, never)
    monkeypatch.setattr("jactri.executor.Marks", never)
    monkeypatch.setattr(layers, "Layers", never)
    seen = []
    net, x = nn.Tanh(), torch.randn(3, requires_grad=True)
    jactri.jacobian(lambda x: seen.append(hooks()) or net(x), x)
    jactri.jacobian_of(net(x), x)
    assert seen == [0]


@pytest.mark.parametrize("depth", [1, 12])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"strategy": "mixed"}])
def test_a_call_asks_twice_however_long_it_is(depth, options):
    """Deterministic proof that the code for profilers costs a call nothing more: who is called, and how often."""
    net = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(depth)])
    x = torch.randn(3, 4)
    jactri.jacobian(net, x, **options)
    called = collections.Counter()

    def note(frame, event, _):
        if event == "call" and frame.f_globals.get("__name__") in (
            "jactri.ranges",
            "jactri.layers",
        ):
            called[frame.f_code.co_name] += 1

    sys.setprofile(note)
    try:
        jactri.jacobian(net, x, **options)
    finally:
        sys.setprofile(None)
    assert called == {"watching": 2}


def test_hooks_go_where_the_function_raises():
    def function(x):
        nn.Tanh()(x)
        raise KeyError("mine")

    with torch.profiler.profile(), pytest.raises(KeyError, match="mine"):
        jactri.jacobian(function, torch.ones(3))
    with pytest.raises(KeyError, match="mine"):
        jactri.profile(function, torch.ones(3))
    assert hooks() == 0
    assert not layers.watching()


def test_models_are_not_kept_alive():
    with torch.profiler.profile():
        jactri.jacobian(nn.Sequential(nn.Tanh()), torch.ones(3))
    assert not layers.noted()._names and not layers.noted()._open


# NVTX


@pytest.fixture
def nvtx(monkeypatch):
    """What was pushed and popped, with JACTRI_NVTX=1 on a machine with CUDA."""
    said = []
    fake = SimpleNamespace(range_push=said.append, range_pop=lambda: said.append("pop"))
    monkeypatch.setattr(layers, "NVTX", True)
    monkeypatch.setattr(torch.cuda, "nvtx", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return said


def test_nvtx_without_torchs_profiler(nvtx):
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    jactri.jacobian(net, torch.randn(3, 4), strategy="reverse-mode")
    assert [n.split(" [")[0] for n in nvtx] == [
        "jactri function", "pop", "jactri sweep reverse",
        "jactri #0 reverse 1 Tanh TanhBackward0", "pop",
        "jactri #1 reverse 0 Linear AddmmBackward0", "pop", "pop",
    ]  # fmt: skip


def test_nvtx_beside_torchs_profiler_and_not_twice(nvtx, monkeypatch):
    names, _ = traced(lambda: jactri.jacobian(torch.sin, torch.ones(3)))
    assert [n for n in nvtx if n != "pop"] == names and len(names) == 3
    nvtx.clear()
    monkeypatch.setattr(ranges, "_profiler_type", lambda: ranges.ActiveProfilerType.NVTX)
    names, _ = traced(lambda: jactri.jacobian(torch.sin, torch.ones(3)))
    assert nvtx == [] and len(names) == 3


def test_nvtx_needs_cuda_and_is_popped_after_an_error(nvtx, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        jactri.jacobian(lambda x: 1 / 0, torch.ones(3))
    assert nvtx == ["jactri function", "pop"]
    nvtx.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    jactri.jacobian(torch.sin, torch.ones(3))
    assert nvtx == []


# profile


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
    found = jactri.profile(lambda x: torch.fft.fft(x).abs(), torch.ones(4), repeats=1)
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
