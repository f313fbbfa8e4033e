"""The trace of a product of shared matrices and per-sample diagonals, in closed form.

A network of Linear layers with elementwise functions in between has the Jacobian ``W3 D2 W2 D1 W1``: only the diagonals
differ from sample to sample. Its trace is a product of lettered arrays (see `letters`), of which those that have no
sample are multiplied first:

    one diagonal:   tr(W2 D1 W1) = d1' diag(W1 W2)
    two diagonals:  tr(W3 D2 W2 D1 W1) = d2' [W2 * (W1 W3)'] d1

What is in brackets holds weights only, and is kept with them on a CPU (see `base.weights`). A sum of such terms (a
residual connection is one of them, with trace n) is summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.cache import Cache
from ..base.memory import Budget, MemoryLimitTooSmall
from ..base.rates import rough
from ..base.weights import made_of
from ..maps.contraction import MatMul
from ..maps.lettered import Lettered, multiply
from ..maps.letters import Letter, Letters, order
from ..maps.linear_map import Diagonal, Identity, LinearMap, Scale, View
from ..maps.selection import Place, Slice, Take
from ..plan.planner import predict
from ..read.graph import Graph
from .diagonal import Order, accumulated, cheapest, orders

MOST_TERMS = 8

SAMPLES: Letter = -1


@dataclass(frozen=True)
class Term:
    """A product from the input on. It holds no tensor.

    ``scales`` are values that only multiply by a number. ``matrices`` are the values whose maps make up a matrix, by
    its letters (in, out); ``diagonals`` those that are scaled one after the other, by their letter.
    """

    scales: tuple[int, ...]
    matrices: tuple[tuple[Letters, tuple[int, ...]], ...]
    diagonals: tuple[tuple[Letter, tuple[int, ...]], ...]
    sizes: tuple[tuple[Letter, int], ...]

    @cached_property
    def bracket(self) -> Letters:
        """The letters of what is made of weights alone."""
        return tuple(dict.fromkeys(letter for letter, _ in self.diagonals))


@dataclass(frozen=True, eq=False)
class ClosedForm:
    """A trace as a sum of terms; what it costs decides whether it is taken (see `diagonal.cheapest`)."""

    terms: list[Term]
    seconds: float
    bytes: float
    by_rows = True

    def fitted(self, graph: Graph, chunk_size: int | None, budget: Budget) -> ClosedForm:
        """The same: it has no chunks. Raises MemoryLimitTooSmall."""
        if not budget.fits(self.bytes):
            raise MemoryLimitTooSmall("a closed form", self.bytes)
        return self


class Ways(NamedTuple):
    """The orders that a trace can take, the cheapest first; ``closed``: a closed form is one, so samples are apart."""

    orders: Sequence[Order]
    closed: bool


_known: Cache[tuple, Ways] = Cache()


def ways(graph: Graph, batch: bool) -> Ways:
    """What is worth a look for a graph from one input to one output. Remembered."""
    device = graph.values[graph.inputs[0]].device.type
    forms = torch.is_grad_enabled() or device != "cpu"

    def make() -> Ways:
        found, terms = orders(graph), _terms(graph, batch)
        if terms is None:
            return Ways(found, closed=False)
        costs = [_cost(graph, term, forms) for term in terms]
        flops, written, steps = (sum(each) for each in zip(*costs, strict=True))
        form = ClosedForm(terms, predict(flops, written, steps, rough(device)), written)
        return Ways(sorted([form, *found], key=lambda order: order.seconds), closed=True)

    return _known.of((graph.key, batch, forms), make)


def trace(graph: Graph, found: Ways, batch: bool, chunk_size: int | None, budget: Budget) -> Tensor:
    """The trace of every sample, ``(N,)``, of samples that do not mix; without a batch of the whole, ``()``."""
    taken = cheapest(graph, found.orders, chunk_size, budget)
    if isinstance(taken, ClosedForm):
        total = reduce(torch.add, [_trace(graph, term) for term in taken.terms])
        x = graph.values[graph.inputs[0]]
        return total.expand(x.shape[0]) if batch else total.reshape(())
    entries = accumulated(graph, taken)
    return entries.flatten(1).sum(1) if batch else entries.sum()


def _cost(graph: Graph, term: Term, forms: bool) -> tuple[float, float, int]:
    """Flops, bytes written and steps of a term; ``forms``: with those of the bracket, which is not kept.

    As of a sweep, a scaling is one step, and what is read from the last block is not counted.
    """
    size, samples = dict(term.sizes), (SAMPLES,)
    flops, entries, steps = 0.0, 0.0, 0
    if term.matrices and forms:
        flops += order(tuple(ends for ends, _ in term.matrices), term.sizes, term.bracket)[1]
        entries += prod(size[c] for c in term.bracket)
        steps += len(term.matrices) - 1
    if term.matrices and term.diagonals:
        *near, far = (samples + (letter,) for letter, _ in term.diagonals)
        flops += order((far, term.bracket), term.sizes, near[0] if near else samples)[1]
        steps += 1
    for letter, values in term.diagonals:
        flops += size[SAMPLES] * size[letter] * len(values)
        entries += size[SAMPLES] * size[letter]
        steps += len(values)
    return flops, entries * graph.values[graph.inputs[0]].dtype.itemsize, steps


def _terms(graph: Graph, batch: bool) -> list[Term] | None:
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
            term = _term(graph, v, scales, batch)
            if term is None:
                return None
            found.append(term)
        if len(found) + len(stack) > MOST_TERMS:
            return None
    return found


def _term(graph: Graph, v: int, scales, batch: bool) -> Term | None:
    """What leads from the input to a value, from that back: a letter lies between two matrices."""
    values, x = graph.values, graph.inputs[0]
    n = values[x].shape[0] if batch else 1
    matrices: list[tuple[Letters, list[int]]] = []
    diagonals: list[tuple[Letter, list[int]]] = []
    letter, sizes = 0, {SAMPLES: n, 0: prod(values[x].shape) // n}
    while v != x:
        if len(values[v].sources) != 1:
            return None
        ((s, edge),) = values[v].sources
        before, after = values[s].shape, values[v].shape
        if batch and (not before or not after or before[0] != n or after[0] != n):
            return None
        flat = len(before) == 2 and before[0] == n and len(after) == 2
        scaled = bool(diagonals) and diagonals[-1][0] == letter
        if isinstance(edge, Scale):
            scales = (*scales, v)
        elif isinstance(edge, Diagonal):
            if not scaled:
                diagonals.append((letter, []))
            diagonals[-1][1].append(v)
        elif flat and _shared(edge):
            if scaled or not matrices:
                matrices.append(((letter + 1, letter), []))
                letter += 1
            matrices[-1][1].insert(0, v)
            sizes[letter] = before[1]
        elif not isinstance(edge, View | Identity):
            return None
        v = s
    if len(diagonals) > 2:
        return None

    def closed(c: Letter) -> Letter:
        """The input's letter is the output's."""
        return 0 if c == letter else c

    return Term(
        tuple(scales),
        tuple(((closed(a), closed(b)), tuple(part)) for (a, b), part in reversed(matrices)),
        tuple((closed(c), tuple(part)) for c, part in reversed(diagonals)),
        tuple(sorted(sizes.items())),
    )


def _shared(edge: LinearMap) -> bool:
    """Whether an edge between values ``(N, features)`` is one matrix for all samples."""
    if isinstance(edge, MatMul):
        return edge.side == "right" and edge.structure == "shared matrix"
    return isinstance(edge, Place | Slice | Take) and edge.axis == 1


def _edge(graph: Graph, value: int) -> Any:
    return graph.values[value].sources[0][1]


def _trace(graph: Graph, term: Term) -> Tensor:
    like, (_, n), (_, width) = graph.values[graph.inputs[0]], *term.sizes[:2]
    operands: list[Lettered] = []
    # from the output on, as a pull goes: what comes to a selection may be infinite
    if term.diagonals:
        letter, values = term.diagonals[-1]
        operands.append((_scaled(graph, values, None, n), (SAMPLES, letter)))
    if term.matrices:
        operands.append((_bracket(graph, term), term.bracket))
    if not operands:
        out = torch.full((), width, dtype=like.dtype, device=like.device)
    elif len(term.diagonals) < 2:
        out = multiply(operands, (SAMPLES,) if term.diagonals else ())
    else:
        letter, values = term.diagonals[0]
        out = _scaled(graph, values, multiply(operands, (SAMPLES, letter)), n).sum(1)
    factor = prod([_edge(graph, v).factor for v in term.scales])
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


def _bracket(graph: Graph, term: Term) -> Tensor:
    """What is made of weights alone, its dims the letters of the diagonals; kept with them where it can be."""
    like = graph.values[graph.inputs[0]]
    edges = [[_edge(graph, v) for v in values] for _, values in term.matrices]
    partners = [e.partner for part in edges for e in part if isinstance(e, MatMul)]
    bases = tuple(_base(p) for p in partners)

    def make() -> Tensor:
        letters = [ends for ends, _ in term.matrices]
        made = [_matrix(part, like) for part in edges]
        return multiply(list(zip(made, letters, strict=True)), term.bracket)

    if not bases or None in bases:
        return make()
    key = (
        "trace", tuple(ends for ends, _ in term.matrices), term.bracket,
        tuple(tuple(e.key for e in part) for part in edges),
        tuple((tuple(p.shape), p.stride(), p.storage_offset()) for p in partners),
    )  # fmt: skip
    return made_of(bases[0], key, make, lambda core: (core,), given=bases[1:])


def _matrix(part: list[Any], like) -> Tensor:
    """The product of maps as a matrix ``(in, out)``."""
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
