"""Distances between points: the derivative of each distance is a direction, one matrix of them for each point."""

from __future__ import annotations

from math import inf, prod

import torch
from torch import Tensor

from ..maps import Batched, Once
from ..selection import Take
from . import rule


def direction(difference: Tensor, distance: Tensor, p: float) -> Tensor:
    """The derivative of the p-norm of a difference (last axis) in the difference, as autograd has it at zeros."""
    if p == 0:
        return torch.zeros_like(difference)
    if p == 1:
        return difference.sign()
    distance = distance.unsqueeze(-1)
    if p == inf:
        return difference.sign() * (difference.abs() == distance)
    distance = distance.masked_fill(distance == 0, inf)
    if p == 2:
        return difference / distance
    size = difference.abs()
    slope = difference.sign() * (size / distance) ** (p - 1)
    return slope.masked_fill(size == 0, 0) if p < 1 else slope


@rule("Cdist", "EuclideanDist")
def cdist(g):
    """Distances of every point of one set to every point of another."""
    x1, x2, distance = g.tensor("x1"), g.tensor("x2"), g.tensor("result")
    p = g.saved("p") if g.has("p") else 2.0
    *batch, rows, columns = g.shape
    m = x1.shape[-1]
    if 0 in g.shape or m == 0:
        return None
    slopes = Once(lambda: direction(x1.unsqueeze(-2) - x2.unsqueeze(-3), distance, p))
    terms = []
    for s, n, others, first in ((g.src[0], rows, columns, True), (g.src[1], columns, rows, False)):
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
        terms.append(made)
    return apart(g, g.plus(terms), distance, p)


def apart(g, value: int, distance: Tensor, p: float) -> int:
    """Distances without those of points that coincide: where autograd selects a gradient of 0 there."""
    if p in (0, 1, inf):
        return value
    return g.mask(value, lambda: (distance != 0).to(distance.dtype))


@rule("Pdist")
def pdist(g):
    """Distances of every point of one set to those after it."""
    (s,), x, distance, p = g.src, g.tensor("self"), g.tensor("result"), g.saved("p")
    n, m = g.values[s].shape
    first, second = torch.triu_indices(n, n, 1, device=x.device)
    slopes = Once(lambda: direction(x[first] - x[second], distance, p))
    terms = []
    for i, sign in ((first, 1), (second, -1)):
        ends = g.single(s, Take(0, i, n), (len(i), m))
        terms.append(g.scale(g.sum(g.diagonal(ends, slopes), (1,)), sign))
    return apart(g, g.plus(terms), distance, p)
