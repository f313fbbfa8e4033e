"""The networks of the workloads. Each takes a batch, and also one sample without a batch axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEED = 20240501


def frozen(build: Callable[[], nn.Module], seed: int = SEED) -> nn.Module:
    """Build a module from a fixed seed, in eval mode, without gradients for its parameters.

    Parameters that require gradients would make ``torch.func`` record a second graph behind the
    Jacobian; frozen, every contender does its own work only.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build()
    return net.eval().requires_grad_(False)


def mlp(widths: Sequence[int], act: type[nn.Module], last: type[nn.Module] | None = None):
    """Linear layers of the given widths with ``act`` between them and ``last`` at the end."""
    layers: list[nn.Module] = []
    for k, (n, m) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(n, m))
        if k < len(widths) - 2:
            layers.append(act())
    if last is not None:
        layers.append(last())
    return nn.Sequential(*layers)


def conv_classifier() -> nn.Sequential:
    """W5: three convolutions on 3 x 32 x 32, the last two with stride 2, then a Linear to 10."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(-3),
        nn.Linear(64 * 8 * 8, 10),
    )


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity, or beside a 1 x 1 convolution where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(out) for _ in range(2))
        self.beside = nn.Sequential()
        if (channels, stride) != (out, 1):
            self.beside = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.beside(x))


class ResNet18(nn.Module):
    """He et al. 2016, "Deep residual learning for image recognition", table 1, the column of 18 layers.

    Batch norms have random statistics, so that they are not the identity in eval mode.
    """

    def __init__(self, classes: int):
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        ]  # fmt: skip
        widths = (64, 64, 128, 256, 512)
        for k, (channels, out) in enumerate(pairwise(widths)):
            layers += [Residual(channels, out, 1 if k == 0 else 2), Residual(out, out, 1)]
        self.layers = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)
        )
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) if x.dim() == 4 else self.layers(x.unsqueeze(0)).squeeze(0)


def image_to_image() -> nn.Sequential:
    """W6: 1 x 32 x 32 to 1 x 32 x 32 through two hidden layers of 16 channels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 1, 3, padding=1),
    )


class TransformerBlock(nn.Module):
    """W7: a pre-norm block, or post-norm; attention as softmax(QK')V, or fused (`fused=True`)."""

    def __init__(
        self,
        width: int = 64,
        heads: int = 4,
        hidden: int = 256,
        fused: bool = False,
        post: bool = False,
    ):
        super().__init__()
        self.heads, self.fused, self.post = heads, fused, post
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., tokens, width) to the same shape."""
        if self.post:
            x = self.norm1(x + self._attention(x))
            return self.norm2(x + self.down(F.gelu(self.up(x))))
        x = x + self._attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def _attention(self, h: Tensor) -> Tensor:
        q, k, v = (
            lin(h).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for lin in (self.q, self.k, self.v)
        )
        if self.fused:
            a = F.scaled_dot_product_attention(q, k, v)
        else:
            a = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v
        return self.o(a.transpose(-2, -3).flatten(-2))


def encoder(width: int = 384, heads: int = 12, hidden: int = 1536, layers: int = 6) -> nn.Module:
    """Blocks of BERT's kind."""
    blocks = (TransformerBlock(width, heads, hidden, fused=True, post=True) for _ in range(layers))
    return nn.Sequential(*blocks)


class SumOfSquares(nn.Module):
    """pytorch#105220: the sum of squares of each row."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n) to (...)."""
        return (x**2).sum(-1)


def draw(net: nn.Module, samples: int, shape: tuple[int, ...], seed: int = SEED) -> Tensor:
    """Normal samples that keep every ReLU of `net` away from its kink.

    A pre-activation within rounding of zero has a different derivative in float32 and in float64,
    and both are right. Such samples (a few in a hundred) are left out, so that a result
    can be held against float64.
    """
    gen = torch.Generator().manual_seed(seed)
    pool = torch.randn(2 * samples + 8, *shape, generator=gen)
    keep = torch.ones(len(pool), dtype=torch.bool)

    def look(_module, args):
        nearest = args[0].abs().flatten(1).amin(1)
        keep.logical_and_(nearest > 2e-6)

    hooks = [m.register_forward_pre_hook(look) for m in net.modules() if isinstance(m, nn.ReLU)]
    if hooks:
        with torch.no_grad():
            net(pool)
    for hook in hooks:
        hook.remove()
    if int(keep.sum()) < samples:
        raise ValueError(f"only {int(keep.sum())} of {len(pool)} samples are clear of a ReLU kink")
    return pool[keep][:samples].clone()


class FourierBlock(nn.Module):
    """Li et al. 2021, arXiv:2010.08895: the lowest modes mixed by weights, beside a 1 x 1 convolution."""

    def __init__(self, channels: int, modes: int):
        super().__init__()
        self.modes = modes
        self.lift, self.beside = nn.Conv2d(1, channels, 1), nn.Conv2d(channels, channels, 1)
        self.project = nn.Conv2d(channels, 1, 1)
        self.weight = nn.Parameter(torch.randn(channels, channels, modes, modes, 2) / channels)

    def forward(self, x: Tensor) -> Tensor:
        h, m = self.lift(x), self.modes
        spectrum = torch.fft.rfft2(h)
        mixed = torch.zeros_like(spectrum)
        weight = torch.view_as_complex(self.weight)
        mixed[..., :m, :m] = torch.einsum("nixy,ioxy->noxy", spectrum[..., :m, :m], weight)
        return self.project(F.gelu(torch.fft.irfft2(mixed, s=h.shape[-2:]) + self.beside(h)))
