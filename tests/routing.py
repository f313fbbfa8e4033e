"""Functions whose rows are picked by index and put back: samples stay apart, and ties along axes do not tell.

Each takes x of shape (4, 6) and an order of its four rows (or eight tokens of three), which another call may change.
"""

import torch
import torch.nn.functional as F
from common import F64

N, D = 4, 6
ORDER = torch.tensor([2, 0, 3, 1])


def weight(rows, columns, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g, dtype=F64) / columns**0.5


W6, W3, V3 = weight(D, D), weight(3, 3), weight(3, 3, 1)


def inverse(order):
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))


def write(y, key, value, accumulate=False):
    keys = key if isinstance(key, tuple) else (key,)
    return y.index_put(keys, value, accumulate=accumulate)


def by_mask(x, i):
    m = torch.arange(x.numel()).reshape(x.shape) % 3 == i[0] % 3
    out = torch.zeros_like(x)
    out[m] = x[m].sin()
    out[~m] = x[~m].square()
    return out


def experts(x, i):
    """Tokens of all samples in one axis, each to one of two experts."""
    tokens = x.reshape(-1, 3)
    out = torch.zeros_like(tokens)
    first = torch.zeros(len(tokens), dtype=torch.bool)
    first[i] = True
    for mask, w in ((first, W3), (~first, V3)):
        where = mask.nonzero().squeeze(1)
        out = out.index_add(0, where, (tokens[where] @ w).tanh())
    return out.reshape(x.shape)


def top_two(x, i):
    """A router that weighs the two best of three experts, as mixtures of experts do."""
    tokens = x.reshape(-1, 3)
    scores = (tokens @ V3).softmax(-1)
    best, which = scores.topk(2, -1)
    best = best / best.sum(-1, keepdim=True)
    out = torch.zeros_like(tokens)
    for e in range(3):
        rows, slot = torch.where(which == e)
        made = (tokens[rows] @ W3.roll(e, 0)).tanh() * best[rows, slot, None]
        out.index_add_(0, rows, made)
    return out.reshape(x.shape)


def capacity(x, i):
    """Tokens put in slots of a buffer an expert, which one batched product serves."""
    buffer = write(x.new_zeros(2, 2, D), (i % 2, i // 2), x)
    made = torch.bmm(buffer, torch.stack([W6, W6.T])).tanh()
    return made[i % 2, i // 2]


def one_hot(x, i):
    """Dispatch by products with zeros and ones."""
    dispatch = F.one_hot(i, N).to(x.dtype)
    return dispatch.T @ (dispatch @ x @ W6).tanh()


def packed(x, i):
    """Rows of a ragged batch in one axis, each sample's normalised by what its rows sum to."""
    owner = torch.arange(N).repeat_interleave(torch.tensor([1, 3, 2, 2]))
    rows = x[owner] * torch.arange(1.0, 9, dtype=x.dtype)[:, None]
    e = rows.cos().exp()
    total = torch.zeros_like(x).index_add(0, owner, e)
    return torch.zeros_like(x).index_add(0, owner, rows * e / total[owner])


def block_attention(x, i):
    """Attention over the tokens of all samples, masked to those of each."""
    t = x.reshape(-1, 3)
    owner = torch.arange(N).repeat_interleave(2)
    apart = owner[:, None] != owner
    scores = ((t @ W3) @ t.T).masked_fill(apart, -torch.inf)
    return (scores.softmax(-1) @ t).reshape(x.shape)


def packed_attention(x, i, added):
    """The same by the fused op, with a mask of booleans or one that is added."""
    t = x.reshape(1, 1, -1, 3)
    owner = torch.arange(N).repeat_interleave(2)
    mask = owner[:, None] == owner
    if added:
        mask = torch.zeros(len(owner), len(owner), dtype=x.dtype).masked_fill(~mask, -torch.inf)
    made = F.scaled_dot_product_attention(t.sin(), t.cos(), t, attn_mask=mask)
    return made.reshape(x.shape)


ROUTED = {
    "rows and back": lambda x, i: torch.zeros_like(x).index_add(0, i, (x[i] @ W6).sin()),
    "rows by inverse": lambda x, i: (x[i] @ W6).sin()[inverse(i)],
    "index_select": lambda x, i: x.index_select(0, i).sin().index_select(0, inverse(i)),
    "index_copy": lambda x, i: torch.zeros_like(x).index_copy(0, i, x[i].sin() @ W6),
    "index_copy over old": lambda x, i: x.cos().index_copy(0, i[:2], x[i[:2]].sin() @ W6),
    "index_put": lambda x, i: write(x.cos(), i[:3], x[i[:3]].exp()),
    "index_put over another's": lambda x, i: write(x.flip(0), torch.arange(N), x.exp()),
    "index_put, accumulated": lambda x, i: write(x, i.repeat(2), x[i.repeat(2)].sin(), True),
    "rows and columns": lambda x, i: write(x, (i[:, None], torch.tensor([0, 4])),
        x[i[:, None], torch.tensor([1, 1])].sin()),
    "index_fill": lambda x, i: x[i].index_fill(1, torch.tensor([2]), 0.5)[inverse(i)] * x,
    "gather along samples": lambda x, i: x.gather(0, i[:, None].expand(N, D)).sin()
        .gather(0, inverse(i)[:, None].expand(N, D)),
    "scatter along samples": lambda x, i: torch.zeros_like(x).scatter(
        0, i[:, None].expand(N, D), x[i] @ W6),
    "scatter_add": lambda x, i: x.scatter_add(0, i[:, None].expand(N, D), x[i].tanh()),
    "scatter_reduce": lambda x, i: x.scatter_reduce(
        0, i[:, None].expand(N, D), x[i] + 0.1, "amax"),
    "index_reduce": lambda x, i: x.exp().index_reduce(0, i, x[i].exp(), "prod"),
    "take": lambda x, i: x.take(i[:, None] * D + torch.arange(D)).sin()[inverse(i)],
    "mask in and out": by_mask,
    "mask of rows": lambda x, i: write(x, i > 1, (x[i > 1] @ W6).sin()),
    "masked_select and masked_scatter": lambda x, i: x.masked_scatter(
        i[:, None] > 1, x.masked_select(i[:, None] > 1).square()),
    "where": lambda x, i: torch.where(
        (torch.arange(N) == i[0])[:, None], x[i].sin()[inverse(i)], x.exp()),
    "where, of all rows": lambda x, i: torch.where(torch.arange(N)[:, None] >= 0, x.sin(), x.flip(0)),
    "untouched but for a zero": lambda x, i: x.sin() + 0.0 * x.sum(),
    "mask that multiplies": lambda x, i: x.flip(0) * torch.zeros(N, 1, dtype=F64) + x[i].sin()[inverse(i)],
    "rows of a stack": lambda x, i: torch.stack([r.sin() for r in x[i].unbind(0)])[inverse(i)],
    "columns of tokens": lambda x, i: x.reshape(N, 2, 3)[i].transpose(0, 1).reshape(-1, 3).softmax(-1)
        .reshape(2, N, 3).transpose(0, 1)[inverse(i)].reshape(N, D),
    "sorted along features": lambda x, i: x[i].sort(-1).values.topk(3, -1).values[inverse(i)],
    "argsort of a router": lambda x, i: (lambda o: (x[o] @ W6).tanh()[inverse(o)])(
        (x.detach() @ W6[:, 0]).argsort()),
    "repeat_interleave": lambda x, i: x.repeat_interleave(torch.tensor([2, 1, 3, 2]), 0).sin()
        [torch.tensor([1, 2, 5, 7])],
    "ragged": packed,
    "flipped twice": lambda x, i: (x.flip(0) @ W6).tanh().flip(0),
    "rolled twice": lambda x, i: x.roll(1, 0).sin().roll(-1, 0),
    "diagonal of pairs": lambda x, i: (x[:, None] * x[None, :]).diagonal().T.sin(),
    "a buffer an expert": capacity,
    "experts in a loop": experts,
    "the two best experts": top_two,
    "dispatch by products": one_hot,
    "attention in blocks": block_attention,
    "packed attention": lambda x, i: packed_attention(x, i, False),
    "packed attention, added": lambda x, i: packed_attention(x, i, True),
    "written row by row": lambda x, i: torch.stack([x[k].exp() for k in i.tolist()])[inverse(i)],
    "windows by strides": lambda x, i: x[i].as_strided((N, 2, 4), (D, 1, 1)).sin()[inverse(i)],
    "written by strides": lambda x, i: (lambda y: (
        y.as_strided((N, 3), (D, 2)).copy_(x[i].exp()[:, :3]), y)[1])(x[i].sin())[inverse(i)],
    "windows of rows": lambda x, i: x.unfold(0, 2, 1)[torch.tensor([0, 1, 2, 2]), :,
        torch.tensor([0, 0, 0, 1])].sin(),
}  # fmt: skip
