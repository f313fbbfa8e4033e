"""A sweep: the steps that accumulate a Jacobian from one seed, found by following layouts through the graph.

The seed is the identity at one value: at an input or a cut (forward mode: its columns), at an output or a cut (reverse
mode: its rows). Or blocks of tangents or cotangents are given, at several values at once. Pure: it reads layouts and
map structures, and holds no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from ..maps.layout import FREE, Colours, Layout, Selection, SplitSeed
from ..maps.linear_map import Route
from ..read.graph import Graph, Value

_SCALING = "diagonal", "scalar", "complex diagonal"

if TYPE_CHECKING:
    from .patches import ReceptiveField
    from .pattern import Pattern


@dataclass(frozen=True, slots=True)
class Term:
    """One contribution to a step: the block of ``other``, through edge ``edge`` of value ``owner``."""

    other: int
    owner: int
    edge: int
    route: Route


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
    """Seeds that run as one, in a factor of the seed (see `pattern`)."""
    patterns: dict[int, Pattern] = field(default_factory=dict)
    """By target: the entries that are computed, where that is not the whole block."""
    windows: dict[int, ReceptiveField] = field(default_factory=dict)
    """By value: where its block has the pixels of, if the sweep runs by `patches`."""
    chunks: dict[int, int] = field(default_factory=dict)
    peak: float = 0.0
    items: list | None = None
    why: str = ""
    """Why its blocks are images or patches, where they could be either."""
    alone: bool = False
    """Whether it is the only stage of its plan: a derivative that all chunks share is then used once."""
    given: tuple[int, ...] = ()
    """The values whose blocks are given, if the seed is not an identity; ``seed`` is the first of them."""
    alike: frozenset[int] = frozenset()
    """The values whose blocks are made of weights alone, the same for all samples."""

    @property
    def direction(self) -> str:
        """As profilers and tables name it."""
        return "reverse" if self.reverse else "forward"

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
) -> Sweep:
    """The sweep from an identity seed at one value to the values of ``targets``; ``index`` is kept with it.

    ``splits`` and ``colours`` are those of `Layout.identity`.
    """
    shape = graph.values[seed].shape
    splits = dict(splits or {})
    while True:
        layout = Layout.identity(shape, splits, 0 if summed else None, colours)
        try:
            return from_blocks(
                graph, {seed: layout}, layout, reverse, targets,
                index=index, summed=summed, unit_seed=not colours, colours=colours or {},
            )  # fmt: skip
        except SplitSeed as split:
            refine(splits, shape, split, 0 if summed else None)


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


def refine(splits, shape, split: SplitSeed, summed: int | None = None) -> None:
    """Record that one seed factor must be split, in the axis that it belongs to."""
    at = 0
    for a, size in enumerate(shape):
        if a == summed or size == 1:
            continue
        factors = splits.get(a, (size,))
        if at + len(factors) > split.factor:
            i = split.factor - at
            splits[a] = factors[:i] + split.sizes + factors[i + 1 :]
            return
        at += len(factors)
    raise AssertionError("a seed factor belongs to no axis")


def relevant(graph: Graph, seeds, targets: list[int | None], reverse: bool) -> list[int]:
    """The values on a path between a seed and a target, in sweep order."""
    wanted = {t for t in targets if t is not None}
    values = graph.values
    if reverse:
        first = max(seeds)
        up = set(seeds)
        for v in range(first, -1, -1):
            if v in up:
                up.update(s for s, _ in values[v].sources)
        down = set(wanted)
        for v in range(first + 1):
            if v not in down and any(s in down for s, _ in values[v].sources):
                down.add(v)
        return [v for v in range(first, -1, -1) if v in up and v in down]
    up = set()
    first, last = min(seeds), max(wanted, default=-1)
    for v in range(last, -1, -1):
        if v in up or v in wanted:
            up.add(v)
            up.update(s for s, _ in values[v].sources)
    down = set(seeds)
    for v in range(first + 1, last + 1):
        if any(s in down for s, _ in values[v].sources):
            down.add(v)
    return [v for v in range(first, last + 1) if v in up and v in down]


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
    present = set(order)
    incoming: dict[int, list[tuple[int, int, int]]] = {v: [] for v in order}
    for v in order:
        for e, (s, _) in enumerate(values[v].sources):
            if s in present:
                if reverse:
                    incoming[s].append((v, v, e))
                else:
                    incoming[v].append((s, v, e))
    last_use: dict[int, int] = {}
    for v in order:
        for other, _, _ in incoming[v]:
            last_use[other] = v
    frees: dict[int, list[int]] = {}
    keep = {t for t in targets if t is not None}
    for other, v in last_use.items():
        if other not in keep:
            frees.setdefault(v, []).append(other)
    layouts: dict[int, Layout] = {}
    ones: dict[int, bool] = {}
    alike: dict[
        int, bool
    ] = {}  # made of weights alone: the same for all samples, and computed once
    steps = []
    for v, at in seeds.items():
        if v in present:  # what a caller gives may be of any sample its own
            layouts[v], ones[v], alike[v] = at, unit_seed, at is layout
    known: dict[tuple, _Made] = {}  # long graphs repeat themselves
    same = {at: at for at in layouts.values()}  # a map asks whether its layout is that of its route
    for v in order:
        if v in seeds:
            continue
        into = incoming[v]
        key = values[v].dtype, *[
            (*_form(values[w], e), values[values[w].sources[e][0]].shape, layouts[u], ones[u], alike[u])
            for u, w, e in into
        ]  # fmt: skip
        made = known.get(key)
        if made is None:
            made = _made(values, v, into, layouts, ones, alike, reverse)
            at = same.setdefault(made.layout, made.layout)
            made = known[key] = made._replace(layout=at)
        routes, layouts[v], flops, written, shares, ones[v], alike[v] = made
        terms = tuple([Term(*at, route) for at, route in zip(into, routes, strict=True)])
        steps.append(Step(v, terms, layouts[v], tuple(frees.get(v, ())), flops, written, shares))
    return Sweep(
        reverse=reverse, seed=next(iter(seeds)), layout=layout, steps=steps, layouts=layouts,
        targets=[t if t in present else None for t in targets],
        flops=sum(s.flops for s in steps), bytes=sum(s.bytes for s in steps),
        alike=frozenset(v for v, same in alike.items() if same),
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
    routes, meet, flops, written, sums = [], None, 0.0, 0.0, 0
    itemsize = values[v].dtype.itemsize
    unit = alone = len(incoming) == 1
    for other, owner, e in incoming:
        source, edge = values[owner].sources[e]
        route = edge.route(layouts[other], values[source].shape, values[owner].shape, reverse)
        routes.append(route)
        meet = route.out if meet is None else meet.meet(route.out)
        # under an identity seed a scaling is its derivative, a contraction its matrix
        free = ones[other] and (edge.structure == "diagonal" or route.axis is not None)
        itself = len(routes) > 1 and edge.places(reverse)  # added where it belongs
        sums += len(routes) > 1 and not itself
        if route.moves and not free:
            made = (route.mid if itself else route.out).numel
            if alike[other] and edge.uniform:
                made //= prod(route.out.shape[a] for a in route.out.tied_axes)
            flops += route.work * made
            written += made * itemsize
        shares = alone and (not route.moves or (ones[other] and route.axis is not None))
        unit = unit and ones[other] and not route.moves and not route.out.free
    if sums:
        flops += meet.numel * sums
        written += meet.numel * itemsize
    same = alone and alike[other] and edge.uniform
    return _Made(routes, meet, flops, written, shares, unit, same)


def peak_bytes(graph: Graph, sweep: Sweep, chunks: dict[int, int]) -> float:
    """Predicted bytes of live blocks at the worst step, with the largest chunk of ``chunks`` in flight."""
    sel = {f: (0, c) for f, c in chunks.items()}

    # a view shares its source's memory: blocks are counted by the value that owns the memory
    nobody = -1
    root: dict[int, int] = dict.fromkeys(sweep.given or (sweep.seed,), nobody)
    users: dict[int, int] = {}
    size: dict[int, float] = {}

    def scales(step: Step) -> bool:
        first = step.terms[0]
        edge = graph.values[first.owner].sources[first.edge][1]
        return len(step.terms) == 1 and edge.structure in _SCALING

    def derivative(step: Step) -> float:
        return prod(step.layout.shape) * graph.values[step.value].dtype.itemsize

    def repeated(step: Step) -> bool:
        """Whether every chunk runs the step, and so needs its derivative."""
        return bool(chunks) and not step.layout.tied.issuperset(chunks)

    # derivatives are kept for later chunks, which find all of them there from the start
    live = sum(derivative(s) for s in sweep.steps if scales(s) and repeated(s))
    worst = 0.0
    turned: set[int] = set()  # blocks in channels-last memory, which a CPU's convolutions run in
    targets = {t for t in sweep.targets if t is not None}
    for step in sweep.steps:
        first = step.terms[0]
        edge = graph.values[first.owner].sources[first.edge][1]
        behind = root[first.other]
        scaling = scales(step)
        stored = sweep.stored(graph, step.value, sel)
        # a block that is used for the last time, and by nobody else, is scaled in place, if it is not expanded
        last = scaling and first.other in step.frees and users.get(behind) == 1
        reused = last and size[behind] >= stored
        extra = 0.0
        if step.shares or reused:
            root[step.value] = behind if reused or not first.route.moves else nobody
        else:
            root[step.value] = step.value
            size[step.value] = stored
            live += stored
            if len(step.terms) > 1 or edge.structure == "opaque":
                extra = size[step.value]
        if edge.structure == "half complex function":  # copies of half a spectrum
            read = first.route.mid.numel_of(sel) * graph.values[first.other].dtype.itemsize
            extra += 3 * max(stored, read)
        if edge.structure == "convolution" and graph.values[step.value].device.type == "cpu":
            if first.other not in turned:
                read = graph.values[first.other].dtype.itemsize
                extra += first.route.mid.numel_of(sel) * read
            if step.layout.shape[1] > 1 and (sweep.reverse or first.route.mid.shape[1] > 1):
                turned.add(step.value)
        elif scaling and first.other in turned:
            turned.add(step.value)
        if scaling and step.flops and not repeated(step):  # with no flops, it is the block itself
            extra += derivative(step)
            if not sweep.alone:
                live += derivative(step)
                extra -= derivative(step)
        here = root[step.value]
        if here != nobody:
            users[here] = users.get(here, 0) + 1
        worst = max(worst, live + extra)
        for f in step.frees:
            r = root.get(f, nobody)
            if r == nobody or f in targets:
                continue
            users[r] -= 1
            if users[r] == 0:
                live -= size[r]
    return worst


def sample_ties(sweep: Sweep, layout: Layout, graph: Graph) -> bool:
    """Whether the first axis of a block's value is tied to the first axis of the seed, whole."""
    if not layout.axes or not sweep.layout.axes:
        return False
    n = graph.values[sweep.seed].shape[0]
    if n == 1:
        return layout.shape[0] == 1
    own = sweep.layout.axes[0]
    return layout.axes[0] == own


def untied_targets(graph: Graph, sweep: Sweep) -> list[int]:
    """The values at the end of a sweep whose samples are not tied to those of the seed."""
    return [
        t
        for t in sweep.targets
        if t is not None and not sample_ties(sweep, sweep.layouts[t], graph)
    ]


def mixing_steps(graph: Graph, sweep: Sweep, target: int) -> list[int]:
    """The values (in sweep order) at whose op the samples' tie is lost, of all that lead to ``target``."""
    batch = {t for _, t in sweep.layout.axes[0]}
    by_value = {s.value: s for s in sweep.steps}
    leads, stack = set(), [target]
    while stack:
        v = stack.pop()
        if v not in leads:
            leads.add(v)
            stack.extend(t.other for t in (by_value[v].terms if v in by_value else ()))
    lost = []
    for step in sweep.steps:
        if step.value in leads:
            for t in step.terms:
                had = batch <= sweep.layouts[t.other].tied
                if had and not (batch <= t.route.out.tied):
                    lost.append(t.owner)
    # a tie can also survive on another axis (a transposed batch): then the last op is named
    return lost or [by_value[target].terms[0].owner if target in by_value else target]
