"""Calls of jactri inside of a user's own `torch.compile`: its graph breaks there, and the numbers are the same."""

import pytest
import torch
from common import F64, seeded
from test_engines import needs_compiler
from torch import nn

import jactri

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # torch's own look at what it resumes with
)

NET, POTENTIAL = seeded(4, 6, 4), nn.Sequential(seeded(4, 6, 1), nn.Flatten(0))
LABELS = torch.ones(3, 4, dtype=F64)


class Penalised(nn.Module):
    """A module that calls jactri."""

    def __init__(self):
        super().__init__()
        self.net = NET

    def forward(self, x):
        J = jactri.jacobian(self.net, x.sin(), per_sample=True, create_graph=True)
        return self.net(x).square().sum() + J.square().sum()


def looped(x):
    for k in range(3):
        x = x + jactri.jacobian(NET, x * k, per_sample=True).sum(-1)
    return x


def closed_over(x):
    w = x.cos()  # of the compiled function itself
    return jactri.jacobian(lambda v: (v * w).sin() @ w.T, x) + 1


def into(x):
    out = torch.zeros(3, 4, 4, dtype=F64)
    return jactri.jacobian(NET, x.sin(), per_sample=True, out=out) * 2


STEP = jactri.compile(NET, torch.zeros(3, 4, dtype=F64), engine="fx", per_sample=True)

CALLS = {
    "jacobian": lambda x: jactri.jacobian(NET, x.sin()) * 2,
    "per sample": lambda x: jactri.jacobian(NET, x.sin(), per_sample=True) * 2,
    "a value, too": lambda x: jactri.jacobian(NET, x.sin(), return_output=True)[0] * 2,
    "closed over": closed_over,
    "looped": looped,
    "into": into,
    "banded": lambda x: jactri.jacobian(torch.tanh, x.sin(), layout="banded").to_dense() * 2,
    "parameters": lambda x: jactri.parameter_jacobian(NET, x.sin()).dense()["0.weight"] * 2,
    "gram": lambda x: jactri.parameter_jacobian(NET, x.sin()).gram() * 2,
    "products": lambda x: (
        (J := jactri.parameter_jacobian(NET, x.sin())) @ (J.T @ x.cos())
    ) * 2,
    "ggn": lambda x: jactri.ggn(NET, x.sin(), LABELS).diagonal()["0.weight"] * 2,
    "jvp": lambda x: jactri.jvp(NET, x.sin(), x.cos())[1] * 2,
    "vjp": lambda x: jactri.vjp(NET, x.sin(), x.cos())[1] * 2,
    "gradient": lambda x: jactri.gradient(POTENTIAL, x.sin()) * 2,
    "divergence": lambda x: jactri.divergence(NET, x.sin()) * 2,
    "laplacian": lambda x: jactri.laplacian(POTENTIAL, x.sin(), create_graph=True) * 2,
    "diagonal": lambda x: jactri.diagonal(NET, x.sin()) * 2,
    "jtj": lambda x: jactri.jtj(NET, x.sin(), per_sample=True) * 2,
    "ntk": lambda x: jactri.empirical_ntk(NET, x.sin()) * 2,
    "jacrev": lambda x: jactri.func.jacrev(NET)(x.sin()) * 2,
    "hessian": lambda x: jactri.func.hessian(lambda v: NET(v).sum())(x.sin()) * 2,
    "inside of grad": lambda x: torch.func.grad(
        lambda v: jactri.func.jacrev(NET)(v).square().sum()
    )(x.sin()),
    "inside of vmap": lambda x: torch.func.vmap(jactri.func.jacrev(NET))(x.sin()) * 2,
    "a compiled call": lambda x: STEP(x.sin()) * 2,
    "compiled there": lambda x: jactri.compile(NET, x.sin(), engine="fx", per_sample=True)(x.cos()),
    "explained": lambda x: x * len(jactri.explain(NET, x.sin()).steps),
    "without grad": torch.no_grad()(lambda x: jactri.jacobian(NET, x.sin()) * 2),
    "penalised": Penalised(),
}  # fmt: skip


def check(name, backend):
    torch._dynamo.reset()
    call = CALLS[name]
    wrapped = torch.compile(call, backend=backend)
    for _ in range(2):
        x = torch.randn(3, 4, dtype=F64)
        ours, theirs = x.requires_grad_(), x.detach().requires_grad_()
        got, want = wrapped(ours), call(theirs)
        torch.testing.assert_close(got, want)
        assert got.requires_grad == want.requires_grad
        if want.requires_grad:
            weights = list(NET.parameters())
            grads = [
                torch.autograd.grad(
                    y.sum(), [x, *weights], allow_unused=True, materialize_grads=True
                )
                for y, x in ((got, ours), (want, theirs))
            ]
            torch.testing.assert_close(*grads)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
def test_breaks_the_graph(name):
    check(name, "eager")


@needs_compiler
@pytest.mark.parametrize("name", ["per sample", "parameters", "penalised"])
def test_with_inductor_around(name):
    check(name, "inductor")


def test_one_graph_is_refused():
    wrapped = torch.compile(CALLS["jacobian"], backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"jactri\.jacobian"):
        wrapped(torch.randn(3, 4, dtype=F64))


def test_tensors_that_hold_others():
    """As DTensor does, and quantised tensors: what cannot be one graph runs eagerly, and fails as the call does."""

    class Holder(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, dtype=inner.dtype, strides=inner.stride()
            )

        def __init__(self, inner):
            self.inner = inner

        __torch_function__ = torch._C._disabled_torch_function_impl

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            args, kwargs = torch.utils._pytree.tree_map_only(
                cls, lambda t: t.inner, (args, kwargs or {})
            )
            return torch.utils._pytree.tree_map_only(torch.Tensor, cls, func(*args, **kwargs))

    x = torch.randn(3, 4, dtype=F64)
    want = jactri.jacobian(NET[0], x)
    w = NET[0].weight.detach()
    step = jactri.compile(lambda a: torch.nn.functional.linear(a, w), Holder(x), engine="fx")
    found = step(Holder(x))
    torch.testing.assert_close(found.inner if isinstance(found, Holder) else found, want)
    assert step.graph is None and "Holder" in step.reason
    torch.testing.assert_close(step(x), want)
    assert step.traces == 2 and step.graph is not None
