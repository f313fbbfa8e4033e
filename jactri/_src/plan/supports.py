"""Which entries of a value depend on which of the seed: the support of every tie between an axis and the seed.

The algebra of `layout` knows two cases: an axis of a value is tied to an axis of the seed (the block vanishes off the
diagonal), or it is not. Here a tie may also have a *support*, a boolean matrix (value index, seed index): after a 3x3
convolution, a pixel sees the pixels next to it, whatever came before. Supports follow every layer exactly (stride,
dilation, padding, the borders), and a sum has the union of those of its terms. The pattern of a block is the product of
its supports.

Where that product is larger than what the layers allow (a star of neighbours, indices into several axes at once), and
the pattern is asked for itself, all entries are followed in flat order instead: each map as a sparse boolean matrix, a
chain of them as its product, a sum as a union. What is stored then is the smaller of the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from ..base.backends import capturing
from ..base.cache import Cache
from ..base.csr import Csr, union
from ..base.tracing import tracing
from ..maps.cut import Shape
from ..maps.layout import FREE, Layout, SplitSeed
from ..maps.linear_map import Elementwise, LinearMap, View
from ..read.graph import Graph
from . import masked
from . import sweep as sweeping
from .alike import Alike, leading
from .pattern import Pattern

Factors = tuple[tuple[int, int], ...]
"""Of an axis: (size, tie)."""

MOST = 1 << 22
"""Entries in flat order that are followed: so many,"""
EACH = 32
"""or so many a row, if that is more."""


@dataclass(frozen=True)
class Traced:
    """A value's ties to the seed, and for each the number of its support (see `Trace`)."""

    layout: Layout
    supports: dict[int, int]


class Trace:
    """The patterns of all values between one input and the outputs, found by following ties and windows forward.

    Supports are formed when they are asked for: most ties are gone before the end. ``indices``: whether those of ops
    that pick entries by index are read, which are no part of the graph's key.
    """

    def __init__(self, graph: Graph, seed: int, indices: bool = False):
        self.graph, self.seed, self.indices = graph, seed, indices
        shape = graph.values[seed].shape
        splits: dict[int, tuple[int, ...]] = {}
        while True:
            self.start = Layout.identity(shape, splits)
            self._nodes: list[tuple] = []
            self._made: dict[int, Csr | None] = {}  # None: all of them
            self._loose: set[int] = set()  # values whose entries are no product of supports,
            self._unions: dict[int, list[list[tuple[int, int]]]] = {}  # or perhaps none
            self.values: dict[int, Traced] = {}
            try:
                self._follow()
                break
            except SplitSeed as split:
                sweeping.refine(splits, shape, split)

    def _follow(self) -> None:
        values = self.graph.values
        ties = {t: self._add("identity", self.start.seed[t]) for t in self.start.tied}
        self.values[self.seed] = Traced(self.start, ties)
        for v in range(self.seed + 1, len(values)):
            found = None
            for s, edge in values[v].sources:
                if s in self.values:
                    term = self._through(v, edge, self.values[s], values[s].shape)
                    found = term if found is None else self._union(v, found, term)
            if found is not None:
                self.values[v] = found

    def _add(self, *node) -> int:
        self._nodes.append(node)
        return len(self._nodes) - 1

    def _through(self, v: int, edge: LinearMap, at: Traced, in_shape) -> Traced:
        out_shape = self.graph.values[v].shape
        if 0 in out_shape:  # nothing to tie
            return Traced(Layout(tuple(((n, FREE),) for n in out_shape), self.start.seed), {})
        layout = at.layout
        while True:
            try:
                out = edge.route(layout, in_shape, out_shape, False).out
                break
            except SplitSeed as split:
                if self._nodes[at.supports[split.factor]][0] == "identity":
                    raise
                layout = layout.drop(frozenset([split.factor]))  # a window has no two parts
                self._loose.add(v)
        supports = {t: at.supports[t] for t in out.tied}
        axes = list(out.axes)
        seen = edge.windows(in_shape, out_shape)
        if self.indices:
            seen = (*seen, *edge.picks(in_shape, out_shape))
            if self._loses(edge, layout, out, in_shape, out_shape):
                self._loose.add(v)
        for a, b in seen:
            ties = [(i, t) for i, (_, t) in enumerate(layout.axes[a]) if t != FREE]
            if len(ties) == 1:
                i, t = ties[0]
                whole = self._spread(layout.axes[a], i, at.supports[t])
                axes[b] = ((out_shape[b], t),)
                supports[t] = self._add("window", whole, edge, a, in_shape, out_shape)
        return Traced(Layout(tuple(axes), out.seed), supports)

    def _spread(self, axis: Factors, i: int, support: int) -> int:
        """The support of the whole of an axis, of that of its factor ``i``."""
        sizes = [n for n, _ in axis]
        before, after = prod(sizes[:i]), prod(sizes[i + 1 :])
        return self._add("spread", support, before, after) if before * after != 1 else support

    def _alike(self, one: Traced, other: Traced) -> tuple[Traced, Traced]:
        """The same, where a tie that both have on an axis is of the same part of it.

        A window ties a whole axis, of which elsewhere a factor may be tied: so one of the ties is spread over the axis.
        Where others of the axis agree, these are kept.
        """
        for a, pair in enumerate(zip(one.layout.axes, other.layout.axes, strict=True)):
            mine, theirs = ({t: (i, axis[i:]) for i, (_, t) in enumerate(axis)} for axis in pair)
            both = [t for t in mine if t != FREE and t in theirs]
            differ = [t for t in both if _place(mine[t][1]) != _place(theirs[t][1])]
            if not differ:
                continue
            if len(differ) < len(both):
                gone = frozenset(differ)
                one, other = (replace(e, layout=e.layout.drop(gone)) for e in (one, other))
                continue
            t, ends = differ[0], []
            for end, places in ((one, mine), (other, theirs)):
                axes = list(end.layout.axes)
                spread = self._spread(axes[a], places[t][0], end.supports[t])
                axes[a] = ((end.layout.shape[a], t),)
                layout = Layout(tuple(axes), end.layout.seed)
                ends.append(Traced(layout, {**end.supports, t: spread}))
            one, other = ends
        return one, other

    def _loses(self, edge: LinearMap, layout: Layout, out: Layout, in_shape, out_shape) -> bool:
        """Whether what a map does to the ties of a layout is less than it could be."""
        if isinstance(edge, View):
            return out.tied != layout.tied
        if isinstance(edge, Elementwise):
            links = edge.links(in_shape, out_shape) if layout.tied else None
            return links is not None and links.nnz < prod(out_shape)
        kept = dict(edge.kept(in_shape, out_shape))
        ties = [[t for _, t in axis if t != FREE] for axis in layout.axes]
        if any(t not in out.tied for a in kept for t in ties[a]):
            return True
        mixed = [a for a, own in enumerate(ties) if own and a not in kept]
        if not mixed:
            return False
        product = relation(edge, in_shape, out_shape)
        if any(len(ties[a]) > 1 for a in mixed if product.into[a][1] != FREE):
            return True
        links = edge.links(in_shape, out_shape)
        return links is not None and links.nnz < product.nnz

    def _union(self, v: int, one: Traced, other: Traced) -> Traced:
        ties = one.layout.tied | other.layout.tied
        one, other = self._alike(one, other)
        layout = one.layout.meet(other.layout)
        if ties != layout.tied:
            self._loose.add(v)
        supports = {}
        differ = []
        for t in layout.tied:
            pair = one.supports[t], other.supports[t]
            supports[t] = pair[0] if pair[0] == pair[1] else self._add("union", *pair)
            if pair[0] != pair[1]:
                differ.append(pair)
        if len(differ) > 1:
            self._unions.setdefault(v, []).append(differ)
        return Traced(layout, supports)

    def loose(self, value: int) -> bool:
        """Whether the product of the supports of a value may have entries that its layers do not allow.

        A sum has such where its terms differ along several ties, and none has all that the other has.
        """
        behind = self._behind(value)
        if not self._loose.isdisjoint(behind):
            return True
        for differ in (d for v in behind for d in self._unions.get(v, ())):
            pairs = [(self._form(i), self._form(k)) for i, k in differ]
            if not all(_within(a, b) for a, b in pairs) and not all(
                _within(b, a) for a, b in pairs
            ):
                return True
        return False

    def flat(self, value: int) -> Csr | None:
        """Which entries of the seed each of a value sees, in flat order; None where these are too many to follow."""
        *_, (v, found) = self._flats(value)
        return None if found is None else found.whole(self._limit(v))

    def _limit(self, value: int) -> int:
        return max(MOST, EACH * prod(self.graph.values[value].shape))

    def _flats(self, value: int) -> Iterator[tuple[int, Alike | None]]:
        """The same of all values on the way to one, up to the first that is None."""
        values = self.graph.values
        order = sweeping.relevant(self.graph, [self.seed], [value], False)
        last = {s: v for v in order for s, _ in values[v].sources}
        found = {self.seed: Alike.of(Csr.identity(prod(values[self.seed].shape)))}
        for v in order:
            parts = []
            limit = self._limit(v)
            for s, edge in values[v].sources if v != self.seed else ():
                if s not in found:
                    continue
                part = _then(found[s], edge, values[s].shape, values[v].shape, limit)
                if part is None:
                    yield v, None
                    return
                parts.append(part)
            if parts:
                one = Alike.union(parts, limit)
                if one is None:
                    yield v, None
                    return
                found[v] = one
            yield v, found[v]
            for s in {s for s, _ in values[v].sources}:
                if last[s] == v:
                    found.pop(s, None)

    def support_of(self, at: Traced, tie: int) -> Csr | None:
        """The support of a tie: (value index, seed index); None where that is large, and has every entry."""
        return self._form(at.supports[tie])

    def _form(self, last: int) -> Csr | None:
        wanted, stack = set(), [last]
        while stack:
            i = stack.pop()
            if i not in wanted and i not in self._made:
                wanted.add(i)
                stack.extend(self._parents(i))
        for i in sorted(wanted):
            kind, *rest = self._nodes[i]
            parts = [self._made[k] for k in self._parents(i)]
            known = [p for p in parts if p is not None]
            if len(known) < len(parts):
                self._made[i] = None
            elif kind == "identity":
                self._made[i] = Csr.identity(rest[0])
            elif kind == "union":
                self._made[i] = union(known)
            elif kind == "spread":  # to the axis that the factor is a part of
                _, outer, inner = rest
                each = np.arange(known[0].height).repeat(inner)
                self._made[i] = known[0].take(np.tile(each, outer))
            else:
                _, edge, axis, in_shape, out_shape = rest
                self._made[i] = edge.support(axis, in_shape, out_shape).after(known[0])
        return self._made[last]

    def lost(self, value: int, batch: bool = False) -> int:
        """The value at whose op, on the way to ``value``, the last zeros are lost (but those of a ``batch``)."""
        spared = {t for _, t in self.start.axes[0]} if batch and self.start.axes else set()
        behind = self._behind(value) - {self.seed}
        if self.indices and behind & self._loose:
            size = prod(n for t, n in enumerate(self.start.seed) if t not in spared)
            for v, found in self._flats(value):
                rows = prod(self.graph.values[v].shape)
                if v == self.seed:
                    continue
                whole = None if found is None else found.whole(self._limit(v))
                if whole is None or whole.nnz >= rows * size > 0:
                    return v
            return value
        for v in sorted(behind):
            at = self.values[v]
            left = [self.support_of(at, t) for t in at.layout.tied - spared]
            if all(s is None or s.nnz == prod(s.shape) > 1 for s in left):
                return v
        return value

    def _behind(self, value: int) -> set[int]:
        """The values that depend on the seed and lead to one, and this."""
        leads, stack = set(), [value]
        while stack:
            v = stack.pop()
            if v not in leads and v in self.values:
                leads.add(v)
                stack.extend(s for s, _ in self.graph.values[v].sources)
        return leads

    def _parents(self, i: int) -> tuple[int, ...]:
        kind, *rest = self._nodes[i]
        return tuple(rest[: {"identity": 0, "union": 2}.get(kind, 1)])


def _within(one: Csr | None, other: Csr | None) -> bool:
    """Whether the other has all entries of one; None has every."""
    return other is None or (one is not None and one.within(other))


def _place(factors: Factors) -> tuple[int, int]:
    """The size and the stride of the first of the last factors of an axis."""
    return factors[0][0], prod(n for n, _ in factors[1:])


def indices(graph: Graph) -> tuple | None:
    """Alike for graphs whose masks and indices are, which tell patterns beside the graph's key.

    None where they cannot be read.
    """
    if not readable(graph):
        return None
    if indices not in graph.looked:
        held = [
            (v, k, digest)
            for v, value in enumerate(graph.values)
            for k, (_, edge) in enumerate(value.sources)
            if (digest := edge.digest) is not None
        ]
        graph.looked[indices] = masked.masks(graph), tuple(held)
    return graph.looked[indices]


def known_by(graph: Graph) -> tuple:
    """What tells patterns beside the graph's key, as far as they are known: in a trace, by masks that sizes tell."""
    found = indices(graph)
    if found is None:
        return masked.masks(graph) if tracing() else ()
    return found


def readable(graph: Graph) -> bool:
    """Whether indices can be read: a trace and a CUDA graph are for others, too."""
    return not graph.values or not capturing(graph.values[0].device)


def has_windows(graph: Graph) -> bool:
    """Whether any op sees a window of its input."""
    values = graph.values
    return any(edge.windows(values[s].shape, v.shape) for v in values for s, edge in v.sources)


def _then(before: Alike, edge: LinearMap, in_shape, out_shape, limit: float) -> Alike | None:
    """What a map leaves of the entries of its input; None where more than ``limit`` would be listed."""
    links = edge.links(in_shape, out_shape)
    if links is None and isinstance(edge, (Elementwise, View)):
        return before
    count, axes = leading(edge, in_shape, out_shape)
    if links is not None:
        block = links.block(count)
        return before.then(1, links, limit) if block is None else before.then(count, block, limit)
    each = relation(edge, in_shape, out_shape, axes)
    return before.then(count, each.flat, limit) if count * each.nnz <= limit else None


def relation(
    edge: LinearMap, in_shape: Shape, out_shape: Shape, apart: frozenset[int] = frozenset()
) -> Pattern:
    """Which inputs each output of a map sees, as a product: what it keeps, windows, and indices by axis.

    Of one index of axes of the input that are kept ``apart``.
    """
    into, out = ([[n, FREE] for n in shape] for shape in (in_shape, out_shape))
    supports: dict[int, Csr] = {}
    kept = edge.kept(in_shape, out_shape)
    seen = (*edge.windows(in_shape, out_shape), *edge.picks(in_shape, out_shape))
    for k, (a, b) in enumerate((*kept, *seen)):
        if a in apart:
            into[a][0] = out[b][0] = 1
            continue
        into[a][1] = out[b][1] = k
        fresh = k < len(kept)
        supports[k] = Csr.identity(in_shape[a]) if fresh else edge.support(a, in_shape, out_shape)
    return Pattern(tuple((n, t) for n, t in out), tuple((n, t) for n, t in into), supports)


def pattern_of(trace: Trace, value: int) -> Pattern | None:
    """The pattern of a value by the input of a trace; None where the value does not depend on it."""
    at = trace.values.get(value)
    if at is None:
        return None
    graph, told = trace.graph, trace.indices
    if not told:
        return _formed(trace, at, value)
    key = graph.key, indices(graph), trace.seed, value
    return _patterns.of(key, lambda: _formed(trace, at, value))


_patterns: Cache[tuple, Pattern] = Cache(8)


def _formed(trace: Trace, at: Traced, value: int) -> Pattern:
    found = {t: trace.support_of(at, t) for t in at.layout.tied}
    supports = {t: support for t, support in found.items() if support is not None}
    layout = at.layout.drop(frozenset(found.keys() - supports.keys()))
    axes = list(layout.axes)
    known = trace.indices or (tracing() and masked.fixed(trace.graph))
    if known and masked.masks(trace.graph):
        for a, factors in enumerate(trace.start.axes):
            if len(factors) == 1 < factors[0][0] and factors[0][1] not in supports:
                seen = masked.support(trace.graph, trace.seed, a, value)
                parts = [part for b in seen for part in _free(b, axes[b], seen[b])]
                if parts:
                    b, i, part = min(parts, key=lambda part: part[2].nnz / part[2].height)
                    t = factors[0][1]
                    axes[b] = (*axes[b][:i], (axes[b][i][0], t), *axes[b][i + 1 :])
                    supports[t] = part
    out = tuple(f for axis in axes for f in axis if f[0] != 1 or f[1] != FREE)
    into = tuple((n, t if t in supports else FREE) for t, n in enumerate(layout.seed))
    product = Pattern(out, into, supports)
    if trace.indices and trace.loose(value) and (flat := trace.flat(value)) is not None:
        smaller = Pattern.of(flat).within(product)
        return smaller if smaller.nnz < product.nnz else product
    return product


def _free(b: int, axis: Factors, seen: Csr) -> Iterator[tuple[int, int, Csr]]:
    """The factors of an axis that have no tie, and see a part only: (axis, factor, support)."""
    sizes = [n for n, _ in axis]
    for i, (n, t) in enumerate(axis):
        if t == FREE and n > 1:
            part = Csr.of(seen.row // prod(sizes[i + 1 :]) % n, seen.column, n, seen.width)
            if part.nnz < n * seen.width:
                yield b, i, part
