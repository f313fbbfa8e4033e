"""Writes into a part of a tensor: ``out[:, 0] = f(x)``.

Autograd records such a write as a CopySlices node, which does not show where it wrote. The node itself tells:
applied to the numbers 1, 2, 3, ... it returns, for every entry of the source, the number of the place that it went
to. If those places are a regular slice of the result, the write is a `Place`, and else a `Put`; other numbers must
confirm it, exactly. A view by strides is asked in the same way where each of its entries comes from.

A matrix that is written entry by entry is a chain of such nodes, and what one returns for what was there before is what
the one before it is asked with: so the numbers go through all of them once, and sources of one shape are put where they
went as one stack. These numbers begin far from 0, where neither a multiple nor a sum of them is one of them.
"""

from __future__ import annotations

from functools import partial
from math import nan, prod

import torch
from torch import Tensor

from ..base.backends import captured
from ..base.constants import fixed
from ..base.tracing import aside, tracing, valued
from ..maps.mask import Mask
from . import rule
from .index import pick, put
from .shape import piece, place, stacked

_EXACT = {torch.float32: 1 << 24, torch.float64: 1 << 53}
"""Integers below these bounds are exact."""

_FACTORS, _SCRAMBLED = (0x9E3779B1, 0x2C1B3C6D), 1 << 22
"""Of a hash, odd, by which no product overflows, and what its numbers are below."""


@rule("torch::autograd::CopySlices")
def copy_slices(g):
    shape, meta, node = g.shape, g.meta[0], g.node
    n, dtype = prod(shape), meta.dtype.to_real()
    if n >= _EXACT.get(dtype, 0) or n == 0 or not valued() or captured(meta.device):
        return None
    if not g.joins or node in g.writes.apart or tracing():
        return _alone(g, shape, meta, dtype)
    writes = g.writes.until(node, g.src)
    if g.writes.wait(writes):
        return next(s for s in g.src if s is not None)  # nobody but the next write looks at it
    value = _together(g, writes)
    if value is None:
        g.writes.apart.update(node for node, _ in writes)
        value = writes[0][1][0]
        for node, (_, *src) in writes:
            (value,) = g.visit(node, [value, *src])
    return value


def _together(g, writes) -> int | None:
    """Writes of values as they are, one after another: what was there before, masked, and stacks of what was written.

    None if they are not seen to be that.
    """
    shape, meta, base = g.shape, g.meta[0], writes[0][1][0]
    sources = [s for _, (_, *src) in writes for s in src if s is not None]
    kinds = {(g.values[s].dtype, g.values[s].device) for s in sources}
    if kinds != {(meta.dtype, meta.device)}:
        return None
    real = meta.dtype.to_real()
    number, scramble = _numbers(shape, torch.empty((), dtype=real, device=meta.device))
    first = _EXACT[real] - prod(shape)
    number = number + (first - 1)
    # the two parts of complex numbers ask at once
    asked = [torch.complex(number, scramble)] if meta.dtype.is_complex else [number, scramble]
    told = [_through(g, writes, asked[0])]
    left, places = told[0]
    if any(t is None or t.requires_grad or t.numel() == 0 for t in places):
        return None
    if base is not None and (left is None or left.requires_grad):
        return None
    keep, fits = None, True
    with torch.no_grad():
        told += [_through(g, writes, c) for c in asked[1:]]
        if base is not None:  # selected, not multiplied by 0
            keep = _through(g, writes, torch.full_like(asked[0], nan))[0].isnan()
        index = (torch.cat([t.reshape(-1) for t in places]).real - first).long()
        index.clamp_(0, prod(shape) - 1)
        for c, (rest, taken) in zip(asked, told, strict=True):
            fits = fits & (c.reshape(-1)[index] == torch.cat([t.reshape(-1) for t in taken])).all()
            if keep is not None:
                fits = fits & (torch.where(keep, c, 0) == rest).all()
        if not bool(fits):
            return None
        terms = [] if keep is None else [_left(g, base, keep.to(real))]
        alike: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        for s, t, at in zip(sources, places, index.split([t.numel() for t in places]), strict=True):
            alike.setdefault(tuple(t.shape), []).append((s, at))
        terms += [_stacked(g, sizes, parts) for sizes, parts in alike.items()]
    return g.plus(terms)


def _through(g, writes, c: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
    """A cotangent through writes, the last one first: what is left of it in the end, and what each source gets."""
    found: list[Tensor | None] = []
    for node, (_, *src) in reversed(writes):
        out = g.recomputed.calling(node)(c)
        c, *rest = out if isinstance(out, tuple) else (out,)
        found += [t for t, s in zip(rest[::-1], src[::-1], strict=True) if s is not None]
    return c, found[::-1]


def _stacked(g, sizes: tuple[int, ...], parts: list[tuple[int, Tensor]]) -> int:
    """Sources of one size, each in its (flat) places: in the order of these, which may make a slice of them."""
    ids, index = [g.expand(s, sizes) for s, _ in parts], torch.stack([at for _, at in parts])
    if len(parts) == 1:
        value, index = ids[0], index.view(sizes)
    else:
        order = index[:, 0].argsort()
        value = stacked(g, [ids[k] for k in order.tolist()], (len(ids), *sizes), 0)
        index = index[order].view(-1, *sizes)
    return _put(g, value, index, regular(index, g.shape))


def _alone(g, shape, meta, dtype) -> int | None:
    """One write, of what may be scaled, over what may be."""
    kinds = {meta.dtype, *(g.values[s].dtype for s in g.src if s is not None)}
    if any(kind.is_complex for kind in kinds) and (len(kinds) > 1 or not _of_parts(g)):
        return None
    traced = tracing()
    ones = torch.ones(shape, dtype=dtype, device=meta.device)
    weights = _pulled(g, ones)
    with torch.no_grad():
        poisoned = _pulled(g, ones * nan)[0]
        keep = None if poisoned is None else poisoned.isnan().to(dtype)
    with torch.no_grad(), aside():
        number, scramble = _numbers(shape, ones)
        places, confirm = (_pulled(g, c) for c in (number, scramble))
        factors = _pulled(g, torch.ones_like(number)) if traced else weights
        terms = []
        for edge, s in enumerate(g.src):
            if s is None:
                continue
            w, factor, place, seen = weights[edge], factors[edge], places[edge], confirm[edge]
            if w is None:
                continue
            if edge == 0:  # what was there before, scaled where it was not replaced
                if w.shape != shape or not torch.equal(seen, factor * scramble):
                    return None
                terms.append(partial(_left, g, s, w, lambda: keep))
                continue
            found = _where(factor, place, seen, scramble)
            if found is None:
                return None
            # where it went is the same for other values, the factor need not be
            alike = not traced and not w.requires_grad and bool((w == w.reshape(-1)[0]).all())
            scale = w.reshape(-1)[0].item() if alike else w
            terms.append(partial(_written, g, s, tuple(w.shape), scale, *found))
    return g.plus([emit() for emit in terms])


def _left(g, base: int, weight: Tensor, keep=None) -> int:
    """What is left of a value that was written to."""
    return g.single(base, Mask(weight, keep=keep, written=True))


def _pulled(g, c: Tensor) -> tuple[Tensor | None, ...]:
    """The node applied to a cotangent: the gradient of each edge. Of complex numbers, the real parts of both."""
    return tuple(
        [t.real if t is not None and t.is_complex() else t for t in _called(g, c.to(g.dtype))]
    )


def _called(g, c: Tensor) -> tuple[Tensor | None, ...]:
    g.check_memory()
    out = g.call(c)
    return out if isinstance(out, tuple) else (out,)


def _of_parts(g) -> bool:
    """Whether the node does to the imaginary parts of complex numbers what it does to the real ones."""
    with torch.no_grad(), aside():
        _, c = _numbers(g.shape, torch.empty((), dtype=g.dtype.to_real(), device=g.device))
        for t, turned in zip(_called(g, c + 0j), _called(g, 1j * c), strict=True):
            if t is None or not t.is_complex():
                continue
            if bool(t.imag.any()) or not torch.equal(1j * t, turned):
                return False
    return True


def _numbers(shape, meta) -> tuple[Tensor, Tensor]:
    """1, 2, 3, ..., and a fixed scramble of them: what is confirmed must not depend on the caller's random state.

    The second is a hash: there are filters that return every polynomial as it is, that of a third difference, say.
    """

    def make() -> tuple[Tensor, ...]:
        number = torch.arange(1, prod(shape) + 1, device=meta.device)
        mixed = number
        for factor in _FACTORS:
            mixed = (mixed * factor).bitwise_and_((1 << 32) - 1)
            mixed = mixed ^ (mixed >> 15)
        return number.to(meta.dtype), (mixed % _SCRAMBLED + 1).to(meta.dtype)

    number, mixed = fixed(("numbers", prod(shape), meta.dtype, str(meta.device)), make)
    return number.view(shape), mixed.view(shape)


@rule("AsStrided")
def as_strided(g):
    """A view by strides: a slice, or any entries, some of them twice."""
    (s,) = g.src
    shape, meta = g.shape, g.meta[0]
    old = g.values[s].shape
    if max(prod(shape), prod(old)) >= _EXACT.get(meta.dtype.to_real(), 0) or prod(shape) == 0:
        return None
    if captured(meta.device):
        return None
    if meta.dtype.is_complex and not _of_parts(g):
        return None
    with aside():
        found = _read(g, old)
    if found is None or (found[1] is None and not valued()):
        return None
    index, slices = found
    if slices is None:
        return pick(g, s, index)
    value = s
    for axis, (_, start, length, step) in enumerate(slices):
        value = piece(g, value, axis, start, length, step)
    order = [a for a, *_ in slices if a is not None]
    if order != sorted(order):
        value = g.view(value, tuple(shape[a] for a in order))
        value = g.permute(value, tuple(sorted(range(len(order)), key=order.__getitem__)))
    return g.view(value, shape)


def _read(g, old: tuple[int, ...]):
    """Which entries of a value of shape ``old`` a view has: (flat places, these as `regular` slices or None)."""
    shape, meta = g.shape, g.meta[0]
    with torch.enable_grad():  # the transpose of the transpose says where an entry comes from
        u = torch.zeros(shape, dtype=meta.dtype, device=meta.device, requires_grad=True)
        (back,) = _pulled(g, u)

    def read(t):
        (found,) = torch.autograd.grad(back, u, t, retain_graph=True)
        return found.real if found.is_complex() else found

    with torch.no_grad():
        like = torch.empty((), dtype=meta.dtype.to_real(), device=meta.device)
        number, scramble = _numbers(old, like)
        index = read(number).long() - 1
        if bool((index < 0).any()):  # outside of the value, in its memory
            return None
        _, cotangent = _numbers(shape, like)
        cotangent = cotangent.remainder(4093)  # of which sums are exact, too
        spread = torch.zeros_like(scramble).reshape(-1)
        spread.index_add_(0, index.reshape(-1), cotangent.reshape(-1))
        if not (
            torch.equal(read(scramble), scramble.reshape(-1)[index])
            and torch.equal(_pulled(g, cotangent)[0], spread.view(old))
        ):
            return None
        return index, regular(index, old)


def _where(factor: Tensor, place: Tensor, seen: Tensor, scramble: Tensor):
    """Where a source went that was scaled by ``factor``: (flat places, these as `regular` slices or None).

    None if it is not seen to have gone there.
    """
    if not bool((factor != 0).all()):
        return None
    index = (place / factor).round().long() - 1
    if bool((index < 0).any()) or bool((index >= scramble.numel()).any()):
        return None
    if not torch.equal(scramble.reshape(-1)[index] * factor, seen):
        return None
    return index, regular(index, tuple(scramble.shape))


def _written(g, source: int, sizes, factor, index: Tensor, slices) -> int:
    """A source where it went, scaled by a number or a tensor."""
    value = g.expand(source, sizes)
    value = g.diagonal(value, factor) if isinstance(factor, Tensor) else g.scale(value, factor)
    return _put(g, value, index, slices)


def _put(g, value: int, index: Tensor, slices) -> int:
    """A value in these places of the result: flat ones, and the same as `regular` slices or None."""
    if slices is None:
        return put(g, value, index)
    return _placed(g, value, tuple(index.shape), slices)


def regular(index: Tensor, shape: tuple[int, ...]):
    """``index`` (flat positions in ``shape``) as slices: for each axis (source axis or None, start, length, step).

    None if the positions are not such a slice.
    """
    first = int(index.reshape(-1)[0])
    steps = {}
    for a, size in enumerate(index.shape):
        if size > 1:
            steps[a] = int(index.select(a, 1).reshape(-1)[0]) - first
    slices: list[tuple[int | None, int, int, int]] = []
    unit, rest = prod(shape), first
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


def _placed(g, value: int, sizes, slices) -> int:
    """A value of shape ``sizes`` in a slice of the result, zeros around it."""
    order = [a for a, *_ in slices if a is not None]
    order += [a for a in range(len(sizes)) if a not in order]  # axes of size 1 that went nowhere
    value = g.permute(value, tuple(order))
    value = g.view(value, tuple(length for _, _, length, _ in slices))
    for axis, (size, (_, start, _, step)) in enumerate(zip(g.shape, slices, strict=True)):
        value = place(g, value, axis, start, size, step)
    return value
