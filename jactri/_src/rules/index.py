"""Ops that pick entries by index, or write to them: gathers and their transposes, scatters."""

from __future__ import annotations

from math import prod

import numpy
import torch
from torch import Tensor

from ..base.backends import capturing
from ..base.csr import Csr
from ..maps.cut import Cut, Shape
from ..maps.linear_map import Kept, LinearMap
from ..maps.links import digest_of
from ..maps.maps import Transpose
from ..maps.mask import Mask
from ..maps.selection import Gather, Take
from . import normal_index, rule
from .elementwise import Partials, flat
from .shape import piece


class Pick(LinearMap):
    """Any entries, in any order: output entry ``i`` is input entry ``index[i]``, both counted in flat order.

    Axes that the index leaves in place are found by looking at it.
    """

    __slots__ = ("_kept", "in_shape", "index", "out_shape")
    name, structure = "pick", "gather"

    def __init__(self, index: Tensor, in_shape: Shape, out_shape: Shape, kept: Kept | None = None):
        self.index, self.in_shape, self.out_shape = index.reshape(-1), in_shape, out_shape
        self._kept = unmoved(self.index, in_shape, out_shape) if kept is None else kept

    @property
    def key(self):
        return type(self), self._kept

    def kept(self, in_shape, out_shape):
        return self._kept

    def picks(self, in_shape, out_shape):
        return self._pair

    @property
    def _pair(self) -> Kept:
        """The only axes (before, after) that are not kept, if there is one on each side."""
        ends = self.in_shape, self.out_shape
        left = [
            [a for a, n in enumerate(shape) if n != 1 and a not in {pair[k] for pair in self._kept}]
            for k, shape in enumerate(ends)
        ]
        return ((left[0][0], left[1][0]),) if [len(axes) for axes in left] == [1, 1] else ()

    def support(self, axis, in_shape, out_shape):
        ((a, b),) = self._pair
        (n, unit), (m, step) = (
            (shape[k], prod(shape[k + 1 :]))
            for shape, k in ((self.in_shape, a), (self.out_shape, b))
        )
        index = self.index.cpu().numpy()
        return Csr.of(numpy.arange(len(index)) // step % m, index // unit % n, m, n)

    def links(self, in_shape, out_shape):
        return Csr.picked(self.index.cpu().numpy(), prod(self.in_shape))

    @property
    def digest(self):
        return digest_of(self.index)

    def narrow(self, source, target, in_shape, out_shape):
        return type(self)(*self._cut(source, target), self._kept)

    def _cut(self, source: Cut, target: Cut) -> tuple[Tensor, Shape, Shape]:
        """The index of a range of samples, which the pair of axes (source, target) keeps in place."""
        a, n = source.axis, self.in_shape[source.axis]
        unit = prod(self.in_shape[a + 1 :])
        grid = target.of(self.index.view(self.out_shape), len(self.out_shape))
        before, after = grid // (unit * n), grid % unit
        at = (grid // unit) % n - source.start
        index = (before * source.length + at) * unit + after
        return index, source.shape(self.in_shape), target.shape(self.out_shape)

    def reach(self, t, in_shape, out_shape, reverse, values):
        if not reverse:
            return Pick.push(self, t, False)[0]
        flat = Gather(self.index, prod(self.in_shape)).reach(
            t.reshape(len(t), -1), (), (), True, values
        )
        return flat.view(len(t), *self.in_shape)

    def push(self, t, own):
        picked = t.reshape(t.shape[0], -1).index_select(1, self.index)
        return picked.view(t.shape[0], *self.out_shape), True

    def pull(self, c, own):
        k = c.shape[0]
        out = c.new_zeros(k, prod(self.in_shape)).index_add_(1, self.index, c.reshape(k, -1))
        return out.view(k, *self.in_shape), True


class Put(Pick):
    """The transpose of `Pick`: input entry ``i`` is added to output entry ``index[i]``."""

    __slots__ = ()
    name = "put"

    def __init__(self, index: Tensor, in_shape: Shape, out_shape: Shape, kept: Kept | None = None):
        super().__init__(index, out_shape, in_shape, kept)

    def kept(self, in_shape, out_shape):
        return tuple((b, a) for a, b in self._kept)

    def picks(self, in_shape, out_shape):
        return tuple((b, a) for a, b in self._pair)

    def support(self, axis, in_shape, out_shape):
        return super().support(axis, out_shape, in_shape).T

    def links(self, in_shape, out_shape):
        return super().links(out_shape, in_shape).T

    def narrow(self, source, target, in_shape, out_shape):
        index, small_out, small_in = self._cut(target, source)
        return Put(index, small_in, small_out, self._kept)

    def reach(self, t, in_shape, out_shape, reverse, values):
        return super().reach(t, out_shape, in_shape, not reverse, values)

    def push(self, t, own):
        return Pick.pull(self, t, own)

    def pull(self, c, own):
        return Pick.push(self, c, own)


def unmoved(index: Tensor, in_shape: Shape, out_shape: Shape) -> Kept:
    """The (input, output) axis pairs with the same position on both, at every entry of a flat ``index``.

    A trace and a CUDA graph are for other indices, too.
    """
    if index.numel() == 0 or capturing(index.device):
        return ()
    grid, pairs, taken = index.reshape(out_shape), [], set()
    stride = prod(in_shape)
    for a, n in enumerate(in_shape):
        stride //= n
        if n == 1:
            continue
        position = None
        for b, m in enumerate(out_shape):
            if m != n or b in taken:
                continue
            if position is None:
                position = (grid // stride) % n
            own = torch.arange(n, device=index.device).view(n, *[1] * (len(out_shape) - b - 1))
            if bool((position == own).all()):
                pairs.append((a, b))
                taken.add(b)
                break
    return tuple(pairs)


def places(shape: Shape, device) -> Tensor:
    """A tensor of ``shape`` that holds the flat position of each entry: indexing it tells what indexing picks."""
    return torch.arange(prod(shape), device=device).view(shape)


def pick(g, s: int, index: Tensor) -> int:
    return g.single(s, Pick(index, g.values[s].shape, g.shape), g.shape)


def put(g, s: int, index: Tensor) -> int:
    return g.single(s, Put(index, g.values[s].shape, g.shape), g.shape)


# -- reading ----------------------------------------------------------------------------------------


def _indices(g) -> list[Tensor | None]:
    return [i if i is None or i.dtype != torch.uint8 else i.bool() for i in g.saved("indices")]


@rule("Index")
def index(g):
    (s,) = g.src
    shape, indices = g.values[s].shape, _indices(g)
    given = [(a, i) for a, i in enumerate(indices) if i is not None]
    if len(given) == 1 and given[0][1].dim() == 1:
        axis, i = given[0]
        if i.dtype == torch.bool:
            i = i.nonzero().squeeze(1)
        n = shape[axis]
        return g.single(s, Take(axis, torch.where(i < 0, i + n, i), n), g.shape)
    where = tuple([slice(None) if i is None else i for i in indices])
    return pick(g, s, places(shape, g.meta[0].device)[where])


@rule("IndexSelect", moves=True)
def index_select(g):
    (s,) = g.src
    shape = g.values[s].shape
    if not shape:
        return g.view(s, g.shape)
    axis = g.axis("dim", len(shape))
    return g.single(s, Take(axis, g.tensor("index").reshape(-1), shape[axis]), g.shape)


@rule("PackPaddedSequence")
def pack_padded_sequence(g):
    """At every step, the rows of the sequences that last as long; the second result counts them."""
    (s,) = g.src
    if g.saved("batch_first"):
        s = g.permute(s, (1, 0, *range(2, len(g.values[s].shape))))
    steps, count, *rest = g.values[s].shape
    sizes = g.tensor("result1")
    i = torch.arange(count) < sizes.unsqueeze(1)
    rows = (
        i.flatten().nonzero().squeeze(1).to(g.device)
    )  # sequences may all be shorter than the padding
    s = g.view(s, (steps * count, *rest))
    out = g.single(s, Take(0, rows, steps * count), g.shape)
    return out, *[None] * (len(g.meta) - 1)


@rule("Gather")
def gather(g):
    return along(g, g.tensor("index"), True)


def along(g, i: Tensor, given: bool = False) -> int:
    """``torch.gather`` with an index of the output's shape, or without the axis it picks from."""
    (s,) = g.src
    shape = g.values[s].shape
    if not shape:
        return g.view(s, g.shape)
    axis = g.axis("dim", len(shape))
    if i.dim() < len(shape):
        i = i.unsqueeze(axis)
    for a, n in enumerate(i.shape):
        if a != axis:
            s = piece(g, s, a, 0, n)  # an index may stop short on the other axes
    return g.view(g.single(s, Gather(i, shape[axis], axis, given), tuple(i.shape)), g.shape)


@rule(
    "Cummax", "Cummin", "Kthvalue", "Max", "Median.1", "Min", "Mode", "Nanmedian.1", "Sort.0-1", "Topk"
)  # fmt: skip
def by_order(g):
    """The chosen entries; the second result, their indices, has no derivative."""
    values = along(g, g.tensor("indices"))
    return (values, *[None] * (len(g.meta) - 1))


@rule("Take")
def take(g):
    (s,) = g.src
    return pick(g, s, places(g.values[s].shape, g.meta[0].device).take(g.tensor("index")))


@rule("MaskedSelect")
def masked_select(g):
    (s,) = g.src
    shape = g.values[s].shape
    return pick(g, s, places(shape, g.meta[0].device).masked_select(g.tensor("mask")))


@rule("Embedding")
def embedding(g):
    """Rows of the weight; autograd gives the padding row no gradient, and may average over repeats."""
    (s,) = g.src
    rows, dim = g.values[s].shape
    i, m = g.tensor("indices"), g.meta[0]
    padding, averaged = normal_index(g.saved("padding_idx")), g.saved("scale_grad_by_freq")
    flat = g.single(s, Take(0, i.reshape(-1), rows), (i.numel(), dim))
    out = g.view(flat, g.shape)
    if padding == -1 and not averaged:
        return out

    def weight() -> Tensor:
        w = (i != padding).to(m.dtype)
        if averaged:
            w = w / i.reshape(-1).bincount(minlength=rows)[i]
        return w.unsqueeze(-1)

    return g.mask(
        out, weight, (lambda: (i != padding).to(m.dtype).unsqueeze(-1)) if averaged else None
    )


# -- writing ----------------------------------------------------------------------------------------


def _written(g, accumulate: bool, new: int | None) -> int:
    """The old value, without what is written over unless ``accumulate``, plus the new entries."""
    old, terms = g.src[0], []
    if old is not None:
        if accumulate:
            terms.append(old)
        else:
            terms.append(
                Partials(g).mask(g, g.expand(old, g.shape), 0, True)
            )  # a mask may be larger
    return g.plus(terms if new is None else [*terms, new])


def _second(g) -> int | None:
    return g.src[1] if len(g.src) > 1 else None


@rule("Scatter.0-1", "ScatterAdd")
def scatter(g):
    new = _second(g)
    if new is not None:
        i = g.tensor("index")
        axis = g.axis("dim", max(len(g.shape), 1))
        at = places(g.shape, i.device).gather(axis, i)
        for a, n in enumerate(at.shape):
            new = piece(g, new, a, 0, n)  # the source may be larger than the index
        new = put(g, new, at)
    return _written(g, g.name == "ScatterAddBackward0", new)


@rule("IndexPut", "IndexPutImpl")
def index_put(g):
    new = _second(g)
    if new is not None:
        where = tuple([slice(None) if i is None else i for i in _indices(g)])
        at = places(g.shape, g.meta[0].device)[where]
        new = put(g, g.expand(new, tuple(at.shape)), at)
    return _written(g, bool(g.saved("accumulate")), new)


@rule("Put")
def put_(g):
    new = _second(g)
    if new is not None:
        at = places(g.shape, g.meta[0].device).take(g.tensor("index"))
        new = put(g, g.view(new, tuple(at.shape)), at)
    return _written(g, bool(g.saved("accumulate")), new)


@rule("AsStridedScatter")
def as_strided_scatter(g):
    """A write to a view by strides. Torch's own backward (2.13) is not its derivative: it passes on the places that
    were written to, and not the others. Of entries that share a place, the one that torch writes last counts.
    """
    (old, new), m, shape = g.src, g.meta[0], g.shape
    view = g.saved("size"), g.saved("stride"), g.saved("storage_offset") or 0
    at = places(shape, m.device).as_strided(*view)
    terms = []
    if old is not None:

        def kept() -> Tensor:
            ones = torch.ones(shape, dtype=m.dtype, device=m.device)
            ones.as_strided(*view).fill_(0)
            return ones

        terms.append(g.single(old, Mask(kept, written=True)))
    if new is not None:
        order = places(at.shape, m.device)
        written = torch.empty(prod(shape), dtype=order.dtype, device=m.device)
        written.as_strided(*view).copy_(order)
        last = (written[at] == order).to(m.dtype)
        terms.append(put(g, g.mask(new, lambda: last), at))
    return g.plus(terms)


@rule("MaskedScatter")
def masked_scatter(g):
    new = _second(g)
    if new is not None:
        at = places(g.shape, g.meta[0].device).masked_select(g.tensor("mask"))
        shape = g.values[new].shape
        new = put(g, piece(g, g.view(new, (prod(shape),)), 0, 0, at.numel()), at)
    return _written(g, False, new)


def _spread(g, s: int) -> int | None:
    """The transpose of ``index_select``: slices of ``s`` added to those of the output."""
    n = len(g.shape)
    if n == 0 or len(g.values[s].shape) != n:
        return None
    axis = g.axis("dim", n)
    edge = Transpose(Take(axis, g.tensor("index").reshape(-1), g.shape[axis]))
    return g.single(s, edge, g.shape)


@rule("IndexAdd", "IndexCopy")
def index_add(g):
    new, adds = _second(g), g.name == "IndexAddBackward0"
    if new is not None:
        new = _spread(g, g.scale(new, g.saved("alpha")) if adds else new)
        if new is None:
            return None
    return _written(g, adds, new)


@rule("IndexFill.0-1", curve=flat)
def index_fill(g):
    new, m = _second(g), g.meta[0]
    if new is not None:
        if not g.shape:
            return None
        i, axis, shape = g.tensor("index"), g.axis("dim", len(g.shape)), g.shape

        def filled():
            return torch.zeros(shape, dtype=m.dtype, device=m.device).index_fill(axis, i, 1)

        new = g.single(g.expand(new, shape), Mask(filled, written=True))
    return _written(g, False, new)


@rule("ScatterReduce", "IndexReduce")
def scatter_reduce(g):
    """Each entry of both operands feeds one entry of the output: the node applied to ones is its weight."""
    old, new = g.src
    i, partials, terms = g.tensor("index"), Partials(g, False), []
    if old is not None:
        terms.append(partials.scaled_mask(g, old, 0))
    if new is not None:
        shape = g.values[new].shape
        weighted = partials.scaled_mask(g, new, 1)
        if g.name == "IndexReduceBackward0":
            new = _spread(g, weighted)
        elif shape == tuple(i.shape):
            axis = g.axis("dim", max(len(g.shape), 1))
            new = put(g, weighted, places(g.shape, i.device).gather(axis, i))
        else:
            new = None
        if new is None:
            return None
        terms.append(new)
    return g.plus(terms)
