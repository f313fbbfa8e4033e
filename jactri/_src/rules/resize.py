"""Ops that resize, rearrange, cut up or resample images."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..maps.grids import slopes
from ..maps.maps import Batched, Fixed, Sample
from ..maps.once import Once
from . import rule
from .pool import image_op, op_of, with_transposes

aten = torch.ops.aten

# node: (aten op, image axes, whether it takes align_corners, taps a output entry,
#        whether autograd can differentiate its backward)
UPSAMPLES = {
    "UpsampleNearest1D": ("upsample_nearest1d", 1, False, 1, True),
    "UpsampleNearest2D": ("upsample_nearest2d", 2, False, 1, True),
    "UpsampleNearest3D": ("upsample_nearest3d", 3, False, 1, True),
    "UpsampleNearestExact1D": ("_upsample_nearest_exact1d", 1, False, 1, True),
    "UpsampleNearestExact2D": ("_upsample_nearest_exact2d", 2, False, 1, True),
    "UpsampleNearestExact3D": ("_upsample_nearest_exact3d", 3, False, 1, True),
    "UpsampleLinear1D": ("upsample_linear1d", 1, True, 2, True),
    "UpsampleBilinear2D": ("upsample_bilinear2d", 2, True, 4, True),
    "UpsampleTrilinear3D": ("upsample_trilinear3d", 3, True, 8, True),
    "UpsampleBicubic2D": ("upsample_bicubic2d", 2, True, 16, True),
    "UpsampleBilinear2DAa": ("_upsample_bilinear2d_aa", 2, True, 8, False),
    "UpsampleBicubic2DAa": ("_upsample_bicubic2d_aa", 2, True, 16, False),
}


@rule(*with_transposes(UPSAMPLES))
def upsample(g):
    op, tail, has_corners, taps, exact = UPSAMPLES[op_of(g)[0]]
    forward, backward = getattr(aten, op).default, getattr(aten, op + "_backward").default
    options = (g.saved("align_corners"),) if has_corners else ()
    if tail == 1:
        options += (g.saved("scales"),)
    else:
        options += tuple(g.saved("scales_" + axis) for axis in "dhw"[-tail:])
    return image_op(
        g,
        tail,
        lambda t, out: forward(t, out, *options),
        lambda c, size: backward(c, c.shape[2:], (*c.shape[:2], *size), *options),
        options,
        2.0 * taps,
        exact,
    )


@rule("PixelShuffle")
def pixel_shuffle(g):
    (x,) = g.src
    r = g.saved("upscale_factor")
    *lead, c, h, w = g.values[x].shape
    n = len(lead)
    split = g.view(x, (*lead, c // r**2, r, r, h, w))
    moved = g.permute(split, (*range(n), n, n + 3, n + 1, n + 4, n + 2))
    return g.view(moved, g.shape)


@rule("PixelUnshuffle")
def pixel_unshuffle(g):
    (x,) = g.src
    r = g.saved("downscale_factor")
    *lead, c, h, w = g.values[x].shape
    n = len(lead)
    split = g.view(x, (*lead, c, h // r, r, w // r, r))
    moved = g.permute(split, (*range(n), n, n + 2, n + 4, n + 1, n + 3))
    return g.view(moved, g.shape)


@rule("ChannelShuffle")
def channel_shuffle(g):
    (x,) = g.src
    groups = g.saved("groups")
    n, c, *tail = g.values[x].shape
    split = g.view(x, (n, groups, c // groups, *tail))
    return g.view(g.permute(split, (0, 2, 1, *range(3, len(tail) + 3))), g.shape)


def windows(g):
    """The arguments that unfold and fold share."""
    return tuple(g.saved(name) for name in ("kernel_size", "dilation", "padding", "stride"))


def unfolded(t: Tensor, options) -> Tensor:
    """``(batch, channels, h, w)`` to ``(batch, channels, window, place)``."""
    b, c, h, w = t.shape
    return aten.im2col(t.reshape(b * c, 1, h, w), *options).unflatten(0, (b, c))


def folded(t: Tensor, size, options) -> Tensor:
    """The transpose of `unfolded`."""
    b, c, k, places = t.shape
    return aten.col2im(t.reshape(b * c, k, places), size, *options).reshape(b, c, *size)


@rule("Im2Col")
def im2col(g):
    (x,) = g.src
    options = windows(g)
    *lead, h, w = g.values[x].shape
    k = prod(options[0])
    edge = Fixed(
        g.name, 2, lambda t: unfolded(t, options), lambda c: folded(c, (h, w), options), 1.0
    )
    return g.view(g.single(x, edge, (*lead, k, g.shape[-1])), g.shape)


@rule("Col2Im")
def col2im(g):
    (x,) = g.src
    options = windows(g)
    *lead, rows, places = g.values[x].shape
    k, size = prod(options[0]), g.shape[-2:]
    x = g.view(x, (*lead, rows // k, k, places)) if lead else g.view(x, (rows // k, k, places))
    edge = Fixed(
        g.name, 2, lambda t: folded(t, size, options), lambda c: unfolded(c, options), float(k)
    )
    return g.single(x, edge, g.shape)


@rule("GridSampler2D", "GridSampler3D")
def grid_sampler(g):
    """Linear in the images; in the grid, every place has a matrix of its own."""
    x, grid = g.src
    options = tuple(g.saved(n) for n in ("interpolation_mode", "padding_mode", "align_corners"))
    places, (n, c, *out) = g.tensor("grid"), g.shape
    terms = []
    if x is not None:
        terms.append(g.single(x, Sample(places, options, g.values[x].shape[2:]), g.shape))
    if grid is not None:
        images = g.tensor("input")
        edge = Batched(Once(lambda: slopes(images, places, options)), "right")
        count = n * prod(out)
        row = g.view(grid, (count, 1, len(out)))
        made = g.view(g.single(row, edge, (count, 1, c)), (n, *out, c))
        terms.append(g.permute(made, (0, len(out) + 1, *range(1, len(out) + 1))))
    return g.plus(terms)
