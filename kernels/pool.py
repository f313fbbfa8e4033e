"""Max pooling of a block by the saved indices, with the diagonals on either side.

    push   out[k, n, c, o] = after[n, c, o] * (before * t)[k, n, c, index[n, c, o]]
    pull   out[k, n, c, i] = after[n, c, i] * sum_(o: index[n, c, o] = i) (before * t)[k, n, c, o]

``index`` counts in an image (N, C, *image). The pull gathers too: each pixel asks the windows that hold it whether they
chose it, so that every element is written once, nothing is cleared before, and sums have one order. Seeds share the
loads of an index: a program computes SEEDS of them for TILE outputs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .conv import diagonal, result
from .launches import launch
from .linear import scaled
from .support import Factor, power_of_two, wide
from .windows import Window, block_offsets, image, offsets

SEEDS, TILE = 8, 128


@triton.jit
def _place(N, C, H, W, LAST: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """(sample, channel, y, x) of a program's outputs, neighbours in memory side by side, and which of them exist."""
    e = tl.program_id(0)
    if WIDE:
        e = e.to(tl.int64)
    e = (e * TILE + tl.arange(0, TILE))[None, :]
    if LAST:
        c, rest = e % C, e // C
        x, rest = rest % W, rest // W
        y, n = rest % H, rest // H
    else:
        x, rest = e % W, e // W
        y, rest = rest % H, rest // H
        c, n = rest % C, rest // C
    return n, c, y, x, n < N


@triton.jit
def _seeds(K, SEEDS: tl.constexpr, WIDE: tl.constexpr):
    k = tl.program_id(1)
    if WIDE:
        k = k.to(tl.int64)
    k = (k * SEEDS + tl.arange(0, SEEDS))[:, None]
    return k, k < K


@triton.jit
def _gather(
    T, INDEX, ZB, ZA, OUT, K, N, C, W_in, size, t_s, i_s, b_s, a_s, o_s,
    BEFORE: tl.constexpr, PB: tl.constexpr, AFTER: tl.constexpr, PA: tl.constexpr,
    LAST: tl.constexpr, SEEDS: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    n, c, y, x, there = _place(N, C, size[0], size[1], LAST, TILE, WIDE)
    k, some = _seeds(K, SEEDS, WIDE)
    mask = there & some
    i = tl.load(INDEX + offsets(n, c, y, x, i_s, True), mask=there, other=0)
    yy, xx = i // W_in, i % W_in
    t = tl.load(T + block_offsets(k, n, c, yy, xx, t_s, True), mask=mask, other=0.0)
    t = scaled(t, ZB, BEFORE, PB, offsets(n, c, yy, xx, b_s, True), there)
    t = scaled(t, ZA, AFTER, PA, offsets(n, c, y, x, a_s, True), there)
    tl.store(OUT + block_offsets(k, n, c, y, x, o_s, True), t.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _scatter(
    T, INDEX, ZB, ZA, OUT, K, N, C, size_in, size, taps, stride, padding, dilation, t_s, i_s, b_s, a_s, o_s,
    BEFORE: tl.constexpr, PB: tl.constexpr, AFTER: tl.constexpr, PA: tl.constexpr,
    LAST: tl.constexpr, SEEDS: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    n, c, y, x, there = _place(N, C, size[0], size[1], LAST, TILE, WIDE)
    k, some = _seeds(K, SEEDS, WIDE)
    own = y * size[1] + x
    acc = tl.zeros((SEEDS, TILE), tl.float32)
    for tap in range(taps[0] * taps[1]):
        # the window of output (yy, xx) reaches this pixel by this tap
        up = y + padding[0] - tap // taps[1] * dilation[0]
        left = x + padding[1] - tap % taps[1] * dilation[1]
        yy, xx = up // stride[0], left // stride[1]
        holds = there & (up >= 0) & (left >= 0) & (yy < size_in[0]) & (xx < size_in[1])
        holds = holds & (up % stride[0] == 0) & (left % stride[1] == 0)
        chosen = tl.load(INDEX + offsets(n, c, yy, xx, i_s, True), mask=holds, other=-1)
        chose = holds & (chosen == own)
        t = tl.load(T + block_offsets(k, n, c, yy, xx, t_s, True), mask=chose & some, other=0.0)
        t = scaled(t, ZB, BEFORE, PB, offsets(n, c, yy, xx, b_s, True), chose)
        acc += t.to(tl.float32)
    acc = scaled(acc, ZA, AFTER, PA, offsets(n, c, y, x, a_s, True), there)
    tl.store(
        OUT + block_offsets(k, n, c, y, x, o_s, True),
        acc.to(OUT.dtype.element_ty),
        mask=there & some,
    )


def _launch(
    kernel, t: Tensor, index: Tensor, axes: int, sizes, before, after, out: Tensor
) -> Tensor:
    """Run a kernel over ``out``; ``sizes`` of t's image are the arguments that the kernels do not share."""
    src, dst, at = image(t, axes), image(out, axes), image(index, axes)
    zb, sb, db, pb = diagonal(before, axes)
    za, sa, da, pa = diagonal(after, axes)
    K, N, C = t.shape[:3]
    seeds = min(SEEDS, power_of_two(K))
    launch(
        kernel, (triton.cdiv(out.numel() // K, TILE), triton.cdiv(K, seeds)), dst,
        src, at, zb, za, dst, K, N, C, *sizes(tuple(src.shape[3:])), src.stride(), at.stride(), sb, sa,
        dst.stride(), db, pb, da, pa, dst.stride(2) == 1 and C > 1, seeds, TILE, wide(src, at, zb, za, dst),
        num_warps=4,
    )  # fmt: skip
    return out


def gather(
    t: Tensor,
    index: Tensor,
    before: Factor | None = None,
    after: Factor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The push of a pool: ``after * (before * t)[..., index]``.

    t: (K, N, C, *image), images of one or two axes; index: (N, C, *size), integers that count in an image; factors of
    their side's shape; any strides. Returns ``out`` (K, N, C, *size), new and in t's memory format unless given.
    Raises Unfit where the device cannot run it, and for images of three axes. Reads one entry of t, and writes one,
    for each output; an index serves `SEEDS` seeds.
    """
    axes = index.dim() - 2
    window = Window(tuple(index.shape[2:]), *((1,) * axes,) * 3).flat()
    out = result(t, t.shape[2], tuple(index.shape[2:]), out)
    if out.numel() == 0:
        return out
    return _launch(
        _gather, t, index, axes, lambda image: (image[1], window.size), before, after, out
    )


def scatter(
    t: Tensor,
    index: Tensor,
    window: Window,
    taps: tuple[int, ...],
    before: Factor | None = None,
    after: Factor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The pull of a pool: ``before * t`` put where its index says, added up, times ``after``.

    t: (K, N, C, *pooled); index: (N, C, *pooled), in the image ``window.size`` of the result; ``window`` and ``taps``:
    the pool's windows, outside of which no index may point. The rest is as in `gather`. Reads an index for each tap and
    `SEEDS` results, mostly from the cache, and t where it was chosen; writes out once.
    """
    axes = len(window.size)
    window = window.flat()
    out = result(t, t.shape[2], window.size[-axes:], out)
    if out.numel() == 0:
        return out
    windows = window.size, (1, *taps)[-2:], window.stride, window.padding, window.dilation
    return _launch(_scatter, t, index, axes, lambda image: (image, *windows), before, after, out)
