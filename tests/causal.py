"""Attention under masks, and layers of it: for tests of what is made of masks."""

import math

import torch
from common import F64
from torch import nn
from torch.nn.functional import gelu, pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

N, T, D, H = 2, 12, 6, 2
TOKEN = torch.arange(T)
CAUSAL = TOKEN[:, None] >= TOKEN
LOCAL = CAUSAL & (TOKEN[:, None] < TOKEN + 3)


def weights(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=F64, generator=generator) / shape[0] ** 0.5


X = weights(N, T, D, seed=1) * 1.5
QKV, OUT, UP, DOWN = weights(D, 3 * D), weights(D, D), weights(D, 2 * D), weights(2 * D, D)


def written(q, k, v, mask, fill):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (fill(scores, mask)).softmax(-1) @ v


def filled(scores, mask):
    return scores.masked_fill(~mask, -math.inf)


def chosen(scores, mask):
    return torch.where(mask, scores, -1e9)


def block(x, attend=None):
    """A layer of a causal language model."""
    parts = (x @ QKV).unflatten(-1, (3, H, D // H)).permute(2, 0, 3, 1, 4)
    x = x + attend(*parts).transpose(1, 2).flatten(2) @ OUT
    y = nn.functional.layer_norm(x, (D,))
    return x + gelu(y @ UP) @ DOWN


def turned(x):
    """Rotary positions: pairs of features are turned by an angle for each token."""
    angle = torch.arange(x.shape[-2], dtype=F64)[:, None] * 0.3
    return x * angle.cos() + torch.cat([-x[..., 1:], x[..., :1]], -1) * angle.sin()


def few_keys(x):
    """Two heads of queries share the keys and values of one."""
    q, k, v = (x @ QKV).split([D, D, D], -1)
    q, k, v = (t.unflatten(-1, (-1, 2)).transpose(1, 2) for t in (q, k[..., :2], v[..., :2]))
    y = sdpa(turned(q), turned(k), v, is_causal=True, enable_gqa=True)
    return x + y.transpose(1, 2).flatten(2) @ OUT


LONG = torch.tensor([T, 7]).view(N, 1, 1, 1) > TOKEN
PADDED = CAUSAL & LONG | (TOKEN[:, None] == TOKEN)
HEADS = torch.stack([CAUSAL, LOCAL]).expand(N, H, T, T)
NO_ROW = CAUSAL.clone().index_fill(0, torch.tensor(3), False)
FLOAT = weights(T, T).masked_fill(~CAUSAL, -math.inf)
MASKS = {
    "causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "boolean": lambda q, k, v: sdpa(q, k, v, CAUSAL),
    "added": lambda q, k, v: sdpa(q, k, v, FLOAT),
    "filled": lambda q, k, v: written(q, k, v, CAUSAL, filled),
    "where": lambda q, k, v: written(q, k, v, CAUSAL, chosen),
    "local": lambda q, k, v: sdpa(q, k, v, LOCAL),
    "anticausal": lambda q, k, v: sdpa(q, k, v, CAUSAL.T),
    "padded": lambda q, k, v: sdpa(q, k, v, PADDED),
    "by heads": lambda q, k, v: sdpa(q, k, v, HEADS),
    "a row of none": lambda q, k, v: sdpa(q, k, v, NO_ROW),
    "more keys": lambda q, k, v: pad(sdpa(q[:, :, :9], k, v, is_causal=True), (0, 0, 0, 3)),
    "fewer keys": lambda q, k, v: sdpa(q, k[:, :, :8], v[:, :, :8], is_causal=True),
}


PREFIX = CAUSAL | (TOKEN < 5)
EVERY = torch.ones(T, T, dtype=torch.bool)
KEYS = torch.tensor([T, 7]).view(N, 1, 1, 1) > TOKEN
HOLES = torch.rand(N, 1, 1, T, generator=torch.Generator().manual_seed(3)) > 0.4
RANDOM = (torch.rand(T, T, generator=torch.Generator().manual_seed(4)) > 0.7) | (
    TOKEN[:, None] == TOKEN
)
LEFT = CAUSAL & (torch.tensor([0, 5]).view(N, 1, 1, 1) <= TOKEN)
"""Padded before the first token, whose rows see nothing."""


def layers(*masks, attend=sdpa):
    def f(x):
        for mask in masks:
            x = block(x, lambda q, k, v, mask=mask: attend(q, k, v, mask))
        return x

    return f


def by_filling(q, k, v, mask):
    return written(q, k, v, mask, filled)


ORDER = torch.randperm(T, generator=torch.Generator().manual_seed(0))
