"""From fused steps of a sweep to kernels: their blocks, matrices and diagonals as `chooser` and `kernels` take them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...kernels import support
from ...kernels.support import Factor, Unfit
from ..base import backends
from ..device import chooser
from ..device.passes import Pass, PassKind, over
from ..maps.convolution import Conv
from ..maps.layout import Selection, unfolded
from ..maps.linear_map import Diagonal
from ..plan.convolving import ConvKind, Convolution, Shape
from ..plan.fusion import Fused, edge_of
from ..plan.sweep import Step, Sweep, factors_of
from ..read.graph import Graph
from .seeds import seed_block


def run(
    graph: Graph,
    sweep: Sweep,
    item: Fused,
    data: list[Tensor | None],
    sel: Selection | None,
    out: Tensor | None,
) -> Tensor | None:
    """The block of a fused item, or None where no kernel covers these blocks (dtypes, devices, identity seeds), or
    torch is better. Of an item that is partial: its term.

    ``data``: the blocks of ``item.reads``. ``sel``: the chunk. ``out``: where to write the result if that can be done,
    ``(K, *value)``. Returns ``out`` itself if it was written.
    """
    if item.kind == "first":
        return _first(graph, sweep, item, sel or {}, out)
    t = data[0]
    data = data if item.kind == "sum" or item.adds else data[:1]
    if any(b is None or not backends.kernels_for(b) for b in data):
        return None
    if any(b.dtype != t.dtype or b.device != t.device for b in data):
        return None
    if out is not None and (out.dtype != t.dtype or out.device != t.device):
        out = None
    if item.kind == "chain":
        return _chain(graph, item, data, sweep.reverse, out)
    if item.kind == "conv":
        return _convolution(graph, item, t, sweep.reverse, out)
    kind = _passing(graph, sweep, item, item.layout.columns_of(sel), t.dtype, t.device)
    pass_ = {"sum": _scaled_sum, "pool": _pooled, "rows": _mapped_rows}[item.kind]
    return pass_(graph, item, kind, data, sweep.reverse, out)


def described(graph: Graph, sweep: Sweep, item: Fused) -> tuple[str, str]:
    """The backend that runs a fused item, and why, for `explain`."""
    first = item.reads[0]
    dtype, device = graph.values[first].dtype, graph.values[first].device
    if not support.computes(dtype):
        return "torch", f"{str(dtype).removeprefix('torch.')} has no kernels"
    # the block of the first layer under an identity seed is its weight, the same for all rows
    shared = any(s.value == first and s.shares for s in sweep.steps)
    seeds = item.layout.columns_of((sweep.selections() or [None])[0])
    if item.kind == "conv":
        edge, around, sizes = _parts(graph, item, sweep.layouts[first].shape)
        samples = item.layout.shape[0]
        if shared and samples > 1 and not around[0]:
            return "torch", "once for all samples"
        names = _names(around, _uses(edge, seeds))
        shape = Shape.of(edge, not sweep.reverse, *(s[2:] for s in sizes))
        return chooser.described(ConvKind.of(seeds, samples, shape, names, dtype, device))
    if item.kind != "chain":
        return chooser.described(_passing(graph, sweep, item, seeds, dtype, device))
    widths, factors = [sweep.layouts[first].shape[-1]], [""]
    for step in item.steps:
        edge = _edge(graph, item, step)
        if edge.name == "matmul":
            widths.append(step.layout.shape[-1])
            factors.append("")
        elif edge.name == "diagonal":
            factors[-1] = "ready" if factors[-1] else edge.formula(seeds)
    rows = prod(sweep.layouts[first].shape[:-1])
    return chooser.described(
        chooser.ChainKind.of(
            seeds, rows, widths, tuple(factors), shared and rows > 1, dtype, device, item.adds
        )
    )


def _passing(graph: Graph, sweep: Sweep, item: Fused, seeds: int, dtype, device) -> PassKind:
    """What the choice for an item that takes one pass depends on."""
    shape, reverse = item.layout.shape, sweep.reverse
    if item.kind == "sum":
        inner = {s.value: s for s in item.steps[:-1]}
        scaled = [inner.get(t.other) for t in item.steps[-1].terms]
        names = _names([[] if s is None else [edge_of(graph, s)] for s in scaled])
        rows, entries = shape[0] if shape else 1, prod(shape[1:])
        how = (*names, tuple(shape[1:]))
        return PassKind.of("scaled_sum", seeds, rows, 2 * entries, entries, how, dtype, device)
    given = sweep.layouts[item.reads[0]].shape
    edge, around, (_, out) = _parts(graph, item, given)
    names = _names(around)
    if item.kind == "rows":
        name, _, axes = edge.row_map(shape, reverse)
        rows, n = prod(shape[:-axes]), prod(shape[-axes:])
        how, read = ((name, *names, "plus"), 2 * n) if item.adds else ((name, *names), n)
        return PassKind.of("rows", seeds, rows, read, n, how, dtype, device)
    if item.kind == "pool":
        name = edge.pool_map(out, reverse)
        how = (name, *names, tuple(given[1:]), tuple(out[1:]), edge.options)
        return PassKind.of(
            "pool", seeds, out[0], prod(given[1:]), prod(out[1:]), how, dtype, device
        )
    colours = tuple(sorted(sweep.colours.items()))
    how = (names[1], *map(tuple, (given[1:], out[1:], edge.shape)), edge.geometry.key, colours)
    return PassKind.of("first", seeds, out[0], 0, prod(out[1:]), how, dtype, device)


def _names(around: list[list[Diagonal]], uses: tuple[int, int] = (1, 1)) -> tuple[str, ...]:
    """What kernels compute scalings from: a derivative's name, "ready", or "" where there is none.

    ``uses``: see `Diagonal.factor`.
    """
    return tuple(
        "" if not s else s[0].formula(n) if len(s) == 1 else "ready"
        for s, n in zip(around, uses, strict=True)
    )


def _chain(graph: Graph, item: Fused, data: list[Tensor], reverse: bool, out: Tensor | None):
    t, *more = data
    matrices: list[Tensor] = []
    scalings: list[list[Diagonal]] = [[]]
    shapes = [t.shape[1:]]
    for step in item.steps:
        edge = _edge(graph, item, step)
        if edge.name == "matmul":
            m = edge.partner.t() if reverse else edge.partner
            if m.dtype != t.dtype or m.device != t.device:
                return None
            matrices.append(m)
            scalings.append([])
            shapes.append(step.layout.shape)
        elif edge.name == "diagonal":
            scalings[-1].append(edge)
            shapes[-1] = step.layout.shape
    K = t.shape[0]
    problem = chooser.Chain(
        _rows(t, 1),
        tuple(matrices),
        tuple(_factor(s, shape, 1, K) for s, shape in zip(scalings, shapes, strict=True)),
        lambda: [_diagonal(s, shape, 1) for s, shape in zip(scalings, shapes, strict=True)],
        backends.ready.get(),
        _rows(more[0], 1) if more else None,
    )
    into = _into(out, 1)
    made = chooser.run(problem, into)
    if made is None:
        return None
    return out if into is not None else made.view(K, *item.layout.shape)


def _rows(block: Tensor, axes: int) -> Tensor:
    """A block (K, *value) as (K, rows, features): the features are the last ``axes``."""
    shape = block.shape[1:]
    return block.reshape(block.shape[0], prod(shape[:-axes]), prod(shape[-axes:]))


def _into(out: Tensor | None, axes: int) -> Tensor | None:
    """The caller's tensor as (K, rows, features), or None where its rows have no common stride."""
    if out is None:
        return None
    shape = out.shape[1:]
    try:
        return out.view(out.shape[0], prod(shape[:-axes]), prod(shape[-axes:]))
    except RuntimeError:
        return None


def _factor(scalings: list[Diagonal], shape, axes: int, uses: int = 1) -> Factor | None:
    """The scalings of a value of ``shape`` as one factor (rows, features); a lone activation is left to the kernel.

    ``uses``: see `Diagonal.factor`.
    """
    if not scalings:
        return None
    if len(scalings) == 1:
        f = scalings[0].factor(uses)
        return Factor(_features(f.values, shape, axes), f.name, f.constants)
    return Factor(_diagonal(scalings, shape, axes))


def _diagonal(scalings: list[Diagonal], shape, axes: int) -> Tensor | None:
    """The product of the derivatives of scalings, as (rows, features)."""
    whole = None
    for edge in scalings:
        d = _features(edge.d, shape, axes)
        whole = d if whole is None else whole * d
    return whole


def _features(values: Tensor, shape, axes: int) -> Tensor:
    """What broadcasts against a value of ``shape``, as (rows, features)."""
    return values.expand(shape).reshape(prod(shape[:-axes]), prod(shape[-axes:]))


def _parts(graph: Graph, item: Fused, shape):
    """The map that an item is built around, the scalings before and after it, and the shapes of values there.

    ``shape`` is that of the value that the item reads.
    """
    around: list[list[Diagonal]] = [[], []]
    found = None
    for step in item.steps:
        edge = _edge(graph, item, step)
        if edge.name == "diagonal":
            around[found is not None].append(edge)
        else:
            found = edge
    return found, around, (shape, item.layout.shape)


def _edge(graph: Graph, item: Fused, step: Step) -> Any:
    """The map of an item's step: of its term, where that is a sum."""
    return edge_of(graph, step, item.term if step is item.steps[-1] else 0)


def _convolution(graph: Graph, item: Fused, t: Tensor, reverse: bool, out: Tensor | None):
    edge, around, shapes = _parts(graph, item, t.shape[1:])
    if edge.weight.dtype != t.dtype or edge.weight.device != t.device:
        return None
    if not around[0] and t.shape[1] > 1 and t.stride(1) == 0:
        return None  # torch convolves it once for all samples
    return chooser.run(_around(edge, not reverse, t, around, shapes, item.last), out)


def _around(
    edge: Conv, push: bool, t: Tensor, around: list[list[Diagonal]], shapes, last: bool = False
) -> Convolution:
    """The push or pull of a convolution between scalings, as a problem."""
    both = list(zip(around, shapes, strict=True))
    return Convolution(
        t, edge, push, tuple(shapes[1][2:]),
        tuple(map(_on_image, around, shapes, _uses(edge, t.shape[0]))),
        lambda: tuple(_product(*b) for b in both), backends.ready.get(), last,
    )  # fmt: skip


def _first(graph: Graph, sweep: Sweep, item: Fused, sel: Selection, out: Tensor | None):
    from ...kernels.first import first
    from ...kernels.windows import Window

    seed = graph.values[sweep.seed]
    edge, around, (given, shape) = _parts(graph, item, seed.shape)
    weight, g = edge.weight, edge.geometry
    if not backends.kernels_for(seed) or (weight.dtype, weight.device) != (seed.dtype, seed.device):
        return None
    colours = []
    for _, f in factors_of(sweep)[1:]:
        period = 1 if f is None else sweep.layout.seed[f]
        colours.append((period, *sel.get(f, (0, period))))
    # without a scaling, it is the same for all samples
    samples = shape[0] if around[1] else min(shape[0], 1)
    if out is not None and (
        samples != shape[0] or (out.dtype, out.device) != (seed.dtype, seed.device)
    ):
        out = None
    window = Window(
        tuple(shape[2:]), tuple(g.stride), tuple(g.padding), tuple(g.dilation), g.groups,
        g.transposed != sweep.reverse,
    )  # fmt: skip

    def kernel(n: int, out: Tensor | None) -> Tensor:
        after = _on_image(around[1], shape)
        if after is not None:
            after = Factor(after.values[:n], after.name, after.constants)
        return first(weight, window, given[2:], tuple(colours), n, after, out=out)

    def steps(n: int, dtype: torch.dtype | None) -> Tensor:
        block, at = seed_block(sweep, sel, seed), sweep.layouts[sweep.seed]
        mid = item.steps[0].terms[0].route.mid
        if mid is not at:
            block, _ = unfolded(block, at, mid, sel, seed)
        problem = _around(edge, not sweep.reverse, block, around, (given, shape))
        return problem.first(len(block), n).torch(dtype)

    seeds = item.layout.columns_of(sel)
    kind = _passing(graph, sweep, item, seeds, seed.dtype, seed.device)
    entries = seeds * max(prod(given[1:]), prod(shape[1:]))
    made = chooser.run(Pass(kind, samples, entries, kernel, steps), out)
    if made is None:
        return None
    return made if samples == shape[0] else made.expand(-1, *shape)


def _pooled(
    graph: Graph, item: Fused, kind: PassKind, data: list[Tensor], reverse: bool, out
) -> Tensor | None:
    from ...kernels import pool
    from ...kernels.windows import Window

    t = data[0]
    edge, around, shapes = _parts(graph, item, t.shape[1:])
    gathers = kind.how[0] == "gather"
    picked = shapes[1] if gathers else shapes[0]

    def kernel(blocks: list[Tensor], out: Tensor | None) -> Tensor:
        before, after = (_on_image(*b) for b in zip(around, shapes, strict=True))
        index = edge.base.index.expand(*picked[:2], -1).unflatten(-1, picked[2:])
        if gathers:
            return pool.gather(*blocks, index, before, after, out=out)
        taps, *rest = zip(*edge.options, strict=True)
        window = Window(shapes[1][2:], *rest)
        return pool.scatter(*blocks, index, window, taps, before, after, out=out)

    steps = _stepwise(graph, item, reverse)
    return chooser.run(over(kind, data, max(map(prod, shapes)), kernel, steps), out)


def _uses(edge, seeds: int) -> tuple[int, int]:
    """How often a convolution takes each element of a factor before and behind it."""
    return seeds * prod(edge.weight.shape[2:]), seeds


def _stepwise(graph: Graph, item: Fused, reverse: bool) -> Callable[[list[Tensor]], Tensor]:
    """The map of an item and the scalings around it by torch, one after the other."""

    def steps(blocks: list[Tensor]) -> Tensor:
        (t, *more), own = blocks, False
        for step in item.steps:
            edge = _edge(graph, item, step)
            t, own = edge.pull(t, own) if reverse else edge.push(t, own)
        return t + more[0] if more else t

    return steps


def _on_image(scalings: list[Diagonal], shape, uses: int = 1) -> Factor | None:
    """The scalings of a value of ``shape`` as one factor of that shape; ``uses``: see `Diagonal.factor`."""
    if len(scalings) != 1:
        d = _product(scalings, shape)
        return None if d is None else Factor(d)
    f = scalings[0].factor(uses)
    return Factor(f.values.expand(shape), f.name, f.constants)


def _product(scalings: list[Diagonal], shape) -> Tensor | None:
    """The product of the derivatives of scalings, expanded to ``shape``."""
    if not scalings:
        return None
    whole = scalings[0].d
    for edge in scalings[1:]:
        whole = whole * edge.d
    return whole.expand(shape)


def _mapped_rows(
    graph: Graph, item: Fused, kind: PassKind, data: list[Tensor], reverse: bool, out
) -> Tensor | None:
    from ...kernels.rows import rows

    shape = item.layout.shape
    edge, around, _ = _parts(graph, item, shape)
    name, saved, axes = edge.row_map(shape, reverse)

    def kernel(blocks: list[Tensor], out: Tensor | None) -> Tensor:
        (t, *more), into = (_rows(b, axes) for b in blocks), _into(out, axes)
        before, after = (_factor(s, shape, axes) for s in around)
        p = _features(saved(), shape, axes)
        made = rows(t, p, name, before, after, plus=more[0] if more else None, out=into)
        return out if into is not None else made.view(len(t), *shape)

    steps = _stepwise(graph, item, reverse)
    return chooser.run(over(kind, data, prod(shape), kernel, steps), out)


def _scaled_sum(
    graph: Graph, item: Fused, kind: PassKind, data: list[Tensor], reverse: bool, out
) -> Tensor | None:
    from ...kernels.elementwise import scaled_sum

    *scalings, last = item.steps
    inner = {s.value: s for s in scalings}
    shape = item.layout.shape

    def kernel(blocks: list[Tensor], out: Tensor | None) -> Tensor:
        terms = []
        for term, block in zip(last.terms, blocks, strict=True):
            step = inner.get(term.other)
            f = None if step is None else edge_of(graph, step).factor()
            if f is not None:
                f = Factor(f.values.expand(shape), f.name, f.constants)
            terms.append((block, f))
        made = scaled_sum(terms, (max(map(len, blocks)), *shape), out=out)
        if made is None:
            raise Unfit("blocks that lie in memory along too many axes")
        return made

    def steps(blocks: list[Tensor]) -> Tensor:
        parts = []
        for term, block in zip(last.terms, blocks, strict=True):
            step = inner.get(term.other)
            parts.append(block if step is None else edge_of(graph, step).push(block, False)[0])
        return parts[0] + parts[1]

    return chooser.run(over(kind, data, prod(shape), kernel, steps), out)
