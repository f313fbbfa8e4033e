"""Graph + sizes + byte budget -> Plan. Pure: it holds no tensor.

The planner counts flops and bytes of the sweeps (see `sweep`) in both directions and, where the graph has a
bottleneck, of products of partial Jacobians that meet there (see `mixed`), takes the cheapest, and decides how many
seeds run at once. The executor runs exactly what is planned here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil, inf, prod
from typing import NamedTuple

from ..base.memory import MemoryLimitTooSmall
from ..base.rates import Rates, rough
from ..maps.layout import FREE
from ..read.graph import Graph
from . import mixed, patches, patching, poles
from . import sweep as sweeping
from .fusion import fuse, fused
from .pattern import Trace, colours_of, has_windows, pattern_of
from .sweep import Sweep, follow, follow_given, simulate, untied_targets

CACHE_BYTES = 1 << 22
"""On a CPU, chunks of seeds are chosen so that the largest block has about this size (it stays in cache)."""

INDEX_BYTES = 48
"""What the place of an entry takes while it is looked up."""

SLACK = 0.15
"""The part of the predicted peak of blocks that stays free beside it, for what is not predicted (scratch, padding)."""


@dataclass(frozen=True, eq=False)
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
    peak: float
    """Predicted bytes of the stage that takes the most."""
    parts: list[Sweep] = field(default_factory=list)
    suspects: tuple[tuple[int, int], ...] = ()
    """The edges that must be finite for any other order than reverse (see `poles`)."""

    @property
    def signature(self) -> list:
        """What decides which chunk comes when."""
        return [
            self.strategy,
            [[s.index, sorted(s.chunks.items()), bool(s.patterns)] for s in self.sweeps],
        ]

    @property
    def flops(self) -> float:
        return sum(s.flops for s in (*self.parts, *self.sweeps))

    @property
    def bytes(self) -> float:
        return sum(s.bytes for s in (*self.parts, *self.sweeps))


def choose_chunks(
    graph: Graph,
    sweep: Sweep,
    limit: float,
    *,
    chunk_size: int | None,
    device: str,
    answer: Asked | None = None,
) -> tuple[dict[int, int], float]:
    """How many indices of each free seed factor to run at once, and the bytes that the sweep then takes (see `needs`).

    The last factors stay whole as long as possible. The seeds at once are at most ``chunk_size``; else as many
    as keep what it needs under ``limit`` bytes and, on a CPU, the largest block near `CACHE_BYTES`.
    Raises MemoryLimitTooSmall if one seed alone needs more than ``limit``.
    """
    freed: set[int] = set()
    for lay in sweep.layouts.values():
        freed.update(lay.free)
    factors = sorted(freed)
    sizes = [sweep.layout.seed[f] for f in factors]
    total = prod(sizes)

    def cut(count: int) -> dict[int, int]:
        return cut_seeds(factors, sizes, count)

    count = total
    if total > 1 and not sweep.windows:
        if chunk_size is not None:
            chunks = cut(chunk_size) if chunk_size < total else {}
            return chunks, needs(graph, sweep, chunks, answer)[0]
        largest = sweep.largest(graph)
        # a block that is written once and not read again gains nothing from a cache
        cached = device == "cpu" and largest > 1.5 * CACHE_BYTES
        if cached and sweep.bytes > 1.5 * sweep.ends(graph):
            some = max(1, int(CACHE_BYTES // max(largest / total, 1)))
            if ceil(total / some) * _weights(graph, sweep) < sweep.bytes:
                count = some
    chunks = cut(count) if count < total else {}
    while True:
        taken, need = needs(graph, sweep, chunks, answer)
        if need <= limit:
            return chunks, taken
        if count <= 1 or sweep.windows:
            raise _refused(need, limit)
        count = max(1, count // 2)
        chunks = cut(count)


def cut_seeds(factors: list[int], sizes: list[int], count: int) -> dict[int, int]:
    """At most ``count`` indices at once of seed factors, in equal chunks; the last factors stay whole if they can."""
    chunks, room = {}, max(1, count)
    for f, n in reversed(list(zip(factors, sizes, strict=True))):
        take = min(n, room)
        take = ceil(n / ceil(n / take))
        room = max(1, room // n)
        if take < n:
            chunks[f] = take
    return chunks


def _weights(graph: Graph, sweep: Sweep) -> float:
    """Bytes of the weights that every chunk reads."""
    return float(
        sum(
            graph.values[t.owner].sources[t.edge][1].entries * graph.values[s.value].dtype.itemsize
            for s in sweep.steps
            for t in s.terms
        )
    )


def _refused(need: float, limit: float) -> MemoryLimitTooSmall:
    return MemoryLimitTooSmall(f"one seed at a time takes {need:.0f} bytes of {limit:.0f}", need)


class Asked(NamedTuple):
    """The form of the answer: one block a sample or the whole, and whether the caller gives the memory for it."""

    per_sample: bool | str
    given: bool
    sparse: bool = False
    kernels: str = ""
    """The backend by which kernels run the seed's blocks: "auto", "triton" where they are asked for, or none."""
    fused: bool = False
    """Whether kernels run blocks of other dtypes than the seed's, if not these."""


def peak_bytes(graph: Graph, sweep: Sweep, chunks: dict[int, int]) -> float:
    """Predicted bytes of live blocks at the worst moment of a sweep or product."""
    if isinstance(sweep, mixed.Join):
        return sweep.peak_bytes(chunks)
    if sweep.windows:
        return patches.peak_bytes(graph, sweep)
    return sweeping.peak_bytes(graph, sweep, chunks)


def answer_bytes(graph: Graph, sweep: Sweep, target: int, per_sample: bool | str) -> float:
    """Bytes of the Jacobian between the seed of a sweep and a target."""
    seed, value = graph.values[sweep.seed].shape, graph.values[target].shape
    numel = prod(seed) * prod(value)
    if per_sample:
        numel //= seed[0]
    return float(numel * graph.values[target].dtype.itemsize)


def needs(
    graph: Graph, sweep: Sweep, chunks: dict[int, int], answer: Asked | None
) -> tuple[float, float]:
    """Predicted bytes that a sweep takes at its worst, and that must be free for it (with `SLACK`).

    Its part of the answer is included (None: blocks are the answer).
    """
    peak = peak_bytes(graph, sweep, chunks)
    taken = _with_answer(graph, sweep, chunks, answer, peak)
    return taken, taken + SLACK * peak


def _with_answer(graph: Graph, sweep: Sweep, chunks, answer: Asked | None, peak: float) -> float:
    """The bytes of blocks, ``peak``, and of the answer.

    Chunks are written to an answer that is there from the start; a block that comes whole becomes the answer if it
    has its form, and is copied to it at the end if not.
    """
    targets = {t for t in sweep.targets if t is not None}
    if sweep.patterns:
        return max(peak + _stored(graph, sweep, targets), _gathered(graph, sweep, targets, answer))
    if sweep.given and chunks:
        return peak + sweep.ends(graph)
    if answer is None or answer.given:
        return peak
    whole = sum(answer_bytes(graph, sweep, t, answer.per_sample) for t in targets)
    if chunks:
        return peak + whole
    shares = {s.value: s.shares for s in sweep.steps}
    keep: frozenset[int] = frozenset()
    if answer.per_sample and not sweep.summed and sweep.layout.axes:
        keep = frozenset(t for _, t in sweep.layout.axes[0] if t != FREE)
    end = 0.0
    for t in targets:
        layout = sweep.layouts[t]
        if not shares.get(t, False):
            end += sweep.stored(graph, t)
        if shares.get(t, False) or layout.tied != keep:
            end += answer_bytes(graph, sweep, t, answer.per_sample)
    return max(peak, end)


def _stored(graph: Graph, sweep: Sweep, targets) -> float:
    """Bytes of the whole blocks from which entries are read."""
    if sweep.windows:
        return sum(patches.block_bytes(graph, sweep, t) for t in targets)
    return sweep.ends(graph)


def _gathered(graph: Graph, sweep: Sweep, targets, answer: Asked | None) -> float:
    """Bytes while the entries of blocks are put in their places."""
    total = _stored(graph, sweep, targets)
    for t in targets:
        size, pattern = graph.values[t].dtype.itemsize, sweep.patterns[t]
        nnz = pattern.nnz
        shape = graph.values[t].shape
        each = pattern.sample(shape[0]) if shape else None  # the places are those of one sample
        total += nnz * size + (each or pattern).nnz * INDEX_BYTES
        if answer is not None and answer.kernels and not answer.sparse and pattern.bands:
            total -= (each or pattern).nnz * INDEX_BYTES + nnz * size  # written out from the block
        if answer is not None and answer.sparse:
            axes = len(graph.values[t].shape) + len(graph.values[sweep.seed].shape)
            total += nnz * (size + 8 * axes)
        elif answer is None or not answer.given:
            total += answer_bytes(graph, sweep, t, answer is not None and answer.per_sample)
    return total


def seconds(sweeps: list[Sweep], rates: Rates, graph: Graph | None = None) -> float:
    """Predicted time, for ranking plans only. With a ``graph``, that of the steps as kernels run them together."""
    flops, moved, steps = sum(s.flops for s in sweeps), 0.0, 0
    for s in sweeps:
        items = s.items
        if items is None and graph is not None and s.steps and not s.windows:
            items = fuse(graph, s)
        if items:
            moved += sum(i.bytes for i in items)
            steps += len(items)
        else:
            moved += s.bytes
            steps += len(s.steps) or 1
    return predict(flops, moved, steps, rates)


def predict(flops: float, written: float, steps: int, rates: Rates) -> float:
    """Predicted seconds of some steps: blocks are read and written, one operation after the other."""
    return rates.seconds(flops, 2 * written, steps)


Simulated = dict[bool, list[Sweep]]
"""The sweeps of both directions (reverse: True) as they are whatever they cost."""


@dataclass(frozen=True)
class _Terms:
    """What sweeps are chosen under."""

    limit: float
    chunk_size: int | None
    device: str
    rates: Rates
    answer: Asked | None

    @property
    def kernels(self) -> str:
        return "" if self.answer is None else self.answer.kernels

    def seconds(self, graph: Graph, *sweeps: Sweep) -> float:
        """Predicted time as the sweeps run here."""
        return seconds(list(sweeps), self.rates, graph if self.kernels else None)

    def fused(self, graph: Graph, sweep: Sweep) -> Sweep:
        """A sweep with its items, where kernels run."""
        run = self.answer is not None and (self.answer.kernels or self.answer.fused)
        if not run or sweep.items is not None or sweep.windows or not sweep.steps:
            return sweep
        return replace(sweep, items=fuse(graph, sweep))

    def chunks(
        self, graph: Graph, sweep: Sweep, chunk_size: int | None, answer: Asked | None, held=0.0
    ) -> tuple[dict[int, int], float]:
        """`choose_chunks` where so much is ``held`` by stages before."""
        limit = self.limit - held
        return choose_chunks(
            graph, sweep, limit, chunk_size=chunk_size, device=self.device, answer=answer
        )

    def fits(self, graph: Graph, sweep: Sweep) -> bool:
        """Whether some chunks of the sweep fit the memory limit."""
        if self.limit == inf:
            return True
        try:
            self.chunks(graph, sweep, self.chunk_size, self.answer)
        except MemoryLimitTooSmall:
            return False
        return True


def _direction(
    graph: Graph, reverse: bool, summed: bool, traces, terms: _Terms, known: Simulated
) -> list[Sweep]:
    """The sweeps of one direction, with no chunks yet."""
    sweeps = known.get(reverse)
    if sweeps is None:
        ends = graph.outputs if reverse else graph.inputs
        sweeps = [simulate(graph, i, reverse, summed) for i, v in enumerate(ends) if v is not None]
        known[reverse] = sweeps
    if traces is not None:
        sweeps = [_fewer(graph, s, traces, terms) for s in sweeps]
    return [terms.fused(graph, s) for s in sweeps]


def _fewer(graph: Graph, sweep: Sweep, traces, terms: _Terms) -> Sweep:
    """The sweep with its seeds coloured where ``traces`` show that fewer will do, by patches where that costs less."""
    answer = terms.answer
    per_sample = answer is not None and answer.per_sample
    sparse = answer is not None and answer.sparse
    splits, colours = colours_of(traces, sweep, per_sample)
    patterns = {}
    if sparse or colours:
        for k, t in enumerate(sweep.targets):
            if t is not None:
                pair = (traces[k], sweep.seed) if sweep.reverse else (traces[sweep.index], t)
                patterns[t] = pattern_of(*pair)
    if colours:
        fewer = follow(
            graph, sweep.seed, sweep.reverse, sweep.targets,
            index=sweep.index, splits=splits, colours=colours,
        )  # fmt: skip
        fewer = replace(fewer, patterns=patterns)
        small = patches.by_patches(graph, fewer)
        fewer = terms.fused(graph, fewer)
        whole = None
        if small is not None and terms.kernels:
            both = not per_sample and graph.values[small.seed].shape[0] > 1
            small = replace(small, items=patching.fuse(graph, small, not sparse, both))
            whole = patching.tail_of(small)
        if small is not None and terms.kernels == "triton" and whole is None:
            fewer = replace(fewer, why="by images, as kernels are asked for")
        elif small is not None:
            mine, theirs = terms.seconds(graph, small), terms.seconds(graph, fewer)
            if terms.kernels and not sparse and whole is None:
                # entries are put in their places one by one, bands written out
                for t, p in patterns.items():
                    each = INDEX_BYTES + 2 * graph.values[t].dtype.itemsize
                    mine += p.nnz * each / terms.rates.bandwidth
            if mine < theirs and terms.fits(graph, small):
                why = f"by patches (predicted {mine * 1e3:.3g} ms, {theirs * 1e3:.3g} by images)"
                return replace(small, why=why)
            why = f"by images (predicted {theirs * 1e3:.3g} ms, {mine * 1e3:.3g} by patches)"
            fewer = replace(fewer, why=why)
        if fewer.columns() < sweep.columns() and (sparse or terms.fits(graph, fewer)):
            return fewer
    return replace(sweep, patterns=patterns) if sparse else sweep


def make_plan(
    graph: Graph,
    strategy: str = "auto",
    summed: bool = False,
    *,
    limit: float = inf,
    chunk_size: int | None = None,
    device: str = "cpu",
    rates: Rates | None = None,
    answer: Asked | None = None,
    known: Simulated | None = None,
) -> Plan:
    """Choose the order of accumulation (the cheapest prediction under "auto") and the chunks of every sweep.

    "auto" compares forward, reverse and, where the graph has a cut narrower than both ends, mixed mode; "mixed" takes
    mixed mode wherever there is a cut. Samples that are only known by a probe not to mix (``summed``) are not followed
    through cuts. ``known``: filled with what another call for the same graph need not find again.
    """
    rates, known = rates or rough(device), {} if known is None else known
    both = strategy in ("auto", "mixed")
    ways: dict[str, list[Sweep]] = {}
    sparse = answer is not None and answer.sparse
    traces = None
    if sparse or (answer is not None and not summed and has_windows(graph)):
        traces = [v if v is None else Trace(graph, v) for v in graph.inputs]
    terms = _Terms(limit, chunk_size, device, rates, answer)
    if both or strategy == "reverse-mode":
        back = ways["reverse-mode"] = _direction(graph, True, summed, traces, terms, known)
        if strategy == "auto" and mixed.settled(graph, back, terms.seconds, rates.step):
            both = not all(terms.fits(graph, s) for s in back)
    if both or strategy == "forward-mode":
        ways["forward-mode"] = _direction(graph, False, summed, traces, terms, known)
    cost = {name: terms.seconds(graph, *sweeps) for name, sweeps in ways.items()}
    table = None
    if both and not summed and not sparse and all(ways.values()):
        table = _meeting(graph, strategy, terms, ways)
    if table is not None:
        cost["mixed"] = table.seconds
    refused: list[MemoryLimitTooSmall] = []
    for chosen in sorted(cost, key=lambda name: (name != strategy, cost[name])):
        parts, sweeps = mixed.stages(graph, table) if chosen == "mixed" else ([], ways[chosen])
        lost = chosen == "mixed" and _untied(graph, sweeps)
        if lost and not _untied(graph, ways["reverse-mode"]):
            continue  # a proof that samples do not mix is worth more
        try:
            parts, sweeps = _cut(graph, parts, sweeps, terms)
        except MemoryLimitTooSmall as error:
            refused.append(error)
            continue
        break
    else:
        raise min(refused, key=lambda error: error.need)
    reason = "asked for" if chosen == strategy else "predicted " + _compare(cost, chosen)
    if chosen == "mixed":
        reason += f", {table.name}"
    tied = not _untied(graph, sweeps)
    suspects = () if chosen == "reverse-mode" else poles.suspects(graph, seeds=True)
    peak = max((s.peak for s in (*parts, *sweeps)), default=0.0)
    return Plan(chosen, chosen != "forward-mode", sweeps, reason, cost, tied, peak, parts, suspects)


def plan_given(
    graph: Graph,
    seeds: list[int],
    columns: int,
    reverse: bool,
    *,
    limit: float = inf,
    chunk_size: int | None = None,
    device: str = "cpu",
) -> Plan:
    """The plan of one sweep from ``columns`` tangents or cotangents that are given at all of ``seeds``."""
    targets = list(graph.inputs if reverse else graph.outputs)
    sweep = replace(follow_given(graph, seeds, columns, reverse, targets), alone=True)
    chunks, peak = choose_chunks(graph, sweep, limit, chunk_size=chunk_size, device=device)
    sweep = fused(graph, replace(sweep, chunks=chunks, peak=peak))
    strategy = "reverse-mode" if reverse else "forward-mode"
    return Plan(strategy, reverse, [sweep], "the seeds are given", {}, False, peak)


def _cut(
    graph: Graph, parts: list[Sweep], sweeps: list[Sweep], terms: _Terms
) -> tuple[list[Sweep], list[Sweep]]:
    """All stages with their chunks and predicted peaks: what earlier stages leave stays until the end."""
    answer, held = terms.answer, 0.0
    ready: dict[Sweep, Sweep] = {}

    def cut(stage: Sweep, chunk_size: int | None, answer: Asked | None) -> Sweep:
        if isinstance(stage, mixed.Join):
            stage = stage.of(ready)
        try:
            chunks, taken = terms.chunks(graph, stage, chunk_size, answer, held)
        except MemoryLimitTooSmall as error:
            raise _refused(held + error.need, terms.limit) from None
        return terms.fused(graph, replace(stage, chunks=chunks, peak=held + taken))

    for part in parts:
        ready[part] = cut(part, None, None)
        held += part.ends(graph)
    made = []
    alone = len(sweeps) == 1 and not parts
    for sweep in sweeps:
        made.append(cut(replace(sweep, alone=alone), terms.chunk_size, answer))
        if answer is not None and not answer.given:
            held += sum(
                answer_bytes(graph, sweep, t, answer.per_sample) for t in {*sweep.targets} - {None}
            )
    return list(ready.values()), made


def _untied(graph: Graph, sweeps: list[Sweep]) -> bool:
    return any(untied_targets(graph, sweep) for sweep in sweeps)


def _meeting(graph: Graph, strategy: str, terms: _Terms, ways) -> mixed.Table | None:
    """The cheapest mixed plan, or None where there is no cut that is worth a look."""
    cost, asked = partial(terms.seconds, graph), strategy == "mixed"
    at = mixed.cuts(graph) if asked else mixed.narrow_cuts(graph)
    look = at and (asked or mixed.may_pay(ways.values(), cost, terms.rates.step))
    return mixed.best(graph, at, cost, joined=True) if look else None


def _compare(cost: dict[str, float], chosen: str) -> str:
    others = " and ".join(f"{t * 1e3:.3g} ms for {n}" for n, t in cost.items() if n != chosen)
    return f"{cost[chosen] * 1e3:.3g} ms " + (
        f"against {others}" if others else "for so many steps"
    )
