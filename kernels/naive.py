"""The kernels over images and patches, of the Laplacian, batches and attention, in plain torch, for tests: no speed."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor


def reached(size: int, size_in: int, k: int, stride: int, padding: int, dilation: int, transposed):
    """For one axis and tap: the input of each output, and whether there is one."""
    o = torch.arange(size)
    if transposed:
        up = o + padding - k * dilation
        at = up.div(stride, rounding_mode="floor")
        there = up % stride == 0
    else:
        at = o * stride - padding + k * dilation
        there = torch.ones_like(o, dtype=torch.bool)
    there = there & (at >= 0) & (at < size_in)
    return torch.where(there, at, 0), there


def convolve(t: Tensor, weight: Tensor, window, before=None, after=None) -> Tensor:
    """`conv.convolve`; factors are ready derivatives."""
    axes = len(window.size)
    if before is not None:
        t = t * before
    K, N, C = t.shape[:3]
    G = window.groups
    w = weight.reshape(G, weight.shape[0] // G, *weight.shape[1:])
    if not window.transposed:
        w = w.transpose(1, 2)
    t = t.reshape(K, N, G, C // G, *t.shape[3:])
    out = t.new_zeros(K, N, G, w.shape[2], *window.size)
    for tap in product(*map(range, weight.shape[2:])):
        part = t
        for a in range(axes):
            at, there = reached(
                window.size[a], t.shape[4 + a], tap[a], window.stride[a], window.padding[a],
                window.dilation[a], window.transposed,
            )  # fmt: skip
            if not t.shape[4 + a]:
                return out.flatten(2, 3) if after is None else out.flatten(2, 3) * after
            shape = [1] * part.dim()
            shape[4 + a] = -1
            part = part.index_select(4 + a, at.to(t.device)) * there.to(t).view(shape)
        out += torch.einsum("kngi...,gio->kngo...", part, w[(..., *tap)])
    out = out.flatten(2, 3)
    return out if after is None else out * after


def gather(t: Tensor, index: Tensor, before=None, after=None) -> Tensor:
    """`pool.gather`; factors are ready derivatives."""
    if before is not None:
        t = t * before
    flat = index.flatten(2).expand(t.shape[0], *index.flatten(2).shape)
    out = t.flatten(3).gather(3, flat).reshape(t.shape[0], *index.shape)
    return out if after is None else out * after


def scatter(t: Tensor, index: Tensor, size: tuple[int, ...], before=None, after=None) -> Tensor:
    """`pool.scatter` to images of ``size``; factors are ready derivatives."""
    if before is not None:
        t = t * before
    flat = index.flatten(2).expand(t.shape[0], *index.flatten(2).shape)
    out = t.new_zeros(*t.shape[:3], *size)
    out.flatten(3).scatter_add_(3, flat, t.flatten(3))
    return out if after is None else out * after


def dense(values: Tensor, colour: Tensor, supports: tuple[Tensor, ...]) -> Tensor:
    """`band.dense`."""
    rows, columns = values.shape[2], colour.numel()
    seen = torch.ones(1, 1, dtype=torch.bool, device=values.device)
    for table in supports:
        seen = torch.kron(seen, table.bool())
    seen = seen.repeat(rows // max(1, seen.shape[0]), columns // max(1, seen.shape[1]))
    return values[:, colour.long()].transpose(1, 2) * seen


def patches(t: Tensor, matrices, factors, window, out: Tensor, place) -> Tensor:
    """`patches.patches`, without zeros; ``window``: the last of its sizes. ``out`` is flat."""
    for f, m in zip(factors, [*matrices, None], strict=True):
        if f is not None:
            t = t * f.flatten(3).unsqueeze(1)
        if m is not None:
            t = t @ m
    sizes = (*t.shape[:4], *window)
    axes = torch.meshgrid(*(torch.arange(n, device=t.device) for n in sizes), indexing="ij")
    at = place.start + sum(a * s for a, s in zip(axes, place.strides, strict=True))
    there = torch.ones_like(at, dtype=torch.bool)
    for a in range(2):
        pixel = place.first[a] + place.step[a] * axes[2 + a] + axes[4 + a]
        there &= (pixel >= 0) & (pixel < place.image[a])
    out[at[there]] = t.reshape(sizes)[there]
    return out


def laplacian_step(
    t: Tensor,
    matrix: Tensor,
    after: tuple[Tensor, Tensor] | None = None,
    before: tuple[Tensor, Tensor] | None = None,
    last: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """`laplacian.step`; an activation is its two derivatives (R, w)."""
    if before is not None:
        t = torch.cat((t[:-1] * before[0], t[-1:] * before[1]))
    z = t @ matrix
    if after is not None:
        w = torch.ones(1, 1).to(z) if weights is None else weights.to(z).expand(z.shape[1], -1)
        q = (w.t()[:, :, None] * z[:-1] ** 2).sum(0)
        z = torch.cat((z[:-1] * after[0], (z[-1] * after[0] + q * after[1])[None]))
    return z if last is None else z @ last


def laplacian_chain(t: Tensor, matrices, factors, last=None, weights=None) -> Tensor:
    """`laplacian.chain`; activations as in `laplacian_step`."""
    for m, after in zip(matrices, factors, strict=True):
        t = laplacian_step(t, m, after, weights=weights)
    return t if last is None else t @ last


def batched(left: Tensor, right: Tensor) -> Tensor:
    """`batched.batched`."""
    return (left[..., None] * right[:, None]).sum(2)


def attention(q: Tensor, k: Tensor, seen, scale: float) -> Tensor:
    """The probabilities (B, H, T, S) of `attention.forward`; 0 for a query that sees nothing."""
    T, S = q.shape[2], k.shape[2]
    scores = scale * q @ _shared(k, q).mT
    there = torch.ones(T, S, dtype=torch.bool, device=q.device)
    if seen.causal:
        there = there.tril()
    if seen.mask is not None and seen.mask.dtype == torch.bool:
        there = there & seen.mask
    elif seen.mask is not None:
        scores = scores + seen.mask.to(q.dtype)
    return scores.masked_fill(~there, -torch.inf).softmax(-1).nan_to_num(0.0)


def _shared(t: Tensor, q: Tensor) -> Tensor:
    """Heads of keys, repeated for those of the queries that share them."""
    return t.repeat_interleave(q.shape[1] // t.shape[-3], -3)


def attention_push(q: Tensor, k: Tensor, v: Tensor, seen, scale: float, tangents) -> Tensor:
    """`attention.push`."""
    p, v = attention(q, k, seen, scale), _shared(v, q)
    dq, dk, dv = tangents
    scores = sum(
        s for s in (None if dq is None else dq @ _shared(k, q).mT, None if dk is None else q @ _shared(dk, q).mT)
        if s is not None
    )  # fmt: skip
    made = 0
    if dq is not None or dk is not None:
        d = p * scores * scale
        made = d @ v - d.sum(-1, keepdim=True) * (p @ v)
    return made if dv is None else made + p @ _shared(dv, q)


def attention_pull(q: Tensor, k: Tensor, v: Tensor, seen, scale: float, c: Tensor):
    """`attention.pull` to all three."""
    p, G = attention(q, k, seen, scale), k.shape[1]
    d = c @ _shared(v, q).mT
    d = p * (d - (p * d).sum(-1, keepdim=True)) * scale
    of_keys = [d.mT @ q, p.mT @ c]
    return d @ _shared(k, q), *(t.unflatten(-3, (G, -1)).sum(-3) for t in of_keys)
