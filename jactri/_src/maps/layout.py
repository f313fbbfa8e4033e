"""The algebra of axes: which part of a Jacobian block can be non-zero, and how it is stored.

A *block* is the Jacobian between a value ``v`` of the graph and the seed of a sweep: the input in forward
mode (columns), the output in reverse mode (rows). An axis of ``v`` is *tied* to an axis of the seed when the
block vanishes wherever the two indices differ; a tied pair is stored once. An elementwise function of an
``(N, d)`` input has both axes tied (``N * d`` numbers, not ``(N * d) ** 2``); a Linear layer releases the last
axis and keeps the rest; a whole per-sample network keeps the batch. Views merge and split axes, so every axis
is an ordered product of *factors*, and it is factors that are tied.

Stored data always has the logical shape ``(K, *v.shape)``: ``K`` runs over the seed factors that are not tied
("free"), in the seed's order, and tied factors live on the value's own axes. Strides are free. ``None`` as data
stands for all ones, so that an identity seed costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from ..base.constants import one

FREE = -1
"""The tie of a factor that is not tied to any seed factor."""

Factor = tuple[int, int]
"""(size, index of the seed factor that it is tied to, or FREE)."""

Selection = dict[int, tuple[int, int]]
"""Seed factor -> (start, length): the part of a free seed factor that a chunk computes."""


Colours = dict[tuple[int, int], int]
"""(axis of the seed, factor within the axis) -> number of colours."""


class SplitSeed(Exception):
    """A view splits a tied factor: the sweep must start again with the seed factor split alike."""

    def __init__(self, factor: int, sizes: tuple[int, ...]):
        super().__init__(f"seed factor {factor} must be split into {sizes}")
        self.factor, self.sizes = factor, sizes


@dataclass(frozen=True, init=False)
class Layout:
    """How a block is stored: for each value axis its factors, and the sizes of the seed's factors."""

    axes: tuple[tuple[Factor, ...], ...]
    seed: tuple[int, ...]
    shape: tuple[int, ...] = field(compare=False)
    """Of the value."""
    tied: frozenset[int] = field(compare=False)
    """Seed factors that an axis is tied to."""
    free: tuple[int, ...] = field(compare=False)
    """The others: the block has a dim for them,"""
    seeds: tuple[int, ...] = field(compare=False)
    """of these sizes."""
    columns: int = field(compare=False)
    """``K``: how many seeds the stored data carries."""
    numel: int = field(compare=False)
    """Stored elements."""

    def __init__(self, axes: tuple[tuple[Factor, ...], ...], seed: tuple[int, ...]):
        shape = tuple([prod([n for n, _ in axis]) for axis in axes])
        tied = frozenset([t for axis in axes for _, t in axis if t != FREE])
        free = tuple([s for s in range(len(seed)) if s not in tied])
        seeds = tuple([seed[s] for s in free])
        columns = prod(seeds)
        vars(self).update(
            axes=axes, seed=seed, shape=shape, tied=tied, free=free, seeds=seeds, columns=columns,
            numel=columns * prod(shape),
        )  # fmt: skip

    @staticmethod
    def identity(
        shape: tuple[int, ...],
        splits: dict[int, tuple[int, ...]] | None = None,
        summed: int | None = None,
        colours: Colours | None = None,
    ) -> Layout:
        """The layout of ``dv/dv``: every axis tied to itself.

        ``splits`` gives the factors of axes that views will split. ``summed`` names an axis over which the
        seeds are summed (its factor is not a seed at all): the classic trick for unmixed samples. Factors in
        ``colours`` have that many seeds, each the sum of all of its colour (see `colours`).
        """
        axes: list[tuple[tuple[int, int], ...]] = []
        seed: list[int] = []
        for a, size in enumerate(shape):
            if a == summed or size == 1:
                axes.append(((size, FREE),))
                continue
            factors = []
            for i, f in enumerate((splits or {}).get(a, (size,))):
                period = colours.get((a, i)) if colours else None
                factors.append((f, len(seed) if period is None else FREE))
                seed.append(f if period is None else period)
            axes.append(tuple(factors))
        return Layout(tuple(axes), tuple(seed))

    @property
    def tied_axes(self) -> tuple[int, ...]:
        """The value's axes that are tied as a whole."""
        return tuple(a for a in range(len(self.axes)) if self.is_tied(a))

    def seeds_of(self, sel: Selection | None) -> tuple[int, ...]:
        """``seeds`` of a chunk."""
        if not sel:
            return self.seeds
        return tuple([sel[s][1] if s in sel else self.seed[s] for s in self.free])

    def columns_of(self, sel: Selection | None) -> int:
        """``columns`` of a chunk."""
        return prod(self.seeds_of(sel)) if sel else self.columns

    def numel_of(self, sel: Selection | None) -> int:
        """``numel`` of a chunk."""
        return self.columns_of(sel) * prod(self.shape)

    def is_tied(self, axis: int) -> bool:
        """Whether every factor of an axis is tied (so that a contraction over it needs no sum)."""
        return all(t != FREE for _, t in self.axes[axis])

    def drop(self, ties: frozenset[int]) -> Layout:
        """The same value with fewer ties."""
        if not ties:
            return self
        return Layout(
            tuple(tuple((n, FREE if t in ties else t) for n, t in axis) for axis in self.axes),
            self.seed,
        )

    def untie(self, axes) -> Layout:
        """The same value with no tie on ``axes``."""
        return self.drop(frozenset(t for a in axes for _, t in self.axes[a] if t != FREE))

    def contract(self, axis: int, size: int) -> tuple[Layout, Layout, bool]:
        """Before and after a map that mixes ``axis`` and gives it ``size`` entries, and whether the axis is tied.

        Then nothing is summed. An axis that is tied in part loses its ties first.
        """
        tied = self.is_tied(axis)
        mid = self if tied else self.untie((axis,))
        return mid, released(mid, axis, size), tied

    def carry(self, kept: tuple[tuple[int, int], ...], out_shape: tuple[int, ...]) -> Layout:
        """After a map that passes ``kept`` (in, out) axis pairs through and mixes all others."""
        source = {b: a for a, b in kept}
        axes = tuple(
            self.axes[source[b]] if b in source else ((n, FREE),) for b, n in enumerate(out_shape)
        )
        return Layout(axes, self.seed)

    def viewed(self, shape: tuple[int, ...]) -> Layout:
        """After a reshape to ``shape``; ties that the new axes cut across are dropped.

        Raises SplitSeed where an axis boundary falls inside a tied factor and divides it.
        """
        flat = [f for axis in self.axes for f in axis if f[0] != 1]
        # positions in units of elements, counted from the last axis: each factor spans [lo, hi)
        spans, lo = [], 1
        for size, tie in reversed(flat):
            spans.append((lo, lo * size, tie))
            lo *= size
        out, lo = [], 1
        for size in reversed(shape):
            hi, factors, at = lo * size, [], lo
            for f_lo, f_hi, tie in spans:
                if tie == FREE or size == 1 or f_hi <= lo or f_lo >= hi:
                    continue
                if f_lo < lo or f_hi > hi:  # the boundary falls inside of the tied factor
                    cut = lo if f_lo < lo else hi
                    if cut % f_lo == 0 and f_hi % cut == 0:
                        raise SplitSeed(tie, (f_hi // cut, cut // f_lo))
                    continue
                if f_lo % at or hi % f_hi:
                    continue
                if f_lo > at:
                    factors.append((f_lo // at, FREE))
                factors.append((f_hi // f_lo, tie))
                at = f_hi
            if at < hi or not factors:
                factors.append((hi // at, FREE))
            out.append(tuple(reversed(factors)))
            lo = hi
        return Layout(tuple(reversed(out)), self.seed)

    def meet(self, other: Layout) -> Layout:
        """The ties that two blocks of one value have in common: the layout of their sum."""
        if self == other:
            return self
        mine, theirs = _positions(self), _positions(other)
        common = frozenset(t for t in mine if theirs.get(t) == mine[t])
        axes: list[tuple[tuple[int, int], ...]] = []
        for size, a in zip(self.shape, self.axes, strict=True):
            ties = {t for _, t in a if t in common}
            if not ties:
                axes.append(((size, FREE),))
                continue
            factors, free = [], 1
            for n, t in a:
                if t in ties:
                    if free > 1:
                        factors.append((free, FREE))
                    factors.append((n, t))
                    free = 1
                else:
                    free *= n
            if free > 1:
                factors.append((free, FREE))
            axes.append(tuple(factors))
        return Layout(tuple(axes), self.seed)


def _positions(layout: Layout) -> dict[int, tuple[int, int]]:
    """Seed factor -> (axis, stride within the axis) of the value factor that it is tied to."""
    out = {}
    for a, axis in enumerate(layout.axes):
        stride = 1
        for n, t in reversed(axis):
            if t != FREE:
                out[t] = (a, stride)
            stride *= n
    return out


def factor_view(
    data: Tensor, layout: Layout, like: Layout, sel: Selection | None
) -> tuple[Tensor, list[int]]:
    """``data`` with one dim a free seed factor, then one a value factor of the finer of two layouts.

    Returns the view and the tie (in ``layout``) of each value dim. ``like`` is the layout with more ties, whose
    factors are at least as fine.
    """
    sizes = [n for axis in like.axes for n, _ in axis]
    return data.reshape((*layout.seeds_of(sel), *sizes)), [t for axis in like.axes for _, t in axis]


def scatter(
    target: Tensor,
    to: Layout,
    data: Tensor | None,
    source: Layout,
    sel: Selection | None = None,
    add: bool = False,
) -> Tensor:
    """Write (or add) a block of layout ``source`` into ``target`` of the layout ``to``, which has fewer ties.

    Only the diagonals where ``source`` can be non-zero are touched. ``sel`` restricts the seed factors that
    become free to a chunk. Returns ``target``.
    """
    view, ties = factor_view(target, to, source, sel)
    if data is None:
        data = _ones(source.shape, target)
    fine, _ = factor_view(data, source, source, sel)
    free = set(to.free)
    names = [*(("s", s) for s in to.free), *(("v", i) for i in range(len(ties)))]
    for i, tie in enumerate(ties):
        if tie not in free:
            continue
        dim = names.index(("v", i))
        if sel and tie in sel:
            start, length = sel[tie]
            view = view.narrow(dim, start, length)
            fine = fine.narrow(len(source.free) + i, start, length)
        seed_dim = names.index(("s", tie))
        view = view.diagonal(0, seed_dim, dim)
        names = [n for j, n in enumerate(names) if j not in (seed_dim, dim)] + [("v", i)]
    wanted = [("s", s) for s in source.free] + [("v", i) for i in range(len(ties))]
    view = view.permute([names.index(n) for n in wanted])
    view.add_(fine) if add else view.copy_(fine)
    return target


def convert(
    data: Tensor | None,
    source: Layout,
    to: Layout,
    sel: Selection | None,
    like: Tensor,
) -> Tensor | None:
    """The same block stored with fewer ties; the new zeros are written out. ``like`` gives dtype and device."""
    if source.tied == to.tied:
        return data
    ref = data if data is not None else like
    target = torch.zeros(to.columns_of(sel), *to.shape, dtype=ref.dtype, device=ref.device)
    return scatter(target, to, data, source, sel)


def unfolded(
    data: Tensor | None, source: Layout, to: Layout, sel: Selection | None, like: Tensor
) -> tuple[Tensor, bool]:
    """`convert`, and whether the block may be overwritten.

    Along axes that keep their ties and whose entries are all alike (expanded; everywhere under an identity seed,
    ``None``) the block is stored once, and expanded again.
    """
    alike = [
        a
        for a, n in enumerate(to.shape)
        if n > 1 and to.axes[a] == source.axes[a] and (data is None or data.stride(a + 1) == 0)
    ]
    if not alike:
        block = convert(data, source, to, sel, like)
        return block, block is not data
    once = {t for a in alike for _, t in to.axes[a] if t != FREE}
    seed = tuple(1 if s in once else n for s, n in enumerate(source.seed))
    for a in alike if data is not None else ():
        data = data.narrow(a + 1, 0, 1)

    def shrunk(layout: Layout) -> Layout:
        axes = tuple(
            tuple((1, t) for _, t in axis) if a in alike else axis
            for a, axis in enumerate(layout.axes)
        )
        return Layout(axes, seed)

    block = convert(data, shrunk(source), shrunk(to), sel, like)
    return block.expand(block.shape[0], *to.shape), False


def release(
    data: Tensor | None,
    layout: Layout,
    axis: int,
    sel: Selection | None,
) -> Tensor | None:
    """Turn the tied factors of one value axis into seeds; the axis is left with size 1.

    Returns a tensor with one dim for each free seed factor of the new layout, then the value's axes: the
    element at seed index ``f`` is the block's element at index ``f`` of the axis. ``None`` stays ``None``.
    """
    if data is None:
        return None
    factors = layout.axes[axis]
    n_free = len(layout.free)
    shape = layout.shape
    view = data.reshape(
        *layout.seeds_of(sel), *shape[:axis], *(n for n, _ in factors), *shape[axis + 1 :]
    )
    first = n_free + axis
    for i, (_, tie) in enumerate(factors):
        if sel and tie in sel:
            view = view.narrow(first + i, *sel[tie])
    names = list(layout.free) + [None] * axis + [t for _, t in factors]
    order = [names.index(s) for s in released(layout, axis).free]
    lead = list(range(n_free, n_free + axis))
    tail = list(range(first + len(factors), view.dim()))
    return view.permute(order + lead + tail).unsqueeze(len(order) + axis)


def released(layout: Layout, axis: int, size: int = 1) -> Layout:
    """The layout after `release`, the axis then having ``size`` unmixed entries."""
    axes = list(layout.axes)
    axes[axis] = ((size, FREE),)
    return Layout(tuple(axes), layout.seed)


def matrix_view(
    matrix: Tensor,
    layout: Layout,
    axis: int,
    batch_axis: int | None,
    sel: Selection | None,
) -> Tensor:
    """A partner matrix ``(b?, in, out)`` shaped to multiply what `release` returns.

    The ``in`` index goes to the dims of the freed seed factors, ``out`` to ``axis``, ``b`` to ``batch_axis``.
    """
    factors = layout.axes[axis]
    if matrix.dim() == 2:
        matrix = matrix.unsqueeze(0)
    b, _, out = matrix.shape
    view = matrix.reshape(b, *(n for n, _ in factors), out)
    for i, (_, tie) in enumerate(factors):
        if sel and tie in sel:
            view = view.narrow(1 + i, *sel[tie])
    ties = [t for _, t in factors]
    free = released(layout, axis).free
    inner = [s for s in free if s in ties]
    view = view.permute(*(1 + ties.index(s) for s in inner), 0, len(ties) + 1)
    sizes = dict(zip(inner, view.shape, strict=False))
    shape = [sizes.get(s, 1) for s in free] + [1] * len(layout.axes)
    shape[len(free) + axis] = out
    if batch_axis is None:
        return view.reshape(shape)
    shape[len(free) + batch_axis] = b
    if batch_axis > axis:  # 'b' must come before 'out' in memory order for the reshape
        view = view.transpose(-1, -2)
    return view.reshape(shape)


def _ones(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return one(like).expand(1, *shape)
