"""Cotangents through a graph, edge by edge: without a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from .graph import Graph


def pulled(
    graph: Graph, cotangents: Sequence[Tensor | None], ends: Iterable[int | None]
) -> dict[int, Tensor]:
    """One cotangent of each of a graph's outputs (None: zero), as cotangents of the values ``ends``, edge by edge."""
    rows = [None if c is None else c.unsqueeze(0) for c in cotangents]
    return {v: block.squeeze(0) for v, block in blocks_pulled(graph, rows, ends).items()}


def blocks_pulled(
    graph: Graph, cotangents: Sequence[Tensor | None], ends: Iterable[int | None]
) -> dict[int, Tensor]:
    """`pulled` of blocks ``(K, *value)``."""
    live: dict[int, Tensor] = {}

    def add(v: int, c: Tensor) -> None:
        live[v] = live[v] + c if v in live else c

    for v, c in zip(graph.outputs, cotangents, strict=True):
        if v is not None and c is not None:
            add(v, c)
    kept = set(ends)
    for v in range(max(live, default=-1), -1, -1):
        if v in live and graph.values[v].sources:
            c = live[v] if v in kept else live.pop(v)
            for s, edge in graph.values[v].sources:
                add(s, edge.pull(c, False)[0])
    return {v: block for v, block in live.items() if v in kept}
