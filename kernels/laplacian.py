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

from . import chain as chains
from .activations import DERIVATIVES, SOURCE
from .chain import zero_tile
from .launches import launch
from .linear import Config
from .operands import multiply, prepare
from .support import Factor, Ready, Unfit, factor, power_of_two, wide

MOST_LAST = 4
"""The most features of a last layer that is summed in the epilogue."""

MOST_ROWS = 64
"""The most rows of one sample that a `chain` holds: they lie in one tile."""

CONFIGS = (
    # half the registers of the second: two programs on a multiprocessor
    Config(128, 64, 32, 8, 3),
    Config(128, 128, 32, 8, 3),
    # few rows
    Config(64, 64, 32, 4, 3),
)

_PROGRAMS = 132
"""Programs that a GPU is taken to run at a time, where `step` chooses between more programs and less padding."""


@triton.jit
def _rows(TILE: tl.constexpr):
    """The row of its sample, and the sample, of each row of a tile.

    TILE: samples, rows, samples, rows, from slow to fast. Tensor cores give a thread entries 8 rows apart and a warp
    16 rows: with the rows of a sample there, a sum over them stays inside a warp, and its first half inside a thread.
    """
    m = tl.arange(0, TILE[0] * TILE[1] * TILE[2] * TILE[3])
    k0, m = m % TILE[3], m // TILE[3]
    r0, m = m % TILE[2], m // TILE[2]
    return m % TILE[1] * TILE[3] + k0, m // TILE[1] * TILE[2] + r0


@triton.jit
def _along(x, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """The rows of a tile along `_rows`'s four axes."""
    r1: tl.constexpr = TILE[0]
    k1: tl.constexpr = TILE[1]
    r0: tl.constexpr = TILE[2]
    k0: tl.constexpr = TILE[3]
    return tl.reshape(x, (r1, k1, r0, k0, WIDTH))


@triton.jit
def _spread(x, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """What there is once a sample, at every row of the tile."""
    r1: tl.constexpr = TILE[0]
    k1: tl.constexpr = TILE[1]
    r0: tl.constexpr = TILE[2]
    k0: tl.constexpr = TILE[3]
    x = tl.reshape(x, (r1, 1, r0, 1, WIDTH))
    x = tl.broadcast_to(x, (r1, k1, r0, k0, WIDTH))
    return tl.reshape(x, (r1 * k1 * r0 * k0, WIDTH))


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
    T, k, K, Z, Y, s, y, D: tl.constexpr, DD: tl.constexpr, P: tl.constexpr, r, i, mask
):  # fmt: skip
    """The block at T, rows k; behind the first activation, where T holds `seeds`."""
    if D is None:
        return tl.load(T, mask=mask, other=0.0)
    else:
        d, dd = _derivatives(Z, Y, s, y, D, DD, P, r, i, mask)
        # loaded twice, not chosen from: what comes out of loads alone is made in the layout of the product
        tangents = tl.load(T, mask=mask & (k < K)[:, None], other=0.0).to(tl.float32)
        squares = tl.load(T, mask=mask & (k == K)[:, None], other=0.0).to(tl.float32)
        return tangents * d + squares * dd


@triton.jit
def _behind(
    t, q, Z, Y, s, y, D: tl.constexpr, DD: tl.constexpr, P: tl.constexpr, rs, i, mask,
    k, r, K, W, w_r, w_k, inside, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows k of a tile behind an activation, and ``q``, the sums of the rows before, with those of these added."""
    d, dd = _derivatives(Z, Y, s, y, D, DD, P, rs, i, mask)
    d = _spread(d, TILE, WIDTH)
    if DD is None and Y is None:
        return t * d, q
    else:
        tangent = (k < K) & inside
        square = tl.where(tangent[:, None], t * t, 0.0)
        if W is not None:
            w = tl.load(W + r * w_r + k * w_k, mask=tangent, other=0.0).to(tl.float32)
            square *= w[:, None]
        square = _along(square, TILE, WIDTH)
        q += tl.sum(tl.sum(square, 1, keep_dims=True), 3, keep_dims=True)
        # both spread, then multiplied: the sums stay in the layout that they came in
        bend = _spread(dd, TILE, WIDTH) * _spread(q, TILE, WIDTH)
        return t * d + tl.where((k == K)[:, None], bend, 0.0), q


@triton.jit
def _sums(TILE: tl.constexpr, WIDTH: tl.constexpr):
    r1: tl.constexpr = TILE[0]
    r0: tl.constexpr = TILE[2]
    return tl.zeros((r1, 1, r0, 1, WIDTH), tl.float32)


@triton.jit
def _reduced(
    t, LAST, l_i, l_o, OUT, o, outside, o_o, mask, COUNT: tl.constexpr
):  # fmt: skip
    """Stores ``t @ last`` at OUT."""
    for c in tl.static_range(COUNT):
        w = tl.load(LAST + o * l_i + c * l_o, mask=outside, other=0.0).to(tl.float32)
        s = tl.sum(t * w[None, :], 1, keep_dims=True)
        tl.store(OUT[:, None] + c * o_o, s.to(OUT.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _laplacian_step(
    T, M, LAST, W, ZB, YB, ZA, YA, OUT, K, R, I, O, padded,
    t_k, t_r, t_i, m_p, m_i, m_o, l_i, l_o, w_r, w_k, zb, yb, za, ya, o_p, o_k, o_r, o_o,
    DB: tl.constexpr, DDB: tl.constexpr, PB: tl.constexpr, DA: tl.constexpr, DDA: tl.constexpr, PA: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, COUNT: tl.constexpr,
    ONCE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    KB: tl.constexpr = TILE[1] * TILE[3]
    BR: tl.constexpr = TILE[0] * TILE[2]
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
    q = _sums(TILE, BO)
    for k0 in range(0, 1 if ONCE else K + 1, KB):
        k = k0 + kt
        inside = (r < R) & (k <= K)
        acc = tl.zeros((KB * BR, BO), tl.float32)
        for start in range(0, I, BI):
            i = start + i0
            mask = inside[:, None] & (i < I)[None, :]
            from_ = T + k[:, None] * t_k + r[:, None] * t_r + i[None, :] * t_i
            t = _seeded(from_, k, K, ZB, YB, zb, yb, DB, DDB, PB, r, i, mask)
            m_at = M + i[:, None] * m_i + o[None, :] * m_o
            within = (i < padded)[:, None] & outside[None, :]
            acc = multiply(t, m_at, m_p, within, acc, PRECISION, DB is not None)
        if DA is not None:
            mask = (rs < R)[:, None] & outside[None, :]
            acc, q = _behind(
                acc, q, ZA, YA, za, ya, DA, DDA, PA, rs, o, mask, k, r, K, W, w_r, w_k, inside, TILE, BO
            )  # fmt: skip
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
    SOURCE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    BR: tl.constexpr = TILE[0] * TILE[2]
    BM: tl.constexpr = BR * TILE[1] * TILE[3]
    at, i = tl.program_id(0), tl.arange(0, COLUMNS[0])
    k, rt = _rows(TILE)
    if WIDE:
        at, i, k = at.to(tl.int64), i.to(tl.int64), k.to(tl.int64)
    r, rs = at * BR + rt, at * BR + tl.arange(0, BR)
    inside = (r < R) & (k <= K)
    mask = inside[:, None] & (i < WIDTHS[0])[None, :]
    t = tl.load(T + k[:, None] * t_k + r[:, None] * t_r + i[None, :] * t_i, mask=mask, other=0.0)
    for l in tl.static_range(len(MS)):
        i, o = tl.arange(0, COLUMNS[l]), tl.arange(0, COLUMNS[l + 1])
        if WIDE:
            o = o.to(tl.int64)
        from_ = MS[l] + i[:, None] * m_s[l][1] + o[None, :] * m_s[l][2]
        mask = (i < padded[l])[:, None] & (o < WIDTHS[l + 1])[None, :]
        acc = zero_tile(BM, COLUMNS[l + 1])
        t = multiply(t, from_, m_s[l][0], mask, acc, PRECISION)
        if DS[l] is not None:
            mask = (rs < R)[:, None] & (o < WIDTHS[l + 1])[None, :]
            t, _ = _behind(
                t, _sums(TILE, COLUMNS[l + 1]), ZS[l], YS[l], z_s[l], y_s[l], DS[l], DDS[l], PS[l], rs, o, mask,
                k, r, K, W, w_r, w_k, inside, TILE, COLUMNS[l + 1],
            )  # fmt: skip
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


def seeds(
    weight: Tensor, directions: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
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
    slow = min(together, 2)
    fast = together // slow
    between = max(1, 8 // fast)
    return rows // (together * between), slow, between, fast


def _together(K: int, R: int, tiles: int, rows: int) -> int:
    """How many rows of one sample lie in a tile: what takes the programs of a GPU the fewest turns.

    Of several, the one nearest to 4; one row at a time would take a register for each sum.
    """

    def turns(n: int) -> tuple[int, int]:
        programs = -(-R // (rows // n)) * tiles
        return -(-programs // _PROGRAMS) * -(-(K + 1) // n), abs(n - 4)

    return min(
        (n for n in (1, 2, 4, 8, 16) if min(2, K + 1) <= n <= power_of_two(K + 1)), key=turns
    )


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
    ready: Ready | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """One layer: ``z = t M``, then ``f' z[k]`` for the tangents and ``f' z[K] + f'' sum_k w_k z[k]^2``.

    t: (K + 1, R, I), tangents and Laplacian; matrix: (I, O); after: (R, O), the activation behind the layer, from its
    saved value or with both derivatives ready. ``before``: (R, I), for `seeds` in t: the first activation, applied to
    them. ``last``: (O, C), C up to `MOST_LAST`: the result is multiplied by it and not stored. ``weights``: (K,) or
    (R, K). All of one dtype (weights of any), any strides; ``precision`` and ``ready`` as in `linear.step`. ``out``:
    (K + 1, R, O or C) of any strides. Returns ``out``. Raises Unfit where the device cannot run the kernel or ``last``
    has more features. Costs ``2 (K + 1) R I O`` flops; reads t once for each ``config.out`` features, writes out once.
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
    c = config or CONFIGS[0 if (K + 1) * R > 64 else 2]
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
    (m,) = prepare((matrix,), precision, ready)
    w = None if weights is None else weights.expand(R, K)
    far = wide(t, zb, yb, za, ya, matrix, w, into) or (K + 1) * R >= 1 << 31
    launch(
        _laplacian_step, (triton.cdiv(R, c.rows // together) * tiles,), into,
        t, m.values, last, w, zb, yb, za, ya, into, K, R, I, O, m.padded, *t.stride(), *m.strides,
        *((0, 0) if last is None else last.stride()), *((0, 0) if w is None else w.stride()),
        sb, tb, sa, ta, *into.stride(), db, ddb, pb, da, dda, pa, precision, tile, columns,
        min(c.inner, power_of_two(I, 16)), count, together > K, far,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out if into.shape[0] == 1 else out.copy_(into.sum(0))


def chain_configs(widths: Sequence[int], K: int, device: torch.device) -> tuple[Config, ...]:
    """How `chain` can run layers of these widths, the block's first, with K tangents; empty where it cannot.

    A last layer that is summed in the epilogue does not count.
    """
    return chains.chain_configs(widths, device) if K < MOST_ROWS else ()


def chain(
    t: Tensor,
    matrices: Sequence[Tensor],
    factors: Sequence[Factor | None],
    *,
    last: Tensor | None = None,
    weights: Tensor | None = None,
    precision: str,
    ready: Ready | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Several layers in one launch: between its first and its last no tangent leaves the chip.

    As so many `step`s: t: (K + 1, R, w_0), for the whole network the directions and zeros, with a stride of 0 along
    the samples; matrices[l]: (w_l, w_(l+1)); factors: as many, (R, w_(l+1)) each or None. See `chain_configs` for
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
    c = config or chains.CHAIN_CONFIGS[0]
    together = power_of_two(K + 1)
    if together > min(c.rows, MOST_ROWS):
        raise Unfit(f"{K} tangents: a chain holds {MOST_ROWS - 1} of a sample")
    zs, ss, ys, ts, ds, dds, ps = (
        tuple(p) for p in zip(*(_activation(f) for f in factors), strict=True)
    )
    operands = prepare(matrices, precision, ready)
    w = None if weights is None else weights.expand(R, K)
    far = wide(t, out, w, *zs, *ys, *matrices) or (K + 1) * R >= 1 << 31
    launch(
        _laplacian_chain, (triton.cdiv(R, c.rows // together),), out,
        t, tuple(m.values for m in operands), last, w, zs, ys, out, K, R, tuple(m.padded for m in operands),
        *t.stride(), tuple(m.strides for m in operands), *((0, 0) if last is None else last.stride()),
        *((0, 0) if w is None else w.stride()), ss, ts, *out.stride(),
        widths, tuple(power_of_two(n, 16) for n in widths), ds, dds, ps,
        SOURCE, precision, _tile(c.rows, together), count, far,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out
