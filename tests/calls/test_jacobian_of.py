"""jactri.jacobian_of: outputs that are already computed, and a graph that stays usable."""

import pytest
import torch
from common import F64, MODES, make, x3, x23
from tolerances import assert_close
from torch import nn

import jactri


@pytest.mark.parametrize("mode", MODES)
def test_jacobian_of_leaves_and_intermediates(mode):
    x = x23().requires_grad_()
    h = torch.tanh(x * 2)
    y = (h * x).cumsum(1)
    z = y.sum(0)
    js = jactri.jacobian_of((y, z), (x, h), strategy=mode)
    for out, row in zip((y, z), js, strict=True):
        for wrt, j in zip((x, h), row, strict=True):
            rows = [
                torch.autograd.grad(e, wrt, retain_graph=True)[0] for e in out.reshape(-1).unbind()
            ]
            assert_close(j, torch.stack(rows).reshape(out.shape + wrt.shape), F64, length=36)
    assert jactri.jacobian_of(y, x).shape == (2, 3, 2, 3)
    assert isinstance(jactri.jacobian_of((y,), x), tuple)
    assert isinstance(jactri.jacobian_of(y, (x,)), tuple)


def test_jacobian_of_leaves_the_graph_usable():
    net = make(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x = x23().requires_grad_()
    y = net(x)
    first = jactri.jacobian_of(y, x)
    assert_close(jactri.jacobian_of(y, x, strategy="forward-mode"), first, F64, length=32)
    assert x.grad is None
    assert all(p.grad is None for p in net.parameters())
    y.square().sum().backward()
    assert x.grad is not None
    assert net[0].weight.grad is not None
    truth = torch.autograd.functional.jacobian(net, x.detach())
    assert_close(first, truth, F64, length=32)


def test_jacobian_of_parameters():
    net = make(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    params = tuple(net.parameters())
    y = net(x23())
    js = jactri.jacobian_of(y, params)
    for p, j in zip(params, js, strict=True):
        rows = [torch.autograd.grad(e, p, retain_graph=True)[0] for e in y.reshape(-1).unbind()]
        assert_close(j, torch.stack(rows).reshape(y.shape + p.shape), F64, length=32)


def test_jacobian_of_views_of_the_input_itself():
    x = x23().requires_grad_()
    assert_close(jactri.jacobian_of(x, x), torch.eye(6, dtype=F64).reshape(2, 3, 2, 3), F64)
    y = x * 2
    view = y[0]
    z = view.sin()
    row = torch.diag(view.detach().cos())
    assert_close(jactri.jacobian_of(z, view), row, F64)
    assert_close(jactri.jacobian_of(z, y)[:, 0], row, F64)
    with pytest.raises(RuntimeError, match="a view or a copy"):
        jactri.jacobian_of(y.sum(), view)


OUTSIDE = {
    "another leaf": lambda x: (x.sin(), x.clone().detach().requires_grad_()),
    "a view made later": lambda x: (x.sin(), x[0]),
    "a copy": lambda x: (x.sin(), x.clone()),
    "a later tensor": lambda x: (x.sin(), x.sin().exp()),
    "detached": lambda x: (x.detach().sin(), x),
    "another output of the node": lambda x: x.unbind(0)[:2],
    "a complex graph": lambda x: (torch.fft.fft(x).abs(), x * 2),
    "an integer output": lambda x: (x.long(), x),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_inputs_outside_of_the_graph_are_refused_as_by_autograd(name):
    y, x = OUTSIDE[name](x23().requires_grad_())
    with pytest.raises(RuntimeError):
        torch.autograd.grad(y, x, torch.ones_like(y))
    with pytest.raises(
        RuntimeError, match=r"inputs\[0\] of shape .* is not in the graph of outputs"
    ):
        jactri.jacobian_of(y, x)
    with pytest.raises(RuntimeError, match=r"inputs\[1\] of shape"):
        jactri.jacobian_of((x.exp(), y), (x, x.exp()))


def test_blocks_of_independent_pairs_are_zero():
    x, w = x3().requires_grad_(), x3().requires_grad_()
    y, z = x.sin(), w.cos()
    ((yx, yw), (zx, zw)) = jactri.jacobian_of((y, z), (x, w))
    assert not yw.any() and not zx.any()
    assert_close(yx, x.detach().cos().diag(), F64)
    assert_close(zw, -w.detach().sin().diag(), F64)
    with pytest.raises(RuntimeError, match="independent"):
        jactri.jacobian_of((y, z), (x, w), strict=True)
    a, b, _ = torch.stack([y, z, z]).unbind(0)  # one node, of whose outputs two are in the graph
    ((aa, ab),) = jactri.jacobian_of((a * b,), (a, b))
    assert_close(aa, b.detach().diag(), F64)
    assert_close(ab, a.detach().diag(), F64)


@pytest.mark.parametrize("mode", MODES)
def test_jacobian_of_with_create_graph(mode):
    x = x3().requires_grad_()
    y = (x**3).cumsum(0)
    j = jactri.jacobian_of(y, x, create_graph=True, strategy=mode)
    (g,) = torch.autograd.grad(j.sum(), x, retain_graph=True)
    assert_close(g, 6 * x.detach() * torch.tensor([3.0, 2.0, 1.0], dtype=F64), F64)
    y.sum().backward()  # and the graph is still there
    assert_close(x.grad, 3 * x.detach() ** 2 * torch.tensor([3.0, 2.0, 1.0], dtype=F64), F64)


def test_jacobian_of_under_no_grad():
    x = x3().requires_grad_()
    y = x.sin()
    with torch.no_grad():
        j = jactri.jacobian_of(y, x)
    assert_close(j, x.detach().cos().diag(), F64)
    assert not j.requires_grad
