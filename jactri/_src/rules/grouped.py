"""Products of matrices in groups, each with a matrix of its own: experts (``torch.nn.functional.grouped_mm``)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..maps.functional import Functional
from ..maps.once import Once
from . import rule
from .linear import product

Ends = list[tuple[int, int]]
"""Where every group begins and ends, in the axis that the groups share."""


def rows(a: Tensor, b: Tensor, ends: Ends) -> Tensor:
    """``(T, K) @ (E, K, N)``: the rows of a group by its matrix, zeros behind the last group."""
    made = [a[..., i:j, :] @ b[..., e, :, :] for e, (i, j) in enumerate(ends)]
    return _filled(torch.cat(made, -2), -2, a.shape[-2])


def inner(a: Tensor, b: Tensor, ends: Ends) -> Tensor:
    """``(M, K) @ (K, N)``, summed over each group alone: ``(E, M, N)``."""
    return torch.stack([a[..., i:j] @ b[..., i:j, :] for i, j in ends], -3)


def columns(a: Tensor, b: Tensor, ends: Ends) -> Tensor:
    """``(E, M, K) @ (K, N)``: the columns of a group by its matrix."""
    made = [a[..., e, :, :] @ b[..., i:j] for e, (i, j) in enumerate(ends)]
    return _filled(torch.cat(made, -1), -1, b.shape[-1])


def _filled(made: Tensor, axis: int, size: int) -> Tensor:
    shape = list(made.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([made, made.new_zeros(shape)], axis) if shape[axis] else made


# by the axes of both operands: the product, its transposes in each, and the axis of each that it keeps
FORMS = {
    (2, 3): (rows, lambda c, b, e: rows(c, b.mT, e), lambda c, a, e: inner(a.mT, c, e), ((0, 0),), ((2, 1),)),
    (2, 2): (inner, lambda c, b, e: columns(c, b.mT, e), lambda c, a, e: rows(a.mT, c, e), ((0, 1),), ((1, 2),)),
    (3, 2): (columns, lambda c, b, e: inner(c, b.mT, e), lambda c, a, e: columns(a.mT, c, e), ((1, 0),), ((1, 1),)),
}  # fmt: skip


@rule("GroupedMm")
def grouped_mm(g):
    a, b = g.src[:2]
    offsets = g.saved("offs")
    if offsets is None:
        return g.plus(product(g, a, b, "self", "mat2", g.shape))

    def groups() -> Ends:
        stops = offsets.tolist()
        return list(zip([0, *stops[:-1]], stops, strict=True))

    # which rows go to whom changes from call to call, and no plan depends on it
    ends = Once(groups)
    sizes = tuple(g.saved(name) for name in ("self_sym_sizes", "mat2_sym_sizes"))
    forward, to_a, to_b, kept_a, kept_b = FORMS[len(sizes[0]), len(sizes[1])]
    terms = []
    if a is not None:
        y = g.tensor("mat2")
        work = 2.0 * y.shape[-2], 2.0 * y.shape[-1]
        edge = Functional(
            "grouped product",
            lambda t: forward(t, y, ends()),
            lambda c: to_a(c, y, ends()),
            kept_a,
            work,
        )
        terms.append(g.single(a, edge, g.shape))
    if b is not None:
        x = g.tensor("self")
        work = 2.0 * x.shape[-1], 2.0 * x.shape[-2]
        edge = Functional(
            "grouped product",
            lambda t: forward(x, t, ends()),
            lambda c: to_b(c, x, ends()),
            kept_b,
            work,
        )
        terms.append(g.single(b, edge, g.shape))
    return g.plus(terms)
