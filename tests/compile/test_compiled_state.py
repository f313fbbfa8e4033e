"""`jactri.compile`: what a trace leaves of itself behind (nothing), and what of modules a call sees again."""

import functools

import pytest
import torch
from common import F64, seeded
from tolerances import assert_same_tree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

import jactri

compile = functools.partial(jactri.compile, engine="fx")


def agree(compiled, func, x):
    assert_same_tree(compiled(x), jactri.jacobian(func, x), F64, length=64)


# -- state that func writes ------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["fx", "inductor"])
def test_running_statistics_that_no_schema_tells_of(engine):
    mean, var, w = torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64), torch.randn(3, 4, dtype=F64)

    def func(x, mean=mean, var=var):
        return nn.functional.batch_norm(x @ w, mean, var, training=True).tanh()

    compiled = jactri.compile(func, torch.randn(5, 3, dtype=F64), engine=engine)
    assert "writes to running statistics" in compiled.reason
    x = torch.randn(5, 3, dtype=F64)
    theirs = mean.clone(), var.clone()
    want = jactri.jacobian(lambda x: func(x, *theirs), x)
    assert_same_tree(compiled(x), want, F64, length=64)
    torch.testing.assert_close((mean, var), theirs)

    def alone(x):
        return nn.functional.batch_norm(x @ w, None, None, training=True).tanh()

    compiled = jactri.compile(alone, torch.randn(5, 3, dtype=F64), engine=engine)
    assert compiled.graph is not None
    agree(compiled, alone, x)


class Normed(nn.Module):
    """A step of a power iteration in each call, by ``out=``."""

    def __init__(self):
        super().__init__()
        self.net = seeded(4, 4)
        self.register_buffer("u", torch.arange(1.0, 5.0, dtype=F64))

    def forward(self, x):
        with torch.no_grad():
            torch.nn.functional.normalize(self.net[0].weight @ self.u, dim=0, out=self.u)
        return self.net(x).tanh() * self.u.clone()


class Replaced(Normed):
    def forward(self, x):
        self.u = x.detach().mean(0)
        return self.net(x).tanh() * self.u


class Recurrent(Normed):
    def __init__(self):
        super().__init__()
        self.h = torch.ones(4, dtype=F64)

    def forward(self, x):
        self.h = (self.net(x) + self.h).tanh()
        return self.h * 2


class Listed(Recurrent):
    def __init__(self):
        super().__init__()
        self.past = [torch.ones(4, dtype=F64)]

    def forward(self, x):
        self.past[0] = (self.net(x) + self.past[0]).tanh().detach()
        return self.net(x).sin() * self.past[0]


@pytest.mark.parametrize("kind", [Normed, Replaced, Recurrent, Listed])
def test_state_is_carried_from_call_to_call(kind):
    net, twin = kind(), kind()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(3, 4, dtype=F64)
    compiled = compile(net, x)
    jactri.jacobian(twin, x)
    for x in torch.randn(3, 3, 4, dtype=F64):
        agree(compiled, twin, x)
        for a, b in zip(net.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    assert (
        "func writes to u" in compiled.reason or "which the next call may read" in compiled.reason
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_norms_that_set_attributes(kind):
    net = getattr(nn.utils, kind)(nn.Linear(4, 4, dtype=F64))
    x = torch.randn(3, 4, dtype=F64)
    compiled = compile(net, x)
    assert not isinstance(net.weight, FakeTensor)
    assert (compiled.graph is None) == (kind == "spectral_norm")
    net.eval()
    agree(compiled, net, x + 1)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    agree(compiled, net, x + 1)
    assert compiled.graph is not None


H = None


def test_no_tensor_of_a_trace_stays():
    net, seen, by_name, h = seeded(4, 4), [], {}, None
    net[0].register_forward_hook(lambda m, args, y: by_name.update(out=y))

    class Memo(nn.Module):
        def __init__(self):
            super().__init__()
            self.memo, self.last = {}, None

        def forward(self, x):
            self.last = x.sin()
            k = self.memo.setdefault(len(self.memo), torch.ones(4, dtype=F64))
            return self.last * k

    memo = Memo()

    def func(x):
        nonlocal h
        global H
        h = H = net(x)
        seen.append((h, 1))
        return memo(h)

    for options in ({}, {"create_graph": True}):
        compiled = compile(func, torch.randn(3, 4, dtype=F64), **options)
        x = torch.randn(3, 4, dtype=F64)
        assert_same_tree(compiled(x), jactri.jacobian(func, x, **options), F64, length=64)
        assert compiled.graph is not None
        left = [seen, by_name, h, H, memo.memo, memo.last]
        assert not any(isinstance(t, FakeTensor) for t in tree_leaves(left))
        assert h is H is not None and h.shape == (3, 4)


def test_errors_of_a_trace_are_no_errors_of_the_call():
    x = torch.randn(4, dtype=F64)
    for error in (LookupError, KeyError, IndexError, ZeroDivisionError, NotImplementedError):
        calls = []

        def func(x, calls=calls, error=error):
            calls.append(0)
            if len(calls) == 2:
                raise error("no value")
            return x.sin()

        compiled = compile(func, x)
        assert error.__name__ in compiled.reason
        agree(compiled, torch.sin, x + 1)


@pytest.mark.parametrize("layout", ["sparse", "sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_constants(layout):
    w = torch.randn(4, 4, dtype=F64).relu()
    w = w.to_sparse() if layout == "sparse" else w.to_sparse_csr()

    def func(x):
        return (w @ x[:, None]).sin()

    x = torch.randn(4, dtype=F64)
    agree(compile(func, x), func, x + 1)


# -- what of modules is seen again -------------------------------------------------------------------


def test_layers_that_are_added_and_removed():
    net = nn.Sequential(*seeded(4, 9, 4))
    x = torch.randn(3, 4, dtype=F64)
    compiled = compile(net, x)
    net.append(nn.Tanh())
    agree(compiled, net, x)
    net.insert(0, nn.Linear(4, 4, dtype=F64))
    agree(compiled, net, x)
    del net[-1]
    agree(compiled, net, x)
    assert compiled.traces == 4

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList()

        def forward(self, x):
            return functools.reduce(lambda h, f: f(h).sin(), self.layers, x.sin())

    net = Loop()
    compiled = compile(net, x)
    net.layers.append(nn.Linear(4, 4, dtype=F64))
    agree(compiled, net, x)


def test_a_bias_that_comes_and_goes():
    net = nn.Linear(4, 4, bias=False, dtype=F64)
    x = torch.randn(3, 4, dtype=F64)

    def func(x):
        return net(x).tanh()

    compiled = compile(func, x)
    net.bias = nn.Parameter(torch.randn(4, dtype=F64))
    agree(compiled, func, x)
    net.bias = None
    agree(compiled, func, x)
    assert compiled.traces == 3


def test_tensors_that_are_plain_attributes():
    net = nn.Identity()
    net.scale = torch.randn(4, dtype=F64)

    def func(x):
        return net(x).sin() * net.scale

    x = torch.randn(3, 4, dtype=F64)
    compiled = compile(func, x)
    net.scale = torch.randn(4, dtype=F64)
    agree(compiled, func, x)
    assert compiled.traces == 1
    net.scale = torch.randn(3, 1, dtype=F64)
    agree(compiled, func, x)
    assert compiled.traces == 2


def test_parametrizations_that_are_added():
    class Twice(nn.Module):
        def forward(self, w):
            return w * 2

    net, x = nn.Linear(4, 4, dtype=F64), torch.randn(3, 4, dtype=F64)
    compiled = compile(net, x)
    for _ in range(2):
        nn.utils.parametrize.register_parametrization(net, "weight", Twice())
        agree(compiled, net, x)
    nn.utils.parametrize.remove_parametrizations(net, "weight")
    agree(compiled, net, x)


def test_results_have_no_graph():
    """Also where they are weights or inputs, unchanged."""
    net = seeded(4, 4)
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    compiled = compile(lambda x: (net(x), x, net[0].weight), x, return_output=True)
    outputs, _ = compiled(x)
    assert not any(y.requires_grad for y in outputs)
    assert net[0].weight.requires_grad and x.requires_grad
