"""Modules with parameters of every kind, and the truth about their Jacobians: a row of autograd at a time."""

import functools

import torch
import torch.nn.functional as F
from common import unfollowed
from torch import nn
from torch.nn.utils import parametrizations

F64 = torch.float64


class Wrap(nn.Module):
    """A module and a function of it and its input."""

    def __init__(self, inner, function):
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x):
        return self.function(self.inner, x)


class Fourier(nn.Module):
    """The lowest modes mixed by weights, which are pairs of reals, written among zeros."""

    def __init__(self):
        super().__init__()
        self.weight, self.beside = nn.Parameter(torch.randn(2, 3, 2, 2)), nn.Linear(2, 3)

    def forward(self, x):
        spectrum = torch.fft.rfft(x, dim=1)
        mixed = spectrum.new_zeros(len(x), spectrum.shape[1], 3)
        weight = torch.view_as_complex(self.weight)
        mixed[:, :2] = torch.einsum("nmi,iom->nmo", spectrum[:, :2], weight)
        return torch.tanh(torch.fft.irfft(mixed, n=x.shape[1], dim=1) + self.beside(x))


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.two = nn.Conv2d(4, 6, 3, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Linear(24, 3)

    def forward(self, x):
        x = torch.tanh(self.one(x))
        return self.last(torch.relu(self.norm(self.two(x))).flatten(1))


class Upward(nn.Module):
    """Transposed, dilated, in three dimensions."""

    def __init__(self):
        super().__init__()
        self.one = nn.ConvTranspose2d(2, 3, 3, stride=2)
        self.two = nn.Conv3d(1, 2, 2, padding=1, dilation=2)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)).unsqueeze(1)).mean((2, 3))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.again, self.last, self.unused = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.again(torch.tanh(self.again(x)))))


class Tied(nn.Module):
    """An autoencoder whose decoder is the transposed encoder."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        return torch.tanh(x @ self.weight.t()) @ self.weight + self.bias


class Language(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.words = nn.Embedding(7, 4, padding_idx=0)
        self.places = nn.Parameter(torch.randn(3, 4))
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.last = nn.Linear(4, 7, bias=False)
        if tied:
            self.last.weight = self.words.weight

    def forward(self, x):
        return self.last(self.layer(self.words(x) + self.places)).mean(1)


class Odd(nn.Module):
    """Scalars, products by broadcast parameters, PReLU, an einsum, a masked softplus, Bilinear, one entry."""

    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(()))
        self.heads, self.slope = nn.Parameter(torch.randn(2, 4, 3)), nn.PReLU(4)
        self.positive = nn.Parameter(torch.randn(3, 4))
        self.register_buffer("mask", torch.rand(3, 4))
        self.pairs = nn.Bilinear(4, 3, 2)

    def forward(self, x):
        x = self.slope(x * self.gain + self.shift)
        x = torch.einsum("bi,hio->bho", x, self.heads).flatten(1)
        x = torch.tanh(x[:, :3] + x[:, 3:])
        return self.pairs(x @ (F.softplus(self.positive) * self.mask), x) * self.gain[1]


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.group = nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4)
        self.layer, self.rms = nn.LayerNorm((4, 3)), nn.RMSNorm(3)
        self.instance = nn.InstanceNorm1d(4, affine=True)

    def forward(self, x):
        return self.rms(self.layer(self.instance(self.group(self.conv(x)))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.queries = nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        queries = self.queries.expand(x.shape[0], 2, 4)
        return self.attention(queries, x, x, need_weights=False)[0].mean(1)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return torch.tanh(x * w)

    @staticmethod
    def backward(ctx, c):
        x, w = ctx.saved_tensors
        d = c * (1 - torch.tanh(x * w) ** 2)
        return d * w, (d * x).sum(0)


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.last(Product.apply(self.first(x), self.weight))


def mlp():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 3))


def _last(module, x):
    return module(x)[0][:, -1]


def _words():
    return torch.tensor([[1, 2, 0], [3, 3, 1], [6, 2, 2], [5, 4, 3]])


def _normal(*shape):
    return lambda: torch.randn(*shape)


# name: the module, its input
CASES = {
    "mlp": (mlp, _normal(4, 3)),
    "tokens": (mlp, _normal(4, 5, 3)),
    "cnn": (lambda: Cnn().eval(), _normal(4, 2, 8, 8)),
    "upward": (Upward, _normal(4, 2, 3, 3)),
    "depthwise": (lambda: nn.Conv2d(2, 4, 3, groups=2, padding=1), _normal(4, 2, 3, 3)),
    "shared": (Shared, _normal(4, 4)),
    "tied": (Tied, _normal(4, 5)),
    "language": (lambda: Language(False).eval(), _words),
    "language tied": (lambda: Language(True).eval(), _words),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(7, 3), nn.Tanh(), nn.Linear(3, 2)), _words),
    "odd": (Odd, _normal(4, 4)),
    "norms": (Norms, _normal(4, 2, 4)),
    "attention": (Attention, _normal(4, 3, 4)),
    "opaque": (Opaque, _normal(4, 3)),
    "gru": (lambda: Wrap(nn.GRU(3, 4, batch_first=True), _last), _normal(4, 5, 3)),
    "lstm": (lambda: Wrap(nn.LSTM(3, 4, batch_first=True), _last), _normal(4, 5, 3)),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
        _normal(4, 3),
    ),
    "spectral norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).eval(),
        _normal(4, 3),
    ),
    "a loop": (
        lambda: Wrap(nn.Linear(3, 2), lambda f, x: torch.stack([f(row).tanh() for row in x])),
        _normal(4, 3),
    ),
    "a number a sample": (
        lambda: Wrap(nn.Linear(3, 4), lambda f, x: f(x).square().sum(-1)), _normal(4, 3)
    ),
    "sums": (lambda: Wrap(nn.Linear(3, 4), lambda f, x: f(x).sum((1, 2))), _normal(4, 2, 3)),
    "complex": (
        lambda: Wrap(nn.Linear(4, 4), lambda f, x: torch.fft.rfft(f(x)).abs()), _normal(4, 4)
    ),
    "fourier": (Fourier, _normal(4, 5, 2)),
    "by autograd": (
        lambda: Wrap(nn.Linear(4, 4), lambda f, x: unfollowed(torch.fft.rfft(f(x))).abs()),
        _normal(4, 4),
    ),
    "weights of the input": (
        lambda: Wrap(nn.Linear(3, 6), lambda f, x: torch.einsum("ni,nio->no", x, f(x).view(-1, 3, 2))),
        _normal(4, 3),
    ),
    "turned": (
        lambda: Wrap(nn.Linear(3, 4), lambda f, x: f(x).t().contiguous().t().tanh()), _normal(4, 3)
    ),
    "a weight a sample": (
        lambda: Wrap(nn.ParameterList([torch.randn(4, 3), torch.randn(1, 3)]), lambda f, x: x * f[0][: len(x)] + f[1]),
        _normal(4, 3),
    ),
    "no input": (
        lambda: Wrap(nn.Linear(3, 4), lambda f, x: f.weight.sum(1).expand(len(x), 4)), _normal(4, 3)
    ),
    "double inside": (
        lambda: Wrap(nn.Linear(3, 4), lambda f, x: f(x).double().exp().to(x.dtype)), _normal(4, 3)
    ),
}  # fmt: skip


def build(name, n=4, dtype=F64):
    make, data = CASES[name]
    torch.manual_seed(0)
    module = make()
    if name == "cnn":  # statistics that are not trivial
        module.norm.running_mean.normal_()
        module.norm.running_var.uniform_(0.5, 2)
    x = data()[:n]
    return module.to(dtype), x.to(dtype) if x.is_floating_point() else x


def rows(module, x, params=None):
    """The Jacobian by a backward pass for every entry of the output."""
    params = dict(module.named_parameters()) if params is None else params
    y = module(x)
    found = {name: [] for name in params}
    for entry in y.reshape(-1):
        grads = torch.autograd.grad(
            entry, list(params.values()), retain_graph=True, allow_unused=True
        )
        for (name, p), g in zip(params.items(), grads, strict=True):
            found[name].append(torch.zeros_like(p) if g is None else g)
    return {
        name: torch.stack(f).reshape(*y.shape, *params[name].shape) for name, f in found.items()
    }


def whole(module, x):
    """The truth as ``(N, m, P)``, and by name."""
    truth, n = rows(module, x), x.shape[0]
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    flat = [truth[name].reshape(n, -1, size) for name, size in sizes.items()]
    return torch.cat(flat, 2), truth


@functools.cache
def truth_of(name, n=4):
    """`whole` of a case, which all of its tests share."""
    return whole(*build(name, n))


def flat(v, lead=0):
    """A dict of tensors as one vector (or a block of them)."""
    return torch.cat([t.reshape(*t.shape[:lead], -1) for t in v.values()], lead)


def like(module, seed=1, positive=False, block=()):
    gen = torch.Generator().manual_seed(seed)
    make = torch.rand if positive else torch.randn
    return {
        name: make((*block, *p.shape), generator=gen, dtype=F64, device=gen.device).to(p.dtype)
        for name, p in module.named_parameters()
    }
