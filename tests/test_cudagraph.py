"""CUDA graphs of `jactri.compile`: their logic, with a stand-in that runs again what it captured."""

import contextlib
import copy
import functools
import gc
import weakref

import pytest
import torch
from common import F64, seeded
from test_compiled_operators import CALLS, OF_MODULES, field, plain
from tolerances import assert_close, assert_same_tree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import jactri
from jactri import backends, cudagraph
from jactri.operators.jobs import JOBS
from jactri.tape import Stale, Unrecordable, tensors


class Capture(TorchDispatchMode):
    """Refuses what a capture does: to read values."""

    FORBIDDEN = (
        torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default, torch.ops.aten.is_nonzero.default,
    )  # fmt: skip

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        masked = op is torch.ops.aten.index.Tensor and any(
            i is not None and i.dtype is torch.bool for i in args[1]
        )
        if op in self.FORBIDDEN or masked:
            raise RuntimeError(f"operation not permitted when stream is capturing: {op}")
        return op(*args, **(kwargs or {}))


@pytest.fixture
def graphed(monkeypatch):
    """Makes a `cudagraph.Graphed` on the CPU."""

    @contextlib.contextmanager
    def capture(graph):
        with pytest.MonkeyPatch.context() as now, Capture():
            now.setattr(backends, "capturing", lambda device: True)
            yield

    class Stream:
        def wait_stream(self, other): ...
        def wait_event(self, event): ...
        def record_event(self):
            return object()

    none = contextlib.nullcontext
    for name, fake in {
        "Stream": Stream, "current_stream": lambda *a: Stream(), "stream": lambda s: none(),
        "device": lambda d: none(), "graph": capture,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)

    def make(func, *xs, of=jactri.jacobian, out=None, **options):
        job = JOBS[of](func, len(xs), backend="torch", **options)

        class Graph:
            def replay(self):
                self.replays = getattr(self, "replays", 0) + 1
                ends = job.forward(tuple(made.inputs))
                rows = job.rows(ends, None)
                shown = tensors(ends.result) if job.shows_output else []
                into = made.rows or tensors(self.into)
                with torch.no_grad():
                    for a, b in zip((*made.shown, *into), (*shown, *rows), strict=True):
                        a.copy_(b)

        plain = cudagraph.Graphed._capture

        def capturing(self, out):
            plain(self, out)
            self.graph.into = out

        monkeypatch.setattr(cudagraph.Graphed, "_capture", capturing)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        made = cudagraph.Graphed(job, xs, out)
        return made

    return make


def test_a_captured_call_copies_in_and_out(graphed):
    net = seeded(6, 9, 4)
    x = torch.randn(5, 6, dtype=F64)
    made = graphed(net, x, per_sample=True)
    one = made((x + 1,), [])[1][0]
    two = made((x + 2,), [])[1][0]
    for shift, got in ((1, one), (2, two)):
        want = torch.func.vmap(torch.func.jacrev(net))(x + shift)
        assert_close(got, want, F64, length=64)


def replaced(net):
    net[0].weight = nn.Parameter(net[0].weight.detach().clone())


def moved(net):
    net[0].weight.data = net[0].weight.detach().clone()


def other_mode(net):
    net.eval()


def other_layer(net):
    net[1] = nn.Sigmoid()


FORMS = {
    "module": lambda net: net,
    "method": lambda net: net.forward,
    "closure": lambda net: lambda x: net(x),
    "partial": lambda net: functools.partial(lambda n, x: n(x), net),
    "closure of a list": lambda net: (lambda held: lambda x: held[0](x))([net]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [replaced, moved, other_mode], ids=lambda c: c.__name__)
def test_what_a_captured_function_holds_is_watched(graphed, form, change):
    net = seeded(6, 9, 4).train()
    func = FORMS[form](net)
    x = torch.randn(5, 6, dtype=F64)
    made = graphed(func, x)
    with torch.no_grad():
        net[0].weight.add_(1.0)  # in place: the graph sees it
    made((x,), [])
    change(net)
    with pytest.raises(Stale):
        made((x,), [])


weight_of_the_module = torch.randn(6, 6, dtype=F64)


def test_tensors_of_closures_globals_and_objects_are_watched(graphed):
    x = torch.randn(5, 6, dtype=F64)

    class Model:
        def __init__(self):
            self.w = torch.randn(6, 6, dtype=F64)

        def __call__(self, x):
            return x @ self.w

    model = Model()
    made = graphed(model, x)
    model.w = model.w.clone()
    with pytest.raises(Stale, match="'w'"):
        made((x,), [])

    def with_global(x):
        return x @ weight_of_the_module

    made = graphed(with_global, x)
    globals()["weight_of_the_module"] = weight_of_the_module.clone()
    with pytest.raises(Stale, match="weight_of_the_module"):
        made((x,), [])

    w = torch.randn(6, 6, dtype=F64)

    def with_cell(x):
        return x @ w

    made = graphed(with_cell, x)
    w = copy.deepcopy(w)
    with pytest.raises(Stale):
        made((x,), [])


@pytest.mark.parametrize("name", [*CALLS, *OF_MODULES])
def test_captured_operators(graphed, name):
    of, options = {**CALLS, **OF_MODULES}[name]
    net, x = field(), torch.randn(3, 4, dtype=F64)
    if name == "weighted laplacian":  # its rank is read
        with pytest.raises(Unrecordable, match="could not capture"):
            graphed(net, x, of=of, **options)
        return
    made = graphed(net, x, of=of, **options)
    job = made.job
    for shift in (1, 2):
        answer = job.answer(*made((x + shift,), []), None)
        assert_same_tree(answer, plain(of, net, x + shift, **options), F64, length=64)


NETWORKS = {
    "images": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 1, 3, padding=1)),
        (2, 1, 9, 9),
    ),
    "classifier": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.Flatten(),
            nn.Linear(16, 3),
        ),
        (2, 1, 8, 8),
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8)),
    "recurrent": (lambda: Last(nn.GRU(3, 4, batch_first=True)), (2, 3, 3)),
}  # fmt: skip


class Last(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[0][:, -1]


@pytest.mark.parametrize(
    "of", [jactri.jacobian, jactri.parameter_jacobian], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", NETWORKS)
def test_captured_networks(graphed, name, of):
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    net, x = build().double().eval(), torch.randn(shape, dtype=F64)
    options = {"per_sample": True} if of is jactri.jacobian else {}
    made = graphed(net, x, of=of, **options)
    answer = made.job.answer(*made((x + 1,), []), None)
    assert_same_tree(answer, plain(of, net, x + 1, **options), F64, length=64)


def test_captured_into_memory(graphed):
    net, x = field(), torch.randn(3, 4, dtype=F64)
    out = torch.empty(3, 4, 4, dtype=F64)
    made = graphed(net, x, per_sample=True, out=out)
    with Written() as copies:
        _, rows = made((x + 1,), [out])
    assert rows[0] is out
    assert copies.of(out) == 1  # by the replay
    assert_same_tree(out, jactri.jacobian(net, x + 1, per_sample=True), F64, length=64)
    with pytest.raises(RuntimeError, match="must have shape"):
        graphed(net, x, per_sample=True, out=torch.empty(3, 4, dtype=F64))


class Written(TorchDispatchMode):
    """Notes where results are copied to, and clones of them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        if op in (torch.ops.aten.copy_.default, torch.ops.aten.clone.default):
            self.found.append(made.data_ptr())
        return made

    def of(self, t):
        return self.found.count(t.data_ptr())


def test_captured_into_other_memory(graphed):
    """From the first call with other tensors on the graph writes to its own memory, and those of before are left."""
    net, x = field(), torch.randn(3, 4, dtype=F64)
    outs = [torch.empty(3, 4, 4, dtype=F64) for _ in range(3)]
    made = graphed(net, x, per_sample=True, out=outs[0])
    first = made.graph
    wants = [jactri.jacobian(net, x + i, per_sample=True) for i in range(4)]
    made((x,), [outs[0]])
    for i in (1, 2):
        _, rows = made((x + i,), [outs[i]])
        assert rows[0] is outs[i] and made.graph is not first
    second = made.graph
    for i in range(3):
        assert_same_tree(outs[i], wants[i], F64, length=64)
    made((x + 3,), [outs[0]])
    assert made.graph is second
    assert_same_tree(outs[0], wants[3], F64, length=64)


def test_memory_that_is_moved_or_gone(graphed):
    net, x = field(), torch.randn(3, 4, dtype=F64)
    out = torch.empty(3, 4, 4, dtype=F64)
    alive = weakref.ref(out.untyped_storage())
    made = graphed(net, x, per_sample=True, out=out)
    before, other = out.data, torch.zeros(3, 4, 4, dtype=F64)
    out.data = other  # the same tensor elsewhere
    before.fill_(7.0)
    made((x + 1,), [out])
    assert (before == 7.0).all()
    assert_same_tree(other, jactri.jacobian(net, x + 1, per_sample=True), F64, length=64)
    del before
    gc.collect()
    assert alive() is None, "nothing holds what was given"


def test_memory_that_cannot_be_captured_again(graphed, monkeypatch):
    net, x = field(), torch.randn(3, 4, dtype=F64)
    out = torch.empty(3, 4, 4, dtype=F64)
    made = graphed(net, x, per_sample=True, out=out)

    def full(self, out):
        raise Unrecordable("no memory")

    monkeypatch.setattr(cudagraph.Graphed, "_capture", full)
    with pytest.raises(Stale, match="other tensors for out=: no memory"):
        made((x,), [torch.empty_like(out)])
    _, rows = made((x + 1,), [out])
    assert_same_tree(rows[0], jactri.jacobian(net, x + 1, per_sample=True), F64, length=64)


def test_captured_outputs_that_are_shown(graphed):
    net, x = field(), torch.randn(3, 4, dtype=F64)
    made = graphed(net, x, per_sample=True, return_output=True)
    results = [made.job.answer(*made((x + i,), []), None) for i in (1, 2)]
    for i, (y, got) in zip((1, 2), results, strict=True):  # each call's own
        assert not y.requires_grad
        assert_close(y, net(x + i), F64, length=64)
        assert_same_tree(got, jactri.jacobian(net, x + i, per_sample=True), F64, length=64)
    both = graphed(lambda t: (net(t), t.sin()), x, return_output=True)
    ys, rows = both.job.answer(*both((x + 1,), []), None)
    assert_close(ys[1], (x + 1).sin(), F64)
    assert len(ys) == len(rows) == 2


def test_captured_weights_are_watched(graphed):
    net, x = field(), torch.randn(3, 4, dtype=F64)
    made = graphed(functools.partial(net), x, of=jactri.laplacian)
    net[0].weight = nn.Parameter(net[0].weight.detach().clone())
    with pytest.raises(Stale):
        made((x,), [])
