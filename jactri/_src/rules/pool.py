"""Pooling. A max pool picks entries; an average pool is a fixed linear op of each channel's image.

The derivative of such an op is its transpose: the graph of a gradient holds it as a node of its own, read here too.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..maps.maps import Fixed, Transpose
from ..maps.selection import Gather, Picked, Scatter
from . import normal_index, rule
from .elementwise import Zero

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


def with_transposes(names) -> list[str]:
    """Ops, and the ops that are their derivatives."""
    return [full for name in names for full in (name, name + "Backward")]


def op_of(g) -> tuple[str, bool]:
    """The op of a node, and whether the node is its transpose, from the graph of a gradient."""
    name = g.name.removesuffix("Backward0")
    return name.removesuffix("Backward"), name.endswith("Backward")


@rule(*with_transposes(MAX_POOLS))
def max_pool(g):
    op, transposed = op_of(g)
    tail = MAX_POOLS[op]
    options = ("adaptive",) if op.startswith("Adaptive") else None
    if op.startswith("MaxPool") and g.has("kernel_size"):  # the second derivative's node has none
        kernel = g.per_axis("kernel_size", tail)
        stride = g.per_axis("stride", tail, kernel)
        padding, dilation = g.per_axis("padding", tail), g.per_axis("dilation", tail)
        options = tuple(zip(kernel, stride, padding, dilation, strict=True))
    if transposed:
        return rearrange(g, g.tensor("indices"), tail, Scatter, options)
    return rearrange(g, g.tensor("result1"), tail, Gather, options)


@rule("MaxUnpool2D", "MaxUnpool3D")
def max_unpool(g):
    return rearrange(g, g.tensor("indices"), 2 if "2D" in g.name else 3, Scatter)


def rearrange(g, index: Tensor, tail: int, kind, options=None):
    """Gather from, or scatter into, the last ``tail`` axes as one; ``options`` as `Picked` takes them."""
    x = g.src[0]
    if (
        x is None
    ):  # the graph of a gradient leads to the input too, on which the gradient does not depend
        return g.single(g.src[1], Zero())
    shape = g.values[x].shape
    many = prod(shape[-tail:] if kind is Gather else g.shape[-tail:])
    move = kind(index.reshape(*shape[:-tail], -1), many)
    return g.single(x, Picked(move, shape[-tail:], g.shape[-tail:], options), g.shape)


@rule(*with_transposes(["AvgPool2D", "AvgPool3D"]))
def avg_pool(g):
    tail = 2 if "2D" in g.name else 3
    kernel = g.per_axis("kernel_size", tail)
    divisor = g.saved("divisor_override")
    options = (
        kernel,
        g.per_axis("stride", tail, kernel),
        g.per_axis("padding", tail),
        g.saved("ceil_mode"),
        g.saved("count_include_pad"),
        None if divisor is None else normal_index(divisor),
    )
    pool = aten.avg_pool2d if tail == 2 else aten.avg_pool3d
    back = aten.avg_pool2d_backward if tail == 2 else aten.avg_pool3d_backward
    return image_op(
        g,
        tail,
        lambda t, out: pool(t, *options),
        lambda c, size: back(c, like(c, size), *options),
        options,
        2.0 * prod(kernel),
    )


@rule(*with_transposes(["AdaptiveAvgPool2D", "AdaptiveAvgPool3D"]))
def adaptive_avg_pool(g):
    tail = 2 if "2D" in g.name else 3
    pool = aten._adaptive_avg_pool2d if tail == 2 else aten._adaptive_avg_pool3d
    back = aten._adaptive_avg_pool2d_backward if tail == 2 else aten._adaptive_avg_pool3d_backward
    return image_op(g, tail, pool, lambda c, size: back(c, like(c, size)), ())


def like(c: Tensor, size: tuple[int, ...]) -> Tensor:
    """An input of which a backward op reads the shape and the memory format only."""
    shape = (*c.shape[:2], *size)
    if (
        c.dim() == 4
        and not c.is_contiguous()
        and c.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.empty(shape, dtype=c.dtype, device=c.device, memory_format=torch.channels_last)
    return c.new_empty(shape)


def image_op(g, tail: int, push, pull, options: tuple, work: float = 2.0, exact: bool = True):
    """A fixed linear op on images, whose channels (and samples) do not mix, or the transpose of one.

    It works along every axis by itself, as ``options`` (of the node) and the sizes determine.

    ``push(t, out)`` and ``pull(c, size)`` take blocks ``(batch, channels, *image)``; ``out`` and ``size`` are the op's
    image sizes after and before.
    """
    x = g.src[0]
    if x is None:
        return g.single(g.src[1], Zero())
    op, transposed = op_of(g)
    size, out = g.values[x].shape[-tail:], g.shape[-tail:]
    if transposed:
        size, out = out, size
    edge = Fixed(op, tail, lambda t: push(t, out), lambda c: pull(c, size), work, exact, options)
    return g.single(x, Transpose(edge) if transposed else edge, g.shape)
