"""The diagonal of the Jacobian against torch's in float64, its flops and its memory."""

import itertools

import pytest
import torch
from common import F64, Cube, unfollowed
from tolerances import assert_close, assert_gradients_close
from torch import nn
from torch.autograd.functional import jacobian as truth_of
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import jactri
from jactri._src.base.cache import Cache
from jactri._src.meet import diagonal as module


def mlp(*widths):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = mlp(6, 9, 6), mlp(6, 7, 7, 6)

    def forward(self, x):
        x = x + self.first(x)
        return x * 2 + self.second(x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v))


def shift(x):
    """A convolution in which no output sees the input at its own place."""
    return F.conv1d(x, torch.tensor([[[0.0, 0.0, 1.0]]], dtype=x.dtype), padding=1)


CASES = {
    "mlp": (lambda: mlp(5, 8, 8, 5), (3, 5)),
    "one hidden layer": (lambda: mlp(5, 8, 5), (3, 5)),
    "one point": (lambda: mlp(5, 8, 5), (5,)),
    "one sample": (lambda: mlp(5, 8, 5), (1, 5)),
    "elementwise": (nn.Tanh, (3, 5)),
    "a number": (lambda: lambda x: x**2, ()),
    "residual": (Residual, (3, 6)),
    "images": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1)),
        (2, 2, 9, 8),
    ),
    "shift": (lambda: shift, (2, 1, 9)),
    "attention": (Attention, (2, 3, 4)),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), (5, 4)),
    "transposed": (lambda: lambda x: x.t() * 2 + x.sin(), (4, 4)),
    "only transposed": (lambda: lambda x: x.t() * 2, (4, 4)),
    "linear": (lambda: nn.Linear(5, 5), (3, 5)),
    "flat": (lambda: nn.Sequential(nn.Flatten(), mlp(12, 7, 12), nn.Unflatten(1, (3, 4))), (2, 3, 4)),
    "views across": (lambda: lambda x: x.view(2, 3).sin().reshape(6) + x.view(3, 2).t().reshape(6) ** 2, (6,)),
    "sum": (lambda: lambda x: x.sum(0, keepdim=True).expand(3, 5) * x, (3, 5)),
    "softmax": (lambda: nn.Softmax(-1), (3, 5)),
    "custom": (lambda: Cube.apply, (3, 2)),
    "itself": (lambda: lambda x: x, (3, 4)),
}  # fmt: skip


def case(name, dtype=F64):
    maker, shape = CASES[name]
    torch.manual_seed(0)
    func = maker()
    if isinstance(func, nn.Module):
        func = func.to(dtype)
    return func, torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype)


def truth(func, x, **options):
    if isinstance(func, nn.Module):
        func = func.double()
    x = x if options else x.double()
    n = x.numel()
    with sdpa_kernel(SDPBackend.MATH):  # torch cannot differentiate its fused attention twice
        return truth_of(func, x, **options).reshape(n, n).diagonal().reshape(x.shape)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_against_the_jacobian(name, dtype):
    func, x = case(name, dtype)
    got = jactri.diagonal(func, x)
    assert got.dtype == dtype and not got.requires_grad
    assert_close(got, truth(func, x), dtype, length=100)


@pytest.mark.parametrize("name", CASES)
def test_every_order_in_every_chunk(name, monkeypatch):
    func, x = case(name)
    want, found = truth(func, x), module._found
    jactri.diagonal(func, x)
    for k in range(5):
        seen = []

        def only(graph, k=k, seen=seen):
            seen[:] = found(graph)[k : k + 1]
            return seen or found(graph)[:1]

        with monkeypatch.context() as patch:
            patch.setattr(module, "_found", only)
            for chunk_size in (None, 1, 2, 3, 7):
                patch.setattr(module, "_known", Cache())
                got = jactri.diagonal(func, x, chunk_size=chunk_size)
                assert_close(got, want, F64, length=100)
        if not seen:
            break
    assert k >= 2


def test_what_is_chosen():
    def best(name):
        func, x = case(name)
        module._known.clear()
        jactri.diagonal(func, x)
        return next(iter(module._known.values()))[0]

    assert best("elementwise").sweeps[0].columns() == 1
    way = best("images")  # 5 x 5 pixels are seen, in 2 channels
    assert way.masks and way.sweeps[0].columns() == 5 * 5 * 2


def flops_of(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_the_last_product_is_contracted():
    """n-h-h-n: W1 and W3 are seeds, one product with W2 is all that is done beside the contraction."""
    n, h, samples = 40, 64, 32
    func, x = mlp(n, h, h, n).double(), torch.randn(samples, n, dtype=F64)
    forward = 2 * samples * (2 * n * h + h * h)
    contraction = 2 * samples * n * h
    assert (
        flops_of(lambda: jactri.diagonal(func, x)) - forward
        <= 2 * samples * n * h * h + contraction
    )
    J = flops_of(lambda: jactri.jacobian(func, x, per_sample=True))
    assert J - forward == 2 * samples * n * (h * h + n * h)


def test_memory():
    """J would take 33 MB, and 2 MB a sample."""
    func, x = mlp(512, 64, 64, 512).double(), torch.randn(16, 512, dtype=F64)
    want = jactri.diagonal(func, x)
    assert_close(jactri.diagonal(func, x, memory_limit="1MB"), want, F64, length=100)
    with pytest.raises(ValueError, match=r"takes .* and memory_limit is 1 kB"):
        jactri.diagonal(func, x, memory_limit=1000)


@pytest.mark.parametrize(
    "name", ["mlp", "residual", "images", "attention", "elementwise", "transposed"]
)
def test_create_graph(name):
    func, x = case(name)
    x.requires_grad_()
    got = jactri.diagonal(func, x, True)
    want = truth(func, x, create_graph=True)
    c = torch.randn(x.shape, dtype=F64)
    wrt = (x, *(func.parameters() if isinstance(func, nn.Module) else ()))
    ours = torch.autograd.grad((got * c).sum(), wrt, allow_unused=True)
    theirs = torch.autograd.grad((want * c).sum(), wrt, allow_unused=True)
    assert_gradients_close(ours, theirs, F64, length=200)
    chunked = jactri.diagonal(func, x, True, chunk_size=2)
    again = torch.autograd.grad((chunked * c).sum(), wrt, allow_unused=True)
    assert_gradients_close(again, theirs, F64, length=200)
    assert x.grad is None


def test_graphs_that_cannot_be_read():
    func = lambda x: unfollowed(torch.fft.fft(x.exp())).abs()  # noqa: E731
    x = torch.randn(2, 5, dtype=F64)
    for chunk_size in (None, 3):
        assert_close(
            jactri.diagonal(func, x, chunk_size=chunk_size), truth(func, x), F64, length=20
        )


def test_inside_of_transforms():
    func, x = case("mlp")
    want = jactri.diagonal(func, x)
    assert_close(torch.func.vmap(lambda row: jactri.diagonal(func, row))(x), want, F64, length=20)
    got = torch.func.grad(lambda a: jactri.diagonal(func, a).pow(2).sum())(x)
    x.requires_grad_()
    (ours,) = torch.autograd.grad(jactri.diagonal(func, x, True).pow(2).sum(), x)
    assert_close(ours, got, F64, length=200)


def test_nothing_to_do():
    x = torch.randn(3, 4, dtype=F64)
    assert torch.equal(jactri.diagonal(lambda v: torch.ones_like(v), x), torch.zeros_like(x))
    assert jactri.diagonal(mlp(4, 5, 4).double(), torch.zeros(0, 4, dtype=F64)).shape == (0, 4)
    output, made = jactri.diagonal(torch.sin, x, return_output=True)
    assert torch.equal(output, x.sin()) and torch.equal(made, x.cos())
    with torch.inference_mode():
        assert torch.equal(jactri.diagonal(torch.sin, x), x.cos())
    linear = nn.Linear(4, 4).double()
    jactri.diagonal(linear, x).zero_()  # the caller's own memory
    assert linear.weight.detach().diagonal().all()


def test_errors():
    func, x = case("mlp")
    with pytest.raises(RuntimeError, match=r"of the shape of x, \(3, 5\), got \(3,\)"):
        jactri.diagonal(lambda v: v.sum(1), x)
    with pytest.raises(RuntimeError, match="floating point"):
        jactri.diagonal(func, x.long())
    with pytest.raises(TypeError, match="tuple of 2"):
        jactri.diagonal(lambda v: (v, v), x)
    with pytest.raises(TypeError, match="x of diagonal must be a tensor"):
        jactri.diagonal(func, (x,))
    with pytest.raises(ValueError, match="chunk_size"):
        jactri.diagonal(func, x, chunk_size=0)
