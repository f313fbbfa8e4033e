"""Which entries of a Jacobian can be non-zero: the support of every tie between an axis of a value and the seed.

The algebra of `layout` knows two cases: an axis of a value is tied to an axis of the seed (the block vanishes off the
diagonal), or it is not. Here a tie may also have a *support*, a boolean matrix (value index, seed index): after a 3x3
convolution, a pixel sees the pixels next to it, whatever came before. The pattern of a block is the product of its
supports, one for each tie; where nothing is tied, everything can be non-zero. Supports follow every layer exactly
(stride, dilation, padding, the borders), and a sum has the union of those of its terms.

From a pattern follow the entries of a sparse result, and the *colours* of a sweep (Curtis, Powell and Reid 1974): seeds
that never meet in one entry of the result run as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from ..maps.layout import FREE, Colours, Layout, SplitSeed
from ..maps.linear_map import LinearMap
from ..read.graph import Graph
from . import masked
from . import sweep as sweeping

Splits = dict[int, tuple[int, ...]]

WORTH = 0.75
"""Seeds are coloured where at most this part of them remains."""


@dataclass(frozen=True)
class Traced:
    """A value's ties to the seed, and for each the number of its support (see `Trace`)."""

    layout: Layout
    supports: dict[int, int]


class Trace:
    """The patterns of all values between one input and the outputs, found by following ties and windows forward.

    Supports are formed when they are asked for: most ties are gone before the end.
    """

    def __init__(self, graph: Graph, seed: int):
        self.graph, self.seed = graph, seed
        shape = graph.values[seed].shape
        splits: dict[int, tuple[int, ...]] = {}
        while True:
            self.start = Layout.identity(shape, splits)
            self._nodes: list[tuple] = []
            self._made: dict[int, np.ndarray] = {}
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
                    term = self._through(edge, self.values[s], values[s].shape, values[v].shape)
                    found = term if found is None else self._union(found, term)
            if found is not None:
                self.values[v] = found

    def _add(self, *node) -> int:
        self._nodes.append(node)
        return len(self._nodes) - 1

    def _through(self, edge: LinearMap, at: Traced, in_shape, out_shape) -> Traced:
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
        supports = {t: at.supports[t] for t in out.tied}
        axes = list(out.axes)
        for a, b in edge.windows(in_shape, out_shape):
            ties = [(i, t) for i, (_, t) in enumerate(layout.axes[a]) if t != FREE]
            if len(ties) == 1:
                i, t = ties[0]
                sizes = [n for n, _ in layout.axes[a]]
                whole = self._add("spread", at.supports[t], prod(sizes[:i]), prod(sizes[i + 1 :]))
                axes[b] = ((out_shape[b], t),)
                supports[t] = self._add("window", whole, edge, a, in_shape, out_shape)
        return Traced(Layout(tuple(axes), out.seed), supports)

    def _union(self, one: Traced, other: Traced) -> Traced:
        layout = one.layout.meet(other.layout)
        supports = {}
        for t in layout.tied:
            pair = one.supports[t], other.supports[t]
            supports[t] = pair[0] if pair[0] == pair[1] else self._add("union", *pair)
        return Traced(layout, supports)

    def support_of(self, at: Traced, tie: int) -> np.ndarray:
        """The support of a tie: boolean, (value index, seed index)."""
        last = at.supports[tie]
        wanted, stack = set(), [last]
        while stack:
            i = stack.pop()
            if i not in wanted and i not in self._made:
                wanted.add(i)
                stack.extend(self._parents(i))
        for i in sorted(wanted):
            kind, *rest = self._nodes[i]
            if kind == "identity":
                self._made[i] = np.eye(rest[0], dtype=bool)
            elif kind == "union":
                self._made[i] = self._made[rest[0]] | self._made[rest[1]]
            elif kind == "spread":  # to the axis that the factor is a part of
                before, outer, inner = rest
                self._made[i] = np.tile(self._made[before].repeat(inner, 0), (outer, 1))
            else:
                before, edge, axis, in_shape, out_shape = rest
                self._made[i] = _seen(edge.support(axis, in_shape, out_shape), self._made[before])
        return self._made[last]

    def lost(self, value: int, batch: bool = False) -> int:
        """The value at whose op, on the way to ``value``, the last ties are lost (but that of a ``batch``)."""
        graph_values = self.graph.values
        leads, stack = set(), [value]
        while stack:
            v = stack.pop()
            if v not in leads and v in self.values:
                leads.add(v)
                stack.extend(s for s, _ in graph_values[v].sources)
        spared = {t for _, t in self.start.axes[0]} if batch and self.start.axes else set()
        for v in sorted(leads):
            if not self.values[v].layout.tied - spared:
                return v
        return value

    def _parents(self, i: int) -> tuple[int, ...]:
        kind, *rest = self._nodes[i]
        return tuple(rest[: {"identity": 0, "union": 2}.get(kind, 1)])


def _seen(step: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The boolean product: for each row of ``step``, the union of those rows of ``before`` that it holds.

    Rows are bits, and as many passes as the longest row has entries: a window has few.
    """
    bits = np.packbits(before, axis=1)
    made = np.zeros((len(step), bits.shape[1]), np.uint8)
    at, held = np.divmod(np.flatnonzero(step), step.shape[1])
    counts = np.bincount(at, minlength=len(step))
    starts = np.cumsum(counts) - counts
    for j in range(counts.max(initial=0)):
        rows = np.flatnonzero(counts > j)
        made[rows] |= bits[held[starts[rows] + j]]
    return np.unpackbits(made, axis=1, count=before.shape[1]).view(bool)


def has_windows(graph: Graph) -> bool:
    """Whether any op sees a window of its input."""
    values = graph.values
    return any(edge.windows(values[s].shape, v.shape) for v in values for s, edge in v.sources)


def period(support: np.ndarray) -> int:
    """The least p such that seeds whose indices differ by a multiple of p never meet: (entries, seeds)."""
    seeds = support.shape[1]
    if not support.size:
        return 1
    dense = support.astype(np.float32)
    for p in range(max(1, int(support.sum(1).max())), seeds):
        colours = np.eye(p, dtype=np.float32)[np.arange(seeds) % p]
        if (dense @ colours).max() <= 1:
            return p
    return seeds


@dataclass(frozen=True)
class Pattern:
    """Which entries of the Jacobian of ``out`` (a value's factors) by ``into`` (a seed's) can be non-zero.

    Both list (size, tie) in the order of the axes; an entry can be non-zero where the ``supports`` (out index, in
    index) of all ties hold.
    """

    out: tuple[tuple[int, int], ...]
    into: tuple[tuple[int, int], ...]
    supports: dict[int, np.ndarray]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return prod(n for n, _ in self.out), prod(n for n, _ in self.into)

    @property
    def key(self) -> tuple:
        """Hashable: determines the pattern."""
        bits = ((t, s.shape, np.packbits(s).tobytes()) for t, s in sorted(self.supports.items()))
        return self.out, self.into, tuple(bits)

    @property
    def nnz(self) -> int:
        """Entries that can be non-zero."""
        free = prod(n for n, t in (*self.out, *self.into) if t == FREE)
        return free * prod(int(s.sum()) for s in self.supports.values())

    @property
    def bands(self) -> tuple[int, ...] | None:
        """The ties, slow axis first, if both ends have them last and in one order, as `kernels.band` writes them."""
        ties = tuple(t for _, t in self.out if t != FREE)
        ends = self.out[len(self.out) - len(ties) :], self.into[len(self.into) - len(ties) :]
        if not 1 <= len(ties) <= 3 or any(tuple(t for _, t in end) != ties for end in ends):
            return None
        return ties

    def sample(self, n: int) -> Pattern | None:
        """The pattern of one sample, if the first axes of both are a batch of ``n`` samples that do not mix."""
        if n == 1:
            return self
        if not self.out or not self.into or self.into[0] != self.out[0]:
            return None
        size, tie = self.out[0]
        if size != n or tie == FREE:
            return None
        support = self.supports[tie]
        if not np.array_equal(support, np.eye(len(support), dtype=bool)):
            return None
        rest = {t: s for t, s in self.supports.items() if t != tie}
        return Pattern(self.out[1:], self.into[1:], rest)

    def entries(self) -> Entries:
        """All entries, in the order of rows, and of columns within a row."""
        rows, _ = self.shape
        place = {t: i for i, (_, t) in enumerate(self.out) if t != FREE}
        strides = _strides([n for n, _ in self.out])
        # the columns that a factor of `into` has for each index of the factor of `out` that it is tied to
        count = np.ones((), np.int64)
        lists = {}
        for _, t in self.into:
            if t != FREE:
                support = self.supports[t]
                most = int(support.sum(1).max(initial=0))
                lists[t] = np.argsort(~support, axis=1, kind="stable")[:, :most], support.sum(1)
        for i, (n, t) in enumerate(self.out):
            own = lists[t][1] if t != FREE else np.ones(n, np.int64)
            count = np.multiply.outer(count, own) if i else own.astype(np.int64)
        count = np.ravel(count) * prod(n for n, t in self.into if t == FREE)
        if not self.out:
            count = count.reshape(1)
        start = np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])
        row = np.repeat(np.arange(rows), count)
        left = np.arange(start[-1]) - np.repeat(start[:-1], count)
        of_row = [
            (row // s) % n if n != 1 else np.zeros((), np.int64)
            for (n, _), s in zip(self.out, strides, strict=True)
        ]
        of_column = []
        for n, t in reversed(self.into):
            if t == FREE:
                left, digit = np.divmod(left, n)
            else:
                at = of_row[place[t]]
                table, counts = lists[t]
                left, digit = np.divmod(left, counts[at])
                digit = table[at, digit]
            of_column.append(digit)
        return Entries(start, row, tuple(of_row), tuple(reversed(of_column)), self)


@dataclass(frozen=True)
class Entries:
    """The entries of a pattern: ``start`` of every row, and the row, and the indices of all factors, of every entry."""

    start: np.ndarray
    row: np.ndarray
    of_row: tuple[np.ndarray, ...]
    of_column: tuple[np.ndarray, ...]
    pattern: Pattern

    @property
    def column(self) -> np.ndarray:
        strides = _strides([n for n, _ in self.pattern.into])
        return np.zeros_like(self.row) + sum(
            d * s for d, s in zip(self.of_column, strides, strict=True)
        )


def _strides(sizes: list[int]) -> list[int]:
    return [prod(sizes[i + 1 :]) for i in range(len(sizes))]


def pattern_of(trace: Trace, value: int) -> Pattern | None:
    """The pattern of a value by the input of a trace; None where the value does not depend on it."""
    at = trace.values.get(value)
    if at is None:
        return None
    layout, supports = at.layout, {t: trace.support_of(at, t) for t in at.layout.tied}
    axes = list(layout.axes)
    if masked.masks(trace.graph) and masked.fixed(trace.graph):
        for a, factors in enumerate(trace.start.axes):
            if len(factors) == 1 < factors[0][0] and factors[0][1] not in supports:
                found = masked.support(trace.graph, trace.seed, a, value)
                if found is not None and [t for _, t in axes[found[0]]] == [FREE]:
                    b, t = found[0], factors[0][1]
                    axes[b], supports[t] = ((layout.shape[b], t),), found[1]
    out = tuple(f for axis in axes for f in axis if f[0] != 1 or f[1] != FREE)
    into = tuple((n, t if t in supports else FREE) for t, n in enumerate(layout.seed))
    return Pattern(out, into, supports)


def colours_of(
    traces: list[Trace | None], sweep: sweeping.Sweep, per_sample: bool | str
) -> tuple[Splits, Colours]:
    """Splits and colours of the seed with which a sweep needs fewer seeds; no colours where none do.

    ``traces`` are those of the inputs. Samples that are asked for one by one (``per_sample``) are never one colour.
    """
    ends = [(k, v) for k, v in enumerate(sweep.targets) if v is not None]
    if sweep.summed or not ends:
        return {}, {}
    if sweep.reverse:
        found = [(traces[k], traces[k].values[sweep.seed]) for k, _ in ends]
        axes = [at.layout.axes for _, at in found]
    else:
        trace = traces[sweep.index]
        found = [(trace, trace.values[v]) for _, v in ends]
        axes = [trace.start.axes for _ in ends]
    sizes = [[tuple(n for n, _ in axis) for axis in a] for a in axes]
    if any(s != sizes[0] for s in sizes):
        return {}, {}
    kept = frozenset.intersection(*(sweep.layouts[v].tied for _, v in ends))
    colours = {}
    for a, axis in enumerate(sizes[0]):
        for i, n in enumerate(axis):
            own = sweep.layout.axes[a]
            if n == 1 or (per_sample and a == 0) or (len(own) == len(axis) and own[i][1] in kept):
                continue  # a tie needs no colours
            ties = [other[a][i][1] for other in axes]
            if any(t not in at.layout.tied for t, (_, at) in zip(ties, found, strict=True)):
                continue
            supports = [trace.support_of(at, t) for t, (trace, at) in zip(ties, found, strict=True)]
            least = period(np.concatenate([s.T if sweep.reverse else s for s in supports]))
            if least <= WORTH * n:
                colours[a, i] = least
    return {a: axis for a, axis in enumerate(sizes[0]) if len(axis) > 1}, colours
