"""Values that are read as their parts, and can be had as one map: where the blocks between would be too large.

A rule that knows of such a map notes it in ``others``, by the value at the end (see `graph.Graph`). The map is from the
entries of all its sources, sample by sample one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch

from ..base.memory import Budget
from ..base.rates import block_bytes
from ..base.tracing import tracing
from ..maps.linear_map import Shape, View
from ..maps.selection import Place
from .graph import Graph, Source, Value

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
    """The graph with the other maps of values whose parts are large. None can be differentiated, or traced."""
    if not graph.others or torch.is_grad_enabled() or tracing():
        return graph
    chosen = [v for v, (_, _, entries) in graph.others.items() if large(graph.values[v], entries)]
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

    def append(like: Value, shape: Shape, sources: tuple[Source, ...]) -> int:
        values.append(Value(like.op, shape, like.dtype, like.device, sources))
        return len(values) - 1

    for v, value in enumerate(graph.values):
        if v not in used:
            continue
        begun = len(values)
        if v in chosen:
            ends, edge, _ = graph.others[v]
            shapes = [graph.values[s].shape for s in ends]
            total = sum(prod(shape[1:]) for shape in shapes)
            start, pieces = 0, []
            for s, shape in zip(ends, shapes, strict=True):
                flat = shape[0], prod(shape[1:])
                piece = append(value, flat, ((place[s], View(shape, flat)),))
                pieces.append((piece, Place(1, start, flat[1], 1, total)))
                start += flat[1]
            whole = append(value, (value.shape[0], total), tuple(pieces))
            sources: tuple[Source, ...] = ((whole, edge),)
        else:
            sources = tuple([(place[s], m) for s, m in value.sources])
        place[v] = append(value, value.shape, sources)
        if graph.layers and v in graph.layers:
            layers.update(dict.fromkeys(range(begun, len(values)), graph.layers[v]))

    def moved(ends):
        return [None if v is None else place[v] for v in ends]

    key = (graph.key, "joined", tuple(chosen))
    names = None if graph.layers is None else layers
    return Graph(values, moved(graph.inputs), moved(graph.outputs), key, names)
