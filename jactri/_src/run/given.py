"""Products of a graph with blocks of tangents or cotangents that are given: `vectors.push` and `vectors.pull`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ..base.memory import Budget
from ..maps.linear_map import Identity
from ..plan.planning import plan_for_given
from ..read.graph import Graph, Value
from .answers import Store
from .executor import run


def multiply(
    graph: Graph,
    blocks: Sequence[Tensor | None],
    reverse: bool,
    *,
    budget: Budget,
    chunk_size: int | None = None,
    keep: bool = False,
) -> list[Tensor | None]:
    """``J t`` of blocks ``(K, *x)``, one an input, or ``c J`` of blocks ``(K, *y)``, one an output (``reverse``).

    None among the blocks stands for zeros, and in the result for an end that nothing reaches. ``keep``: whether
    derivatives are kept with the graph, for other products.
    """
    starts, ends = (graph.outputs, graph.inputs) if reverse else (graph.inputs, graph.outputs)
    columns = next(len(b) for b in blocks if b is not None)
    total: list[Tensor | None] = [None] * len(ends)
    for part, given in _apart(graph, starts, blocks, reverse):
        plan = plan_for_given(
            part, list(given), columns, reverse, budget=budget, chunk_size=chunk_size, alone=not keep
        )  # fmt: skip
        (sweep,) = plan.sweeps
        stores = {
            k: Store(sweep.layouts[v], part.values[v])
            for k, v in enumerate(sweep.targets)
            if v is not None
        }
        answers = {(0, k) if reverse else (k, 0): s for k, s in stores.items()}
        run(part, plan, answers, None, given)
        for k, store in stores.items():
            made = store.block()
            total[k] = made if total[k] is None else total[k] + made
    return total


def _apart(
    graph: Graph, starts: Sequence[int | None], blocks: Sequence[Tensor | None], reverse: bool
) -> Iterator[tuple[Graph, dict[int, Tensor]]]:
    """The graph and the given blocks, by value, of the sweeps to run: in a sweep, no seed lies on another's way."""
    seeds = [(v, b) for v, b in zip(starts, blocks, strict=True) if v is not None and b is not None]
    if len(seeds) < 2:
        if seeds:
            yield graph, dict(seeds)
    elif reverse:
        # every output gets a copy of itself at the end, which nothing else depends on
        values, n = list(graph.values), len(graph.values)
        for v, _ in seeds:
            old = values[v]
            values.append(Value("output", old.shape, old.dtype, old.device, ((v, Identity()),)))
        key = (graph.key, tuple(v for v, _ in seeds))
        ends = list(range(n, n + len(seeds)))
        whole = Graph(values, graph.inputs, ends, key, graph.layers)
        yield whole, {n + i: b for i, (_, b) in enumerate(seeds)}
    else:
        leaves: dict[int, Tensor] = {}
        for v, block in seeds:
            if not graph.values[v].sources:
                leaves[v] = leaves[v] + block if v in leaves else block
        if leaves:
            yield graph, leaves
        yield from ((graph, {v: block}) for v, block in seeds if graph.values[v].sources)
