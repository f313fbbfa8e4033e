"""From fused steps of a sweep to kernels: their blocks, matrices and diagonals as `chooser` and `kernels` take them."""

from __future__ import annotations

from functools import reduce
from math import prod
from operator import mul

from torch import Tensor

from . import backends, chooser
from .fusion import Fused, edge_of
from .graph import Graph
from .kernels import support
from .kernels.support import Factor, Unfit
from .linear_map import Diagonal
from .planner import Sweep


def run(
    graph: Graph,
    item: Fused,
    data: list[Tensor | None],
    reverse: bool,
    columns: int,
    out: Tensor | None,
) -> Tensor | None:
    """The block of a fused item, or None where no kernel covers these blocks (dtypes, devices, identity seeds).

    ``data``: the blocks of ``item.reads``. ``columns``: the seeds of the result. ``out``: where to write it if that
    can be done, ``(columns, *value)``. Returns ``out`` itself if it was written.
    """
    t = data[0]
    if any(b is None or not backends.kernels_for(b) for b in data):
        return None
    if any(b.dtype != t.dtype or b.device != t.device for b in data):
        return None
    if out is not None and (out.dtype != t.dtype or out.device != t.device):
        out = None
    if item.kind == "sum":
        return _scaled_sum(graph, item, data, columns, out)
    if item.kind == "rows":
        return _mapped_rows(graph, item, t, reverse, out)
    return _chain(graph, item, t, reverse, out)


def described(graph: Graph, sweep: Sweep, item: Fused) -> tuple[str, str]:
    """The backend that runs a fused item, and why, for `explain`."""
    first = item.reads[0]
    dtype, device = graph.values[first].dtype, graph.values[first].device
    if not support.computes(dtype):
        return "torch", f"{str(dtype).removeprefix('torch.')} has no kernels"
    if item.kind != "chain":
        what = "one pass over rows" if item.kind == "rows" else "two blocks added in one pass"
        return "triton", what
    widths, names = [sweep.layouts[first].shape[-1]], [""]
    for step in item.steps:
        edge = edge_of(graph, step)
        if edge.name == "matmul":
            widths.append(step.layout.shape[-1])
            names.append("")
        elif edge.name == "diagonal":
            names[-1] = "ready" if names[-1] else edge.formula
    # the block of the first layer under an identity seed is its weight, the same for all rows
    shared = any(s.value == first and s.shares for s in sweep.steps)
    rows = prod(sweep.layouts[first].shape[:-1])
    seeds = item.layout.columns((sweep.selections() or [None])[0])
    return chooser.described(
        chooser.Kind.of(seeds, rows, widths, tuple(names), shared and rows > 1, dtype, device)
    )


def _chain(graph: Graph, item: Fused, t: Tensor, reverse: bool, out: Tensor | None):
    matrices: list[Tensor] = []
    scalings: list[list[Diagonal]] = [[]]
    widths = [t.shape[-1]]
    for step in item.steps:
        edge = edge_of(graph, step)
        if edge.name == "matmul":
            m = edge.partner.t() if reverse else edge.partner
            if m.dtype != t.dtype or m.device != t.device:
                return None
            matrices.append(m)
            scalings.append([])
            widths.append(m.shape[1])
        elif edge.name == "diagonal":
            scalings[-1].append(edge)
    K, shape = t.shape[0], item.layout.shape
    R = t.shape[1:-1].numel()
    factors = tuple(_factor(s, (R, w)) for s, w in zip(scalings, widths, strict=True))
    problem = chooser.Chain(
        t.reshape(K, R, widths[0]), tuple(matrices), factors,
        lambda: [_diagonal(s, (R, w)) for s, w in zip(scalings, widths, strict=True)],
    )  # fmt: skip
    try:
        into = None if out is None else out.view(K, R, widths[-1])
    except RuntimeError:  # the rows of the caller's tensor have no common stride
        into = None
    made = chooser.run(problem, into)
    return out if into is not None else made.view(K, *shape)


def _factor(scalings: list[Diagonal], shape: tuple[int, int]) -> Factor | None:
    """The scalings between two products as one factor; a lone activation is left to the kernel."""
    if not scalings:
        return None
    if len(scalings) == 1:
        f = scalings[0].factor()
        return Factor(_rows(f.values, shape), f.name, f.constants)
    return Factor(_diagonal(scalings, shape))


def _diagonal(scalings: list[Diagonal], shape: tuple[int, int]) -> Tensor | None:
    """The product of the derivatives of scalings, as (rows, features)."""
    whole = None
    for edge in scalings:
        d = _rows(edge.d, shape)
        whole = d if whole is None else whole * d
    return whole


def _rows(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Values that broadcast against ``(..., features)`` as ``(rows, features)``."""
    if values.dim() < 2:
        return values.expand(shape)
    if values.shape[:-1].numel() == shape[0]:
        return values.reshape(shape[0], -1).expand(shape)
    raise AssertionError(f"a diagonal of shape {tuple(values.shape)} for rows of {shape}")


def _mapped_rows(graph: Graph, item: Fused, t: Tensor, reverse: bool, out: Tensor | None):
    from .kernels.rows import rows

    shape = item.layout.shape
    around: list[list[Diagonal]] = [[], []]
    found = None
    for step in item.steps:
        edge = edge_of(graph, step)
        if edge.name == "diagonal":
            around[found is not None].append(edge)
        else:
            found = edge.rows(len(shape), reverse)
    name, saved, axes = found
    n = prod(shape[-axes:])
    flat = (prod(shape[:-axes]), n)

    def features(values: Tensor) -> Tensor:
        return values.expand(shape).reshape(flat)

    def joined(scalings: list[Diagonal]) -> Factor | None:
        if not scalings:
            return None
        if len(scalings) == 1:
            f = scalings[0].factor()
            return Factor(features(f.values), f.name, f.constants)
        return Factor(features(reduce(mul, (s.d for s in scalings))))

    try:
        into = None if out is None else out.view(t.shape[0], *flat)
    except RuntimeError:  # the rows of the caller's tensor have no common stride
        into = None
    try:
        made = rows(
            t.reshape(t.shape[0], *flat), features(saved()), name, *map(joined, around), out=into
        )
    except Unfit as error:
        backends.unfit("rows", error)
        return None
    return out if into is not None else made.view(t.shape[0], *shape)


def _scaled_sum(graph: Graph, item: Fused, data: list[Tensor], columns: int, out: Tensor | None):
    from .kernels.elementwise import scaled_sum

    *scalings, last = item.steps
    inner = {s.value: s for s in scalings}
    shape = item.layout.shape
    terms = []
    for term, block in zip(last.terms, data, strict=True):
        step = inner.get(term.other)
        f = None
        if step is not None:
            f = edge_of(graph, step).factor()
            f = Factor(f.values.expand(shape), f.name, f.constants)
        terms.append((block, f))
    try:
        return scaled_sum(terms, (columns, *shape), out=out)
    except Unfit as error:
        backends.unfit("scaled_sum", error)
        return None
