"""From fused steps of a sweep to kernels: their blocks, matrices and diagonals as `chooser` and `kernels` take them."""

from __future__ import annotations

from math import prod

from torch import Tensor

from . import backends, chooser
from .convolving import ConvKind, Convolution, Shape
from .fusion import Fused, edge_of
from .graph import Graph
from .kernels import support
from .kernels.support import Factor, Unfit
from .layout import Selection
from .linear_map import Diagonal
from .sweep import Sweep, factors_of


def run(
    graph: Graph,
    sweep: Sweep,
    item: Fused,
    data: list[Tensor | None],
    sel: Selection | None,
    out: Tensor | None,
) -> Tensor | None:
    """The block of a fused item, or None where no kernel covers these blocks (dtypes, devices, identity seeds).

    ``data``: the blocks of ``item.reads``. ``sel``: the chunk. ``out``: where to write the result if that can be done,
    ``(K, *value)``. Returns ``out`` itself if it was written.
    """
    t, reverse = data[0], sweep.reverse
    if item.kind == "first":
        return _first(graph, sweep, item, sel or {}, out)
    if any(b is None or not backends.kernels_for(b) for b in data):
        return None
    if any(b.dtype != t.dtype or b.device != t.device for b in data):
        return None
    if out is not None and (out.dtype != t.dtype or out.device != t.device):
        out = None
    if item.kind == "sum":
        return _scaled_sum(graph, item, data, item.layout.columns(sel), out)
    if item.kind == "conv":
        return _convolution(graph, item, t, reverse, out)
    if item.kind == "pool":
        return _pooled(graph, item, t, reverse, out)
    if item.kind == "rows":
        return _mapped_rows(graph, item, t, reverse, out)
    return _chain(graph, item, t, reverse, out)


def described(graph: Graph, sweep: Sweep, item: Fused) -> tuple[str, str]:
    """The backend that runs a fused item, and why, for `explain`."""
    first = item.reads[0]
    dtype, device = graph.values[first].dtype, graph.values[first].device
    if not support.computes(dtype):
        return "torch", f"{str(dtype).removeprefix('torch.')} has no kernels"
    # the block of the first layer under an identity seed is its weight, the same for all rows
    shared = any(s.value == first and s.shares for s in sweep.steps)
    seeds = item.layout.columns((sweep.selections() or [None])[0])
    if item.kind == "first":
        return "triton", "from the weight alone, no seeds are read"
    if item.kind == "conv":
        edge, around, sizes = _parts(graph, item, sweep.layouts[first].shape)
        samples = item.layout.shape[0]
        if shared and samples > 1 and not around[0]:
            return "torch", "once for all samples"
        names = tuple(
            "" if not s else s[0].formula(n) if len(s) == 1 else "ready"
            for s, n in zip(around, _uses(edge, seeds), strict=True)
        )
        shape = Shape.of(edge, not sweep.reverse, *(s[2:] for s in sizes))
        return chooser.described(ConvKind.of(seeds, samples, shape, names, dtype, device))
    if item.kind != "chain":
        return "triton", {
            "rows": "one pass over rows", "sum": "two blocks added in one pass", "pool": "by the indices of its choice",
        }[item.kind]  # fmt: skip
    widths, names = [sweep.layouts[first].shape[-1]], [""]
    for step in item.steps:
        edge = edge_of(graph, step)
        if edge.name == "matmul":
            widths.append(step.layout.shape[-1])
            names.append("")
        elif edge.name == "diagonal":
            names[-1] = "ready" if names[-1] else edge.formula(seeds)
    rows = prod(sweep.layouts[first].shape[:-1])
    return chooser.described(
        chooser.Kind.of(seeds, rows, widths, tuple(names), shared and rows > 1, dtype, device)
    )


def _chain(graph: Graph, item: Fused, t: Tensor, reverse: bool, out: Tensor | None):
    matrices: list[Tensor] = []
    scalings: list[list[Diagonal]] = [[]]
    shapes = [t.shape[1:]]
    for step in item.steps:
        edge = edge_of(graph, step)
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
    )
    into = _into(out, 1)
    made = chooser.run(problem, into)
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
        edge = edge_of(graph, step)
        if edge.name == "diagonal":
            around[found is not None].append(edge)
        else:
            found = edge
    return found, around, (shape, item.layout.shape)


def _convolution(graph: Graph, item: Fused, t: Tensor, reverse: bool, out: Tensor | None):
    edge, around, shapes = _parts(graph, item, t.shape[1:])
    if edge.weight.dtype != t.dtype or edge.weight.device != t.device:
        return None
    if not around[0] and t.shape[1] > 1 and t.stride(1) == 0:
        return None  # torch convolves it once for all samples
    both = list(zip(around, shapes, strict=True))
    uses = _uses(edge, t.shape[0])
    problem = Convolution(
        t, edge, not reverse, tuple(shapes[1][2:]), tuple(map(_on_image, around, shapes, uses)),
        lambda: tuple(_product(*b) for b in both),
    )  # fmt: skip
    return chooser.run(problem, out)


def _first(graph: Graph, sweep: Sweep, item: Fused, sel: Selection, out: Tensor | None):
    from .kernels.first import first
    from .kernels.windows import Window

    seed = graph.values[sweep.seed]
    edge, (_, scalings), (given, shape) = _parts(graph, item, seed.shape)
    weight, g = edge.weight, edge.geometry
    if not backends.kernels_for(seed) or (weight.dtype, weight.device) != (seed.dtype, seed.device):
        return None
    colours = []
    for _, f in factors_of(sweep)[1:]:
        period = 1 if f is None else sweep.layout.seed[f]
        colours.append((period, *sel.get(f, (0, period))))
    after = _on_image(scalings, shape)
    # without a scaling, it is the same for all samples
    samples = shape[0] if scalings else min(shape[0], 1)
    if out is not None and (
        samples != shape[0] or (out.dtype, out.device) != (seed.dtype, seed.device)
    ):
        out = None
    window = Window(
        tuple(shape[2:]), tuple(g.stride), tuple(g.padding), tuple(g.dilation), g.groups,
        g.transposed != sweep.reverse,
    )  # fmt: skip
    try:
        made = first(weight, window, given[2:], tuple(colours), samples, after, out=out)
    except Unfit as error:
        backends.unfit("first", error)
        return None
    return made if samples == shape[0] else made.expand(-1, *shape)


def _pooled(graph: Graph, item: Fused, t: Tensor, reverse: bool, out: Tensor | None):
    from .kernels import pool
    from .kernels.windows import Window

    edge, around, shapes = _parts(graph, item, t.shape[1:])
    before, after = (_on_image(*b) for b in zip(around, shapes, strict=True))
    gathers = edge.pool_map(shapes[1], reverse) == "gather"
    picked = shapes[1] if gathers else shapes[0]
    index = edge.base.index.expand(*picked[:2], -1).unflatten(-1, picked[2:])
    try:
        if gathers:
            return pool.gather(t, index, before, after, out=out)
        taps, *rest = zip(*edge.options, strict=True)
        return pool.scatter(t, index, Window(shapes[1][2:], *rest), taps, before, after, out=out)
    except Unfit as error:
        backends.unfit("pool", error)
        return None


def _uses(edge, seeds: int) -> tuple[int, int]:
    """How often a convolution takes each element of a factor before and behind it."""
    return seeds * prod(edge.weight.shape[2:]), seeds


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


def _mapped_rows(graph: Graph, item: Fused, t: Tensor, reverse: bool, out: Tensor | None):
    from .kernels.rows import rows

    shape = item.layout.shape
    edge, around, _ = _parts(graph, item, shape)
    name, saved, axes = edge.row_map(len(shape), reverse)
    before, after = (_factor(s, shape, axes) for s in around)
    into = _into(out, axes)
    try:
        made = rows(_rows(t, axes), _features(saved(), shape, axes), name, before, after, out=into)
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
