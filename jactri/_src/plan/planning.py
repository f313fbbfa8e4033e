"""Plans for a recorded computation: remembered, under the device's rates and memory, and in ranges of samples."""

from __future__ import annotations

from dataclasses import replace
from math import inf, prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ..base import backends, rates
from ..base.cache import Cache
from ..base.memory import OFFER, Budget, MemoryLimitTooSmall, Offer, hold
from ..base.tracing import aside, tracing
from ..maps.cut import Cut
from ..read.graph import Graph
from . import masked
from .narrowing import Box, Range, cut_shape, narrowed
from .needs import Asked
from .owners import joins
from .planner import Plan, Simulated, make_plan, plan_given, predict
from .poles import met
from .samples import REMEDY, mixing_steps, narrow, places, probe_mixing, untied_targets
from .supports import known_by
from .sweep import simulate

_plans: Cache[tuple, Plan] = Cache()

_sparse: Cache[tuple, Plan] = Cache(32)
"""Those that hold patterns, which may be as large as answers."""

_ranges: Cache[tuple, list[Range] | None] = Cache()

_vain: Cache[tuple, bool] = Cache()
"""What was not worth to be cut."""

RANGES = 8
"""Of tokens, at most: so many leave (1 + 1/8) / 2 of what a causal mask leaves half of."""

RANGE = 1e-4
"""Predicted seconds a step that it takes to cut a graph to a range."""

_LONG = 2e-3
"""Predicted seconds from which it pays to measure the device's rates."""

_WAIT = 5e-5
"""Predicted seconds that it is worth to wait for a value on a GPU, which runs dry meanwhile."""

_CLOSE = 8.0
"""Ways whose predicted times differ by more than this factor are told apart by rough rates too."""


class Ends(NamedTuple):
    """The parts of the outputs and inputs that a graph computes, by their numbers."""

    out: dict[int, Box]
    into: dict[int, Box]

    @staticmethod
    def samples(start: int, length: int, ys, xs) -> Ends:
        """A range of samples of all."""
        box = {0: Cut(0, start, length)}
        return Ends(dict.fromkeys(range(len(ys)), box), dict.fromkeys(range(len(xs)), box))

    @property
    def key(self) -> list[list]:
        """As a journal keeps it."""
        return [
            [j, c.axis, c.start, c.length]
            for end in self
            for j, box in end.items()
            for c in box.values()
        ]

    def shapes(self, j: int, i: int, y: Tensor, x: Tensor) -> tuple[torch.Size, torch.Size]:
        """Of an output's and an input's part."""
        return cut_shape(y.shape, self.out[j]), cut_shape(x.shape, self.into[i])

    def of(self, dest: Tensor, j: int, i: int, ndim: int, per_sample: bool | str) -> Tensor:
        """That of a Jacobian ``(*out, *in)``, or of a sample each, of an output with ``ndim`` axes."""
        for cut in self.out[j].values():
            dest = dest.narrow(cut.axis, cut.start, cut.length)
        for cut in self.into[i].values():
            if cut.axis or not per_sample:
                at = ndim + cut.axis - bool(per_sample)
                dest = dest.narrow(at, cut.start, cut.length)
        return dest


Piece = tuple[Ends | None, Graph, Plan]
"""A plan and its graph, and what of the outputs and inputs it computes, if not all."""


class Wanted(NamedTuple):
    """What a plan is to be for, beside its graph."""

    budget: Budget
    strategy: str = "auto"
    per_sample: bool | str = False
    summed: bool = False
    """Whether samples are only known by a probe, or by the caller's word, not to mix."""
    chunk_size: int | None = None
    given: bool = False
    """Whether the caller gives the memory for the answer."""
    steady: bool = False
    """Whether it is to be a plan that any process makes, under rough rates."""
    sparse: bool = False
    of: str | None = None
    """What stands before ``per_sample=`` and ``out=`` in a refusal; None where the caller knows neither."""
    rows: bool = False
    """Whether autograd's own order is asked for."""


def refusal(what: str, need: float, ys, xs, wanted: Wanted) -> MemoryLimitTooSmall:
    """The error for a Jacobian, of which all or a part takes ``need`` bytes."""
    size = 0 if wanted.given else answer_bytes(ys, xs, wanted.per_sample)
    n = samples_of(ys, xs)
    if wanted.of is None or wanted.given:
        offer = OFFER
    else:
        out = "" if wanted.sparse else f"{wanted.of}out="
        alone = n > 1 and not wanted.per_sample
        offer = Offer(n if alone else 0, answer_bytes(ys, xs, True) if alone else 0, out, wanted.of)
    return wanted.budget.refusal(what, need, size if size < need else 0, offer)


def samples_of(ys, xs) -> int:
    """The size of the first axis that all inputs and outputs have in common, or 0."""
    n = xs[0].shape[0] if xs[0].dim() else 0
    return n if all(t.dim() and t.shape[0] == n for t in (*ys, *xs)) else 0


def check_answer(ys, xs, wanted: Wanted, what: str = "the Jacobian") -> None:
    """Raise MemoryLimitTooSmall for an answer that does not fit the memory, before any of it is taken."""
    size = answer_bytes(ys, xs, wanted.per_sample)
    if not wanted.budget.fits(size):
        raise refusal(what, size, ys, xs, wanted)


def split_samples(graph: Graph, ys, xs, wanted: Wanted) -> list[Piece] | None:
    """Plans for ranges of samples that fit the memory limit, or None where there are none.

    The answer is there as a whole while the ranges are written to it.
    """
    n = samples_of(ys, xs)
    if wanted.summed or n < 2:
        return None
    direction = wanted.strategy if wanted.strategy.endswith("-mode") else "reverse-mode"
    where = places(graph, make_plan(graph, direction).sweeps)
    ends = [v for v in (*graph.inputs, *graph.outputs) if v is not None]
    if where is None or any(where.get(v) != (0, 1) for v in ends):
        return None
    if not wanted.given:
        answer = answer_bytes(ys, xs, wanted.per_sample)
        wanted = wanted._replace(budget=wanted.budget.less(answer), given=True)
    count = n
    while True:
        count //= 2
        pieces: list[Piece] = []
        try:
            for start in range(0, n, count):
                span = (start, min(count, n - start))
                part = narrow(graph, where, *span)
                if part is None:
                    return None
                pieces.append((Ends.samples(*span, ys, xs), part, plan_for(part, ys, xs, wanted)))
            return pieces
        except MemoryLimitTooSmall:
            if count == 1:
                raise


def split_masked(graph: Graph, plan: Plan, ys, xs, wanted: Wanted) -> list[Piece] | None:
    """Plans for ranges of the seed's tokens, each without what masks make zero; None where that is not worth it.

    What no range computes is zero.
    """
    device = wanted.budget.device
    whole = _seconds(plan, device)
    each = RANGE * _steps(plan)
    most = RANGES // 2 if tracing() else RANGES
    count = min(most, int(sqrt(whole / (2 * each)))) if each else 1
    if count < 2 or wanted.summed or wanted.sparse or wanted.rows or backends.captured(device):
        return None
    masks = masked.masks(graph)
    fixed = masked.fixed(graph)
    if not masks or (tracing() and not fixed):
        return None
    # what was not worth it is not looked at again: where indices decide, too, since all at once is always right
    key = graph.key, masks, plan.reverse, count
    asked = (
        *key, wanted.strategy, bool(wanted.per_sample), wanted.chunk_size, wanted.given, wanted.budget.bound,
    )  # fmt: skip
    if _vain.get(asked):
        return None

    def cut() -> list[Range] | None:
        return _found(graph, plan, count)

    found = _ranges.of(key, cut) if fixed else cut()
    pieces = None if found is None else _pieces(graph, plan, found, ys, xs, wanted)
    if pieces is not None:
        cutting = RANGE * sum(_steps(p) for _, _, p in pieces)
        if cutting + sum(_seconds(p, device) for _, _, p in pieces) < whole:
            return pieces
    if pieces is not None or wanted.budget.bound is not None or found is None:
        _vain[asked] = True
    return None


def _found(graph: Graph, plan: Plan, count: int) -> list[Range] | None:
    """Ranges of all outputs, or inputs; those that gain nothing by them are one each. None where none does."""
    made, some = [], False
    with aside():
        for k, v in enumerate(graph.outputs if plan.reverse else graph.inputs):
            if v is not None:
                found = masked.ranges(graph, plan.reverse, count, k)
                made += [masked.whole(graph, plan.reverse, k)] if found is None else found
                some = some or found is not None
    return made if some else None


def _pieces(
    graph: Graph, plan: Plan, found: list[Range], ys, xs, wanted: Wanted
) -> list[Piece] | None:
    """Their plans; None where the memory does not hold them."""
    answer = 0 if wanted.given else answer_bytes(ys, xs, wanted.per_sample)
    held = masked.held(graph, found)
    wanted = wanted._replace(budget=wanted.budget.less(answer + held), given=True)
    pieces: list[Piece] = []
    try:
        for part in found:
            small = narrowed(graph, part, plan.reverse)
            if small is not None:
                ends = Ends(*(
                    {k: part.boxes.get(v, {}) for k, v in enumerate(end)}
                    for end in (graph.outputs, graph.inputs)
                ))  # fmt: skip
                made = plan_for(small, ys, xs, wanted)
                pieces.append((ends, small, replace(made, peak=made.peak + held)))
    except MemoryLimitTooSmall:
        return None
    return pieces


def _steps(plan: Plan) -> int:
    return sum(len(s.steps) or 1 for s in (*plan.parts, *plan.sweeps))


def _seconds(plan: Plan, device) -> float:
    """Predicted under rough rates, for plans that are compared."""
    return predict(plan.flops, plan.bytes, _steps(plan), rates.rough(device.type))


def plan_for(graph: Graph, ys, xs, wanted: Wanted) -> Plan:
    """The plan for a graph, remembered by everything that it depends on.

    Plans hold no tensors and depend on shapes, dtypes and map structures only, all of which are in the key. Raises
    MemoryLimitTooSmall.
    """
    budget, strategy, per_sample, summed, chunk_size, given, steady, sparse, _, rows = wanted
    device, kernels = budget.device, ""
    fused = backends.kernels_on(device)
    if fused and backends.kernels_for(xs[0]):
        kernels = "triton" if backends.forced() else "auto"
    per_sample = bool(per_sample)
    known: Simulated = {}

    def make(limit: float) -> Plan:
        answer = Asked(per_sample, given, sparse, kernels, fused)
        how = {"limit": limit, "chunk_size": chunk_size, "device": device.type}
        how |= {"answer": answer, "known": known, "rows": rows}
        plan = make_plan(graph, strategy, summed, **how)
        times = sorted(plan.seconds.values())
        if steady or len(times) < 2 or times[0] < _LONG or times[1] > _CLOSE * times[0]:
            return plan
        if limit < 2 * rates.taken(device.type):  # it would not be kept
            return plan
        return make_plan(graph, strategy, summed, rates=rates.measured(device), **how)

    key = (
        graph.key, strategy, per_sample, summed, chunk_size, given, steady, sparse, rows, kernels, fused,
        device.type, budget.bound, known_by(graph) if sparse or tracing() else (),
    )  # fmt: skip
    try:
        plan = _kept(key, make, budget, chunk_size, steady, _sparse if sparse else _plans)
    except MemoryLimitTooSmall as error:
        raise refusal(ONE_SEED, error.need, ys, xs, wanted) from None
    if plan.suspects and (_at_once(plan, device) or met(graph, plan.suspects)):
        plan = plan_for(graph, ys, xs, wanted._replace(strategy="reverse-mode", rows=True))
        return replace(plan, reason="a derivative is not known to be finite")
    return plan


ONE_SEED = "one seed at a time"
"""The least that a sweep can run."""


def _at_once(plan: Plan, device) -> bool:
    """Whether autograd's own order, which is right in any case, takes less than to wait for what others need."""
    return device.type == "cuda" and plan.rows - plan.seconds[plan.strategy] < _WAIT


def proof(
    graph: Graph, strategy: str, ys, xs, *, given: bool = False, sparse: bool = False, limited=False
) -> Plan:
    """The plan that tells whether samples are kept apart (``tied``), and that runs if it takes little memory.

    ``limited``: whether the call has a limit; then it is made under rough rates, and does not run.
    """
    budget = Budget.unbounded(xs[0].device)
    wanted = Wanted(budget, strategy, True, given=given, steady=limited, sparse=sparse)
    return plan_for(graph, ys, xs, wanted)


def plan_for_given(
    graph: Graph,
    seeds: list[int],
    columns: int,
    reverse: bool,
    *,
    budget: Budget,
    chunk_size: int | None = None,
    alone: bool = True,
) -> Plan:
    """`planner.plan_given` under the memory limit of a call, remembered as `plan_for` does."""
    device = budget.device

    def make(limit: float) -> Plan:
        how = {"limit": limit, "chunk_size": chunk_size, "device": device.type, "alone": alone}
        return plan_given(graph, seeds, columns, reverse, **how)

    kernels = backends.kernels_on(graph.values[seeds[0]].device)
    key = (
        graph.key, tuple(seeds), columns, reverse, chunk_size, device.type, kernels, budget.bound, alone
    )  # fmt: skip
    try:
        return _kept(key, make, budget, chunk_size)
    except MemoryLimitTooSmall as error:
        ends = {v for v in (graph.inputs if reverse else graph.outputs) if v is not None}
        size = sum(
            columns * prod(graph.values[v].shape) * graph.values[v].dtype.itemsize for v in ends
        )
        raise budget.refusal(ONE_SEED, error.need, size) from None


def _kept(
    key: tuple, make, budget: Budget, chunk_size: int | None, steady=False, plans=None
) -> Plan:
    """The plan that ``make(limit)`` gives, remembered by ``key`` where the memory that is free does not decide."""
    plans = _plans if plans is None else plans
    plan = plans.get(key)
    if plan is None:
        plan = plans[key] = make(inf if budget.bound is None else budget.bound)
        if budget.bound is None and not steady:
            hold(plan.peak, budget.device)
    if budget.bound is None and chunk_size is None and not budget.fits(plan.peak):
        return make(budget.left)
    return plan


def answer_bytes(ys, xs, per_sample: bool | str) -> int:
    """Bytes of all Jacobian blocks."""
    total = 0
    for y in ys:
        for x in xs:
            n = y.numel() * x.numel()
            total += (n // max(x.shape[0], 1) if per_sample else n) * x.element_size()
    return total


def prove_by_probe(graph: Graph, plan: Plan, ys, xs, budget: Budget) -> None:
    """Raise unless samples do not mix, where the algebra cannot tell (an opaque op, a loop over the samples)."""
    leak = probe_mixing(ys, xs, graph, room=budget.bounded)
    if leak is None:
        return
    value = graph.values[_culprit(graph, plan)]
    raise RuntimeError(
        f"per_sample=True, but samples mix: the op {value.op} (output {tuple(value.shape)}) does not keep the batch "
        f"axis, and {leak}. Drop per_sample for the whole Jacobian, or make the samples independent (BatchNorm: call "
        "net.eval())" + REMEDY
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
