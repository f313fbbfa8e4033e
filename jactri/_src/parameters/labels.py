"""Products of tensors whose axes carry labels: two at a time, in an order chosen by size.

What ``torch.einsum`` does, with the products going where `backends` sends them, results written to the caller's
memory, and labels that occur in one operand twice (a diagonal).
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from ..base import backends
from ..device.batching import bmm

Labels = tuple[int, ...]
Operand = tuple[Tensor, Labels]


def settled(t: Tensor, labels: Labels, keep) -> Operand:
    """The diagonal along labels that occur twice, summed over those that are not in ``keep``."""
    if len(set(labels)) < len(labels):
        names = list(labels)
        for label in set(labels):
            while names.count(label) > 1:
                i = names.index(label)
                j = names.index(label, i + 1)
                t = t.diagonal(0, i, j)
                names = [n for k, n in enumerate(names) if k not in (i, j)] + [label]
        labels = tuple(names)
    gone = [i for i, label in enumerate(labels) if label not in keep]
    if gone:
        t = t.sum(gone)
        labels = tuple([label for label in labels if label in keep])
    return t, labels


def aligned(t: Tensor, labels: Labels, out: Labels) -> Tensor:
    """The same with its axes in the order of ``out``, of size 1 where it has no such label."""
    order = [labels.index(label) for label in out if label in labels]
    if order != list(range(len(order))):
        t = t.permute(order)
    if len(order) < len(out):
        for i, label in enumerate(out):
            if label not in labels:
                t = t.unsqueeze(i)
    return t


def _broadcast(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """The shape of their product, of as many axes as both have."""
    return tuple([m if n == 1 else n for m, n in zip(a.shape, b.shape, strict=True)])


def contract(
    x: Tensor,
    xl: Labels,
    y: Tensor,
    yl: Labels,
    out: Labels,
    dest: Tensor | None = None,
    own=(False, False),
) -> Tensor:
    """The product of two tensors, summed over the labels that are not in ``out``.

    Axes of ``out`` that neither has come with size 1. ``dest``, which has the axes of ``out``, is written to.
    ``own``: which of the two may be overwritten.
    """
    x, xl = settled(x, xl, {*yl, *out})
    y, yl = settled(y, yl, {*xl, *out})
    if x.dtype != y.dtype:
        wide = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(wide), y.to(wide)
    inner = [label for label in xl if label in yl and label not in out]
    if not inner:
        a, b = aligned(x, xl, out), aligned(y, yl, out)
        if dest is None:
            shape = _broadcast(a, b)
            for mine, t, other in ((own[0], a, b), (own[1], b, a)):
                if mine and t.shape == shape and not torch.is_grad_enabled():
                    return t.mul_(other)
            return a * b
        plain = a.dtype == dest.dtype and not torch.is_grad_enabled()
        if plain and _broadcast(a, b) == dest.shape:
            return torch.mul(a, b, out=dest)
        return dest.copy_(a * b)
    both = [label for label in out if label in xl and label in yl]
    left = [label for label in out if label in xl and label not in yl]
    right = [label for label in out if label in yl and label not in xl]
    sizes = dict(zip((*xl, *yl), (*x.shape, *y.shape), strict=True))
    b, m, k, n = (prod([sizes[s] for s in group]) for group in (both, left, inner, right))
    p = x.permute([xl.index(s) for s in (*both, *left, *inner)]).reshape(b, m, k)
    q = y.permute([yl.index(s) for s in (*both, *right, *inner)]).reshape(b, n, k)
    order = (*both, *left, *right)
    if dest is not None and not torch.is_grad_enabled() and p.dtype == dest.dtype:
        target = _matrices(dest, out, order, (b, m, n))
        if target is not None:
            bmm(p, q.mT, target)
            return dest
    made = bmm(p, q.mT) if both else backends.product(p[0], q[0], True)
    made = aligned(made.view([sizes[s] for s in order]), order, out)
    return made if dest is None else dest.copy_(made)


def _matrices(dest: Tensor, out: Labels, order: Labels, shape) -> Tensor | None:
    """The memory of a result as a batch of matrices, or None where its strides do not allow that."""
    if len(order) != len(out):
        return None
    try:
        target = dest.permute([out.index(s) for s in order]).view(shape)
    except RuntimeError:
        return None
    return target if 1 in target.stride()[1:] else None


@lru_cache(maxsize=1024)
def order(operands: tuple[Labels, ...], sizes: tuple[tuple[int, int], ...], out: Labels):
    """Which operands to multiply, pair by pair, the smallest result first: ((i, j, labels), ...), and the flops."""
    size = dict(sizes)
    place = {label: i for i, label in enumerate(out)}
    present = [frozenset(labels) for labels in operands]
    steps, flops = [], 0.0
    while len(present) > 1:
        best = None
        for i in range(len(present)):
            for j in range(i + 1, len(present)):
                others = set(out).union(*(p for k, p in enumerate(present) if k not in (i, j)))
                both = present[i] | present[j]
                kept = both & others
                cost = prod([size[s] for s in kept]), prod([size[s] for s in both])
                if best is None or cost < best[0]:
                    best = cost, i, j, kept
        (_, work), i, j, kept = best
        # in the order of the result: its memory is then gone through in order
        steps.append((i, j, tuple(sorted(kept, key=lambda s: (place.get(s, len(out)), s)))))
        flops += 2.0 * work
        present = [p for k, p in enumerate(present) if k not in (i, j)] + [kept]
    if not steps:
        flops = float(prod([size[s] for s in present[0]]))
    return tuple(steps), flops


def sizes_of(operands: list[Operand]) -> tuple[tuple[int, int], ...]:
    found = {}
    for t, labels in operands:
        found.update(zip(labels, t.shape, strict=True))
    return tuple(sorted(found.items()))


def flops(operands: list[Operand], out: Labels) -> float:
    """What `multiply` will take."""
    return order(tuple([labels for _, labels in operands]), sizes_of(operands), out)[1]


def multiply(operands: list[Operand], out: Labels, dest: Tensor | None = None) -> Tensor:
    """The product of all operands, its axes those of ``out`` (of size 1 where no operand has the label)."""
    if len(operands) == 1:
        t, labels = settled(*operands[0], out)
        t = aligned(t, labels, out)
        return t if dest is None else dest.copy_(t)
    steps, _ = order(tuple([labels for _, labels in operands]), sizes_of(operands), out)
    operands = list(operands)
    made_here = [False] * len(operands)
    for number, (i, j, kept) in enumerate(steps):
        (x, xl), (y, yl) = operands[i], operands[j]
        own = made_here[i], made_here[j]
        if number == len(steps) - 1:
            return contract(x, xl, y, yl, out, dest, own)
        made = contract(x, xl, y, yl, kept, None, own), kept
        operands = [o for k, o in enumerate(operands) if k not in (i, j)] + [made]
        made_here = [m for k, m in enumerate(made_here) if k not in (i, j)] + [True]
    raise AssertionError("no operands")
