"""Compiled calls with kernels: each launch of an ordinary call is an op of the graph, and the answers are float64's."""

import copy
import functools
import logging
from collections import Counter
from itertools import pairwise

import pytest
import torch
from precision import distance
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import jactri
from jactri._src.compile import engines
from jactri._src.device import chooser
from jactri.kernels import launches
from jactri.kernels.rows import rows
from jactri.kernels.support import Unfit

F64 = torch.float64
needs_compiler = pytest.mark.skipif(not engines.has_compiler(), reason="needs a C++ compiler")
COMPILER = pytest.param("inductor", marks=needs_compiler)


@pytest.fixture(autouse=True)
def _fresh():
    chooser.forget()
    yield
    chooser.forget()


def launched(call):
    """Kernels that a call launches, by name: where ops are watched, launches are ops."""
    names = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.update([args[0]] if func is launches.OP else [])
            return func(*args, **(kwargs or {}))

    with Watch():
        call()
    return names


def in_graph(step):
    return Counter(n.args[0] for n in step.graph.graph.nodes if n.target is launches.OP)


class Times(nn.Module):
    """Two values that depend on the input, multiplied."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 9)

    def forward(self, x):
        return self.c(self.a(x).tanh() * self.b(x).sigmoid())


def wide(*widths):
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.SiLU())]  # fmt: skip
    return nn.Sequential(*layers[:-1])


def flat(layer, features):
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), layer, nn.Flatten(), nn.Linear(features, 3))


def images(layer):
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), layer, nn.Conv2d(4, 2, 3, padding=1))


SAMPLES = {"per_sample": True}
CASES = {
    "chain": (lambda: wide(5, 16, 12, 3), (7, 5), SAMPLES, {"chain._chain"}),
    "pair": (lambda: wide(4, 20, 150, 20), (5, 4), SAMPLES, {"chain._pair"}),
    "steps": (lambda: wide(4, 20, 140, 150), (5, 4), SAMPLES, {"linear._step"}),
    "one sample": (lambda: wide(5, 16, 12, 3), (1, 5), {}, {"chain._chain"}),
    "chunks": (lambda: wide(9, 32, 8), (6, 9), SAMPLES | {"chunk_size": 3}, {"linear._step"}),
    "softmax": (
        lambda: nn.Sequential(nn.Linear(6, 12), nn.Softmax(1), nn.Linear(12, 8)),
        (4, 6),
        SAMPLES,
        {"rows._rows", "linear._step"},
    ),
    "sum": (Times, (5, 6), SAMPLES | {"strategy": "forward-mode"}, {"elementwise._scaled_sum"}),
    "convolution": (lambda: flat(nn.Tanh(), 4 * 9), (1, 2, 3, 3), SAMPLES, {"direct._direct"}),
    "pool": (lambda: flat(nn.MaxPool2d(2), 4), (1, 2, 3, 3), SAMPLES, {"pool._scatter"}),
    "image to image": (lambda: images(nn.Tanh()), (1, 2, 9, 1), SAMPLES, {"first._first", "band._dense"}),
    "patches": (lambda: images(nn.Tanh()), (2, 2, 8, 9), SAMPLES, {"patches._patches"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_launches_are_ops_of_the_graph(name, device):
    make, shape, options, kernels = CASES[name]
    torch.manual_seed(0)
    net = make().to(device)
    options = options | {"backend": "triton"}
    x, y = torch.randn(2, *shape, device=device)
    step = jactri.compile(net, x, engine="fx", **options)
    ordinary = launched(lambda: jactri.jacobian(net, x, **options))
    assert in_graph(step) == ordinary and kernels <= set(ordinary), ordinary
    assert f"{ordinary.total()} of them kernels of jactri" in repr(step)
    assert launched(lambda: step._last.run([y, *step._last.held()])) == ordinary
    for scale in (1.0, 1.3):
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(scale)
        plain = {k: v for k, v in options.items() if k != "backend"}
        want = jactri.jacobian(copy.deepcopy(net).to(F64), y.to(F64), **plain)
        assert distance(step(y), want) < 1e-5
    out = torch.full_like(want, torch.nan, dtype=torch.float32)
    assert step(y, out=out) is out
    assert distance(out, want) < 1e-5


OTHERS = {
    "laplacian": (jactri.laplacian, lambda net: lambda x: net(x).sum(1), {}, "laplacian."),
    "jtj": (jactri.jtj, lambda net: net, SAMPLES, "chain."),
    "diagonal": (jactri.diagonal, lambda net: net, {}, "chain."),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls(name, device):
    of, make, options, kernel = OTHERS[name]
    torch.manual_seed(0)
    net = wide(6, 16, 16, 6).to(device)
    x, y = torch.randn(2, 5, 6, device=device)
    step = jactri.compile(make(net), x, of=of, engine="fx", backend="triton", **options)
    assert any(n.startswith(kernel) for n in in_graph(step))
    want = of(make(copy.deepcopy(net).to(F64)), y.to(F64), **options)
    assert distance(step(y), want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(dtype, device):
    torch.manual_seed(0)
    net = wide(5, 16, 12, 3).to(device, dtype)
    x, y = torch.randn(2, 7, 5, device=device, dtype=dtype)
    step = jactri.compile(net, x, engine="fx", per_sample=True, backend="triton")
    assert "chain._chain" in in_graph(step)
    want = jactri.jacobian(copy.deepcopy(net).to(F64), y.to(F64), per_sample=True)
    assert distance(step(y), want) < 0.03
    torch.testing.assert_close(
        step(y), jactri.jacobian(net, y, per_sample=True, backend="triton"), rtol=0, atol=0
    )


def test_another_batch_has_launches_of_its_own(device):
    net = wide(5, 16, 12, 3).to(device)
    step = jactri.compile(net, torch.randn(7, 5, device=device), engine="fx", backend="triton")
    for n in (3, 1, 0, 7):
        x = torch.randn(n, 5, device=device)
        want = jactri.jacobian(copy.deepcopy(net).to(F64), x.to(F64))
        for _ in range(2):
            found = step(x)
            assert found.shape == want.shape and distance(found, want) < 1e-5
    assert step.traces == 4


@needs_compiler
def test_inductor_leaves_them_as_they_are(device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Softmax(1), nn.Linear(12, 8)).to(device)
    x, y = torch.randn(2, 4, 6, device=device)
    step = jactri.compile(net, x, per_sample=True, backend="triton")
    want = jactri.jacobian(copy.deepcopy(net).to(F64), y.to(F64), per_sample=True)
    assert distance(step(y), want) < 1e-5
    ordinary = launched(lambda: jactri.jacobian(net, y, per_sample=True, backend="triton"))
    assert launched(lambda: step._last.run([y, *step._last.held()])) == ordinary
    (part,) = step.explain().parts
    assert [str(k) for k in part.kernels].count("jactri.kernel") == ordinary.total()
    assert not any("kernel" in k.ops for k in part.kernels if k.fused)


@pytest.mark.parametrize("engine", ["fx", COMPILER])
def test_frozen_weights(engine, device):
    torch.manual_seed(0)
    net = wide(5, 16, 12, 3).to(device)
    x, y = torch.randn(2, 7, 5, device=device)
    options = {"per_sample": True, "backend": "triton"}
    step = jactri.compile(net, x, engine=engine, freeze=True, **options)
    want = jactri.jacobian(copy.deepcopy(net).to(F64), y.to(F64), per_sample=True)
    with torch.no_grad():
        net[0].weight.zero_()
    assert "chain._chain" in in_graph(step)
    assert distance(step(y), want) < 1e-5


@pytest.mark.parametrize("engine", ["fx", COMPILER])
def test_kernels_in_what_a_loss_does_not_differentiate(engine, device):
    torch.manual_seed(0)
    net = wide(5, 16, 12, 3).to(device)
    x, y = torch.randn(2, 7, 5, device=device)

    def loss(net, x, **options):
        jac = jactri.jacobian(net, x, per_sample=True, **options)
        return (net(x).square().unsqueeze(2) * jac).mean()

    step = jactri.compile(lambda x: loss(net, x, backend="triton"), x, of=None, engine=engine)
    assert in_graph(step) == {"operands._prepare": 1, "chain._chain": 1}
    double = copy.deepcopy(net).to(F64)
    want = torch.autograd.grad(loss(double, y.to(F64)), list(double.parameters()))
    found = torch.autograd.grad(step(y), list(net.parameters()))
    for a, b in zip(found, want, strict=True):
        assert distance(a, b) < 1e-5


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_trace_of_others(mode, device):
    net = wide(5, 16, 12, 3).to(device)
    x, y = torch.randn(2, 7, 5, device=device)
    call = functools.partial(jactri.jacobian, net, per_sample=True, backend="triton")
    graph = make_fx(call, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    assert [n.args[0] for n in graph.graph.nodes if n.target is launches.OP] == [
        "operands._prepare", "chain._chain"
    ]  # fmt: skip
    torch.testing.assert_close(graph(y), call(y), rtol=0, atol=0)


def test_tensors_that_lie_otherwise_than_in_the_trace(device):
    """The arguments of a launch tell strides, and a compiler might choose others."""
    (node,) = (
        n
        for n in make_fx(lambda a, b: rows(a, b, "softmax"), tracing_mode="fake")(
            torch.empty(6, 1, 12).expand(-1, 4, -1), torch.empty(4, 12)
        ).graph.nodes
        if n.target is launches.OP
    )
    t, p = torch.randn(6, 1, 12, device=device).expand(-1, 4, -1), torch.rand(4, 12, device=device)
    want = rows(t, p, "softmax")
    name, _, _, how = node.args
    out = torch.full((12, 4, 6), torch.nan, device=device).permute(2, 1, 0)
    launches.OP(name, [t.contiguous(), p.t().contiguous().t()], out, how)
    torch.testing.assert_close(out, want, rtol=0, atol=0)


def test_a_kernel_that_does_not_run_here(device, monkeypatch, caplog):
    net = wide(5, 16, 12, 3).to(device)
    x = torch.randn(7, 5, device=device)

    def unfit(*args):
        raise Unfit("out of resources")

    monkeypatch.setattr(launches, "_filled", unfit)
    with caplog.at_level(logging.WARNING, "jactri"):
        step = jactri.compile(net, x, engine="fx", backend="triton")
    assert "runs eagerly: its graph fails: out of resources" in caplog.text
    assert step.graph is None and "out of resources" in step.reason
    torch.testing.assert_close(step(x), jactri.jacobian(net, x, backend="triton"), rtol=0, atol=0)


def test_packages_have_none(device, tmp_path, monkeypatch):
    net = wide(5, 16, 12, 3).to(device)
    x = torch.randn(7, 5, device=device)
    monkeypatch.setattr(engines, "has_compiler", lambda: True)
    monkeypatch.setitem(
        engines._BUILD, "aot", lambda graph, like, _: (engines._fx(graph, like), None)
    )
    with pytest.raises(RuntimeError, match=r"engine='aot'.*backend='triton'.*engine='inductor'"):
        jactri.compile(net, x, engine="aot", backend="triton")
    with pytest.raises(RuntimeError, match=r"export and backend='triton' exclude each other"):
        jactri.export(net, x, path=tmp_path / "x.pt2", backend="triton")

    def inside(x):
        return jactri.jacobian(net, x, per_sample=True, backend="triton")

    step = jactri.compile(inside, x, of=None, engine="aot")
    assert step.graph is not None and not in_graph(step)
    torch.testing.assert_close(step(x), inside(x), rtol=1e-5, atol=1e-6)
    assert in_graph(jactri.compile(inside, x, of=None, engine="fx"))
