"""gradient, laplacian and bilaplacian against float64 Hessians of torch.func and torch.autograd."""

import contextlib
import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import ALL
from common import F64, Cube, make
from tolerances import assert_close, assert_gradients_close, length_of
from torch import nn
from torch.func import hessian, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import jactri
from jactri.operators import forward
from jactri.operators import laplacian as calls
from jactri.operators.curves import UnknownCurvature, read_curves
from jactri.operators.points import Options

pytestmark = pytest.mark.usefixtures("one_thread")

F32 = torch.float32


def mlp(act, *sizes):
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1]).double()


def one_sample(f):
    return lambda v: f(v.unsqueeze(0)).squeeze(0)


def second(f, x):
    """``(N, *out, n, n)``: the Hessians of samples, by torch.func."""
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        h = vmap(hessian(one_sample(f)))(x)
    n = x[0].numel()
    return h.reshape(*h.shape[: h.dim() - 2 * (x.dim() - 1)], n, n)


def truth(f, x):
    return second(f, x).diagonal(0, -2, -1).sum(-1)


def first(f, x):
    with sdpa_kernel(SDPBackend.MATH):
        return vmap(jacrev(one_sample(f)))(x)


def known(f, x):
    """Whether the forward Laplacian covers a function, and needs no Hessian."""
    x = x.clone().requires_grad_()
    try:
        read_curves(f(x), x)
    except UnknownCurvature:
        return False
    return True


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        h = h + F.silu(self.b(h))
        return self.c(h + torch.sin(self.b(h)))


class Attention(nn.Module):
    """Tokens (N, T, d) by hand, or by torch's fused op."""

    def __init__(self, fused=True):
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(4, 12), nn.Linear(4, 4), nn.LayerNorm(4)
        self.fused = fused

    def forward(self, x):
        n, t, d = x.shape
        q, k, v = (
            p.reshape(n, t, 2, 2).transpose(1, 2) for p in self.qkv(self.norm(x)).chunk(3, -1)
        )
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(-1, -2) * 0.7, -1) @ v
        return x + self.out(y.transpose(1, 2).reshape(n, t, d))


class ByHand(nn.Module):
    """A layer norm by its parts: torch's own has a wrong third derivative (its statistics are constants there)."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        unit = x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return unit * self.weight + self.bias


def with_norms_by_hand(net):
    """The same network, sharing its parameters."""
    twin = copy.copy(net)
    twin._modules = {
        k: ByHand(m) if isinstance(m, nn.LayerNorm) else m for k, m in net._modules.items()
    }
    return twin


class Gated(nn.Module):
    """Products and quotients of what depends on the input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x):
        a, b = torch.tanh(self.a(x)), F.softplus(self.b(x))
        return a * b + a / (1 + b) + torch.addcmul(a, a, b, value=0.3)


def deep_norms():
    return nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 3)
    )


def groups():
    return nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten())


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Softplus(), nn.AvgPool2d(2), nn.Conv2d(3, 2, 1), nn.Tanh(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2),
    )  # fmt: skip


NETWORKS = {
    "residual": (Residual, (5, 4)),
    "norms": (deep_norms, (5, 4)),
    "groups": (groups, (3, 2, 4)),
    "conv": (conv, (2, 1, 6, 6)),
    "attention": (Attention, (2, 3, 4)),
    "attention_by_hand": (lambda: Attention(False), (2, 3, 4)),
    "gated": (Gated, (5, 4)),
    "eval_batch_norm": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh()).eval(), (3, 4)
    ),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5)).eval(), (3, 4)),
}  # fmt: skip

FUNCTIONS = {
    "sum": lambda x: x.sum(1),
    "square": lambda x: (x * x).sum(1),
    "elementwise": lambda x: torch.sin(x) * torch.exp(-x * x),
    "softmax": lambda x: torch.softmax(torch.sin(x), 1),
    "log_softmax": lambda x: torch.log_softmax(x * x, 1),
    "logsumexp": lambda x: torch.logsumexp(torch.sin(x), 1),
    "length": lambda x: x.norm(dim=1),
    "normalize": lambda x: F.normalize(torch.tanh(x), dim=-1),
    "einsum": lambda x: torch.einsum("ni,nj,nk->nijk", x, torch.sin(x), x).sum(3),
    "outer": lambda x: x.unsqueeze(2) @ torch.cos(x).unsqueeze(1),
    "bmm_of_itself": lambda x: (
        (x.unsqueeze(2) * x.unsqueeze(1)) @ (x.unsqueeze(2) + x.unsqueeze(1))
    ),
    "cat": lambda x: torch.cat([x, torch.sin(x), x[:, :1] * x[:, 1:2]], 1),
    "index": lambda x: torch.tanh(x)[:, [2, 0, 0]] * x[:, 1:2],
    "maximum": lambda x: torch.maximum(x**3, x * 0.5),
    "where": lambda x: torch.where(x > 0, x**2, torch.exp(x)),
    "transposed_batch": lambda x: (torch.sin(x.t()) * x.t()).t().contiguous(),
    "pow": lambda x: (x * x + 1) ** (torch.sin(x)),
    "hypot": lambda x: torch.hypot(x[:, :1], x[:, 1:]) + torch.atan2(x[:, 1:], x[:, :1]),
    "logaddexp": lambda x: torch.logaddexp(x, x.flip(1)),
    "lerp": lambda x: torch.lerp(x, x**2, torch.sigmoid(x)),
    "in_place": lambda x: x.clone().mul_(1.5).tanh_(),
    "var": lambda x: x.sin().var(1),
    "prod": lambda x: x.prod(1),
    "glu": lambda x: F.glu(x, 1),
    "logcumsumexp": lambda x: x.logcumsumexp(1)[:, 1:],
    "python": lambda x: Cube.apply(torch.sin(x)),
    "constant": lambda x: x.detach() * 2,
    "partly": lambda x: torch.stack([x.sum(1), x.new_ones(len(x))], 1),
    "identity": lambda x: x,
    "complex": lambda x: torch.fft.rfft(torch.sin(x)).abs(),
}
BY_HESSIAN = {"var", "prod", "glu", "logcumsumexp", "python"}


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
    if name != "complex":
        assert known(f, x) == (name not in BY_HESSIAN)


def scale_of(t):
    """Second derivatives cancel: errors are measured beside the larger of them and 1."""
    return max(t.abs().max().item() if t.numel() else 1.0, 1.0)


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
    if case.poison is False or f(x).numel() == 0:
        pytest.skip("nothing to compare")

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


@pytest.mark.parametrize("options", [
    {"chunk_size": 1}, {"chunk_size": 2}, {"memory_limit": 4000}, {"memory_limit": "1MB"}, {"backend": "torch"},
])  # fmt: skip
@pytest.mark.parametrize("shape", [(9, 4), (1, 4), (4,)])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks(options, shape, weighted):
    torch.manual_seed(0)
    net, x = make(Residual), torch.randn(shape, dtype=F64)
    weight = torch.randn(4, 4, dtype=F64) if weighted else None
    h = second(net, x if len(shape) == 2 else x.unsqueeze(0))
    a = torch.eye(4, dtype=F64) if weight is None else weight
    want = (h * a).sum((-2, -1))
    y, jacobian, lap = jactri.laplacian(net, x, weight, return_lower=True, **options)
    assert_close(lap, want.reshape(lap.shape), F64, length=100)
    assert_close(jacobian, jactri.gradient(net, x), F64, length=100)
    assert_close(y, net(x), F64)


def test_chunks_of_samples_are_taken(monkeypatch):
    """Samples in ranges, of which the last is shorter."""
    torch.manual_seed(0)
    lengths = []
    narrowed = forward.narrowed

    def noted(graph, curves, where, start, length):
        lengths.append(length)
        return narrowed(graph, curves, where, start, length)

    monkeypatch.setattr(calls, "narrowed", noted)
    monkeypatch.setattr(calls, "CACHE_BYTES", 1)
    monkeypatch.setattr(calls, "ROWS", 20)
    for name in ("residual", "norms", "groups", "attention", "conv"):
        build, shape = NETWORKS[name]
        net, x = make(build), torch.randn(11, *shape[1:], dtype=F64)
        lengths.clear()
        _y, jacobian, lap = jactri.laplacian(net, x, return_lower=True)
        assert len(set(lengths[1:])) == 2 or len(lengths) > 11, lengths
        assert_close(lap, truth(net, x), F64, length=1000)
        assert_close(jacobian, first(net, x), F64, length=100)


def test_a_limit_that_is_too_small():
    with pytest.raises(ValueError, match="one direction of one sample needs"):
        jactri.laplacian(mlp(nn.Tanh, 4, 50, 50, 1), torch.randn(3, 4, dtype=F64), memory_limit=500)


# -- weights ----------------------------------------------------------------------------------------


def low_rank(n, r, batch=()):
    b = torch.randn(*batch, n, r, dtype=F64)
    return b @ b.mT


WEIGHTS = {
    "random": lambda: torch.randn(4, 4, dtype=F64),
    "identity": lambda: torch.eye(4, dtype=F64),
    "rank_1": lambda: low_rank(4, 1),
    "rank_2": lambda: low_rank(4, 2),
    "zero": lambda: torch.zeros(4, 4, dtype=F64),
    "negative": lambda: -low_rank(4, 3),
    "indefinite": lambda: low_rank(4, 1) - low_rank(4, 1),
    "per_sample": lambda: torch.randn(5, 4, 4, dtype=F64),
    "per_sample_rank_1": lambda: low_rank(4, 1, (5,)),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_weights(name, create_graph):
    torch.manual_seed(0)
    net, x, weight = make(Residual), torch.randn(5, 4, dtype=F64), WEIGHTS[name]()
    form = weight if weight.dim() == 2 else weight.unsqueeze(1)
    want = (second(net, x) * form).sum((-2, -1))
    _y, jacobian, lap = jactri.laplacian(net, x, weight, create_graph, return_lower=True)
    assert_close(lap, want, F64, length=400, scale=scale_of(want))
    assert_close(jacobian, first(net, x), F64, length=100)


def test_a_low_rank_pushes_fewer_columns(monkeypatch):
    torch.manual_seed(0)
    seen = []
    run = forward.Run.__call__

    def noted(self, directions):
        seen.append(None if directions is None else directions.shape[0])
        return run(self, directions)

    monkeypatch.setattr(forward.Run, "__call__", noted)
    net, x = mlp(nn.Tanh, 6, 8, 1), torch.randn(3, 6, dtype=F64)
    jactri.laplacian(net, x, low_rank(6, 2))
    jactri.laplacian(net, x)
    jactri.laplacian(net, x, torch.zeros(6, 6, dtype=F64))
    assert seen == [2, None]


def test_weight_of_an_image_and_of_a_point():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 2, dtype=F64)
    net = nn.Sequential(nn.Flatten(), mlp(nn.Tanh, 4, 5, 2))
    a = torch.randn(2, 2, 2, 2, dtype=F64)
    want = (second(net, x) * a.reshape(4, 4)).sum((-2, -1))
    assert_close(jactri.laplacian(net, x, a), want, F64, length=100)
    point = torch.randn(4, dtype=F64)
    inner = mlp(nn.Tanh, 4, 5, 2)
    want = (hessian(inner)(point) * a.reshape(4, 4)).sum((-2, -1))
    assert_close(jactri.laplacian(inner, point, a.reshape(4, 4)), want, F64, length=100)


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradient_in_the_weight(per_sample):
    """Also where eigenvalues are alike, as an identity's are."""
    torch.manual_seed(0)
    net, x = mlp(nn.Tanh, 3, 6, 1), torch.randn(4, 3, dtype=F64)
    a = torch.eye(3, dtype=F64).expand(4, 3, 3).clone() if per_sample else torch.eye(3, dtype=F64)
    a.requires_grad_()
    lap = jactri.laplacian(net, x, a, create_graph=True)
    (got,) = torch.autograd.grad(lap.sum(), a)
    want = second(net, x).squeeze(1)
    assert_close(got, want if per_sample else want.sum(0), F64, length=100)


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


def hand(net, x):
    """The Laplacian by autograd, differentiable."""
    y = net(x)
    columns = []
    for piece in y.reshape(len(x), -1).unbind(1):
        (g,) = torch.autograd.grad(piece.sum(), x, create_graph=True)
        total = 0
        for i, entry in enumerate(g.reshape(len(x), -1).unbind(1)):
            (h,) = torch.autograd.grad(entry.sum(), x, create_graph=True, allow_unused=True)
            total = total + (0 if h is None else h.reshape(len(x), -1)[:, i])
        columns.append(total)
    return torch.stack(columns, 1).reshape(y.shape)


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


# -- shapes and bystanders --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1])
def test_no_samples_and_one(n):
    net, x = make(Residual), torch.randn(n, 4, dtype=F64)
    for create_graph in (False, True):
        y, jacobian, lap = jactri.laplacian(net, x, None, create_graph, return_lower=True)
        assert y.shape == lap.shape == (n, 2) and jacobian.shape == (n, 2, 4)
        if n:
            assert_close(lap, truth(net, x), F64)
    assert jactri.laplacian(net, x, torch.eye(4, dtype=F64)).shape == (n, 2)
    assert jactri.gradient(net, x).shape == (n, 2, 4)
    assert jactri.bilaplacian(net, x).shape == (n, 2)


@pytest.mark.parametrize("size", [(), (1,), (5,)])
def test_points(size):
    x = torch.randn(size, dtype=F64)

    def f(v):
        return torch.stack([(v**3).sum(), torch.sin(v).sum() ** 2])

    _y, jacobian, lap = jactri.laplacian(f, x, return_lower=True)
    assert jacobian.shape == (2, *size)
    n = max(x.numel(), 1)
    want = hessian(f)(x).reshape(2, n, n).diagonal(0, -2, -1).sum(-1)
    assert_close(lap, want, F64, scale=scale_of(want))


def test_strided_inputs_and_bystanders():
    net = mlp(nn.Tanh, 4, 5, 2)
    base = torch.randn(4, 12, dtype=F64)
    x = base.t()[::2]
    x_before, state = base.clone(), torch.get_rng_state()
    lap = jactri.laplacian(net, x)
    assert_close(lap, truth(net, x.contiguous()), F64, length=50)
    assert torch.equal(base, x_before) and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    leaf = torch.randn(3, 4, dtype=F64, requires_grad=True)
    jactri.laplacian(net, leaf, create_graph=True)
    assert leaf.grad is None


def test_multi_axis_in_and_out():
    torch.manual_seed(0)
    net, x = make(Attention), torch.randn(2, 3, 4, dtype=F64)
    _y, jacobian, lap = jactri.laplacian(net, x, return_lower=True)
    assert jacobian.shape == (2, 3, 4, 3, 4) and lap.shape == (2, 3, 4)


def test_inference_mode_and_transforms():
    net, x = mlp(nn.Tanh, 3, 5, 2), torch.randn(4, 3, dtype=F64)
    want = truth(net, x)
    with torch.inference_mode():
        assert_close(jactri.laplacian(net, x), want, F64, length=50)
        assert jactri.bilaplacian(net, x).shape == jactri.gradient(net, x).shape[:2]
    stacked = torch.stack([x, 2 * x])
    got = vmap(lambda v: jactri.laplacian(net, v))(stacked)
    assert_close(got[1], truth(net, 2 * x), F64, length=50)
    points = vmap(lambda v: jactri.laplacian(net, v))(x)
    assert_close(points, want, F64, length=50)
    a = torch.randn(3, 3, dtype=F64)
    got = vmap(lambda v: jactri.laplacian(net, v, a, return_lower=True)[2])(x)
    assert_close(got, (second(net, x) * a).sum((-2, -1)), F64, length=50)
    assert vmap(lambda v: jactri.bilaplacian(net, v))(x).shape == (4, 2)
    assert_close(vmap(lambda v: jactri.gradient(net, v))(x), first(net, x), F64, length=50)


def test_samples_by_a_loop_are_proven_by_a_probe():
    net, x = mlp(nn.Tanh, 3, 5, 2), torch.randn(4, 3, dtype=F64)
    got = jactri.laplacian(lambda v: torch.stack([net(r) for r in v]), x)
    assert_close(got, truth(net, x), F64, length=50)


# -- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [jactri.gradient, jactri.laplacian, jactri.bilaplacian])
def test_bad_input(call):
    net, x = mlp(nn.Tanh, 3, 5, 2), torch.randn(4, 3, dtype=F64)
    with pytest.raises(RuntimeError, match=r"int64.*x\.float\(\)"):
        call(net, torch.ones(4, 3, dtype=torch.long))
    with pytest.raises(TypeError, match="must be a tensor, got <class 'list'>"):
        call(net, [1.0])
    with pytest.raises(TypeError, match="one tensor, got a tuple of 2"):
        call(lambda v: (v, v), x)
    with pytest.raises(TypeError, match="must be a Tensor"):
        call(lambda v: 1.0, x)
    with pytest.raises(
        RuntimeError, match=r"must return a floating-point tensor, got torch\.int64"
    ):
        call(lambda v: v.long(), x)
    with pytest.raises(ValueError, match=r"\(4, 3\).*returned shape \(\)"):
        call(lambda v: net(v).sum(), x)
    with pytest.raises(RuntimeError, match=r"samples mix: the op (Mean|Sub|Sum|Expand)"):
        call(lambda v: torch.tanh(v - v.mean(0)), x)
    with pytest.raises(ValueError, match="chunk_size"):
        call(net, x, chunk_size=0)
    with pytest.raises(ValueError, match="memory_limit"):
        call(net, x, memory_limit="much")
    with pytest.raises(ValueError, match="backend"):
        call(net, x, backend="cublas")


def test_bad_weights():
    net, x = mlp(nn.Tanh, 3, 5, 2), torch.randn(4, 3, dtype=F64)
    with pytest.raises(ValueError, match=r"\(3, 3\) or \(4, 3, 3\).*got \(2, 2\)"):
        jactri.laplacian(net, x, torch.eye(2, dtype=F64))
    with pytest.raises(ValueError, match=r"\(3, 3\) for x of shape \(3,\)"):
        jactri.laplacian(net, x[0], torch.eye(3, dtype=F64).expand(4, 3, 3))
    with pytest.raises(RuntimeError, match=r"float64.*got torch\.float32"):
        jactri.laplacian(net, x, torch.eye(3))
    with pytest.raises(TypeError, match="weight must be a tensor"):
        jactri.laplacian(net, x, 2.0)


def test_a_fallback_is_refused_where_that_is_asked():
    x = torch.randn(3, 4, dtype=F64)
    with jactri.fallback("error"), pytest.raises(jactri.FallbackError, match="ProdBackward1"):
        jactri.laplacian(FUNCTIONS["prod"], x)
    with jactri.fallback("error"), contextlib.nullcontext():
        jactri.laplacian(FUNCTIONS["softmax"], x)


# -- what is computed -------------------------------------------------------------------------------


def test_rows_of_the_products():
    """n + 1 rows a sample through every Linear layer but the first, which has none."""
    from torch.utils.flop_counter import FlopCounterMode

    n, samples, width = 3, 8, 16
    net, x = mlp(nn.Tanh, n, width, width, width, 1), torch.randn(samples, n, dtype=F64)
    leaf = x.clone().requires_grad_()
    y = net(leaf)
    jactri.laplacian(net, x)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        calls.of_output(y, leaf, None, Options(False, None, None, "torch"), True)
    rows = (n + 1) * samples
    assert counter.get_total_flops() == 2 * rows * (2 * width * width + width)
