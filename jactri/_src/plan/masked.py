"""Ranges of tokens, where masks keep later from earlier ones: what is zero by a mask is not multiplied.

Behind attention under a causal mask, a block has all seeds by all tokens, and half of it is zero. A range of the seed's
tokens runs on a graph of its own, which has those entries of every value that the range can reach: which these are,
intervals tell (see `owners`), by masks alone. Each map is cut to the entries on both of its sides, so that nothing but
zeros is left out.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from ..base.intervals import own, thin
from ..maps.contraction import Expand, MatMul, Sum
from ..maps.layout import Layout
from ..maps.linear_map import Cast, Cut, Diagonal, Identity, LinearMap, Permute, Scale, Shape, View
from ..maps.low_rank import Project, Softmax
from ..maps.maps import Batched
from ..maps.mask import Mask
from ..maps.selection import Place, Select, Slice, Take
from ..read.graph import Graph, Source, Value
from .owners import follow
from .sweep import simulate

Box = dict[int, Cut]
"""The entries of a value: by axis a range, where it is not whole."""

_CUT = frozenset((
    Batched, Cast, Diagonal, Expand, Identity, Mask, MatMul, Permute, Place, Project, Scale, Select, Slice, Softmax,
    Sum, Take, View,
))  # fmt: skip
"""Maps that can be cut along all axes that they keep."""

LEAST = 4
"""Tokens of a range, at least."""

WORTH = 0.8
"""Ranges are looked for along an axis where each reaches at most this part of the other end, on average."""


def masks(graph: Graph) -> tuple[tuple[int, int, bytes], ...]:
    """Which edges (value, number) have a mask, and what it leaves: alike for graphs whose masks are."""
    return tuple([
        (v, k, e.unmasked.digest)
        for v, value in enumerate(graph.values)
        for k, (_, e) in enumerate(value.sources)
        if isinstance(e, (Softmax, MatMul)) and e.unmasked is not None and e.unmasked() is not None
    ])  # fmt: skip


def fixed(graph: Graph) -> bool:
    """Whether the masks and the graph's key tell what depends on what: not where there are indices."""
    kinds = {e.__class__ for v in graph.values for _, e in v.sources} - (_CUT - {Take})
    return all(kind.reach is LinearMap.reach for kind in kinds)


def held(graph: Graph) -> float:
    """Bytes of the derivatives of which each range has a part."""
    return sum(
        prod(v.shape) * v.dtype.itemsize
        for v in graph.values
        if any(isinstance(e, (Diagonal, Softmax)) for _, e in v.sources)
    )


def support(graph: Graph, seed: int, axis: int, value: int) -> tuple[int, np.ndarray] | None:
    """An axis of a value whose entries see a part of an axis of the seed each, and which: boolean, (value, seed)."""
    n = graph.values[seed].shape[axis]
    found = _follow(graph, seed, value, axis, False).get(value)
    if found is None:
        return None
    found, best = thin(found), None
    index = torch.arange(n, device=found.device)
    for a in range(found.dim() - 1):
        if found.shape[a + 1] > 1:
            others = [d for d in range(1, found.dim()) if d != a + 1]
            after, before = (found.amax(others) if others else found).unsqueeze(-1)
            seen = (index < after) & (n - index <= before)
            if not bool(seen.all()) and (best is None or seen.sum() < best[1].sum()):
                best = a, seen.cpu().numpy()
    return best


Range = dict[int, Box]
"""A range of the seed's tokens: the entries of each value on its way, of which no other value is."""


def ranges(graph: Graph, reverse: bool, count: int) -> list[Range] | None:
    """About ``count`` ranges of one axis of the only output (or input), where masks let each reach a part only."""
    ends = [graph.inputs, graph.outputs]
    if any(len(e) != 1 or e[0] is None for e in ends) or graph.complex:
        return None
    seed, target = (e[0] for e in ends[:: -1 if reverse else 1])
    sweep = simulate(graph, 0, reverse, False)
    if target not in sweep.layouts:
        return None
    shape = graph.values[seed].shape
    best, found = WORTH, None
    needed = _follow(graph, target, seed, 0, not reverse)
    for axis, n in enumerate(shape):
        ties = {t for _, t in sweep.layout.axes[axis]}
        parts = min(count, n // LEAST)
        if parts < 2 or ties & sweep.layouts[target].tied:
            continue
        reached = _follow(graph, seed, target, axis, reverse)
        if target not in reached:
            return None
        size = -(-n // parts)
        spans = [(start, min(size, n - start)) for start in range(0, n, size)]
        made: list[Range] = [{} for _ in spans]
        for v, layout in sweep.layouts.items():
            if v in reached and v in needed:
                near, far = (thin(t[v]).cpu().numpy() for t in (reached, needed))
                for (start, length), boxes in zip(spans, made, strict=True):
                    box = _box(near, far, start, length, n, layout)
                    if box is not None:
                        boxes[v] = box
        for (start, length), boxes in zip(spans, made, strict=True):
            boxes[seed] = {axis: Cut(axis, start, length)}
        size = sum(_part(graph, r, target) for r in made) / len(made)
        runs = any(c.outer > 1 for r in made for e in (seed, target) for c in r.get(e, {}).values())
        if size < best and not runs:  # an answer is written in one piece a range
            best, found = size, made
    return found


def _follow(graph: Graph, start: int, end: int, axis: int, reverse: bool) -> dict[int, Tensor]:
    value = graph.values[start]
    n = value.shape[axis] if value.shape else 1
    at = own(n, max(1, len(value.shape)), value.device, axis)
    return follow(
        graph, {start: at.reshape(2, *at.shape[1 : 1 + len(value.shape)])}, [end], reverse
    )


def _part(graph: Graph, found: Range, target: int) -> float:
    """Which part of the entries of the other end a range reaches."""
    box, shape = found.get(target), graph.values[target].shape
    return 0.0 if box is None else prod(cut_shape(shape, box)) / max(1, prod(shape))


def _box(
    reached: np.ndarray, needed: np.ndarray, start: int, length: int, n: int, layout: Layout
) -> Box | None:
    """Where entries meet a range of ``n`` and are needed; None where none do."""
    there = (reached[0] > start) & (reached[1] > n - start - length) & (needed[0] > 0)
    if not there.any():
        return None
    box: Box = {}
    for a, factors in enumerate(layout.axes):
        size = layout.shape[a]
        if there.shape[a] != size or size == 1:
            continue
        line = there.any(tuple([d for d in range(there.ndim) if d != a]))
        outer, inner = 1, size
        for f, _ in factors:
            inner //= f
            at = line.reshape(outer, f, inner).any((0, 2)).nonzero()[0]
            first, count = int(at[0]), int(at[-1] - at[0]) + 1
            if count < f and (a not in box or outer * inner * count < prod(_sizes(box[a]))):
                box[a] = Cut(a, first * inner, count * inner, outer)
            outer *= f
    return box


def _sizes(cut: Cut) -> tuple[int, int]:
    return cut.outer, cut.length


def cut_shape(shape: Shape, box: Box) -> Shape:
    """Of the entries of a value that a box holds."""
    for cut in box.values():
        shape = cut.shape(shape)
    return shape


def narrowed(graph: Graph, found: Range) -> Graph | None:
    """The graph of a range; None where its seed reaches nothing."""
    return _Narrowing(graph, found).made()


class _Empty(Exception):
    """Nothing comes through a map."""


class _Narrowing:
    """One graph, while it is made."""

    def __init__(self, graph: Graph, boxes: Range):
        self.graph, self.boxes = graph, boxes
        self.values: list[Value] = []
        self.at: dict[int, int] = {}
        self.layers: dict[int, str] | None = None if graph.layers is None else {}

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
        if None in inputs or None in outputs:
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
        near, far = self.boxes[s], self.boxes[v]
        left, right = _both(edge, near, far, before, after)
        steps = [(s, *step) for step in _fit(before, near, left)]
        steps.append((v, _cut(edge, left, right, before, after), cut_shape(after, right)))
        steps += [(v, *step) for step in _fit(after, right, far)]
        at = self.at[s]
        for of, step, shape in steps[:-1]:
            value = self.graph.values[of]
            self.values.append(Value(value.op, shape, value.dtype, value.device, ((at, step),)))
            at = len(self.values) - 1
            if self.layers is not None and of in self.graph.layers:
                self.layers[at] = self.graph.layers[of]
        return at, steps[-1][1]


def _both(edge: LinearMap, near: Box, far: Box, before: Shape, after: Shape) -> tuple[Box, Box]:
    """The entries of both sides of a map between which it is cut, of those that are there."""
    left: Box = {}
    right: Box = {}
    if edge.__class__ not in _CUT:
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
        one, other = one or other, other or one
        met = _met(one, replace(other, axis=a), before)
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
    if isinstance(edge, MatMul) and edge.structure == "batched matrix":
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
