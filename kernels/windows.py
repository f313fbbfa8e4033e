"""Which inputs a window reaches: the arithmetic that kernels over images share.

Along one axis, output ``o`` of a convolution takes the inputs ``o stride - padding + k dilation`` for its taps k. Its
transpose takes ``(o + padding - k dilation) / stride`` where that is whole. There, outputs of one *phase* (``o`` modulo
the stride) have the same taps: a program computes one phase, and multiplies by no tap that misses. In both cases tap
``first + j apart`` of the output numbered ``y`` in its phase reaches input ``y scale + start + j step``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

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


@triton.jit
def taps_of(
    phase, size, taps, stride, padding, dilation, apart, common, inverse, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """For one axis: outputs of the phase, first tap, number of taps, input that the first tap of output 0 reaches."""
    if TRANSPOSED:
        # the least tap for which phase + padding - tap * dilation is a multiple of the stride
        up = phase + padding
        first = tl.where(up % common == 0, up // common * inverse % apart, taps)
        # no phase is empty in the eyes of a division; the outputs beyond the image are masked
        places = tl.maximum(tl.cdiv(size - phase, stride), 1)
        count = tl.cdiv(tl.maximum(taps - first, 0), apart)
        return places, first, count, (up - first * dilation) // stride
    else:
        return size, 0, taps, -padding


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
def pixel(row, K, PH, PW):
    """(sample, seed, y, x) of rows in that order: neighbours in a row of an image lie side by side."""
    x, rest = row % PW, row // PW
    y, rest = rest % PH, rest // PH
    return rest // K, rest % K, y, x
