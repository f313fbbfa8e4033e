"""Graph + sizes + byte budget -> Plan. Pure: it holds no tensor.

The planner counts flops and bytes of the sweeps (see `sweep`) in both directions and, where the graph has a
bottleneck, of products of partial Jacobians that meet there (see `mixed`), takes the cheapest, and decides how many
seeds run at once. The executor runs exactly what is planned here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil, prod

from . import mixed
from .graph import Graph
from .rates import Rates, rough
from .sweep import Sweep, itemsize, peak_bytes, simulate, untied_targets

CACHE_BYTES = 1 << 22
"""On a CPU, chunks of seeds are chosen so that the largest block has about this size (it stays in cache)."""

USABLE = 0.85
"""The part of a memory limit that is planned for; the rest is for what is not predicted (scratch, padding)."""


class MemoryLimitTooSmall(ValueError):
    """One seed alone needs more than the memory limit allows."""


@dataclass
class Plan:
    """What the executor runs: sweeps in one direction, over inputs (forward) or outputs (reverse).

    In mixed mode the sweeps are products, one an output (see `mixed.Join`), of the ``parts``, which run before them.
    """

    strategy: str
    reverse: bool
    sweeps: list[Sweep]
    reason: str
    seconds: dict[str, float]
    """Predicted time of each way that was compared."""
    tied: bool
    """Whether the samples of every answer stay tied to the seed's: they do not mix."""
    parts: list[Sweep] = field(default_factory=list)

    @property
    def flops(self) -> float:
        return sum(s.flops for s in (*self.parts, *self.sweeps))

    @property
    def bytes(self) -> float:
        return sum(s.bytes for s in (*self.parts, *self.sweeps))

    @property
    def peak(self) -> float:
        return max((s.peak for s in (*self.parts, *self.sweeps)), default=0.0)


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


def seconds(sweeps: list[Sweep], rates: Rates) -> float:
    """Predicted time, for ranking plans only."""
    flops, moved, steps = (
        sum(s.flops for s in sweeps), sum(s.bytes for s in sweeps), sum(len(s.steps) or 1 for s in sweeps),
    )  # fmt: skip
    return flops / rates.flops + 2 * moved / rates.bandwidth + rates.step * steps


def _direction(graph: Graph, reverse: bool, summed: bool) -> list[Sweep]:
    """The sweeps of one direction, with no chunks yet."""
    ends = graph.outputs if reverse else graph.inputs
    return [simulate(graph, i, reverse, summed) for i, v in enumerate(ends) if v is not None]


def make_plan(
    graph: Graph,
    strategy: str = "auto",
    summed: bool = False,
    limit: float = float("inf"),
    chunk_size: int | None = None,
    device: str = "cpu",
    rates: Rates | None = None,
) -> Plan:
    """Choose the order of accumulation (the cheapest prediction under "auto") and the chunks of every sweep.

    "auto" compares forward, reverse and, where the graph has a cut narrower than both ends, mixed mode; samples that
    are only known by a probe not to mix (``summed``) are not followed through cuts.
    """
    rates = rates or rough(device)
    ways: dict[str, list[Sweep]] = {}
    if strategy in ("auto", "reverse-mode"):
        ways["reverse-mode"] = _direction(graph, True, summed)
    if strategy in ("auto", "forward-mode"):
        ways["forward-mode"] = _direction(graph, False, summed)
    cost = {name: seconds(sweeps, rates) for name, sweeps in ways.items()}
    table = None
    if not summed and all(ways.values()):
        table = _meeting(graph, strategy, rates)
    if table is not None:
        cost["mixed"] = table.seconds
    for chosen in sorted(cost, key=cost.get):
        parts, sweeps = _stages(graph, table) if chosen == "mixed" else ([], ways[chosen])
        if chosen == "mixed" and ways and _untied(graph, sweeps):
            continue  # a proof that samples do not mix, which a direction may have, is worth more
        try:
            _cut(graph, parts, sweeps, limit, chunk_size, device)
        except MemoryLimitTooSmall as error:
            refused = error
            continue
        break
    else:
        raise refused
    reason = "asked for" if strategy != "auto" else "predicted " + _compare(cost, chosen)
    if chosen == "mixed":
        reason += f", {table.name}"
    return Plan(
        chosen, chosen != "forward-mode", sweeps, reason, cost, not _untied(graph, sweeps), parts
    )


def _cut(graph: Graph, parts, sweeps, limit: float, chunk_size: int | None, device: str) -> None:
    """Choose the chunks of all stages, and predict their peaks: what parts leave stays until the end."""
    held = 0.0
    for part in parts:
        part.chunks = choose_chunks(graph, part, limit - held, None, device)
        part.peak = held + peak_bytes(graph, part, part.chunks)
        held += sum(part.layouts[t].numel() * itemsize(graph, t) for t in {*part.targets} - {None})
    for sweep in sweeps:
        sweep.chunks = choose_chunks(graph, sweep, limit - held, chunk_size, device)
        sweep.peak = held + peak_bytes(graph, sweep, sweep.chunks)


def _untied(graph: Graph, sweeps: list[Sweep]) -> bool:
    return any(untied_targets(graph, sweep) for sweep in sweeps)


def _meeting(graph: Graph, strategy: str, rates: Rates) -> mixed.Table | None:
    """The cheapest mixed plan, or None where none is worth a look."""
    if strategy == "mixed":
        return mixed.best(graph, mixed.cuts(graph), lambda s: seconds([s], rates), joined=True)
    at = mixed.narrow_cuts(graph) if strategy == "auto" else []
    if not at:
        return None
    table = mixed.best(graph, at, lambda s: seconds([s], rates))
    return table if isinstance(table.makes[-1], mixed.Join) else None


def _stages(graph: Graph, table: mixed.Table) -> tuple[list[Sweep], list[Sweep]]:
    """The parts of a mixed plan, and the products that are the answers: one for each output."""
    last: dict[int, mixed.Join] = {target: p.made for (target, _), p in table.pieces.items()}
    ends = {id(m) for m in last.values()}
    parts = [m for m in table.makes if id(m) not in ends]
    sweeps = []
    for j, v in enumerate(graph.outputs):
        if v in last:
            join = last[v]
            targets = [i if i in join.first else None for i in graph.inputs]
            sweeps.append(replace(join, index=j, targets=targets))
    return parts, sweeps


def _compare(cost: dict[str, float], chosen: str) -> str:
    others = [f"{t * 1e3:.3g} ms for {n}" for n, t in cost.items() if n != chosen]
    return f"{cost[chosen] * 1e3:.3g} ms against " + " and ".join(others)
