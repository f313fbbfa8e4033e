"""Squares of distances, which are smooth where points coincide, and distances are not."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..maps.contraction import Expand
from ..maps.linear_map import Cast, Diagonal, Permute, Scale, View
from ..maps.selection import Gather, Select, Slice, Take
from . import record_of

MOVES = (Cast, Expand, Gather, Permute, Select, Slice, Take, View)


def squared(g, a: int, b: int) -> int | None:
    """The current node, the product of the values ``a`` and ``b``, where both are one distance, scaled and moved alike.

    None where they are something else, or where overrides may have changed a map between.
    """
    if g.overrides is not None:
        return None
    ends = g.node.next_functions
    root = _root(g, ends[0][0])
    if root is None or (len(ends) > 1 and _root(g, ends[1][0]) is not root):
        return None
    distance, emit = g.distances[root]
    first, second = (_way(g, v, distance) for v in (a, b))
    if first is None or second is None or not g.values[a].shape == g.values[b].shape == g.shape:
        return None
    if a != b and any(v.sources[0][1].__class__ in MOVES for v in (*first, *second)):
        return None
    value = emit(g)
    for old in first if a == b else (*first, *second):
        edge = old.sources[0][1]
        if a == b and edge.__class__ is Scale:
            edge = Scale(edge.factor**2)
        elif a == b and edge.__class__ is Diagonal:
            edge = Diagonal(partial(_square, edge))
        value = g.append(old.op, old.shape, old.dtype, old.device, ((value, edge),))
    g.smooth.add(value)
    return value


def _square(edge: Diagonal) -> Tensor:
    return edge.d.square()


def _root(g, node):
    """The node of the distances that a node scales or moves, or None."""
    while node is not None and node not in g.distances:
        name, ends = node.name(), node.next_functions
        if name == "MulBackward0":
            found = [_root(g, n) for n, _ in ends]
            return found[0] if found[1] is None else found[1] if found[0] is None else None
        node = ends[0][0] if record_of(name).moves else None
    return node


def _way(g, value: int, start: int) -> list | None:
    """The values from ``start`` to ``value``, each of which depends on the one before alone."""
    way = []
    while value != start:
        sources = g.values[value].sources
        if len(sources) != 1 or sources[0][1].__class__ not in (Diagonal, Scale, *MOVES):
            return None
        way.append(g.values[value])
        value = sources[0][0]
    return way[::-1]
