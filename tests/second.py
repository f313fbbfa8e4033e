"""Functions with second derivatives, and what torch makes of these."""

import copy
import itertools
import warnings

import torch
import torch.nn.functional as F
from common import Cube, unfollowed
from torch import nn
from torch.func import hessian, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from jactri._src.second.curves import UnknownCurvature, read_curves


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


def coupling(x):
    """A coupling layer of a flow that writes by a mask."""
    mask = torch.tensor([True, False, True, False])
    y = x.clone()
    y[:, mask] = x[:, mask] * torch.exp(torch.tanh(x[:, ~mask])) + torch.sin(x[:, ~mask])
    return y


def added(x):
    """What index_put and others add to what was there."""
    two, column = torch.tensor([2, 0]), torch.ones(len(x), 1, dtype=torch.long)
    y = torch.sin(x)
    y[:, two] += x[:, :2] ** 2
    y = y.mT.index_put((torch.tensor([0, 3, 0]),), x[:, :3].mT ** 3, accumulate=True).mT
    y = y.index_add(1, two, torch.cos(x[:, :2]), alpha=0.5)
    return y.scatter_add(1, column, x[:, :1] ** 3)


def written(x):
    """What index_copy, scatter and index_fill write over."""
    two, column = torch.tensor([2, 0]), torch.ones(len(x), 1, dtype=torch.long)
    y = torch.sin(x).index_copy(1, two, torch.exp(x[:, 1:3]))
    return y.scatter(1, column, torch.cos(x[:, 2:3])).index_fill(1, two[:1], 3.0)


def sliced(x):
    y = torch.zeros_like(x)
    y[:, ::2] = torch.sin(x[:, 1::2])
    y[:, 1] = x[:, 0] * x[:, 3]
    y[:, 2:] += torch.exp(x[:, 2:])
    return y


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
    "coupling": coupling,
    "added": added,
    "written": written,
    "sliced": sliced,
    "moved": lambda x: (
        F.pad(torch.sin(x), (1, -1))
        .cumsum(1)
        .unsqueeze(1)
        .expand(-1, 3, -1)
        .tril()
        .sum(1)
        .roll(1, 1)
        .flip(1)
    ),
    "picked": lambda x: (
        torch.take_along_dim(x**3, torch.tensor([[1, 1, 0]]).expand(len(x), 3), 1) * x[..., :1]
    ),
    "length_1": lambda x: torch.linalg.vector_norm(x**3, 1, 1),
    "nll": lambda x: F.nll_loss(
        torch.log_softmax(x, 1), torch.full((len(x),), 2), reduction="none"
    ),
    "complex": lambda x: torch.fft.rfft(torch.sin(x)).abs(),
    "by autograd": lambda x: unfollowed(torch.fft.rfft(torch.sin(x))).abs(),
    "linear in complex numbers": lambda x: torch.fft.irfft(
        torch.fft.rfft(torch.sin(x)) * 2j, n=x.shape[-1]
    ).sin(),
}
BY_HESSIAN = {"complex", "var", "prod", "glu", "logcumsumexp", "python"}


def scale_of(t):
    """Second derivatives cancel: errors are measured beside the larger of them and 1."""
    return max(t.abs().max().item() if t.numel() else 1.0, 1.0)


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
