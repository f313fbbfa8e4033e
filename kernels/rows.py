"""Maps that mix the features of a row, in one pass over a block: softmax, log-softmax, normalisations' projection.

For a row t of the block (one seed, one sample) and the row p that its sample saved:

    softmax    p * (t - sum(p * t))                     its own transpose
    log_push   t - sum(p * t)
    log_pull   t - p * sum(t)
    centred    t - mean(t) - p * mean(p * t)            its own transpose; p is the normalised value
    uncentred  t - p * mean(p * t)                      likewise

between an optional diagonal before and one after, such as 1 / std and the weight of a layer norm, plus another block,
as in a residual connection. Sums are in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import launch
from .linear import added, scaled, strides_of
from .support import Factor, factor, power_of_two, wide

MAPS = ("softmax", "log_push", "log_pull", "centred", "uncentred")

WHOLE = 4096
"""Features up to which a row is held in registers; wider rows are read twice."""


@triton.jit
def _sums(t, p, s1, s2, MAP: tl.constexpr):
    """What the row's sums are after one more tile."""
    if MAP == "log_pull" or MAP == "centred":
        s1 += tl.sum(t, 1)
    if MAP != "log_pull":
        s2 += tl.sum(p * t, 1)
    return s1, s2


@triton.jit
def _mapped(t, p, s1, s2, count, MAP: tl.constexpr):
    if MAP == "softmax":
        return p * (t - s2[:, None])
    elif MAP == "log_push":
        return t - s2[:, None]
    elif MAP == "log_pull":
        return t - p * s1[:, None]
    elif MAP == "centred":
        return t - (s1 / count)[:, None] - p * (s2 / count)[:, None]
    else:
        return t - p * (s2 / count)[:, None]


@triton.jit
def _tile(
    t_at, p_at, ZB, r, i, inside, n, t_n, p_n, b_r, b_n, DB: tl.constexpr, PB: tl.constexpr
):  # fmt: skip
    """The scaled block and the saved values at columns i, and which of them exist."""
    mask = inside[:, None] & (i < n)[None, :]
    t = tl.load(t_at + i[None, :] * t_n, mask=mask, other=0.0).to(tl.float32)
    t = scaled(t, ZB, DB, PB, r[:, None] * b_r + i[None, :] * b_n, mask)
    p = tl.load(p_at + i[None, :] * p_n, mask=mask, other=0.0).to(tl.float32)
    return t, p, mask


@triton.jit
def _rows(
    T, P, ZB, ZA, PLUS, OUT, K, R, n, t_k, t_r, t_n, p_r, p_n, b_r, b_n, a_r, a_n, q_k, q_r, q_n, o_k, o_r, o_n,
    MAP: tl.constexpr, DB: tl.constexpr, PB: tl.constexpr, DA: tl.constexpr, PA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LOOP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, i0 = tl.program_id(0), tl.arange(0, BN)
    if WIDE:
        row, i0 = row.to(tl.int64), i0.to(tl.int64)
    row = row * BM + tl.arange(0, BM)
    r, k = row // K, row % K
    inside = r < R
    t_at, p_at = T + k[:, None] * t_k + r[:, None] * t_r, P + r[:, None] * p_r
    o_at = OUT + k[:, None] * o_k + r[:, None] * o_r
    s1, s2 = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    if LOOP:
        for start in range(0, n, BN):
            i = start + i0
            t, p, _ = _tile(t_at, p_at, ZB, r, i, inside, n, t_n, p_n, b_r, b_n, DB, PB)
            s1, s2 = _sums(t, p, s1, s2, MAP)
        for start in range(0, n, BN):
            i = start + i0
            t, p, mask = _tile(t_at, p_at, ZB, r, i, inside, n, t_n, p_n, b_r, b_n, DB, PB)
            out = _mapped(t, p, s1, s2, n, MAP)
            out = scaled(out, ZA, DA, PA, r[:, None] * a_r + i[None, :] * a_n, mask)
            if PLUS is not None:
                out = added(out, PLUS, k[:, None] * q_k + r[:, None] * q_r + i[None, :] * q_n, mask)
            tl.store(o_at + i[None, :] * o_n, out.to(OUT.dtype.element_ty), mask=mask)
    else:
        t, p, mask = _tile(t_at, p_at, ZB, r, i0, inside, n, t_n, p_n, b_r, b_n, DB, PB)
        s1, s2 = _sums(t, p, s1, s2, MAP)
        out = _mapped(t, p, s1, s2, n, MAP)
        out = scaled(out, ZA, DA, PA, r[:, None] * a_r + i0[None, :] * a_n, mask)
        if PLUS is not None:
            out = added(out, PLUS, k[:, None] * q_k + r[:, None] * q_r + i0[None, :] * q_n, mask)
        tl.store(o_at + i0[None, :] * o_n, out.to(OUT.dtype.element_ty), mask=mask)


def rows(
    t: Tensor,
    saved: Tensor,
    map: str,
    before: Factor | None = None,
    after: Factor | None = None,
    *,
    plus: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A map of `MAPS` over the last axis of a block: ``after * map(before * t) + plus``.

    t, plus: (K, R, n); saved, factors: (R, n); any strides. Returns (K, R, n) of t's dtype, in ``out`` if given, which
    may be ``plus``. Raises Unfit where the device cannot run it. Reads t once (twice above `WHOLE` features) and plus,
    writes out once.
    """
    K, R, n = t.shape
    if out is None:
        out = torch.empty(K, R, n, dtype=t.dtype, device=t.device)
    if out.numel() == 0:
        return out
    zb, sb, db, pb = factor(before)
    za, sa, da, pa = factor(after)
    columns = min(power_of_two(n, 16), WHOLE)
    tile = max(1, min(2048 // columns, power_of_two(K * R)))
    far = wide(t, saved, zb, za, plus, out) or K * R >= 1 << 31
    launch(
        _rows, (triton.cdiv(K * R, tile),), out,
        t, saved, zb, za, plus, out, K, R, n, *t.stride(), *saved.stride(), *sb, *sa,
        *strides_of(plus), *out.stride(),
        map, db, pb, da, pa, tile, columns, n > columns, far,
        num_warps=8 if columns > 1024 else 4,
    )  # fmt: skip
    return out
