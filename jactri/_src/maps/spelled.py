"""Several maps after one another as one product of lettered operands, which is not made map by map.

A batched product (attention's ``P V``) whose summed axis is tied to the seed sums nothing: it multiplies every seed of
the axis with every partner, and what follows would act on all of these. Here the block and the partners of the product
stay operands: what follows joins them as an operand, views split letters, and the order of multiplication is found by
size (see `letters`). So a weight after attention multiplies the block, or the values, before there is one for each pair
of tokens. No tensor is touched until `Chain` runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from ..base.tracing import may_write
from . import lettered
from .contraction import Expand, MatMul, Sum
from .cut import Shape
from .layout import FREE, Layout, Selection
from .lettered import Lettered, once
from .letters import Axes, Letter, Letters, Network, Unaligned, groups, order, side_by_side
from .linear_map import Diagonal, Identity, LinearMap, Permute, Scale, View
from .selection import Place, Select, Slice

Narrowed = tuple[int, int, int]
"""(dim, start, length) of an operand that meets a block in a part of an axis only."""


@dataclass(frozen=True)
class Part:
    """An operand: the partner or derivative of the map with this number, its dims split to letters."""

    at: int
    shape: Shape | None
    """Of a value, for its derivative, which may be stored once along axes where it is alike;"""
    alike: tuple[int, ...]
    """along these it is."""
    sizes: Shape
    narrowed: tuple[Narrowed, ...]
    letters: Letters


@dataclass(frozen=True)
class Spelled:
    """How maps after one another act on a block of one layout."""

    block: Letters
    values: Shape
    """The sizes of those letters of the block that are not seeds."""
    parts: tuple[Part, ...]
    out: Letters
    sizes: Shape
    """Of the letters."""
    seeds: Letters
    """The letter of each seed factor."""
    before: Layout
    after: Layout
    flops: float
    between: tuple[Letters, ...]
    """Of the products but the last."""
    held: tuple[tuple[Letters, ...], ...]
    """Of what there is at each product, beside the operands and the result: copies, and what was made before."""
    placed: bool
    """Whether the last product is written as the result lies in memory."""

    def made(self) -> int:
        """Elements of the products on the way and of the result; copies are not counted, as in no map."""
        return sum(prod([self.sizes[c] for c in left]) for left in self.between) + self.after.numel

    def most(self, sel: Selection) -> int:
        """Elements of what there is at once beside the operands and the result, for a chunk."""
        spans = self._spans(sel)
        sizes = [spans[c][1] if c in spans else n for c, n in enumerate(self.sizes)]
        return max((sum(prod([sizes[c] for c in o]) for o in at) for at in self.held), default=0)

    def _spans(self, sel: Selection | None) -> dict[Letter, tuple[int, int]]:
        """The part of the result that a chunk is."""
        return {self.seeds[f]: span for f, span in (sel or {}).items() if f in self.after.free}

    def product(
        self, found: Sequence[Tensor], data: Tensor | None, sel: Selection | None
    ) -> Tensor:
        """The block of the layout ``after``, by the array of each part."""
        spans = self._spans(sel)
        operands: list[Lettered] = []
        if data is not None:
            shape = (*self.before.seeds_of(sel), *self.values)
            operands.append((data.reshape(shape), self.block))
        for part, t in zip(self.parts, found, strict=True):
            if part.shape is not None:
                t = t.expand(part.shape)
            for a in reversed(part.alike):
                t = t.select(a, 0)
            t = t.reshape(part.sizes)
            for narrowed in part.narrowed:
                t = t.narrow(*narrowed)
            operands.append((t, part.letters))
        operands = [
            once(lettered.cut(t, letters, spans), letters, self.out) for t, letters in operands
        ]
        sizes = [spans[c][1] if c in spans else self.sizes[c] for c in self.out]
        first, _ = operands[0]
        dest = None  # where the last product is written in the order of the result, or copied to it
        if self.placed and may_write() and all(t.dtype == first.dtype for t, _ in operands):
            dest = first.new_empty(sizes)
        made = lettered.multiply(operands, self.out, dest)
        return made.expand(sizes).reshape(self.after.columns_of(sel), *self.after.shape)


class Chain(LinearMap):
    """Maps after one another, as they are spelled."""

    __slots__ = ("maps", "spelled")
    name, structure = "chain", "factors"

    def __init__(self, maps: Sequence[LinearMap], spelled: Spelled):
        self.maps, self.spelled = maps, spelled

    @property
    def entries(self) -> int:
        return sum(m.entries for m in self.maps)

    def apply(self, data, own, layout, route, reverse, sel, like):
        made = [self.maps[part.at] for part in self.spelled.parts]
        found = [m.partner if isinstance(m, MatMul) else m.d for m in made]
        for edge in self.maps:
            if isinstance(edge, Scale):
                found[-1] = found[-1] * edge.factor
        new = self.spelled.product(found, data, sel)
        return new, (len(found) > 1 or data is not None) and lettered.has_own_memory(new)


def spell(
    maps: Sequence[LinearMap], shapes: Sequence[Shape], before: Layout, after: Layout, reverse: bool
) -> Spelled | None:
    """How ``maps`` act, in the order of a sweep, on a block of the layout ``before``, to give one of ``after``.

    ``shapes``: of the value before each map, and of the last. None where there is a map that has no such form, or where
    ties of the two layouts are not those of the letters.
    """
    try:
        return _Speller(before).run(maps, shapes, after, reverse)
    except Unaligned:
        return None


def _held(operands: list[Letters], steps, out: Letters):
    """`Spelled.held` and `Spelled.placed` of products in the order of ``steps``."""
    held, made, placed = [], [False] * len(operands), False
    for i, j, left in steps:
        one, other = operands[i], operands[j]
        batch, rows, inner, columns = groups(one, other, left)
        at = [o for o, m in zip(operands, made, strict=True) if m]
        found = (*batch, *rows, *columns)
        if inner:  # their letters have to be those of matrices
            at += [one] * (not side_by_side(one, (batch, rows, inner)))
            at += [other] * (not side_by_side(other, (batch, inner, columns)))
        operands = [o for k, o in enumerate(operands) if k not in (i, j)] + [left]
        made = [m for k, m in enumerate(made) if k not in (i, j)] + [True]
        if len(operands) > 1:
            at.append(left)
        elif inner and found != out:
            last = out[-1] in [part[-1] for part in (rows, columns) if part]
            placed = last and len(found) == len(out) and side_by_side(out, (batch, rows, columns))
            at += [out] * (not placed)
        held.append(tuple(at))
    return tuple(held), placed


class _Speller:
    """The letters of a value, map after map."""

    def __init__(self, before: Layout):
        self.before, self.net = before, Network()
        net = self.net
        self.seeds: Axes = [[net.letter(n)] for n in before.seed]
        self.axes: Axes = [
            [self.seeds[t][0] if t != FREE else net.letter(n) for n, t in axis if n != 1]
            for axis in before.axes
        ]
        values = [c for axis in self.axes for c in axis]
        dims = [*(self.seeds[s][0] for s in before.free), *values]
        self.block = net.add(dims, (self.seeds, self.axes), None)
        self.parts: list = []  # (map, shape, alike, operand, letters that were a part of their axis by then)
        self.placed: dict[Letter, tuple[int, int]] = {}
        """Letters that are a part of their axis: (start, the axis' size)."""

    def run(self, maps, shapes, after: Layout, reverse: bool) -> Spelled:
        for at, edge in enumerate(maps):
            near, far = shapes[at], shapes[at + 1]
            if edge.__class__ is View:
                self._view(far)
            elif edge.__class__ is Permute:
                moved = list(self.axes)
                for i, d in enumerate(edge.dims):
                    self.axes[d if reverse else i] = moved[i if reverse else d]
            elif isinstance(edge, MatMul):
                self._matmul(at, edge, near, far, reverse)
            elif edge.__class__ is Diagonal:
                self._diagonal(at, edge, near)
            elif edge.__class__ in (Sum, Expand):
                self._sum(edge, far, (edge.__class__ is Sum) != reverse)
            elif edge.__class__ in (Slice, Place, Select) and edge.places(reverse):
                self._place(edge)
            elif edge.__class__ not in (Identity, Scale):
                raise Unaligned
        return self._found(after)

    def _full(self, letter: Letter) -> int:
        return self.placed[letter][1] if letter in self.placed else self.net.sizes[letter]

    def _view(self, shape: Shape) -> None:
        flat = [c for axis in self.axes for c in axis]
        self.axes[:] = [flat]  # in place: splits are written to it
        at, groups = 0, []
        for size in shape:
            start, left = at, size
            while left > 1:
                if at == len(flat):
                    raise Unaligned
                n = self._full(flat[at])
                if n > left:
                    if n % left or flat[at] in self.placed:
                        raise Unaligned
                    self.net.split(flat[at], left)
                    n = left
                if left % n:
                    raise Unaligned
                left //= n
                at += 1
            groups.append((start, at))
        if at != len(flat):
            raise Unaligned
        self.axes[:] = [flat[a:b] for a, b in groups]

    def _part(self, at: int, shape: Shape | None, axes: Axes, alike: Sequence[int] = ()) -> None:
        """An operand, by the letters of its axes."""
        dims = [c for axis in axes for c in axis]
        if len(set(dims)) < len(dims):
            raise Unaligned
        self.parts.append((at, shape, tuple(alike), self.net.add(dims, (), None), {*self.placed}))

    def _matmul(self, at: int, edge: MatMul, near: Shape, far: Shape, reverse: bool) -> None:
        right, batched = edge.side == "right", edge.structure == "batched matrix"
        axis = len(near) - 1 if right else len(near) - 2
        mine = list(self.axes[axis])
        made = [self.net.letter(far[axis])] if far[axis] != 1 else []
        pair = [mine, made] if right != reverse else [made, mine]
        self._part(at, None, [*([self.axes[0]] if batched else []), *pair])
        self.axes[axis] = made

    def _diagonal(self, at: int, edge: Diagonal, shape: Shape) -> None:
        alike = (
            range(0) if edge.along is None else [a for a in range(len(shape)) if a != edge.along]
        )
        self._part(at, shape, [axis for a, axis in enumerate(self.axes) if a not in alike], alike)

    def _sum(self, edge: Sum, far: Shape, contracts: bool) -> None:
        for a in edge.axes:
            if contracts:
                self._contracted(a)
                self.axes[a] = []
            else:
                self.axes[a] = [self.net.letter(far[a])] if far[a] != 1 else []

    def _contracted(self, a: int) -> None:
        known = {c for o in self.net.operands for c in o.dims}
        if any(c not in known or c in self.placed for c in self.axes[a]):
            raise Unaligned  # ones summed

    def _place(self, edge) -> None:
        """A block is put into zeros: its axis is a part of a longer one."""
        a = edge.axis
        axis: list[Letter]
        if edge.__class__ is Select:
            start, axis = edge.index, []
            self.axes.insert(a, axis)
        else:
            start, axis = edge.start, self.axes[a]
            if edge.step != 1:
                raise Unaligned
        if not axis:
            axis = self.axes[a] = [self.net.letter(1)]
        if len(axis) != 1 or axis[0] in self.placed:
            raise Unaligned
        self.placed[axis[0]] = start, edge.size

    def _found(self, after: Layout) -> Spelled:
        net, seeds = self.net, self.seeds
        if any(len(s) != 1 for s in seeds):
            raise Unaligned
        of_seed = [s[0] for s in seeds]
        for axis, mine in zip(after.axes, self.axes, strict=True):
            want = [(n, t) for n, t in axis if n != 1]
            if any(c in self.placed for c in mine):
                raise Unaligned
            at = 0
            for n, t in want:
                start = at
                while n > 1:
                    if at == len(mine) or n % net.sizes[mine[at]]:
                        raise Unaligned
                    n //= net.sizes[mine[at]]
                    at += 1
                if t == FREE:
                    if any(c in of_seed for c in mine[start:at]):
                        raise Unaligned
                elif mine[start:at] != [of_seed[t]]:
                    raise Unaligned
        values = [c for axis in self.axes for c in axis]
        out = (*(of_seed[s] for s in after.free), *values)
        if len(set(out)) < len(out):
            raise Unaligned
        sizes = tuple(net.sizes)
        block = tuple(self.block.dims)
        parts = []
        for at, shape, alike, operand, placed in self.parts:
            letters = tuple(operand.dims)
            narrowed = tuple(
                (i, self.placed[c][0], sizes[c]) for i, c in enumerate(letters) if c in placed
            )
            whole = tuple(self.placed[c][1] if c in placed else sizes[c] for c in letters)
            parts.append(Part(at, shape, alike, whole, narrowed, letters))
        steps, flops = order((block, *(p.letters for p in parts)), tuple(enumerate(sizes)), out)
        held, placed = _held([block, *(p.letters for p in parts)], steps, out)
        free = len(self.before.free)
        return Spelled(
            block, tuple(sizes[c] for c in block[free:]), tuple(parts), out, sizes, tuple(of_seed),
            self.before, after, flops, tuple(left for _, _, left in steps[:-1]), held, placed,
        )  # fmt: skip
