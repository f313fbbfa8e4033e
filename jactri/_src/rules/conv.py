"""Convolutions of every kind: one node, whose arguments say which."""

from __future__ import annotations

from ..maps.convolution import Conv, ConvWeight, Geometry
from ..maps.linear_map import Identity
from ..maps.maps import Transpose
from . import rule
from .elementwise import Zero
from .linear import in_one_factor


@rule("Convolution", curve=in_one_factor)
def convolution(g):
    x, w, b = g.src
    terms = []
    if x is not None or w is not None:
        geometry = geometry_of(g, len(g.shape) - 2)
        if x is not None:
            size = g.values[x].shape[2:]
            terms.append(g.single(x, Conv(g.tensor("weight"), geometry, size), g.shape))
        if w is not None:
            kernel = g.values[w].shape[2:]
            terms.append(g.single(w, ConvWeight(g.tensor("input"), geometry, kernel), g.shape))
    if b is not None:
        terms.append(channels(g, b))
    return g.plus(terms)


@rule("ConvolutionBackward")
def convolution_backward(g):
    """The gradients of a convolution, from the graph of a gradient.

    Each is bilinear in two of the cotangent c, the input x and the weight w; for the other one fixed, the gradient of x
    is a convolution by w, or of c; and the gradient of w is the transpose of a convolution of x, or of c.
    """
    c, x, w = g.src
    saved_c, saved_x, saved_w = g.tensor("grad_output"), g.tensor("input"), g.tensor("weight")
    geometry = geometry_of(g, saved_c.dim() - 2)
    size, out, kernel = tuple(saved_x.shape[2:]), saved_c.shape[2:], tuple(saved_w.shape[2:])
    if not geometry.exact:
        return None
    back = geometry.flipped(size, out, kernel)
    shapes = [tuple(m.shape) for m in g.meta]
    ids: list[int | None] = [None, None, None]
    terms = []
    if shapes[0] == tuple(saved_x.shape):
        if c is not None:
            terms.append(g.single(c, Transpose(Conv(saved_w, geometry, size)), shapes[0]))
        if w is not None:
            terms.append(g.single(w, ConvWeight(saved_c, back, kernel), shapes[0]))
        ids[0] = summed(g, terms, shapes[0], x)
    terms = []
    if shapes[1] == tuple(saved_w.shape):
        if c is not None:
            terms.append(g.single(c, Transpose(ConvWeight(saved_x, geometry, kernel)), shapes[1]))
        if x is not None:
            terms.append(g.single(x, Transpose(ConvWeight(saved_c, back, kernel)), shapes[1]))
        ids[1] = summed(g, terms, shapes[1], w)
    if len(shapes[2]) == 1 and c is not None:
        ids[2] = g.sum(c, (0, *range(2, saved_c.dim())))
    return tuple(ids)


def summed(g, terms, shape, other):
    """The sum of terms; without any, a value that depends on ``other`` with derivative zero."""
    if terms:
        return g.add([(i, Identity()) for i in terms], shape)
    return None if other is None else g.single(other, Zero())


def geometry_of(g, ndim: int) -> Geometry:
    """The arguments of a convolution over ``ndim`` axes."""
    return Geometry(
        g.per_axis("stride", ndim),
        g.per_axis("padding", ndim),
        g.per_axis("dilation", ndim),
        g.saved("transposed"),
        g.per_axis("output_padding", ndim),
        g.saved("groups"),
    )


def channels(g, source):
    """A vector ``(C,)`` broadcast over the node's output ``(N, C, ...)``."""
    return g.expand(g.view(source, (1, g.shape[1]) + (1,) * (len(g.shape) - 2)), g.shape)
