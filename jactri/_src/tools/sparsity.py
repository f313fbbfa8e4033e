"""`sparsity`: which entries of a Jacobian can be non-zero, without computing any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..calls.api import nest
from ..compile.reached import modules_of
from ..plan import masked
from ..plan.pattern import Pattern
from ..plan.samples import narrow, places
from ..plan.supports import Trace, indices, pattern_of
from ..plan.sweep import follow
from ..prologue.arguments import as_tuple, check_batch
from ..prologue.running import buffers_kept, computing, prepare, public
from ..read.graph import Graph, UnsupportedGraph
from ..read.reading import read
from ..run.coo import unravel
from ..run.sparsity import of_mask


@public
def sparsity(
    func: Callable[..., Any], inputs: Tensor | tuple[Tensor, ...], *, per_sample: bool = False
) -> Any:
    """The entries of ``jacobian(func, inputs)`` that can be non-zero, whatever the weights and the inputs' values.

    What is left out is zero by structure: samples that do not mix, pixels outside of a window, channels of another
    group, tokens that a mask of attention keeps away (of each sample its own; where those of heads differ, what all
    keep away). Index tensors, masks that entries are picked or written by, and sparse matrices count as they are in
    this call; what a sort or a maximum chooses among values may be anything. Where the analysis knows nothing (a dense
    layer, an op without a rule) all entries are there. A sparse ``layout`` of `jacobian` has the same entries, and in
    every sample those of any.

    Args:
        func: as of `jacobian`.
        inputs: as of `jacobian`.
        per_sample: of the blocks of samples, ``(N, *out, *in)``.

    Returns:
        A `Sparsity`, a boolean ``torch.sparse_coo`` tensor of the Jacobian's shape, or several nested as it is.

    Raises:
        TypeError, RuntimeError, IndexError: as by `jacobian`, of inputs and outputs.
        ValueError: samples that are not known to be independent, under ``per_sample``; complex, nested or sparse
            intermediates, of which no pattern is known.

    Cost:
        One forward pass, and memory for ``8 * (axes + 1)`` bytes an entry. Where the pattern is no product of supports
        by axis (indices into several, a star of neighbours), also about 16 bytes an entry of values in between. Where
        masks differ between samples, each is looked at by itself.

    Examples:
        >>> conv = nn.Conv1d(1, 1, kernel_size=3, padding=1)
        >>> mask = jactri.sparsity(conv, torch.randn(1, 1, 5))
        >>> mask.to_dense().reshape(5, 5).int()
        tensor([[1, 1, 0, 0, 0],
                [1, 1, 1, 0, 0],
                [0, 1, 1, 1, 0],
                [0, 0, 1, 1, 1],
                [0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    tupled, xs = as_tuple(inputs, "inputs", "sparsity")
    with buffers_kept(modules_of(func)):
        ys, leaves, tupled_out, _ = prepare(func, xs, False, "sparsity", answers=False)
        check_batch(per_sample, ys, leaves)
        try:
            with computing(False):
                graph = read(ys, leaves)
        except UnsupportedGraph as reason:
            raise ValueError(f"the function holds {reason}, of which no pattern is known") from None
    rows = []
    with computing(False):
        known = indices(graph) is not None
        traces = [None if v is None else Trace(graph, v, known) for v in graph.inputs]
        for end, y in zip(graph.outputs, ys, strict=True):
            row = []
            for trace, x in zip(traces, leaves, strict=True):
                patterns = (
                    [] if trace is None or end is None else _patterns(trace, end, x, per_sample)
                )
                row.append(_made(patterns, y, x, per_sample))
            rows.append(row)
    return nest(rows, tupled_out, tupled)


def _patterns(trace: Trace, end: int, x: Tensor, per_sample: bool) -> list[Pattern]:
    """The pattern of a value (none: no entry), or those of samples: where masks differ, and ``per_sample``."""
    pattern = pattern_of(trace, end)
    if pattern is None:
        return []
    alone = pattern.sample(x.shape[0], joined=True) if per_sample else None
    if per_sample and alone is None:
        raise ValueError(
            "per_sample=True, but samples are not known to be independent; drop per_sample for the pattern of all"
        )
    each = _each(trace.graph, trace.seed, end) if trace.indices else None
    return each or ([pattern] if alone is None else [alone] * x.shape[0])


def _each(graph: Graph, seed: int, end: int) -> list[Pattern] | None:
    """The patterns of samples that do not mix, where their masks differ; None where all have one."""
    n = (graph.values[seed].shape or (0,))[0]
    if n < 2 or not masked.differ(graph):
        return None
    where = places(graph, [follow(graph, seed, False, [end])])
    if where is None or where[seed] != (0, 1) or where[end][0]:
        return None
    made = []
    for sample in range(n):
        part = narrow(graph, where, sample, 1)
        if part is None or len(masked.masked(part)) < len(masked.masked(graph)):
            return None
        made.append(pattern_of(Trace(part, seed, True), end))
    return made


def _made(patterns: list[Pattern], y: Tensor, x: Tensor, per_sample: bool) -> Tensor:
    """A pattern, or one for each sample (none: no entry), as a sparse tensor."""
    shape = (*y.shape, *(x.shape[1:] if per_sample else x.shape))
    ends, rows = [y.shape, x.shape], 0
    if len(patterns) > 1:
        rows = y.shape[0] // len(patterns)  # of a sample, where samples come one after another
        ends = [torch.Size((rows, *y.shape[1:])), torch.Size((1, *x.shape[1:]))]
    found = [torch.empty((len(shape), 0), dtype=torch.int64, device="cpu")]
    made: dict[int, Tensor] = {}  # many samples may have one
    for sample, pattern in enumerate(patterns):
        if id(pattern) not in made:
            entries = pattern.entries()
            out, into = (
                unravel(torch.from_numpy(at), end)
                for at, end in zip((entries.row, entries.column), ends, strict=True)
            )
            made[id(pattern)] = torch.cat([out, into[1:] if per_sample else into])
        index = made[id(pattern)]
        if len(patterns) > 1:
            index = index.clone()
            index[0] += sample * rows
            if not per_sample:
                index[y.dim()] = sample
        found.append(index)
    index = found[-1] if len(found) < 3 else torch.cat(found, 1)
    hits = torch.ones(index.shape[1], dtype=torch.bool, device="cpu")
    mask = torch.sparse_coo_tensor(
        index, hits, shape, device="cpu", is_coalesced=True, check_invariants=False
    )
    return of_mask(mask.to(x.device), y.dim(), per_sample)
