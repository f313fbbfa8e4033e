"""Products of tensors whose dims have letters (see `letters`): two at a time, in an order chosen by size.

What ``torch.einsum`` does, with the products going where `backends` and `batching` send them, results written to the
caller's memory, and letters that one operand has twice (a diagonal).
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..base import backends
from ..base.tracing import may_write
from ..device.batching import bmm
from .letters import Letter, Letters, groups, order

Lettered = tuple[Tensor, Letters]


def diagonals(t: Tensor, letters) -> Lettered:
    """The part of a tensor where the dims of a letter that it has several times agree, as a view; each letter once."""
    names = list(letters)
    for letter in dict.fromkeys(letters):
        while names.count(letter) > 1:
            i = names.index(letter)
            j = names.index(letter, i + 1)
            t = t.diagonal(0, i, j)
            del names[j], names[i]
            names.append(letter)
    return t, tuple(names)


def once(t: Tensor, letters, those=None) -> Lettered:
    """A tensor without the dims along which its entries are all alike (expanded); only ``those`` letters, if given."""
    letters = tuple(letters)
    if 0 not in t.stride():
        return t, letters
    for i in range(len(letters) - 1, -1, -1):
        if t.stride(i) == 0 and t.shape[i] > 1 and (those is None or letters[i] in those):
            t, letters = t.select(i, 0), letters[:i] + letters[i + 1 :]
    return t, letters


def has_own_memory(t: Tensor) -> bool:
    """Whether each entry has memory of its own."""
    return all(s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1)


def cut(t: Tensor, letters, spans: dict[Letter, tuple[int, int]]) -> Tensor:
    """The ranges (start, length) of letters, where a tensor has them and has more than them."""
    for letter, (start, length) in spans.items():
        for i, mine in enumerate(letters):
            if mine == letter and t.shape[i] != length:
                t = t.narrow(i, start, length)
    return t


def settled(t: Tensor, letters: Letters, keep) -> Lettered:
    """The diagonal along letters that occur twice, summed over those that are not in ``keep``."""
    if len(set(letters)) < len(letters):
        t, letters = diagonals(t, letters)
    gone = [i for i, letter in enumerate(letters) if letter not in keep]
    if gone:
        t = t.sum(gone)
        letters = tuple([letter for letter in letters if letter in keep])
    return t, letters


def spread(t: Tensor, letters, out) -> Tensor:
    """The same with its dims in the order of ``out``, of size 1 where it has no such letter."""
    turn = [letters.index(letter) for letter in out if letter in letters]
    if turn != list(range(len(turn))):
        t = t.permute(turn)
    if len(turn) < len(out):
        for i, letter in enumerate(out):
            if letter not in letters:
                t = t.unsqueeze(i)
    return t


def _broadcast(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """The shape of their product, of as many dims as both have."""
    return tuple([m if n == 1 else n for m, n in zip(a.shape, b.shape, strict=True)])


def contract(
    x: Tensor,
    xl: Letters,
    y: Tensor,
    yl: Letters,
    out: Letters,
    dest: Tensor | None = None,
    own=(False, False),
) -> Tensor:
    """The product of two tensors, summed over the letters that are not in ``out``.

    Dims of ``out`` that neither has come with size 1. ``dest``, which has the dims of ``out``, is written to.
    ``own``: which of the two may be overwritten.
    """
    x, xl = settled(x, xl, {*yl, *out})
    y, yl = settled(y, yl, {*xl, *out})
    if x.dtype != y.dtype:
        wide = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(wide), y.to(wide)
    batch, rows, inner, columns = groups(xl, yl, out)
    if not inner:
        return _scaled(spread(x, xl, out), spread(y, yl, out), dest, own)
    many = (batch,) if batch else ()
    a, b = _matrices(x, xl, *many, rows, inner), _matrices(y, yl, *many, inner, columns)
    found = (*batch, *rows, *columns)
    if dest is not None and not torch.is_grad_enabled() and a.dtype == dest.dtype:
        one, two = (a, b) if batch else (a.unsqueeze(0), b.unsqueeze(0))
        target = _as_matrices(dest, out, found, (*one.shape[:2], two.shape[2]))
        if target is not None:
            bmm(one, two, target)
            return dest
    if not (rows or columns):
        made = (a.squeeze(-2) * b.squeeze(-1)).sum(-1)
    else:
        made = bmm(a, b) if batch else backends.product(a, b, False)
    if any(len(part) != 1 for part in (*many, rows, columns)):
        sizes = dict(zip((*xl, *yl), (*x.shape, *y.shape), strict=True))
        made = made.view([sizes[s] for s in found])
    if found != out:
        made = spread(made, found, out)
    return made if dest is None else dest.copy_(made)


def _scaled(a: Tensor, b: Tensor, dest: Tensor | None, own) -> Tensor:
    """The product entry by entry."""
    shape = _broadcast(a, b)
    if dest is not None:
        if a.dtype == dest.dtype and shape == dest.shape and not torch.is_grad_enabled():
            return torch.mul(a, b, out=dest)
        return dest.copy_(a * b)
    for mine, t, other in ((own[0], a, b), (own[1], b, a)):
        if mine and t.shape == shape and may_write():
            return t.mul_(other)
    return a * b


def _matrices(t: Tensor, letters, *parts: Letters) -> Tensor:
    """A tensor with one dim for each group of its letters."""
    turn = [letters.index(s) for part in parts for s in part]
    if turn != list(range(len(turn))):
        t = t.permute(turn)
    if len(turn) == len(parts) and all(parts):
        return t
    sizes, at = [], 0
    for part in parts:
        sizes.append(prod(t.shape[at : at + len(part)]))
        at += len(part)
    return t.reshape(sizes)


def _as_matrices(dest: Tensor, out: Letters, found: Letters, shape) -> Tensor | None:
    """The memory of a result as a batch of matrices, or None where its strides do not allow that."""
    if len(found) != len(out):
        return None
    try:
        target = dest.permute([out.index(s) for s in found]).view(shape)
    except RuntimeError:
        return None
    return target if 1 in target.stride()[1:] else None


def _sizes(operands: list[Lettered]) -> tuple[tuple[Letter, int], ...]:
    found: dict[Letter, int] = {}
    for t, letters in operands:
        found.update(zip(letters, t.shape, strict=True))
    return tuple(sorted(found.items()))


def flops(operands: list[Lettered], out: Letters) -> float:
    """What `multiply` will take."""
    return order(tuple([letters for _, letters in operands]), _sizes(operands), out)[1]


def multiply(operands: list[Lettered], out: Letters, dest: Tensor | None = None) -> Tensor:
    """The product of all operands, its dims those of ``out`` (of size 1 where no operand has the letter)."""
    if len(operands) == 1:
        t, letters = settled(*operands[0], out)
        t = spread(t, letters, out)
        return t if dest is None else dest.copy_(t)
    if len(operands) == 2:
        return contract(*operands[0], *operands[1], out, dest)
    steps, _ = order(tuple([letters for _, letters in operands]), _sizes(operands), out)
    operands = list(operands)
    made_here = [False] * len(operands)
    for number, (i, j, left) in enumerate(steps):
        (x, xl), (y, yl) = operands[i], operands[j]
        own = made_here[i], made_here[j]
        if number == len(steps) - 1:
            return contract(x, xl, y, yl, out, dest, own)
        made = contract(x, xl, y, yl, left, None, own), left
        operands = [o for k, o in enumerate(operands) if k not in (i, j)] + [made]
        made_here = [m for k, m in enumerate(made_here) if k not in (i, j)] + [True]
    raise AssertionError("no operands")
