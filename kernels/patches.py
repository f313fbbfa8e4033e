"""The last one or two convolutions of a sweep by patches, from weights to the answer, in one launch.

For every pixel of the seed, a row here, a block has the window of pixels that it reaches, a column for each channel of
each (see `patches`): a convolution of windows is a matrix made of its weights alone, a derivative a window of
the image. With one matrix less, the first line goes:

    h[row, :] = (z0[row, :] * t[row, :]) @ m1
    out[row, :] = z2[row, :] * ((z1[row, :] * h[row, :]) @ m2)

Windows of a derivative with a border of zeros are no more than addresses, an offset of the row plus one of the column;
so are those of the answer, in which a row fills its window and leaves the rest zero. No block is written in between.

As in `chain.pair`, h is taken a tile of its columns at a time, which is multiplied by its part of the second matrix and
forgotten. A tile needs only those lines of its window that the convolution connects it with: the others of the matrix
are zero, and are not multiplied. The left factor of the first product is formed once where its parts fit into shared
memory (``inner`` of a `Config` is 0), else for each tile, ``inner`` columns at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chain import generation
from .launches import launch
from .linear import Config
from .operands import cut, multiply, prepare, times
from .support import Ready, power_of_two, wide
from .windows import Pair, divisor, inside, pixel

WIDEST_OUT = 128
"""The most columns of the result: they are held in registers beside a tile of the middle."""

CONFIGS = (
    Config(128, 64, 16, 8, 2),
    # half the registers: two programs on a multiprocessor hide each other's latency
    Config(64, 64, 16, 4, 3),
)

RESIDENT_CONFIG = Config(128, 32, 0, 8, 2)

RESIDENT = {"fp32": 160, "tf32": 288, "half": 512}
"""The most columns of a left factor whose parts fit into a Hopper's shared memory beside tiles of the matrices. Older
tensor cores would keep them in registers."""

ZEROS = 4096
"""Entries of the answer that a program zeroes at once, between two tiles: memory writes while tensor cores multiply."""


@dataclass(frozen=True)
class Place:
    """Where results go: entry (i, j) of the window of seed (n, k, y, x), in channel c, has the offset

    ``start + (n, k, y, x, i, j, c) . strides``, and is written if it lies in the image, that is if
    ``first + step * (y, x) + (i, j)`` lies between 0 and ``image``.
    """

    strides: tuple[int, ...]
    start: int
    first: Pair
    step: Pair
    image: Pair


@triton.jit
def _column(h, strides, LINE: tl.constexpr, C: tl.constexpr):
    """Offsets of the columns of windows: LINE pixels a line, C channels; the last three strides are the windows'."""
    c, at = h % C, h // C
    return at // LINE * strides[3] + at % LINE * strides[4] + c * strides[5]


@triton.jit
def _scaled(t, Z, row, h, there, strides, LINE: tl.constexpr, C: tl.constexpr):
    """Columns h of rows, those that are there, times their window of a derivative."""
    if Z is None:
        return t
    else:
        z = tl.load(Z + row + _column(h, strides, LINE, C)[None, :], mask=there[None, :], other=0.0)
        return t.to(tl.float32) * z.to(tl.float32)


@triton.jit
def _formed(T, t_s, Z, row, h, there, strides, LINE: tl.constexpr, C: tl.constexpr):
    """Columns h of the left factor of a product."""
    t = tl.load(T + h[None, :] * t_s[4], mask=there[None, :], other=0.0)
    return _scaled(t, Z, row, h, there, strides, LINE, C)


@triton.jit
def _part(M, m_s, i, there, h, H):
    """Where rows i of a matrix lie, and which entries are there."""
    return M + i[:, None] * m_s[1] + h[None, :] * m_s[2], there[:, None] & (h < H)[None, :]


@triton.jit
def _piece(
    parts, M, m_s, h, H, acc, low, high,
    START: tl.constexpr, B: tl.constexpr, END: tl.constexpr, LINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc`` and the product of a piece of a left factor that is held, if its line is one from low to high."""
    i = START + tl.arange(0, B)
    at, mask = _part(M, m_s, i, i < END, h, H)
    if LINE is None:
        return times(parts, at, m_s[0], mask, acc, PRECISION)
    else:
        line: tl.constexpr = START // LINE
        if (low <= line) & (line <= high):
            acc = times(parts, at, m_s[0], mask, acc, PRECISION)
        return acc


@triton.jit
def _patches(
    T, M1, M2, Z0, Z1, Z2, OUT, counts, R, padded1, padded2, V,
    t_s, z0_s, z1_s, z2_s, m1_s, m2_s, o_s, start, first, step, image,
    I: tl.constexpr, H: tl.constexpr, O: tl.constexpr, SIZES: tl.constexpr, LINE: tl.constexpr,
    LINE_OUT: tl.constexpr, REACH: tl.constexpr, STRIDE: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, BZ: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pid, o = tl.program_id(0), tl.arange(0, BO)
    if WIDE:
        pid, o = pid.to(tl.int64), o.to(tl.int64)
    row = pid * BM + tl.arange(0, BM)
    n, k, y, x = pixel(tl.minimum(row, R - 1), counts, WIDE)  # what is too much is not stored
    t_at = T + (n * t_s[0] + k * t_s[1] + y * t_s[2] + x * t_s[3])[:, None]
    z0_at = (n * z0_s[0] + y * z0_s[1] + x * z0_s[2])[:, None]
    z1_at = (n * z1_s[0] + y * z1_s[1] + x * z1_s[2])[:, None]
    z2_at = (n * z2_s[0] + y * z2_s[1] + x * z2_s[2])[:, None]
    out = tl.zeros((BM, BO), tl.float32)
    held = ()
    for p in tl.static_range(len(PIECES)):
        i = PIECES[p][0] + tl.arange(0, PIECES[p][1])
        t = _formed(t_at, t_s, Z0, z0_at, i, i < PIECES[p][2], z0_s, SIZES[0][0], SIZES[0][1])
        held = held + (cut(t, M1.dtype.element_ty, PRECISION, True),)
    TILES: tl.constexpr = (H + BH - 1) // BH
    for h_start in range(0, H, BH):
        h = h_start + tl.arange(0, BH)
        if M1 is None:
            acc = _formed(t_at, t_s, None, None, h, h < H, None, None, None)
        else:
            acc = tl.zeros((BM, BH), tl.float32)
            # the lines of the window that reach those of the tile
            low = tl.maximum(h_start // LINE_OUT - REACH + STRIDE - 1, 0) // STRIDE
            high = tl.minimum(h_start + BH - 1, H - 1) // LINE_OUT // STRIDE
            if len(PIECES) > 0:
                for p in tl.static_range(len(PIECES)):
                    acc = _piece(
                        held[p], M1, m1_s, h, H, acc, low, high, PIECES[p][0], PIECES[p][1],
                        PIECES[p][2], None if LINE == I else LINE, PRECISION,
                    )  # fmt: skip
            else:
                for i_start in range(low * LINE, tl.minimum((high + 1) * LINE, I), BI):
                    i = i_start + tl.arange(0, BI)
                    t = _formed(t_at, t_s, Z0, z0_at, i, i < I, z0_s, SIZES[0][0], SIZES[0][1])
                    at, mask = _part(M1, m1_s, i, i < padded1, h, H)
                    acc = multiply(t, at, m1_s[0], mask, acc, PRECISION, Z0 is not None)
        acc = _scaled(acc, Z1, z1_at, h, h < H, z1_s, SIZES[1][0], SIZES[1][1])
        at, mask = _part(M2, m2_s, h, h < padded2, o, O)
        out = multiply(acc, at, m2_s[0], mask, out, PRECISION, True)
        if BZ > 0:
            # the rows' part of the answer is one range, which all tiles zero together
            each = tl.cdiv(BM * V, TILES * BZ) * BZ
            zeros = pid * BM * V + h_start // BH * each
            for z_start in range(0, each, BZ):
                z = zeros + z_start + tl.arange(0, BZ)
                mine = z < tl.minimum((pid + 1) * BM, R) * V
                tl.store(OUT + z, tl.zeros((BZ,), OUT.dtype.element_ty), mask=mine)
    out = _scaled(out, Z2, z2_at, o, o < O, z2_s, SIZES[2][0], SIZES[2][1])
    if BZ > 0:
        tl.debug_barrier()  # what other threads zeroed comes before what is stored now
    c, at = o % SIZES[2][1], o // SIZES[2][1]
    i, j = (at // SIZES[2][0])[None, :], (at % SIZES[2][0])[None, :]
    there = (row < R)[:, None] & (o < O)[None, :]
    there &= inside((y * step[0] + first[0])[:, None] + i, image[0])
    there &= inside((x * step[1] + first[1])[:, None] + j, image[1])
    to = (n * o_s[0] + k * o_s[1] + y * o_s[2] + x * o_s[3] + start)[:, None]
    to += i * o_s[4] + j * o_s[5] + c[None, :] * o_s[6]
    tl.store(OUT + to, out.to(OUT.dtype.element_ty), mask=there)


def configs(widths: Sequence[int], precision: str, device: torch.device) -> tuple[Config, ...]:
    """How to run windows of these columns, the block's first, at "fp32", "tf32" or "half"; empty where it cannot."""
    if len(widths) not in (2, 3) or min(widths) < 1 or widths[-1] > WIDEST_OUT:
        return ()
    fits = len(widths) == 3 and widths[0] <= RESIDENT[precision] and generation(device) == 9
    return (RESIDENT_CONFIG, *CONFIGS) if fits else CONFIGS


def _pieces(line: int, lines: int) -> tuple[tuple[int, int, int], ...]:
    """(start, columns, end) of the pieces of a left factor, powers of two; none reaches beyond a line."""
    found = []
    for end in range(line, line * (lines + 1), line):
        at = end - line
        while at < end:
            size = max(16, 1 << (end - at).bit_length() - 1)
            found.append((at, size, end))
            at += size
    return tuple(found)


def patches(
    t: Tensor,
    matrices: Sequence[Tensor],
    factors: Sequence[Tensor | None],
    sizes: Sequence[tuple[int, int, int]],
    reach: tuple[int, int],
    out: Tensor,
    place: Place,
    *,
    zeros: int = 0,
    precision: str,
    ready: Ready | None = None,
    config: Config | None = None,
) -> Tensor:
    """One or two convolutions of windows, with their scalings, of a block ``t``; the result is written into ``out``.

    t: (N, K, lines, columns, w_0): samples, channels and pixels of the seed, any strides; matrices: (w_l, w_(l+1));
    factors: windows (N, lines, columns, *sizes[l]) of derivatives for each width, any strides, or None; sizes: (lines,
    columns, channels) of the windows, w_l of them all together. ``reach``: line i of the first window is connected with
    the lines from ``i * reach[1]`` to ``i * reach[1] + reach[0]`` of the second one, where there are two matrices.
    ``out``: contiguous and flat. ``zeros``: how many entries of it belong to each seed, which lie one after the other
    and are zeroed first. ``precision``, ``ready`` as in `linear.step`. Returns ``out``. Raises Unfit where the device
    cannot run it. Costs ``2 N K lines columns (w_0 w_1 + w_1 w_2)`` flops at most; reads t and the images of
    derivatives, writes out once.
    """
    (_, K, lines, columns, I), R = t.shape, t.shape[:4].numel()
    if R == 0 or matrices[-1].shape[1] == 0:
        return out.zero_() if zeros else out
    c = config or CONFIGS[-1]
    m2, *m1 = prepare(matrices, precision, ready)[::-1]
    a = m1[0] if m1 else m2
    first, middle, last = (None, *range(len(sizes)))[-3:]
    z = [None if i is None else factors[i] for i in (first, middle, last)]
    # flat: triton 3.6 loses a 1 in the middle of a tuple within a tuple
    z_s = [(0,) * 6 if f is None else f.stride() for f in z]
    size = [None if i is None else sizes[i][1:] for i in (first, middle, last)]
    H, O = matrices[-1].shape
    line, line_out = prod(sizes[0][1:]), prod(sizes[-2][1:])
    if line % 16:  # no whole tiles: as one line, none of which is left out
        line, line_out, reach = I, H, (0, 1)
    whole = m1 and not c.inner
    inner = min(c.inner or 16, power_of_two(line, 16))
    far = wide(t, out, *factors, *matrices) or R * max(zeros, 1) >= 1 << 31
    launch(
        _patches, (triton.cdiv(R, c.rows),), out,
        t, a.values if m1 else None, m2.values, *z, out, tuple(map(divisor, (K, lines, columns))), R, a.padded,
        m2.padded, zeros, t.stride(), *z_s, a.strides, m2.strides, place.strides, place.start, place.first, place.step,
        place.image,
        I, H, O, tuple(size), line, line_out, *reach, _pieces(line, I // line) if whole else (), precision, c.rows,
        min(c.out, power_of_two(H, 16)), inner, power_of_two(O, 16), ZEROS if zeros else 0, far,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return out
