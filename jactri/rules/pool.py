"""Pooling. A max pool picks entries; an average pool is a fixed linear op of each channel's image."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..linear_map import Gather
from ..maps import Fixed, Scatter
from . import rule

aten = torch.ops.aten

# node: number of pooled axes; the saved indices count within them, of the input
MAX_POOLS = {
    "MaxPool2DWithIndices": 2,
    "MaxPool3DWithIndices": 3,
    "AdaptiveMaxPool2D": 2,
    "AdaptiveMaxPool3D": 3,
    "FractionalMaxPool2D": 2,
    "FractionalMaxPool3D": 3,
}


@rule(*MAX_POOLS)
def max_pool(g):
    tail = MAX_POOLS[g.name.removesuffix("Backward0")]
    (x,) = g.src
    return rearrange(g, x, g.tensor("result1"), tail, Gather)


@rule("MaxUnpool2D", "MaxUnpool3D")
def max_unpool(g):
    tail = 2 if "2D" in g.name else 3
    return rearrange(g, g.src[0], g.tensor("indices"), tail, Scatter)


def rearrange(g, x: int, index: Tensor, tail: int, kind):
    """Gather from, or scatter into, the last ``tail`` axes as one."""
    shape = g.values[x].shape
    lead = shape[:-tail]
    many = prod(shape[-tail:] if kind is Gather else g.shape[-tail:])
    flat = g.view(x, (*lead, prod(shape[-tail:])))
    picked = g.single(
        flat, kind(index.reshape(*lead, -1), many), (*lead, prod(g.shape[-tail:]))
    )
    return g.view(picked, g.shape)


@rule("AvgPool2D", "AvgPool3D")
def avg_pool(g):
    tail = 2 if "2D" in g.name else 3
    kernel, stride = g.saved("kernel_size"), g.saved("stride")
    options = (
        kernel,
        stride or kernel,
        g.saved("padding"),
        g.saved("ceil_mode"),
        g.saved("count_include_pad"),
        g.saved("divisor_override"),
    )
    pool = aten.avg_pool2d if tail == 2 else aten.avg_pool3d
    back = aten.avg_pool2d_backward if tail == 2 else aten.avg_pool3d_backward
    return image_op(
        g,
        tail,
        lambda t: pool(t, *options),
        lambda c, size: back(c, like(c, size), *options),
        2.0 * prod(kernel),
    )


@rule("AdaptiveAvgPool2D", "AdaptiveAvgPool3D")
def adaptive_avg_pool(g):
    tail = 2 if "2D" in g.name else 3
    out = g.shape[-tail:]
    pool = aten._adaptive_avg_pool2d if tail == 2 else aten._adaptive_avg_pool3d
    back = aten._adaptive_avg_pool2d_backward if tail == 2 else aten._adaptive_avg_pool3d_backward
    return image_op(g, tail, lambda t: pool(t, out), lambda c, size: back(c, like(c, size)))


def like(c: Tensor, size: tuple[int, ...]) -> Tensor:
    """An input of which a backward op reads the shape and the memory format only."""
    shape = (*c.shape[:2], *size)
    if c.dim() == 4 and not c.is_contiguous() and c.is_contiguous(memory_format=torch.channels_last):
        return torch.empty(
            shape, dtype=c.dtype, device=c.device, memory_format=torch.channels_last
        )
    return c.new_empty(shape)


def image_op(g, tail: int, push, pull, work: float = 2.0, exact: bool = True):
    """A fixed linear op on images, whose channels (and samples) do not mix.

    ``push(t)`` and ``pull(c, size)`` take blocks ``(batch, channels, *image)``; ``size`` is the input image's.
    """
    (x,) = g.src
    size = g.values[x].shape[-tail:]

    def back(c: Tensor) -> Tensor:
        return pull(c, size)

    return g.single(x, Fixed(g.name, tail, push, back, work, exact), g.shape)
