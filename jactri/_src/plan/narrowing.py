"""The graph of a range of tokens: of each value it has those entries that the range reaches (see `masked`).

Each map is cut to the entries on both of its sides, so that nothing but zeros is left out.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import NamedTuple

from ..maps.contraction import Expand, MatMul, Sum
from ..maps.cut import Cut, Shape
from ..maps.linear_map import (
    Cast,
    Diagonal,
    Identity,
    LinearMap,
    Permute,
    Scale,
    View,
)
from ..maps.low_rank import Project, Softmax
from ..maps.maps import Batched
from ..maps.mask import Mask
from ..maps.selection import Place, Select, Slice, Take
from ..read.graph import Graph, Source, Value

Box = dict[int, Cut]
"""The entries of a value: by axis a range, where it is not whole."""

CUT = frozenset((
    Batched, Cast, Diagonal, Expand, Identity, Mask, MatMul, Permute, Place, Project, Scale, Select, Slice, Softmax,
    Sum, Take, View,
))  # fmt: skip
"""Maps that can be cut along all axes that they keep."""

_ALONG = frozenset((Identity, Permute, Scale, Select, Slice, View))
"""Maps that a part of a value is followed through, back to a matrix."""


class Range(NamedTuple):
    """A range of the tokens of one output (going forward, of one input)."""

    seed: int
    """Which output, or input, it is of."""
    boxes: dict[int, Box]
    """The entries of each value on its way, of which no other value is."""
    tied: frozenset[int] = frozenset()
    """The values whose tokens are tied to those of the seed, going in reverse."""


def cut_shape(shape: Shape, box: Box) -> Shape:
    """Of the entries of a value that a box holds."""
    for cut in box.values():
        shape = cut.shape(shape)
    return shape


def narrowed(graph: Graph, found: Range, reverse: bool) -> Graph | None:
    """The graph of a range; None where its seed reaches nothing."""
    return _Narrowing(graph, found, reverse).made()


class _Empty(Exception):
    """Nothing comes through a map."""


class _Narrowing:
    """One graph, while it is made."""

    def __init__(self, graph: Graph, found: Range, reverse: bool):
        self.graph, self.reverse = graph, reverse
        self.seed, self.boxes, self.tied = found
        self.values: list[Value] = []
        self.at: dict[int, int] = {}
        self.layers: dict[int, str] | None = None if graph.layers is None else {}
        edges = [(v, s) for v in self.boxes for s, _ in graph.values[v].sources if s in self.boxes]
        self.matrices = {self._matrix(*edge) for edge in edges}

    def made(self) -> Graph | None:
        graph = self.graph
        for v, value in enumerate(graph.values):
            box = self.boxes.get(v)
            if box is None:
                continue
            sources = []
            for s, edge in value.sources:
                if s in self.at:
                    with suppress(_Empty):
                        sources.append(self._through(s, v, edge))
            if sources or v in graph.inputs:
                self.at[v] = self._add(v, cut_shape(value.shape, box), tuple(sources))
        inputs, outputs = ([self.at.get(v) for v in e] for e in (graph.inputs, graph.outputs))
        seeds, targets = (outputs, inputs) if self.reverse else (inputs, outputs)
        seeds[:] = [v if k == self.seed else None for k, v in enumerate(seeds)]
        if seeds[self.seed] is None or targets == [None] * len(targets):
            return None
        key = tuple(
            (v.op, v.shape, v.dtype, tuple((s, m.key) for s, m in v.sources)) for v in self.values
        )
        of = "range", key, tuple(inputs), tuple(outputs)
        return Graph(self.values, inputs, outputs, of, self.layers)

    def _add(self, v: int, shape: Shape, sources: tuple[Source, ...]) -> int:
        value = self.graph.values[v]
        self.values.append(Value(value.op, shape, value.dtype, value.device, sources))
        if self.layers is not None and v in self.graph.layers:
            self.layers[len(self.values) - 1] = self.graph.layers[v]
        return len(self.values) - 1

    def _through(self, s: int, v: int, edge: LinearMap) -> Source:
        """A value's source by an edge: between are values that fit the entries of one side to those of the other."""
        before, after = self.graph.values[s].shape, self.graph.values[v].shape
        far = self.boxes[v]
        left, right = _both(edge, self.boxes[s], far, before, after)
        if self._matrix(v, s) is not None:
            at = self._apart(s, left)
        else:
            at = self._fitted(s, left)
        if (
            v in self.matrices and self._only(s) is None
        ):  # what is apart is added behind, to no product
            at = self._add(s, cut_shape(before, left), ((at, Identity()),))
        steps = _fit(after, right, far)
        edge = _cut(edge, left, right, before, after)
        if not steps:
            return at, edge
        at = self._add(v, cut_shape(after, right), ((at, edge),))
        for step, shape in steps[:-1]:
            at = self._add(v, shape, ((at, step),))
        return at, steps[-1][0]

    def _fitted(self, s: int, box: Box) -> int:
        """Those of a value's entries that are in a box."""
        at = self.at[s]
        for step, shape in _fit(self.graph.values[s].shape, self.boxes[s], box):
            at = self._add(s, shape, ((at, step),))
        return at

    def _matrix(self, v: int, s: int) -> int | None:
        """The product with a matrix that an edge from ``s`` views, where it ends what is tied to the seed's tokens."""
        if v not in self.tied or s in self.tied:
            return None
        while (only := self._only(s)) is not None:
            if only[1].__class__ not in _ALONG:
                return s
            s = only[0]
        return None

    def _only(self, v: int) -> Source | None:
        """The source of a value that is one product with a matrix, or a view."""
        sources = self.graph.values[v].sources
        if v in self.graph.inputs or len(sources) != 1:
            return None
        ((_, edge),) = sources
        return sources[0] if edge.__class__ in _ALONG or edge.structure == "shared matrix" else None

    def _apart(self, s: int, box: Box) -> int:
        """`_fitted`, made from before a matrix: where tokens are tied to the seed's, it multiplies a part of them."""
        only, after = self._only(s), self.graph.values[s].shape
        if only is not None and box != self.boxes[s]:
            t, edge = only
            before = self.graph.values[t].shape
            left, right = _both(edge, self.boxes[t], box, before, after)
            if right == box:
                edge = _cut(edge, left, right, before, after)
                return self._add(s, cut_shape(after, right), ((self._apart(t, left), edge),))
        return self._fitted(s, box)


def _both(edge: LinearMap, near: Box, far: Box, before: Shape, after: Shape) -> tuple[Box, Box]:
    """The entries of both sides of a map between which it is cut, of those that are there."""
    left: Box = {}
    right: Box = {}
    if edge.__class__ not in CUT:
        return left, right
    if edge.__class__ is View:
        for cut in near.values():
            moved = _moved(cut, before, after)
            if moved is None or moved.axis in right:
                continue
            met = _met(moved, far.get(moved.axis), after)
            back = None if met is None else _moved(met, after, before)
            if back is not None and back.axis == cut.axis:
                right[met.axis], left[cut.axis] = met, back
        for cut in far.values():
            moved = _moved(cut, after, before)
            if moved is None or cut.axis in right or moved.axis in left:
                continue
            if moved.axis not in near:
                right[cut.axis], left[moved.axis] = cut, moved
        return left, right
    for a, b in edge.kept(before, after):
        one, other = near.get(a), far.get(b)
        if before[a] != after[b] or (one is None and other is None):
            continue
        one = one or replace(other, axis=a)
        met = _met(one, replace(other or one, axis=a), before)
        if met is not None:
            left[a], right[b] = met, replace(met, axis=b)
    axis = _summed(edge, len(before))
    if axis is not None:
        plain = [box.get(axis) for box in (near, far)]
        plain = [None if c is None or c.outer > 1 else c for c in plain]
        if isinstance(edge, Softmax):
            if None not in plain:
                first = min(c.start for c in plain)
                last = max(c.start + c.length for c in plain)
                left[axis] = right[axis] = Cut(axis, first, last - first)
        else:
            for box, c in zip((left, right), plain, strict=True):
                if c is not None:
                    box[axis] = c
    return left, right


def _summed(edge: LinearMap, ndim: int) -> int | None:
    """The axis that a map mixes, and along which a part of it is the map of the parts."""
    if isinstance(edge, Softmax):
        return edge.axis
    if isinstance(edge, MatMul):
        return ndim - 1 if edge.side == "right" else ndim - 2
    return None


def _met(one: Cut, other: Cut | None, shape: Shape) -> Cut | None:
    """What two ranges of one axis have in common; None where they are of other parts of it."""
    if other is None or other == one:
        return one
    if one.outer != other.outer:
        return None
    first = max(one.start, other.start)
    length = min(one.start + one.length, other.start + other.length) - first
    if length <= 0:
        raise _Empty
    return replace(one, start=first, length=length)


def _moved(cut: Cut, shape: Shape, to: Shape) -> Cut | None:
    """The same entries of a value viewed in another shape; None where they are no range of an axis of it."""
    unit = prod(shape[cut.axis + 1 :])
    period = shape[cut.axis] // cut.outer * unit
    start, length = cut.start * unit, cut.length * unit
    inner = 1
    for axis in reversed(range(len(to))):
        whole = inner * to[axis]
        fits = not (start % inner or length % inner or period % inner or whole % period)
        if to[axis] > 1 and fits:
            return Cut(axis, start // inner, length // inner, whole // period)
        inner = whole
    return None


def _cut(edge: LinearMap, left: Box, right: Box, before: Shape, after: Shape) -> LinearMap:
    """The map between the entries of two boxes."""
    if edge.__class__ is View:
        return View(cut_shape(before, left), cut_shape(after, right))
    axis = _summed(edge, len(before))
    pairs = [*edge.kept(before, after)]
    if axis is not None and (axis in left or axis in right):
        pairs.append((axis, axis))
    for a, b in pairs:
        if a in left or b in right:
            ends = left.get(a) or Cut(a, 0, before[a]), right.get(b) or Cut(b, 0, after[b])
            edge = edge.narrow(*ends, before, after)
            before, after = ends[0].shape(before), ends[1].shape(after)
    return edge


def _fit(shape: Shape, one: Box, other: Box) -> list[tuple[LinearMap, Shape]]:
    """Maps, each with the shape that it gives, from the entries of a box to those of another: zero where it is new."""
    steps: list[tuple[LinearMap, Shape]] = []
    now = dict(one)
    for axis in sorted({*one, *other}):
        a, b = one.get(axis), other.get(axis)
        if a == b:
            continue
        goals = [b] if a is None or b is None or a.outer == b.outer else [None, b]
        for goal in goals:
            at = cut_shape(shape, now)
            was = now.pop(axis, None)
            outer = (was or goal).outer
            whole = Cut(axis, 0, shape[axis] // outer, outer)
            if goal is not None:
                now[axis] = goal
            _along(steps, axis, was or whole, goal or whole, at)
    return steps


def _along(steps, axis: int, one: Cut, other: Cut, at: Shape) -> None:
    """`_fit` along one axis, of values that have the shape ``at``."""
    first = max(one.start, other.start)
    length = min(one.start + one.length, other.start + other.length) - first
    if length <= 0:
        raise _Empty
    outer, split = one.outer, at
    if outer > 1:
        split = (*at[:axis], outer, one.length, *at[axis + 1 :])
        steps.append((View(at, split), split))
        axis += 1
    for edge, whole in ((Slice, one), (Place, other)):
        if length < whole.length:
            size = length if edge is Slice else whole.length
            split = (*split[:axis], size, *split[axis + 1 :])
            steps.append((edge(axis, first - whole.start, length, 1, whole.length), split))
    if outer > 1:
        merged = (*split[: axis - 1], outer * split[axis], *split[axis + 1 :])
        steps.append((View(split, merged), merged))
