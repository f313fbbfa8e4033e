"""``create_graph=True`` under ``torch.no_grad()``: results have the graph that they have in grad mode."""

import pytest
import torch
from common import F64, seeded
from tolerances import assert_gradients_close
from torch import nn

import jactri


def cubic(x):
    return x.pow(3).sum(-1)


def leaf(*shape):
    torch.manual_seed(1)
    return torch.rand(*shape, dtype=F64).add_(0.1).requires_grad_()


NET, FIELD = seeded(4, 5, 1), seeded(4, 5, 4)
X = leaf(3, 4)
V = torch.rand(5, 4, dtype=F64)

CALLS = {
    "jacobian": (lambda x, w: jactri.jacobian(cubic, x, True), leaf(1)),
    "jacobian of a module": (lambda x, w: jactri.jacobian(NET, x, True, per_sample=True), leaf(1)),
    "jacobian, its output": (lambda x, w: jactri.jacobian(cubic, x, True, return_output=True)[0], leaf(1)),
    "gradient": (lambda x, w: jactri.gradient(NET, x, True), leaf(1)),
    "divergence": (lambda x, w: jactri.divergence(FIELD, x, True), leaf(1)),
    "an estimate": (
        lambda x, w: jactri.divergence(
            FIELD, x, True, estimate=2, generator=torch.Generator().manual_seed(0)
        )[0],
        leaf(1),
    ),
    "diagonal": (lambda x, w: jactri.diagonal(FIELD, x, True), leaf(1)),
    "laplacian": (lambda x, w: jactri.laplacian(NET, x, create_graph=True), leaf(1)),
    "laplacian with a weight": (lambda x, w: jactri.laplacian(NET, x, w, True), leaf(4, 4)),
    "bilaplacian": (lambda x, w: jactri.bilaplacian(NET, x, True), leaf(1)),
    "jtj": (lambda x, w: jactri.jtj(FIELD, x, w, True, per_sample=True), leaf(4)),
    "jtj, dense": (lambda x, w: jactri.jtj(FIELD, x, w, True, per_sample=True), leaf(4, 4)),
    "jjt": (lambda x, w: jactri.jjt(FIELD, x, w, True, per_sample=True), leaf(4)),
    "jvp": (lambda x, w: jactri.jvp(cubic, x, w, True)[1], leaf(3, 4)),
    "jvp of a linear function": (lambda x, w: jactri.jvp(lambda v: v.sum(1), x, w, True)[1], leaf(3, 4)),
    "jvp of a block": (lambda x, w: jactri.jvp(cubic, x, w, True)[1], leaf(2, 3, 4)),
    "jvp by autograd": (lambda x, w: jactri.jvp(lambda v: torch.fft.fft(v**2).abs(), x, w, True)[1], leaf(3, 4)),
    "vjp": (lambda x, w: jactri.vjp(cubic, x, w, True)[1], leaf(3)),
    "vjp of a linear function": (lambda x, w: jactri.vjp(lambda v: v.sum(1), x, w, True)[1], leaf(3)),
    "vjp of two inputs": (lambda x, w: jactri.vjp(torch.mul, (x, w), w, True)[1][0], leaf(3, 4)),
    "vjp of a block": (lambda x, w: jactri.vjp(cubic, x, w, True)[1], leaf(2, 3)),
    "vjp, its output": (lambda x, w: jactri.vjp(cubic, x, w, True)[0], leaf(3)),
    "dense": (lambda x, w: jactri.parameter_jacobian(NET, x, create_graph=True).dense()["0.weight"], leaf(1)),
    "gram": (lambda x, w: jactri.parameter_jacobian(NET, x, create_graph=True).gram(), leaf(1)),
    "J v": (
        lambda x, w: jactri.parameter_jacobian(NET, x, "0.weight", create_graph=True) @ {"0.weight": w}, leaf(5, 4)
    ),
    "J v, block": (
        lambda x, w: jactri.parameter_jacobian(NET, x, "0.weight", create_graph=True) @ {"0.weight": w}, leaf(2, 5, 4)
    ),
    "J^T u": (
        lambda x, w: (jactri.parameter_jacobian(NET, x, create_graph=True).T @ w)["0.weight"], leaf(3, 1)
    ),
    "variance": (
        lambda x, w: jactri.parameter_jacobian(NET, x, "0.weight", create_graph=True).variance({"0.weight": w}),
        leaf(5, 4),
    ),
    "kernel": (lambda x, w: jactri.empirical_ntk(NET, x, w, create_graph=True), leaf(2, 4)),
    "trace of a kernel": (lambda x, w: jactri.empirical_ntk(NET, x, compute="trace", create_graph=True), leaf(1)),
    "ggn": (
        lambda x, w: (jactri.ggn(NET, x, w, params="0.weight", create_graph=True) @ {"0.weight": V})["0.weight"],
        leaf(3, 1),
    ),
    "diagonal of a ggn": (lambda x, w: jactri.ggn(NET, x, w, create_graph=True).diagonal()["0.weight"], leaf(3, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_results_have_their_graph(name):
    call, w = CALLS[name]
    ends = [X, w, *NET.parameters(), *FIELD.parameters()]

    def gradients(made):
        return torch.autograd.grad(made.square().sum(), ends, allow_unused=True)

    want = gradients(call(X, w))
    assert any(g is not None for g in want)
    with torch.no_grad():
        made = call(X, w)
        assert not torch.is_grad_enabled()
    got = gradients(made)
    assert [g is None for g in got] == [g is None for g in want]
    some = [(g, h) for g, h in zip(got, want, strict=True) if g is not None]
    assert_gradients_close(*zip(*some, strict=True), F64, length=100)


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "hessian"])
def test_func_has_a_graph_where_torch_has(name):
    x, w = leaf(4), leaf(4)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            ours = getattr(jactri.func, name)(lambda v: (v**3 * w).sum())(x)
            theirs = getattr(torch.func, name)(lambda v: (v**3 * w).sum())(x)
        assert ours.requires_grad == theirs.requires_grad == grad


def test_nothing_has_a_graph_unless_asked_for():
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert not jactri.vjp(nn.Tanh(), X, X)[1].requires_grad
            assert not jactri.jvp(nn.Tanh(), X, X)[1].requires_grad
            assert not jactri.laplacian(NET, X, leaf(4, 4)).requires_grad
