"""`captured` on a CPU: a stand-in for CUDA graphs records the ops of a capture, and a replay runs them again.

As on a device, a replay reads and writes the memory that the capture did, and reads no value in Python.
"""

import contextlib
import gc
import types
import weakref

import pytest
import torch
from common import F64, in_threads, seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import jactri
from jactri._src.compile import captured, compiled

aten = torch.ops.aten


class Recorder(TorchDispatchMode):
    """Of what runs inside of it: the ops, and what they were given and gave."""

    def __init__(self, ops):
        super().__init__()
        self.ops = ops

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._linalg_check_errors.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        made = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, made))
        return made


class Graph:
    """What stands for a CUDA graph."""

    def __init__(self):
        self.ops, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for func, args, kwargs, made in self.ops:
            given = {
                t.untyped_storage().data_ptr()
                for t in tree_leaves((args, kwargs))
                if isinstance(t, torch.Tensor)
            }
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                if (
                    old.untyped_storage().data_ptr() not in given
                ):  # neither a view nor written in place
                    old.copy_(new)


class Stream:
    def __init__(self, *args):
        self.waited = []

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        self.waited.append(event)

    def record_event(self):
        return object()


@pytest.fixture
def device(monkeypatch):
    """torch.cuda of the stand-in; ``graphs`` holds those that were made."""
    found = types.SimpleNamespace(graphs=[], capturing=False, made=[])

    class Counted(Graph):
        def __init__(self):
            super().__init__()
            found.graphs.append(weakref.ref(self))

    @contextlib.contextmanager
    def graph(made, **options):
        assert options == {"capture_error_mode": "thread_local"}
        found.capturing = True
        try:
            with Recorder(made.ops):
                yield
        finally:
            found.capturing = False

    def nothing(*args):
        return contextlib.nullcontext()

    def seen(*args):
        run = captured.captured(*args)
        if isinstance(run, captured.Captured):
            found.made.append(run)
        return run

    stream = Stream()
    for name, value in {
        "CUDAGraph": Counted, "graph": graph, "device": nothing, "stream": nothing, "Stream": Stream,
        "current_stream": lambda *args: stream, "is_current_stream_capturing": lambda: found.capturing,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(captured, "_devices", lambda graph, like: {torch.device("cuda", 0)})
    monkeypatch.setattr(compiled, "captured", seen)
    return found


def compile(func, *xs, **options):
    return jactri.compile(func, *xs, engine="fx", **options)


def agree(made, func, x, **options):
    torch.testing.assert_close(made(x), jactri.jacobian(func, x, **options))


def test_replays_answer(device):
    net = seeded(6, 9, 4)
    made = compile(net, torch.randn(5, 6, dtype=F64), per_sample=True)
    assert "one CUDA graph" in repr(made) and made.explain().cuda_graph
    first = made(torch.randn(5, 6, dtype=F64))
    kept = first.clone()
    for x in torch.randn(3, 5, 6, dtype=F64):
        agree(made, net, x, per_sample=True)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)  # the graph's memory is its own
    (graph,) = device.graphs
    assert graph().replays == 5 and made.traces == 1


def test_weights_that_change(device):
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    made = compile(net, x)
    with torch.no_grad():
        net[0].weight.mul_(2)
    agree(made, net, x)
    assert len(device.graphs) == 1  # read where they lie
    net[0].weight.data = torch.randn(9, 6, dtype=F64)
    agree(made, net, x)
    net[2].bias = nn.Parameter(torch.randn(4, dtype=F64))
    agree(made, net, x)
    agree(made, net, x + 1)
    gc.collect()
    assert len(device.graphs) == 3 and [g() is None for g in device.graphs] == [True, True, False]
    assert made.traces == 1


def test_constants_of_a_frozen_call(device):
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    made, want = compile(net, x, freeze=True), jactri.jacobian(net, x)
    with torch.no_grad():
        net[0].weight.mul_(2)
    made(x).zero_()
    torch.testing.assert_close(made(x), want)
    assert len(device.graphs) == 1


def test_signatures_have_graphs_of_their_own(device):
    net = seeded(3, 3)
    made = compile(net, torch.randn(1, 3, dtype=F64))
    for n in (2, 3, 2, 1, 3):
        agree(made, net, torch.randn(n, 3, dtype=F64))
    wide = torch.randn(2, 6, dtype=F64)[:, ::2]
    agree(made, net, wide)
    assert len(device.graphs) == 4


def test_dropped_signatures_keep_no_memory(device):
    net = seeded(3, 3)
    made = compile(net, torch.randn(1, 3, dtype=F64))
    for n in range(2, 12):
        made(torch.randn(n, 3, dtype=F64))
    memory = [weakref.ref(t) for c in device.made for t in (*c._static, *c._results)]
    device.made.clear()
    gc.collect()
    assert [g() is None for g in device.graphs] == [True] * 3 + [False] * 8
    assert sum(t() is not None for t in memory) == 8 * 2
    del made
    gc.collect()
    assert all(g() is None for g in device.graphs) and all(t() is None for t in memory)


def test_a_capture_that_is_refused(device, caplog):
    """torch.linalg.solve reads whether its matrix is singular."""
    net = nn.Linear(4, 4, dtype=F64)

    def func(x):
        return torch.linalg.solve(net.weight, x)

    made = compile(func, torch.randn(4, 2, dtype=F64))
    assert "not captured as a CUDA graph: operation not permitted" in caplog.text
    assert made.graph is not None and "CUDA graph" not in repr(made)
    for x in torch.randn(2, 4, 2, dtype=F64):
        agree(made, func, x)
    assert all(g() is None for g in device.graphs)


def test_a_second_capture_that_is_refused(device, caplog, monkeypatch):
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    made = compile(net, x, per_sample=True)
    memory = [weakref.ref(t) for c in device.made for t in (*c._static, *c._results)]

    @contextlib.contextmanager
    def refused(*args, **options):
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refused)
    net[0].weight = nn.Parameter(torch.randn(9, 6, dtype=F64))
    for _ in range(2):
        agree(made, net, x, per_sample=True)
    assert caplog.text.count("not captured again as a CUDA graph: out of memory") == 1
    gc.collect()
    assert all(g() is None for g in device.graphs) and all(t() is None for t in memory)
    assert "CUDA graph" not in repr(made) and not made.explain().cuda_graph


def test_inside_of_a_capture_of_the_caller(device):
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    made = compile(lambda x: (net(x), net[0].weight), x, return_output=True)
    device.capturing = True
    (value, weight), _ = made(x)
    device.capturing = False
    assert device.graphs[0]().replays == 1  # that of the check
    assert not weight.requires_grad
    torch.testing.assert_close(value, net(x).detach())


def test_into_memory_of_the_caller(device):
    net = seeded(6, 9, 4)
    made = compile(net, torch.randn(5, 6, dtype=F64), per_sample=True)
    out = torch.empty(6, 4, 5, dtype=F64).permute(2, 1, 0)
    for _ in range(3):
        x = torch.randn(5, 6, dtype=F64)
        assert made(x, out=out) is out
        torch.testing.assert_close(out, jactri.jacobian(net, x, per_sample=True))
    assert len(device.graphs) == 2


def test_threads(device):
    net = seeded(6, 9, 4)
    made = compile(net, torch.randn(5, 6, dtype=F64), per_sample=True)
    wrong = []

    def work(seed):
        gen = torch.Generator().manual_seed(seed)
        for _ in range(10):
            x = torch.randn(5, 6, dtype=F64, generator=gen)
            if not torch.allclose(made(x), jactri.jacobian(net, x, per_sample=True)):
                wrong.append(seed)

    in_threads(2, work)
    assert not wrong and len(device.graphs) == 1
    assert torch.cuda.current_stream().waited  # the buffers are those of one call at a time


SHARED = {
    "expanded": lambda: torch.randn(5, 1, dtype=F64).expand(5, 6),
    "windows": lambda: torch.randn(10, dtype=F64).unfold(0, 6, 1),
    "one entry": lambda: torch.randn((), dtype=F64).expand(5, 6),
    "rows": lambda: torch.randn(1, 6, dtype=F64).expand(5, 6),
    "columns": lambda: torch.randn(6, 5, dtype=F64).t(),
    "every second": lambda: torch.randn(5, 12, dtype=F64)[:, ::2],
    "empty": lambda: torch.randn(0, 6, dtype=F64),
}


@pytest.mark.parametrize("name", SHARED)
def test_entries_that_share_memory(device, name):
    """Of an input, and of an answer, which is the input."""
    made = compile(lambda x: (x, x.sin()), SHARED[name](), of=None)
    for _ in range(2):
        x = SHARED[name]()
        same, sine = made(x)
        torch.testing.assert_close(same, x)
        torch.testing.assert_close(sine, x.sin())
        assert same.stride() == x.stride()
    assert len(device.graphs) == 1
