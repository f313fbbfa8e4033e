"""Partial Jacobians multiplied and summed as lettered arrays: Gram matrices, diagonals, traces.

Every dim of an operand has a letter, as in an einsum, and both of its ends are axes that are products of letters. A tie
(see `layout`) is a letter that both ends have. Where two operands meet, the axes of their ends are split until they
agree, and get the same letters; letters that the result lacks are summed. Without tensors, the same tells the cost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from math import prod

import torch
from torch import Tensor

from ..base import backends
from ..device.batching import bmm
from ..maps.layout import FREE, Selection, convert, one
from ..plan.sweep import Sweep

Letter = int
Axes = list[list[Letter]]
"""The letters of every axis of one end."""


class Unaligned(Exception):
    """Two ends factor their axes in ways that have nothing in common."""


@dataclass
class Operand:
    """An array: ``dims`` are the letters of its dims, ``ends`` those of the axes of what it relates.

    ``data`` is None while a cost is looked for. Letters of the ends that ``dims`` lacks are alike along them.
    """

    dims: list[Letter]
    ends: tuple[Axes, ...]
    data: Tensor | None = None


class Network:
    """Operands with common letters."""

    def __init__(self):
        self.sizes: list[int] = []
        self.operands: list[Operand] = []
        self.chunk: dict[Letter, tuple[int, int]] = {}
        """Letters of which a range (start, length) is computed."""
        self.flops = 0.0

    def letter(self, size: int) -> Letter:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def axes(self, shape) -> Axes:
        """Letters for an end that nothing is known of."""
        return [[self.letter(n)] if n != 1 else [] for n in shape]

    def add(self, dims: list[Letter], ends: tuple[Axes, ...], data: Tensor | None) -> Operand:
        """An operand; ``data`` of any shape that has the sizes of ``dims``."""
        self.operands.append(Operand(list(dims), ends, data))
        return self.operands[-1]

    def block(
        self,
        sweep: Sweep,
        value: int,
        like,
        data: Tensor | None = None,
        sel: Selection | None = None,
        plain: bool = False,
        planned: bool = False,
    ) -> Operand:
        """The block of a value in a sweep; its ends are (the seed, the value).

        ``sel``: the chunk that ``data`` is of; ``like``: the graph's value. ``plain``: zeros are written out, and axes
        stay as they are. ``planned``: there is no data yet.
        """
        layout, seed = sweep.layouts[value], sweep.layout
        sel = sel or {}
        if not planned and data is None:
            data = one(like).expand(1, *layout.shape)
        if plain:
            if data is not None:
                data = convert(data, layout, layout.drop(layout.tied), sel, like)
            shape = seed.shape[1:] if sweep.summed else seed.shape
            ends = self.axes(shape), self.axes(layout.shape)
            if sweep.summed:
                ends = [ends[1][0], *ends[0]], ends[1]
            dims = [c for axis in (*ends[0][sweep.summed :], *ends[1]) for c in axis]
            return self.add(dims, ends, self._shaped(data, dims))
        of_seed = [self.letter(n) for n in seed.seed]
        of_value = [
            [of_seed[t] if t != FREE else self.letter(n) for n, t in axis if n != 1]
            for axis in layout.axes
        ]
        ends = [[of_seed[t] for _, t in axis if t != FREE] for axis in seed.axes], of_value
        if sweep.summed:  # the samples are known not to mix: the seed's are the value's
            ends[0][0] = list(of_value[0])
        dims = [of_seed[s] for s in layout.free] + [c for axis in of_value for c in axis]
        if data is None:
            alike = value in sweep.alike
            same = {c for c in dims if c in of_seed and of_seed.index(c) in layout.tied}
            return self.add([c for c in dims if not (alike and c in same)], ends, None)
        for s, span in sel.items():
            self.chunk[of_seed[s]] = span
        sizes = [*layout.seeds(sel), *(self.sizes[c] for axis in of_value for c in axis)]
        return self.add(dims, ends, data.reshape(sizes))

    def _shaped(self, data: Tensor | None, dims) -> Tensor | None:
        return None if data is None else data.reshape([self.sizes[c] for c in dims])

    def identify(self, mine: Axes, theirs: Axes) -> None:
        """Give two ends the same letters. Raises Unaligned where that cannot be."""
        sizes = self.sizes
        for a, b in zip(mine, theirs, strict=True):
            i = 0
            while i < len(a):
                if i == len(b):
                    raise Unaligned
                m, n = sizes[a[i]], sizes[b[i]]
                if m > n and m % n == 0:
                    self._split(a[i], n)
                elif n > m and n % m == 0:
                    self._split(b[i], m)
                elif m != n:
                    raise Unaligned
                i += 1
            for p, q in zip(list(a), list(b), strict=True):
                self._rename(q, p)

    def _ends(self) -> Iterable[list[Letter]]:
        for operand in self.operands:
            for end in operand.ends:
                yield from end

    def _split(self, letter: Letter, first: int) -> None:
        """Split a letter so that its leading part has the size ``first``."""
        if letter in self.chunk:
            raise Unaligned
        new = [self.letter(first), self.letter(self.sizes[letter] // first)]
        for letters in _distinct(self._ends()):
            if letter in letters:
                at = letters.index(letter)
                letters[at : at + 1] = new
        for operand in self.operands:
            while letter in operand.dims:
                at = operand.dims.index(letter)
                operand.dims[at : at + 1] = new
                if operand.data is not None:
                    operand.data = operand.data.unflatten(at, [self.sizes[c] for c in new])

    def _rename(self, old: Letter, new: Letter) -> None:
        if old == new:
            return
        if old in self.chunk:
            if self.chunk.setdefault(new, self.chunk[old]) != self.chunk[old]:
                raise Unaligned
            del self.chunk[old]
        for letters in _distinct((*self._ends(), *(o.dims for o in self.operands))):
            letters[:] = [new if c == old else c for c in letters]

    def size(self, letter: Letter) -> int:
        """Of a chunk."""
        return self.chunk[letter][1] if letter in self.chunk else self.sizes[letter]

    def multiply(self, operands: list[Operand], ends: tuple[Axes, ...]) -> Operand:
        """The product of operands, from the last to the first, with the letters of ``ends``; all others are summed.

        Its dims are in the order of the ends. Adds what it costs to ``flops``.
        """
        order = list(dict.fromkeys(c for end in ends for axis in end for c in axis))
        wanted = set(order)
        seen = {c for o in operands for c in o.dims}
        parts = self._reduced(operands)
        held = {c for p in parts for c in p.dims}
        total = parts.pop()
        while True:
            group = [parts.pop(), total] if parts else [total]
            rest = wanted.union(*(p.dims for p in parts))
            if (
                len(group) == 2
                or not rest.issuperset(total.dims)
                or len(total.dims) > len({*total.dims})
            ):
                self.flops += 2.0 * prod(self.size(c) for c in {c for p in group for c in p.dims})
                total = _product(group, rest)
            if not parts:
                break
        # letters along which all operands are alike
        many = prod(self.size(c) for c in seen - held - wanted)
        dims, data = [c for c in order if c in total.dims], total.data
        if data is not None:
            data = data.permute([total.dims.index(c) for c in dims])
            data = data if many == 1 else data * many
        return Operand(dims, ends, data)

    def copy(self, other: Network, operand: Operand) -> Operand:
        """An operand of another network, with letters of this one."""
        new: dict[Letter, Letter] = {}

        def renamed(letters: list[Letter]) -> list[Letter]:
            for c in letters:
                if c not in new:
                    new[c] = self.letter(other.sizes[c])
            return [new[c] for c in letters]

        ends = tuple([renamed(axis) for axis in end] for end in operand.ends)
        return self.add(renamed(operand.dims), ends, operand.data)

    def _reduced(self, operands: list[Operand]) -> list[Operand]:
        """The operands' parts in the chunk, of one dtype, once along dims that they are expanded over."""
        given = [o.data.dtype for o in operands if o.data is not None]
        dtype = reduce(torch.promote_types, given) if given else None
        out = []
        for o in operands:
            data, dims = o.data, list(o.dims)
            for i in range(len(dims) - 1, -1, -1) if data is not None else ():
                span = self.chunk.get(dims[i])
                if span is not None and data.shape[i] != span[1]:
                    data = data.narrow(i, *span)
                alike = data.stride(i) == 0 and data.shape[i] > 1 and dims.count(dims[i]) == 1
                if alike and span is None:
                    data = data.select(i, 0)
                    del dims[i]
            out.append(Operand(dims, o.ends, None if data is None else data.to(dtype)))
        return out


def _distinct(lists: Iterable[list]) -> list[list]:
    """Lists that several operands may have in common, each once."""
    return list({id(x): x for x in lists}.values())


def _product(parts: list[Operand], keep: set[Letter]) -> Operand:
    """The product of one or two operands, with the letters of ``keep``; all others are summed."""
    letters = list(dict.fromkeys(c for p in parts for c in p.dims))
    if any(p.data is None for p in parts):
        return Operand([c for c in letters if c in keep], ())
    if len(parts) == 2 and all(len(set(p.dims)) == len(p.dims) for p in parts):
        a, b = parts
        shared = [c for c in a.dims if c in b.dims]
        inner = [c for c in shared if c not in keep]
        rows, columns = ([c for c in p.dims if c not in shared] for p in parts)
        if inner and keep.issuperset((*rows, *columns)):
            return _matrices(a, b, [c for c in shared if c in keep], rows, inner, columns)
    names = {c: i for i, c in enumerate(letters)}
    arguments = []
    for p in parts:
        arguments += [p.data, [names[c] for c in p.dims]]
    out = [c for c in letters if c in keep]
    return Operand(out, (), torch.einsum(*arguments, [names[c] for c in out]))


def _matrices(a: Operand, b: Operand, batch, rows, inner, columns) -> Operand:
    """A batch of matrix products ``(rows, inner) (inner, columns)``."""

    def ordered(operand: Operand, *groups: list[Letter]) -> Tensor:
        data = operand.data.permute([operand.dims.index(c) for group in groups for c in group])
        sizes, at = [], 0
        for group in groups:
            sizes.append(prod(data.shape[at : at + len(group)]))
            at += len(group)
        return data.reshape(sizes)

    size = {c: n for o in (a, b) for c, n in zip(o.dims, o.data.shape, strict=True)}
    if not (rows or columns):
        made = (ordered(a, batch, inner) * ordered(b, batch, inner)).sum(1)
    elif batch:
        made = bmm(ordered(a, batch, rows, inner), ordered(b, batch, inner, columns))
    else:
        if prod(size[c] for c in columns) > prod(size[c] for c in rows):
            a, b, rows, columns = b, a, columns, rows
        made = backends.product(ordered(a, rows, inner), ordered(b, inner, columns), False)
    dims = [*batch, *rows, *columns]
    return Operand(dims, (), made.reshape([size[c] for c in dims]))


class Sum:
    """A product of networks: the sum over chunks, and over products between the same ends."""

    def __init__(self):
        self.network: Network | None = None
        self.made: Operand | None = None
        self._own = False

    def add(self, network: Network, part: Operand) -> None:
        """Add a chunk of a product; those of letters that it keeps are put in their places."""
        letters = list(dict.fromkeys(c for end in part.ends for axis in end for c in axis))
        cut = {c: network.chunk[c] for c in letters if c in network.chunk}
        if self.made is None:
            self.network, self.made = network, part
            if not cut or part.data is None:
                return
            shape = [network.sizes[c] for c in letters]
            whole = torch.zeros(shape, dtype=part.data.dtype, device=part.data.device)
            self.made, self._own = Operand(letters, part.ends, whole), True
        dims = [c for c in letters if c in self.made.dims or c in part.dims]
        more = _spread(part, dims)
        if cut or (self._own and dims == self.made.dims and not torch.is_grad_enabled()):
            view = self.made.data
            for c, span in cut.items():
                view = view.narrow(dims.index(c), *span)
            view.add_(more)
        else:
            self.made.data, self._own = _spread(self.made, dims) + more, True
            self.made.dims = dims

    def merge(self, other: Sum) -> None:
        """Add another sum, whose ties may be others."""
        if self.made is None:
            self.network, self.made, self._own = other.network, other.made, other._own
            return
        if self.made.data is None:
            return
        tied = self.tied and other.tied
        one, two = (_untied(s.network, s.made, tied) for s in (self, other))
        self.network, self._own = one[0], True
        self.made = Operand(one[1].dims, one[1].ends, one[1].data + two[1].data)

    @property
    def tied(self) -> bool:
        """Whether the first axes of both ends are one and the same."""
        first, second = self.made.ends
        return bool(first and second) and first[0] == second[0]

    def dense(self, shared: bool) -> Tensor:
        """The sum as a tensor; ``shared``: the first axes are tied, and come once."""
        first, second = self.made.ends
        ends = first, second[1:] if shared else second
        return dense(self.network, Operand(self.made.dims, ends, self.made.data))


def _spread(operand: Operand, dims: list[Letter]) -> Tensor:
    """The data of an operand with a dim for each of ``dims``, in their order as its own are."""
    data = operand.data
    for i, c in enumerate(dims):
        if c not in operand.dims:
            data = data.unsqueeze(i)
    return data


def _untied(network: Network, made: Operand, tied: bool) -> tuple[Network, Operand]:
    """A product with no letter in both ends, but for those of the first axes where they are ``tied``."""
    sizes = [[prod(network.sizes[c] for c in axis) for axis in end] for end in made.ends]
    plain = Network()
    first, second = plain.axes(sizes[0]), plain.axes(sizes[1])
    if tied:
        second[0] = list(first[0])
    dims = [c for axis in (*first, *second[tied:]) for c in axis]
    part = Sum()
    part.network, part.made = network, made
    data = part.dense(tied).reshape([plain.sizes[c] for c in dims])
    return plain, plain.add(dims, (first, second), data)


def dense(network: Network, made: Operand) -> Tensor:
    """A product as a tensor, the axes of its ends one after the other; zero off its diagonals."""
    axes = [axis for end in made.ends for axis in end]
    letters = [c for axis in axes for c in axis]
    shape = [prod(network.sizes[c] for c in axis) for axis in axes]
    data, dims = made.data, list(made.dims)
    for c in dict.fromkeys(letters):
        if c not in dims:
            data = data.unsqueeze(0).expand(network.sizes[c], *data.shape)
            dims.insert(0, c)
    if len(dims) == len(letters):
        return data.permute([dims.index(c) for c in letters]).reshape(shape)
    sizes = [network.sizes[c] for c in letters]
    total = torch.zeros(sizes, dtype=data.dtype, device=data.device)
    view, names = total, list(letters)
    for c in dict.fromkeys(letters):
        while names.count(c) > 1:
            i = names.index(c)
            j = names.index(c, i + 1)
            view = view.diagonal(0, i, j)
            del names[j], names[i]
            names.append(c)
    view.copy_(data.permute([dims.index(c) for c in names]))
    return total.reshape(shape)
