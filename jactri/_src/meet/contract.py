"""Partial Jacobians multiplied and summed as lettered arrays (see `letters`): Gram matrices, diagonals, traces.

Without tensors, the same tells the cost.
"""

from __future__ import annotations

from functools import reduce
from math import prod

import torch
from torch import Tensor

from ..maps.layout import Selection, convert, one
from ..maps.lettered import Lettered, cut, diagonals, multiply, once, spread
from ..maps.letters import Axes, Network, Operand, order
from ..plan.sweep import Sweep


def block(
    network: Network,
    sweep: Sweep,
    value: int,
    like,
    data: Tensor | None = None,
    sel: Selection | None = None,
    planned: bool = False,
) -> Operand:
    """The block of a value in a sweep; its ends are (the seed, the value).

    ``data``: None stands for ones, but for a block that is ``planned``, of which there is none yet; ``sel``: the chunk
    that it is of; ``like``: the graph's value.
    """
    layout = sweep.layouts[value]
    if data is None and not planned:
        data = one(like).expand(1, *layout.shape)
    alike = planned and value in sweep.alike
    return network.block(sweep.layout, layout, data, sel, sweep.summed, alike)


def plain(network: Network, sweep: Sweep, value: int, like, data: Tensor | None = None) -> Operand:
    """The same with zeros written out, and axes as they are."""
    layout, seed = sweep.layouts[value], sweep.layout
    if data is None:
        data = one(like).expand(1, *layout.shape)
    data = convert(data, layout, layout.drop(layout.tied), {}, like)
    ends = network.axes(seed.shape[1:] if sweep.summed else seed.shape), network.axes(layout.shape)
    dims = [c for axis in (*ends[0], *ends[1]) for c in axis]
    if sweep.summed:
        ends = [ends[1][0], *ends[0]], ends[1]
    return network.add(dims, ends, data)


def product(network: Network, operands: list[Operand], ends: tuple[Axes, ...]) -> Operand:
    """The product of operands, with the letters of ``ends`` in their order; all others are summed.

    Without data, what it takes is added to the network's ``flops``.
    """
    wanted = tuple(dict.fromkeys(c for end in ends for axis in end for c in axis))
    seen = {c for o in operands for c in o.dims}
    if any(o.data is None for o in operands):
        sizes = tuple(sorted((c, network.size(c)) for c in seen))
        network.flops += order(tuple([tuple(o.dims) for o in operands]), sizes, wanted)[1]
        return Operand([c for c in wanted if c in seen], ends)
    parts = _reduced(network, operands)
    held = {c for _, letters in parts for c in letters}
    dims = tuple([c for c in wanted if c in held])
    data = multiply(parts, dims)
    # letters along which all operands are alike
    many = prod(network.size(c) for c in seen - held - set(wanted))
    return Operand(list(dims), ends, data if many == 1 else data * many)


def _reduced(network: Network, operands: list[Operand]) -> list[Lettered]:
    """The operands' parts in the chunk, of one dtype, once along dims that they are expanded over."""
    dtype = reduce(torch.promote_types, [o.data.dtype for o in operands])
    out = []
    for o in operands:
        data = cut(o.data, o.dims, network.chunk)
        data, dims = once(data, o.dims, [c for c in o.dims if c not in network.chunk])
        out.append((data.to(dtype), dims))
    return out


class Sum:
    """A product of networks: the sum over chunks, and over products between the same ends."""

    def __init__(self):
        self.network: Network | None = None
        self.made: Operand | None = None
        self._own = False

    def add(self, network: Network, part: Operand) -> None:
        """Add a chunk of a product; those of letters that it keeps are put in their places."""
        letters = list(dict.fromkeys(c for end in part.ends for axis in end for c in axis))
        spans = {c: network.chunk[c] for c in letters if c in network.chunk}
        if self.made is None:
            self.network, self.made = network, part
            if not spans or part.data is None:
                return
            shape = [network.sizes[c] for c in letters]
            whole = torch.zeros(shape, dtype=part.data.dtype, device=part.data.device)
            self.made, self._own = Operand(letters, part.ends, whole), True
        dims = [c for c in letters if c in self.made.dims or c in part.dims]
        more = spread(part.data, part.dims, dims)
        if spans or (self._own and dims == self.made.dims and not torch.is_grad_enabled()):
            cut(self.made.data, dims, spans).add_(more)
        else:
            self.made.data, self._own = spread(self.made.data, self.made.dims, dims) + more, True
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


def _untied(network: Network, made: Operand, tied: bool) -> tuple[Network, Operand]:
    """A product with no letter in both ends, but for those of the first axes where they are ``tied``."""
    sizes = [[prod(network.sizes[c] for c in axis) for axis in end] for end in made.ends]
    fresh = Network()
    first, second = fresh.axes(sizes[0]), fresh.axes(sizes[1])
    if tied:
        second[0] = list(first[0])
    dims = [c for axis in (*first, *second[tied:]) for c in axis]
    part = Sum()
    part.network, part.made = network, made
    return fresh, fresh.add(dims, (first, second), part.dense(tied))


def dense(network: Network, made: Operand) -> Tensor:
    """A product as a tensor, the axes of its ends one after the other; zero off its diagonals."""
    axes = [axis for end in made.ends for axis in end]
    letters = [c for axis in axes for c in axis]
    shape = [prod(network.sizes[c] for c in axis) for axis in axes]
    each = list(dict.fromkeys(letters))
    data = spread(made.data, made.dims, each).expand([network.sizes[c] for c in each])
    if len(each) == len(letters):
        return data.reshape(shape)
    total = data.new_zeros([network.sizes[c] for c in letters])
    view, names = diagonals(total, letters)
    view.copy_(spread(data, each, names))
    return total.reshape(shape)
