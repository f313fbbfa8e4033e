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
    assert not jactri.jacobian_of(y.sum(), view).any(), "autograd too sees no path through the view"


def test_jacobian_of_an_independent_pair():
    x, w = x3().requires_grad_(), x3().requires_grad_()
    y = x.sin()
    assert not jactri.jacobian_of(y, w).any()
    with pytest.raises(RuntimeError, match="independent"):
        jactri.jacobian_of(y, w, strict=True)


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
