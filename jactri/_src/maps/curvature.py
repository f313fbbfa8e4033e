"""Second-order terms: what an op adds to the Laplacian beside its Jacobian applied to that of its operands.

For ``y = f(u)`` and tangents ``u_k``, the Laplacian of y is ``Df[lap u] + sum_k D2f[u_k, u_k]`` (the second-order chain
rule; Li et al. 2023, "Forward Laplacian", arXiv:2307.08214). The first part is a push of the op's linear maps; a
`Curvature` gives the second. An op that is linear in what depends on the input has none.

Blocks of tangents are stored as everywhere (see `layout`): a tied factor has one seed an entry, so that a sum over the
stored seeds ``K`` is the sum over all of them, in any layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..base.tracing import may_write
from .cut import Cut
from .layout import FREE, Layout, one
from .maps import wide


class Seeds:
    """The quadratic form over seeds: a sum of squares, of which those from ``plus`` on count negatively."""

    __slots__ = ("plus",)

    def __init__(self, plus: int | None = None):
        """``plus``: None for all."""
        self.plus = plus

    def signed(self, block: Tensor) -> Tensor:
        """A block whose product with another, summed over the seeds, is the form."""
        if self.plus is None or self.plus >= block.shape[0]:
            return block
        return torch.cat([block[: self.plus], -block[self.plus :]])

    def squares(self, block: Tensor) -> Tensor:
        """The form of a block ``(K, ...)`` entry by entry. Axes along which it is expanded are left with size 1."""
        for a in range(1, block.dim()):
            if block.stride(a) == 0 and block.shape[a] > 1:
                block = block.narrow(a, 0, 1)
        if self.plus is None or self.plus >= block.shape[0]:
            return _squares(block)
        return _squares(block[: self.plus]) - _squares(block[self.plus :])

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """The form of two blocks ``(K, ...)`` entry by entry."""
        return (self.signed(a) * b).sum(0)


def _squares(block: Tensor) -> Tensor:
    if not may_write():  # what compiles a trace makes one pass of it
        return block.square().sum(0)
    if block.shape[0] == 0:
        return block.new_zeros(block.shape[1:])
    if block.device.type != "cpu" and block.shape[0] > 4:
        return torch.linalg.vector_norm(block, 2, 0).square_()
    total = block[0] * block[0]
    for k in range(1, block.shape[0]):  # one pass a seed, and no copy of the block
        total.addcmul_(block[k], block[k])
    return total


class Tangents(Protocol):
    """What a term is computed from: the blocks of the values behind it."""

    seeds: Seeds

    def layout(self, value: int) -> Layout: ...

    def block(self, value: int, ties: frozenset[int] | None = None) -> Tensor | None:
        """``(K, *value)`` in a layout with these ties only (None: its own). None stands for ones, in its own layout."""
        ...

    def like(self, value: int): ...


class Curvature:
    """The second-order term of one value. ``sources`` are the values whose tangents it reads."""

    __slots__ = ("sources",)
    sources: tuple[int, ...]

    @property
    def key(self) -> object:
        """Hashable: what, beside shapes, decides how much it computes."""
        return type(self), self.sources

    def narrow(self, cut: Cut, ndim: int) -> Curvature | None:
        """That of a range of samples; ``cut`` is the range in the value, which has ``ndim`` axes. None: impossible."""
        raise NotImplementedError

    def term(self, t: Tangents) -> Tensor:
        """``sum_k D2f[u_k, u_k]``, of the value's shape or broadcasting to it."""
        raise NotImplementedError


Curves = dict[int, Curvature]
"""By value."""


class Unary(Curvature):
    """An elementwise function: ``f'' * sum_k u_k^2``. ``slopes`` gives both derivatives from the saved values.

    ``kernel`` names those in `kernels.activations` that kernels compute out of the same values, "" for none.
    """

    __slots__ = ("constants", "formula", "kernel", "name", "saved")

    def __init__(
        self,
        source: int,
        name: str,
        formula: Callable[..., tuple[Tensor, Tensor]],
        saved: Iterable[Tensor],
        constants: tuple = (),
        kernel: str = "",
    ):
        self.sources = (source,)
        self.name, self.formula, self.saved, self.constants = name, formula, saved, constants
        self.kernel = kernel

    @property
    def key(self):
        return Unary, self.sources, self.name

    def narrow(self, cut, ndim):
        saved = [cut.of(s, ndim) for s in self.saved]
        return Unary(self.sources[0], self.name, self.formula, saved, self.constants, self.kernel)

    def slopes(self) -> tuple[Tensor, Tensor]:
        return self.formula(*self.saved, *self.constants)

    def term(self, t):
        block, second = t.block(self.sources[0]), self.slopes()[1]
        return second if block is None else second * t.seeds.squares(block)


class Differentiated:
    """The slopes of an elementwise op that autograd differentiates twice, computed at their first use.

    The node applied to ones is the first derivative as a function of what the node saved; its own gradient, of an
    elementwise function again, is the second.
    """

    def __init__(self, derivative: Callable[[], Tensor], behind, meta):
        """``behind``: the edge (node, output) that the operand comes from."""
        self._derivative, self._behind, self._meta = derivative, behind, meta
        self._slopes: list[Tensor] | None = None

    def _make(self) -> list[Tensor]:
        graph, m = torch.is_grad_enabled(), self._meta
        shape = tuple(m.shape)
        with torch.enable_grad():
            d = self._derivative().expand(shape)
            second = None
            if d.requires_grad:
                edge = torch.autograd.graph.GradientEdge(*self._behind)
                (second,) = torch.autograd.grad(
                    d, edge, one(d).expand(shape), create_graph=graph, allow_unused=True
                )
                if second is None:
                    second = torch.zeros(shape, dtype=d.dtype, device=d.device)
            else:
                second = torch.zeros(shape, dtype=d.dtype, device=d.device)
        return [d, second] if graph else [d.detach(), second.detach()]

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self[0], self[1]))

    def __getitem__(self, i: int) -> Tensor:
        if self._slopes is None:
            self._slopes = self._make()
        return self._slopes[i]


def as_they_are(d: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of saved values that are both slopes already."""
    return d, second


class Pairs(Curvature):
    """An elementwise function of several operands: ``sum_ij f_ij sum_k u_ik u_jk``.

    ``second`` gives the coefficients from the saved values, in the order of ``pairs``, which name operands; what stands
    for (i, j) and (j, i) is given once.
    """

    __slots__ = ("constants", "pairs", "saved", "second")

    def __init__(self, sources, pairs, second, saved: Sequence[Tensor] = (), constants=()):
        self.sources, self.pairs = tuple(sources), tuple(pairs)
        self.second, self.saved, self.constants = second, saved, constants

    @property
    def key(self):
        return Pairs, self.sources, self.pairs

    def narrow(self, cut, ndim):
        saved = [cut.of(s, ndim) for s in self.saved]
        return Pairs(self.sources, self.pairs, self.second, saved, self.constants)

    def term(self, t):
        total = None
        for (i, j), c in zip(self.pairs, self.second(*self.saved, *self.constants), strict=True):
            term = _meeting(t, self.sources[i], self.sources[j]) * c
            total = term if total is None else total + term
        return total


def _meeting(t: Tangents, a: int, b: int) -> Tensor:
    """``sum_k a_k b_k`` for two values of one shape."""
    if a == b:
        block = t.block(a)
        return one(t.like(a)) if block is None else t.seeds.squares(block)
    meet = t.layout(a).meet(t.layout(b)).tied
    return t.seeds.products(full(t, a, meet), full(t, b, meet))


class Matrices(Curvature):
    """``a @ b`` where both depend on the input: ``2 factor sum_k a_k @ b_k``, one product over seeds and inner axis."""

    __slots__ = ("factor",)

    def __init__(self, a: int, b: int, factor: float = 1.0):
        self.sources, self.factor = (a, b), factor

    def narrow(self, cut, ndim):
        return self if cut.axis == 0 and ndim == 3 else None

    def term(self, t):
        a, b = self.sources
        la, lb = t.layout(a), t.layout(b)
        ties = frozenset()
        if len(la.axes) == 3 and la.axes[0] == lb.axes[0]:
            ties = frozenset(f for _, f in la.axes[0] if f != FREE)
        left, right = full(t, a, ties), full(t, b, ties)
        if left.dim() == 3:  # matrices without a batch
            left, right = left.unsqueeze(1), right.unsqueeze(1)
        out = summed_product(t.seeds, left, right) * (2 * self.factor)
        return out if len(la.axes) == 3 else out[0]


def summed_product(seeds: Seeds, left: Tensor, right: Tensor) -> Tensor:
    """``sum_k left_k @ right_k`` of blocks ``(K, b, ., .)``: one product over seeds and inner axis."""
    k, n, rows, inner = left.shape
    left = seeds.signed(left).permute(1, 2, 0, 3).reshape(n, rows, k * inner)
    return torch.bmm(left, right.transpose(0, 1).reshape(n, k * inner, -1))


def full(t: Tangents, value: int, ties: frozenset[int]) -> Tensor:
    """A block with ties in ``ties`` only, written out."""
    block = t.block(value, ties)
    if block is None:
        layout = t.layout(value)
        return one(t.like(value)).expand(layout.columns, *layout.shape)
    return block


def mixing(t: Tangents, value: int, axes: tuple[int, ...]) -> Tensor:
    """A block without ties on ``axes``."""
    layout = t.layout(value)
    return full(t, value, layout.tied - {f for a in axes for _, f in layout.axes[a]})


class SoftmaxBend(Curvature):
    """Softmax and its logarithm along an axis; for centred tangents ``c_k = u_k - sum(p u_k)`` and ``q = sum_k c_k^2``

    ``p * (q - sum(p q))``, and for the logarithm ``-sum(p q)``.
    """

    __slots__ = ("axis", "log", "p")

    def __init__(self, source: int, p: Callable[[], Tensor], axis: int, log: bool):
        self.sources = (source,)
        self.p, self.axis, self.log = p, axis, log

    def narrow(self, cut, ndim):
        if cut.axis == self.axis:
            return None
        p = self.p
        return SoftmaxBend(self.sources[0], lambda: cut.of(p(), ndim), self.axis, self.log)

    def term(self, t):
        p, axis = self.p(), self.axis
        block = mixing(t, self.sources[0], (axis,))
        dtype = block.dtype
        block = wide(block)
        q = t.seeds.squares(block - (block * p).sum(axis + 1, keepdim=True))
        mean = (p * q).sum(axis, keepdim=True)
        return (-mean if self.log else p * (q - mean)).to(dtype)


class Reduction(Curvature):
    """Of an op that reduces ``axes`` of one operand; ``saved``: the operand and the result."""

    __slots__ = ("axes", "keepdim", "saved")

    def __init__(self, source: int, saved: Sequence[Tensor], axes: tuple[int, ...], keepdim: bool):
        self.sources = (source,)
        self.saved, self.axes, self.keepdim = saved, axes, keepdim

    def narrow(self, cut, ndim):
        if cut.axis != 0 or 0 in self.axes:
            return None
        saved = [cut.of(t, t.dim()) for t in self.saved]
        return type(self)(self.sources[0], saved, self.axes, self.keepdim)

    def both(self) -> Sequence[Tensor]:
        """The operand, and the result with as many axes."""
        x, y = self.saved
        for a in () if self.keepdim else self.axes:
            y = y.unsqueeze(a)
        return x, y


class LogSumExpBend(Reduction):
    """``log sum exp`` over ``axes``: ``sum(p q)`` with p and q as for a softmax over them."""

    __slots__ = ()

    def term(self, t):
        x, y = self.both()
        p = torch.exp(x - y)
        block = mixing(t, self.sources[0], self.axes)
        q = t.seeds.squares(block - (block * p).sum([a + 1 for a in self.axes], keepdim=True))
        return (p * q).sum(self.axes, keepdim=self.keepdim)


class NormalisationBend(Curvature):
    """``w * unit(x)`` of a layer, group or RMS norm, over ``axes`` of the value shaped as ``inner``.

    With r = 1/std, u = unit, c_k the tangents less their means and a_k = mean(u c_k), the chain rule through
    ``std^2 = mean((x - mean x)^2) + eps`` gives
    ``D2u[x_k, x_k] = r^2 (-2 a_k c_k - u (mean(c_k^2) - 3 a_k^2))``, summed over k here.
    """

    __slots__ = ("axes", "centred", "inner", "lift", "stats", "weight")

    def __init__(self, source, stats, axes, inner, weight, lift, centred=True):
        """``stats``: (unit, r), shaped as ``inner``; ``weight`` broadcasts against the value in the shape ``lift``."""
        self.sources = (source,)
        self.stats, self.axes, self.inner = stats, tuple(axes), tuple(inner)
        self.weight, self.lift, self.centred = weight, lift, centred

    def narrow(self, cut, ndim):
        if cut.axis != 0 or 0 in self.axes:
            return None
        stats, n = self.stats, len(self.inner)
        inner = (cut.length, *self.inner[1:])
        return NormalisationBend(
            self.sources[0],
            lambda: tuple(cut.of(s, n) for s in stats()),
            self.axes,
            inner,
            self.weight,
            self.lift,
            self.centred,
        )

    def term(self, t):
        unit, r = self.stats()
        source = self.sources[0]
        shape = t.layout(source).shape
        if shape == self.inner:
            block = mixing(t, source, self.axes)
        else:  # groups of channels: everything but the samples may be split
            block = mixing(t, source, tuple(range(1, len(shape))))
        dtype, seeds = block.dtype, t.seeds
        c = wide(block).reshape(block.shape[0], *self.inner)
        dims = [a + 1 for a in self.axes]
        if self.centred:
            c = c - c.mean(dims, keepdim=True)
        along = (c * unit).mean(dims, keepdim=True)
        spread = seeds.squares(c).mean(self.axes, keepdim=True) - 3 * seeds.squares(along)
        out = (seeds.products(along, c) * -2 - unit * spread) * r.square()
        out = out.reshape(shape)
        if self.weight is not None:
            out = out * wide(self.weight).reshape(self.lift)
        return out.to(dtype)


class LengthBend(Reduction):
    """The Euclidean norm over ``axes``, ``y = |x|``: ``(sum_k |u_k|^2 - sum_k (u_k . x / y)^2) / y``."""

    __slots__ = ()

    def term(self, t):
        x, y = self.both()
        block = mixing(t, self.sources[0], self.axes)
        along = (block * (x / y)).sum([a + 1 for a in self.axes], keepdim=True)
        total = t.seeds.squares(block).sum(self.axes, keepdim=True) - t.seeds.squares(along)
        out = total / y
        return out if self.keepdim else out.squeeze(self.axes)
