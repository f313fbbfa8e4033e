"""The diagonal of a Jacobian: in which order it is accumulated, what that costs, and how it runs.

Elementwise functions have it in their layout, windows in coloured seeds. Else columns from the input meet rows from the
output in the middle of the graph, and ``diag_i = sum_v R[i, v] F[v, i]`` saves the last product, ``n`` times as large.
The middle need not be one value: what is cut are all edges that cross one place in the order of the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf, prod
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor

from ..base import backends
from ..base.cache import Cache
from ..base.memory import Budget, MemoryLimitTooSmall
from ..base.rates import block_bytes, rough
from ..maps.letters import Network, Operand, Unaligned
from ..plan.colours import colours_of
from ..plan.factoring import factored, swept
from ..plan.fusion import fused
from ..plan.needs import CACHE_BYTES, cut_seeds, needs
from ..plan.planner import predict, seconds
from ..plan.planning import ONE_SEED
from ..plan.poles import met, suspects
from ..plan.samples import untied_targets
from ..plan.supports import Trace, has_windows
from ..plan.sweep import Sweep, follow
from ..read.graph import Graph, Value
from ..run.entries import factors_of
from ..run.executor import chunks
from .contract import Sum, block, dense, plain, product


@dataclass(frozen=True, eq=False)
class DiagonalOrder:
    """``ahead`` is the sweep from the input, ``back`` that from the output, which meet at ``at``.

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

    @property
    def by_rows(self) -> bool:
        """Whether all goes from the output to the input, as autograd does."""
        return self.ahead is None

    def fitted(self, graph: Graph, chunk_size: int | None, budget: Budget) -> DiagonalOrder:
        """The same with the chunks of its sweeps. Raises MemoryLimitTooSmall."""
        answer = _bytes(graph)
        limit = budget.less(answer).limit(sum(s.bytes for s in self.sweeps))
        if limit == inf:
            return _ready(graph, self, chunk_size)
        return _cut(graph, self, limit, chunk_size)


class Order(Protocol):
    """What `cheapest` chooses between."""

    @property
    def seconds(self) -> float: ...

    @property
    def by_rows(self) -> bool: ...

    def fitted(self, graph: Graph, chunk_size: int | None, budget: Budget) -> Any: ...


def cheapest(graph: Graph, found: Sequence[Order], chunk_size: int | None, budget: Budget) -> Any:
    """The first order that fits the memory, of those from the cheapest on, ready to run. Raises MemoryLimitTooSmall."""
    if not found[0].by_rows and met(graph, suspects(graph, seeds=True)):
        found = [order for order in found if order.by_rows]
    least = inf
    for order in found:
        try:
            return order.fitted(graph, chunk_size, budget)
        except MemoryLimitTooSmall as error:
            least = min(least, error.need)
    answer = _bytes(graph)
    raise budget.refusal(ONE_SEED, least + answer, answer)


def _bytes(graph: Graph) -> float:
    """Of the diagonal."""
    x = graph.inputs[0]
    return float(prod(graph.values[x].shape) * graph.values[x].dtype.itemsize)


def diagonal(
    graph: Graph, chunk_size: int | None, budget: Budget, apart: Callable[[], bool]
) -> Tensor:
    """The diagonal of a graph from one input to one output, in its shape.

    ``apart``: finds out whether the samples of the first axis do not mix, at the cost of some backward passes.
    """
    found = orders(graph)
    fewer = summed(graph)
    if fewer and fewer[0].seconds * WORTH < found[0].seconds and apart():
        found = [*fewer, *found]
    return accumulated(graph, cheapest(graph, found, chunk_size, budget))


def accumulated(graph: Graph, order: DiagonalOrder) -> Tensor:
    """The diagonal by an order that is ready."""
    try:
        made = _met(graph, order) if order.at else _swept(graph, order)
    except Unaligned:
        made = _plain(graph)
    return made.reshape(graph.values[graph.inputs[0]].shape)


WORTH = 2.0
"""How much less time orders for samples that do not mix are to take, for it to be worth to find out."""

_known: Cache[tuple, list[DiagonalOrder]] = Cache()
_cut_orders: Cache[tuple[DiagonalOrder, int | None, bool], DiagonalOrder] = Cache()


def orders(graph: Graph) -> list[DiagonalOrder]:
    """All orders that are worth a look, the cheapest first."""
    return _known.of(graph.key, lambda: sorted(_found(graph), key=lambda order: order.seconds))


def summed(graph: Graph) -> list[DiagonalOrder]:
    """Orders for samples, of the first axis, that do not mix: their seeds are summed. None where ties tell as much."""
    return _known.of((graph.key, "summed"), lambda: _summed(graph))


def _summed(graph: Graph) -> list[DiagonalOrder]:
    x, y = graph.inputs[0], graph.outputs[0]
    shape = graph.values[x].shape
    if not shape or shape[0] < 2 or not untied_targets(graph, follow(graph, y, True, [x])):
        return []
    rates = rough(graph.values[x].device.type)
    found = [
        DiagonalOrder(None, swept(graph, y, True, [x], summed=True)),
        DiagonalOrder(swept(graph, x, False, [y], summed=True), None),
    ]
    found = [replace(order, seconds=seconds(order.sweeps, rates)) for order in found]
    return sorted(found, key=lambda order: order.seconds)


def _found(graph: Graph) -> list[DiagonalOrder]:
    x, y = graph.inputs[0], graph.outputs[0]
    rates = rough(graph.values[x].device.type)
    back, ahead = follow(graph, y, True, [x]), follow(graph, x, False, [y])
    found = [
        DiagonalOrder(None, factored(graph, back)),
        DiagonalOrder(factored(graph, ahead), None),
    ]
    if has_windows(graph):
        trace = Trace(graph, x)
        found += [w for s in (back, ahead) if (w := _coloured(graph, trace, s)) is not None]
    found = [replace(order, seconds=seconds(order.sweeps, rates)) for order in found]
    place = _middle(graph, ahead, back, rates)
    if place is not None:
        found.append(place)
    return found


def _coloured(graph: Graph, trace: Trace, sweep: Sweep) -> DiagonalOrder | None:
    """The sweep with fewer seeds, if every input is seen along the same axis of the output only."""
    splits, colours, _ = colours_of([trace], sweep, False)
    if not colours or splits:
        return None
    fewer = follow(graph, sweep.seed, sweep.reverse, sweep.targets, colours=colours)
    value = fewer.layouts[next(t for t in fewer.targets if t is not None)]
    seen = trace.values[graph.outputs[0]]
    masks = {}
    for a, _ in colours:
        ends = fewer.layout.axes[a], value.axes[a], trace.start.axes[a], seen.layout.axes[a]
        if any(len(axis) != 1 for axis in ends) or ends[2] != ends[3]:
            return None
        masks[a] = trace.support_of(seen, ends[2][0][1]).diagonal()
    ahead, back = (None, fewer) if sweep.reverse else (fewer, None)
    return DiagonalOrder(ahead, back, masks=masks)


def _middle(graph: Graph, ahead: Sweep, back: Sweep, rates) -> DiagonalOrder | None:
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
            numel = max(sweep.layouts[s].numel for sweep in (ahead, back))
            cost += costs[1].get(s, 0.0) + predict(
                2.0 * numel, numel * graph.values[s].dtype.itemsize, 1, rates
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
            return DiagonalOrder(ahead, back, place, at, seconds=cost)
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


def _ready(graph: Graph, order: DiagonalOrder, chunk_size: int | None) -> DiagonalOrder:
    """An order with its chunks where memory does not decide them, remembered."""
    kernels = backends.kernels_on(graph.values[graph.inputs[0]].device)
    return _cut_orders.of((order, chunk_size, kernels), lambda: _cut(graph, order, inf, chunk_size))


def _cut(graph: Graph, order: DiagonalOrder, limit: float, chunk_size: int | None) -> DiagonalOrder:
    """An order with the chunks of its sweeps, which both have in common. Raises MemoryLimitTooSmall."""
    parts = [(graph, order.ahead), (_above(graph, order.place), order.back)]
    parts = [(g, s) for g, s in parts if s is not None]
    factors = sorted({f for _, s in parts for lay in s.layouts.values() for f in lay.free})
    sizes = [parts[0][1].layout.seed[f] for f in factors]
    total = count = prod(sizes)
    # an end is a part of the Jacobian, which is not to be there as a whole
    widest = max(s.largest(g) for g, s in parts)
    most = block_bytes(graph.values[parts[0][1].seed].device.type, CACHE_BYTES)
    if chunk_size is not None:
        count = min(total, chunk_size)
    elif widest > 1.5 * most:
        count = max(1, int(total * most / widest))
    while True:
        chosen = cut_seeds(factors, sizes, count)
        sel = {f: (0, c) for f, c in chosen.items()}
        need = sum(needs(g, s, chosen, None)[1] for g, s in parts)
        for v in order.at:  # where they meet, blocks are multiplied
            need += sum(s.stored(graph, v, sel) for _, s in parts)
        if need <= limit:
            break
        if count <= 1 or chunk_size is not None:
            raise MemoryLimitTooSmall(f"{ONE_SEED} takes {need:.0f} bytes of {limit:.0f}", need)
        count = max(1, count // 2)
    ready = {s: fused(g, replace(s, chunks=chosen)) for g, s in parts}
    return replace(order, ahead=ready.get(order.ahead), back=ready.get(order.back))


def _swept(graph: Graph, order: DiagonalOrder) -> Tensor:
    (sweep,) = order.sweeps
    (target,) = (t for t in sweep.targets if t is not None)
    total = Sum()
    for sel, blocks in chunks(graph, sweep):
        network = Network()
        made = block(network, sweep, target, graph.values[target], blocks[target][0], sel)
        for axis, mask in order.masks.items():
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


def _met(graph: Graph, order: DiagonalOrder) -> Tensor:
    above = _above(graph, order.place)
    sums = {v: Sum() for v in order.at if v in order.ahead.layouts and v in order.back.layouts}
    both = zip(chunks(graph, order.ahead), chunks(above, order.back), strict=True)
    for (sel, one), (_, other) in both:
        for v, total in sums.items():
            network = Network()
            like = graph.values[v]
            left, right = (
                block(network, sweep, v, like, blocks[v][0], sel)
                for sweep, blocks in ((order.back, other), (order.ahead, one))
            )
            network.identify(left.ends[1], right.ends[1])
            network.identify(left.ends[0], right.ends[0])
            total.add(network, product(network, [left, right], (left.ends[0],)))
    return sum(dense(total.network, total.made) for total in sums.values())


def _plain(graph: Graph) -> Tensor:
    """With zeros written out, where ends have no letters in common."""
    target = graph.inputs[0]
    sweep = follow(graph, graph.outputs[0], True, [target])
    for _, blocks in chunks(graph, sweep):
        network = Network()
        made = plain(network, sweep, target, graph.values[target], blocks[target][0])
        network.identify(*made.ends)
        return dense(network, product(network, [made], (made.ends[0],))).clone()
