"""The product of two partial Jacobians that meet at a cut (see `mixed`), by batched matrix multiplication."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..device.batching import bmm
from ..maps.layout import Layout, Selection
from ..plan.mixed import Product


def multiply(
    how: Product,
    layout: Layout,
    first: Tensor,
    second: Tensor,
    sel: Selection,
    out: Tensor | None = None,
) -> Tensor:
    """The block ``(K, *value)`` of the result: ``second`` times ``first``, both as blocks ``(K, *value)``.

    Blocks of two dtypes are multiplied in the wider one, those of two devices on that of ``second``.

    ``sel`` restricts the result's seed factors. ``out``: where to write it if autograd does not watch; returned if
    it was written. Costs ``2 * prod(sizes)`` flops.
    """
    sizes = list(how.sizes)
    if first.dtype != second.dtype or first.device != second.device:
        dtype = torch.promote_types(first.dtype, second.dtype)
        first, second = (t.to(device=second.device, dtype=dtype) for t in (first, second))
    a, b = (
        t.reshape([sizes[c] for c in letters])
        for t, letters in ((first, how.first), (second, how.second))
    )
    for factor, (start, length) in sel.items():
        letter = how.seeds[factor]
        sizes[letter] = length
        a, b = (
            t.narrow(letters.index(letter), start, length) if letter in letters else t
            for t, letters in ((a, how.first), (b, how.second))
        )
    # a block of weights that all samples share is taken once
    a, in_a = _once(a, how.first, how)
    b, in_b = _once(b, how.second, how)
    both = [c for c in how.out if c in in_a and c in in_b]
    left = [c for c in how.out if c not in in_a and c in in_b]
    right = [c for c in how.out if c in in_a and c not in in_b]
    alike = [c for c in how.out if c not in in_a and c not in in_b]
    inner = [c for c in how.first if c not in how.out]
    a = a.permute([in_a.index(c) for c in (*both, *inner, *right)])
    b = b.permute([in_b.index(c) for c in (*both, *left, *inner)])

    def many(letters) -> int:
        return prod(sizes[c] for c in letters)

    m, k, n = many(left), many(inner), many(right)
    order = [*both, *left, *right]
    a, b = a.reshape(-1, k, n), b.reshape(-1, m, k)
    target = None
    if _fits(out, a) and not alike and not torch.is_grad_enabled():
        target = _as_matrices(out, how, sizes, order, (many(both), m, n))
    if target is not None:
        bmm(b, a, target)
        return out
    made = (torch.mm(b[0], a[0]) if not both else bmm(b, a)).reshape([sizes[c] for c in order])
    for _ in alike:
        made = made.unsqueeze(-1)
    made = made.expand([*made.shape[: len(order)], *(sizes[c] for c in alike)])
    order += alike
    made = made.permute([order.index(c) for c in how.out])
    return made.reshape(layout.columns(sel), *layout.shape)


def _once(t: Tensor, letters, how: Product) -> tuple[Tensor, list[int]]:
    """A block without the dims of the result along which it is expanded, and its letters."""
    kept = list(letters)
    for i in range(len(letters) - 1, -1, -1):
        if letters[i] in how.out and t.stride(i) == 0 and t.shape[i] > 1:
            t = t.select(i, 0)
            del kept[i]
    return t, kept


def _fits(out: Tensor | None, like: Tensor) -> bool:
    return out is not None and out.device == like.device and out.dtype == like.dtype


def _as_matrices(out: Tensor, how: Product, sizes, order, shape) -> Tensor | None:
    """The caller's block as a batch of matrices, or None where its strides do not allow that."""
    try:
        split = out.view([sizes[c] for c in how.out])
        target = split.permute([how.out.index(c) for c in order]).view(shape)
    except RuntimeError:
        return None
    return target if 1 in target.stride()[1:] else None
