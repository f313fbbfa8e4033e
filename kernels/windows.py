"""Which inputs a window reaches: the arithmetic that kernels over images share.

Along one axis, output ``o`` of a convolution takes the inputs ``o stride - padding + k dilation`` for its taps k. Its
transpose takes ``(o + padding - k dilation) / stride`` where that is whole. There, outputs of one *phase* (``o`` modulo
the stride) have the same taps: a program computes one phase, and multiplies by no tap that misses. In both cases tap
``first + j apart`` of the output numbered ``y`` in its phase reaches input ``y scale + start + j step``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod

import triton
import triton.language as tl
from torch import Tensor

from .support import Unfit

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A convolution's arguments, an entry an axis of the image; ``size`` is that of the result's image.

    ``transposed``: the result gathers as the transpose of such a convolution does, with the weight ``(in, out / groups,
    ...)``; otherwise the weight is ``(out, in / groups, ...)``. ``size`` may exceed what the windows reach: zeros.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    def flat(self) -> Window:
        """The same on images with two axes. Raises Unfit for more."""
        if len(self.size) == 2:
            return self
        if len(self.size) != 1:
            raise Unfit(f"images with {len(self.size)} axes")
        return Window(
            (1, *self.size), (1, *self.stride), (0, *self.padding), (1, *self.dilation), self.groups,
            self.transposed,
        )  # fmt: skip

    @property
    def phases(self) -> Pair:
        return tuple(self.stride) if self.transposed else (1, 1)

    @property
    def apart(self) -> Pair:
        """How many taps lie between two that reach the same phase."""
        both = zip(self.stride, self.common, strict=True)
        return tuple(s // g if self.transposed else 1 for s, g in both)

    @property
    def common(self) -> Pair:
        both = zip(self.stride, self.dilation, strict=True)
        return tuple(gcd(s, d) for s, d in both)

    @property
    def inverse(self) -> Pair:
        """The tap that one more output moves to: the inverse of the dilation modulo the stride, both over `common`."""
        both = zip(self.dilation, self.common, self.apart, strict=True)
        return tuple(pow(d // g, -1, a) for d, g, a in both)

    @property
    def step(self) -> Pair:
        """The inputs between two such taps."""
        both = zip(self.dilation, self.common, strict=True)
        return tuple(-(d // g) if self.transposed else d for d, g in both)

    @property
    def places(self) -> Pair:
        """The outputs of the largest phase."""
        return tuple(-(-n // p) for n, p in zip(self.size, self.phases, strict=True))


def image(t: Tensor, axes: int) -> Tensor:
    """A tensor with images of one axis as one with images of two; others as they are."""
    return t.unsqueeze(-2) if axes == 1 else t


def grouped(weight: Tensor, window: Window) -> Tensor:
    """The weight as (groups, taps, in, out): a view, except in channels-last memory."""
    w = weight.reshape(
        window.groups, weight.shape[0] // window.groups, weight.shape[1], weight.shape[2:].numel()
    )
    return w.permute(0, 3, 1, 2) if window.transposed else w.permute(0, 3, 2, 1)


def divisor(d: int) -> tuple[int, int, int]:
    """A divisor for `divided`: d, and by what to multiply and shift instead.

    With ``m = ceil(2^(31 + s) / d)`` and ``2^s >= d``, ``x // d = x m // 2^(31 + s)`` for all x below 2^31 (Granlund,
    Montgomery 1994, theorem 4.2). m has 32 bits and is given as a signed number.
    """
    s = (d - 1).bit_length()
    m = -(-(1 << (31 + s)) // d)
    return d, m - (1 << 32 if m >= 1 << 31 else 0), s


MOST_ROWS = 1 << 30
"""Beyond, rows are numbered in 64 bits."""


def numbered(seeds: int, samples: int, places: Pair):
    """What `pixel` needs to know of the rows (sample, seed, y, x), and how many there are."""
    counts = seeds, *places
    return tuple(map(divisor, counts)), samples * prod(counts)


@triton.jit
def taps_of(
    phase, taps, stride, padding, dilation, apart, common, inverse, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """For one axis of a phase: first tap, number of taps, input that the first tap of output 0 reaches."""
    if TRANSPOSED:
        # the least tap for which phase + padding - tap * dilation is a multiple of the stride
        up = phase + padding
        first = tl.where(up % common == 0, up // common * inverse % apart, taps)
        count = tl.cdiv(tl.maximum(taps - first, 0), apart)
        return first, count, (up - first * dilation) // stride
    else:
        return 0, taps, -padding


@triton.jit
def inside(at, size):
    """Whether ``0 <= at < size``, by one comparison: what is negative is large where it counts as unsigned."""
    if at.dtype.is_int64():
        return at.to(tl.uint64, bitcast=True) < size
    else:
        return at.to(tl.uint32, bitcast=True) < size


@triton.jit
def offsets(n, c, y, x, strides, ROWS: tl.constexpr):
    """Offsets of entries (n, c, y, x); with images in rows, neighbours in the last axis go to neighbouring threads.

    A row of an image is too short, or too odd, for the compiler to see that its pixels are neighbours, and versions
    differ in what they do then. As the offsets are called multiples of nothing, no load gets wider by the hint.
    """
    at = n * strides[0] + c * strides[1] + y * strides[2] + x * strides[3]
    if ROWS:
        at = tl.max_contiguous(tl.multiple_of(at, [1, 1]), [1, at.shape[1]])
    return at


@triton.jit
def block_offsets(k, n, c, y, x, strides, ROWS: tl.constexpr):
    """The same of entries (k, n, c, y, x)."""
    at = k * strides[0] + n * strides[1] + c * strides[2] + y * strides[3] + x * strides[4]
    if ROWS:
        at = tl.max_contiguous(tl.multiple_of(at, [1, 1]), [1, at.shape[1]])
    return at


@triton.jit
def divided(at, by, WIDE: tl.constexpr):
    """Quotient and remainder of what is not negative, by a `divisor`."""
    if WIDE:
        quotient = at // by[0]
    else:
        twice = (at * 2).to(tl.uint32, bitcast=True).to(tl.uint64)
        times = by[1].to(tl.uint32, bitcast=True).to(tl.uint64)
        quotient = (twice * times >> 32).to(tl.int32) >> by[2]
    return quotient, at - quotient * by[0]


@triton.jit
def pixel(row, counts, WIDE: tl.constexpr):
    """(sample, seed, y, x) of rows in that order: neighbours in a row of an image lie side by side.

    ``counts``: of seeds, lines and columns, each a `divisor`.
    """
    rest, x = divided(row, counts[2], WIDE)
    rest, y = divided(rest, counts[1], WIDE)
    n, k = divided(rest, counts[0], WIDE)
    return n, k, y, x
