"""Convolutions of a block of tangents or cotangents, as products: implicit im2col on tensor cores.

    out[k, n, o, y, x] = after[n, o, y, x] * sum_(i, tap) weight[o, i, tap] * before[n, i, at] * t[k, n, i, at]

for K seeds, N samples and the inputs ``at`` that the taps of output (y, x) reach: for a convolution, and for its
transpose by gathering (see `windows`), so that push and pull are one kernel and nothing is added up in memory. Where
all samples share the block, its stride along the samples is 0.

A program computes BM outputs of the ``N K H W`` of one phase, neighbours in an image side by side, and BO channels of
one group. It runs over taps and, inside, over BI channels in; where channels are few, taps and channels make one axis,
so that the tile is full of both: ``2 BM BO BI`` flops for ``BM BI + BI BO`` loads, of which the first come from the
cache in all but one of the taps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import launch
from .linear import Config, scaled
from .operands import multiply, prepare
from .support import Factor, Ready, factor, power_of_two, wide
from .windows import (
    MOST_ROWS,
    Window,
    block_offsets,
    grouped,
    image,
    inside,
    numbered,
    offsets,
    pixel,
    taps_of,
)

CONFIGS = (
    # not pipelined: copies past the registers of 16 bytes go past the first cache as well, where other taps find them
    Config(128, 64, 32, 4, 1),
    # many channels: the most flops for a load
    Config(128, 128, 32, 8, 3),
    # small images, few seeds
    Config(64, 64, 32, 4, 3),
)

WASTE = 1.25
"""Channels in are padded to whole tiles up to this factor; beyond, taps and channels make one axis."""


@triton.jit
def _conv(
    T, ZB, M, ZA, OUT, counts, N, I, O, padded, size_in, size, taps, padding, t_s, b_s, m_s, a_s, o_s,
    stride: tl.constexpr, dilation: tl.constexpr, apart: tl.constexpr, common: tl.constexpr, inverse: tl.constexpr,
    step: tl.constexpr,
    BEFORE: tl.constexpr, PB: tl.constexpr, AFTER: tl.constexpr, PA: tl.constexpr, PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr, FLAT: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pid, g = tl.program_id(0), tl.program_id(1)
    phase_y, phase_x = 0, 0
    if TRANSPOSED:
        phase_x = g % stride[1]
        phase_y = g // stride[1] % stride[0]
        g = g // (stride[0] * stride[1])
    tiles = tl.cdiv(O, BO)
    row, o = pid // tiles, (pid % tiles) * BO + tl.arange(0, BO)
    i0 = tl.arange(0, BI)
    if WIDE:
        row, o, i0, g = row.to(tl.int64), o.to(tl.int64), i0.to(tl.int64), g.to(tl.int64)
    first_y, taps_y, y0 = taps_of(
        phase_y, taps[0], stride[0], padding[0], dilation[0], apart[0], common[0], inverse[0],
        TRANSPOSED,
    )  # fmt: skip
    first_x, taps_x, x0 = taps_of(
        phase_x, taps[1], stride[1], padding[1], dilation[1], apart[1], common[1], inverse[1],
        TRANSPOSED,
    )  # fmt: skip
    n, k, y, x = pixel(row * BM + tl.arange(0, BM), counts, WIDE)
    if TRANSPOSED:
        there = (phase_y + y * stride[0] < size[0]) & (phase_x + x * stride[1] < size[1])
    else:
        there = n < N
        y, x = y * stride[0], x * stride[1]
    there, outside = there & (n < N), o < O
    y = tl.where(there, y + y0, -(1 << 30))  # rows that are not there read outside of every image
    # tiles lie as memory does, their last axis the fast one: rows for images in rows, channels for channels-last
    R: tl.constexpr = 0 if ROWS else 1
    C: tl.constexpr = 1 - R
    y, x = tl.expand_dims(y, R), tl.expand_dims(x + x0, R)
    n, k = tl.expand_dims(n, R), tl.expand_dims(k, R)
    # what does not change from tap to tap: where the first tap of a row reads, and the columns of a tile
    c = g * I
    t_at = T + block_offsets(k, n, c, y, x, t_s, ROWS)
    b_at = offsets(n, c, y, x, b_s, ROWS)
    m_at = M + g * m_s[1] + o[None, :] * m_s[4]
    total = taps_y * taps_x * (I if FLAT else tl.cdiv(I, BI) * BI)
    next_y, next_x, first = 0, 0, 0
    acc = tl.zeros((BM, BO), tl.float32)
    for start in range(0, total, BI):
        if FLAT:
            q = start + i0
            tap, i = q // I, q % I
            tap_y, tap_x = tap // taps_x, tap % taps_x
            column, within = q < total, q < total
        else:
            tap_y, tap_x, i = next_y, next_x, first + i0
            column, within = i < I, i < padded
        dy, dx = tap_y * step[0], tap_x * step[1]
        tap = tap_y * taps_x + tap_x
        if TRANSPOSED:
            tap = (first_y + tap_y * apart[0]) * taps[1] + first_x + tap_x * apart[1]
        at = m_at + (tap * m_s[2] + i * m_s[3])[:, None]
        if FLAT:
            dy, dx = tl.expand_dims(dy, C), tl.expand_dims(dx, C)
        mask = inside(y + dy, size_in[0]) & inside(x + dx, size_in[1])
        if not EVEN:
            mask = mask & tl.expand_dims(column, C)
        i = tl.expand_dims(i, C)
        t = tl.load(t_at + (dy * t_s[3] + dx * t_s[4] + i * t_s[2]), mask=mask, other=0.0)
        t = scaled(t, ZB, BEFORE, PB, b_at + (dy * b_s[2] + dx * b_s[3] + i * b_s[1]), mask)
        if ROWS:
            t = tl.trans(t)
        within = outside[None, :] if EVEN else within[:, None] & outside[None, :]
        if PRECISION == "tf32" and BEFORE is None and not ROWS:
            m = tl.load(at, mask=within, other=0.0)
            acc = tl.dot(t, m, acc, input_precision="tf32")
        else:
            acc = multiply(t, at, m_s[0], within, acc, PRECISION, BEFORE is not None)
        if not FLAT:
            first += BI
            over = first >= I
            first = tl.where(over, 0, first)
            next_x += over.to(tl.int32)
            over = next_x >= taps_x
            next_x = tl.where(over, 0, next_x)
            next_y += over.to(tl.int32)
    # the result lies as its own memory does
    Q: tl.constexpr = 0 if OUT_ROWS else 1
    if OUT_ROWS:
        acc = tl.trans(acc)
    n, k, y, x = pixel(row * BM + tl.arange(0, BM), counts, WIDE)
    if TRANSPOSED:
        y, x = phase_y + y * stride[0], phase_x + x * stride[1]
    n, k, y, x = (
        tl.expand_dims(n, Q),
        tl.expand_dims(k, Q),
        tl.expand_dims(y, Q),
        tl.expand_dims(x, Q),
    )
    mask = tl.expand_dims(there, Q) & tl.expand_dims(outside, 1 - Q)
    c = tl.expand_dims(g * O + o, 1 - Q)
    acc = scaled(acc, ZA, AFTER, PA, offsets(n, c, y, x, a_s, OUT_ROWS), mask)
    at = block_offsets(k, n, c, y, x, o_s, OUT_ROWS)
    tl.store(OUT + at, acc.to(OUT.dtype.element_ty), mask=mask)


def matrix_of(
    weight: Tensor, window: Window, flat: bool, precision: str, ready: Ready | None = None
):
    """The weight for `multiply`, the rows up to which it may be read, and its strides (part, group, tap, in, out)."""
    how = precision, flat, window.groups, window.transposed
    found = None if ready is None else ready.find(weight, how)
    if found is not None:
        return found
    w = grouped(weight, window)
    G, taps, I, O = w.shape
    if flat:
        (m,) = prepare((w.permute(1, 2, 0, 3).reshape(taps * I, G * O),), precision)
        strides = m.parts, O * m.columns, I * m.rows, m.rows, m.columns
    else:
        (m,) = prepare((w.permute(2, 0, 1, 3).reshape(I, G * taps * O),), precision)
        strides = m.parts, taps * O * m.columns, O * m.columns, m.rows, m.columns
    made = m.values, m.padded, strides
    if ready is not None:
        ready.keep([(weight, made)], how, m.values.untyped_storage().nbytes())
    return made


def diagonal(f: Factor | None, axes: int):
    """`support.factor` of values (N, C, *image), with strides for images of two axes."""
    if f is None:
        return None, (0,) * 4, None, ()
    return factor(Factor(image(f.values, axes), f.name, f.constants))


def result(
    t: Tensor, channels: int, size: tuple[int, ...], out: Tensor | None, last: bool | None = None
) -> Tensor:
    """The tensor (K, N, C, *size) to write: a new one is channels-``last`` or not, by default if t is."""
    if out is not None:
        return out
    shape = (*t.shape[:2], channels, *size)
    if last is None:
        last = t.stride(2) == 1 and t.shape[2] > 1
    if last:
        shape = (*shape[:2], *size, channels)
        return torch.empty(shape, dtype=t.dtype, device=t.device).movedim(-1, 2)
    return torch.empty(shape, dtype=t.dtype, device=t.device)


def convolve(
    t: Tensor,
    weight: Tensor,
    window: Window,
    before: Factor | None = None,
    after: Factor | None = None,
    *,
    precision: str,
    ready: Ready | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
    last: bool | None = None,
) -> Tensor:
    """``after * conv(before * t)``, or the transpose of a convolution (`windows.Window`).

    t: (K, N, C, *image), images of one or two axes; weight: ``(out, in / groups, *taps)``, or ``(in, out / groups,
    *taps)`` for the transpose; factors: (N, C, *image) of their side; all of one dtype, any strides. ``precision`` as
    in `linear.step`. ``ready``: see `support.Ready`. ``out``: (K, N, channels out, *window.size) of any strides; a new
    one is channels-``last``, which another convolution reads with the fewest loads, or not, by default as t is. Returns
    ``out``. Raises Unfit where the device cannot run the kernel, and for images of three axes. Costs ``2 K N C_out H W
    C_in / groups`` flops a tap (in the transpose, of the taps that reach an output); reads t once for each tap and
    ``config.out`` channels, mostly from the cache; writes out once, and the weight once for each of its parts.
    """
    axes = len(window.size)
    window = window.flat()
    w = grouped(weight, window)
    G, _, I, O = w.shape
    out = result(t, G * O, window.size[-axes:], out, last)
    if out.numel() == 0:
        return out
    c = config or CONFIGS[0]
    if t.stride(1) == 0 and t.shape[1] > 1 and t.stride(2) != 1:
        # read by every sample: worth a copy with channels side by side, which are loaded four at a time
        t = t[:, :1].movedim(2, -1).contiguous().movedim(-1, 2).expand(t.shape)
    src, dst, kernel = image(t, axes), image(out, axes), (1, *weight.shape[2:])[-2:]
    zb, sb, db, pb = diagonal(before, axes)
    za, sa, da, pa = diagonal(after, axes)
    inner = min(c.inner, power_of_two(I, 16))
    flat = w.shape[1] > 1 and triton.cdiv(I, inner) * inner > WASTE * I
    if flat:
        inner = min(c.inner, power_of_two(I * w.shape[1], 16))
    m, padded, sm = matrix_of(weight, window, flat, precision, ready)
    counts, rows = numbered(t.shape[0], t.shape[1], window.places)
    grid = (
        triton.cdiv(rows, c.rows) * triton.cdiv(O, c.out),
        G * window.phases[0] * window.phases[1],
    )
    far = wide(src, zb, weight, za, dst) or rows > MOST_ROWS
    launch(
        _conv, grid, dst,
        src, zb, m, za, dst, counts, t.shape[1], I, O, padded, tuple(src.shape[3:]), window.size, kernel,
        window.padding, src.stride(), sb, sm, sa, dst.stride(),
        window.stride, window.dilation, window.apart, window.common, window.inverse, window.step,
        db, pb, da, pa, precision, window.transposed, flat, not flat and I % inner == 0, src.stride(2) != 1,
        dst.stride(2) != 1, c.rows, min(c.out, power_of_two(O, 16)), inner, far,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out
