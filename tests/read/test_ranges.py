"""Named ranges for profilers: every step has one, under its layer, and nothing else changes."""

import collections
import re
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from common import F64, MODES, Cube, hooks, steps
from torch import nn
from torch.nn import functional as F

import jactri
from jactri._src.plan.fusion import Fused
from jactri._src.read import ranges
from jactri._src.tools.profiling import named_layers


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
    from jactri._src.base import backends
    from jactri._src.run import executor, launch

    monkeypatch.setattr(backends, "kernels_on", lambda device: True)
    kinds = []

    def refused(graph, sweep, item, data, sel, out):
        assert item.__class__ is Fused
        kinds.append(len(item.steps))

    monkeypatch.setattr(launch, "run", refused)
    names, J = traced(lambda: jactri.jacobian(net, x, per_sample=True, strategy="reverse-mode"))
    assert torch.equal(J, plain)
    assert kinds == [4]
    (fused,) = [n for n in names if n.startswith("jactri #1-4 ")]
    assert "3 ReLU 2 Linear 1 Tanh 0 Linear" in fused
    assert [n for n in range(5) if f"jactri #{n} " in str(names)] == [0, 1, 2, 3, 4]

    def taken(graph, sweep, item, data, sel, out):
        value = graph.values[item.value]
        return torch.zeros(item.layout.columns_of(sel), *value.shape)

    monkeypatch.setattr(launch, "run", taken)
    names, _ = traced(lambda: jactri.jacobian(net, x, per_sample=True, strategy="reverse-mode"))
    assert [n.split()[1] for n in names if n.startswith("jactri #")] == ["#0", "#1-4"]
    assert executor.launch is launch
    monkeypatch.setattr("jactri._src.tools.report.launch.described", lambda *_: ("triton", "test"))
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
    monkeypatch.setattr("jactri._src.run.executor.Marks", never)
    monkeypatch.setattr(ranges, "Layers", never)
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
        if event == "call" and frame.f_globals.get("__name__") == "jactri._src.read.ranges":
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
    assert not ranges.watching()


def test_models_are_not_kept_alive():
    with torch.profiler.profile():
        jactri.jacobian(nn.Sequential(nn.Tanh()), torch.ones(3))
    assert not ranges.noted()._names and not ranges.noted()._open


# NVTX


@pytest.fixture
def nvtx(monkeypatch):
    """What was pushed and popped, with JACTRI_NVTX=1 on a machine with CUDA."""
    said = []
    fake = SimpleNamespace(range_push=said.append, range_pop=lambda: said.append("pop"))
    monkeypatch.setattr(ranges, "NVTX", True)
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


# dispatch modes


def test_a_dispatch_mode_sees_the_same_ops():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    def ops():
        seen.clear()
        with Noted():
            jactri.jacobian(net, x)
        return list(seen)

    seen, net, x = [], Block(), torch.randn(3, 4)
    ops()  # what is made of weights alone is made once
    assert ops() == ops()
    plain = ops()
    with torch.profiler.profile():
        assert ops() == plain


def test_compiled_under_a_profiler():
    net, x = Block(), torch.randn(3, 4)
    want = jactri.jacobian(net, x)
    with torch.profiler.profile():
        made = jactri.compile(net, x, engine="fx")
        torch.testing.assert_close(made(x), want)
    assert made.graph is not None and made.traces == 1
    names, J = traced(lambda: made(x))
    torch.testing.assert_close(J, want)
    assert names == []  # one graph has no steps
