"""Blocks of tangents and cotangents of some values, taken through a graph edge by edge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ..read.graph import Graph


def push(graph: Graph, blocks: dict[int, Tensor], end: int) -> Tensor:
    """Tangents ``(K, *value)`` of some values as those of ``end``."""
    last: dict[int, int] = {}
    for v, value in enumerate(graph.values):
        for s, _ in value.sources:
            last[s] = v
    live = dict(blocks)
    for v in range(end + 1):
        total = None
        for s, edge in graph.values[v].sources:
            if s in live:
                t, _ = edge.push(live[s], False)
                total = t if total is None else total + t
        if total is not None:
            live[v] = live[v] + total if v in live else total
        for s, _ in graph.values[v].sources:
            if last[s] == v and s != end:
                live.pop(s, None)
    return live[end]


def pull(graph: Graph, blocks: dict[int, Tensor], ends: set) -> dict[int, Tensor]:
    """Cotangents ``(K, *value)`` of some values as those of ``ends``."""
    live = dict(blocks)
    for v in range(max(live), -1, -1):
        if v not in live or not graph.values[v].sources:
            continue
        c = live[v] if v in ends else live.pop(v)
        for s, edge in graph.values[v].sources:
            t, _ = edge.pull(c, False)
            live[s] = live[s] + t if s in live else t
    return live


def pull_outputs(
    graph: Graph, cotangents: Sequence[Tensor | None], ends: Iterable[int | None]
) -> dict[int, Tensor]:
    """One cotangent of each of a graph's outputs (None: zero), as cotangents of the values ``ends``."""
    blocks: dict[int, Tensor] = {}
    for v, c in zip(graph.outputs, cotangents, strict=True):
        if v is not None and c is not None:
            c = c.unsqueeze(0)
            blocks[v] = blocks[v] + c if v in blocks else c
    ends = set(ends)
    found = pull(graph, blocks, ends) if blocks else {}
    return {v: block.squeeze(0) for v, block in found.items() if v in ends}
