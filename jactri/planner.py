"""Graph + sizes + byte budget -> Plan. Pure: it reads layouts and map structures, and holds no tensor.

A *sweep* accumulates the Jacobian with respect to one seed: an input (forward mode) or an output (reverse
mode). The planner follows the layout of every block through the sweep, counts its flops and bytes, and decides
the direction and how many seeds run at once. The executor runs exactly what is planned here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, prod

from .graph import Graph
from .layout import Layout, Selection, SplitSeed
from .linear_map import Route

CACHE_BYTES = 1 << 22
"""On a CPU, chunks of seeds are chosen so that the largest block has about this size (it stays in cache)."""

USABLE = 0.85
"""The part of a memory limit that is planned for; the rest is for what is not predicted (scratch, padding)."""

RATES = {"cpu": (1e11, 1e10, 4e-6), "cuda": (5e13, 2e12, 8e-6)}
"""Rough flops a second, bytes a second and seconds a step, by device type: they only rank alternatives."""


class MemoryLimitTooSmall(ValueError):
    """One seed alone needs more than the memory limit allows."""


@dataclass(frozen=True)
class Term:
    """One contribution to a step: the block of ``other``, through edge ``edge`` of value ``owner``."""

    other: int
    owner: int
    edge: int
    route: Route


@dataclass(frozen=True)
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


@dataclass
class Sweep:
    """All steps for one seed. ``targets`` are the values whose blocks are the answer.

    ``items`` are the same steps as kernels run them (see `fusion`), filled in where kernels run.
    """

    reverse: bool
    index: int
    seed: int
    layout: Layout
    steps: list[Step]
    layouts: dict[int, Layout]
    targets: list[int | None]
    summed: bool = False
    chunks: dict[int, int] = field(default_factory=dict)
    peak: float = 0.0
    items: list | None = None

    @property
    def flops(self) -> float:
        return sum(s.flops for s in self.steps)

    @property
    def bytes(self) -> float:
        return sum(s.bytes for s in self.steps)

    def columns(self) -> int:
        """The most seeds that any block carries."""
        return max((lay.columns() for lay in self.layouts.values()), default=1)

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


@dataclass
class Plan:
    """What the executor runs: sweeps in one direction, over inputs (forward) or outputs (reverse)."""

    reverse: bool
    sweeps: list[Sweep]
    reason: str
    seconds: dict[str, float]
    """Predicted time of each direction that was compared."""
    tied: bool
    """Whether the samples of every answer stay tied to the seed's: they do not mix."""

    @property
    def flops(self) -> float:
        return sum(s.flops for s in self.sweeps)

    @property
    def bytes(self) -> float:
        return sum(s.bytes for s in self.sweeps)

    @property
    def peak(self) -> float:
        return max((s.peak for s in self.sweeps), default=0.0)


def itemsize(graph: Graph, value: int) -> int:
    return graph.values[value].dtype.itemsize


def simulate(graph: Graph, index: int, reverse: bool, summed: bool) -> Sweep:
    """The sweep of input ``index`` (forward) or output ``index`` (reverse).

    ``summed``: the seeds are summed over the first axis of the seed, as for samples known not to mix.
    """
    seed = (graph.outputs if reverse else graph.inputs)[index]
    shape = graph.values[seed].shape
    splits: dict[int, tuple[int, ...]] = {}
    while True:
        layout = Layout.identity(shape, splits, 0 if summed else None)
        try:
            return _follow(graph, index, seed, layout, reverse, summed)
        except SplitSeed as split:
            _refine(splits, shape, split, 0 if summed else None)


def _refine(splits, shape, split: SplitSeed, summed: int | None) -> None:
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


def _relevant(graph: Graph, seed: int, targets: list[int | None], reverse: bool) -> list[int]:
    """The values on a path between the seed and a target, in sweep order, the seed first."""
    wanted = {t for t in targets if t is not None}
    values = graph.values
    if reverse:
        up = {seed}
        for v in range(seed, -1, -1):
            if v in up:
                up.update(s for s, _ in values[v].sources)
        down = set(wanted)
        for v in range(seed + 1):
            if v not in down and any(s in down for s, _ in values[v].sources):
                down.add(v)
        return [v for v in range(seed, -1, -1) if v in up and v in down]
    up = set()
    last = max(wanted, default=-1)
    for v in range(last, -1, -1):
        if v in up or v in wanted:
            up.add(v)
            up.update(s for s, _ in values[v].sources)
    down = {seed}
    for v in range(seed + 1, last + 1):
        if any(s in down for s, _ in values[v].sources):
            down.add(v)
    return [v for v in range(seed, last + 1) if v in up and v in down]


def _follow(graph, index, seed, layout, reverse, summed) -> Sweep:
    values = graph.values
    targets = list(graph.inputs if reverse else graph.outputs)
    order = _relevant(graph, seed, targets, reverse)
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
    steps = []
    if seed in present:
        layouts[seed], ones[seed] = layout, True
    for v in order:
        if v == seed:
            continue
        terms, meet, flops, written, sums = [], None, 0.0, 0.0, 0
        unit = len(incoming[v]) == 1
        for other, owner, e in incoming[v]:
            source, edge = values[owner].sources[e]
            at = layouts[other]
            route = edge.route(at, values[source].shape, values[owner].shape, reverse)
            terms.append(Term(other, owner, e, route))
            meet = route.out if meet is None else meet.meet(route.out)
            # under an identity seed a scaling is its derivative, a contraction its matrix
            free = ones[other] and (edge.structure == "diagonal" or route.axis is not None)
            itself = len(terms) > 1 and edge.places(reverse)  # added where it belongs
            sums += len(terms) > 1 and not itself
            if route.moves and not free:
                made = (route.mid if itself else route.out).numel()
                flops += route.work * made
                written += made * values[v].dtype.itemsize
            shares = not route.moves or (ones[other] and route.axis is not None)
            unit = unit and ones[other] and not route.moves and not route.out.free
        if sums:
            flops += meet.numel() * sums
            written += meet.numel() * values[v].dtype.itemsize
        layouts[v], ones[v] = meet, unit
        shares = shares and len(terms) == 1
        steps.append(Step(v, tuple(terms), meet, tuple(frees.get(v, ())), flops, written, shares))
    return Sweep(
        reverse,
        index,
        seed,
        layout,
        steps,
        layouts,
        [t if t in present else None for t in targets],
        summed,
    )


def peak_bytes(graph: Graph, sweep: Sweep, chunks: dict[int, int]) -> float:
    """Predicted bytes of live blocks at the worst step, with the largest chunk of ``chunks`` in flight."""
    sel = {f: (0, c) for f, c in chunks.items()}

    def held(layout: Layout) -> int:
        return layout.numel(sel)

    # a view shares its source's memory: blocks are counted by the value that owns the memory
    nobody = -1
    root: dict[int, int] = {sweep.seed: nobody}
    users: dict[int, int] = {}
    size: dict[int, float] = {}
    live = worst = 0.0
    targets = {t for t in sweep.targets if t is not None}
    for step in sweep.steps:
        first = step.terms[0]
        edge = graph.values[first.owner].sources[first.edge][1]
        behind = root[first.other]
        scaling = len(step.terms) == 1 and edge.structure in ("diagonal", "scalar")
        # a block that is used for the last time, and by nobody else, is scaled in place
        reused = scaling and first.other in step.frees and users.get(behind) == 1
        extra = 0.0
        if step.shares or reused:
            root[step.value] = behind if reused or not first.route.moves else nobody
        else:
            root[step.value] = step.value
            size[step.value] = held(step.layout) * itemsize(graph, step.value)
            live += size[step.value]
            if len(step.terms) > 1 or edge.structure == "opaque":
                extra = size[step.value]
        if scaling:  # the derivative itself stays for other chunks
            live += prod(step.layout.shape) * itemsize(graph, step.value)
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


def choose_chunks(
    graph: Graph, sweep: Sweep, limit: float, chunk_size: int | None, device: str
) -> dict[int, int]:
    """How many indices of each free seed factor to run at once.

    The last factors stay whole as long as possible. The seeds at once are at most ``chunk_size``; else as many
    as keep the predicted peak under ``limit`` bytes and, on a CPU, the largest block near `CACHE_BYTES`.
    Raises MemoryLimitTooSmall if one seed alone needs more than ``limit``.
    """
    freed = set()
    for lay in sweep.layouts.values():
        freed.update(lay.free)
    factors = sorted(freed)
    sizes = [sweep.layout.seed[f] for f in factors]
    total = prod(sizes)

    def cut(count: int) -> dict[int, int]:
        chunks, room = {}, max(1, count)
        for f, n in reversed(list(zip(factors, sizes, strict=True))):
            take = min(n, room)
            take = ceil(n / ceil(n / take))  # equal chunks
            room = max(1, room // n)
            if take < n:
                chunks[f] = take
        return chunks

    if total <= 1:
        return {}
    if chunk_size is not None:
        return cut(chunk_size) if chunk_size < total else {}
    widest = max(
        (lay.numel() / total * itemsize(graph, v) for v, lay in sweep.layouts.items()), default=0.0
    )
    count = total
    ends = sum(
        sweep.layouts[t].numel() * itemsize(graph, t) for t in sweep.targets if t is not None
    )
    # a block that is written once and not read again gains nothing from a cache
    if device == "cpu" and widest * total > 1.5 * CACHE_BYTES and sweep.bytes > 1.5 * ends:
        count = max(1, int(CACHE_BYTES // max(widest, 1)))
    chunks = cut(count) if count < total else {}
    limit *= USABLE
    while peak_bytes(graph, sweep, chunks) > limit:
        if count <= 1:
            need = int(peak_bytes(graph, sweep, cut(1)) / USABLE) + 1
            limit /= USABLE
            raise MemoryLimitTooSmall(
                f"memory_limit leaves {int(limit)} bytes for the sweep, and one seed at a time needs {need}; "
                f"pass at least {need - int(limit)} bytes more"
            )
        count = max(1, count // 2)
        chunks = cut(count)
    return chunks


def seconds(sweeps: list[Sweep], device: str) -> float:
    """Predicted time, for ranking directions only."""
    flops, bandwidth, call = RATES.get(device, RATES["cpu"])
    return sum(s.flops / flops + 2 * s.bytes / bandwidth + call * len(s.steps) for s in sweeps)


def directions(graph: Graph, summed: bool) -> dict[str, list[Sweep]]:
    """The sweeps of both directions, with no chunks yet."""
    ins = [i for i, v in enumerate(graph.inputs) if v is not None]
    outs = [j for j, v in enumerate(graph.outputs) if v is not None]
    return {
        "reverse-mode": [simulate(graph, j, True, summed) for j in outs],
        "forward-mode": [simulate(graph, i, False, summed) for i in ins],
    }


def make_plan(
    graph: Graph,
    strategy: str = "auto",
    summed: bool = False,
    limit: float = float("inf"),
    chunk_size: int | None = None,
    device: str = "cpu",
) -> Plan:
    """Choose a direction (the cheaper prediction under "auto") and the chunks of every sweep."""
    if strategy == "auto":
        both = directions(graph, summed)
        cost = {name: seconds(sweeps, device) for name, sweeps in both.items()}
        chosen = min(cost, key=cost.get)
        sweeps, reason = both[chosen], f"predicted {_compare(cost, chosen)}"
    else:
        reverse = strategy == "reverse-mode"
        ends = graph.outputs if reverse else graph.inputs
        sweeps = [simulate(graph, i, reverse, summed) for i, v in enumerate(ends) if v is not None]
        cost, chosen, reason = {strategy: seconds(sweeps, device)}, strategy, "asked for"
    for sweep in sweeps:
        sweep.chunks = choose_chunks(graph, sweep, limit, chunk_size, device)
        sweep.peak = peak_bytes(graph, sweep, sweep.chunks)
    tied = not any(untied_targets(graph, sweep) for sweep in sweeps)
    return Plan(chosen == "reverse-mode", sweeps, reason, cost, tied)


def _compare(cost: dict[str, float], chosen: str) -> str:
    other = next((n for n in cost if n != chosen), chosen)
    return f"{cost[chosen] * 1e3:.3g} ms against {cost[other] * 1e3:.3g} ms for {other}"


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
