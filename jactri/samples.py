"""Samples of a batch: whether they influence one another, and the computation of a range of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .graph import Graph, Value
from .layout import FREE
from .linear_map import Cut
from .sweep import Sweep


def halves(n: int, device) -> Iterator[Tensor]:
    """Masks over ``n`` samples such that every two samples are told apart by one of them, both ways round."""
    index = torch.arange(n, device=device)
    for bit in range(max(n - 1, 0).bit_length()):
        mask = (index >> bit) & 1 == 1
        yield mask
        yield ~mask


def probe_mixing(outputs, inputs) -> bool:
    """Whether some output of one sample has a derivative in the input of another.

    A random cotangent on half of the samples must leave exactly zero gradient on the other half. The halves are
    the bits of the sample's number, so any two samples are separated: ``2 log2(N)`` backward passes an output. A
    NaN counts as mixing. The caller's random state is not used.
    """
    n = outputs[0].shape[0]
    for y in outputs:
        if not y.requires_grad:
            continue
        gen = torch.Generator(device=y.device).manual_seed(0)
        noise = torch.rand(y.shape, generator=gen, device=y.device, dtype=torch.float32).add_(0.5)
        for mask in halves(n, y.device):
            weight = (noise * mask.view(-1, *([1] * (y.dim() - 1)))).to(y.dtype)
            grads = torch.autograd.grad(y, inputs, weight, retain_graph=True, allow_unused=True)
            for g in grads:
                if g is not None and bool((g[~mask.to(g.device)] != 0).any()):
                    return True
    return False


def places(graph: Graph, sweeps: list[Sweep]) -> dict[int, tuple[int, int]] | None:
    """Where the samples are in every value of the sweeps: (axis, entries of the axis a sample), or None.

    None unless the samples stay tied to the seed, in order, through every sweep: then ranges of them can be run one
    after the other.
    """
    where: dict[int, tuple[int, int]] = {}
    for sweep in sweeps:
        if len(sweep.layout.axes[0]) != 1 or sweep.layout.axes[0][0][1] == FREE:
            return None
        batch = sweep.layout.axes[0][0][1]
        for value, layout in sweep.layouts.items():
            place = None
            for a, axis in enumerate(layout.axes):
                if axis[0][1] == batch:
                    place = a, layout.shape[a] // axis[0][0]
            if place is None or where.setdefault(value, place) != place:
                return None
    return where


def narrow(
    graph: Graph, where: dict[int, tuple[int, int]], start: int, length: int
) -> Graph | None:
    """The graph of samples ``start`` to ``start + length``, or None where a map cannot be cut."""
    cuts = {v: Cut(a, start * n, length * n) for v, (a, n) in where.items()}
    values, key = [], []
    for v, value in enumerate(graph.values):
        if v not in cuts:  # on no way from an input to an output
            values.append(value)
            key.append(None)
            continue
        sources = []
        for s, edge in value.sources:
            if s in cuts:
                edge = edge.narrow(cuts[s], cuts[v], graph.values[s].shape, value.shape)
                if edge is None:
                    return None
                sources.append((s, edge))
        shape = cuts[v].shape(value.shape)
        values.append(Value(value.op, shape, value.dtype, value.device, tuple(sources)))
        key.append((value.op, shape, value.dtype, tuple((s, m.key) for s, m in sources)))
    return Graph(values, graph.inputs, graph.outputs, (tuple(key), graph.key), graph.layers)
