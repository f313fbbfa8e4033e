"""The first convolution of a sweep with coloured seeds, from its weight alone: no block of seeds is formed or read.

Seed ``k`` is one where channel, line and column of the image are those of its colours, modulo the periods: so an output
sees it through the taps that lead to such pixels, and

    out[k, n, o, y, x] = after[n, o, y, x] * sum of weight[o, i, tap] over the taps that reach colour k of channel i.

Where a period is at least as long as the kernel, that is one tap or none: a store for each load of a weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv import diagonal
from .launches import launch
from .linear import scaled
from .support import Factor, power_of_two, wide
from .windows import (
    MOST_ROWS,
    Window,
    block_offsets,
    divided,
    divisor,
    grouped,
    image,
    numbered,
    offsets,
    pixel,
)

Colours = tuple[int, int, int]
"""Along one axis: the period of the colours, the first of a chunk, and how many are in it."""

PIXELS, CHANNELS = 256, 4
"""The tile: neighbours in an image share its lines, channels the search for taps."""


@triton.jit
def _reach(
    place, colour, period, size_in, taps, stride, padding, dilation, j, TRANSPOSED: tl.constexpr
):
    """For one axis: the j-th tap of an output that may reach its colour, and whether there is one."""
    # all terms of a modulus are positive: remainders of others depend on the compiler
    if TRANSPOSED:
        every = stride * period
        at = (place + padding + every - stride * colour % every) % every + j * every
        source = place + padding - at
        there = (source >= 0) & (source < size_in * stride)
    else:
        every = period
        at = (colour + padding + every - place * stride % every) % every + j * every
        source = place * stride + at - padding
        there = (source >= 0) & (source < size_in)
    return at // dilation, there & (at % dilation == 0) & (at < taps * dilation)


@triton.jit
def _first(
    W, ZA, OUT, counts, N, I, O, channels, start, count, size_in, size, taps, padding, w_s, a_s, o_s,
    period: tl.constexpr, stride: tl.constexpr, dilation: tl.constexpr, tries: tl.constexpr,
    AFTER: tl.constexpr, PA: tl.constexpr, TRANSPOSED: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = tl.cdiv(channels, BC)
    row, c = pid // tiles, (pid % tiles) * BC + tl.arange(0, BC)
    if WIDE:
        row, c = row.to(tl.int64), c.to(tl.int64)
    n, k, y, x = pixel(tl.expand_dims(row * BM + tl.arange(0, BM), 0), counts, WIDE)
    c = tl.expand_dims(c, 1)
    inside = (n < N) & (c < channels)
    g = c // O
    # the channel that the seed is one in, within the group
    rest, colour_x = divided(k, count[2], WIDE)
    i, colour_y = divided(rest, count[1], WIDE)
    i += start[0] - g * I
    colour_y, colour_x = start[1] + colour_y, start[2] + colour_x
    own = inside & (i >= 0) & (i < I)
    at = W + g * w_s[0] + i * w_s[2] + (c - g * O) * w_s[3]
    acc = tl.zeros((BC, BM), tl.float32)
    for j in range(tries[0] * tries[1]):
        tap_y, in_y = _reach(
            y, colour_y, period[1], size_in[0], taps[0], stride[0], padding[0], dilation[0],
            j // tries[1], TRANSPOSED,
        )  # fmt: skip
        tap_x, in_x = _reach(
            x, colour_x, period[2], size_in[1], taps[1], stride[1], padding[1], dilation[1],
            j % tries[1], TRANSPOSED,
        )  # fmt: skip
        mask = own & in_y & in_x
        w = tl.load(at + (tap_y * taps[1] + tap_x) * w_s[1], mask=mask, other=0.0)
        acc += w.to(tl.float32)
    acc = scaled(acc, ZA, AFTER, PA, offsets(n, c, y, x, a_s, True), inside)
    tl.store(
        OUT + block_offsets(k, n, c, y, x, o_s, True), acc.to(OUT.dtype.element_ty), mask=inside
    )


def first(
    weight: Tensor,
    window: Window,
    size_in: tuple[int, ...],
    colours: tuple[Colours, ...],
    samples: int = 1,
    after: Factor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``after * conv(seeds)``, or the transpose of a convolution, for coloured seeds on images of ``size_in``.

    weight, window: as in `conv.convolve`; colours: of the channels (with a period of all of them) and of each axis of
    the image, slow axis first; seeds are numbered in their order. after: (samples, C, *image). ``out``: (K, samples,
    channels out, *window.size) of any strides. Returns ``out``. Takes the dtypes that kernels compute in. Raises Unfit
    where the device cannot run it, and for images of three axes. Costs a load of a weight for each output and period
    within the kernel; writes out once.
    """
    axes = len(window.size)
    window = window.flat()
    if axes == 1:
        size_in, colours = (1, *size_in), (colours[0], (1, 0, 1), colours[1])
    period, start, count = zip(*colours, strict=True)
    w = grouped(weight, window)
    G, _, I, O = w.shape
    if period[0] != G * I:
        raise ValueError(f"{period[0]} colours for {G * I} channels: each must have its own")
    K = count[0] * count[1] * count[2]
    if out is None:
        shape = (K, samples, G * O, *window.size[-axes:])
        out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    if out.numel() == 0:
        return out
    dst, kernel = image(out, axes), (1, *weight.shape[2:])[-2:]
    za, sa, da, pa = diagonal(after, axes)
    every = [
        p * (s if window.transposed else 1) for p, s in zip(period[1:], window.stride, strict=True)
    ]
    tries = tuple(
        triton.cdiv(d * (t - 1) + 1, e)
        for d, t, e in zip(window.dilation, kernel, every, strict=True)
    )
    tile = min(CHANNELS, power_of_two(G * O))
    counts, rows = numbered(K, samples, window.size)
    grid = (triton.cdiv(rows, PIXELS) * triton.cdiv(G * O, tile),)
    far = wide(weight, za, dst) or rows > MOST_ROWS
    launch(
        _first, grid, dst,
        w, za, dst, counts, samples, I, O, G * O, start, tuple(map(divisor, count)), tuple(size_in), window.size,
        kernel, window.padding, w.stride(), sa, dst.stride(), (1, *period[1:]), window.stride, window.dilation,
        tries, da, pa, window.transposed, PIXELS, tile, far, num_warps=4,
    )  # fmt: skip
    return out
