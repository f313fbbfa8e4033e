"""Linear maps that sum: over axes, and against a matrix. An axis that is tied to the seed needs no sum."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..base import backends
from ..base.intervals import for_good, thin
from ..device.batching import bmm
from .cut import Cut, Shape
from .layout import FREE, Layout, convert, matrix_view, one, release, released
from .linear_map import LinearMap, Route
from .unmasked import Unmasked


class Sum(LinearMap):
    """The sum over ``axes``, which stay with size 1. A tied axis needs no sum: its index becomes a seed."""

    __slots__ = ("axes", "in_shape")
    name, structure = "sum", "sum"

    def __init__(self, axes: Shape, in_shape: Shape):
        self.axes, self.in_shape = axes, in_shape

    @property
    def key(self):
        return type(self), self.axes

    def kept(self, in_shape, out_shape):
        return tuple((a, a) for a in range(len(in_shape)) if a not in self.axes)

    def _contract(self, layout: Layout) -> Route:
        mid = out = layout.untie([a for a in self.axes if not layout.is_tied(a)])
        for a in self.axes:
            out = released(out, a)
        sums = any(mid.shape[a] > 1 and not mid.is_tied(a) for a in self.axes)
        return Route(mid, out, -1, moves=sums or mid is not layout)

    def _spread(self, layout: Layout) -> Route:
        axes = list(layout.axes)
        for a in self.axes:
            axes[a] = ((self.in_shape[a], FREE),)
        return Route(layout, Layout(tuple(axes), layout.seed), moves=False)

    def route(self, layout, in_shape, out_shape, reverse):
        return self._spread(layout) if reverse else self._contract(layout)

    def narrow(self, source, target, in_shape, out_shape):
        return Sum(self.axes, source.shape(in_shape))

    def push(self, t, own):
        return t.sum([a + 1 for a in self.axes], keepdim=True), True

    def pull(self, c, own):
        return c.expand(c.shape[0], *self.in_shape), False

    def apply(self, data, own, layout, route, reverse, sel, like):
        if route.axis is None:  # spread: ones stay ones
            return (None, False) if data is None else self._expand(data)
        if route.mid is not layout:
            block = convert(data, layout, route.mid, sel, like)
            data, own = block, own or block is not data
        at = route.mid
        loose = [a for a in self.axes if not at.is_tied(a)]
        if loose:
            count = prod(self.in_shape[a] for a in loose)
            if data is None:
                shape = [1 if a in loose else n for a, n in enumerate(at.shape)]
                data, own = one(like).mul(count).expand(1, *shape), False
            elif count != 1:
                data, own = data.sum([a + 1 for a in loose], keepdim=True), True
            for a in loose:
                at = released(at, a)
        for a in self.axes:
            if a not in loose:
                data = release(data, at, a, sel)
                at = released(at, a)
                if data is not None:
                    data = data.reshape(at.columns_of(sel), *at.shape)
        if data is None and route.out.free:  # ones for every freed seed
            data, own = one(like).expand(at.columns_of(sel), *at.shape), False
        return data, own

    def _expand(self, data: Tensor) -> tuple[Tensor, bool]:
        return data.expand(data.shape[0], *self.in_shape), False


class Expand(Sum):
    """The transpose of `Sum`: ``axes`` of size 1 repeated to the sizes of ``out_shape``."""

    __slots__ = ()
    name, structure = "expand", "expand"

    def __init__(self, axes: Shape, out_shape: Shape):
        super().__init__(axes, out_shape)

    def route(self, layout, in_shape, out_shape, reverse):
        return self._contract(layout) if reverse else self._spread(layout)

    def narrow(self, source, target, in_shape, out_shape):
        return Expand(self.axes, target.shape(out_shape))

    def push(self, t, own):
        return self._expand(t)

    def pull(self, c, own):
        return c.sum([a + 1 for a in self.axes], keepdim=True), True


_SEEN = 1 << 26
"""Pairs of entries of which a product is asked whether one sees the other, at most."""


_keys: dict[tuple[str, int], tuple] = {}
"""Of matrices: a long graph has many of one key."""


class MatMul(LinearMap):
    """Multiplication by a matrix: ``x @ partner`` (side "right") or ``partner @ x`` (side "left").

    ``partner`` is 2-D and shared by all leading axes of ``x`` or 3-D, ``(b, ., .)``, for ``x`` of shape
    ``(b, m, n)``. Where the contracted axis is tied to the seed there is nothing to sum: the block becomes the
    partner's rows scaled (or the partner itself, under an identity seed). ``unmasked``: which entries of the partner
    may be other than zero, if a mask tells.
    """

    __slots__ = ("key", "partner", "side", "structure", "uniform", "unmasked")
    name = "matmul"

    def __init__(self, partner: Tensor, side: str = "right", unmasked: Unmasked | None = None):
        self.partner, self.side, self.unmasked = partner, side, unmasked
        self.key = _keys.setdefault((side, partner.dim()), (MatMul, side, partner.dim()))  # type: ignore[misc]
        shared = partner.dim() == 2
        self.structure = "shared matrix" if shared else "batched matrix"
        self.uniform = side == "right" and shared

    def kept(self, in_shape, out_shape):
        n = len(in_shape)
        axis = n - 1 if self.side == "right" else n - 2
        return tuple((a, a) for a in range(n) if a != axis)

    def route(self, layout, in_shape, out_shape, reverse):
        n = len(in_shape)
        axis = n - 1 if self.side == "right" else n - 2
        mid, out, tied = layout.contract(axis, (in_shape if reverse else out_shape)[axis])
        if tied:
            return Route(mid, out, axis)
        return Route(mid, out, None, self.work(in_shape, out_shape, reverse))

    def reach(self, t, in_shape, out_shape, reverse, values):
        """By the partner's zeros, where they count and are not too many to look at."""
        right = self.side == "right"
        axis = t.dim() - 1 if right else t.dim() - 2
        seen = None if self.unmasked is None else self.unmasked()
        if values and for_good(self.partner):
            seen = self.partner != 0
        if seen is not None and t.shape[axis] > 1 and t.stride(axis):
            t = thin(t) if right else thin(t).mT
            if right == reverse:
                seen = seen.mT  # (b?, what is summed over, what it gives)
            if t.numel() * seen.shape[-1] * (len(seen) if seen.dim() == 3 else 1) <= _SEEN:
                out = (t.unsqueeze(-1) * seen.unsqueeze(-3)).amax(-2)
                return out if right else out.mT
            t = t if right else t.mT
        return super().reach(t, in_shape, out_shape, reverse, values)

    def work(self, in_shape, out_shape, reverse):
        return 2.0 * (out_shape if reverse else in_shape)[-1 if self.side == "right" else -2]

    def narrow(self, source, target, in_shape, out_shape):
        partner = self._cut(self.partner, source, target, len(in_shape))
        if partner is self.partner:
            return self
        return MatMul(partner, self.side, self._unmasked(source, in_shape))

    def _unmasked(self, source: Cut, in_shape: Shape) -> Unmasked | None:
        """What a mask leaves of a range of the matrices."""
        if self.unmasked is None or source.axis:
            return None
        return self.unmasked.of(source, in_shape[0])

    def _cut(self, p: Tensor, source: Cut, target: Cut, ndim: int) -> Tensor:
        """A partner for a range of samples, or of what is summed over and what it gives."""
        if p.dim() == 3 and source.axis == 0:
            return source.of(p, 3)
        right = self.side == "right"
        if source.axis != ndim - 2 + right or source.outer > 1 or target.outer > 1:
            return p
        rows, columns = (source, target) if right else (target, source)
        return p.narrow(-2, rows.start, rows.length).narrow(-1, columns.start, columns.length)

    def push(self, t, own):
        return self._multiply(t, False)

    def pull(self, c, own):
        return self._multiply(c, True)

    def _multiply(self, t: Tensor, transposed: bool) -> tuple[Tensor, bool]:
        p = self.partner
        if p.dim() == 3 or self.side == "left":
            if transposed:
                p = p.transpose(-1, -2)
            return (self._batched(t, p) if p.dim() == 3 else torch.matmul(p, t)), True
        lead = t.shape[1:-1]
        if not any(t.stride()[1:-1]) and prod(lead) > 1:  # the same for all samples: multiply once
            row = backends.product(t[(slice(None), *([0] * len(lead)))], p, transposed)
            return row.view(t.shape[0], *([1] * len(lead)), -1).expand(-1, *lead, -1), False
        return backends.product(t, p, transposed), True

    def _batched(self, t: Tensor, p: Tensor) -> Tensor:
        # seeds join the rows (or columns) of each sample's product, so that the partner is never copied
        k, b, m, n = t.shape
        if self.side == "right":
            rows = t.transpose(0, 1).reshape(b, k * m, n)
            return bmm(rows, p).view(b, k, m, -1).transpose(0, 1)
        columns = t.permute(1, 2, 0, 3).reshape(b, m, k * n)
        return bmm(p, columns).view(b, -1, k, n).permute(2, 0, 1, 3)

    def apply(self, data, own, layout, route, reverse, sel, like):
        axis = route.axis
        if axis is None:
            if data is None or route.mid is not layout:
                return super().apply(data, own, layout, route, reverse, sel, like)
            return self._multiply(data, reverse)
        p = self.partner
        if (self.side == "right") == reverse:
            p = p.transpose(-1, -2)
        out = route.out
        if (
            data is None
            and not layout.free
            and not sel
            and len(layout.axes[axis]) == 1
            and p.dim() == 2
        ):
            # an identity seed: the answer is the matrix itself, for every sample
            n, m = p.shape
            shape = [n] + [1] * len(out.shape)
            shape[axis + 1] = m
            # blocks take the memory order of what they are made of: the features must come last
            return p.contiguous().view(shape).expand(n, *out.shape), False
        rows = release(data, layout, axis, sel)
        matrix = matrix_view(p, layout, axis, 0 if p.dim() == 3 else None, sel).contiguous()
        if rows is None:
            full = matrix.expand(*out.seeds_of(sel), *out.shape)
            return full.reshape(out.columns_of(sel), *out.shape), False
        # a product takes the memory order of its operands, and the features must come last
        return (rows.contiguous() * matrix).reshape(out.columns_of(sel), *out.shape), True
