"""Convolutions with few channels a group, without tensor cores: depthwise ones, small groups, few channels out.

The formula is that of `conv`; sums are float32 multiply-adds, whatever precision tensor cores are allowed. A program
computes BM outputs and BC channels: of one group, which then share the inputs that are loaded, or, where a group has
one channel out, of BC groups.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .conv import diagonal, result
from .launches import launch
from .linear import Config, scaled
from .support import Factor, power_of_two, wide
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
)  # fmt: skip

MOST = 8
"""Channels out a group up to which this is worth a try: tensor cores compute 16 at once."""

CONFIGS = (Config(256, 4, 0, 4, 1), Config(32, 32, 0, 4, 1))
"""For images in rows, and for channels-last memory."""


@triton.jit
def _direct(
    T, ZB, WT, ZA, OUT, counts, N, G, I, O, size_in, size, taps, padding, t_s, b_s, w_s, a_s, o_s,
    stride: tl.constexpr, dilation: tl.constexpr, apart: tl.constexpr, common: tl.constexpr, inverse: tl.constexpr,
    step: tl.constexpr,
    BEFORE: tl.constexpr, PB: tl.constexpr, AFTER: tl.constexpr, PA: tl.constexpr,
    TRANSPOSED: tl.constexpr, MANY: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    pid, g = tl.program_id(0), tl.program_id(1)
    phase_y, phase_x = 0, 0
    if TRANSPOSED:
        phase_x = g % stride[1]
        phase_y = g // stride[1] % stride[0]
        g = g // (stride[0] * stride[1])
    columns = G if MANY else O
    tiles = tl.cdiv(columns, BC)
    # tiles lie as memory does, see `conv`
    R: tl.constexpr = 0 if ROWS else 1
    row, o = pid // tiles, tl.expand_dims((pid % tiles) * BC + tl.arange(0, BC), 1 - R)
    if WIDE:
        row, o, g = row.to(tl.int64), o.to(tl.int64), g.to(tl.int64)
    outside = o < columns
    w_at = WT + o * (w_s[0] if MANY else w_s[3])
    channel = o
    if MANY:
        g = o  # a group a column
    else:
        w_at += g * w_s[0]
        channel = g * O + o
    first_y, taps_y, y0 = taps_of(
        phase_y, taps[0], stride[0], padding[0], dilation[0], apart[0], common[0], inverse[0],
        TRANSPOSED,
    )  # fmt: skip
    first_x, taps_x, x0 = taps_of(
        phase_x, taps[1], stride[1], padding[1], dilation[1], apart[1], common[1], inverse[1],
        TRANSPOSED,
    )  # fmt: skip
    n, k, y, x = pixel(tl.expand_dims(row * BM + tl.arange(0, BM), R), counts, WIDE)
    if TRANSPOSED:
        out_y, out_x = phase_y + y * stride[0], phase_x + x * stride[1]
    else:
        out_y, out_x = y, x
        y, x = y * stride[0], x * stride[1]
    there = (n < N) & (out_y < size[0]) & (out_x < size[1])
    y, x = y + y0, x + x0
    t_at = T + block_offsets(k, n, g * I, y, x, t_s, ROWS)
    b_at = offsets(n, g * I, y, x, b_s, ROWS)
    if ROWS:
        acc = tl.zeros((BC, BM), tl.float32)
    else:
        acc = tl.zeros((BM, BC), tl.float32)
    for tap_y in range(taps_y):
        dy = tap_y * step[0]
        near = there & inside(y + dy, size_in[0])
        for tap_x in range(taps_x):
            dx = tap_x * step[1]
            mask = near & inside(x + dx, size_in[1])
            if MANY:
                mask = mask & outside
            if TRANSPOSED:
                tap = (first_y + tap_y * apart[0]) * taps[1] + first_x + tap_x * apart[1]
            else:
                tap = tap_y * taps_x + tap_x
            for i in range(I):
                at = dy * t_s[3] + dx * t_s[4] + i * t_s[2]
                t = tl.load(t_at + at, mask=mask, other=0.0)
                at = b_at + (dy * b_s[2] + dx * b_s[3] + i * b_s[1])
                t = scaled(t, ZB, BEFORE, PB, at, mask).to(tl.float32)
                w = tl.load(w_at + (tap * w_s[1] + i * w_s[2]), mask=outside, other=0.0)
                acc += t * w.to(tl.float32)
    mask = there & outside
    acc = scaled(acc, ZA, AFTER, PA, offsets(n, channel, out_y, out_x, a_s, ROWS), mask)
    at = block_offsets(k, n, channel, out_y, out_x, o_s, ROWS)
    tl.store(OUT + at, acc.to(OUT.dtype.element_ty), mask=mask)


def direct(
    t: Tensor,
    weight: Tensor,
    window: Window,
    before: Factor | None = None,
    after: Factor | None = None,
    *,
    out: Tensor | None = None,
    config: Config | None = None,
    last: bool | None = None,
) -> Tensor:
    """`conv.convolve` without tensor cores, for any number of groups.

    Costs as many flops; reads t once for each tap and ``config.out`` channels of a group, mostly from the cache; writes
    out once.
    """
    axes = len(window.size)
    window = window.flat()
    w = grouped(weight, window)
    G, _, I, O = w.shape
    out = result(t, G * O, window.size[-axes:], out, last)
    if out.numel() == 0:
        return out
    many = O == 1
    c = config or CONFIGS[t.stride(2) == 1 and t.shape[2] > 1 and many]
    src, dst, kernel = image(t, axes), image(out, axes), (1, *weight.shape[2:])[-2:]
    zb, sb, db, pb = diagonal(before, axes)
    za, sa, da, pa = diagonal(after, axes)
    columns = G if many else O
    tile = min(c.out, power_of_two(columns))
    counts, rows = numbered(t.shape[0], t.shape[1], window.places)
    grid = (
        triton.cdiv(rows, c.rows) * triton.cdiv(columns, tile),
        (1 if many else G) * window.phases[0] * window.phases[1],
    )
    far = wide(src, zb, w, za, dst) or rows > MOST_ROWS
    launch(
        _direct, grid, dst,
        src, zb, w, za, dst, counts, t.shape[1], G, I, O, tuple(src.shape[3:]), window.size, kernel, window.padding,
        src.stride(), sb, w.stride(), sa, dst.stride(),
        window.stride, window.dilation, window.apart, window.common, window.inverse, window.step,
        db, pb, da, pa, window.transposed, many, src.stride(2) != 1, c.rows, tile, far,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out
