"""Graph + sizes + byte budget -> Plan. Pure: it holds no tensor.

The planner counts flops and bytes of the sweeps (see `sweep`) in both directions and, where the graph has a
bottleneck, of products of partial Jacobians that meet there (see `mixed`), takes the cheapest, and decides how many
seeds run at once. The executor runs exactly what is planned here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from math import inf

from ..base.memory import MemoryLimitTooSmall
from ..base.rates import Rates, rough
from ..read.graph import Graph
from . import mixed, patches, patching, poles
from .colours import WORTH, Colouring, Table, colours_of, flat_table, tabled
from .condensing import condensed
from .factoring import factored
from .fusion import fuse, fused
from .needs import INDEX_BYTES, Asked, answer_bytes, choose_chunks, too_small
from .samples import untied_targets
from .supports import Trace, has_windows, pattern_of, readable
from .sweep import Sweep, follow, follow_given, simulate


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
    """The edges that must be finite for any other order than autograd's (see `poles`)."""
    rows: float = inf
    """Predicted time of autograd's own order, where it was looked at."""

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


def seconds(sweeps: list[Sweep], rates: Rates, graph: Graph | None = None) -> float:
    """Predicted time, for ranking plans only. With a ``graph``, that of the steps as kernels run them together."""
    sweeps = [*sweeps, *parts_of(sweeps)]
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


def parts_of(sweeps: list[Sweep]) -> list[Sweep]:
    """What runs before."""
    return [made for s in sweeps for made, _ in s.parts]


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
        sweeps = [
            factored(graph, simulate(graph, i, reverse, summed))
            for i, v in enumerate(ends)
            if v is not None
        ]
        known[reverse] = sweeps
    if traces is not None:
        sweeps = [_fewer(graph, s, traces, terms) for s in sweeps]
    return [terms.fused(graph, s) for s in sweeps]


def _condensed(graph: Graph, sweep: Sweep, terms: _Terms) -> Sweep:
    """The sweep with parts made first; where kernels run several steps as one, if that is predicted to be faster."""
    seconds = terms.seconds(graph, sweep)
    found = terms.fused(graph, condensed(graph, sweep, seconds))
    return found if found.items is None or terms.seconds(graph, found) < seconds else sweep


def _fewer(graph: Graph, sweep: Sweep, traces, terms: _Terms) -> Sweep:
    """The sweep with its seeds coloured where ``traces`` show that fewer will do, by patches where that costs less."""
    answer = terms.answer
    per_sample = answer is not None and answer.per_sample
    sparse = answer is not None and answer.sparse
    found = colours_of(traces, sweep, per_sample, tables=sparse)
    patterns = {}
    if sparse or found.colours:
        for k, t in enumerate(sweep.targets):
            if t is not None:
                pair = (traces[k], sweep.seed) if sweep.reverse else (traces[sweep.index], t)
                patterns[t] = pattern_of(*pair)
    fewer = None
    if found.colours:
        fewer = _by_axes(graph, sweep, found, patterns, terms)
    if not sparse:
        return fewer or sweep
    sweep = replace(sweep, patterns=patterns)
    table = _table(graph, sweep, fewer, per_sample)
    if table is not None:
        flat = terms.fused(graph, replace(tabled(graph, sweep, table), patterns=patterns))
        best = fewer or sweep
        needed = per_sample and untied_targets(graph, best)
        if needed or terms.seconds(graph, flat) < terms.seconds(graph, best):
            return flat
    return fewer or sweep


def _table(graph: Graph, sweep: Sweep, fewer: Sweep | None, per_sample: bool | str) -> Table | None:
    """Colours of all entries of the seed, where a pattern is no product, or samples are apart by indices alone."""
    patterns = list(sweep.patterns.values())
    needed = bool(per_sample and patterns and untied_targets(graph, fewer or sweep))
    if not needed and not any(p.whole for p in patterns):
        return None
    first = [graph.values[v].shape[:1] for v in (sweep.seed, *sweep.patterns)]
    n = first[0][0] if first[0] and all(f == first[0] for f in first) else 0
    samples = n if n and all(p.sample(n, bool(per_sample)) is not None for p in patterns) else 0
    if needed and not samples:
        return None
    worth, shape = 1.0 if needed else WORTH, graph.values[sweep.seed].shape
    return flat_table(patterns, sweep.reverse, samples, worth, shape)


def _by_axes(
    graph: Graph, sweep: Sweep, found: Colouring, patterns: dict, terms: _Terms
) -> Sweep | None:
    """The sweep with colours along axes of the seed, by images or by patches; None where they are not worth it."""
    answer = terms.answer
    per_sample = answer is not None and answer.per_sample
    sparse = answer is not None and answer.sparse
    fewer = follow(
        graph, sweep.seed, sweep.reverse, sweep.targets,
        index=sweep.index, splits=found.splits, colours=found.colours, tables=found.tables,
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
    return None


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
    rows: bool = False,
) -> Plan:
    """Choose the order of accumulation (the cheapest prediction under "auto") and the chunks of every sweep.

    "auto" compares forward, reverse and, where the graph has a cut narrower than both ends, mixed mode; "mixed" takes
    mixed mode wherever there is a cut. Samples that are only known by a probe not to mix (``summed``) are not followed
    through cuts. ``rows``: nothing is multiplied in another order than a backward pass does. ``known``: filled with
    what another call for the same graph need not find again.
    """
    rates, known = rates or rough(device), {} if known is None else known
    both = strategy in ("auto", "mixed")
    ways: dict[str, list[Sweep]] = {}
    sparse = answer is not None and answer.sparse
    traces = None
    if sparse or (answer is not None and not summed and has_windows(graph)):
        told = sparse and readable(graph)
        traces = [v if v is None else Trace(graph, v, told) for v in graph.inputs]
    terms = _Terms(limit, chunk_size, device, rates, answer)
    if both or strategy == "reverse-mode":
        back = ways["reverse-mode"] = _direction(graph, True, summed, traces, terms, known)
        if strategy == "auto" and mixed.settled(graph, back, terms.seconds, rates.step):
            both = not all(terms.fits(graph, s) for s in back)
    if both or strategy == "forward-mode":
        ways["forward-mode"] = _direction(graph, False, summed, traces, terms, known)
    plain = ways
    if not rows:
        ways = {
            name: [_condensed(graph, s, terms) for s in sweeps] for name, sweeps in ways.items()
        }
    cost = {name: terms.seconds(graph, *sweeps) for name, sweeps in ways.items()}
    table = None
    if both and not summed and not sparse and all(ways.values()):
        table = _meeting(graph, strategy, terms, ways)
    if table is not None:
        cost["mixed"] = table.seconds
    refused: list[MemoryLimitTooSmall] = []
    for chosen in sorted(cost, key=lambda name: (name != strategy, cost[name])):
        if chosen == "mixed":
            options = [mixed.stages(graph, table)]
        else:
            options = [(parts_of(ways[chosen]), ways[chosen]), ([], plain[chosen])]
        parts, sweeps = options[0]
        lost = chosen == "mixed" and _untied(graph, sweeps)
        if lost and not _untied(graph, ways["reverse-mode"]):
            continue  # a proof that samples do not mix is worth more
        found = _first(graph, options if parts else options[-1:], terms, refused)
        if found is not None:
            parts, sweeps = found
            break
    else:
        raise min(refused, key=lambda error: error.need)
    reason = "asked for" if chosen == strategy else "predicted " + _compare(cost, chosen)
    if chosen == "mixed":
        reason += f", {table.name}"
    tied = not _untied(graph, sweeps)
    peak = max((s.peak for s in (*parts, *sweeps)), default=0.0)
    plan = Plan(chosen, chosen != "forward-mode", sweeps, reason, cost, tied, peak, parts)
    if chosen == "reverse-mode" and not parts:
        return plan
    rows_take = terms.seconds(graph, *plain["reverse-mode"]) if "reverse-mode" in plain else inf
    return replace(plan, suspects=poles.suspects(graph, seeds=True), rows=rows_take)


def plan_given(
    graph: Graph,
    seeds: list[int],
    columns: int,
    reverse: bool,
    *,
    limit: float = inf,
    chunk_size: int | None = None,
    device: str = "cpu",
    alone: bool = True,
) -> Plan:
    """The plan of one sweep from ``columns`` tangents or cotangents that are given at all of ``seeds``.

    ``alone``: as of `sweep.Sweep`; False where others of the same graph will come.
    """
    targets = list(graph.inputs if reverse else graph.outputs)
    sweep = replace(follow_given(graph, seeds, columns, reverse, targets), alone=alone)
    chunks, peak = choose_chunks(graph, sweep, limit, chunk_size=chunk_size, device=device)
    sweep = fused(graph, replace(sweep, chunks=chunks, peak=peak))
    strategy = "reverse-mode" if reverse else "forward-mode"
    return Plan(strategy, reverse, [sweep], "the seeds are given", {}, False, peak)


def _first(
    graph: Graph,
    options: list[tuple[list[Sweep], list[Sweep]]],
    terms: _Terms,
    refused: list[MemoryLimitTooSmall],
) -> tuple[list[Sweep], list[Sweep]] | None:
    """The first stages that fit the memory, cut; why others do not is added to ``refused``."""
    for parts, sweeps in options:
        try:
            return _cut(graph, parts, sweeps, terms)
        except MemoryLimitTooSmall as error:
            refused.append(error)
    return None


def _cut(
    graph: Graph, parts: list[Sweep], sweeps: list[Sweep], terms: _Terms
) -> tuple[list[Sweep], list[Sweep]]:
    """All stages with their chunks and predicted peaks: what earlier stages leave stays until the end."""
    answer, held = terms.answer, 0.0
    ready: dict[Sweep, Sweep] = {}

    def cut(stage: Sweep, chunk_size: int | None, answer: Asked | None) -> Sweep:
        stage = stage.of(ready)
        try:
            chunks, taken = terms.chunks(graph, stage, chunk_size, answer, held)
        except MemoryLimitTooSmall as error:
            raise too_small(held + error.need, terms.limit) from None
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
