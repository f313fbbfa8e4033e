"""The seeds of coloured sweeps (see `colours`): those of one colour are one tangent or cotangent."""

from __future__ import annotations

from math import prod

import numpy
import torch
from torch import Tensor

from ..base.constants import fixed
from ..maps.layout import Selection
from ..plan.sweep import Sweep, factors_of


def seed_block(sweep: Sweep, sel: Selection | None, like) -> Tensor:
    """The coloured seed, ``(colours, *shape)``: one where the index is of the colour."""
    layout, factors = sweep.layout, factors_of(sweep)
    sel = sel or {}
    keys = tables_key(sweep)
    if (table := sweep.table) is not None:
        start, length = sel.get(0, (0, table.count))

        def of_table() -> tuple[Tensor, ...]:
            wanted = torch.arange(start, start + length, device=like.device)[:, None]
            colour = torch.from_numpy(table.colour).to(like.device)
            return ((colour == wanted).to(like.dtype).view(length, *layout.shape),)

        key = "seed", keys, layout, start, length, like.dtype, like.device
        return fixed(key, of_table)[0]

    def make() -> tuple[Tensor, ...]:
        block = torch.ones((), dtype=like.dtype, device=like.device)
        for j, f in enumerate(layout.free):
            start, length = sel.get(f, (0, layout.seed[f]))
            i = [g for _, g in factors].index(f)
            colours = torch.arange(start, start + length, device=like.device)
            here = torch.from_numpy(colours_in(sweep, f, factors[i][0])).to(like.device)
            shape = [1] * (len(layout.free) + len(factors))
            shape[j], shape[len(layout.free) + i] = length, factors[i][0]
            block = block * (here == colours[:, None]).to(like.dtype).view(shape)
        return (block,)

    chosen = tuple(sorted((f, r) for f, r in sel.items() if f in layout.free))
    (block,) = fixed(("seed", keys, layout, sweep.summed, chosen, like.dtype, like.device), make)
    sizes, at = [], len(layout.free)
    for axis in layout.axes:
        if len(axis) > 1:  # one axis again
            block = block.expand(
                *block.shape[:at], *(n for n, _ in axis), *block.shape[at + len(axis) :]
            )
        sizes.append(prod(block.shape[at : at + len(axis)]))
        at += len(axis)
    return block.reshape(layout.columns_of(sel), *sizes).expand(-1, *layout.shape)


def colours_in(sweep: Sweep, factor: int, size: int) -> numpy.ndarray:
    """The colour of each of ``size`` indices of a factor of the seed."""
    at = [f for _, f in factors_of(sweep)].index(factor)
    places = [(a, i) for a, axis in enumerate(sweep.layout.axes) for i in range(len(axis))]
    table = sweep.tables.get(places[at])
    return numpy.arange(size) % sweep.layout.seed[factor] if table is None else table.colour


def tables_key(sweep: Sweep) -> tuple:
    """Hashable: determines which seeds have which colours, where that is not their number's rest."""
    own = None if sweep.table is None else sweep.table.key
    return own, tuple((at, t.key) for at, t in sorted(sweep.tables.items()))
