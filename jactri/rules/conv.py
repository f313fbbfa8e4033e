"""Convolutions of every kind: one node, whose arguments say which."""

from __future__ import annotations

from ..convolution import Conv, ConvWeight, Geometry
from . import rule


@rule("Convolution")
def convolution(g):
    x, w, b = g.src
    terms = []
    if x is not None or w is not None:
        geometry = Geometry(
            g.saved("stride"),
            g.saved("padding"),
            g.saved("dilation"),
            g.saved("transposed"),
            g.saved("output_padding"),
            g.saved("groups"),
        )
        if x is not None:
            size = g.values[x].shape[2:]
            terms.append(g.single(x, Conv(g.tensor("weight"), geometry, size), g.shape))
        if w is not None:
            kernel = g.values[w].shape[2:]
            terms.append(g.single(w, ConvWeight(g.tensor("input"), geometry, kernel), g.shape))
    if b is not None:
        terms.append(channels(g, b))
    return g.plus(terms)


def channels(g, source):
    """A vector ``(C,)`` broadcast over the node's output ``(N, C, ...)``."""
    return g.expand(g.view(source, (1, g.shape[1]) + (1,) * (len(g.shape) - 2)), g.shape)
