"""The forward Laplacian of a chain of Linear layers and activations (Li et al. 2023, arXiv:2307.08214, section 3).

Carried through the layers are K tangents and the Laplacian of every sample, as one block t of K + 1 rows: t[:K] are the
tangents, t[K] is the Laplacian. With z = t M, and f', f'' of the activation behind it:

    t'[k] = f' z[k]    for k < K,        t'[K] = f' z[K] + f'' sum_k w_k z[k]^2

with weights w of the directions (1 by default). Ahead of the first activation the Laplacian is zero and the tangents
are the weight, for all samples: `seeds` gives them with ``sum_k w_k z[k]^2`` in the last row's place, so that a kernel
forms the block behind that activation in registers, t[:K] times f' and t[K] times f''.

A last layer to few features is a sum over each row: it rides in the epilogue, so that the widest block is not stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import DERIVATIVES
from .chain import _hopper
from .linear import Config
from .operands import multiply, prepare
from .support import Factor, Unfit, factor, fitting, on_device, power_of_two, wide

WIDEST, WIDEST_BEFORE_HOPPER = 128, 64
"""The widest layer of a `chain`, for the reasons of `kernels.chain`."""

MOST_LAST = 4
"""The most features of a last layer that is summed in the epilogue."""

MOST_ROWS = 64
"""The most rows of one sample that a `chain` holds together, and the most of them in a tile of `step`."""

CONFIGS = (
    Config(128, 64, 32, 4, 3),
    Config(64, 64, 32, 4, 3),
    Config(128, 128, 32, 8, 3),
)

CHAIN_CONFIGS = (
    Config(128, 0, 0, 8, 1),
    Config(64, 0, 0, 4, 1),
)

_PROGRAMS = 132
"""Programs that a GPU is taken to run at a time, where `step` chooses between more programs and less padding."""


@triton.jit
def _rows(TILE: tl.constexpr):
    """The row of its sample, and the sample, of each row of a tile.

    TILE: rows (slow), samples (slow), rows (fast), samples (fast). Tensor cores give a thread entries 8 rows apart, and
    of every 64 rows: where the rows of a sample lie so, most of a sum over them stays inside a thread.
    """
    m = tl.arange(0, TILE[0] * TILE[1] * TILE[2] * TILE[3])
    fast, m = m % TILE[3], m // TILE[3]
    low, m = m % TILE[2], m // TILE[2]
    return m // TILE[1] * TILE[2] + low, m % TILE[1] * TILE[3] + fast


@triton.jit
def _sum_rows(z, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """(samples, WIDTH) sums over the rows of each sample."""
    z = tl.reshape(z, (TILE[0], TILE[1], TILE[2], TILE[3], WIDTH))
    return tl.reshape(tl.sum(tl.sum(z, 2), 0), (TILE[1] * TILE[3], WIDTH))


@triton.jit
def _spread(x, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """(samples, WIDTH) values at every row of their sample."""
    x = tl.reshape(x, (1, TILE[1], 1, TILE[3], WIDTH))
    x = tl.broadcast_to(x, (TILE[0], TILE[1], TILE[2], TILE[3], WIDTH))
    return tl.reshape(x, (TILE[0] * TILE[1] * TILE[2] * TILE[3], WIDTH))


@triton.jit
def _derivatives(Z, Y, s, y, D: tl.constexpr, DD: tl.constexpr, P: tl.constexpr, r, i, mask):
    """f' and f'' of rows r and columns i: formed from the values at Z, or read from Z and Y."""
    z = tl.load(Z + r[:, None] * s[0] + i[None, :] * s[1], mask=mask, other=0.0).to(tl.float32)
    d = D(z, P)
    if Y is not None:
        at = Y + r[:, None] * y[0] + i[None, :] * y[1]
        return d, tl.load(at, mask=mask, other=0.0).to(tl.float32)
    elif DD is not None:
        return d, DD(z, P)
    else:
        return d, tl.zeros_like(d)


@triton.jit
def _seeded(
    t, k, K, Z, Y, s, y, D: tl.constexpr, DD: tl.constexpr, P: tl.constexpr, r, i, mask
):  # fmt: skip
    """The block behind the first activation, from `seeds`."""
    if D is None:
        return t
    else:
        d, dd = _derivatives(Z, Y, s, y, D, DD, P, r, i, mask)
        return t.to(tl.float32) * tl.where((k < K)[:, None], d, dd)


@triton.jit
def _squares(z, k, r, K, W, w_r, w_k, inside, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Of the rows k of samples r: ``sum_k w_k z[k]^2``, for each sample of the tile."""
    tangent = (k < K) & inside
    square = tl.where(tangent[:, None], z * z, 0.0)
    if W is not None:
        w = tl.load(W + r * w_r + k * w_k, mask=tangent, other=0.0).to(tl.float32)
        square *= w[:, None]
    return _sum_rows(square, TILE, WIDTH)


@triton.jit
def _reduced(
    t, LAST, l_i, l_o, OUT, o, outside, o_o, mask, COUNT: tl.constexpr
):  # fmt: skip
    """Stores ``t @ last`` at OUT."""
    for c in tl.static_range(COUNT):
        w = tl.load(LAST + o * l_i + c * l_o, mask=outside, other=0.0).to(tl.float32)
        s = tl.sum(t * w[None, :], 1)
        tl.store(OUT + c * o_o, s.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _laplacian_step(
    T, M, LAST, W, ZB, YB, ZA, YA, OUT, K, R, I, O, padded,
    t_k, t_r, t_i, m_p, m_i, m_o, l_i, l_o, w_r, w_k, zb, yb, za, ya, o_p, o_k, o_r, o_o,
    DB: tl.constexpr, DDB: tl.constexpr, PB: tl.constexpr, DA: tl.constexpr, DDA: tl.constexpr, PA: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, COUNT: tl.constexpr,
    ONCE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    KB: tl.constexpr = TILE[0] * TILE[2]
    BR: tl.constexpr = TILE[1] * TILE[3]
    pid = tl.program_id(0)
    tiles = tl.cdiv(O, BO)
    part, at = pid % tiles, pid // tiles
    o, i0, r0 = part * BO + tl.arange(0, BO), tl.arange(0, BI), tl.arange(0, BR)
    kt, rt = _rows(TILE)
    if WIDE:
        part, at, o, i0 = part.to(tl.int64), at.to(tl.int64), o.to(tl.int64), i0.to(tl.int64)
        kt, rt = kt.to(tl.int64), rt.to(tl.int64)
    r, rs = at * BR + rt, at * BR + r0
    outside = o < O
    q = tl.zeros((BR, BO), tl.float32)
    for k0 in range(0, 1 if ONCE else K + 1, KB):
        k = k0 + kt
        inside = (r < R) & (k <= K)
        acc = tl.zeros((KB * BR, BO), tl.float32)
        for start in range(0, I, BI):
            i = start + i0
            mask = inside[:, None] & (i < I)[None, :]
            from_ = T + k[:, None] * t_k + r[:, None] * t_r + i[None, :] * t_i
            t = tl.load(from_, mask=mask, other=0.0)
            t = _seeded(t, k, K, ZB, YB, zb, yb, DB, DDB, PB, r, i, mask)
            m_at = M + i[:, None] * m_i + o[None, :] * m_o
            within = (i < padded)[:, None] & outside[None, :]
            acc = multiply(t, m_at, m_p, within, acc, PRECISION, DB is not None)
        if DA is not None:
            mask = (rs < R)[:, None] & outside[None, :]
            d, dd = _derivatives(ZA, YA, za, ya, DA, DDA, PA, rs, o, mask)
            if DDA is not None or YA is not None:
                q += _squares(acc, k, r, K, W, w_r, w_k, inside, TILE, BO)
            acc *= _spread(d, TILE, BO)
            if DDA is not None or YA is not None:
                acc += tl.where((k == K)[:, None], _spread(dd * q, TILE, BO), 0.0)
        to = OUT + k * o_k + r * o_r
        if LAST is not None:
            _reduced(acc, LAST, l_i, l_o, to + part * o_p, o, outside, o_o, inside, COUNT)
        else:
            mask = inside[:, None] & outside[None, :]
            tl.store(to[:, None] + o[None, :] * o_o, acc.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _laplacian_chain(
    T, MS, LAST, W, ZS, YS, OUT, K, R, padded,
    t_k, t_r, t_i, m_s, l_i, l_o, w_r, w_k, z_s, y_s, o_k, o_r, o_o,
    WIDTHS: tl.constexpr, COLUMNS: tl.constexpr, DS: tl.constexpr, DDS: tl.constexpr, PS: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    BR: tl.constexpr = TILE[1] * TILE[3]
    at, i = tl.program_id(0), tl.arange(0, COLUMNS[0])
    k, rt = _rows(TILE)
    if WIDE:
        at, i, k = at.to(tl.int64), i.to(tl.int64), k.to(tl.int64)
    r, rs = at * BR + rt, at * BR + tl.arange(0, BR)
    inside = (r < R) & (k <= K)
    mask = inside[:, None] & (i < WIDTHS[0])[None, :]
    t = tl.load(T + k[:, None] * t_k + r[:, None] * t_r + i[None, :] * t_i, mask=mask, other=0.0)
    t = _seeded(t, k, K, ZS[0], YS[0], z_s[0], y_s[0], DS[0], DDS[0], PS[0], r, i, mask)
    for l in tl.static_range(len(MS)):
        i, o = tl.arange(0, COLUMNS[l]), tl.arange(0, COLUMNS[l + 1])
        if WIDE:
            o = o.to(tl.int64)
        from_ = MS[l] + i[:, None] * m_s[l][1] + o[None, :] * m_s[l][2]
        mask = (i < padded[l])[:, None] & (o < WIDTHS[l + 1])[None, :]
        acc = tl.zeros((TILE[0] * TILE[2] * BR, COLUMNS[l + 1]), tl.float32)
        t = multiply(t, from_, m_s[l][0], mask, acc, PRECISION)
        if DS[l + 1] is not None:
            mask = (rs < R)[:, None] & (o < WIDTHS[l + 1])[None, :]
            d, dd = _derivatives(
                ZS[l + 1], YS[l + 1], z_s[l + 1], y_s[l + 1], DS[l + 1], DDS[l + 1], PS[l + 1], rs, o, mask
            )  # fmt: skip
            if DDS[l + 1] is not None or YS[l + 1] is not None:
                q = _squares(t, k, r, K, W, w_r, w_k, inside, TILE, COLUMNS[l + 1])
                t *= _spread(d, TILE, COLUMNS[l + 1])
                t += tl.where((k == K)[:, None], _spread(dd * q, TILE, COLUMNS[l + 1]), 0.0)
            else:
                t *= _spread(d, TILE, COLUMNS[l + 1])
    o = tl.arange(0, COLUMNS[len(MS)])
    if WIDE:
        o = o.to(tl.int64)
    outside = o < WIDTHS[len(MS)]
    to = OUT + k * o_k + r * o_r
    if LAST is not None:
        _reduced(t, LAST, l_i, l_o, to, o, outside, o_o, inside, COUNT)
    else:
        mask = inside[:, None] & outside[None, :]
        tl.store(to[:, None] + o[None, :] * o_o, t.to(OUT.dtype.element_ty), mask=mask)


def seeds(weight: Tensor, directions: Tensor | None = None, weights: Tensor | None = None):
    """The block behind the first Linear layer, the same for all samples: ``(K + 1, O)``.

    weight: (O, I); directions: (K, I), by default the axes; weights: (K,). Row k is the weight times direction k, the
    last row ``sum_k w_k row_k^2``, formed in float32 at least. Costs what it writes, or ``2 K I O`` flops.
    """
    rows = weight.t() if directions is None else directions @ weight.t()
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    squares = exact * exact if weights is None else exact * exact * weights.to(exact)[:, None]
    return torch.cat((rows, squares.sum(0, keepdim=True).to(rows.dtype)))


def _tile(rows: int, together: int) -> tuple[int, int, int, int]:
    """`_rows`'s TILE of this many rows, so many of them of one sample."""
    low = min(together, 2)
    fast = min(8, rows // together)
    return together // low, rows // together // fast, low, fast


def _together(K: int, R: int, tiles: int, rows: int) -> int:
    """How many rows of one sample lie in a tile: the fewest turns of the GPU's programs, then the least padding."""

    def turns(n: int) -> tuple[int, int]:
        programs = -(-R // (rows // n)) * tiles
        return -(-programs // _PROGRAMS) * -(-(K + 1) // n), n

    return min((n for n in (1, 2, 4, 8, 16) if n <= power_of_two(K + 1)), key=turns)


def _activation(f: Factor | None):
    """An activation as the kernels take it: values, their strides, second derivatives, theirs, f', f'', constants."""
    values, strides, d, constants = factor(f)
    if f is None:
        return None, (0, 0), None, (0, 0), None, None, ()
    second = () if f.second is None else f.second.stride()
    dd = None if f.second is not None else DERIVATIVES[f.name].second
    return values, tuple(strides), f.second, tuple(second) or (0, 0), d, dd, constants


def _check(last: Tensor | None) -> int:
    count = 0 if last is None else last.shape[1]
    if count > MOST_LAST:
        raise Unfit(f"a last layer of {count} features: {MOST_LAST} are summed in the epilogue")
    return count


def step(
    t: Tensor,
    matrix: Tensor,
    after: Factor | None = None,
    *,
    before: Factor | None = None,
    last: Tensor | None = None,
    weights: Tensor | None = None,
    precision: str,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """One layer: ``z = t M``, then ``f' z[k]`` for the tangents and ``f' z[K] + f'' sum_k w_k z[k]^2``.

    t: (K + 1, R, I), tangents and Laplacian; matrix: (I, O); after: (R, O), the activation behind the layer, from its
    saved value or with both derivatives ready. ``before``: (R, I), for `seeds` in t: the first activation, applied to
    them. ``last``: (O, C), C up to `MOST_LAST`: the result is multiplied by it and not stored. ``weights``: (K,) or
    (R, K). All of one dtype (weights of any), any strides; ``precision`` as in `linear.step`. ``out``: (K + 1, R, O or
    C) of any strides. Returns ``out``. Raises Unfit where the device cannot run the kernel or ``last`` has more
    features. Costs ``2 (K + 1) R I O`` flops; reads t once for each ``config.out`` features, writes out once.
    """
    K, R, I = t.shape[0] - 1, t.shape[1], t.shape[2]
    O, count = matrix.shape[1], _check(last)
    shape = (K + 1, R, O if last is None else count)
    if out is None:
        out = torch.empty(shape, dtype=t.dtype, device=t.device)
    if out.numel() == 0:
        return out
    if last is not None and O == 0:
        return out.zero_()
    c = config or (CONFIGS[0] if (K + 1) * R > 64 else CONFIGS[1])
    columns = min(c.out, power_of_two(O, 16))
    tiles = triton.cdiv(O, columns)
    together = _together(K, R, tiles, c.rows)
    tile = _tile(c.rows, together)
    zb, sb, yb, tb, db, ddb, pb = _activation(before)
    za, sa, ya, ta, da, dda, pa = _activation(after)
    # the tiles of features each have a part of the sum over features
    into = out[None]
    if last is not None and tiles > 1:
        into = torch.empty((tiles, *shape), dtype=torch.float32, device=t.device)
    (m,) = prepare((matrix,), precision)
    w = None if weights is None else weights.expand(R, K)
    far = wide(t, zb, yb, za, ya, matrix, w, into) or (K + 1) * R >= 1 << 31
    with on_device(t), fitting():
        _laplacian_step[(triton.cdiv(R, c.rows // together) * tiles,)](
            t, m.values, last, w, zb, yb, za, ya, into, K, R, I, O, m.padded, *t.stride(), *m.strides,
            *((0, 0) if last is None else last.stride()), *((0, 0) if w is None else w.stride()),
            sb, tb, sa, ta, *into.stride(), db, ddb, pb, da, dda, pa, precision, tile, columns,
            min(c.inner, power_of_two(I, 16)), count, together > K, far,
            num_warps=c.warps, num_stages=c.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out if into.shape[0] == 1 else torch.sum(into, 0, out=out) if out.dtype == torch.float32 else out.copy_(into.sum(0))


def chain_configs(widths: Sequence[int], K: int, device: torch.device) -> tuple[Config, ...]:
    """How `chain` can run layers of these widths, the block's first, with K tangents; empty where it cannot.

    A last layer that is summed in the epilogue does not count.
    """
    widest = max(widths)
    if min(widths) < 1 or widest > (WIDEST if _hopper(device) else WIDEST_BEFORE_HOPPER):
        return ()
    if K + 1 > MOST_ROWS:
        return ()
    return CHAIN_CONFIGS if widest <= 64 else CHAIN_CONFIGS[:1]


def chain(
    t: Tensor,
    matrices: Sequence[Tensor],
    factors: Sequence[Factor | None],
    *,
    last: Tensor | None = None,
    weights: Tensor | None = None,
    precision: str,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Several layers in one launch: between its first and its last no tangent leaves the chip.

    As so many `step`s: t: (K + 1, R, w_0); matrices[l]: (w_l, w_(l+1)); factors: one more than matrices, (R, w_l) each
    or None, the first of them the activation ahead of the first matrix, for `seeds` in t. See `chain_configs` for
    widths and K; raises Unfit where the device cannot run it. The rows of a sample are padded to a power of two
    P > K: costs ``2 P R sum(w_l w_(l+1))`` flops; reads t once, writes out once.
    """
    K, R = t.shape[0] - 1, t.shape[1]
    widths = (t.shape[2], *(m.shape[1] for m in matrices))
    count = _check(last)
    if out is None:
        out = torch.empty(K + 1, R, count or widths[-1], dtype=t.dtype, device=t.device)
    if out.numel() == 0:
        return out
    c = config or CHAIN_CONFIGS[0]
    together = power_of_two(K + 1)
    if together > min(c.rows, MOST_ROWS):
        raise Unfit(f"{K} tangents: a chain holds {MOST_ROWS - 1} of a sample")
    zs, ss, ys, ts, ds, dds, ps = (
        tuple(p) for p in zip(*(_activation(f) for f in factors), strict=True)
    )
    operands = prepare(matrices, precision)
    w = None if weights is None else weights.expand(R, K)
    far = wide(t, out, w, *zs, *ys, *matrices) or (K + 1) * R >= 1 << 31
    with on_device(t), fitting():
        _laplacian_chain[(triton.cdiv(R, c.rows // together),)](
            t, tuple(m.values for m in operands), last, w, zs, ys, out, K, R, tuple(m.padded for m in operands),
            *t.stride(), tuple(m.strides for m in operands), *((0, 0) if last is None else last.stride()),
            *((0, 0) if w is None else w.stride()), ss, ts, *out.stride(),
            widths, tuple(power_of_two(n, 16) for n in widths), ds, dds, ps, precision, _tile(c.rows, together), count, far,
            num_warps=c.warps, num_stages=c.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out
