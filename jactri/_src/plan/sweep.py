"""A sweep: the steps that accumulate a Jacobian from one seed, found by following layouts through the graph.

The seed is the identity at one value: at an input or a cut (forward mode: its columns), at an output or a cut (reverse
mode: its rows). Or blocks of tangents or cotangents are given, at several values at once. Pure: it reads layouts and
map structures, and holds no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..maps.layout import FREE, Colours, Layout, Selection, SplitSeed
from ..maps.linear_map import LinearMap, Route
from ..maps.spelled import Chain, Spelled
from ..read.graph import Graph, Value

if TYPE_CHECKING:
    from .colours import Table
    from .mixed import Product
    from .patches import ReceptiveField
    from .pattern import Pattern

T = TypeVar("T")


class Matrices(LinearMap):
    """A part of the graph that was made before: a matrix for each of what it acts on (see `condensing`)."""

    __slots__ = ()
    name, structure = "matrices", "matrices"


MATRICES = Matrices()


@dataclass(frozen=True)
class Meeting:
    """The product of a block with that of a part."""

    block: int
    """Where the part's block is, among the blocks of the sweep."""
    product: Product

    def scales(self, reverse: bool) -> bool:
        """Whether the block is multiplied entry by entry, in a sweep in this direction."""
        return self.product.scales(self.product.second if reverse else self.product.first)


def part_block(number: int) -> int:
    """Where the block of a part is, among the blocks of a sweep: where no value is."""
    return -1 - number


@dataclass(frozen=True, slots=True)
class Term:
    """One contribution to a step: the block of ``other``, through edge ``edge`` of value ``owner``."""

    other: int
    owner: int
    edge: int
    route: Route
    path: tuple[tuple[int, int], ...] = ()
    """The (owner, edge) of several maps after one another that are one product (see `factoring`), or none,"""
    spelled: Spelled | None = None
    """and how that is made."""

    meeting: Meeting | None = None
    """The product with a part that was made before, or None."""

    def map_in(self, graph: Graph) -> Any:
        """What it multiplies with."""
        if self.meeting is not None:
            return MATRICES
        if self.spelled is None:
            return graph.values[self.owner].sources[self.edge][1]
        return Chain([graph.values[v].sources[e][1] for v, e in self.path], self.spelled)


@dataclass(frozen=True, slots=True)
class Step:
    """The block of one value: a sum of terms, stored in ``layout``; ``frees`` are blocks used for the last time.

    ``flops`` and ``bytes`` (written) are for all seeds. ``shares``: the block is a view of weights or of its source.
    """

    value: int
    terms: tuple[Term, ...]
    layout: Layout
    frees: tuple[int, ...]
    flops: float
    bytes: float
    shares: bool = False

    @property
    def reads(self) -> tuple[int, ...]:
        """The values whose blocks it takes."""
        return tuple(t.other for t in self.terms)


@dataclass(frozen=True, eq=False)
class Sweep:
    """All steps for one seed. ``targets`` are the values whose blocks are the answer.

    ``items`` are the same steps as kernels run them (see `fusion`), None where none run.
    """

    reverse: bool
    seed: int
    layout: Layout
    steps: list[Step]
    layouts: dict[int, Layout]
    targets: list[int | None]
    flops: float
    bytes: float
    index: int = 0
    summed: bool = False
    colours: Colours = field(default_factory=dict)
    """Seeds that run as one, in a factor of the seed (see `colours`):"""
    tables: dict[tuple[int, int], Table] = field(default_factory=dict)
    """where they are not those that differ by a multiple of the number of colours, which they are."""
    table: Table | None = None
    """The colours of all entries of the seed in flat order, whose number is then its only factor."""
    patterns: dict[int, Pattern] = field(default_factory=dict)
    """By target: the entries that are computed, where that is not the whole block."""
    windows: dict[int, ReceptiveField] = field(default_factory=dict)
    """By value: where its block has the pixels of, if the sweep runs by `patches`."""
    lines: tuple[int, int] | None = None
    """The lines (first, count) of the seed's image from which it runs by patches, if not all."""
    chunks: dict[int, int] = field(default_factory=dict)
    peak: float = 0.0
    items: list | None = None
    why: str = ""
    """Why its blocks are images or patches, where they could be either."""
    alone: bool = False
    """Whether it is the only stage of its plan: a derivative that all chunks share is then used once."""
    given: tuple[int, ...] = ()
    """The values whose blocks are given, if the seed is not an identity; ``seed`` is the first of them."""
    parts: tuple[tuple[Sweep, int], ...] = ()
    """Sweeps that run before, and the value of each whose block terms multiply with."""
    inside: dict[int, Layout] = field(default_factory=dict)
    """Layouts that blocks would have had which are not made, as a step or a part stands for several."""
    alike: frozenset[int] = frozenset()
    """The values whose blocks are made of weights alone, the same for all samples."""

    @property
    def direction(self) -> str:
        """As profilers and tables name it."""
        return "reverse" if self.reverse else "forward"

    @property
    def coloured(self) -> bool:
        """Whether several seeds run as one."""
        return bool(self.colours) or self.table is not None

    @property
    def values(self) -> list[int]:
        """Those that it computes blocks of, in order."""
        return [s.value for s in self.steps]

    def stored(self, graph: Graph, value: int, sel: Selection | None = None) -> int:
        """Bytes of the block of a value, or of a chunk of it."""
        layout = self.layouts[value]
        return (layout.numel_of(sel) if sel else layout.numel) * graph.values[value].dtype.itemsize

    def largest(self, graph: Graph) -> int:
        """Bytes of the largest block."""
        return max((self.stored(graph, v) for v in self.layouts), default=0)

    def ends(self, graph: Graph) -> int:
        """Bytes of the blocks that are the answer."""
        return sum(self.stored(graph, t) for t in {*self.targets} - {None})

    def columns(self) -> int:
        """The most seeds that any block carries."""
        return max((lay.columns for lay in self.layouts.values()), default=1)

    def selections(self) -> list[Selection]:
        """The chunks, as ranges of the seed factors that are cut."""
        out: list[Selection] = [{}]
        for factor, size in self.chunks.items():
            total = self.layout.seed[factor]
            out = [
                {**sel, factor: (start, min(size, total - start))}
                for sel in out
                for start in range(0, total, size)
            ]
        return out

    def of(self, ready: dict[Sweep, Sweep]) -> Sweep:
        """The same, of what its parts have become."""
        if not self.parts:
            return self
        return replace(self, parts=tuple((ready[made], v) for made, v in self.parts))


def cost(steps: Sequence[Step]) -> float:
    """What some steps take, for a choice by sizes alone: a byte that is written is worth a few flops."""
    return sum(s.flops + 4 * s.bytes for s in steps)


def with_steps(sweep: Sweep, new: dict[int, Step], gone: set[int]) -> Sweep:
    """The sweep with steps by value in place of those of the values ``gone``."""
    steps = [new.get(s.value, s) for s in sweep.steps if s.value in new or s.value not in gone]
    last = {v: s.value for s in steps for v in s.reads}
    frees: dict[int, list[int]] = {}
    for v, at in last.items():
        if v not in sweep.targets:
            frees.setdefault(at, []).append(v)
    steps = [replace(s, frees=tuple(frees.get(s.value, ()))) for s in steps]
    hidden = gone - set(new)
    return replace(
        sweep, steps=steps,
        layouts={v: layout for v, layout in sweep.layouts.items() if v not in hidden},
        inside=sweep.inside | {v: sweep.layouts[v] for v in hidden},
        flops=sum(s.flops for s in steps), bytes=sum(s.bytes for s in steps),
        alike=sweep.alike - hidden, items=None,
    )  # fmt: skip


def factors_of(sweep: Sweep) -> list[tuple[int, int | None]]:
    """(size, seed factor or None) of every factor of the seed's axes: seeds are numbered in their order."""
    found: list[tuple[int, int | None]] = []
    count = 0
    for a, axis in enumerate(sweep.layout.axes):
        for n, _ in axis:
            none = n == 1 or (sweep.summed and a == 0)
            found.append((n, None if none else count))
            count += not none
    return found


def simulate(graph: Graph, index: int, reverse: bool, summed: bool) -> Sweep:
    """The sweep of input ``index`` to all outputs (forward), or of output ``index`` to all inputs (reverse).

    ``summed``: the seeds are summed over the first axis of the seed, as for samples known not to mix.
    """
    seed = (graph.outputs if reverse else graph.inputs)[index]
    targets = list(graph.inputs if reverse else graph.outputs)
    return follow(graph, seed, reverse, targets, index=index, summed=summed)


def follow(
    graph: Graph,
    seed: int,
    reverse: bool,
    targets: list[int | None],
    *,
    index: int = 0,
    summed: bool = False,
    splits: dict[int, tuple[int, ...]] | None = None,
    colours: Colours | None = None,
    tables: dict[tuple[int, int], Table] | None = None,
) -> Sweep:
    """The sweep from an identity seed at one value to the values of ``targets``; ``index`` is kept with it.

    ``splits`` and ``colours`` are those of `Layout.identity`, ``tables`` those of the sweep.
    """
    shape = graph.values[seed].shape
    splits, colours, tables = dict(splits or {}), colours or {}, tables or {}
    while True:
        layout = Layout.identity(shape, splits, 0 if summed else None, colours)
        try:
            return from_blocks(
                graph, {seed: layout}, layout, reverse, targets,
                index=index, summed=summed, unit_seed=not colours, colours=colours, tables=tables,
            )  # fmt: skip
        except SplitSeed as split:
            at = refine(splits, shape, split, 0 if summed else None)
            more = len(split.sizes) - 1
            colours, tables = _shifted(colours, at, more), _shifted(tables, at, more)


def _shifted(
    of: dict[tuple[int, int], T], at: tuple[int, int], more: int
) -> dict[tuple[int, int], T]:
    """What belongs to factors (axis, number) of a seed, where the one ``at`` has become ``more`` than one."""
    axis, first = at
    return {(a, i + more if a == axis and i > first else i): t for (a, i), t in of.items()}


def follow_given(
    graph: Graph, seeds: list[int], columns: int, reverse: bool, targets: list[int | None]
) -> Sweep:
    """The sweep from blocks ``(columns, *value)`` that are given at the values ``seeds``.

    They have one seed factor in common and no ties: what reaches a target is the sum over all of them. No seed may
    lie on the way of another.
    """
    layouts = {
        v: Layout(tuple(((n, FREE),) for n in graph.values[v].shape), (columns,)) for v in seeds
    }
    layout = Layout((), (columns,))
    return from_blocks(graph, layouts, layout, reverse, targets, given=tuple(seeds))


def refine(splits, shape, split: SplitSeed, summed: int | None = None) -> tuple[int, int]:
    """Record that one seed factor must be split: of which axis, and which of its factors it was."""
    at = 0
    for a, size in enumerate(shape):
        if a == summed or size == 1:
            continue
        factors = splits.get(a, (size,))
        if at + len(factors) > split.factor:
            i = split.factor - at
            splits[a] = factors[:i] + split.sizes + factors[i + 1 :]
            return a, i
        at += len(factors)
    raise AssertionError("a seed factor belongs to no axis")


def relevant(graph: Graph, seeds, targets: list[int | None], reverse: bool) -> list[int]:
    """The values on a path between a seed and a target, in sweep order."""
    wanted = {t for t in targets if t is not None}
    values = graph.values
    up, down = bytearray(len(values)), bytearray(len(values))
    for v in seeds:
        (up if reverse else down)[v] = 1
    for v in wanted:
        (down if reverse else up)[v] = 1
    first, last = (0, max(seeds)) if reverse else (min(seeds), max(wanted, default=-1))
    for v in range(last, -1, -1):
        if up[v]:
            for s, _ in values[v].sources:
                up[s] = 1
    for v in range(first, last + 1):
        if not down[v] and any(down[s] for s, _ in values[v].sources):
            down[v] = 1
    found = [v for v in range(first, last + 1) if up[v] and down[v]]
    return found[::-1] if reverse else found


def from_blocks(
    graph: Graph,
    seeds: dict[int, Layout],
    layout: Layout,
    reverse: bool,
    targets: list[int | None],
    *,
    unit_seed: bool = False,
    **fields: Any,
) -> Sweep:
    """The sweep from blocks at the values ``seeds``, by their layouts; ``layout``: its own, whose seed is theirs.

    ``unit_seed``: the blocks are identities. ``fields``: others of `Sweep`, as they are.
    """
    values = graph.values
    order = relevant(graph, seeds, targets, reverse)
    # by value: lists take less than sets and dicts, in long graphs
    present = bytearray(len(values))
    for v in order:
        present[v] = 1
    last_use = [-1] * len(values)
    for v in order:
        for s, _ in values[v].sources:
            if present[s]:
                if not reverse:
                    last_use[s] = v
                elif not 0 <= last_use[v] < s:
                    last_use[v] = s
    frees: list[tuple[int, ...]] = [()] * len(values)
    keep = {t for t in targets if t is not None}
    for other in order:
        if last_use[other] >= 0 and other not in keep:
            frees[last_use[other]] += (other,)
    del last_use
    layouts: dict[int, Layout] = {}
    ones: set[int] = set()
    alike: set[int] = set()  # made of weights alone: the same for all samples, and computed once
    steps = []
    same: dict[Any, Any] = {}  # a map asks whether its layout is its route's
    for v, at in seeds.items():
        if present[v]:  # what a caller gives may be of any sample its own
            layouts[v] = same.setdefault(at, at)
            if unit_seed:
                ones.add(v)
            if at is layout:
                alike.add(v)
    known: dict[tuple, _Made] = {}  # long graphs repeat themselves

    def once(route: Route) -> Route:
        """The route, or an equal one that is there: steps that differ by an index have the same."""
        found = same.get(route)
        if found is None:
            mid, out = (same.setdefault(at, at) for at in (route.mid, route.out))
            found = same[route] = replace(route, mid=mid, out=out)
        return found

    incoming: dict[int, list[tuple[int, int, int]]] = {}  # by value, until its turn
    for v in order:
        into = incoming.pop(v, [])
        for e, (s, _) in enumerate(values[v].sources):
            if present[s]:
                if reverse:
                    incoming.setdefault(s, []).append((v, v, e))
                else:
                    into.append((s, v, e))
        if v in seeds:
            continue
        if len(into) > 1:  # what is put into zeros is added to what is there by then
            into.sort(key=lambda at: values[at[1]].sources[at[2]][1].places(reverse))
        key = values[v].dtype, *[
            (*_form(values[w], e), values[values[w].sources[e][0]].shape, layouts[u], u in ones, u in alike)
            for u, w, e in into
        ]  # fmt: skip
        made = known.get(key)
        if made is None:
            made = _made(values, v, into, layouts, ones, alike, reverse)
            at = same.setdefault(made.layout, made.layout)
            routes = [once(route) for route in made.routes]
            made = known[key] = made._replace(routes=routes, layout=at)
        routes, layouts[v], flops, written, shares, unit, same_for_all = made
        if unit:
            ones.add(v)
        if same_for_all:
            alike.add(v)
        terms = tuple([Term(*at, route) for at, route in zip(into, routes, strict=True)])
        steps.append(Step(v, terms, layouts[v], frees[v], flops, written, shares))
    return Sweep(
        reverse=reverse, seed=next(iter(seeds)), layout=layout, steps=steps, layouts=layouts,
        targets=[None if t is None or not present[t] else t for t in targets],
        flops=sum(s.flops for s in steps), bytes=sum(s.bytes for s in steps),
        alike=frozenset(alike),
        **fields,
    )  # fmt: skip


def _form(value: Value, e: int) -> tuple:
    """What determines an edge of a value but for the shape of its source."""
    edge = value.sources[e][1]
    return value.op, value.shape, edge.__class__, edge.key


class _Made(NamedTuple):
    """A step but for the values that it is of: alike where what leads to it is."""

    routes: list[Route]
    layout: Layout
    flops: float
    bytes: float
    shares: bool
    unit: bool
    """Whether the block is an identity, and"""
    alike: bool
    """whether it is the same for all samples."""


def _made(values: list[Value], v: int, incoming, layouts, ones, alike, reverse: bool) -> _Made:
    routes, meet, flops, written = [], None, 0.0, 0.0
    added: list[Route] = []
    itemsize = values[v].dtype.itemsize
    unit = alone = len(incoming) == 1
    for other, owner, e in incoming:
        source, edge = values[owner].sources[e]
        route = edge.route(layouts[other], values[source].shape, values[owner].shape, reverse)
        routes.append(route)
        meet = route.out if meet is None else meet.meet(route.out)
        # under an identity seed a scaling is its derivative, a contraction its matrix
        unit_there = other in ones
        free = unit_there and (edge.structure == "diagonal" or route.axis is not None)
        itself = len(routes) > 1 and edge.places(reverse)  # added where it belongs
        if not itself:
            added.append(route)
        if route.moves and not free:
            made = (route.mid if itself else route.out).numel
            if other in alike and edge.uniform:
                made //= prod(route.out.shape[a] for a in route.out.tied_axes)
            flops += route.work * made
            written += made * itemsize
        shares = alone and (not route.moves or (unit_there and route.axis is not None))
        unit = unit and unit_there and not route.moves and not route.out.free
    if not alone:
        summed, copied = _added(added, meet)
        flops += summed
        written += copied * itemsize
    same = alone and other in alike and edge.uniform
    return _Made(routes, meet, flops, written, shares, unit, same)


def _added(routes: list[Route], total: Layout) -> tuple[int, int]:
    """Elements that a sum of terms adds, and writes: terms with more ties than it has are added where they are."""
    if not routes:
        return 0, 0
    whole = [r.moves for r in routes if r.out.tied == total.tied]
    parts = sum(r.out.numel for r in routes if r.out.tied != total.tied)
    made = len(whole) - 1 if whole else 1  # zeros
    if parts and whole == [False]:
        made += 1  # a copy, to be written to
    return len(whole) * total.numel + parts, made * total.numel + parts
