"""Networks for tests of `jactri.overrides`, and the same written with ``.detach()`` or an ``autograd.Function``."""

import torch
from common import F64
from torch import nn
from torch.nn import functional as F


def draw(*shape):
    return torch.randn(shape, dtype=F64)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


class Sloped(torch.autograd.Function):
    """``y``, whose derivative in ``x`` is given."""

    @staticmethod
    def forward(ctx, x, y, slope):
        ctx.save_for_backward(slope)
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None


def sloped(x, y, slope):
    return Sloped.apply(x, y.detach(), torch.as_tensor(slope, dtype=x.dtype).expand(y.shape))


def over(x, y):
    return torch.where(x == 0, 0.0, y / x).detach()


class Rms(nn.Module):
    """As language models write it."""

    def __init__(self):
        super().__init__()
        self.weight, self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, 4)), False

    def forward(self, x):
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * (x * (r.detach() if self.frozen else r))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.frozen = nn.Linear(4, 12), False

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        p = (q @ k.mT / 2).softmax(-1)
        return (p.detach() if self.frozen else p) @ v


class Gelu(nn.Module):
    """With the derivative y / x, where ``frozen``."""

    frozen = False

    def forward(self, x):
        y = F.gelu(x)
        return sloped(x, y, over(x, y)) if self.frozen else y


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.up, self.act, self.down = (
            Rms(), Attention(), nn.Linear(4, 5), Gelu(), nn.Linear(5, 4),
        )  # fmt: skip

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.down(self.act(self.up(self.norm(x))))


def frozen(net):
    """What ``ALL`` makes of it."""
    for m in net.modules():
        if hasattr(m, "frozen"):
            m.frozen = True
    return net


def f_soft(x):
    return x.softmax(-1) * x
