"""Convolutions on a CPU in float32, as oneDNN and its products run them best.

Images are run in channels-last memory: oneDNN then needs 0.5 to 0.8 of the time, and the elementwise steps in between
keep the format. Where images are small and channels many, forming the packed weights costs more than the convolution:
there a product with the weights as they are does (`by_columns`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import backends

if TYPE_CHECKING:
    from .convolution import Geometry

LANES = 16
"""Channels that oneDNN computes at once; fewer output channels leave lanes empty (see `blocked_weight`)."""


def quick(t: Tensor) -> bool:
    """Whether channels-last memory is the faster one here: oneDNN runs the convolution."""
    return (
        t.dtype == torch.float32
        and t.device.type == "cpu"
        and t.numel() > 0
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and not torch.is_grad_enabled()
    )


def channels_last(t: Tensor) -> Tensor:
    """Images with their channels side by side in memory."""
    return t.contiguous(
        memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d
    )


def blocked_weight(w: Tensor, by: int, bx: int) -> Tensor:
    """The weight that computes ``by * bx`` neighbouring outputs of a stride-1 convolution as channels.

    ``(O, I, kh, kw)`` becomes ``(by * bx * O, I, kh + by - 1, kw + bx - 1)``: the kernel at every offset in a larger
    window. With 3 output channels, 13 of oneDNN's 16 lanes idle; blocks of 2 * 2 fill 12 for 16/9 of the
    multiplications.
    """
    o, i, kh, kw = w.shape
    out = w.new_zeros(by, bx, o, i, kh + by - 1, kw + bx - 1)
    for y in range(by):
        for x in range(bx):
            out[y, x, :, :, y : y + kh, x : x + kw] = w
    return out.view(-1, i, kh + by - 1, kw + bx - 1)


def deblock(t: Tensor, by: int, bx: int) -> Tensor:
    """Outputs that `blocked_weight` computed as channels, put in their places."""
    b, c, h, w = t.shape
    c //= by * bx
    t = t.view(b, by, bx, c, h, w).permute(0, 3, 4, 1, 5, 2)
    return t.reshape(b, c, h * by, w * bx)


def small(g: Geometry, weight, flat: Tensor, push: bool) -> bool:
    """Whether images are so few and small that packing weights of this shape does not pay: see `by_columns`."""
    if g.groups != 1 or len(weight) != 4 or not g.exact:
        return False
    coarse = flat.shape[2:] if push == g.transposed else _coarse(g, flat.shape[2:], weight[2:])
    rows = flat.shape[0] * coarse[0] * coarse[1]
    return 2 * rows < weight[0] and prod(weight[1:]) >= LANES and weight[2] * weight[3] > 1


def by_columns(g: Geometry, w: Tensor, flat: Tensor, push: bool, size) -> Tensor:
    """A convolution as a product with its weights where they lie.

    ``flat`` is ``(batch, channels, *image)``, ``size`` the map's input image. Columns (Chellapilla et al. 2006) take
    ``kernel`` times the memory of the larger image; they are fewer than the weights where the images are `small`.
    """
    kernel, spread = w.shape[2:], push == g.transposed
    coarse = flat.shape[2:] if spread else _coarse(g, flat.shape[2:], kernel)
    rows = flat.shape[0] * coarse[0] * coarse[1]
    if spread:
        columns = backends.product(flat.movedim(1, -1).reshape(rows, -1), w.flatten(1), False)
        columns = columns.view(flat.shape[0], *coarse, *w.shape[1:])
        return _summed(g, columns, g.fine(coarse, kernel) if push else size)
    options = kernel, g.dilation, g.padding, g.stride
    columns = torch.ops.aten.im2col(flat, *options).transpose(1, 2).reshape(rows, -1)
    out = backends.product(columns, w.flatten(1), True)
    return out.view(flat.shape[0], *coarse, -1).movedim(-1, 1)


def _summed(g: Geometry, columns: Tensor, fine) -> Tensor:
    """Columns ``(batch, *coarse image, channels, *kernel)`` summed into images of ``fine`` pixels, channels-last.

    A sum of slices a tap: channels are next to each other, and images are small.
    """
    batch, *coarse, channels = columns.shape[:4]
    out = columns.new_zeros(batch, *fine, channels)
    spans = [
        [_reached(n, m, s, d * k - p) for k in range(taps)]
        for n, m, s, d, p, taps in zip(
            fine, coarse, g.stride, g.dilation, g.padding, columns.shape[4:], strict=True
        )
    ]
    for i, (to_y, y) in enumerate(spans[0]):
        for j, (to_x, x) in enumerate(spans[1]):
            out[:, to_y, to_x] += columns[:, y, x, :, i, j]
    return out.movedim(-1, 1)


def _reached(fine: int, coarse: int, stride: int, offset: int) -> tuple[slice, slice]:
    """Pixels ``stride * y + offset`` of the larger image that a tap reaches, and the ``y`` of the smaller one."""
    first = max(0, -(offset // stride))
    last = min(coarse, (fine - 1 - offset) // stride + 1)
    if last <= first:
        return slice(0, 0), slice(0, 0)
    start = stride * first + offset
    return slice(start, start + stride * (last - first - 1) + 1, stride), slice(first, last)


def _coarse(g: Geometry, fine, kernel) -> tuple[int, ...]:
    """The smaller images, of a convolution's results, for those of ``fine``."""
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, s, p, d, k in zip(fine, g.stride, g.padding, g.dilation, kernel, strict=True)
    )


@dataclass(frozen=True)
class Phases:
    """A strided transposed convolution to few channels: its outputs by their place within the stride, as channels.

    Each place (phase) sees every stride-th tap of the kernel; all of them are one convolution of stride 1 (Shi et al.
    2016, "Is the deconvolution layer the same as a convolutional layer?").
    """

    weight: Tensor
    padding: tuple[int, int]
    first: tuple[int, int]
    steps: tuple[int, int]
    stride: tuple[int, int]
    fine: tuple[int, int]

    @staticmethod
    def of(g: Geometry, w: Tensor, coarse, fine) -> Phases | None:
        """For a weight ``(coarse channels, fine channels, *kernel)``; None where channels do not fit the lanes."""
        stride = tuple(g.stride)
        if stride == (1, 1) or w.shape[1] * stride[0] * stride[1] > LANES or 0 in (*coarse, *fine):
            return None
        axes = [_taps(*a) for a in zip(w.shape[2:], stride, g.padding, strict=True)]
        lows, sizes = zip(*[(low, high - low + 1) for _, low, high in axes], strict=True)
        out = w.new_zeros(*stride, w.shape[1], w.shape[0], *sizes)
        for a, row in enumerate(axes[0][0]):
            for b, column in enumerate(axes[1][0]):
                for y, i in row:
                    for x, j in column:
                        out[a, b, :, :, y - lows[0], x - lows[1]] = w[:, :, i, j].t()
        steps = tuple(-(-n // s) for n, s in zip(fine, stride, strict=True))
        highs = [low + n - 1 for low, n in zip(lows, sizes, strict=True)]
        padding = tuple(
            max(-low, m + high - r, 0)
            for low, m, high, r in zip(lows, steps, highs, coarse, strict=True)
        )
        return Phases(
            channels_last(out.view(-1, w.shape[0], *sizes)), padding,
            tuple(p + low for p, low in zip(padding, lows, strict=True)), steps, stride, tuple(fine),
        )  # fmt: skip

    def run(self, flat: Tensor) -> Tensor:
        """The larger images."""
        out = F.conv2d(flat, self.weight, None, 1, self.padding)
        for a in range(2):
            out = out.narrow(a + 2, self.first[a], self.steps[a])
        return deblock(out, *self.stride)[:, :, : self.fine[0], : self.fine[1]]


def _taps(kernel: int, stride: int, padding: int) -> tuple[list[list[tuple[int, int]]], int, int]:
    """For each phase, the (offset of the coarse pixel, tap) pairs that reach it; the least and the largest offset."""
    phases = []
    for a in range(stride):
        found = [(a + padding - k, k) for k in range(kernel)]
        phases.append([(at // stride, k) for at, k in found if at % stride == 0])
    offsets = [at for phase in phases for at, _ in phase]
    return phases, min(offsets), max(offsets)


class Packed:
    """One direction of a convolution as oneDNN runs it best: images in channels-last memory, 1-D as 2-D.

    A convolution to few channels computes blocks of outputs at once.
    """

    __slots__ = ("block", "geometry", "padding", "phases", "push", "size", "weight")

    def __init__(
        self, g: Geometry, w: Tensor, push: bool, size_in: tuple[int, ...], size: tuple[int, ...]
    ):
        """``size_in`` is the spatial size of the block that comes in, ``size`` that of the map's input."""
        if w.dim() == 3:
            w, size_in, size = w.unsqueeze(2), (1, *size_in), (1, *size)
            g = g.planar()
        self.geometry, self.size, self.block, self.push = g, size, None, push
        self.phases = None
        if (
            push == g.transposed
            and g.groups == 1
            and w.dim() == 4
            and g.exact
            and {*g.dilation} == {1}
        ):
            self.phases = Phases.of(g, w, size_in, g.fine(size_in, w.shape[2:]) if push else size)
        if self.phases is not None:
            self.weight = None
            return
        if (
            g.groups == 1
            and {*g.stride, *g.dilation} == {1}
            and not any(g.output_padding)
            and w.dim() == 4
        ):
            flip = push == g.transposed
            kernel = w.shape[2:]
            self.padding = (
                tuple(k - 1 - p for k, p in zip(kernel, g.padding, strict=True))
                if flip
                else tuple(g.padding)
            )
            outs = [
                n + 2 * p - k + 1 for n, p, k in zip(size_in, self.padding, kernel, strict=True)
            ]
            channels = w.shape[1 if flip else 0]
            for by, bx in ((4, 4), (2, 2)) if outs[0] > 1 else ((1, 8), (1, 4), (1, 2)):
                fits = channels * by * bx <= LANES and outs[0] % by == 0 and outs[1] % bx == 0
                if fits and min(self.padding) >= 0:
                    self.block = by, bx
                    w = blocked_weight(w.flip(2, 3).transpose(0, 1) if flip else w, by, bx)
                    break
        self.weight = channels_last(w.detach())  # what is kept with a weight must not hold it

    def tensors(self) -> tuple[Tensor, ...]:
        """What it holds."""
        return (self.weight if self.phases is None else self.phases.weight,)

    def run(self, flat: Tensor) -> Tensor:
        flat_1d = flat.dim() == 3
        flat = channels_last(flat.unsqueeze(2) if flat_1d else flat)
        if self.phases is not None:
            out = self.phases.run(flat)
        elif self.block is not None:
            out = deblock(F.conv2d(flat, self.weight, None, self.block, self.padding), *self.block)
        elif self.push:
            out = self.geometry.run(flat, self.weight)
        else:
            out = self.geometry.run_transposed(flat, self.weight, self.size)
        return out.squeeze(2) if flat_1d else out
