"""What surrounds every call: autocast, torch.compile, inference mode. Truth is the same call without them."""

import copy
import inspect
import subprocess
import sys
import threading

import pytest
import torch
from common import F64, make
from tolerances import assert_close
from torch import nn

import jactri

A, B = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 6)


def field(x):
    """float32, whatever the caller's autocast."""
    with torch.autocast("cpu", enabled=False):
        return torch.tanh(x @ A.to(x.dtype)) @ A.to(x.dtype).t() * B.to(x.dtype)


def net():
    return make(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)))


def points(dtype=torch.float32):
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).to(dtype)


CALLS = {
    "jacobian": lambda f, x: jactri.jacobian(f, x),
    "forward-mode": lambda f, x: jactri.jacobian(f, x, strategy="forward-mode"),
    "reverse-mode": lambda f, x: jactri.jacobian(f, x, strategy="reverse-mode"),
    "per sample": lambda f, x: jactri.jacobian(f, x, per_sample=True),
    "create_graph": lambda f, x: jactri.jacobian(f, x, create_graph=True),
    "jacrev": lambda f, x: jactri.func.jacrev(f)(x),
    "jacfwd": lambda f, x: jactri.func.jacfwd(f)(x),
    "hessian": lambda f, x: jactri.func.hessian(lambda v: f(v).square().sum())(x),
    "hessians": lambda f, x: jactri.hessian(lambda v: f(v).square().sum(1), x, per_sample=True),
    "jvp": lambda f, x: jactri.jvp(f, x, torch.ones_like(x))[1],
    "vjp": lambda f, x: jactri.vjp(f, x, torch.ones_like(x))[1],
    "gradient": lambda f, x: jactri.gradient(f, x),
    "diagonal": lambda f, x: jactri.diagonal(f, x),
    "divergence": lambda f, x: jactri.divergence(f, x),
    "laplacian": lambda f, x: jactri.laplacian(f, x),
    "bilaplacian": lambda f, x: jactri.bilaplacian(f, x),
    "jtj": lambda f, x: jactri.jtj(f, x, per_sample=True),
    "jjt": lambda f, x: jactri.jjt(f, x),
    "finite_difference": lambda f, x: jactri.finite_difference(f, x),
    "sparsity": lambda f, x: jactri.sparsity(f, x),
    "compile": lambda f, x: jactri.compile(f, x, engine="fx")(x),
    "vmap": lambda f, x: torch.func.vmap(lambda v: jactri.jacobian(f, v))(x),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_products_are_outside_of_autocast(call):
    if call is CALLS["vmap"]:
        pytest.skip("in a transform, torch.func computes")
    want = call(field, points())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call(field, points())
        assert torch.is_autocast_enabled("cpu")
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)


def test_the_function_sees_the_caller_s_autocast():
    seen = []

    def func(x):
        seen.append(torch.is_autocast_enabled("cpu"))
        return torch.mm(x, A)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = jactri.jacobian(func, points(), return_output=True)
    jactri.jacobian(func, points())
    assert seen == [True, False]
    assert out.dtype == torch.bfloat16


def test_parameter_jacobian_outside_of_autocast():
    class Exact(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x).tanh()

    net = make(lambda: Exact(6, 4)).float()
    want = jactri.parameter_jacobian(net, points())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = jactri.parameter_jacobian(net, points())
        for name, block in want.dense().items():
            torch.testing.assert_close(got.dense()[name], block)
        torch.testing.assert_close(got.gram(), want.gram())


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_inference_mode(call):
    want = call(field, points())
    with torch.inference_mode():
        got = call(field, points())
        assert torch.is_inference_mode_enabled()
    assert not got.is_inference()
    torch.testing.assert_close(got, want)


class Around(nn.Module):
    """A function with a part that is compiled."""

    def __init__(self, part):
        super().__init__()
        self.before, self.part, self.after = nn.Linear(6, 6), part, nn.Linear(6, 6)

    def forward(self, x):
        return self.after(self.part(self.before(x)))


class Method:
    def __init__(self, func):
        self.func = func

    def __call__(self, x):
        return self.func(x)

    def method(self, x):
        return self.func(x)


def compiled_parts():
    """Functions with something of torch.compile in them, and the same without it."""
    torch._dynamo.reset()
    part = net()
    whole = make(lambda: Around(part))

    def in_place():
        again = copy.deepcopy(whole)
        again.part.compile(backend="aot_eager")
        return again

    def helper(v):
        return torch.sigmoid(v) * v

    quick = torch.compile(helper, backend="aot_eager", dynamic=True)
    return {
        "submodule": (make(lambda: Around(torch.compile(part, backend="aot_eager"))), whole),
        "in place": (in_place(), whole),
        "helper": (lambda x: quick(part(x)), lambda x: helper(part(x))),
        "method": (Method(torch.compile(part, backend="aot_eager")).method, part),
        "whole": (torch.compile(whole, backend="aot_eager"), whole),
    }


@pytest.mark.parametrize("name", ["submodule", "in place", "helper", "method", "whole"])
def test_what_is_compiled_runs_eagerly(name):
    func, eager = compiled_parts()[name]
    for n in (2, 5, 3):
        x = torch.randn(n, 6, dtype=F64)
        with jactri.fallback("error"):
            for call in CALLS:
                if call not in ("hessian", "compile"):
                    got, want = CALLS[call](func, x), CALLS[call](eager, x)
                    torch.testing.assert_close(got, want)
    if isinstance(func, nn.Module):
        got, want = jactri.parameter_jacobian(func, x), jactri.parameter_jacobian(eager, x)
        torch.testing.assert_close(got.gram(), want.gram())


def test_the_stance_of_the_compiler_is_put_back_by_the_last_of_several_threads():
    func, _ = compiled_parts()["submodule"]
    compiled = torch.compile(lambda x: (x * 2, torch.compiler.is_compiling()), backend="eager")
    assert compiled(torch.ones(1))[1]
    first, second = threading.Event(), threading.Event()

    def waits(x):
        first.set()
        assert second.wait(60)
        return func(x)

    found = []
    thread = threading.Thread(
        target=lambda: found.append(jactri.jacobian(waits, points(F64)).shape)
    )

    def starts(x):  # ends after the other one has begun, and before it is done
        thread.start()
        assert first.wait(60)
        assert not compiled(torch.ones(1))[1]
        return func(x)

    jactri.jacobian(starts, points(F64))
    second.set()
    thread.join()
    assert found == [(3, 6, 3, 6)]
    assert compiled(torch.ones(1))[1]
    with pytest.raises(KeyError):
        jactri.jacobian(lambda x: {}[x], points())
    assert compiled(torch.ones(1))[1]


def test_a_stance_of_the_caller_is_put_back():
    with torch.compiler.set_stance("fail_on_recompile"):
        jactri.jacobian(torch.sin, points())
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            torch.compile(lambda x: x + 1, backend="eager")(points())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo's, of what has a graph
@pytest.mark.parametrize("name", ["jacobian", "jacrev", "jvp", "laplacian", "jtj"])
def test_inside_of_a_compiled_function(name):
    func, eager = compiled_parts()["helper"]
    step = torch.compile(lambda x: CALLS[name](func, x * 1.0) * 2, backend="aot_eager")
    for n in (2, 4, 3):
        x = torch.randn(n, 6, dtype=F64)
        got = step(x)
        assert torch.is_grad_enabled()
        assert_close(got, 2 * CALLS[name](eager, x), F64)


@pytest.mark.parametrize("name", ["submodule", "in place", "helper", "method", "whole"])
def test_check_of_what_is_compiled(name):
    func, _ = compiled_parts()[name]
    for n in (2, 5):
        assert jactri.check(func, torch.randn(n, 6, dtype=F64)).ok


def test_dynamo_is_not_imported():
    """Importing it costs seconds."""
    code = (
        "import sys, torch, jactri\n"
        "net = torch.nn.Linear(3, 2)\n"
        "jactri.jacobian(net, torch.ones(2, 3))\n"
        "jactri.parameter_jacobian(net, torch.ones(2, 3)).dense()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_signatures_are_those_of_the_calls():
    for name in ("jacobian", "jvp", "laplacian", "jtj", "explain", "gradient"):
        names = inspect.signature(getattr(jactri, name)).parameters
        assert "backend" in names
        assert "args" not in names


NESTED = [
    "jacobian",
    "jvp",
    "vjp",
    "gradient",
    "diagonal",
    "divergence",
    "laplacian",
    "bilaplacian",
    "jtj",
]


@pytest.mark.parametrize("name", NESTED)
def test_a_nested_call_without_a_graph_warns(name):
    call, x = CALLS[name], points(F64)
    with pytest.warns(UserWarning, match=rf"jactri\.{name} inside .* pass create_graph=True"):
        J = jactri.jacobian(lambda v: call(field, v).reshape(3, -1).sum(1), x)
    assert not J.any()


def test_what_is_meant_does_not_warn():
    """A constant, a graph, a look, an ordinary call of what requires grad, a call of torch.func's kind."""
    x, f = points(F64).requires_grad_(), field
    outer = [
        lambda v: v * jactri.gradient(f, v.detach()).sum(1),
        lambda v: jactri.gradient(f, v, create_graph=True).sum(1),
        lambda v: v * float(jactri.explain(f, v).chunks) * len(jactri.sparsity(f, v).shape),
        lambda v: jactri.func.jacrev(f)(v).sum((1, 3)),
        lambda v: v * _in_no_grad(jactri.gradient, f, v).sum(1),
    ]
    for g in outer:
        jactri.jacobian(g, x)
    jactri.gradient(f, x.sin())


def _in_no_grad(call, *args):
    with torch.no_grad():
        return call(*args)
