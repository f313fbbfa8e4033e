"""laplacian and gradient of functions and of every op, against float64 Hessians of torch."""

import pytest
import torch
from cases import ALL
from common import F64, make
from second import (
    BY_HESSIAN,
    FUNCTIONS,
    NETWORKS,
    first,
    hand,
    known,
    mlp,
    scale_of,
    truth,
    with_norms_by_hand,
)
from tolerances import assert_close, assert_gradients_close, length_of
from torch import nn
from torch.func import jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

import jactri

pytestmark = pytest.mark.usefixtures("one_thread")

F32 = torch.float32


@pytest.fixture(params=[*NETWORKS, *FUNCTIONS])
def case(request):
    torch.manual_seed(3)
    if request.param in NETWORKS:
        module, shape = NETWORKS[request.param]
        return request.param, make(module), torch.randn(shape, dtype=F64)
    return request.param, FUNCTIONS[request.param], torch.randn(5, 4, dtype=F64)


def test_functions(case):
    name, f, x = case
    if name == "python":
        want = truth(lambda v: torch.sin(v) ** 3, x)
    else:
        want = truth(f, x)
    y, jacobian, lap = jactri.laplacian(f, x, return_lower=True)
    factor = 16 if name == "logcumsumexp" else 1  # torch's own backward of it cancels
    assert_close(lap, want, F64, length=x.numel() * 16, scale=scale_of(want), factor=factor)
    assert_close(y, f(x), F64)
    if name != "python":
        assert_close(jacobian, first(f, x), F64, length=x.numel())
    assert not lap.requires_grad and not jacobian.requires_grad and not y.requires_grad
    if name != "by autograd":
        assert known(f, x) == (name not in BY_HESSIAN)


def test_masked_scatter_of_a_point():
    mask = torch.tensor([False, True, False, True])

    def f(x):
        return torch.sin(x).masked_scatter(mask, x[2:] ** 3)

    x = torch.randn(4, dtype=F64)
    assert known(f, x)
    hessians = [torch.autograd.functional.hessian(lambda v, k=k: f(v)[k], x) for k in range(4)]
    want = torch.stack([h.trace() for h in hessians])
    assert_close(jactri.laplacian(f, x), want, F64, scale=scale_of(want))


ACTIVATIONS = [
    nn.Tanh, nn.Sigmoid, nn.Softplus, nn.SiLU, nn.GELU, lambda: nn.GELU("tanh"), nn.ELU, nn.CELU, nn.SELU, nn.ReLU,
    nn.LeakyReLU, nn.ReLU6, nn.LogSigmoid, nn.Mish, nn.Softsign, nn.Tanhshrink, nn.Hardswish, nn.Hardtanh,
    lambda: nn.Softplus(2.0, 1.5), nn.PReLU, nn.Softshrink,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_mlp_of_every_activation(act, dtype):
    torch.manual_seed(0)
    net = mlp(act, 3, 17, 13, 2)
    x = torch.randn(7, 3, dtype=F64)
    want = hand(net, x.clone().requires_grad_()).detach()
    _y, jacobian, lap = jactri.laplacian(net.to(dtype), x.to(dtype), return_lower=True)
    assert lap.dtype == dtype and lap.shape == (7, 2) and jacobian.shape == (7, 2, 3)
    narrow = F64 if dtype == F64 else F32
    assert_close(lap, want, narrow, length=17 * 13, scale=scale_of(want))


def flat(case):
    """A case of the table as a function of one point, and the point."""
    func, inputs = case.build(F64)
    sizes, shapes = [x.numel() for x in inputs], [x.shape for x in inputs]

    def f(v):
        parts = [p.reshape(s) for p, s in zip(v.split(sizes), shapes, strict=True)]
        y = func(*parts)
        ys = y if isinstance(y, tuple) else (y,)
        return torch.cat([y.reshape(-1) for y in ys if y.dtype.is_floating_point])

    return f, torch.cat([x.reshape(-1) for x in inputs])


TABLE = [
    c
    for c in ALL
    if c.second
    and not c.variant
    and c.twin is None
    and c.inner is None
    and 0 < sum(torch.Size(i.shape).numel() for i in c.inputs) <= 60
    # torch's own second derivative of the transposed convolution's weight fails
    and c.name != "conv_transpose1d_weights_padded_beyond_stride"
]


@pytest.mark.parametrize("case", TABLE, ids=[c.name for c in TABLE])
def test_table_of_ops(case):
    """Every op, of one or several operands, at a single point made of all of them."""
    f, x = flat(case)
    leaf = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        y = f(leaf)
        c = torch.randn(y.shape, dtype=F64)  # the outputs weighed as one number
        if y.requires_grad:
            (g,) = torch.autograd.grad((y * c).sum(), leaf, create_graph=True)
        else:
            g = torch.zeros_like(x)
        rows = [torch.zeros_like(x)]
        if g.requires_grad:
            rows = [
                torch.autograd.grad(p, leaf, retain_graph=True, materialize_grads=True)[0]
                for p in g.unbind()
            ]
    hessians = torch.stack(rows)
    want = hessians.diagonal().sum()
    got = (jactri.laplacian(f, x) * c).sum()
    size = max(scale_of(want), hessians.abs().max().item())
    assert_close(got, want, F64, length=length_of(hessians), factor=16 * case.factor, scale=size)


# -- create_graph -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NETWORKS, "mlp"])
def test_third_derivatives(name):
    """What a PINN trains by: the gradient of a loss of the Laplacian in the parameters, and in x."""
    torch.manual_seed(1)
    build, shape = NETWORKS.get(name, (lambda: mlp(nn.Tanh, 4, 9, 9, 1), (5, 4)))
    net, x = make(build), torch.randn(shape, dtype=F64, requires_grad=True)
    parameters = [*net.parameters(), x]

    def loss(lap, y):
        return (lap - y.sin()).square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        y = net(x)
        theirs = loss(hand(with_norms_by_hand(net), x), y)
        want = torch.autograd.grad(theirs, parameters, allow_unused=True)
    y, _jacobian, lap = jactri.laplacian(net, x, create_graph=True, return_lower=True)
    assert lap.requires_grad and y.requires_grad
    got = torch.autograd.grad(loss(lap, y), parameters, allow_unused=True)
    assert_gradients_close(got, want, F64, length=4000)


@pytest.mark.parametrize("name", sorted(BY_HESSIAN - {"python", "logcumsumexp"}))  # torch: NaN
def test_third_derivatives_by_the_gradients_graph(name):
    torch.manual_seed(1)
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    f = FUNCTIONS[name]
    (want,) = torch.autograd.grad(hand(f, x).square().sum(), x)
    (got,) = torch.autograd.grad(jactri.laplacian(f, x, create_graph=True).square().sum(), x)
    assert_gradients_close([got], [want], F64, length=400, floor=1.0)


def test_create_graph_in_chunks_and_under_no_grad():
    torch.manual_seed(1)
    net, x = mlp(nn.SiLU, 4, 6, 1), torch.randn(3, 4, dtype=F64)
    parameters = list(net.parameters())
    with torch.no_grad():
        whole = jactri.laplacian(net, x, create_graph=True)
        _, jacobian, parts = jactri.laplacian(
            net, x, create_graph=True, return_lower=True, chunk_size=3
        )
    assert_close(parts, whole, F64)
    assert_close(jacobian, jactri.gradient(net, x), F64)
    got = torch.autograd.grad(parts.square().sum(), parameters, allow_unused=True)
    want = torch.autograd.grad(whole.square().sum(), parameters, allow_unused=True)
    assert_gradients_close(got, want, F64, length=100)


def test_training_a_pinn_lowers_its_loss():
    torch.manual_seed(0)
    net = mlp(nn.Tanh, 2, 16, 16, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x = torch.rand(64, 2, dtype=F64)
    losses = []
    for _ in range(40):
        y, _, lap = jactri.laplacian(net, x, create_graph=True, return_lower=True)
        loss = (lap + torch.sin(3 * x[:, :1])).square().mean() + y.mean() ** 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# -- bilaplacian, gradient --------------------------------------------------------------------------


@pytest.mark.parametrize("f, want", [
    (lambda x: (x**4).sum(1), lambda x: 24.0 * x.shape[1] + 0 * x.sum(1)),
    (lambda x: torch.sin(x).prod(1), lambda x: x.shape[1] ** 2 * torch.sin(x).prod(1)),
    (lambda x: torch.exp(x.sum(1)), lambda x: x.shape[1] ** 2 * torch.exp(x.sum(1))),
    (lambda x: (x * x).sum(1) ** 2, lambda x: 8 * x.shape[1] * (x.shape[1] + 2) + 0 * x.sum(1)),
    (lambda x: (x * x).sum(1), lambda x: 0 * x.sum(1)),
    (lambda x: x.sum(1), lambda x: 0 * x.sum(1)),
])  # fmt: skip
def test_bilaplacian_in_closed_form(f, want):
    x = torch.rand(4, 3, dtype=F64) + 0.2
    assert_close(jactri.bilaplacian(f, x), want(x), F64, length=100, scale=100.0)


@pytest.mark.parametrize("act", [nn.Tanh, nn.SiLU, nn.Softplus, nn.GELU, nn.Sigmoid])
def test_bilaplacian_of_networks(act):
    torch.manual_seed(0)
    net, x = mlp(act, 3, 6, 5, 2), torch.randn(4, 3, dtype=F64)
    want = truth(lambda v: truth(net, v), x)
    y, lap, got = jactri.bilaplacian(net, x, return_lower=True)
    assert_close(got, want, F64, length=2000, scale=scale_of(want))
    assert_close(lap, truth(net, x), F64, length=100)
    assert_close(y, net(x), F64)
    point = jactri.bilaplacian(net, x[1])
    assert_close(point, want[1], F64, length=2000, scale=scale_of(want))
    parameters = list(net.parameters())
    made = jactri.bilaplacian(net, x, create_graph=True)
    assert torch.autograd.grad(made.sum(), parameters, allow_unused=True)[0] is not None


def test_gradient(case):
    name, f, x = case
    want = first(lambda v: torch.sin(v) ** 3 if name == "python" else f(v), x)
    y, got = jactri.gradient(f, x, return_lower=True)
    assert_close(got, want, F64, length=x.numel() * 4)
    assert_close(y, f(x), F64)


def test_gradient_of_a_point_and_in_training():
    net = mlp(nn.Tanh, 3, 5, 1)
    x = torch.randn(4, 3, dtype=F64)
    assert jactri.gradient(lambda v: net(v).squeeze(1), x).shape == (4, 3)
    assert jactri.gradient(net, x[0]).shape == (1, 3)
    assert_close(jactri.gradient(net, x[0]), jacrev(net)(x[0]), F64)
    g = jactri.gradient(net, x, create_graph=True)
    assert torch.autograd.grad(g.square().sum(), next(net.parameters()))[0].abs().sum() > 0
