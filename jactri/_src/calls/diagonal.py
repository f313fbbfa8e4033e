"""`diagonal`: the derivatives ``d out_i / d x_i``, without the Jacobian.

Elementwise functions have it in their layout, windows in coloured seeds. Else columns from the input meet rows from the
output in the middle of the graph, and ``diag_i = sum_v R[i, v] F[v, i]`` saves the last product, ``n`` times as large.
The middle need not be one value: what is cut are all edges that cross one place in the order of the values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf, prod
from typing import Any

import numpy
import torch
from torch import Tensor

from ..base import backends
from ..base.cache import Cache
from ..base.classes import dressed
from ..base.elsewhere import check_local
from ..base.memory import Budget, MemoryLimitTooSmall
from ..base.rates import block_bytes, rough
from ..maps.letters import Network, Operand, Unaligned
from ..meet.contract import Sum, block, dense, plain, product
from ..plan.fusion import fused
from ..plan.pattern import Trace, colours_of, has_windows
from ..plan.planner import CACHE_BYTES, cut_seeds, needs, predict, seconds
from ..plan.planning import ONE_SEED
from ..plan.poles import met, suspects
from ..plan.sweep import Sweep, follow, itemsize
from ..prologue.arguments import as_tuple, check_options
from ..prologue.running import computing, detached, eagerly, prepare, public
from ..read import handover
from ..read.graph import Graph, UnsupportedGraph, Value
from ..read.opaque import refuse_or_log
from ..read.reading import read
from ..run.entries import factors_of
from ..run.executor import chunks
from .vectors import pull
from .whole import rows_at_once


@public
def diagonal(
    func: Callable[..., Any],
    x: Tensor,
    create_graph: bool = False,
    *,
    return_output: bool = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
) -> Any:
    """The diagonal of the Jacobian, ``d out_i / d x_i``, for a ``func`` whose output has the shape of ``x``.

    Args:
        func: takes ``x``, a floating-point tensor of any shape, and returns one of its shape.
        create_graph: the result can be differentiated.
        return_output: return ``(output, result)``; the output is detached unless ``create_graph``.
        chunk_size: how many seeds run at once.
        memory_limit: bytes (or ``"2GB"``) that the call may allocate after ``func`` has run, the result included.
        backend: as for `jacobian`.

    Returns:
        A tensor of the shape, dtype and device of ``x``.

    Raises:
        TypeError: an ``x`` or an output that is not a tensor.
        RuntimeError: an integer ``x``; an output that is complex, or of another shape than ``x``.
        ValueError: ``chunk_size`` below 1, a ``memory_limit`` too small for one seed, an unknown backend.

    Cost:
        An elementwise function: its derivative. A convolutional network: a sweep of as many seeds as an output sees
        inputs. Else at most the sweeps of a Jacobian whose samples are kept apart, less its most expensive product;
        memory for chunks of it only.
    """
    check_options("auto", chunk_size, None, create_graph)
    if not isinstance(x, Tensor):
        raise TypeError(f"x of diagonal must be a Tensor, got {type(x)}")
    backends.check_asked(backend, x.device, create_graph)
    if handover.transforming((x,)):
        output, made = handover.diagonal(eagerly(func), x, check_shape, chunk_size)
        return (output, made) if return_output else made
    ys, (leaf,), tupled, result = prepare(func, (x,), create_graph)
    check_shape(result if not tupled else ys, x)
    with computing(create_graph, backend):
        made = diagonal_of(ys[0], leaf, chunk_size, Budget(memory_limit, leaf.device))
    made = dressed(made, (result, x))
    if not return_output:
        return made
    return (result if create_graph else detached(result)), made


def check_shape(y, x: Tensor) -> None:
    """Raise unless ``y`` is a tensor of the shape of ``x``."""
    as_tuple(y, "outputs of the user-provided function", "diagonal")
    if isinstance(y, tuple):
        raise TypeError(
            f"diagonal needs a function that returns one tensor, got a tuple of {len(y)}"
        )
    if y.shape != x.shape:
        raise RuntimeError(
            f"diagonal needs an output of the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}"
        )
    if y.is_complex():
        raise RuntimeError(
            f"the output of diagonal is complex ({y.dtype}): its Jacobian is not one real-linear matrix; return its "
            "real or its imaginary part"
        )


@dataclass(frozen=True, eq=False)
class Way:
    """How to compute: ``ahead`` is the sweep from the input, ``back`` that from the output, which meet at ``at``.

    One of them is None where the other goes all the way. ``place``: the last value before the place where all crossing
    edges are cut. ``masks``: for coloured seeds, by axis, where the diagonal is in the pattern.
    """

    ahead: Sweep | None
    back: Sweep | None
    place: int = -1
    at: tuple[int, ...] = ()
    masks: dict[int, numpy.ndarray] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def sweeps(self) -> list[Sweep]:
        return [s for s in (self.ahead, self.back) if s is not None]


def diagonal_of(y: Tensor, x: Tensor, chunk_size: int | None, budget: Budget) -> Tensor:
    """The diagonal of a recorded computation, differentiable in grad mode."""
    try:
        graph = read((y,), (x,))
    except UnsupportedGraph as reason:
        refuse_or_log("the function", y.shape, [x.shape], f"holds {reason}")
        return _by_rows(y, x, chunk_size or rows_at_once(y, (x,), y.numel(), budget))
    if graph.inputs[0] is None or graph.outputs[0] is None:
        return torch.zeros_like(x)
    ways = _ways(graph)
    if ways[0].ahead is not None and met(graph, suspects(graph, seeds=True)):
        ways = [w for w in ways if w.ahead is None]
    size = float(x.numel() * x.element_size())
    limit = budget.less(size).limit(sum(s.bytes for s in ways[0].sweeps))
    needs = []
    for way in ways:
        try:
            ready = (
                _ready(graph, way, chunk_size)
                if limit == inf
                else _cut(graph, way, limit, chunk_size)
            )
        except MemoryLimitTooSmall as error:
            needs.append(error.need)
            continue
        try:
            made = _computed(graph, ready)
        except Unaligned:
            made = _plain(graph, ways)
        return made.to(x.dtype).reshape(x.shape)
    raise budget.refusal(ONE_SEED, min(needs) + size, size)


_known: Cache[tuple, list[Way]] = Cache()
_cut_ways: Cache[tuple[Way, int | None, bool], Way] = Cache()


def _ways(graph: Graph) -> list[Way]:
    """All ways that are worth a look, the cheapest first."""
    return _known.of(graph.key, lambda: sorted(_found(graph), key=lambda w: w.seconds))


def _found(graph: Graph) -> list[Way]:
    x, y = graph.inputs[0], graph.outputs[0]
    rates = rough(graph.values[x].device.type)
    back, ahead = follow(graph, y, True, [x]), follow(graph, x, False, [y])
    ways = [Way(None, back), Way(ahead, None)]
    if has_windows(graph):
        trace = Trace(graph, x)
        ways += [w for s in (back, ahead) if (w := _coloured(graph, trace, s)) is not None]
    ways = [replace(way, seconds=seconds(way.sweeps, rates)) for way in ways]
    place = _middle(graph, ahead, back, rates)
    if place is not None:
        ways.append(place)
    return ways


def _coloured(graph: Graph, trace: Trace, sweep: Sweep) -> Way | None:
    """The sweep with fewer seeds, if every input is seen along the same axis of the output only."""
    splits, colours = colours_of([trace], sweep, False)
    if not colours or splits:
        return None
    fewer = follow(graph, sweep.seed, sweep.reverse, sweep.targets, 0, False, None, colours)
    value = fewer.layouts[next(t for t in fewer.targets if t is not None)]
    seen = trace.values[graph.outputs[0]]
    masks = {}
    for a, _ in colours:
        ends = fewer.layout.axes[a], value.axes[a], trace.start.axes[a], seen.layout.axes[a]
        if any(len(axis) != 1 for axis in ends) or ends[2] != ends[3]:
            return None
        masks[a] = trace.support_of(seen, ends[2][0][1]).diagonal().copy()
    ends = (None, fewer) if sweep.reverse else (fewer, None)
    return Way(*ends, masks=masks)


def _middle(graph: Graph, ahead: Sweep, back: Sweep, rates) -> Way | None:
    """The cheapest place for two sweeps to meet, or None where there is nothing in between."""
    x, y = ahead.seed, back.seed
    on = sorted(v for v in ahead.layouts if v in back.layouts)
    last: dict[int, int] = {}
    for v in on:
        last.update((s, v) for s, _ in graph.values[v].sources if s in ahead.layouts)
    costs = [
        {s.value: predict(s.flops, s.bytes, 1, rates) for s in sweep.steps}
        for sweep in (ahead, back)
    ]
    before, behind = 0.0, sum(costs[1].values())
    best: tuple[float, int, tuple[int, ...]] | None = None
    crossing: set[int] = set()
    for v in on[:-1]:
        before += costs[0].get(v, 0.0)
        behind -= costs[1].get(v, 0.0)
        crossing = {s for s in crossing if last[s] > v}
        if last.get(v, v) > v:
            crossing.add(v)
        cost = before + behind
        for s in crossing:
            numel = max(sweep.layouts[s].numel() for sweep in (ahead, back))
            cost += costs[1].get(s, 0.0) + predict(
                2.0 * numel, numel * itemsize(graph, s), 1, rates
            )
        if v != x and (best is None or cost < best[0]):
            best = cost, v, tuple(sorted(crossing))
    if best is None:
        return None
    cost, place, at = best
    above = _above(graph, place)
    splits: dict[int, tuple[int, ...]] = {}
    for _ in range(4):
        ahead = follow(graph, x, False, list(at), splits=splits)
        back = follow(above, y, True, list(at), splits=_splits(ahead))
        if ahead.layout == back.layout:
            return Way(ahead, back, place, at, seconds=cost)
        splits = _splits(back)
    return None


def _splits(sweep: Sweep) -> dict[int, tuple[int, ...]]:
    axes = enumerate(sweep.layout.axes)
    return {a: tuple(n for n, _ in axis) for a, axis in axes if len(axis) > 1}


def _above(graph: Graph, place: int) -> Graph:
    """The graph from a place on: what is before it has no sources."""
    if place < 0:
        return graph
    values = [
        Value(v.op, v.shape, v.dtype, v.device, ()) if i <= place else v
        for i, v in enumerate(graph.values)
    ]
    return Graph(values, graph.inputs, graph.outputs, (graph.key, place), graph.layers)


def _ready(graph: Graph, way: Way, chunk_size: int | None) -> Way:
    """A way with its chunks where memory does not decide them, remembered."""
    kernels = backends.kernels_on(graph.values[graph.inputs[0]].device)
    return _cut_ways.of((way, chunk_size, kernels), lambda: _cut(graph, way, inf, chunk_size))


def _cut(graph: Graph, way: Way, limit: float, chunk_size: int | None) -> Way:
    """A way with the chunks of its sweeps, which both have in common. Raises MemoryLimitTooSmall."""
    parts = [(graph, way.ahead), (_above(graph, way.place), way.back)]
    parts = [(g, s) for g, s in parts if s is not None]
    factors = sorted({f for _, s in parts for lay in s.layouts.values() for f in lay.free})
    sizes = [parts[0][1].layout.seed[f] for f in factors]
    total = count = prod(sizes)
    # an end is a part of the Jacobian, which is not to be there as a whole
    widest = max(lay.numel() * itemsize(graph, v) for _, s in parts for v, lay in s.layouts.items())
    most = block_bytes(graph.values[parts[0][1].seed].device.type, CACHE_BYTES)
    if chunk_size is not None:
        count = min(total, chunk_size)
    elif widest > 1.5 * most:
        count = max(1, int(total * most / widest))
    while True:
        chosen = cut_seeds(factors, sizes, count)
        sel = {f: (0, c) for f, c in chosen.items()}
        need = sum(needs(g, s, chosen, None) for g, s in parts)
        for v in way.at:  # where they meet, blocks are multiplied
            need += sum(s.layouts[v].numel(sel) * itemsize(graph, v) for _, s in parts)
        if need <= limit:
            break
        if count <= 1 or chunk_size is not None:
            raise MemoryLimitTooSmall(f"{ONE_SEED} takes {need:.0f} bytes of {limit:.0f}", need)
        count = max(1, count // 2)
    ready = {s: fused(g, replace(s, chunks=chosen)) for g, s in parts}
    return replace(way, ahead=ready.get(way.ahead), back=ready.get(way.back))


def _computed(graph: Graph, way: Way) -> Tensor:
    if way.at:
        return _met(graph, way)
    (sweep,) = way.sweeps
    (target,) = (t for t in sweep.targets if t is not None)
    total = Sum()
    for sel, blocks in chunks(graph, sweep):
        network = Network()
        made = block(network, sweep, target, graph.values[target], blocks[target][0], sel)
        for axis, mask in way.masks.items():
            _pick(network, made, sweep, axis, mask)
        seed, value = made.ends
        network.identify(seed, value)
        total.add(network, product(network, [made], (seed,)))
    return dense(total.network, total.made).clone()


def _pick(network: Network, block: Operand, sweep: Sweep, axis: int, mask: numpy.ndarray) -> None:
    """Of the seeds of one colour, take that of the same index as the value's, along an axis.

    Where that is not in the chunk, or the diagonal not in the pattern (``mask``), there is zero.
    """
    n = len(mask)
    _, colour = factors_of(sweep)[sum(len(a) for a in sweep.layout.axes[:axis])]
    (value,) = block.ends[1][axis]
    at, place = block.dims.index(colour), block.dims.index(value)
    start, length = network.chunk.pop(colour, (0, network.sizes[colour]))
    index = torch.arange(n, device=block.data.device)
    wanted = index % network.sizes[colour] - start
    there = (wanted >= 0) & (wanted < length) & torch.from_numpy(mask).to(index.device)
    picked = block.data.movedim((at, place), (0, 1))[wanted.clamp(0, length - 1), index]
    there = there.view(n, *[1] * (picked.dim() - 1))
    block.data = torch.where(there, picked, torch.zeros_like(picked))
    block.dims = [value, *(c for c in block.dims if c not in (colour, value))]
    block.ends[0][axis] = [value]


def _met(graph: Graph, way: Way) -> Tensor:
    above = _above(graph, way.place)
    sums = {v: Sum() for v in way.at if v in way.ahead.layouts and v in way.back.layouts}
    both = zip(chunks(graph, way.ahead), chunks(above, way.back), strict=True)
    for (sel, one), (_, other) in both:
        for v, total in sums.items():
            network = Network()
            like = graph.values[v]
            left, right = (
                block(network, sweep, v, like, blocks[v][0], sel)
                for sweep, blocks in ((way.back, other), (way.ahead, one))
            )
            network.identify(left.ends[1], right.ends[1])
            network.identify(left.ends[0], right.ends[0])
            total.add(network, product(network, [left, right], (left.ends[0],)))
    return sum(dense(total.network, total.made) for total in sums.values())


def _plain(graph: Graph, ways: list[Way]) -> Tensor:
    """With zeros written out, where ends have no letters in common."""
    way = next(w for w in ways if not w.at and not w.masks)
    (sweep,) = way.sweeps
    (target,) = (t for t in sweep.targets if t is not None)
    for _, blocks in chunks(graph, replace(sweep, chunks={})):
        network = Network()
        made = plain(network, sweep, target, graph.values[target], blocks[target][0])
        network.identify(*made.ends)
        return dense(network, product(network, [made], (made.ends[0],))).clone()


def _by_rows(y: Tensor, x: Tensor, count: int) -> Tensor:
    """By autograd, some rows at a time."""
    check_local((y,), (x,))
    n = x.numel()
    parts = []
    for start in range(0, n, count):
        k = min(count, n - start)
        index = torch.arange(k, device=x.device)
        rows = torch.zeros(k, n, dtype=y.dtype, device=y.device)
        rows[index, start + index] = 1
        (made,) = pull((y,), (x,), [rows.reshape(k, *y.shape)], torch.is_grad_enabled())
        parts.append(made.reshape(k, n)[index, start + index])
    return torch.cat(parts).reshape(x.shape) if parts else torch.zeros_like(x)
