"""Structured local Jacobians: what every rule returns for an edge of the graph.

A `LinearMap` takes blocks of tangents ``(K, *in_shape)`` to ``(K, *out_shape)`` (``push``) and blocks of
cotangents back (``pull``), and says which axes it passes through unmixed (``kept``), so that ties between a
value and the seed survive it (see `layout`). The sweep asks a map twice: the planner for a `Route`, from
layouts alone; the executor to ``apply`` the route to data.

Data may be ``None`` for a block of ones (an identity seed). ``own`` says that the data may be overwritten;
every ``apply`` returns the new data and whether that may be overwritten in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...kernels.support import Factor, formed_once
from ..base.csr import Csr
from ..base.intervals import for_good, joined, regrouped
from .cut import Cut, Shape
from .entrywise import aligned, times
from .joint import Joint, given
from .layout import Layout, Selection
from .once import Formed

Kept = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Route:
    """One map applied to one layout: ties dropped first (``mid``), then the map, giving ``out``.

    ``axis`` is the tied axis that the map releases instead of summing over it, or None.
    ``work`` is the flops for one stored element of ``out``; ``moves`` is false where the result is a view.
    """

    mid: Layout
    out: Layout
    axis: int | None = None
    work: float = 1.0
    moves: bool = True


class LinearMap:
    """The Jacobian of one node with respect to one of its inputs."""

    __slots__ = ()
    name = "linear map"
    structure = "dense"
    uniform = False
    """Whether a block that all samples share (expanded over them) is multiplied once, and shared again."""
    whole: Joint | None = None
    """What takes the blocks of several maps to one value at once, where that is cheaper ."""
    twice = True
    """Whether autograd can follow it."""
    forms: tuple[Formed, ...] = ()
    """What it makes at its first use, and keeps: large, and nobody else's."""

    @property
    def key(self) -> Any:
        """Hashable: with the shapes on both sides it determines every route."""
        return type(self)

    def kept(self, in_shape: Shape, out_shape: Shape) -> Kept:
        """The (input axis, output axis) pairs that pass through unmixed."""
        raise NotImplementedError

    @property
    def entries(self) -> int:
        """Entries of the weights that every chunk of seeds reads again."""
        return 0

    def windows(self, in_shape: Shape, out_shape: Shape) -> Kept:
        """The (input axis, output axis) pairs, none of them kept, along which an output sees a part of the input.

        The map vanishes outside of the product of their supports.
        """
        return ()

    def picks(self, in_shape: Shape, out_shape: Shape) -> Kept:
        """Further `windows`, whose supports are told by indices that are no part of the key, but of the `digest`."""
        return ()

    def support(self, axis: int, in_shape: Shape, out_shape: Shape) -> Csr:
        """Which indices of input axis ``axis``, one of its `windows` or `picks`, an output sees: (output, input)."""
        raise NotImplementedError

    def links(self, in_shape: Shape, out_shape: Shape) -> Csr | None:
        """Which inputs each output sees, both in flat order, where that is less than the product of its supports."""
        return None

    @property
    def chosen(self) -> bool:
        """Whether it is values that tell what it moves: the choice of a maximum or a sort."""
        return False

    @property
    def digest(self) -> bytes | None:
        """Of the indices that tell `picks` and `links`: alike for the same. None where the key tells all."""
        return None

    def work(self, in_shape: Shape, out_shape: Shape, reverse: bool) -> float:
        """Flops for one element of the result."""
        return 1.0

    def route(self, layout: Layout, in_shape: Shape, out_shape: Shape, reverse: bool) -> Route:
        kept = self.kept(in_shape, out_shape)
        if reverse:
            kept = tuple((b, a) for a, b in kept)
        passed = {a for a, _ in kept}
        mid = layout.untie([a for a in range(len(layout.axes)) if a not in passed])
        out = mid.carry(kept, in_shape if reverse else out_shape)
        return Route(mid, out, None, self.work(in_shape, out_shape, reverse))

    def narrow(
        self, source: Cut, target: Cut, in_shape: Shape, out_shape: Shape
    ) -> LinearMap | None:
        """The map of a range of samples, of which the input keeps ``source`` and the output ``target``.

        Shapes are those of all samples. None where the map cannot be cut.
        """
        return None

    def places(self, reverse: bool) -> bool:
        """Whether the result is the data itself in a `window` and zero elsewhere: a sum need not write the zeros."""
        return False

    def window(self, total: Tensor) -> Tensor:
        """The part of a result, as a view, in which a map that ``places`` its data puts them."""
        raise NotImplementedError

    def reach(
        self, t: Tensor, in_shape: Shape, out_shape: Shape, reverse: bool, values: bool
    ) -> Tensor:
        """What depends on what: at each output the largest of the numbers ``t``, from 0 on, at the inputs that it sees.

        ``t`` is a block ``(K, *shape)`` of integers, ``reverse`` goes from outputs to inputs. ``values``: an input that
        is multiplied by zero is not seen. Axes of the result of size 1 stand for what is alike along them.
        """
        return joined(
            t, self.kept(in_shape, out_shape), reverse, in_shape if reverse else out_shape
        )

    def row_map(self, shape: Shape, reverse: bool) -> tuple[str, Callable[[], Tensor], int] | None:
        """For values of a shape: the map of `kernels.rows` that this is, its saved values, and how many of the
        last axes it runs over; None if it is none of them."""
        return None

    def push(self, t: Tensor, own: bool) -> tuple[Tensor, bool]:
        raise NotImplementedError

    def pull(self, c: Tensor, own: bool) -> tuple[Tensor, bool]:
        raise NotImplementedError

    def apply(
        self,
        data: Tensor | None,
        own: bool,
        layout: Layout,
        route: Route,
        reverse: bool,
        sel: Selection | None,
        like: Tensor,
    ) -> tuple[Tensor | None, bool]:
        """Run a route. ``like`` gives the dtype and device of the block where ``data`` is None."""
        data, own = given(data, own, layout, route.mid, sel, like)
        return self.pull(data, own) if reverse else self.push(data, own)

    def as_matrix(self, in_shape: Shape, out_shape: Shape, like: Tensor) -> Tensor:
        """The dense ``(*out_shape, *in_shape)`` Jacobian. Cost: one push of ``prod(in_shape)`` tangents."""
        n = prod(in_shape)
        eye = torch.eye(n, dtype=like.dtype, device=like.device).reshape(n, *in_shape)
        dense, _ = self.push(eye, False)
        return dense.reshape(n, -1).t().reshape((*out_shape, *in_shape))


class Elementwise(LinearMap):
    """A map that keeps every axis; blocks may stay ``None`` up to it."""

    __slots__ = ()

    def kept(self, in_shape, out_shape):
        return tuple((a, a) for a in range(len(in_shape)))

    def route(self, layout, in_shape, out_shape, reverse):
        return Route(layout, layout)

    def reach(self, t, in_shape, out_shape, reverse, values):
        return t

    def narrow(self, source, target, in_shape, out_shape):
        return self


class Identity(Elementwise):
    """A contribution that is passed on as it is (an addition)."""

    __slots__ = ()
    name, structure, uniform = "identity", "identity", True

    def route(self, layout, in_shape, out_shape, reverse):
        return Route(layout, layout, moves=False)

    def push(self, t, own):
        return t, own

    pull = push

    def apply(self, data, own, layout, route, reverse, sel, like):
        return data, own


class Scale(Elementwise):
    """Multiplication by a number."""

    __slots__ = ("factor",)
    name, structure = "scale", "scalar"

    def __init__(self, factor: float):
        self.factor = factor

    def reach(self, t, in_shape, out_shape, reverse, values):
        return torch.zeros_like(t) if values and self.factor == 0 else t

    def push(self, t, own):
        return (t.mul_(self.factor) if own else t * self.factor), True

    pull = push


class Cast(Elementwise):
    """A change of dtype or device."""

    __slots__ = ("source", "target")
    name, structure = "cast", "identity"

    def __init__(self, source, target):
        self.source, self.target = source, target

    @property
    def key(self):
        return Cast, self.source, self.target

    def push(self, t, own):
        return t.to(device=self.target[1], dtype=self.target[0]), False

    def pull(self, c, own):
        return c.to(device=self.source[1], dtype=self.source[0]), False

    def apply(self, data, own, layout, route, reverse, sel, like):
        return (
            super().apply(data, own, layout, route, reverse, sel, like)
            if data is not None
            else (None, False)
        )


class Diagonal(Elementwise):
    """Elementwise: multiplication by the local derivative, which is computed at first use.

    ``fresh`` says that the callable returns memory that nobody else holds: under an identity seed it then becomes
    the block, and may be written to. ``activation`` gives the same derivative as kernels compute it themselves,
    or None where they do not. ``along``: the one axis along which it varies, if it is made of weights alone.
    """

    __slots__ = ("_activation", "_derivative", "_fresh", "_value", "along", "key")
    name, structure = "diagonal", "diagonal"

    def __init__(
        self,
        derivative: Callable[[], Tensor] | Tensor,
        fresh: bool = False,
        activation: Callable[[], Factor | None] | None = None,
        along: int | None = None,
    ):
        self._derivative, self._fresh, self._activation = derivative, fresh, activation
        self.along = along
        self.key = Diagonal if along is None else (Diagonal, along)  # type: ignore[misc]
        self._value = derivative if isinstance(derivative, Tensor) else None

    def factor(self, uses: int = 1) -> Factor:
        """The derivative for a kernel: what it computes it from, or the derivative.

        ``uses``: how often a product takes each of its elements, for `formed_once`.
        """
        return self._formed(uses) or Factor(self.d)

    def formula(self, uses: int = 1) -> str:
        """The name of the derivative that a kernel would compute; "ready" where it takes ours."""
        found = self._formed(uses)
        return "ready" if found is None else found.name

    def _formed(self, uses: int) -> Factor | None:
        found = None if self._activation is None else self._activation()
        return None if found is None or formed_once(found, uses) else found

    @property
    def d(self) -> Tensor:
        if self._value is None:
            self._value = self._derivative()
        return self._value

    def factors(self, reverse: bool) -> tuple[tuple[Callable[..., Tensor], Tensor], ...]:
        """What happens to a block, entry by entry: functions ``(block, factor, own)``, each with its factor."""
        return ((times, self.d),)

    def forget(self) -> None:
        """Let the derivative go, if it can be computed again."""
        if not isinstance(self._derivative, Tensor):
            self._value = None

    def reach(self, t, in_shape, out_shape, reverse, values):
        return t.masked_fill(self.d == 0, 0) if values and for_good(self.d) else t

    def narrow(self, source, target, in_shape, out_shape):
        return Diagonal(lambda: target.of(self.d, len(out_shape)))

    def push(self, t, own):
        d = self._value
        if d is None:
            d = self._value = self._derivative()
        if d.dim() > 2:
            d = self._value = aligned(d, t)
        return times(t, d, own), True

    pull = push

    def apply(self, data, own, layout, route, reverse, sel, like):
        if data is not None:
            return self.pull(data, own) if reverse else self.push(data, own)
        if self._value is None and self._fresh:  # used once in most sweeps: let it become the block
            d = self._derivative()
            own = d.is_contiguous() and d.dim() > 0
        else:
            d, own = self.d, False
        if d.shape != layout.shape:
            d, own = d.expand(layout.shape), False
        return d.unsqueeze(0), own and not torch.is_grad_enabled()


class Structural(LinearMap):
    """A map that only rearranges: ones stay ones, an owned block stays owned."""

    __slots__ = ()

    def apply(self, data, own, layout, route, reverse, sel, like):
        if data is None and route.mid is layout:
            return None, False
        return super().apply(data, own, layout, route, reverse, sel, like)


class View(Structural):
    """A reshape."""

    __slots__ = ("in_shape", "out_shape")
    name, structure = "view", "view"

    def __init__(self, in_shape: Shape, out_shape: Shape):
        self.in_shape, self.out_shape = in_shape, out_shape

    def kept(self, in_shape, out_shape):
        return ()

    def route(self, layout, in_shape, out_shape, reverse):
        out = layout.viewed(in_shape if reverse else out_shape)
        if out.tied == layout.tied:
            return Route(layout, out, moves=False)
        mid = layout.drop(layout.tied - out.tied)
        return Route(mid, out)

    def reach(self, t, in_shape, out_shape, reverse, values):
        return regrouped(t, in_shape if reverse else out_shape)

    def narrow(self, source, target, in_shape, out_shape):
        return View(source.shape(in_shape), target.shape(out_shape))

    def push(self, t, own):
        return t.reshape(t.shape[0], *self.out_shape), own

    def pull(self, c, own):
        return c.reshape(c.shape[0], *self.in_shape), own


class Permute(Structural):
    """A permutation of the axes: output axis ``i`` is input axis ``dims[i]``."""

    __slots__ = ("_pull", "_push", "dims")
    name, structure, uniform = "permute", "view", True

    def __init__(self, dims: Shape):
        self.dims = dims
        inverse = [0] * len(dims)
        for i, d in enumerate(dims):
            inverse[d] = i
        self._push = (0, *(d + 1 for d in dims))
        self._pull = (0, *(d + 1 for d in inverse))

    @property
    def key(self):
        return Permute, self.dims

    def kept(self, in_shape, out_shape):
        return tuple((d, i) for i, d in enumerate(self.dims))

    def route(self, layout, in_shape, out_shape, reverse):
        dims = self._pull if reverse else self._push
        axes = tuple(layout.axes[d - 1] for d in dims[1:])
        return Route(layout, Layout(axes, layout.seed), moves=False)

    def reach(self, t, in_shape, out_shape, reverse, values):
        return t.permute(self._pull if reverse else self._push)

    def narrow(self, source, target, in_shape, out_shape):
        return self

    def push(self, t, own):
        return t.permute(self._push), own

    def pull(self, c, own):
        return c.permute(self._pull), own


def keep_all_but(axes, ndim: int) -> Kept:
    """The kept pairs of a map that mixes ``axes`` and leaves the others in place."""
    return tuple((a, a) for a in range(ndim) if a not in axes)
