"""Products of weights alone, formed once: what follows a convolution or a matrix, with nothing but weights between.

A convolution and the batch norm after it (in eval) are one convolution with a scaled weight; two convolutions with
nothing between, or two matrices, are one where that costs fewer flops a seed. What is formed is kept for as long as the
weights are equal to what they were (see `base.weights`). On a GPU, where nothing made of weights is kept, nothing is
folded: kernels scale in registers.
"""

from __future__ import annotations

from collections import Counter
from math import prod

import torch
from torch import Tensor

from ..base.weights import made_of
from ..maps.contraction import MatMul
from ..maps.convolution import Conv
from ..maps.linear_map import Diagonal, LinearMap
from ..read.graph import Graph, Value

_EARLIER = frozenset((Conv, MatMul))
_LATER = _EARLIER | {Diagonal}
"""Maps of which two may be one."""


def fold(graph: Graph) -> Graph:
    """The graph with such pairs as one value; as it is where there are none, or a graph of the result is built."""
    if torch.is_grad_enabled():
        return graph
    uses: Counter | None = None
    values, pairs = graph.values, []
    for v, value in enumerate(graph.values):
        sources = value.sources
        if len(sources) != 1 or sources[0][1].__class__ not in _LATER:
            continue
        middle, after = sources[0]
        before = values[middle]
        if len(before.sources) != 1 or before.sources[0][1].__class__ not in _EARLIER:
            continue
        start, first = before.sources[0]
        if after.__class__ is Diagonal and after.along != 1:
            continue
        if before.device.type != "cpu" or before.dtype != value.dtype:
            continue
        if uses is None:
            uses = Counter(s for u in graph.values for s, _ in u.sources)
            uses.update(u for u in (*graph.inputs, *graph.outputs) if u is not None)
        if uses[middle] != 1:
            continue
        shapes = values[start].shape, before.shape, value.shape
        made = _folded(first, after, *shapes, _seeds(graph))
        if made is None:
            continue
        if values is graph.values:
            values = list(values)
        op = f"{before.op} + {value.op}"
        values[v] = Value(op, value.shape, value.dtype, value.device, ((start, made),))
        values[middle] = Value(before.op, before.shape, before.dtype, before.device, ())
        pairs.append((middle, v))
    if not pairs:
        return graph
    layers = graph.layers
    if layers is not None:
        layers = dict(layers)
        for middle, v in pairs:
            layers[v] = " + ".join(n for n in (layers.get(middle), layers.get(v)) if n)
    found = Graph(values, graph.inputs, graph.outputs, (graph.key, tuple(pairs)), layers)
    found.recorded = graph
    return found


def _seeds(graph: Graph) -> float:
    """How many a sample has, about."""
    ends = [
        [graph.values[v].shape for v in end if v is not None]
        for end in (graph.inputs, graph.outputs)
    ]
    samples = max(1, min((s[0] for end in ends for s in end if s), default=1))
    return min(sum(map(prod, end)) for end in ends) / samples


def _folded(
    first: LinearMap, after: LinearMap, start, middle, end, seeds: float
) -> LinearMap | None:
    """Both as one map, between values of the shapes ``start``, ``middle`` and ``end``; None where that does not pay.

    Whether a weight changed is known by reading it and its copy: where scaling a block costs less, it is not done.
    """
    made: LinearMap | None = None
    if isinstance(first, Conv):
        if isinstance(after, Diagonal):
            if prod(first.shape) > seeds * prod(end):
                return None
            return first.scaled(after.d.reshape(-1).expand(middle[1]))
        made = first.then(after) if isinstance(after, Conv) else None
    elif isinstance(first, MatMul) and isinstance(after, MatMul):
        made = _product(first, after)
    if made is None:
        return None
    apart = sum(
        m.work(a, b, False) * prod(b) for m, a, b in ((first, start, middle), (after, middle, end))
    )
    return made if made.work(start, end, False) * prod(end) < apart else None


def _product(first: MatMul, after: MatMul) -> MatMul | None:
    p, q = first.partner, after.partner
    if not (first.uniform and after.uniform and _weight(p) and _weight(q)):
        return None
    (rows, inner), columns = p.shape, q.shape[1]
    if rows * columns >= inner * (rows + columns):
        return None
    key = "product", q.shape, q.stride(), q.storage_offset()
    made = made_of(p, key, lambda: p.detach() @ q.detach(), lambda m: (m,), (q,))
    return MatMul(made, "right")


def _weight(t: Tensor) -> bool:
    """A leaf or a view of one: not a value of this call."""
    return t.is_leaf or (t._base is not None and t._base.is_leaf)
