"""Ops that only move entries: views, permutations, slices, joins, padding, repetition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy
import torch
from torch.nn.modules._functions import BackwardHookFunction

from ..base.csr import Csr
from ..base.elsewhere import DISTRIBUTED
from ..maps.functional import Functional
from ..maps.linear_map import keep_all_but
from ..maps.mask import Mask
from ..maps.selection import Place, Select, Slice, Take
from . import normal_axis, normal_index, rule
from .elementwise import Partials


@rule(
    BackwardHookFunction,
    "torch.nn.parallel.distributed::_DDPSink",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group::RegisterPostBackwardFunction",
)
def module_hooks(g):
    """What backward hooks of modules, of DDP and of FSDP hang on: each of the inputs or outputs, as it is."""
    return tuple(g.src)


@rule(
    "torch.distributed.tensor._api::_FromTorchTensor",
    "torch.distributed.tensor._api::_ToTorchTensor",
)
def distributed(g):
    g.refuse(DISTRIBUTED)


@rule("View", "UnsafeView", "Squeeze.0-5", "Unsqueeze.0-1", moves=True)
@rule("ReshapeAlias")
def view(g):
    return g.view(g.src[0], g.shape)


@rule("Permute", moves=True)
def permute(g):
    dims = g.saved("dims")
    return g.permute(g.src[0], tuple([normal_axis(d, len(dims)) for d in dims]))


@rule("T.0-1", moves=True)
def t(g):
    return g.permute(g.src[0], tuple(reversed(range(len(g.shape)))))


@rule("Transpose.0-1", moves=True)
def transpose(g):
    n = len(g.shape)
    if n == 0:
        return g.src[0]
    dims = list(range(n))
    a, b = g.axis("dim0", n), g.axis("dim1", n)
    dims[a], dims[b] = b, a
    return g.permute(g.src[0], tuple(dims))


@rule("Expand", moves=True)
def expand(g):
    return g.expand(g.src[0], g.shape)


@rule("Repeat")
def repeat(g):
    """Each axis of ``n`` entries becomes ``(repeats, n)``, which is expanded and then merged."""
    s, repeats = g.src[0], g.saved("repeats")
    shape = g.values[s].shape
    shape = (1,) * (len(repeats) - len(shape)) + shape
    split, wide = [], []
    for r, n in zip(repeats, shape, strict=True):
        if r != 1 and n != 1:
            split += [1, n]
            wide += [r, n]
        else:
            split.append(n)
            wide.append(r * n)
    return g.view(g.expand(g.view(s, tuple(split)), tuple(wide)), g.shape)


# -- pieces of one axis -----------------------------------------------------------------------------


def piece(g, s: int, axis: int, start: int, length: int, step: int = 1) -> int:
    """``length`` entries of one axis."""
    shape = g.values[s].shape
    n = shape[axis]
    if length == n and step == 1:
        return s
    if length == 0:
        start, step = 0, 1
    return g.single(
        s, Slice(axis, start, length, step, n), (*shape[:axis], length, *shape[axis + 1 :])
    )


def place(g, s: int, axis: int, start: int, size: int, step: int = 1) -> int:
    """A value put into zeros along one axis."""
    shape = g.values[s].shape
    n = shape[axis]
    if n == size and step == 1:
        return s
    return g.single(s, Place(axis, start, n, step, size), (*shape[:axis], size, *shape[axis + 1 :]))


@rule("Select", moves=True)
def select(g):
    (s,) = g.src
    shape = g.values[s].shape
    axis = g.axis("dim", len(shape))
    n = shape[axis]
    return g.single(s, Select(axis, normal_index(g.saved("index")) % n, n), g.shape)


@rule("Slice", moves=True)
def slice_(g):
    (s,) = g.src
    shape = g.values[s].shape
    axis = g.axis("dim", len(shape))
    ends = [None if e is None else normal_index(e) for e in (g.saved("start"), g.saved("end"))]
    step = g.saved("step")
    start, _, _ = slice(*ends, step).indices(shape[axis])
    return piece(g, s, axis, start, g.shape[axis], step)


@rule("Split", "UnsafeSplit", "SplitWithSizes", "UnsafeSplitWithSizes")
def split(g):
    (s,) = g.src
    axis = g.axis("dim", len(g.values[s].shape))
    out, start = [], 0
    for m in g.meta:
        length = m.shape[axis]
        out.append(piece(g, s, axis, start, length))
        start += length
    return tuple(out)


@rule("Unbind")
def unbind(g):
    (s,) = g.src
    shape = g.values[s].shape
    axis = g.axis("dim", len(shape))
    n = shape[axis]
    return tuple([g.single(s, Select(axis, i, n), g.shape) for i in range(n)])


# -- joins ------------------------------------------------------------------------------------------


def _shapes(g) -> list[tuple[int, ...]]:
    """Shapes of all operands of a join; autograd tells those that nothing differentiates by their gradients."""
    if None not in g.src:
        return [g.values[s].shape for s in g.src]
    g.check_memory()
    ones = torch.ones((), dtype=g.dtype, device=g.device).expand(g.shape)
    out = g.call(ones)
    return [tuple(d.shape) for d in (out if isinstance(out, tuple) else (out,))]


@rule("Cat")
def cat(g):
    shape = g.shape
    axis = g.axis("dim", len(shape))
    terms, start = [], 0
    for s, own in zip(g.src, _shapes(g), strict=True):
        if len(own) != len(shape):
            continue  # a legacy empty tensor of shape (0,) joins anything
        n = own[axis]
        if s is not None:
            terms.append((g.cast(s), Place(axis, start, n, 1, shape[axis])))
        start += n
    return g.emit(terms, shape)


@rule("Stack")
def stack(g):
    return stacked(g, g.src, g.shape, g.axis("dim", len(g.shape)))


def stacked(g, sources, shape, axis: int) -> int:
    """Values side by side along a new axis of ``shape``; None stands for zeros."""
    slot = (*shape[:axis], 1, *shape[axis + 1 :])
    n = shape[axis]
    return g.emit(
        [
            (g.cast(g.view(s, slot)), Place(axis, i, 1, 1, n))
            for i, s in enumerate(sources)
            if s is not None
        ],
        shape,
    )


@rule("BlockDiag")
def block_diag(g):
    rows, columns = g.shape
    terms, r, c = [], 0, 0
    for s, own in zip(g.src, _shapes(g), strict=True):
        m, n = (1,) * (2 - len(own)) + own
        if s is not None:
            wide = place(g, g.cast(g.view(s, (m, n))), 1, c, columns)
            terms.append(place(g, wide, 0, r, rows))
        r, c = r + m, c + n
    return g.plus(terms)


# -- padding ----------------------------------------------------------------------------------------


@rule("ConstantPadNd")
def constant_pad(g):
    (s,) = g.src
    pads = [normal_index(p) for p in g.saved("pad")]
    axis = len(g.shape)
    for low, high in zip(pads[::2], pads[1::2], strict=True):
        axis -= 1
        n = g.values[s].shape[axis]
        if low < 0 or high < 0:
            s = piece(g, s, axis, max(-low, 0), n + min(low, 0) + min(high, 0))
        s = place(g, s, axis, max(low, 0), g.shape[axis])
    return s


def _edge_pad(kind: str, index):
    """Padding that repeats entries: ``index(positions, n)`` says which."""

    def run(g):
        (s,) = g.src
        pads = [normal_index(p) for p in g.saved("padding")]
        if min(pads) < 0:
            return None
        device, axis = g.meta[0].device, len(g.shape)
        for low, high in zip(pads[::2], pads[1::2], strict=True):
            axis -= 1
            shape = g.values[s].shape
            n = shape[axis]
            if low or high:
                source = index(torch.arange(-low, n + high, device=device), n)
                padded = (*shape[:axis], n + low + high, *shape[axis + 1 :])
                s = g.single(s, Take(axis, source, n, (kind, low, high)), padded)
        return s

    return run


rule("ReflectionPad1D", "ReflectionPad2D", "ReflectionPad3D")(
    _edge_pad("reflect", lambda i, n: (n - 1) - (n - 1 - i.abs()).abs())
)
rule("ReplicationPad1D", "ReplicationPad2D", "ReplicationPad3D")(
    _edge_pad("replicate", lambda i, n: i.clamp(0, n - 1))
)


# -- rearrangements ---------------------------------------------------------------------------------


def _mixing(g, s: int, name: str, push, pull, axes, index=None, detail=None) -> int:
    """A rearrangement within ``axes`` that leaves the others in place.

    ``index(axis)`` says, where every axis is rearranged by itself, which entry comes where. All of it is in
    ``name`` and ``detail``.
    """
    kept = keep_all_but(axes, len(g.shape))
    supports: dict[int, Callable] | None = None
    if index is not None:
        sizes = g.shape

        def support(a: int) -> Csr:
            return Csr.picked(index(a) % sizes[a], sizes[a])

        supports = {a: partial(support, a) for a in axes}
    edge = Functional(
        name, push, pull, kept, (1.0, 1.0), anywhere=True, supports=supports, detail=detail,
        moves=(True, True),
    )  # fmt: skip
    return g.single(s, edge, g.shape)


@rule("Flip")
def flip(g):
    if not g.shape:
        return g.src[0]
    axes = [normal_axis(d, len(g.shape)) for d in g.saved("dims")]
    dims = [a + 1 for a in axes]
    sizes = g.shape
    return _mixing(
        g, g.src[0], "flip", lambda t: t.flip(dims), lambda c: c.flip(dims), axes,
        lambda a: numpy.arange(sizes[a])[::-1],
    )  # fmt: skip


@rule("Roll")
def roll(g):
    (s,) = g.src
    if not g.shape:
        return s
    shifts = [normal_index(n) for n in g.saved("shifts")]
    axes = [normal_axis(d, len(g.shape)) for d in g.saved("dims")]
    back = [-n for n in shifts]
    if not axes:  # over all entries in order
        return _mixing(
            g,
            s,
            "roll",
            lambda t: t.flatten(1).roll(shifts, 1).view(t.shape),
            lambda c: c.flatten(1).roll(back, 1).view(c.shape),
            range(len(g.shape)),
            detail=tuple(shifts),
        )
    dims, sizes = [a + 1 for a in axes], g.shape
    by = {a: sum(n for n, b in zip(shifts, axes, strict=True) if a == b) for a in axes}
    return _mixing(
        g, s, f"roll by {sorted(by.items())}", lambda t: t.roll(shifts, dims), lambda c: c.roll(back, dims), axes,
        lambda a: numpy.arange(sizes[a]) - by[a],
    )  # fmt: skip


@rule("Rot90")
def rot90(g):
    axes = [normal_axis(d, len(g.shape)) for d in g.saved("dims")]
    dims, k = [a + 1 for a in axes], normal_index(g.saved("k"))
    return _mixing(
        g, g.src[0], "rot90", lambda t: t.rot90(k, dims), lambda c: c.rot90(-k, dims), axes,
        detail=(k, *axes),
    )  # fmt: skip


def _triangle(op: str):
    """A mask on the last two axes, so that all axes are kept."""

    def run(g):
        m, corner, k = g.meta[0], g.shape[-2:], normal_index(g.saved("diagonal"))

        def mask():
            return getattr(torch.ones(corner, dtype=m.dtype, device=m.device), op)(k)

        return g.single(g.src[0], Mask(mask, written=True))

    return run


rule("Tril")(_triangle("tril"))
rule("Triu")(_triangle("triu"))


def _diagonal_map(g, s: int, shape, transposed: bool) -> int:
    """``Tensor.diagonal`` of a value of ``shape``, or its transpose."""
    n = len(shape)
    offset, d1, d2 = normal_index(g.saved("offset")), g.axis("dim1", n), g.axis("dim2", n)
    rest = [a for a in range(n) if a not in (d1, d2)]
    kept = [(a, i) for i, a in enumerate(rest)]
    length = min(shape[d1] + min(offset, 0), shape[d2] - max(offset, 0))
    whole = offset == 0 and length == shape[d1]
    if whole:  # entry i of the diagonal is at index i of d1
        kept.append((d1, n - 2))

    def take(t):
        return t.diagonal(offset, d1 + 1, d2 + 1)

    def put(c):
        sizes = list(c.shape[:-1])
        for a in sorted((d1, d2)):
            sizes.insert(a + 1, shape[a])
        return torch.ops.aten.diagonal_backward(c, sizes, offset, d1 + 1, d2 + 1)

    push, pull = take, put
    if transposed:
        push, pull, kept = put, take, [(b, a) for a, b in kept]
    edge = Functional(
        "diagonal", push, pull, tuple(kept), (1.0, 1.0), anywhere=not whole, moves=(True, True),
        detail=(offset, d1, d2),
    )  # fmt: skip
    return g.single(s, edge, g.shape)


@rule("Diagonal")
def diagonal(g):
    return _diagonal_map(g, g.src[0], g.values[g.src[0]].shape, False)


@rule("DiagEmbed", "DiagonalBackward")
def diag_embed(g):
    return _diagonal_map(g, g.src[0], g.shape, True)


def _windows(g, s: int, shape, transposed: bool) -> int:
    """``Tensor.unfold`` of a value of ``shape``, or its transpose."""
    dim = "dim" if transposed else "dimension"
    axis, size, step = g.axis(dim, len(shape)), g.saved("size"), g.saved("step")

    def cut(t):
        return t.unfold(axis + 1, size, step)

    def join(c):
        sizes = list(c.shape[:-1])
        sizes[axis + 1] = shape[axis]
        return torch.ops.aten.unfold_backward(c, sizes, axis + 1, size, step)

    push, pull = (join, cut) if transposed else (cut, join)
    kept, moves = keep_all_but((axis,), len(shape)), (not transposed, transposed)
    edge = Functional(
        "unfold", push, pull, kept, anywhere=True, moves=moves, detail=(axis, size, step)
    )
    return g.single(s, edge, g.shape)


@rule("Unfold")
def unfold(g):
    shape = g.values[g.src[0]].shape
    return _windows(g, g.src[0], shape, False) if shape else None


@rule("UnfoldBackward")
def fold(g):
    return _windows(g, g.src[0], g.shape, True) if g.shape else None


# -- a piece written over ---------------------------------------------------------------------------


def _overwritten(g, put) -> int:
    """The old value with a piece masked out, plus the new piece in its place."""
    old, new = g.src
    terms = []
    if old is not None:
        terms.append(Partials(g).mask(g, old, 0, True))
    if new is not None:
        terms.append(put(new))
    return g.plus(terms)


@rule("SliceScatter")
def slice_scatter(g):
    n = len(g.shape)
    axis = g.axis("dim", n)
    ends = [None if e is None else normal_index(e) for e in (g.saved("start"), g.saved("end"))]
    size, step = g.shape[axis], g.saved("step")
    start, _, _ = slice(*ends, step).indices(size)
    return _overwritten(g, lambda s: place(g, s, axis, start, size, step))


@rule("SelectScatter")
def select_scatter(g):
    return _overwritten(g, lambda s: _put_selected(g, s))


@rule("SelectBackward")
def select_backward(g):
    return _put_selected(g, g.src[0])


def _put_selected(g, s: int) -> int:
    shape = g.shape
    axis = g.axis("dim", len(shape))
    n = shape[axis]
    s = g.view(s, (*shape[:axis], 1, *shape[axis + 1 :]))
    return place(g, s, axis, normal_index(g.saved("index")) % n, n)


@rule("SliceBackward")
def slice_backward(g):
    axis = g.axis("dim", len(g.shape))
    size, step = g.shape[axis], g.saved("step")
    ends = [normal_index(e) for e in (g.saved("start"), g.saved("end"))]
    start, _, _ = slice(*ends, step).indices(size)
    return place(g, g.src[0], axis, start, size, step)


@rule("DiagonalScatter")
def diagonal_scatter(g):
    return _overwritten(g, lambda s: _diagonal_map(g, s, g.shape, True))
