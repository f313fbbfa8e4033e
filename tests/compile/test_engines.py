"""What runs a traced call: Inductor's code and AOTInductor packages give the answers of the ordinary call."""

import copy
import functools
import shutil

import pytest
import torch
from common import in_threads, seeded, torch_before
from tolerances import assert_same_tree
from torch import nn
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch.fx.experimental.proxy_tensor import make_fx

import jactri
from jactri._src.base import backends

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler"
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, 3, 3, padding=1), nn.GELU(), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 4)
    )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x)


def image():
    """One whose sweep goes by windows, and multiplies them where they lie."""
    torch.manual_seed(0)
    first, last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), last)


def potential():
    return nn.Sequential(seeded(4, 9, 1, dtype=torch.float32), nn.Flatten(0))


CALLS = {
    "jacobian": (jactri.jacobian, network, (3, 1, 4), {"per_sample": True}),
    "attention": (jactri.jacobian, Attention, (2, 3, 8), {"per_sample": True}),
    "image": (jactri.jacobian, image, (1, 1, 16, 16), {"per_sample": True}),
    "laplacian": (jactri.laplacian, potential, (5, 4), {}),
    "parameters": (jactri.parameter_jacobian, lambda: seeded(4, 9, 3, dtype=torch.float32), (5, 4), {}),
}  # fmt: skip


@functools.cache
def made(name, engine):
    """One of the calls, compiled once for all tests: its network, and what it became."""
    of, make, shape, options = CALLS[name]
    net = make().eval()
    return net, jactri.compile(net, torch.randn(shape), of=of, engine=engine, **options)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "engine"), [*((name, "inductor") for name in CALLS), ("jacobian", "aot")]
)
def test_answers(name, engine):
    of, _, shape, options = CALLS[name]
    net, compiled = made(name, engine)
    assert compiled.graph is not None and compiled.engine == engine
    assert compiled.seconds[1] > 0 and f"{engine} runs" in repr(compiled)
    for _ in range(2):
        x = torch.randn(shape)
        want = of(net, x, **options)
        want = want.dense() if of is jactri.parameter_jacobian else want
        assert_same_tree(compiled(x), want, torch.float32, length=200)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.2)
    assert compiled.traces == 1


@needs_compiler
@pytest.mark.parametrize(
    ("engine", "op"),
    [("inductor", "jactri::linear"), ("fx", "jactri::linear"), ("aot", "aten::mm")],
)
def test_products_that_onednn_computes(engine, op, monkeypatch):
    """Inductor compiles torch's op for them with constant matrices alone, and a package has no op of ours."""
    if engine != "aot" and backends._linear_pointwise() is None:
        pytest.skip("this torch has no oneDNN product")
    monkeypatch.setattr(backends, "_probe", backends.Probe(1.0, 2.0, "fixed by a test"))
    net = seeded(8, 128, 128, 16, dtype=torch.float32)
    compiled = jactri.compile(net, torch.randn(32, 8), engine=engine, per_sample=True)
    assert compiled.engine == engine
    names = [n.target.name() for n in compiled.graph.graph.nodes if n.op == "call_function"]
    assert op in names and "mkldnn::_linear_pointwise" not in names
    x = torch.randn(32, 8)
    want = jactri.jacobian(copy.deepcopy(net).double(), x.double(), per_sample=True)
    torch.testing.assert_close(compiled(x).double(), want, rtol=1e-4, atol=1e-5)


def test_graphs_of_others_have_ops_of_torch(monkeypatch):
    monkeypatch.setattr(backends, "_probe", backends.Probe(1.0, 2.0, "fixed by a test"))
    net = seeded(8, 128, 128, 16, dtype=torch.float32)
    graph = make_fx(lambda x: jactri.jacobian(net, x, per_sample=True))(torch.randn(32, 8))
    names = {n.target.name() for n in graph.graph.nodes if n.op == "call_function"}
    assert all(name.startswith("aten::") for name in names) and "aten::mm" in names


@needs_compiler
def test_a_package_says_of_itself_what_compiled_code_does():
    jit, aot = (made("jacobian", e)[1].explain().parts[0] for e in ("inductor", "aot"))
    assert jit.engine == "inductor" and aot.engine == "aot" and jit.kernels
    assert [(k.ops, k.fused) for k in aot.kernels] == [(k.ops, k.fused) for k in jit.kernels]


@needs_compiler
def test_a_training_step():
    net = seeded(4, 9, 4, dtype=torch.float32)

    def penalty(x):
        J = jactri.jacobian(net, x, per_sample=True, create_graph=True)
        return net(x).square().mean() + J.square().mean()

    compiled = jactri.compile(penalty, torch.randn(5, 4), of=None)
    x = torch.randn(5, 4)
    want = torch.autograd.grad(penalty(x), list(net.parameters()))
    compiled(x).backward()
    for p, g in zip(net.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g)


def layouts(like):
    """Cotangents, each laid out in another way."""
    z = torch.randn(like.shape, dtype=torch.complex64)
    return {
        "contiguous": torch.randn(like.shape),
        "as the answer": torch.randn_like(like),
        "transposed": torch.randn(like.shape[::-1]).permute(2, 1, 0),
        "expanded": torch.randn(()).expand(like.shape),
        "strided": torch.randn(*like.shape, 2)[..., 0],
        "negated lazily": z.conj().imag.contiguous(),
    }


@needs_compiler
@pytest.mark.parametrize("engine", ["fx", "inductor", "aot"])
def test_cotangents_of_any_layout(engine):
    """The backward is compiled for one layout, and autograd hands it any."""
    net = seeded(4, 5, 3, dtype=torch.float32)
    options = {"per_sample": True, "create_graph": True}
    compiled = jactri.compile(net, torch.randn(2, 4), engine=engine, **options)
    assert compiled.graph is not None
    weights = list(net.parameters())[:3]
    x = torch.randn(2, 4)
    got, want = compiled(x), jactri.jacobian(net, x, **options)
    for name, g in layouts(want).items():
        ours, theirs = (torch.autograd.grad(J, weights, g, retain_graph=True) for J in (got, want))
        torch.testing.assert_close(ours, theirs, msg=name)


@needs_compiler
@pytest.mark.parametrize("engine", ["fx", "inductor"])
def test_inputs_that_are_negated_lazily(engine):
    """Kernels read memory, which holds the negation."""
    z = torch.randn(2, 4, dtype=torch.complex64)
    compiled = jactri.compile(torch.sin, z.imag, engine=engine)
    assert z.conj().imag.is_neg()
    for x in (z.conj().imag, z.imag, z.conj().imag):
        torch.testing.assert_close(compiled(x), jactri.jacobian(torch.sin, x))
    assert compiled.traces == 2


@needs_compiler
def test_weights_that_are_negated_lazily():
    net, z = torch.nn.Identity(), torch.randn(4, dtype=torch.complex64)
    net.scale = z.imag
    compiled = jactri.compile(lambda x: net(x).sin() * net.scale, torch.randn(2, 4))
    net.scale = z.conj().imag
    x = torch.randn(2, 4)
    torch.testing.assert_close(compiled(x), jactri.jacobian(compiled.func, x))
    # an older compiler's answer is wrong before that is asked
    assert torch_before((2, 13)) or "scale is negated or conjugated lazily" in compiled.reason
    assert compiled.graph is None


@needs_compiler
def test_into_memory_of_the_caller():
    net = seeded(6, 9, 4, dtype=torch.float32)
    compiled = jactri.compile(net, torch.randn(5, 6), per_sample=True)
    out = torch.empty(6, 4, 5).permute(2, 1, 0)
    for _ in range(3):
        x = torch.randn(5, 6)
        assert compiled(x, out=out) is out
        torch.testing.assert_close(out, jactri.jacobian(net, x, per_sample=True))
    assert compiled.graph is not None


@needs_compiler
def test_threads_share_a_package():
    net, compiled = made("jacobian", "aot")
    wrong = []

    def work(seed):
        gen = torch.Generator().manual_seed(seed)
        for _ in range(20):
            x = torch.randn(3, 1, 4, generator=gen)
            if not torch.allclose(compiled(x), jactri.jacobian(net, x, per_sample=True), atol=1e-5):
                wrong.append(seed)

    in_threads(4, work)
    assert not wrong


@pytest.mark.parametrize("engine", ["inductor", "aot"])
def test_without_a_compiler(engine, monkeypatch):
    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    net, x = seeded(6, 9, 4), torch.randn(5, 6, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match=r"needs a C\+\+ compiler.*install g\+\+ or clang"):
        compiled = jactri.compile(net, x, engine=engine)
    assert compiled.engine == "fx"
    torch.testing.assert_close(compiled(x + 1), jactri.jacobian(net, x + 1))
