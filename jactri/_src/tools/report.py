"""`explain`: the plan as a table, from the very objects that the executor runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan, prod
from typing import Any

from torch import Tensor

from ..base import backends
from ..base.memory import Budget, MemoryLimitTooSmall, si
from ..base.tables import Shown, Table
from ..calls import few, whole
from ..compile.compilation import Compilation
from ..compile.compiled import compile
from ..compile.reached import modules_of
from ..device import batching, chooser
from ..maps.complexes import Complex
from ..maps.layout import FREE, Layout
from ..plan import patching
from ..plan.folding import fold
from ..plan.fusion import Fused, fuse
from ..plan.mixed import Join
from ..plan.owners import apart
from ..plan.planner import Plan
from ..plan.planning import (
    Piece,
    Wanted,
    answer_bytes,
    plan_for,
    proof,
    prove_by_probe,
    split_masked,
    split_samples,
)
from ..plan.sweep import Sweep
from ..prologue.arguments import ASSUME, Options, as_tuple, check_batch
from ..prologue.running import buffers_kept, computing, prepare, public
from ..read import overriding
from ..read.behind import Walk
from ..read.graph import Graph, UnsupportedGraph
from ..read.ranges import layer_of, op_of, opaque_of
from ..read.reading import read
from ..run import launch
from ..run.entries import band, blocks


@dataclass(frozen=True)
class StepReport:
    """One step of a sweep.

    Attributes:
        op: of autograd's graph.
        structure: what linear map it is: diagonal, matrix, convolution.
        direction: ``"forward-mode"``, ``"reverse-mode"`` or ``"mixed"``.
        shape: of the value.
        columns: how many seeds are carried in all.
        tied: the axes of the value that are tied to the seed, and so cost nothing.
        flops: predicted.
        bytes: predicted to be written.
        backend: what runs it.
        why: why that runs it.
        fallback: whether autograd does, for want of a rule.
        layer: of which module, where that was noted.
    """

    op: str
    structure: str
    direction: str
    shape: tuple[int, ...]
    columns: int
    tied: str
    flops: float
    bytes: float
    backend: str
    why: str
    fallback: bool
    layer: str = ""


@dataclass(frozen=True, repr=False)
class Explanation(Shown):
    """What `explain` returns; ``str()`` of it is the table.

    Attributes:
        steps: a `StepReport` for each step, in the order in which they run.
        direction: of the accumulation.
        reason: why that was chosen.
        flops: predicted, of all steps; NaN where autograd computes the function as a whole, which is not predicted.
        bytes: predicted to be written by them, or NaN likewise.
        peak_bytes: predicted to be held at once, the answer included.
        chunks: in how many the seeds run.
        answer_bytes: of the Jacobian.
        naive_flops: of one backward pass a row, or NaN likewise.
        fallbacks: the ops that have no rule.
        note: what the table does not show: seeds that run as one, ranges of samples.
        compiled: what the compiler made of the call, if that was asked for.
        overrides: what `overrides` put in place of derivatives, and at how many nodes.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> plan = jactri.explain(net, torch.randn(4, 3), per_sample=True)
        >>> plan.answer_bytes, plan.chunks, plan.fallbacks
        (96, 1, ())
    """

    steps: tuple[StepReport, ...]
    direction: str
    reason: str
    flops: float
    bytes: float
    peak_bytes: float
    chunks: int
    answer_bytes: int
    naive_flops: float
    fallbacks: tuple[str, ...]
    note: str = ""
    compiled: Compilation | None = None
    overrides: tuple[str, ...] = ()

    def _parts(self) -> list[str | Table]:
        head = (
            "step",
            "op",
            "structure",
            "shape",
            "seeds",
            "tied axes",
            "flops",
            "bytes",
            "backend",
        )
        rows = [
            (
                str(i), s.op, s.structure, "x".join(map(str, s.shape)) or "scalar", str(s.columns), s.tied,
                si(s.flops), si(s.bytes), f"{s.backend} ({s.why})",
            )
            for i, s in enumerate(self.steps)
        ]  # fmt: skip
        known = not isnan(self.flops)
        cost = f"{si(self.flops)}flop, {si(self.bytes)}B written" if known else "flop not predicted"
        parts: list[str | Table] = [f"{self.direction}: {self.reason}"]
        if rows:
            parts.append(Table(head, rows))
        parts.append(
            f"accumulation only, without func itself: {cost}, peak {si(self.peak_bytes)}B with the answer's "
            f"{si(self.answer_bytes)}B, {self.chunks} chunk{'s' if self.chunks != 1 else ''}"
        )
        if known:
            naive = f"one backward pass a row: {si(self.naive_flops)}flop"
            if self.flops:
                naive += f", {self.naive_flops / self.flops:.3g} times as many"
            parts.append(naive)
        parts.append(f"fallbacks: {fallbacks(self.fallbacks)}")
        if self.overrides:
            parts.append(f"overrides: {'; '.join(self.overrides)}")
        if self.note:
            parts.append(self.note)
        if self.steps:
            parts.append(_LEGEND)
        if self.compiled is not None:
            parts += self.compiled._parts()
        return parts


_LEGEND = (
    "seeds: rows (in reverse) or columns that a step carries; tied axes: those that the value shares with the seed, "
    "which cost nothing\n"
    "flops, bytes: predicted, the bytes are those written; backend: what runs the step (and why)"
)


def fallbacks(ops: Sequence[str]) -> str:
    """Which ops have no rule, and what one can do."""
    if not ops:
        return "none"
    if ops == WHOLE:
        return f"{ops[0]}, by autograd"
    return (
        f"{', '.join(ops)}: by autograd, one product a row; a rule (jactri.rule) gives an op or an autograd.Function "
        "its structure"
    )


WHOLE = ("the whole function",)
"""The fallbacks of a plan without steps."""


@public
def explain(
    func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    *,
    strategy: str = "auto",
    per_sample: bool | str = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
    compiled: bool = False,
    engine: str = "inductor",
) -> Explanation:
    """How `jactri.jacobian` would compute the Jacobian of ``func`` at ``inputs``, without computing it.

    Print the result: a row a step with op, structure, shape of the value, seeds carried, which axes are tied to the
    seed (and so cost nothing), predicted flops and bytes, backend and why; then the totals beside those of one backward
    pass a row. Steps that one kernel runs say so; how it was chosen stands at the last of them. A call that is compiled
    already, of any ``of``, tells what the compiler made of it by its method ``explain``.

    Args:
        func: as of `jacobian`.
        inputs: as of `jacobian`.
        strategy: as of `jacobian`.
        per_sample: as of `jacobian`.
        chunk_size: as of `jacobian`.
        memory_limit: as of `jacobian`.
        backend: as of `jacobian`.
        compiled: compile the call, too, as `jactri.compile` does, and add what came of it: the kernels with the ops
            that each fuses, the calls left to libraries, the time it took, what is looked up again at each call, or why
            the call runs eagerly.
        engine: by which engine: see `jactri.compile`.

    Returns:
        An `Explanation`.

    Raises:
        TypeError, RuntimeError, ValueError: as by `jacobian`.

    Cost:
        One run of ``func``, and reading its graph; where autograd computes the function as a whole, a first row or
        column of it. ``compiled=True`` costs what compiling costs. Buffers of modules in training mode are put back.

    Examples:
        >>> net = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
        >>> plan = jactri.explain(net, torch.randn(16, 32), per_sample=True)
        >>> plan.flops < plan.naive_flops  # less than one backward pass a row
        True
        >>> "fallbacks: none" in str(plan)
        True
    """
    options: dict[str, Any] = {
        "strategy": strategy, "per_sample": per_sample, "chunk_size": chunk_size,
        "memory_limit": memory_limit, "backend": backend,
    }  # fmt: skip
    with buffers_kept(modules_of(func)):
        overriding.last.set(None)
        found = replace(_explained(func, inputs, **options), overrides=overriding.told())
        if not compiled:
            return found
        _, given = as_tuple(inputs, "inputs", "explain")
        return replace(found, compiled=compile(func, *given, engine=engine, **options).explain())


def _explained(
    func, inputs, strategy, per_sample, chunk_size, memory_limit, backend
) -> Explanation:
    """The plan of a call."""
    _, given = as_tuple(inputs, "inputs", "explain")
    backends.check_asked(backend, given[0].device if given else None, False)
    ys, xs, _, _ = prepare(func, given, False, "explain", answers=False)
    check_batch(per_sample, ys, xs)
    with computing(False, backend):
        if not all(t.numel() for t in (*xs, *ys)):
            empty = answer_bytes(ys, xs, per_sample)
            return Explanation(
                (), "nothing to do", "an input or output is empty", 0.0, 0.0, 0.0, 0, empty, 0.0, ()
            )
        budget, answer = Budget(memory_limit, xs[0].device), answer_bytes(ys, xs, per_sample)
        walk = Walk(ys, xs)
        asked = Options(
            chunk_size=chunk_size, strategy=strategy, per_sample=per_sample, backend=backend
        )
        engine = few.foreseen(walk, ys, xs, asked, budget)
        if engine is not None and few.apart(ys, xs, asked, budget, engine) is not None:
            return _by_engine(engine, answer)
        try:
            graph = fold(read(ys, xs, walk=walk))
        except UnsupportedGraph as reason:
            found = whole.foreseen(
                ys, xs, per_sample, reason, budget=budget, strategy=strategy, chunk_size=chunk_size
            )
            return _whole(found, f"it holds {reason}", answer)
        summed = False
        if per_sample:
            alone = proof(graph, strategy, ys, xs)
            summed = not alone.tied
            if summed and per_sample == ASSUME:
                strategy = "reverse-mode" if strategy == "auto" else strategy
            elif summed and not apart(graph):
                prove_by_probe(graph, alone, ys, xs, budget)
        wanted = Wanted(budget, strategy, per_sample, summed, chunk_size, of="")
        try:
            plan = plan_for(graph, ys, xs, wanted)
            report = describe(graph, plan, ys, xs, per_sample)
            pieces = split_masked(graph, plan, ys, xs, wanted)
            return (
                report if pieces is None else _in_ranges(report, plan, pieces, ys, xs, per_sample)
            )
        except MemoryLimitTooSmall:
            pieces = split_samples(graph, ys, xs, wanted)
            if pieces is None:
                raise
            free = wanted._replace(budget=Budget.unbounded(xs[0].device))
            report = describe(graph, plan_for(graph, ys, xs, free), ys, xs, per_sample)
            longest = max(ends.out[0][0].length for ends, _, _ in pieces)
            return replace(
                report,
                peak_bytes=max(plan.peak for _, _, plan in pieces),
                chunks=sum(len(s.selections()) for _, _, plan in pieces for s in plan.sweeps),
                note=f"{len(pieces)} ranges of up to {longest} samples run one after another",
            )


def _in_ranges(
    whole: Explanation, plan: Plan, pieces: list[Piece], ys, xs, per_sample
) -> Explanation:
    """The report of ranges of tokens, by that of the plan for all of them."""
    parts = [describe(part, p, ys, xs, per_sample) for _, part, p in pieces]
    where = "an output" if plan.reverse else "the input"
    return replace(
        whole,
        steps=tuple(s for p in parts for s in p.steps),
        flops=sum(p.flops for p in parts),
        bytes=sum(p.bytes for p in parts),
        peak_bytes=max(p.peak_bytes for p in parts) + whole.answer_bytes,
        chunks=sum(p.chunks for p in parts),
        note=f"{len(parts)} ranges of the tokens of {where}, without what masks make zero ({si(whole.flops)}flop)",
    )


def _whole(found: whole.Foreseen, reason: str, answer: int) -> Explanation:
    """The report of a function that is computed as a whole."""
    how = (
        "by the derivative of a backward pass, in its cotangent"
        if found.forward
        else "a backward pass each"
    )
    kind = "column" if found.forward else "row"
    note = f"{found.seeds} {kind}{'s' if found.seeds != 1 else ''}, {how}, up to {found.at_once} at once"
    return Explanation(
        (), "whole function by autograd", reason, nan, nan, found.peak, found.chunks, answer, nan, WHOLE,
        f"{note}; peak and chunks are what a first {kind} took, times as many",
    )  # fmt: skip


def _by_engine(engine: few.Engine, answer: int) -> Explanation:
    """The report of rows that are computed before the graph is read."""
    return Explanation(
        (), "rows by autograd", engine.reason, nan, nan, answer + engine.held,
        engine.rows, answer, nan, (), "a derivative that is not finite has the graph read",
    )  # fmt: skip


def describe(graph: Graph, plan: Plan, ys, xs, per_sample: bool) -> Explanation:
    """The report of a plan."""
    steps = steps_of(graph, plan)
    sweeps = [p for p in (*plan.parts, *plan.sweeps) if not isinstance(p, Join)]
    # per sample, one backward pass of the batch's sum serves all samples
    rows = sum(y.numel() // (y.shape[0] if per_sample else 1) for y in ys)
    values = (graph.recorded or graph).values
    naive = float(rows) * sum(
        m.work(values[s].shape, v.shape, True) * prod(values[s].shape)
        for v in values
        for s, m in v.sources
        if m.structure not in ("view", "identity")
    )
    return Explanation(
        tuple(steps),
        plan.strategy,
        plan.reason,
        plan.flops,
        plan.bytes,
        plan.peak,
        sum(len(s.selections()) for s in plan.sweeps),
        answer_bytes(ys, xs, per_sample),
        naive,
        tuple(sorted({op for sweep in sweeps for s in sweep.steps for op in opaque_of(graph, s)})),
        "; ".join(dict.fromkeys(_colours(graph, s, per_sample) for s in plan.sweeps if s.colours)),
    )


def _colours(graph: Graph, sweep: Sweep, per_sample: bool) -> str:
    """How many seeds run as one, and what writes the answer out."""
    sizes = {(a, i): n for a, axis in enumerate(sweep.layout.axes) for i, (n, _) in enumerate(axis)}
    columns = max(sweep.layouts[t].columns for t in sweep.targets if t is not None)
    seeds = columns // prod(sweep.colours.values()) * prod(sizes[at] for at in sweep.colours)
    found = f"{columns} colours for {seeds} seeds that never meet in one entry"
    if sweep.why:
        found += ", " + sweep.why
    seed = graph.values[sweep.seed]
    if backends.kernels_on(seed.device) and not sweep.windows:
        for t, pattern in sweep.patterns.items():
            ends = [seed.shape, graph.values[t].shape][:: 1 if sweep.reverse else -1]
            samples, each = blocks(sweep, sweep.layouts[t], ends[0], ends[1], pattern, per_sample)
            both, runs = samples > 1 and not per_sample, sweep.layouts[t].columns
            kind = band(each, max(samples, 1), both, runs, sweep.reverse, seed.dtype, seed.device)
            if kind is not None:
                found += ", written out by {} ({})".format(*chooser.described(kind))
    return found


def steps_of(graph: Graph, plan: Plan) -> list[StepReport]:
    """The steps of a plan, in the order in which it runs its stages."""
    steps = []
    for sweep in (*plan.parts, *plan.sweeps):
        if isinstance(sweep, Join):
            steps += [_product(graph, sweep, v) for v in sweep.first]
            continue
        fused = _fused(graph, sweep)
        steps += [_step(graph, sweep, s, fused.get(s.value)) for s in sweep.steps]
    return steps


def _fused(graph: Graph, sweep: Sweep) -> dict[int, tuple[str, str]]:
    """What kernels run together: value -> backend and why."""
    if not backends.kernels_on(graph.values[sweep.seed].device):
        return {}
    if sweep.windows:
        tail = patching.tail_of(sweep)
        if tail is None:
            return {}
        backend, why = patching.described(graph, sweep, tail)
        below = "in the step below" if backend == "triton" else why
        return {s.value: (backend, why if s is tail.steps[-1] else below) for s in tail.steps}
    found = {}
    for item in fuse(graph, sweep):
        if isinstance(item, Fused):
            backend, why = launch.described(graph, sweep, item)
            for step in item.steps[:-1]:
                found[step.value] = backend, "in the step below" if backend == "triton" else why
            found[item.value] = backend, why
    return found


def _product(graph: Graph, join: Join, source: int) -> StepReport:
    """The product of two partial Jacobians."""
    value, layout, p = graph.values[source], join.layouts[source], join.products[source]
    at = "x".join(map(str, graph.values[join.at].shape))
    flops = 2.0 * prod(p.sizes)
    ran = backends.product_choice(value.device.type, value.dtype, flops)
    if p.groups.batch:
        b, m, k, n = (prod(p.sizes[c] for c in letters) for letters in p.groups)
        ran = batching.described(b, m, k, n, value.dtype, value.device)
    return StepReport(
        "product", f"meets at {at}", "mixed", value.shape, layout.columns, _tied(layout), flops,
        float(layout.numel * value.dtype.itemsize), *ran, False,
    )  # fmt: skip


def _tied(layout: Layout) -> str:
    return (
        ",".join(str(a) for a, axis in enumerate(layout.axes) if any(t != FREE for _, t in axis))
        or "-"
    )


def _step(graph: Graph, sweep: Sweep, step, fused) -> StepReport:
    edges = [t.map_in(graph) for t in step.terms]
    structures = []
    for t, edge in zip(step.terms, edges, strict=True):
        free = t.route.axis is not None and edge.name == "matmul"
        structures.append(edge.structure + (", no product" if free else ""))
    op, opaque = op_of(graph, step), bool(opaque_of(graph, step))
    device = graph.values[step.value].device.type
    if opaque:
        backend, why = "autograd", "no rule"
    elif fused is not None:
        backend, why = fused
    elif any(isinstance(e, Complex) for e in edges):
        backend, why = "torch", "complex"
    elif any(e.name == "matmul" for e in edges) and step.flops:
        backend, why = backends.product_choice(device, graph.values[step.value].dtype, step.flops)
    else:
        mixes = any(e.structure == "convolution" for e in edges)
        backend, why = (
            "torch",
            "view" if not step.flops else "convolution" if mixes else "elementwise",
        )
    columns = step.layout.columns
    if sweep.windows:
        size = sweep.windows[step.value].size
        structures.append(f"patches of {'x'.join(map(str, size))}")
        columns = prod(size) * graph.values[sweep.seed].shape[1]
    structure = ", ".join([" + ".join(structures[: len(edges)]), *structures[len(edges) :]])
    return StepReport(
        op, structure, "reverse-mode" if sweep.reverse else "forward-mode",
        graph.values[step.value].shape, columns, _tied(step.layout), step.flops,
        step.bytes, backend, why, opaque, layer_of(graph, step),
    )  # fmt: skip
