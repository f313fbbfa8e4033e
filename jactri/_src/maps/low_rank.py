"""Maps that are a diagonal or an identity, and a correction of low rank: normalisations and softmax."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from ..base.intervals import for_good, thin
from .linear_map import LinearMap, keep_all_but
from .maps import HALF, wide
from .once import Formed
from .unmasked import Unmasked


class Project(LinearMap):
    """``t - mean(t) - unit * mean(unit * t)`` over ``axes``; without the mean if ``centred`` is false.

    The Jacobian of a normalisation is this projection times a diagonal: for ``unit = (x - mean(x)) / std(x)``,
    d unit / dx = (I - 11'/n - unit unit'/n) / std(x)  (Ba, Kiros, Hinton 2016, arXiv:1607.06450, of eq. 3).
    It is symmetric. ``unit`` broadcasts against the value.
    """

    __slots__ = ("axes", "centred", "count", "unit")
    name, structure = "projection", "low rank"

    def __init__(
        self, unit: Callable[[], Tensor], axes: tuple[int, ...], count: int, centred: bool = True
    ):
        self.unit, self.axes, self.count, self.centred = unit, axes, count, centred

    @property
    def key(self):
        return Project, self.axes, self.count, self.centred

    def kept(self, in_shape, out_shape):
        return keep_all_but(self.axes, len(in_shape))

    def work(self, in_shape, out_shape, reverse):
        return 7.0

    def row_map(self, shape, reverse):
        ndim, n = len(shape), prod([shape[a] for a in self.axes])
        if self.axes != tuple(range(ndim - len(self.axes), ndim)) or self.count != n:
            return None  # a weight norm's sums are no means
        return "centred" if self.centred else "uncentred", self.unit, len(self.axes)

    def narrow(self, source, target, in_shape, out_shape):
        unit = self.unit
        return Project(
            lambda: source.of(unit(), len(in_shape)), self.axes, self.count, self.centred
        )

    def push(self, t, own):
        unit, source = self.unit(), t
        if t.dtype in HALF:
            t = t.float()
        dims = [a + 1 for a in self.axes]
        along = (t * unit).sum(dims, keepdim=True).div_(self.count)
        if torch.is_grad_enabled():
            if self.centred:
                t = t - t.mean(dims, keepdim=True)
            t = t - unit * along
        elif self.centred:
            mean = t.mean(dims, keepdim=True)
            t = (t.sub_(mean) if own and t is source else t - mean).addcmul_(unit, along, value=-1)
        elif own and t is source:
            t.addcmul_(unit, along, value=-1)
        else:
            t = torch.addcmul(t, unit, along, value=-1)
        return t.to(source.dtype), True

    pull = push


class ProjectSlope(LinearMap):
    """How ``P(h) / std`` changes with x, for the projection P of `Project` at the normalised x and a fixed h.

    With r = 1/std, u = unit, q = P(h), s = mean(u h): dr = - r^2 mean(u dx) and du = r P(dx) give
    d(r P(h)) = - r^2 (q mean(u dx) + s P(dx) + u mean(q dx)), which is symmetric.
    """

    __slots__ = ("axes", "count", "parts")
    name, structure = "slope of a projection", "low rank"

    def __init__(self, parts: Callable[[], tuple], axes: tuple[int, ...], count: int):
        """``parts``: (r, u, h), in at least float32."""
        self.parts, self.axes, self.count = parts, axes, count

    @property
    def key(self):
        return ProjectSlope, self.axes

    def kept(self, in_shape, out_shape):
        return keep_all_but(self.axes, len(in_shape))

    def work(self, in_shape, out_shape, reverse):
        return 16.0

    def narrow(self, source, target, in_shape, out_shape):
        parts, n = self.parts, len(in_shape)
        return ProjectSlope(lambda: tuple(source.of(p, n) for p in parts()), self.axes, self.count)

    def push(self, t, own):
        r, u, h = self.parts()
        dims = [a + 1 for a in self.axes]

        def mean(x: Tensor) -> Tensor:
            return x.sum(dims, keepdim=True) / self.count

        h = h.unsqueeze(0)
        s = mean(u * h)
        q = h - mean(h) - u * s
        x = wide(t)
        along = mean(u * x)
        out = q * along + s * (x - mean(x) - u * along) + u * mean(q * x)
        return (out * -r.square()).to(t.dtype), True

    pull = push


class Softmax(LinearMap):
    """``p * (t - sum(p * t))`` over one axis, symmetric.

    ``unmasked``: which entries of the last two axes a mask leaves, if one is known; p is 0 elsewhere.
    """

    __slots__ = ("axis", "forms", "p", "unmasked")
    name, structure = "softmax", "low rank"

    def __init__(
        self,
        p: Callable[[], Tensor],
        axis: int,
        unmasked: Unmasked | None = None,
        forms: tuple[Formed, ...] = (),
    ):
        self.p, self.axis, self.unmasked, self.forms = p, axis, unmasked, forms

    def row_map(self, shape, reverse):
        return ("softmax", self.p, 1) if self.axis == len(shape) - 1 else None

    @property
    def key(self):
        return type(self), self.axis

    def kept(self, in_shape, out_shape):
        return keep_all_but((self.axis,), len(in_shape))

    def work(self, in_shape, out_shape, reverse):
        return 4.0

    def reach(self, t, in_shape, out_shape, reverse, values):
        """What has the probability 0 (a mask) neither sees nor is seen."""
        if values and for_good(p := self.p()):
            t = t.masked_fill(p == 0, 0)
        kept = None if self.unmasked is None else self.unmasked()
        if kept is not None:
            t = thin(t).where(kept, 0)
        t = super().reach(t, in_shape, out_shape, reverse, values)
        return t if kept is None else t.where(kept, 0)

    def narrow(self, source, target, in_shape, out_shape):
        p, unmasked = self.p, None
        if self.unmasked is not None and source.axis == 0 < len(in_shape) - 2:
            unmasked = self.unmasked.of(source, in_shape[0])
        return type(self)(lambda: source.of(p(), len(in_shape)), self.axis, unmasked, self.forms)

    def push(self, t, own):
        p = self.p()
        grad = torch.is_grad_enabled()
        u = t.mul_(p) if own and not grad and t.dtype == p.dtype else t * p
        total = u.sum(self.axis + 1, keepdim=True)
        u = u - p * total if grad else u.addcmul_(p, total, value=-1)
        return u.to(t.dtype), True

    pull = push


class LogSoftmax(Softmax):
    """``t - sum(p * t)`` over one axis; its transpose is ``c - p * sum(c)``."""

    __slots__ = ()
    name = "log_softmax"

    def reach(self, t, in_shape, out_shape, reverse, values):
        return LinearMap.reach(self, t, in_shape, out_shape, reverse, values)

    def row_map(self, shape, reverse):
        return (
            ("log_pull" if reverse else "log_push", self.p, 1)
            if self.axis == len(shape) - 1
            else None
        )

    def push(self, t, own):
        p = self.p()
        total = (t * p).sum(self.axis + 1, keepdim=True)
        if own and not torch.is_grad_enabled() and t.dtype == total.dtype:
            return t.sub_(total), True
        return (t - total).to(t.dtype), True

    def pull(self, c, own):
        p = self.p()
        total = wide(c).sum(self.axis + 1, keepdim=True)
        if own and not torch.is_grad_enabled() and c.dtype == p.dtype:
            return c.addcmul_(p, total, value=-1), True
        return (c - p * total).to(c.dtype), True


class RankOne(LinearMap):
    """``a * t - b * sum(c * t)`` over one axis, for tensors a, b, c of the value's shape."""

    __slots__ = ("axis", "parts")
    name, structure = "diagonal and rank one", "low rank"

    def __init__(self, parts: Callable[[], tuple[Tensor, Tensor, Tensor]], axis: int):
        self.parts, self.axis = parts, axis

    @property
    def key(self):
        return RankOne, self.axis

    def kept(self, in_shape, out_shape):
        return keep_all_but((self.axis,), len(in_shape))

    def work(self, in_shape, out_shape, reverse):
        return 5.0

    def narrow(self, source, target, in_shape, out_shape):
        parts, n = self.parts, len(in_shape)
        return RankOne(lambda: tuple(source.of(p, n) for p in parts()), self.axis)

    def push(self, t, own):
        a, b, c = self.parts()
        return (a * t - b * (c * t).sum(self.axis + 1, keepdim=True)).to(t.dtype), True

    def pull(self, c, own):
        a, b, by = self.parts()
        return (a * c - by * (b * c).sum(self.axis + 1, keepdim=True)).to(c.dtype), True
