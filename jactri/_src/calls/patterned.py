"""Jacobians by few products, of which the pattern is known: a caller's ``pattern=``, or that of a sparse layout.

With ``check``, products with two tangents, of which nothing is left out, are held against the entries.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from math import prod

import numpy as np
import torch
from torch import Tensor

from ..base.cache import Cache
from ..base.constants import firm
from ..base.csr import Csr
from ..base.memory import Budget
from ..base.progress import bar
from ..base.tracing import tracing
from ..plan.compressing import Compression, compressed, each_row, joined, two_sided, worth_both
from ..plan.folding import fold
from ..plan.owners import apart
from ..plan.patches import convolves
from ..plan.pattern import Pattern
from ..plan.planning import Wanted, check_answer, plan_for, proof, prove_by_probe
from ..plan.poles import suspects
from ..plan.supports import MOST, Trace, indices, pattern_of
from ..prologue.arguments import ASSUME, HESSIAN, Options
from ..read.graph import Graph, UnsupportedGraph
from ..read.reading import read
from ..read.unrecorded import tight
from ..run.compressed import kept
from ..run.entries import nothing
from ..run.formed import Formed, Unformed
from . import whole
from .compressed import entries, has_poles, multiplied
from .pieces import run_piece

ROWS = 64
"""Rows in which a pattern may miss an entry are looked at so many together."""

Blocks = list[list[Csr]]
"""By output and input."""

Parts = list[list[np.ndarray]]
"""Where the entries of each block are among those of all (see `joined`)."""


def rows(ys, xs, asked: Options, budget: Budget, dests) -> list[list]:
    """``J[j][i]`` of a computation by the caller's pattern, ``asked.pattern``."""
    per_sample = asked.per_sample
    for name, ends in (("outputs", ys), ("inputs", xs)):
        for k, t in enumerate(ends):
            if t.is_complex():
                raise RuntimeError(
                    f"pattern= is of real Jacobians, but {name}[{k}] is {t.dtype}; pass torch.view_as_real of it, or "
                    "leave pattern out"
                )
    if asked.form == "dense" and dests is None:
        check_answer(ys, xs, Wanted(budget, per_sample=per_sample, of=asked.of), asked.what)
    graph = graph_of(ys, xs, asked, budget)
    matrix, parts = joined(asked.pattern)
    grids = [tuple(e[0].shape[bool(per_sample) :]) for e in (ys, xs) if len(ys) == len(xs) == 1]
    strategy = asked.strategy
    if isinstance(graph, UnsupportedGraph):
        if not graph.linear:  # as hooks that clip: what a sum of rows gives is no sum
            how = each_row(matrix)
            return made(ys, xs, asked.pattern, parts, how, graph, asked, budget, dests)
        if graph.graph is not None or not graph.twice:  # a tangent would take all rows
            strategy = "reverse-mode"
    how = compressed(matrix, strategy, *grids)
    return made(ys, xs, asked.pattern, parts, how, graph, asked, budget, dests)


def by_both(graph: Graph, ys, xs, asked: Options, budget: Budget) -> list[list] | None:
    """The sparse Jacobian by columns and rows, where at most half as many products do as of columns or of rows alone.

    None where they do not, or a direction is asked for.
    """
    told = indices(graph)
    if told is None or asked.strategy not in ("auto", "mixed"):
        return None
    if not all(t.numel() for t in (*ys, *xs)):
        return None
    sizes = (*(y.shape for y in ys), *(x.shape for x in xs))
    key = graph.key, told, bool(asked.per_sample), sizes
    found = _both.of(key, lambda: _look(graph, ys, xs, bool(asked.per_sample)))
    return None if found is None else made(ys, xs, *found, graph, asked, budget, None)


_both: Cache[tuple, tuple[Blocks, Parts, Compression] | None] = Cache(8)


def _look(graph: Graph, ys, xs, per_sample: bool) -> tuple[Blocks, Parts, Compression] | None:
    """The pattern by blocks, where their entries are in the whole, and how these are read."""
    traces = [None if v is None else Trace(graph, v, True) for v in graph.inputs]
    found: list[list[Pattern]] = []
    for end, y in zip(graph.outputs, ys, strict=True):
        found.append([])
        for trace, x in zip(traces, xs, strict=True):
            pattern = None if trace is None or end is None else pattern_of(trace, end)
            if pattern is None:
                m, n = (t.shape[per_sample:].numel() for t in (y, x))
                pattern = Pattern.of(Csr(np.zeros(m + 1, np.int64), np.zeros(0, np.int64), n))
            elif per_sample and (pattern := pattern.sample(len(x), joined=True)) is None:
                return None
            found[-1].append(pattern)
    most = worth_both(found)
    if most is None or sum(p.nnz for row in found for p in row) > MOST:
        return None
    blocks = [[p.flat for p in row] for row in found]
    matrix, parts = joined(blocks)
    how = two_sided(matrix, most)
    return None if how is None else (blocks, parts, how)


def made(
    ys, xs, blocks: Blocks, parts: Parts, how: Compression, graph: Graph | UnsupportedGraph, asked: Options,
    budget: Budget, dests,
) -> list[list]:  # fmt: skip
    """The answer by its entries, tested if that is asked for."""
    per_sample = bool(asked.per_sample)
    samples = len(xs[0]) if per_sample else 1
    later = asked.unformed and tracing() and isinstance(graph, Graph) and has_poles(how, graph)
    if not samples or not all(any(t.numel() for t in ends) for ends in (ys, xs)):
        values = xs[0].new_zeros(samples, how.pattern.nnz)  # none
    else:
        budget = budget.less(samples * how.pattern.nnz * xs[0].element_size())
        with ExitStack() as stack:
            told = stack.enter_context(bar(how.products)) if asked.progress else None
            found = None
            if told is None and isinstance(graph, Graph):
                found = _by_patches(graph, ys, xs, how.pattern, asked, budget)
            values = entries(
                ys, xs, how, graph,
                budget=budget, chunk_size=asked.chunk_size, samples=samples, progress=told,
                later=later,
            ) if found is None else found.reshape(samples, -1)  # fmt: skip
        if asked.check:
            with torch.no_grad():
                _check(ys, xs, how.pattern, graph, values.detach(), budget, asked)
    forward = asked.strategy == "forward-mode"
    keys = tuple(tuple(b.key for b in row) for row in blocks)
    answer: list[list] = []
    for j, y in enumerate(ys):
        answer.append([])
        for i, x in enumerate(xs):
            pattern, size, like = blocks[j][i], asked.block(j, i), y if forward else x
            dest = dests[j][i] if dests else None
            if asked.unformed or (pattern.nnz and values.numel()):
                given = y.shape, x.shape, per_sample, pattern, asked.form, size, like, dest
                mine = values
                if pattern is not how.pattern:
                    at = kept(("part of a pattern", keys, j, i), parts[j][i], values.device)
                    mine = values.index_select(1, at)
                form = Formed.known(*given)
                block = Unformed(mine, form, later) if asked.unformed else form.of_values(mine)
            elif asked.form == "dense":
                block = whole.zero_block(y, x, per_sample, like, dest)
            else:
                block = nothing(asked.form, y, x, per_sample, like, size)
            answer[j].append(block)
    return answer


def _by_patches(
    graph: Graph, ys, xs, pattern: Csr, asked: Options, budget: Budget
) -> Tensor | None:
    """The entries by patches, where a sweep of images can be by them, the pattern is its own, and they are cheaper."""
    limited = asked.chunk_size is not None or budget.given is not None
    if limited or asked.create_graph:
        return None
    if len(ys) > 1 or len(xs) > 1 or None in (*graph.inputs, *graph.outputs):
        return None
    if not _convolves.of(graph.key, lambda: convolves(graph)):
        return None
    if tracing() and suspects(graph, seeds=True):  # which a plan looks at
        return None
    per_sample = asked.per_sample
    if not _own.of(
        (graph.key, pattern.key, indices(graph), bool(per_sample), ys[0].shape, xs[0].shape),
        lambda: _is_own(graph, pattern, bool(per_sample)),
    ):
        return None
    graph = fold(graph)
    wanted = Wanted(
        budget, asked.strategy, per_sample, chunk_size=asked.chunk_size, sparse=True, of=asked.of
    )
    plan = plan_for(graph, ys, xs, wanted)
    if not any(s.windows for s in plan.sweeps):
        return None
    asked = replace(asked, form="csr", blocksize=None)
    (found,) = run_piece(graph, plan, None, ys, xs, asked, None, None).values()
    return found.values()


_convolves: Cache[tuple, bool] = Cache()
_own: Cache[tuple, bool] = Cache(8)


def _is_own(graph: Graph, pattern: Csr, per_sample: bool) -> bool:
    trace = Trace(graph, graph.inputs[0], indices(graph) is not None)
    found = pattern_of(trace, graph.outputs[0])
    if found is not None and per_sample:
        found = found.sample(graph.values[graph.inputs[0]].shape[0])
    return found is not None and found.nnz == pattern.nnz and found.flat.key == pattern.key


def graph_of(ys, xs, asked: Options, budget: Budget) -> Graph | UnsupportedGraph:
    """The graph, or why there is none. Raises where samples are to be apart and are not."""
    per_sample = asked.per_sample
    try:
        graph = read(ys, xs, handles=asked.handles)
    except UnsupportedGraph as reason:
        whole.check(ys, xs, per_sample, reason, budget)
        return reason.with_traceback(None)  # which holds what surrounds it
    if per_sample and per_sample != ASSUME:
        plan = proof(graph, "auto", ys, xs, limited=budget.given is not None)
        if not plan.tied and not apart(graph):
            prove_by_probe(graph, plan, ys, xs, budget)
    return graph


# -- a pattern that is too small --------------------------------------------------------------------


def _check(
    ys, xs, matrix: Csr, graph: Graph | UnsupportedGraph, values: Tensor, budget: Budget, asked: Options
) -> None:  # fmt: skip
    """Raise ValueError for an entry outside of the pattern that is not zero, as two products without it tell.

    Rows that are not finite are not compared.
    """
    samples, device, per_sample = len(values), values.device, bool(asked.per_sample)
    of = "gradient" if asked.what == HESSIAN else "output"
    row = firm(
        (2, sum(x.numel() for x in xs)), xs[0]
    )  # alike nowhere: what takes another's place shows
    parts = row.split([x.numel() for x in xs], 1)
    tangents = [p.reshape(2, *x.shape).to(x) for p, x in zip(parts, xs, strict=True)]
    exact = _flat(multiplied(ys, xs, tangents, False, graph, budget), samples, device)
    wide = torch.promote_types(torch.promote_types(exact.dtype, values.dtype), torch.float32)
    exact, values = exact.to(wide), values.to(wide)
    row, column = (torch.from_numpy(t).to(device) for t in (matrix.row, matrix.column))
    terms = values * _flat(tangents, samples, device).to(wide)[:, :, column]
    zeros = terms.new_zeros(2, samples, matrix.height)
    found, size = (zeros.index_add(2, row, t) for t in (terms, terms.abs()))
    size = size + exact.abs()
    gap = (found - exact).abs()
    kinds = {t.dtype for t in (*ys, *xs)}
    if isinstance(graph, Graph):
        kinds |= {v.dtype for v in graph.values if v.dtype.is_floating_point}
    near, eps = max(map(tight, kinds)), max(torch.finfo(k).eps for k in kinds)
    noise = min(64 * eps, 0.02) * size.nan_to_num(0, 0, 0).amax()
    off = torch.where(gap.isfinite(), gap - near * size - noise, 0).amax(0)
    count = int((off > 0).sum())
    if not count:
        return
    worst = off.flatten().argsort(descending=True)[:count]
    for some in worst.split(ROWS):
        _name(ys, xs, matrix, graph, budget, some, samples, near, per_sample, of)
    s, r = divmod(int(worst[0]), matrix.height)
    raise ValueError(
        f"check=True: by pattern, a product with {asked.what} is off by {float(gap[:, s, r].max()):.3g} in "
        f"{_at(r, ys, of, per_sample, s)}, though no entry that is not zero is missing in pattern there; "
        "jactri.check(func, inputs) tells whether the function computes the same twice"
    )


def _name(
    ys, xs, matrix: Csr, graph: Graph | UnsupportedGraph, budget: Budget, some: Tensor, samples: int, near: float,
    per_sample: bool, name: str,
) -> None:  # fmt: skip
    """Raise for the largest entry of some rows that is outside of the pattern, if one is not zero."""
    sample, row = some // matrix.height, some % matrix.height
    each = torch.arange(len(some), device=some.device)
    units = torch.zeros(len(some), samples, matrix.height, dtype=ys[0].dtype, device=some.device)
    units[each, sample, row] = 1
    parts = units.split([y.numel() // samples for y in ys], 2)
    cotangents = [u.reshape(len(some), *y.shape).to(y) for u, y in zip(parts, ys, strict=True)]
    pulled = multiplied(ys, xs, cotangents, True, graph, budget)
    exact = _flat(pulled, samples, some.device)[each, sample]
    size = exact.abs().nan_to_num(0, 0, 0)
    there = matrix.take(row.cpu().numpy())
    least = near * size.amax(1, keepdim=True)
    size[torch.from_numpy(there.row), torch.from_numpy(there.column)] = 0
    size = torch.where(size > least, size, 0)
    k, c = divmod(int(size.argmax()), matrix.width)
    if not size[k, c]:
        return
    at = int(sample[k])
    of, by = _at(int(row[k]), ys, name, per_sample, at), _at(c, xs, "input", per_sample, at)
    raise ValueError(
        f"pattern leaves out an entry that is not zero: the derivative of {of} by {by} is {float(exact[k, c]):.6g}, "
        "and entries that are read together with it are wrong; pass a pattern that has it, or leave pattern out and "
        "have it found"
    )


def _flat(blocks: list[Tensor], samples: int, device: torch.device) -> Tensor:
    """Blocks ``(K, *end)`` side by side, ``(K, samples, entries)``."""
    return torch.cat([b.reshape(len(b), samples, -1).to(device) for b in blocks], 2)


def _at(flat: int, ends, name: str, per_sample: bool, sample: int) -> str:
    """An entry of all ends one after the other, for a message: ``outputs[0][2, 1]``."""
    shapes = [tuple(t.shape[per_sample:]) for t in ends]
    stops = [*accumulate(map(prod, shapes))]
    k = next(k for k, stop in enumerate(stops) if flat < stop)
    flat -= stops[k] - prod(shapes[k])
    index = [int(i) for i in np.unravel_index(flat, shapes[k])]
    index = [sample, *index] if per_sample else index
    which = f"{name}s[{k}]" if len(ends) > 1 else name
    return f"{which}[{', '.join(map(str, index))}]" if index else which
