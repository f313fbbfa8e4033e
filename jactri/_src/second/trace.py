"""The trace of a product of shared matrices and per-sample diagonals, in closed form.

A network of Linear layers with elementwise functions in between has the Jacobian ``W3 D2 W2 D1 W1``: only the diagonals
differ from sample to sample. With ``tr(A B) = sum(A * B')``:

    one diagonal:   tr(W2 D1 W1) = d1' diag(W1 W2)
    two diagonals:  tr(W3 D2 W2 D1 W1) = d2' [W2 * (W1 W3)'] d1

What is in brackets holds weights only, and is kept with them on a CPU (see `kept`). A sum of such terms (a residual
connection is one of them, with trace n) is summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..base import backends
from ..base.cache import Cache
from ..base.kept import kept
from ..maps.contraction import MatMul
from ..maps.linear_map import Diagonal, Identity, LinearMap, Scale, View
from ..maps.selection import Place, Slice, Take
from ..read.graph import Graph

MOST_TERMS = 8


@dataclass(frozen=True)
class Chain:
    """A product from the input on. It holds no tensor.

    ``scales`` are values that only multiply by a number. ``matrices[i]`` are the values whose maps make up the matrix
    before diagonal i, ``diagonals[i]`` those that are scaled by it; there is one matrix more than diagonals.
    """

    scales: tuple[int, ...]
    matrices: tuple[tuple[int, ...], ...]
    diagonals: tuple[tuple[int, ...], ...]


_known: Cache[tuple, list[Chain] | None] = Cache()


def chains(graph: Graph, batch: bool) -> list[Chain] | None:
    """The terms of a graph from one input to one output, or None where it is not of this form. Remembered."""
    return _known.of((graph.key, batch), lambda: _terms(graph, batch))


def _terms(graph: Graph, batch: bool) -> list[Chain] | None:
    values, found = graph.values, []
    stack: list[tuple[int, tuple[int, ...]]] = [(graph.outputs[0], ())]
    while stack:
        v, scales = stack.pop()
        sources = values[v].sources
        if len(sources) > 1 and all(isinstance(e, Identity) for _, e in sources):
            stack += [(s, scales) for s, _ in sources]
        elif len(sources) == 1 and isinstance(sources[0][1], Scale):
            stack.append((sources[0][0], (*scales, v)))
        else:
            chain = _chain(graph, v, scales, batch)
            if chain is None:
                return None
            found.append(chain)
        if len(found) + len(stack) > MOST_TERMS:
            return None
    return found


def _chain(graph: Graph, v: int, scales, batch: bool) -> Chain | None:
    values, x = graph.values, graph.inputs[0]
    n = values[x].shape[0] if batch else 1
    matrices: list[list[int]] = [[]]
    diagonals: list[list[int]] = []
    while v != x:
        if len(values[v].sources) != 1:
            return None
        ((s, edge),) = values[v].sources
        before, after = values[s].shape, values[v].shape
        if batch and (not before or not after or before[0] != n or after[0] != n):
            return None
        flat = len(before) == 2 and before[0] == n and len(after) == 2
        if isinstance(edge, Scale):
            scales = (*scales, v)
        elif isinstance(edge, Diagonal):
            if matrices[-1] or not diagonals:
                diagonals.append([])
                matrices.append([])
            diagonals[-1].append(v)
        elif flat and (
            (
                isinstance(edge, MatMul)
                and edge.side == "right"
                and edge.structure == "shared matrix"
            )
            or (isinstance(edge, Place | Slice | Take) and edge.axis == 1)
        ):
            matrices[-1].append(v)
        elif not isinstance(edge, View | Identity):
            return None
        v = s
    if len(diagonals) > 2:
        return None
    forward = [tuple(reversed(part)) for part in reversed(matrices)]
    return Chain(scales, tuple(forward), tuple(tuple(d) for d in reversed(diagonals)))


def traces(graph: Graph, found: list[Chain], batch: bool) -> Tensor:
    """The sum of the traces of all terms, ``(N,)``; without a batch ``()``."""
    x = graph.values[graph.inputs[0]]
    n = x.shape[0] if batch else 1
    total = None
    for chain in found:
        term = _trace(graph, chain, n, prod(x.shape) // n)
        total = term if total is None else total + term
    return total.expand(n) if batch else total.reshape(())


def _edge(graph: Graph, value: int) -> LinearMap:
    return graph.values[value].sources[0][1]


def _trace(graph: Graph, chain: Chain, n: int, width: int) -> Tensor:
    values = graph.values
    like = values[graph.inputs[0]]
    factor = prod([_edge(graph, v).factor for v in chain.scales])
    edges = [[_edge(graph, v) for v in part] for part in chain.matrices]
    core = _core(edges, like, width)
    # from the output on, as a pull goes: what comes to a selection may be infinite
    if not chain.diagonals:
        out = core
    elif len(chain.diagonals) == 1:
        out = _scaled(graph, chain.diagonals[0], None, n) @ core
    else:
        near, far = chain.diagonals
        rows = backends.product(_scaled(graph, far, None, n), core, True)
        out = _scaled(graph, near, rows, n).sum(1)
    return out if factor == 1 else out * factor


def _scaled(graph: Graph, part: tuple[int, ...], rows: Tensor | None, n: int) -> Tensor:
    """Rows (None: of ones), scaled by diagonals that follow one another."""
    for v in part:
        edge, shape = _edge(graph, v), graph.values[v].shape
        if rows is None:
            rows = edge.d.expand(shape)
        else:
            rows = edge.pull(rows.view(1, *shape), False)[0]
        rows = rows.reshape(n, -1)
    return rows


def _core(edges: list[list[LinearMap]], like, width: int) -> Tensor:
    """What is made of weights alone: the trace of one matrix ``()``, or the brackets ``(h,)`` and ``(h1, h2)``."""
    partners = [e.partner for part in edges for e in part if isinstance(e, MatMul)]
    bases = tuple(_base(p) for p in partners)

    def make() -> Tensor:
        parts = [_matrix(part, like) for part in edges]
        if len(parts) == 1:
            return like_ones(like, width).sum() if parts[0] is None else parts[0].trace()
        first, last = parts[0], parts[-1]
        if len(parts) == 2:
            if first is None or last is None:
                m = last if first is None else first
                return like_ones(like, width) if m is None else m.diagonal()
            return (first * last.t()).sum(0)
        if first is None or last is None:
            around = last if first is None else first
            if around is None:
                return torch.diag(parts[1].diagonal())
        else:
            around = last @ first
        return parts[1] * around.t()

    if not bases or None in bases:
        return make()
    key = (
        "trace", tuple(tuple(e.key for e in part) for part in edges),
        tuple((tuple(p.shape), p.stride(), p.storage_offset()) for p in partners),
    )  # fmt: skip
    return kept(bases[0], key, make, lambda core: (core,), given=bases[1:])


def like_ones(like, n: int) -> Tensor:
    return torch.ones(n, dtype=like.dtype, device=like.device)


def _matrix(part: list[LinearMap], like) -> Tensor | None:
    """The product of maps as a matrix ``(in, out)``; None for none."""
    made = None
    for edge in part:
        if isinstance(edge, MatMul):
            made = edge.partner if made is None else made @ edge.partner
            continue
        if made is None:
            n = (
                edge.size
                if isinstance(edge, Slice | Take) and not isinstance(edge, Place)
                else edge.length
            )
            made = torch.eye(n, dtype=like.dtype, device=like.device)
        made = edge.push(made.unsqueeze(1), False)[0].squeeze(1)
    return made


def _base(partner: Tensor) -> Tensor | None:
    """The leaf that a partner is a view of."""
    base = partner._base if partner._is_view() else partner
    return base if base is not None and base.is_leaf else None
