"""Values that are read as their parts, and can be had as one map: where the blocks between would be too large.

A rule that knows of such a map notes it in ``others``, by the value at the end (see `graph.Graph`): one of each source,
which together are a `linear_map.Joint`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..base.memory import Budget
from ..base.rates import block_bytes
from ..base.tracing import tracing
from .graph import Graph, Value

CACHE_BYTES = 1 << 24
"""Bytes from which blocks are too large, on a CPU: below, the parts take as long or less."""

HELD = 3
"""Blocks between the ends that are there at once, at the least."""


def for_given(graph: Graph, columns: int) -> Graph:
    """The graph for so many tangents or cotangents that are given: with no ties, the parts save nothing."""

    def large(value: Value, entries: int) -> bool:
        most = block_bytes(value.device.type, CACHE_BYTES)
        return columns * entries * value.dtype.itemsize > most

    return _joined(graph, large)


def that_fits(graph: Graph) -> Graph:
    """The graph with those values joined whose parts no memory would hold, whatever is asked for."""

    def large(value: Value, entries: int) -> bool:
        return not Budget(None, value.device).fits(HELD * entries * value.dtype.itemsize)

    return _joined(graph, large)


def _joined(graph: Graph, large: Callable[[Value, int], bool]) -> Graph:
    """The graph with the other maps of values whose parts are large. None can be traced."""
    if not graph.others or tracing():
        return graph
    recorded = torch.is_grad_enabled()
    chosen = [
        v
        for v, (_, maps, entries) in graph.others.items()
        if large(graph.values[v], entries) and not (recorded and not all(m.twice for m in maps))
    ]
    if not chosen:
        return graph
    used = {v for v in (*graph.inputs, *graph.outputs) if v is not None}
    for v in reversed(range(len(graph.values))):
        if v in used:
            used.update(
                graph.others[v][0] if v in chosen else [s for s, _ in graph.values[v].sources]
            )
    values: list[Value] = []
    place: dict[int, int] = {}
    layers: dict[int, str] = {}

    for v, value in enumerate(graph.values):
        if v not in used:
            continue
        sources = value.sources
        if v in chosen:
            ends, maps, _ = graph.others[v]
            sources = tuple(zip(ends, maps, strict=True))
        moved_to = tuple([(place[s], m) for s, m in sources])
        place[v] = len(values)
        values.append(Value(value.op, value.shape, value.dtype, value.device, moved_to))
        if graph.layers and v in graph.layers:
            layers[place[v]] = graph.layers[v]

    def moved(ends):
        return [None if v is None else place[v] for v in ends]

    key = (graph.key, "joined", tuple(chosen))
    names = None if graph.layers is None else layers
    return Graph(values, moved(graph.inputs), moved(graph.outputs), key, names)
