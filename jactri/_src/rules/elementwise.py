"""What elementwise ops share: a row for each (`op`), the readers of their maps, and of their curvature.

For any elementwise op the node applied to ones *is* the local derivative, exactly as autograd has it (kinks and second
derivatives included), so most rows are little more than names; see `activations`, `functions` and `arithmetic`. Only
what is cheaper than the node itself has a formula.
"""

from __future__ import annotations

from collections.abc import Callable
from math import nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.support import Factor
from ..maps.contraction import Expand, Sum
from ..maps.curvature import Curves, Differentiated, Pairs, Unary, as_they_are
from ..maps.layout import one
from ..maps.linear_map import Cast, Diagonal, Elementwise, Identity, Permute, Scale, View
from ..maps.maps import Fixed, Sample
from ..maps.mask import Mask
from ..maps.selection import Gather, Picked, Place, Scatter, Select, Slice, Take
from . import known

Read = Callable[[str], Any]
"""Gives a value that the node saved, by its name."""

Slopes = tuple[Tensor, Tensor]
"""The first and the second derivative."""


def none(read: Read) -> tuple[float, ...]:
    return ()


def saved(*names: str) -> Callable[[Read], tuple[float, ...]]:
    """Constants that are saved values."""
    return lambda read: tuple([read(name) for name in names])


class Form(NamedTuple):
    """The derivatives of an elementwise op in one operand, out of one value that its node saved.

    ``slopes`` gives both from that value and the ``constants``. Kinks are where autograd has them; second derivatives
    there are those of its double backward. Without it autograd differentiates the op. ``kernel`` names the derivative
    in `kernels.activations` that kernels compute themselves; without it, and of in-place variants, it arrives ready.
    """

    saved: str
    slopes: Callable[..., Slopes] | None = None
    kernel: str = ""
    constants: Callable[[Read], tuple[float, ...]] = none

    def factor(self, read: Read) -> Factor | None:
        """The derivative as kernels compute it, or None."""
        if not self.kernel:
            return None
        return Factor(read(self.saved), self.kernel, tuple(map(float, self.constants(read))))


# -- linear maps ------------------------------------------------------------------------------------


class Zero(Elementwise):
    """A dependence whose derivative is exactly zero (rounding, a value written over)."""

    __slots__ = ()
    name, structure = "zero", "diagonal"

    def reach(self, t, in_shape, out_shape, reverse, values):
        return torch.zeros_like(t)

    def push(self, t, own):
        return torch.zeros_like(t), True

    pull = push


class Slope:
    """The derivative of an elementwise node: what it makes of ones, or of a cotangent. A long graph has many."""

    __slots__ = ("_call", "_more", "device", "dtype", "shape")

    def __init__(self, g):
        self._call, self._more = g.call, len(g.meta) - 1
        self.shape, self.dtype, self.device = g.shape, g.dtype, g.device

    def __call__(self, c: Tensor | None = None) -> Tensor:
        c = one(self) if c is None else c
        c = c if self.device.type == "cpu" else c.expand(self.shape)
        out = self._call(c, *[None] * self._more)
        return out[0] if out.__class__ is tuple else out

    def passing(self) -> Tensor:
        """As `passing`."""
        return passing(self, self)


def unary(g):
    s, record, kernel, slope = g.match(g.src[0]), g.record, g.later(), Slope(g)
    if record.selects:
        value = g.mask(s, slope, None, True, kernel)
    elif record.scales:
        value = g.mask(s, slope, slope.passing, True, kernel)
    else:
        value = g.diagonal(s, slope, True, kernel)
    return (value, *[None] * (len(g.meta) - 1)) if len(g.meta) > 1 else value


def passing(pull, meta) -> Tensor:
    """1 where a node lets a gradient pass, 0 where it selects something else; ``pull`` is the node of one cotangent.

    Asked with a NaN, which no product makes zero.
    """
    return pull(one(meta) * nan).detach().isnan().to(meta.dtype)


def unary_full(g):
    """Nodes whose kernels want a cotangent of the full shape."""
    call, m = g.call, g.meta[0]
    return g.diagonal(g.src[0], lambda: call(one(m).expand(tuple(m.shape))), activation=g.later())


def by(derivative: Callable[[Tensor], Tensor]):
    """A reader for an op whose derivative has a formula, of the value in its form, that is cheaper than the node."""

    def read(g):
        saved = g.tensor(g.record.form(g.saved).saved)
        return g.diagonal(g.src[0], lambda: derivative(saved), activation=g.later())

    return read


class Partials:
    """The derivatives of a node in each of its operands, computed together when the first is asked for.

    Each is kept until it is asked for.
    """

    __slots__ = ("_left", "call", "count", "meta", "name", "output", "whole")

    def __init__(self, g, whole: bool = True, output: int = 0):
        """``whole``: every operand has the shape of the output; ``output``: which of them."""
        g.check_memory()
        self.call, self.name, self.count, self.output = g.call, g.name, len(g.meta), output
        self.meta, self.whole = g.meta[output], whole
        self._left: dict[int, Tensor | None] = {}

    def __call__(self, edge: int) -> Tensor:
        m = self.meta
        if edge not in self._left:
            self._left = dict(enumerate(self._pull(one(m))))
        d = self._left.pop(edge)
        if d is None:
            return torch.zeros((), dtype=m.dtype, device=m.device)
        if self.whole and d.shape != tuple(m.shape):  # summed over broadcasts: the entries are lost
            raise AssertionError(f"{self.name}: derivative of shape {tuple(d.shape)}")
        return fit(d, m)

    def _pull(self, c: Tensor) -> tuple[Tensor | None, ...]:
        """The node of one cotangent for all entries."""
        given: list[Tensor | None] = [None] * self.count
        given[self.output] = c.expand(tuple(self.meta.shape))
        out = self.call(*given)
        return out if isinstance(out, tuple) else (out,)

    def diagonal(self, g, s: int, edge: int) -> int:
        """Scaling of the value ``s``, which has the operand's shape, by its derivative."""
        return g.diagonal(s, lambda: self(edge))

    def mask(self, g, s: int, edge: int, written: bool = False) -> int:
        """The same of an op that selects: 1 where the operand's gradient passes. ``written``: as of `Mask`."""
        return g.single(s, Mask(lambda: self(edge), written=written))

    def scaled_mask(self, g, s: int, edge: int) -> int:
        """The same of an op that selects and scales."""

        def pull(c: Tensor) -> Tensor:
            d = self._pull(c)[edge]
            return torch.zeros_like(c) if d is None else d

        return g.mask(s, lambda: self(edge), lambda: passing(pull, self.meta))


def fit(d: Tensor, meta) -> Tensor:
    """A derivative in the dtype, on the device and in the layout of the value that it multiplies."""
    if d.layout is not torch.strided:  # of an op with a sparse constant
        d = d.to_dense()
    if d.dtype != meta.dtype or d.device != meta.device:
        return d.to(device=meta.device, dtype=meta.dtype)
    return d


def several(g):
    """Any number of operands."""
    partials = Partials(g)
    emit = partials.diagonal
    if g.record.selects:
        emit = partials.mask
    elif g.record.scales:
        emit = partials.scaled_mask
    return g.plus([emit(g, g.match(s), edge) for edge, s in enumerate(g.src) if s is not None])


# -- curvature --------------------------------------------------------------------------------------

CONSTANT = {
    Cast, Expand, Fixed, Gather, Identity, Permute, Picked, Place, Sample, Scale, Scatter, Select, Slice, Sum, Take,
    View, Zero,
}  # fmt: skip
"""Maps that hold no value of the computation."""


def only(r, *kinds: type) -> bool:
    """Whether the maps of the current node hold no value of the computation, but for those of some kinds."""
    return all(
        e.__class__ in CONSTANT or isinstance(e, kinds)
        for v in r.new
        for _, e in r.values[v].sources
    )


def flat(r) -> Curves | None:
    """The derivatives in all operands are constants, but for kinks."""
    return {} if only(r, Diagonal) else None


def twice(r) -> Curves | None:
    """Any elementwise op in one operand that depends on the input: autograd differentiates it twice."""
    edges, shape = r.edges(Diagonal), r.shape
    places = [e for e, s in enumerate(r.src) if s is not None]
    if len(edges) != 1 or len(places) != 1:
        return None
    v, s, _ = edges[0]
    if r.values[s].shape != shape or r.values[r.src[places[0]]].shape != shape:
        return None
    call, meta, place = r.call, r.meta, places[0]
    m = meta[0]

    def derivative() -> Tensor:
        out = call(one(m).expand(shape), *[None] * (len(meta) - 1))
        return out[place] if isinstance(out, tuple) else out

    slopes = Differentiated(derivative, r.node.next_functions[place], m)
    return {v: Unary(s, r.name, as_they_are, slopes)}


def bent(r) -> Curves | None:
    """An elementwise op in one operand, by its form if that has both derivatives."""
    form = None if r.record.form is None else r.record.form(r.saved)
    if form is None or form.slopes is None:
        return twice(r)
    ((v, s, _),) = r.edges(Diagonal)
    saved = (r.tensor(form.saved),)
    return {v: Unary(s, r.name, form.slopes, saved, form.constants(r.saved), form.kernel)}


def pairs(r, which, second, saved=(), constants=()) -> Curves | None:
    """The curvature of an elementwise op by its scaled operands, in the order of the node's."""
    edges = r.edges(Diagonal)
    at, sources = edges[-1][0], [s for _, s, _ in edges]
    shapes = {r.values[s].shape for s in sources}
    if len(shapes) != 1 or len(sources) <= max(max(p) for p in which):
        return None
    return {at: Pairs(sources, which, second, saved, constants)}


def two() -> tuple[float]:
    return (2.0,)


def multiplied(r):
    """A product of two operands."""
    first = 1 if r.name == "AddrBackward0" else 0
    if not all(r.active(first, first + 1)):
        return {}
    if len(r.edges(Diagonal)) == 1:  # x * x
        return pairs(r, ((0, 0),), two)
    return pairs(r, ((0, 1),), two)


# -- the table --------------------------------------------------------------------------------------


def op(
    names: str,
    form: Form | Callable[[Read], Form] | None = None,
    read: Callable = unary,
    curve: Callable = bent,
    **facts,
) -> None:
    """A row: what is known of elementwise ops in one operand, or, by another ``read``, in `several`.

    ``names`` as `rules.node_names` reads them, one or more that are alike. ``form`` is a function where it depends on
    what the node saved. For the other ``facts`` see `rules.Record`.
    """
    choose = (lambda read: form) if isinstance(form, Form) else form
    known(*names.split(), read=read, curve=curve, form=choose, **facts)
