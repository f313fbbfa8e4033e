"""Writes into a part of a tensor: ``out[:, 0] = f(x)``.

Autograd records such a write as a CopySlices node, which does not show where it wrote. The node itself tells:
applied to the numbers 1, 2, 3, ... it returns, for every entry of the source, the number of the place that it went
to. If those places are a regular slice of the result, the write is a `Place`; other numbers must confirm it, exactly.
"""

from __future__ import annotations

from math import nan, prod

import torch
from torch import Tensor

from ..selection import Place, Slice
from . import rule

_EXACT = {torch.float32: 1 << 24, torch.float64: 1 << 53}
"""Integers below these bounds are exact."""


@rule("torch::autograd::CopySlices")
def copy_slices(g):
    shape, meta = g.shape, g.meta[0]
    n = prod(shape)
    if n >= _EXACT.get(meta.dtype, 0) or n == 0:
        return None
    node = g.node
    ones = torch.ones(shape, dtype=meta.dtype, device=meta.device)
    weights = node(ones)
    with torch.no_grad():
        number = torch.arange(1, n + 1, dtype=meta.dtype, device=meta.device).reshape(shape)
        places = node(number)
        # a fixed scramble of 1..n: what is confirmed must not depend on the caller's random state
        scramble = (number * 7919 + 13).remainder(8191) + 1
        confirm = node(scramble)
        terms = []
        for edge, s in enumerate(g.src):
            if s is None:
                continue
            w, place, seen = weights[edge], places[edge], confirm[edge]
            if w is None:
                continue
            if edge == 0:  # what was there before, scaled where it was not replaced
                if w.shape != ones.shape or not torch.equal(seen, w * scramble):
                    return None
                terms.append((s, (w, node(ones * nan)[edge].isnan().to(w.dtype))))
                continue
            term = _written(s, w, place, seen, scramble)
            if term is None:
                return None
            terms.append(term)
    return g.plus([_emit(g, *term) for term in terms])


@rule("AsStrided")
def as_strided(g):
    """A view by strides, as autograd makes of a view of a tensor that was written to: a slice, or left to autograd."""
    (s,) = g.src
    shape, meta = g.shape, g.meta[0]
    old = g.values[s].shape
    n = prod(shape)
    if n >= _EXACT.get(meta.dtype, 0) or n == 0:
        return None
    with torch.no_grad():
        number = torch.arange(1, n + 1, dtype=meta.dtype, device=meta.device).reshape(shape)
        reached = g.node(number)
        ones = g.node(torch.ones_like(number))
    if tuple(reached.shape) != old or float(ones.max()) > 1 or int(ones.sum()) != n:
        return None  # entries that are read twice
    where = reached.reshape(-1).nonzero().squeeze(1)
    index = torch.empty(n, dtype=torch.long, device=meta.device)
    index[reached.reshape(-1)[where].long() - 1] = where
    slices = regular(index.reshape(shape), old)
    if slices is None:
        return None
    value = s
    for axis, (_, start, length, step) in enumerate(slices):
        now = g.values[value].shape
        if length != now[axis]:
            new = (*now[:axis], length, *now[axis + 1 :])
            value = g.single(value, Slice(axis, start, length, step, now[axis]), new)
    order = [a for a, *_ in slices if a is not None]
    if order != sorted(order):
        value = g.view(value, tuple(shape[a] for a in order))
        value = g.permute(value, tuple(sorted(range(len(order)), key=order.__getitem__)))
    return g.view(value, shape)


def _written(source: int, w: Tensor, place: Tensor, seen: Tensor, scramble: Tensor):
    """Where a source went: (source, factor, slice of every axis of the result), or None if it is no slice."""
    if w.requires_grad:  # the factor has a derivative of its own
        return None
    factor = w.reshape(-1)[0].item()
    if factor == 0 or not bool((w == factor).all()):
        return None
    index = (place / factor).round().long() - 1
    if bool((index < 0).any()) or bool((index >= scramble.numel()).any()):
        return None
    if not torch.equal(scramble.reshape(-1)[index] * factor, seen):
        return None
    slices = regular(index, tuple(scramble.shape))
    return None if slices is None else (source, (factor, tuple(w.shape), slices))


def regular(index: Tensor, shape: tuple[int, ...]):
    """``index`` (flat positions in ``shape``) as slices: for each axis (source axis or None, start, length, step).

    None if the positions are not such a slice.
    """
    first = int(index.reshape(-1)[0])
    steps = {}
    for a, size in enumerate(index.shape):
        if size > 1:
            steps[a] = int(index.select(a, 1).reshape(-1)[0]) - first
    slices, unit, rest = [], prod(shape), first
    left = dict(steps)
    for size in shape:
        unit //= size
        start, rest = divmod(rest, unit)
        mine = [a for a, s in left.items() if s >= unit and s % unit == 0]
        if len(mine) > 1:
            return None
        if not mine:
            slices.append((None, start, 1, 1))
            continue
        a = mine[0]
        step = left.pop(a) // unit
        if start + (index.shape[a] - 1) * step >= size:
            return None
        slices.append((a, start, index.shape[a], step))
    if left:
        return None
    # the slices must give exactly these positions
    built = torch.zeros_like(index)
    unit = prod(shape)
    for size, (a, start, length, step) in zip(shape, slices, strict=True):
        unit //= size
        if a is None:
            built += start * unit
        else:
            along = (start + step * torch.arange(length, device=index.device)) * unit
            built += along.view(-1, *[1] * (index.dim() - a - 1))
    return slices if torch.equal(built, index) else None


def _emit(g, source: int, how) -> int:
    if len(how) == 2:
        weight, keep = how
        return g.mask(source, weight, lambda: keep)
    factor, piece, slices = how
    value = g.scale(g.expand(source, piece), factor)
    order = [a for a, *_ in slices if a is not None]
    order += [a for a in range(len(piece)) if a not in order]  # axes of size 1 that went nowhere
    value = g.permute(value, tuple(order))
    value = g.view(value, tuple(length for _, _, length, _ in slices))
    for axis, (size, (_, start, length, step)) in enumerate(zip(g.shape, slices, strict=True)):
        if length != size:
            old = g.values[value].shape
            new = (*old[:axis], size, *old[axis + 1 :])
            value = g.single(value, Place(axis, start, length, step, size), new)
    return value
