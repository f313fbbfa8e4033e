"""Linear maps that select entries (slices, gathers) or put them in their places: they move numbers only."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear_map import LinearMap, keep_all_but


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

    def narrow(self, source, target, in_shape, out_shape):
        return self

    def places(self, reverse):
        return reverse

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

    def places(self, reverse):
        return not reverse

    def push(self, t, own):
        return Slice.pull(self, t, own)

    def pull(self, c, own):
        return Slice.push(self, c, own)


class Take(LinearMap):
    """Entries ``index`` (1-D, repeats allowed) of one axis."""

    __slots__ = ("axis", "index", "size")
    name, structure = "take", "gather"

    def __init__(self, axis: int, index: Tensor, size: int):
        self.axis, self.index, self.size = axis, index, size

    @property
    def key(self):
        return Take, self.axis

    def kept(self, in_shape, out_shape):
        return tuple((a, a) for a in range(len(in_shape)) if a != self.axis)

    def narrow(self, source, target, in_shape, out_shape):
        return self

    def push(self, t, own):
        return t.index_select(self.axis + 1, self.index), True

    def pull(self, c, own):
        shape = list(c.shape)
        shape[self.axis + 1] = self.size
        return c.new_zeros(shape).index_add(self.axis + 1, self.index, c), True


class Gather(LinearMap):
    """``out[..., j] = in[..., index[..., j]]`` on one axis, with its own index for every other entry."""

    __slots__ = ("axis", "index", "size")
    name, structure = "gather", "gather"

    def __init__(self, index: Tensor, size: int, axis: int | None = None):
        """``size`` is the input's along ``axis``, by default the last."""
        self.index, self.size = index, size
        self.axis = index.dim() - 1 if axis is None else axis

    @property
    def key(self):
        return Gather, self.axis

    def kept(self, in_shape, out_shape):
        return keep_all_but((self.axis,), len(in_shape))

    def narrow(self, source, target, in_shape, out_shape):
        return Gather(target.of(self.index, len(out_shape)), self.size, self.axis)

    def push(self, t, own):
        return t.gather(self.axis + 1, self.index.expand(t.shape[0], *self.index.shape)), True

    def pull(self, c, own):
        shape = list(c.shape)
        shape[self.axis + 1] = self.size
        index = self.index.expand(c.shape[0], *self.index.shape)
        return c.new_zeros(shape).scatter_add(self.axis + 1, index, c), True


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

    def narrow(self, source, target, in_shape, out_shape):
        return self

    def places(self, reverse):
        return reverse

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

    def narrow(self, source, target, in_shape, out_shape):
        return Scatter(source.of(self.index, len(in_shape)), self.size, self.axis)

    def push(self, t, own):
        return Gather.pull(self, t, own)

    def pull(self, c, own):
        return Gather.push(self, c, own)
