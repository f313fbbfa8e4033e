"""Distances between points: the derivative of each distance is a direction, one matrix of them for each point."""

from __future__ import annotations

from math import inf, prod

import torch
from torch import Tensor

from ..maps.linear_map import Identity
from ..maps.maps import Batched
from ..maps.once import Once
from ..maps.selection import Take
from . import batches, known, rule


def direction(difference: Tensor, distance: Tensor, p: float, own: Tensor | None = None) -> Tensor:
    """The derivative of the p-norm of a difference (last axis) in the difference, as autograd has it at zeros.

    Its own derivative at a difference of zero is NaN: there is none. ``own``: where a point is compared with itself,
    and the distance is always zero.
    """
    if p == 0:
        return torch.zeros_like(difference)
    distance = distance.unsqueeze(-1)
    met = distance == 0
    if p == 1:
        slope = difference.sign()
    elif p == inf:
        slope = difference.sign() * (difference.abs() == distance)
    elif p == 2:
        distance = distance.masked_fill(met, inf)
        slope = difference / distance
    else:
        distance, size = distance.masked_fill(met, inf), difference.abs()
        slope = difference.sign() * (size / distance) ** (p - 1)
        slope = slope.masked_fill(size == 0, 0) if p < 1 else slope
    if not (torch.is_grad_enabled() and difference.requires_grad):
        return slope
    if own is not None:
        met = met & ~own
    # the square root of 0 is 0, and its derivative times that of the absolute value NaN
    return torch.where(met, difference.masked_fill(~met, 1).abs().sqrt(), slope)


known("CdistBackward", kept=batches)


@rule("Cdist", "EuclideanDist", kept=batches)
def cdist(g):
    """Distances of every point of one set to every point of another."""
    x1, x2, distance = g.tensor("x1"), g.tensor("x2"), g.tensor("result")
    p = g.saved("p") if g.has("p") else 2.0
    *batch, rows, columns = shape = g.shape
    m, src = x1.shape[-1], list(g.src)
    if 0 in shape or m == 0:
        return None
    own = None
    if src[0] is not None and src[0] == src[1]:
        own = torch.eye(rows, dtype=torch.bool, device=x1.device).unsqueeze(-1)

    def emit(g, derivative) -> int:
        slopes = Once(derivative)
        terms = []
        for s, n, others, first in ((src[0], rows, columns, True), (src[1], columns, rows, False)):
            if s is None:
                continue

            def matrix(n=n, others=others, first=first) -> Tensor:
                # (a matrix for each point: coordinates, other points)
                d = slopes().expand(*batch, rows, columns, m)
                d = d if first else -d.transpose(-2, -3)
                return d.reshape(-1, others, m).mT

            points = g.view(g.expand(s, (*batch, n, m)), (prod(batch) * n, 1, m))
            made = g.single(points, Batched(matrix, "right"), (prod(batch) * n, 1, others))
            made = g.view(made, (*batch, n, others))
            if not first:
                k = len(batch)
                made = g.permute(made, (*range(k), k + 1, k))
            terms.append((made, Identity()))
        return g.add(terms, shape)

    def difference() -> Tensor:
        return x1.unsqueeze(-2) - x2.unsqueeze(-3)

    value = apart(g, emit(g, lambda: direction(difference(), distance, p, own)), distance, p)
    if p == 2:
        g.distances[g.node] = value, lambda g: once(g, emit(g, lambda: 2 * difference()), distance)
    return value


def apart(g, value: int, distance: Tensor, p: float) -> int:
    """Distances without those of points that coincide: where autograd selects a gradient of 0 there."""
    if p in (0, 1, inf):
        return value
    return g.mask(value, lambda: (distance != 0).to(distance.dtype))


def once(g, value: int, distance: Tensor) -> int:
    """Squared distances as autograd has their first derivative, or in the graph of a result, a smooth function."""
    return value if torch.is_grad_enabled() else apart(g, value, distance, 2.0)


@rule("Pdist")
def pdist(g):
    """Distances of every point of one set to those after it."""
    (s,), x, distance, p = g.src, g.tensor("self"), g.tensor("result"), g.saved("p")
    n, m = g.values[s].shape
    first, second = torch.triu_indices(n, n, 1, device=x.device)

    def emit(g, derivative) -> int:
        slopes = Once(derivative)
        terms = []
        for i, sign in ((first, 1), (second, -1)):
            ends = g.single(s, Take(0, i, n), (len(i), m))
            terms.append((g.scale(g.sum(g.diagonal(ends, slopes), (1,)), sign), Identity()))
        return g.add(terms, (len(first),))

    def difference() -> Tensor:
        return x[first] - x[second]

    value = apart(g, emit(g, lambda: direction(difference(), distance, p)), distance, p)
    if p == 2:
        g.distances[g.node] = value, lambda g: once(g, emit(g, lambda: 2 * difference()), distance)
    return value
