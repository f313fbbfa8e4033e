"""Linear maps that select entries (slices, gathers) or put them in their places: they move numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy
import torch
from torch import Tensor

from ..base.csr import Csr
from .cut import Shape
from .linear_map import LinearMap, keep_all_but
from .links import digest_of, moved


class Slice(LinearMap):
    """Every ``step``-th entry of ``axis`` from ``start``: a view in the push, padding with zeros in the pull."""

    __slots__ = ("axis", "length", "size", "start", "step")
    name, structure = "slice", "gather"

    def __init__(self, axis: int, start: int, length: int, step: int, size: int):
        self.axis, self.start, self.length, self.step, self.size = axis, start, length, step, size

    @property
    def key(self):
        return type(self), self.axis, self.start, self.length, self.step, self.size

    def kept(self, in_shape, out_shape):
        return tuple((a, a) for a in range(len(in_shape)) if a != self.axis)

    def windows(self, in_shape, out_shape):
        return ((self.axis, self.axis),)

    def support(self, axis, in_shape, out_shape):
        return Csr.picked(self.selected(), self.size)

    def selected(self) -> numpy.ndarray:
        return self.start + self.step * numpy.arange(self.length)

    def narrow(self, source, target, in_shape, out_shape):
        return self

    def places(self, reverse):
        return reverse

    def reach(self, t, in_shape, out_shape, reverse, values):
        return (self.pull if reverse else self.push)(t, False)[0]

    def window(self, t: Tensor) -> Tensor:
        if self.step == 1:
            return t.narrow(self.axis + 1, self.start, self.length)
        index = [slice(None)] * t.dim()
        index[self.axis + 1] = slice(
            self.start, self.start + (self.length - 1) * self.step + 1, self.step
        )
        return t[tuple(index)]

    def push(self, t, own):
        return self.window(t), False

    def pull(self, c, own):
        shape = list(c.shape)
        shape[self.axis + 1] = self.size
        end = self.start + (self.length - 1) * self.step + 1
        out = torch.ops.aten.slice_backward(c, shape, self.axis + 1, self.start, end, self.step)
        return out, True


class Place(Slice):
    """The transpose of `Slice`: a piece put into zeros along one axis (a ``cat``, zero padding)."""

    __slots__ = ()
    name = "place"

    def support(self, axis, in_shape, out_shape):
        return Csr.picked(self.selected(), self.size).T

    def places(self, reverse):
        return not reverse

    def push(self, t, own):
        return Slice.pull(self, t, own)

    def pull(self, c, own):
        return Slice.push(self, c, own)


def side_by_side(edges: Sequence[LinearMap], reverse: bool) -> list[int] | None:
    """The order in which maps put their data along one axis that they fill, each a part of its own; None if not so."""
    slices = [e for e in edges if isinstance(e, Slice) and e.places(reverse) and e.step == 1]
    if len(slices) < len(edges) or len({(e.axis, e.size) for e in slices}) > 1:
        return None
    order, end = sorted(range(len(slices)), key=lambda i: (slices[i].start, slices[i].length)), 0
    for i in order:
        if slices[i].start != end:
            return None
        end += slices[i].length
    return order if end == slices[0].size else None


class Take(LinearMap):
    """Entries ``index`` (1-D, repeats allowed) of one axis.

    ``fixed`` says what determines the index, where that is the op and not data: then its support is known.
    """

    __slots__ = ("axis", "fixed", "index", "size")
    name, structure = "take", "gather"

    def __init__(self, axis: int, index: Tensor, size: int, fixed: object = None):
        self.axis, self.index, self.size, self.fixed = axis, index, size, fixed

    @property
    def key(self):
        return Take, self.axis, self.fixed

    def windows(self, in_shape, out_shape):
        return () if self.fixed is None else ((self.axis, self.axis),)

    def picks(self, in_shape, out_shape):
        return ((self.axis, self.axis),) if self.fixed is None else ()

    def support(self, axis, in_shape, out_shape):
        return Csr.picked(self.index.cpu().numpy(), self.size)

    @property
    def digest(self):
        return digest_of(self.index) if self.fixed is None else None

    def kept(self, in_shape, out_shape):
        return tuple((a, a) for a in range(len(in_shape)) if a != self.axis)

    def narrow(self, source, target, in_shape, out_shape):
        return self

    def reach(self, t, in_shape, out_shape, reverse, values):
        if not reverse:
            return self.push(t, False)[0]
        index = self.index.view(-1, *[1] * (t.dim() - self.axis - 2)).expand(t.shape[1:])
        return Gather(index, self.size, self.axis).reach(t, in_shape, out_shape, True, values)

    def push(self, t, own):
        return t.index_select(self.axis + 1, self.index), True

    def pull(self, c, own):
        shape = list(c.shape)
        shape[self.axis + 1] = self.size
        return c.new_zeros(shape).index_add_(self.axis + 1, self.index, c), True


class Gather(LinearMap):
    """``out[..., j] = in[..., index[..., j]]`` on one axis, with its own index for every other entry.

    ``given``: whether the index is the caller's, and not what a maximum or a sort found among values.
    """

    __slots__ = ("axis", "given", "index", "size")
    name, structure = "gather", "gather"

    def __init__(self, index: Tensor, size: int, axis: int | None = None, given: bool = False):
        """``size`` is the input's along ``axis``, by default the last."""
        self.index, self.size, self.given = index, size, given
        self.axis = index.dim() - 1 if axis is None else axis

    @property
    def key(self):
        return Gather, self.axis

    def kept(self, in_shape, out_shape):
        return keep_all_but((self.axis,), len(in_shape))

    def picks(self, in_shape, out_shape):
        return ((self.axis, self.axis),) if self.given else ()

    def support(self, axis, in_shape, out_shape):
        grid = self.index.movedim(self.axis, -1).cpu().numpy()
        row = numpy.broadcast_to(numpy.arange(grid.shape[-1]), grid.shape)
        return Csr.of(row.reshape(-1), grid.reshape(-1), grid.shape[-1], self.size)

    def links(self, in_shape, out_shape):
        if not self.given:
            return None
        return moved(lambda t: Gather.push(self, t, False)[0], in_shape, self.index.device)

    @property
    def digest(self):
        return digest_of(self.index) if self.given else None

    @property
    def chosen(self):
        return not self.given

    def narrow(self, source, target, in_shape, out_shape):
        return Gather(target.of(self.index, len(out_shape)), self.size, self.axis, self.given)

    def reach(self, t, in_shape, out_shape, reverse, values):
        index, dim = self._expanded(self.index, t), self.axis + 1
        if not reverse:
            return t.gather(dim, index)
        zeros = t.new_zeros((*t.shape[:dim], self.size, *t.shape[dim + 1 :]))
        return zeros.scatter_reduce_(dim, index, t, "amax")

    def push(self, t, own):
        if self._channels_last(t):
            index = self._expanded(self.index.mT.contiguous(), t)
            return t.mT.gather(-2, index).mT, True
        return t.gather(self.axis + 1, self._expanded(self.index, t)), True

    def pull(self, c, own):
        shape = list(c.shape)
        shape[self.axis + 1] = self.size
        if self._channels_last(c):
            index = self._expanded(self.index.mT.contiguous(), c)
            shape[-2:] = shape[-1], shape[-2]
            return c.new_zeros(shape).scatter_add_(-2, index, c.mT).mT, True
        index = self._expanded(self.index, c)
        return c.new_zeros(shape).scatter_add_(self.axis + 1, index, c), True

    def _channels_last(self, t: Tensor) -> bool:
        """Whether a block has neighbours in memory along the axis before, and keeps them so."""
        last = self.axis + 2 == t.dim() > 2
        return last and t.stride(-2) == 1 < min(t.stride(-1), t.shape[-2])

    @staticmethod
    def _expanded(index: Tensor, t: Tensor) -> Tensor:
        return index.expand(t.shape[0], *index.shape)


class Select(LinearMap):
    """One entry of ``axis``, which is left out: a view in the push."""

    __slots__ = ("axis", "index", "size")
    name, structure = "select", "gather"

    def __init__(self, axis: int, index: int, size: int):
        self.axis, self.index, self.size = axis, index, size

    @property
    def key(self):
        return Select, self.axis, self.index

    def kept(self, in_shape, out_shape):
        return tuple((a, a - (a > self.axis)) for a in range(len(in_shape)) if a != self.axis)

    def links(self, in_shape, out_shape):
        before, after = prod(in_shape[: self.axis]), prod(in_shape[self.axis + 1 :])
        line = numpy.arange(before)[:, None] * self.size + self.index
        return Csr.picked(line * after + numpy.arange(after), prod(in_shape))

    def narrow(self, source, target, in_shape, out_shape):
        return self

    def places(self, reverse):
        return reverse

    def reach(self, t, in_shape, out_shape, reverse, values):
        return (self.pull if reverse else self.push)(t, False)[0]

    def window(self, t):
        return t.select(self.axis + 1, self.index)

    def push(self, t, own):
        return self.window(t), False

    def pull(self, c, own):
        shape = list(c.shape)
        shape.insert(self.axis + 1, self.size)
        return torch.ops.aten.select_backward(c, shape, self.axis + 1, self.index), True


class Scatter(Gather):
    """The transpose of `Gather`: ``out[..., index[..., j]] += in[..., j]`` on the last axis."""

    __slots__ = ()
    name = "scatter"

    @property
    def key(self):
        return Scatter, self.axis

    def support(self, axis, in_shape, out_shape):
        return super().support(axis, out_shape, in_shape).T

    def links(self, in_shape, out_shape):
        found = super().links(out_shape, in_shape)
        return None if found is None else found.T

    def narrow(self, source, target, in_shape, out_shape):
        return Scatter(source.of(self.index, len(in_shape)), self.size, self.axis, self.given)

    def reach(self, t, in_shape, out_shape, reverse, values):
        return super().reach(t, out_shape, in_shape, not reverse, values)

    def push(self, t, own):
        return Gather.pull(self, t, own)

    def pull(self, c, own):
        return Gather.push(self, c, own)


class Picked(LinearMap):
    """A `Gather` or `Scatter` on the last axes as one, as the pools of images are; ``size`` and ``out`` are those axes.

    ``options`` say which window of the larger image goes with which entry of the smaller one: (kernel, stride, padding,
    dilation) an axis, ``("adaptive",)``, or None where nothing does.
    """

    __slots__ = ("base", "options", "out", "size")
    structure = "gather"

    def __init__(self, base: Gather, size: Shape, out: Shape, options: tuple | None):
        self.base, self.size, self.out, self.options = base, tuple(size), tuple(out), options

    @property
    def name(self):
        return self.base.name

    @property
    def key(self):
        return Picked, self.base.key, self.options

    @property
    def chosen(self):
        return self.base.chosen

    def kept(self, in_shape, out_shape):
        return tuple((a, a) for a in range(len(in_shape) - len(self.size)))

    def windows(self, in_shape, out_shape):
        if self.options is None:
            return ()
        return tuple((a, a) for a in range(len(in_shape) - len(self.size), len(in_shape)))

    def support(self, axis, in_shape, out_shape):
        spread = isinstance(self.base, Scatter)
        fine, coarse = in_shape[axis], out_shape[axis]
        if spread:
            fine, coarse = coarse, fine
        if self.options == ("adaptive",):
            at = numpy.arange(coarse)
            first, end = at * fine // coarse, -(-(at + 1) * fine // coarse)
            most = int((end - first).max(initial=0))
            places = first[:, None] + numpy.arange(most)
            row, k = numpy.nonzero(places < end[:, None])
            seen = Csr.of(row, places[row, k], coarse, fine)
        else:
            seen = Csr.windows(coarse, fine, *self.options[axis - len(in_shape)])
        return seen.T if spread else seen

    def pool_map(self, shape: Shape, reverse: bool) -> str | None:
        """Which map of `kernels.pool` a push or pull of values of ``shape`` (N, C, *image) is, if any."""
        if len(shape) != len(self.size) + 2 or len(self.size) > 2:
            return None
        if isinstance(self.base, Scatter) == reverse:
            return "gather"
        return "scatter" if self.options not in (None, ("adaptive",)) else None

    def narrow(self, source, target, in_shape, out_shape):
        tail = len(self.size)
        shapes = (*in_shape[:-tail], 0), (*out_shape[:-tail], 0)
        return Picked(self.base.narrow(source, target, *shapes), self.size, self.out, self.options)

    def reach(self, t, in_shape, out_shape, reverse, values):
        near, far = (self.out, self.size) if reverse else (self.size, self.out)
        flat = t.flatten(-len(near))
        return self.base.reach(flat, in_shape, out_shape, reverse, values).unflatten(-1, far)

    def push(self, t, own):
        flat, own = self.base.push(t.flatten(-len(self.size)), own)
        return flat.unflatten(-1, self.out), own

    def pull(self, c, own):
        flat, own = self.base.pull(c.flatten(-len(self.out)), own)
        return flat.unflatten(-1, self.size), own
