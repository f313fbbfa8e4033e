"""The entries of a Hessian that can be non-zero, by few products: one of each pair beside the diagonal is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import numpy as np
from torch import Tensor

from ..base.cache import Cache
from ..base.csr import Csr
from ..base.memory import Budget
from ..plan.compressing import Compression, joined
from ..plan.planning import Wanted, check_answer
from ..plan.supports import Trace, indices, known_by, pattern_of
from ..plan.symmetric import closed, halved
from ..prologue.arguments import Options
from ..prologue.running import computing
from ..read.behind import Outside
from ..read.graph import Graph, UnsupportedGraph
from ..run.banded import Banded
from ..run.blocks import Sizes
from ..run.formed import BLOCKED
from . import patterned, reentrant
from .patterned import Blocks
from .twice import of_torch


def rows(
    y: Tensor, gs: Sequence[Tensor], xs: Sequence[Tensor], asked: Options, start: int | None = None
) -> list[list]:
    """``H[i][j]`` of ``y``, in the form that is asked for: of its gradients ``gs``, which have a graph, by ``xs``.

    The pattern is ``asked.pattern``, or that of the graph of the gradients, with its transpose. ``start``: a sequence
    number; only what the caller can vary then has a graph (see `behind.Outside`).
    """
    if reentrant.in_backward():
        return reentrant.aside(lambda: _rows(y, gs, xs, asked, start))
    return _rows(y, gs, xs, asked, start)


def _rows(y: Tensor, gs, xs, asked: Options, start: int | None) -> list[list]:
    budget, per_sample = Budget(asked.memory_limit, xs[0].device), asked.per_sample
    if len({x.dtype for x in xs}) > 1:  # the dtype is that of the first of the two
        asked = replace(asked, strategy="forward-mode")
    with computing(asked.create_graph, asked.backend):
        if asked.form in BLOCKED:
            asked.blocksize = Sizes.asked(asked.blocksize, gs, xs, per_sample)
        if asked.form == "dense":
            check_answer(gs, xs, Wanted(budget, per_sample=per_sample), asked.what)
        graph = patterned.graph_of(gs, xs, asked, budget)
        if asked.pattern is None:
            blocks = _detected(graph, xs, bool(per_sample))
        else:
            blocks = closed(asked.pattern)
        if isinstance(graph, UnsupportedGraph) or not of_torch(y, xs):
            # the backward of somebody's Function, or what hooks make, may be no gradient: its matrix is not symmetric
            made = patterned.rows(gs, xs, replace(asked, pattern=blocks), budget, None)
        else:
            matrix, parts = joined(blocks)
            how = products_of(matrix, xs, asked)
            made = patterned.made(gs, xs, blocks, parts, how, graph, asked, budget, None)
    return made if start is None else [[_shown(b, start) for b in row] for row in made]


def products_of(matrix: Csr, xs, asked: Options) -> Compression:
    """How the entries of a pattern are read."""
    shape = tuple(xs[0].shape[bool(asked.per_sample) :]) if len(xs) == 1 else ()
    return halved(matrix, asked.strategy == "forward-mode", shape)


def _shown(block: Tensor | Banded, start: int) -> Tensor | Banded:
    if isinstance(block, Banded):
        return (
            block if Outside(block.values, start) else replace(block, values=block.values.detach())
        )
    return block if Outside(block, start) else block.detach()


# -- the pattern ------------------------------------------------------------------------------------

_known: Cache[tuple, Blocks] = Cache(8)


def _detected(graph: Graph | UnsupportedGraph, xs, per_sample: bool) -> Blocks:
    """The entries that the graph of gradients allows, symmetric. Raises ValueError where these are all."""
    if isinstance(graph, UnsupportedGraph):
        raise ValueError(
            f"the gradient of the function holds {graph}, of which no pattern is known; name the entries by pattern=, "
            "or use layout=torch.strided"
        )
    key = graph.key, known_by(graph), per_sample, tuple(x.shape for x in xs)
    return _known.of(key, lambda: _found(graph, xs, per_sample))


def _found(graph: Graph, xs, per_sample: bool) -> Blocks:
    sizes = [prod(x.shape[per_sample:]) for x in xs]
    told = indices(graph) is not None
    traces = [None if v is None else Trace(graph, v, told) for v in graph.inputs]
    blocks: Blocks = []
    op = None
    for end, m in zip(graph.outputs, sizes, strict=True):
        blocks.append([])
        for trace, n in zip(traces, sizes, strict=True):
            whole = None if trace is None or end is None or not m * n else pattern_of(trace, end)
            if whole is None:
                blocks[-1].append(Csr(np.zeros(m + 1, np.int64), np.zeros(0, np.int64), n))
                continue
            pattern = whole.sample(len(xs[0]), joined=True) if per_sample else whole
            if pattern is None:
                mixed = graph.values[trace.lost(end)]
                raise ValueError(
                    "a sparse Hessian for each sample needs samples that are known not to mix, and the op "
                    f"{mixed.op} (output {tuple(mixed.shape)}) of the gradient mixes them, as far as is known; drop "
                    "per_sample, or use layout=torch.strided"
                )
            if op is None and pattern.nnz == m * n:
                op = graph.values[trace.lost(end, per_sample and len(xs[0]) > 1)]
            blocks[-1].append(pattern.flat)
    made = closed(blocks)
    if op is not None and sum(b.nnz for row in made for b in row) == sum(sizes) ** 2 > 1:
        raise ValueError(
            "layout asks for a sparse result, but every entry of the Hessian can be non-zero, as far as is known: the "
            f"op {op.op} (output {tuple(op.shape)}) of the gradient mixes all that it is given; name the entries by "
            "pattern=, or use layout=torch.strided"
        )
    return made
