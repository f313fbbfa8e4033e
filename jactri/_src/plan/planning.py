"""Plans for a recorded computation: remembered, under the device's rates and memory, and in ranges of samples."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from ..base import backends, rates
from ..base.cache import Cache
from ..base.memory import free_bytes, hold, parse_bytes, si
from ..read.graph import Graph
from .owners import joins
from .planner import Asked, MemoryLimitTooSmall, Plan, make_plan, plan_given
from .poles import met
from .samples import REMEDY, narrow, places, probe_mixing
from .sweep import mixing_steps, simulate, untied_targets

_plans: Cache[tuple, Plan] = Cache()

_LARGE = 1 << 26
"""Predicted bytes from which the free memory is looked up."""

_LONG = 2e-3
"""Predicted seconds from which it pays to measure the device's rates."""

_WAIT = 5e-5
"""Predicted seconds that it is worth to wait for a value on a GPU, which runs dry meanwhile."""

_CLOSE = 8.0
"""Ways whose predicted times differ by more than this factor are told apart by rough rates too."""


def budget(memory_limit: int | str | None, device) -> int:
    """The bytes that a call may take: its limit, or half of what is free."""
    if memory_limit is not None:
        return parse_bytes(memory_limit)
    return max(free_bytes(device) // 2, _LARGE)


def check_answer(ys, xs, per_sample: bool, memory_limit: int | str | None) -> None:
    """Raise MemoryLimitTooSmall for an answer that does not fit the memory, before any of it is taken."""
    size = answer_bytes(ys, xs, per_sample)
    if memory_limit is None and size <= _LARGE:
        return
    limit = budget(memory_limit, xs[0].device)
    if size <= limit:
        return
    whose = "half of the free memory is" if memory_limit is None else "memory_limit is"
    remedy = "pass out= to write it elsewhere (a numpy.memmap: to disk), or raise memory_limit"
    n = xs[0].shape[0] if xs[0].dim() else 0
    if not per_sample and n > 1 and all(t.dim() and t.shape[0] == n for t in (*ys, *xs)):
        alone = answer_bytes(ys, xs, True)
        remedy = (
            f"if the {n} samples of the first axis do not influence one another, per_sample=True gives their blocks "
            f"alone, {si(alone)}B; else {remedy}"
        )
    error = MemoryLimitTooSmall(
        f"the Jacobian takes {si(size)}B, and {whose} {si(limit)}B: {remedy}"
    )
    error.need = float(size)
    raise error


def split_samples(graph: Graph, options):
    """Plans for ranges of samples that fit the memory limit, as (span, graph, plan), or None where there are none.

    ``options`` are those of `plan_for`. The answer is there as a whole while the ranges are written to it.
    """
    strategy, summed, chunk_size, limit, ys, xs, per_sample, dests, steady, sparse = options
    n = xs[0].shape[0] if xs[0].dim() else 0
    if summed or n < 2 or any(t.dim() == 0 or t.shape[0] != n for t in (*xs, *ys)):
        return None
    direction = strategy if strategy.endswith("-mode") else "reverse-mode"
    where = places(graph, make_plan(graph, direction).sweeps)
    ends = [v for v in (*graph.inputs, *graph.outputs) if v is not None]
    if where is None or any(where.get(v) != (0, 1) for v in ends):
        return None
    if limit is not None and dests is None:
        limit = parse_bytes(limit) - answer_bytes(ys, xs, per_sample)
        if limit <= 0:
            return None
    options = strategy, summed, chunk_size, limit, ys, xs, per_sample, True, steady, sparse
    count = n
    while True:
        count //= 2
        pieces = []
        try:
            for start in range(0, n, count):
                span = (start, min(count, n - start))
                part = narrow(graph, where, *span)
                if part is None:
                    return None
                pieces.append((span, part, plan_for(part, *options)))
            return pieces
        except MemoryLimitTooSmall:
            if count == 1:
                raise


def plan_for(
    graph: Graph,
    strategy: str,
    summed: bool,
    chunk_size: int | None,
    memory_limit: int | str | None,
    ys,
    xs,
    per_sample: bool,
    dests=None,
    steady: bool = False,
    sparse: bool = False,
    bounded: bool = True,
) -> Plan:
    """The plan for a graph, remembered by everything that it depends on.

    Plans hold no tensors and depend on shapes, dtypes and map structures only, all of which are in the key.
    ``steady``: a plan that any process makes, under rough rates. ``bounded``: it must fit the memory, or
    MemoryLimitTooSmall is raised; a proof or a prediction need not.
    """
    device, kernels = xs[0].device, ""
    if backends.kernels_for(xs[0]):
        kernels = "triton" if backends.forced() else "auto"
    answer = Asked(per_sample, dests is not None, sparse, kernels)

    def make(limit: float) -> Plan:
        options = graph, strategy, summed, limit, chunk_size, device.type
        plan = make_plan(*options, answer=answer)
        times = sorted(plan.seconds.values())
        if steady or len(times) < 2 or times[0] < _LONG or times[1] > _CLOSE * times[0]:
            return plan
        return make_plan(*options, rates.measured(device), answer)

    key = (graph.key, strategy, summed, chunk_size, device.type, answer, steady)
    plan = _kept(key, make, memory_limit, chunk_size, device, bounded)
    if plan.suspects and (_at_once(plan, device) or met(graph, plan.suspects)):
        strategy = "reverse-mode"
        key = (graph.key, strategy, summed, chunk_size, device.type, answer, steady)
        plan = _kept(key, make, memory_limit, chunk_size, device, bounded)
        return replace(plan, reason="a derivative is not known to be finite")
    return plan


def _at_once(plan: Plan, device) -> bool:
    """Whether reverse mode, which is right in any case, takes less than to wait for what another way has to know."""
    slower = plan.seconds.get("reverse-mode", inf) - plan.seconds[plan.strategy]
    return device.type == "cuda" and slower < _WAIT


def proof(graph: Graph, strategy: str, ys, xs, dests=None, sparse: bool = False) -> Plan:
    """The plan that tells whether samples are kept apart (``tied``), and that runs if it is `small`."""
    return plan_for(
        graph, strategy, False, None, None, ys, xs, True, dests, sparse=sparse, bounded=False
    )


def small(plan: Plan) -> bool:
    """Whether a plan runs without a look at how much memory is free."""
    return plan.peak <= _LARGE


def plan_for_given(
    graph: Graph,
    seeds: list[int],
    columns: int,
    reverse: bool,
    chunk_size: int | None,
    memory_limit: int | str | None,
    device,
) -> Plan:
    """`planner.plan_given` under the memory limit of a call, remembered as `plan_for` does."""

    def make(limit: float) -> Plan:
        return plan_given(graph, seeds, columns, reverse, limit, chunk_size, device.type)

    kernels = backends.kernels_on(graph.values[seeds[0]].device)
    key = (graph.key, tuple(seeds), columns, reverse, chunk_size, device.type, kernels)
    return _kept(key, make, memory_limit, chunk_size, device)


def _kept(key: tuple, make, memory_limit, chunk_size: int | None, device, bounded=True) -> Plan:
    """The plan that ``make(limit)`` gives, remembered by ``key`` where no limit decides."""
    if memory_limit is not None:
        return make(parse_bytes(memory_limit))
    plan = _plans.get(key)
    if plan is None:
        plan = make(float("inf"))
        hold(plan.peak, device)
        _plans[key] = plan
    if bounded and chunk_size is None and not small(plan):
        limit = budget(None, device)
        if plan.peak > limit:
            return make(limit)
    return plan


def answer_bytes(ys, xs, per_sample: bool) -> int:
    """Bytes of all Jacobian blocks."""
    total = 0
    for y in ys:
        for x in xs:
            n = y.numel() * x.numel()
            total += (n // max(x.shape[0], 1) if per_sample else n) * x.element_size()
    return total


def prove_by_probe(graph: Graph, plan: Plan, ys, xs) -> None:
    """Raise unless samples do not mix, where the algebra cannot tell (an opaque op, a loop over the samples)."""
    leak = probe_mixing(ys, xs, graph)
    if leak is None:
        return
    value = graph.values[_culprit(graph, plan)]
    raise RuntimeError(
        f"per_sample=True, but samples mix: the op {value.op} (output {tuple(value.shape)}) does not keep the batch "
        f"axis, and {leak}. Drop per_sample for the whole Jacobian, or make the samples independent (BatchNorm: call "
        "eval())" + REMEDY
    )


def _culprit(graph: Graph, plan: Plan) -> int:
    """The first value in which samples meet, or else in which their tie is lost, whatever the plan's direction."""
    joined = joins(graph)
    if joined is not None:
        return joined
    forward = [
        simulate(graph, i, False, False) for i, v in enumerate(graph.inputs) if v is not None
    ]
    return next(
        v
        for sweep in (*forward, *(s for s in plan.sweeps if s.steps))
        for target in untied_targets(graph, sweep)
        for v in mixing_steps(graph, sweep, target)
    )
