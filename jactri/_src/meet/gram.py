"""A Gram matrix of the Jacobian: in which order it is swept, what that costs, and how it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf, prod

import torch
from torch import Tensor

from ..base import backends
from ..base.cache import Cache
from ..base.memory import OFFER, Budget, MemoryLimitTooSmall, Offer
from ..base.rates import rough
from ..maps.letters import Axes, Network, Operand, Unaligned
from ..plan import mixed
from ..plan.factoring import swept
from ..plan.fusion import fused
from ..plan.needs import SLACK, choose_chunks
from ..plan.planner import predict, seconds
from ..plan.planning import ONE_SEED
from ..plan.poles import met, suspects
from ..plan.samples import narrow, places
from ..plan.sweep import Sweep
from ..read.graph import Graph
from ..run.answers import Store
from ..run.executor import chunks
from .contract import Sum, block, plain, product


@dataclass(frozen=True)
class GramRequest:
    """What a call asks for; ``forms`` are those of the weights."""

    kind: str
    forms: tuple[str, ...]
    per_sample: bool
    chunk_size: int | None
    budget: Budget
    offer: Offer = OFFER

    @property
    def dense(self) -> bool:
        return any(f.startswith("dense") for f in self.forms)


@dataclass(frozen=True, eq=False)
class GramOrder:
    """``near`` are the sweeps between the contracted ends and the outer ones, or a cut.

    ``far`` are those between the cut and the outer ones.

    ``summing``: the near seeds are at the contracted ends, and chunks of them are summed up.
    """

    cut: int | None
    near: list[Sweep]
    far: list[Sweep]
    summing: bool
    seconds: float = 0.0
    held: float = 0.0
    """Bytes of the blocks that are there as a whole."""
    result: float = 0.0
    """Bytes of the products, among them the answer, once more for what is made of it."""
    answer: float = 0.0
    plain: bool = False
    """Whether zeros are written out, as blocks have no letters in common."""

    @property
    def by_rows(self) -> bool:
        """Whether all goes from the outputs to the inputs, as autograd does."""
        return self.cut is None and all(s.reverse for s in self.near)


_Blocks = dict[tuple[int, int], tuple[Sweep, int, Tensor | None]]
"""(value, value) -> sweep, the value at its end, data: the block between both, whichever of them has the seed."""


_known: Cache[tuple, list[GramOrder]] = Cache()
_cut_orders: Cache[tuple[GramOrder, int | None, bool], GramOrder] = Cache()


def _orders(graph: Graph, asked: GramRequest, summed: bool) -> list[GramOrder]:
    """All orders that are worth a look, the cheapest first."""

    def make() -> list[GramOrder]:
        # a cut must be worth its further products
        orders = _found(graph, asked, summed)
        return sorted(orders, key=lambda o: o.seconds * (1 if o.cut is None else 1.2))

    return _known.of((graph.key, asked.kind, asked.forms, asked.per_sample, summed), make)


def _found(graph: Graph, asked: GramRequest, summed: bool) -> list[GramOrder]:
    reverse = asked.kind == "jtj"
    ends = [[v for v in dict.fromkeys(e) if v is not None] for e in (graph.outputs, graph.inputs)]
    contracted, outer = ends if reverse else ends[::-1]
    if not (contracted and outer):
        return []
    orders = []
    rates = rough(graph.values[outer[0]].device.type)
    for cut in [None, *(() if summed else _cuts(graph))]:
        far: list[Sweep] = []
        to = outer
        if cut is not None:
            to = [cut]
            seeded = [swept(graph, k, not reverse, [cut], index=i) for i, k in enumerate(outer)]
            far = min(
                [swept(graph, cut, reverse, list(outer))],
                seeded,
                key=lambda s: seconds(s, rates),
            )
        for chunked in (True, False):
            seeds, targets = (contracted, to) if chunked else (to, contracted)
            near = [
                swept(graph, v, reverse == chunked, list(targets), index=i, summed=summed)
                for i, v in enumerate(seeds)
            ]
            order = GramOrder(cut, near, far, chunked and not asked.dense)
            try:
                order, apart = _predicted(graph, order, asked)
                if apart or summed:
                    orders.append(order)
            except Unaligned:
                # it runs with zeros written out, which must not be those between samples
                if cut is None and (summed or not asked.per_sample):
                    orders.append(replace(order, seconds=inf, summing=False, plain=True))
    return orders


def _cuts(graph: Graph) -> list[int]:
    found = mixed.cuts(graph)
    return sorted(found, key=lambda v: prod(graph.values[v].shape))[: mixed.MOST_CUTS]


def _size(graph: Graph, sweeps: list[Sweep]) -> float:
    """Bytes of the blocks at the ends of sweeps."""
    return sum(sweep.ends(graph) for sweep in sweeps)


def _blocks(sweeps: list[Sweep], made=None) -> _Blocks:
    """The blocks between both ends of sweeps; ``made``: their data, by sweep and value."""
    out: _Blocks = {}
    for i, sweep in enumerate(sweeps):
        for t in sweep.targets:
            if t is not None:
                entry = sweep, t, None if made is None else made[i, t]
                out[sweep.seed, t] = out[t, sweep.seed] = entry
    return out


def _predicted(graph: Graph, order: GramOrder, asked: GramRequest) -> tuple[GramOrder, bool]:
    """An order with what it costs and holds; whether it keeps samples apart that are to be.

    Raises Unaligned where its blocks have no letters in common.
    """
    half = not asked.dense
    made = list(_products(graph, order, _blocks(order.near), None, asked, half=half))
    sums = summed_up(iter(made))
    if order.cut is not None:
        more = list(_around(graph, order, _blocks(order.far), sums[order.cut, order.cut], half))
        made += more
        sums = {**sums, **summed_up(iter(more))}
    size = {
        pair: prod(s.network.sizes[c] for c in s.made.dims) * graph.values[pair[0]].dtype.itemsize
        for pair, s in sums.items()
    }
    answer = sum(
        _whole(graph, a, b, asked.per_sample) * (1 + (half and a != b))
        for a, b in sums
        if a != order.cut
    )
    written = 2 * sum(size.values()) - size.get((order.cut, order.cut), 0.0)
    result = max(sum(size.values()), answer) + answer  # what is made symmetric is there twice
    rates = rough(graph.values[order.near[0].seed].device.type)
    flops = sum(network.flops for _, _, network, _ in made)
    took = seconds([*order.near, *order.far], rates) + predict(flops, written, len(made), rates)
    held = _size(graph, order.far) + (0.0 if order.summing else _size(graph, order.near))
    order = replace(order, seconds=took, held=held * (1 + SLACK), result=result, answer=answer)
    apart = not asked.per_sample or all(s.tied or not s.made.ends[0][0] for s in sums.values())
    return order, apart


def _whole(graph: Graph, a: int, b: int, per_sample: bool) -> float:
    """Bytes of the block of an answer between two outer values, zeros included."""
    first, second = graph.values[a].shape, graph.values[b].shape[per_sample:]
    return float(prod(first) * prod(second) * graph.values[a].dtype.itemsize)


_Made = Iterator[tuple[tuple[int, int], int, Network, Operand]]
"""(outer values, the contracted end, network, product)."""


def _products(
    graph: Graph,
    order: GramOrder,
    near: _Blocks,
    weights,
    asked: GramRequest,
    *,
    half: bool,
    sel=None,
    seed=None,
    plain=False,
) -> _Made:
    """The products of near blocks over every contracted end (or ``seed`` alone), for pairs of the others.

    Without weights, they have no data.
    """
    ends = graph.outputs if asked.kind == "jtj" else graph.inputs
    others = graph.inputs if asked.kind == "jtj" else graph.outputs
    to = (
        [order.cut]
        if order.cut is not None
        else [v for v in dict.fromkeys(others) if v is not None]
    )
    planned = weights is None
    for c, end in enumerate(ends):
        if end is None or seed not in (None, end):
            continue
        for a, b in pairs(to, half):
            if (end, a) not in near or (end, b) not in near:
                continue
            network = Network()
            left, right = (
                _block(network, graph, near[end, v], v, sel, planned=planned, written=plain)
                for v in (a, b)
            )
            weight = None if planned else weights[c]
            shape = graph.values[end].shape
            middle = weight_in(network, asked.forms[c], weight, shape, asked.per_sample)
            yield (a, b), c, network, between(network, left, middle, right)


def _around(graph: Graph, order: GramOrder, far: _Blocks, middle: Sum, half: bool) -> _Made:
    """The products at a cut, between far blocks."""
    outer = [v for v in dict.fromkeys(t for pair in far for t in pair) if v != order.cut]
    planned = middle.made.data is None
    for a, b in pairs(outer, half):
        network = Network()
        left, right = (
            _block(network, graph, far[order.cut, v], v, planned=planned) for v in (a, b)
        )
        inner = network.copy(middle.network, middle.made)
        yield (a, b), 0, network, between(network, left, inner, right)


def pairs(outer, half: bool):
    """All pairs of outer ends, or those of which the others are the transposes."""
    return [(a, b) for i, a in enumerate(outer) for b in outer[i if half else 0 :]]


Part = tuple[Operand, Axes, Axes]
"""A block in a network, its contracted end and its outer end."""


def between(network: Network, left: Part, middle: Operand, right: Part) -> Operand:
    """``left^T middle right``, where the left and the right are blocks from the outer end to the contracted one."""
    network.identify(left[1], middle.ends[0])
    network.identify(right[1], middle.ends[1])
    unit = not middle.dims and middle.data is None
    parts = [left[0], right[0]] if unit else [left[0], middle, right[0]]
    return product(network, parts, (left[2], right[2]))


def summed_up(made: _Made) -> dict[tuple[int, int], Sum]:
    """The sums over contracted ends, and over the chunks of each, by outer values."""
    parts: dict[tuple, Sum] = {}
    for pair, c, network, part in made:
        parts.setdefault((pair, c), Sum()).add(network, part)
    total: dict[tuple[int, int], Sum] = {}
    for (pair, _), of_end in parts.items():
        total.setdefault(pair, Sum()).merge(of_end)
    return total


def _block(
    network: Network, graph: Graph, entry, value: int, sel=None, *, planned: bool, written=False
) -> Part:
    """The block between a contracted end and ``value`` in a network."""
    sweep, target, data = entry
    like = graph.values[target]
    if written:
        operand = plain(network, sweep, target, like, data)
    else:
        operand = block(network, sweep, target, like, data, sel, planned)
    seed, end = operand.ends
    return (operand, end, seed) if sweep.seed == value else (operand, seed, end)


def weight_in(
    network: Network, form: str, weight: Tensor | None, shape, per_sample: bool
) -> Operand:
    """M; its ends are those of the contracted value, twice."""
    rows = network.axes(shape)
    if not form.startswith("dense"):
        columns = [list(axis) for axis in rows]
        axes = [] if form == "identity" else rows
    else:
        columns = network.axes(shape)
        if per_sample:
            columns[0] = list(rows[0])
        axes = [*rows, *columns[per_sample:]]
    if per_sample and form in ("dense", "diagonal"):
        axes = axes[1:]
    dims = [c for axis in axes for c in axis]
    return network.add(dims, (rows, columns), weight)


def gram(
    graph: Graph, weights, asked: GramRequest, summed: bool, half: bool
) -> dict[tuple[int, int], Tensor]:
    """The products, by pairs of outer values; of all pairs, or ``half``, which their transposes complete.

    ``summed``: a probe has shown that samples do not mix.
    """
    if asked.per_sample and not _orders(graph, asked, summed):
        summed = True  # shown by a plan, that none of the orders can follow
    largest = max((o.held + o.result for o in _orders(graph, asked, summed)), default=0.0)
    limit = asked.budget.limit(largest)
    return _run(graph, weights, asked, summed, half, limit)


def _run(
    graph: Graph, weights, asked: GramRequest, summed: bool, half: bool, limit: float
) -> dict[tuple[int, int], Tensor]:
    """The products, by pairs of outer values, by the cheapest order that the memory allows.

    Samples run in ranges if the cheapest order fits so and not else, before one that costs more is taken.
    """
    orders = _orders(graph, asked, summed)
    if not orders:
        return {}
    if not orders[0].by_rows and met(graph, suspects(graph, seeds=True)):
        orders = [o for o in orders if o.by_rows]
    ready = _fitting(graph, orders[:1], asked, limit)
    needs: list[float] = []
    if ready is None and asked.per_sample and not summed:
        made = _in_ranges(graph, orders[0], weights, asked, half=half, limit=limit, needs=needs)
        if made is not None:
            return made
    if ready is None:
        ready = _fitting(graph, orders, asked, limit, needs)
        if ready is None:
            raise asked.budget.refusal(ONE_SEED, min(needs), orders[0].answer, asked.offer)
    return _computed(graph, ready, weights, asked, half)


def _fitting(
    graph: Graph,
    orders: list[GramOrder],
    asked: GramRequest,
    limit: float,
    needs: list[float] | None = None,
) -> GramOrder | None:
    """The first order that fits the memory limit, with its chunks; what each of the others ``needs``."""
    for order in orders:
        try:
            if limit == inf:
                return _ready(graph, order, asked.chunk_size)
            return _cut(graph, order, limit, asked.chunk_size)
        except MemoryLimitTooSmall as error:
            if needs is not None:
                needs.append(order.held + order.result + error.need * (2 if order.summing else 1))
    return None


def _in_ranges(
    graph: Graph, order: GramOrder, weights, asked: GramRequest, *, half: bool, limit: float, needs
):
    """The products of ranges of samples, the longest that fit the memory limit; None where there are none.

    To ``needs`` is added what those of one sample need.
    """
    ends = [v for v in (*graph.inputs, *graph.outputs) if v is not None]
    n = graph.values[ends[0]].shape[0]
    where = places(graph, [*order.near, *order.far])
    if where is None or any(where.get(v) != (0, 1) for v in ends):
        return None
    limit -= order.answer
    count = n
    while count > 1:
        count = (count + 1) // 2
        part = narrow(graph, where, 0, count)
        if part is None:
            return None
        each: list[float] = []
        if _fitting(part, _orders(part, asked, False)[:1], asked, limit, each) is not None:
            break
    else:
        needs += [n + order.answer for n in each]
        return None
    parts = []
    for start in range(0, n, count):
        length = min(count, n - start)
        mine = [
            w.narrow(0, start, length) if form.endswith("sample") else w
            for w, form in zip(weights, asked.forms, strict=True)
        ]
        part = narrow(graph, where, start, length)
        parts.append(_run(part, mine, asked, False, half, limit))
    return {pair: torch.cat([p[pair] for p in parts]) for pair in parts[0]}


def _ready(graph: Graph, order: GramOrder, chunk_size: int | None) -> GramOrder:
    """An order with its chunks where memory does not decide them, remembered."""
    kernels = backends.kernels_on(graph.values[order.near[0].seed].device)
    return _cut_orders.of((order, chunk_size, kernels), lambda: _cut(graph, order, inf, chunk_size))


def _cut(graph: Graph, order: GramOrder, limit: float, chunk_size: int | None) -> GramOrder:
    """An order with the chunks of its sweeps. Raises MemoryLimitTooSmall."""
    free = limit - order.held - order.result
    device = graph.values[order.near[0].seed].device.type

    def chosen(sweep: Sweep, summing: bool) -> Sweep:
        def cut(device: str) -> Sweep:
            rest = free / 2 if summing else free  # the copy of a chunk for its product
            chunks, _ = choose_chunks(graph, sweep, rest, chunk_size=chunk_size, device=device)
            return replace(sweep, chunks=chunks)

        made = cut(device)
        if summing and len(made.selections()) * 2 * order.result > sweep.bytes:
            # to add up the result again and again costs more than blocks that leave the cache
            made = cut("any")
        return fused(graph, made)

    return replace(
        order,
        near=[chosen(s, order.summing) for s in order.near],
        far=[chosen(s, False) for s in order.far],
    )


def _computed(graph: Graph, order: GramOrder, weights, asked: GramRequest, half: bool):
    def chunked() -> _Made:
        for sweep in order.near:
            ends = [t for t in sweep.targets if t is not None]
            for sel, blocks in chunks(graph, sweep):
                near = _blocks([sweep], {(0, t): blocks[t][0] for t in ends})
                yield from _products(
                    graph, order, near, weights, asked, half=half, sel=sel, seed=sweep.seed
                )

    if order.summing:
        total = summed_up(chunked())
    else:
        near = _blocks(order.near, stored(graph, order.near))
        total = summed_up(
            _products(graph, order, near, weights, asked, half=half, plain=order.plain)
        )
    if order.cut is not None:
        far = _blocks(order.far, stored(graph, order.far))
        total = summed_up(_around(graph, order, far, total[order.cut, order.cut], half))
    return {pair: s.dense(asked.per_sample) for pair, s in total.items()}


def stored(graph: Graph, sweeps: list[Sweep]) -> dict[tuple[int, int], Tensor | None]:
    """The whole blocks at the ends of sweeps, by sweep and value; None where they are ones."""
    out = {}
    for i, sweep in enumerate(sweeps):
        ends = [t for t in dict.fromkeys(sweep.targets) if t is not None]
        if not sweep.chunks:
            for _, blocks in chunks(graph, sweep):
                out.update({(i, t): blocks[t][0] for t in ends})
            continue
        stores = {t: Store(sweep.layouts[t], graph.values[t]) for t in ends}
        for sel, blocks in chunks(graph, sweep, list(stores.items())):
            for t, store in stores.items():
                mine = {f: r for f, r in sel.items() if f not in sweep.layouts[t].tied}
                if not any(start for f, (start, _) in sel.items() if f not in mine):
                    store.put(*blocks[t], mine)
        out.update({(i, t): store.block() for t, store in stores.items()})
    return out
