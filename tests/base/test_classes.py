"""Subclasses of Tensor that redefine operators. Truth is the same computation on plain tensors."""

from typing import ClassVar

import pytest
import torch
from cases import ALL
from common import F64, make
from test_running import CALLS
from torch import nn

import jactri


def redefined(name):
    base = getattr(torch.Tensor, name)

    def operator(self, *args):
        Hostile.called.append(name)
        made = base(self, *args).as_subclass(torch.Tensor)
        return torch.add(made, 1e3).as_subclass(Hostile)

    return operator


class Hostile(torch.Tensor):
    """Of a group: its operators are no business of whoever differentiates ``torch.mul``."""

    called: ClassVar[list[str]] = []


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "matmul", "rmatmul", "truediv", "neg"):
    setattr(Hostile, f"__{_name}__", redefined(f"__{_name}__"))


def func(x):
    """By torch's functions alone."""
    y = torch.mul(torch.sin(x), x)
    return torch.div(torch.matmul(y, W.as_subclass(x.__class__)), torch.exp(torch.mul(y, y)))


W = torch.randn(6, 6, dtype=F64, generator=torch.Generator().manual_seed(2))


def points():
    return torch.randn(3, 6, dtype=F64, generator=torch.Generator().manual_seed(0))


def same(got, want):
    torch.testing.assert_close(got.as_subclass(torch.Tensor), want)


NOT_HERE = {"compile", "vmap", "sparsity", "hessian"}


@pytest.mark.parametrize("name", [name for name in CALLS if name not in NOT_HERE])
def test_the_operators_of_a_subclass_are_not_called(name):
    want = CALLS[name](func, points())
    Hostile.called.clear()
    got = CALLS[name](func, points().as_subclass(Hostile))
    assert not Hostile.called
    assert type(got) is (torch.Tensor if name in ("jacrev", "jacfwd") else Hostile)
    same(got, want)


@pytest.mark.parametrize(
    "func",
    [
        func,
        lambda x: torch.atan2(x, torch.exp(x)),
        lambda x: torch.pow(torch.exp(x), x),
        lambda x: torch.prod(x, 1),
    ],
)
def test_compiled_calls(func):
    call = jactri.compile(func, points().as_subclass(Hostile), engine="fx")
    Hostile.called.clear()
    for x in (points(), points() + 0.5):
        same(call(x.as_subclass(Hostile)), torch.autograd.functional.jacobian(func, x))
    assert not Hostile.called


def test_hessians():
    def total(x):
        return torch.sum(func(x))

    want = jactri.func.hessian(total)(points())
    Hostile.called.clear()
    same(jactri.func.hessian(total)(points().as_subclass(Hostile)), want)
    assert not Hostile.called


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
def test_ops(dtype, strategy):
    """A part of the table."""
    done = 0
    for case in [c for c in ALL if not (c.variant or c.module)][::12]:
        generator = torch.Generator().manual_seed(0)
        inputs = tuple(i.draw(generator).to(dtype) for i in case.inputs)
        wrapped = tuple(x.as_subclass(Hostile) for x in inputs)
        try:
            truth = torch.autograd.functional.jacobian(case.func, inputs)
            Hostile.called.clear()
            torch.autograd.functional.jacobian(case.func, wrapped)
        except (RuntimeError, TypeError):
            continue
        if Hostile.called:  # the case is written with operators
            continue
        got = jactri.jacobian(case.func, wrapped, strategy=strategy)
        assert not Hostile.called, case.name
        leaves = torch.utils._pytree.tree_leaves
        tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype is torch.float32 else {}
        for a, b in zip(leaves(got), leaves(truth), strict=True):
            a = a.as_subclass(torch.Tensor).to(b.dtype)
            torch.testing.assert_close(a, b, equal_nan=True, **tolerance, msg=case.name)
        done += 1
    assert done > 20


def test_classes_of_results_are_those_of_torch():
    plain, sub = points(), points().as_subclass(Hostile)
    theirs = torch.autograd.functional

    def kinds(tree):
        return torch.utils._pytree.tree_map(type, tree)

    cases = [
        (torch.sin, sub),
        (lambda x: x.as_subclass(torch.Tensor).sin(), sub),
        (lambda x: x.sin().as_subclass(Hostile), plain),
        (lambda x, y: (torch.add(x, y), torch.mul(x, y)), (sub, plain)),
        (torch.sin, plain),
        (torch.sin, nn.Parameter(plain)),
    ]
    for call, inputs in cases:
        ours = jactri.jacobian(call, inputs)
        assert kinds(ours) == kinds(theirs.jacobian(call, inputs))
        if call is not torch.sin:
            continue
        assert kinds(jactri.jvp(call, inputs, plain)) == kinds(theirs.jvp(call, inputs, plain))
        out = torch.ones_like(plain)
        assert kinds(jactri.vjp(call, inputs, out)) == kinds(theirs.vjp(call, inputs, out))
    x = sub.detach().requires_grad_()
    got = jactri.jacobian_of(x.sin(), x)
    assert type(got) is Hostile
    same(got, theirs.jacobian(torch.sin, plain))


def test_a_class_that_is_asked_what_its_gradients_are():
    """A class whose results are plain, unless they are of an op that it knows."""

    class Lie(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            made = super().__torch_function__(func, types, args, kwargs or {})
            if not isinstance(made, torch.Tensor):
                return made
            if func in (torch.Tensor.detach, torch.Tensor.view_as, torch.Tensor.requires_grad_):
                made.kind = args[0].kind
                return made
            return made.as_subclass(torch.Tensor)

    x = points().as_subclass(Lie)
    x.kind = "SO3"
    seen = []

    def kind(x):
        seen.append((type(x), x.kind, x.requires_grad))
        return torch.sin(x)

    for create_graph in (False, True):
        got = jactri.jacobian(kind, x, create_graph=create_graph)
        assert type(got) is type(torch.autograd.functional.jacobian(kind, x))
        same(got, torch.autograd.functional.jacobian(torch.sin, points()))
    assert set(seen) == {(Lie, "SO3", True)}


def test_create_graph():
    x = points().as_subclass(Hostile).requires_grad_()
    y = points().requires_grad_()
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            ours, want = (jactri.jacobian(func, v, create_graph=True) for v in (x, y))
        (got,) = torch.autograd.grad(ours.square().sum(), x)
        (truth,) = torch.autograd.grad(want.square().sum(), y)
        same(got, truth)


def test_what_a_function_holds():
    """Weights, constants, and what a Python Function saved."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.exp(x)

        @staticmethod
        def backward(ctx, g):
            return torch.mul(torch.exp(ctx.saved_tensors[0]), g)

    class Weight(nn.Parameter):
        __mul__ = __add__ = __matmul__ = Hostile.__mul__

    net = make(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)))
    want = jactri.jacobian(net, points())
    kernel = jactri.parameter_jacobian(net, points()).gram()
    for layer in (net[0], net[2]):
        layer.weight = Weight(layer.weight.detach())
    Hostile.called.clear()
    same(jactri.jacobian(net, points()), want)
    same(jactri.parameter_jacobian(net, points()).gram(), kernel)
    got = jactri.jacobian(Double.apply, points().as_subclass(Hostile))
    same(got, jactri.jacobian(torch.exp, points()))
    assert not Hostile.called


def test_vectors_and_weights_of_the_class():
    v, want = points().as_subclass(Hostile), jactri.jvp(func, points(), points())[1]
    Hostile.called.clear()
    same(jactri.jvp(func, points(), v)[1], want)
    same(jactri.vjp(func, points(), v)[1], jactri.vjp(func, points(), points())[1])
    same(jactri.jtj(func, points(), weight=v), jactri.jtj(func, points(), weight=points()))
    a = W.as_subclass(Hostile)
    same(jactri.laplacian(func, points(), weight=a), jactri.laplacian(func, points(), weight=W))
    assert not Hostile.called


def test_wrappers_stay_as_they_are():
    from torch.testing._internal.two_tensor import TwoTensor

    x = TwoTensor(points(), points())
    want = torch.autograd.functional.jacobian(torch.sin, points())
    got = jactri.jacobian(lambda v: torch.sin(v) * 2, x)
    torch.testing.assert_close(getattr(got, "a", got), 2 * want)


def test_outputs_shown_are_of_the_class():
    x = points().as_subclass(Hostile)
    for shown in (
        jactri.jacobian(func, x, return_output=True),
        jactri.laplacian(func, x, return_lower=True),
        jactri.divergence(func, x, return_lower=True),
        jactri.gradient(func, x, return_lower=True),
        jactri.diagonal(func, x, return_output=True),
    ):
        assert [type(t) for t in shown] == [Hostile] * len(shown)
        same(shown[0], func(points()))
