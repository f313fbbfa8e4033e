"""Matrix products: a Linear layer is one matrix that all samples share; attention multiplies a matrix a sample."""

from __future__ import annotations

from ..linear_map import MatMul
from . import rule


def product(g, left, right, a, b, shape, scale=1):
    """``a @ b`` for 2-D or 3-D operands; ``left`` and ``right`` fetch the operands that autograd saved."""
    terms = []
    if a is not None:
        terms.append(g.single(a, MatMul(right(), "right"), shape))
    if b is not None:
        terms.append(g.single(b, MatMul(left(), "left"), shape))
    return [g.scale(t, scale) for t in terms]


@rule("Addmm", "Baddbmm")
def addmm(g):
    first, second = ("mat1", "mat2") if g.has("mat1") else ("batch1", "batch2")
    bias, a, b = g.src
    terms = product(
        g, lambda: g.tensor(first), lambda: g.tensor(second), a, b, g.shape, g.saved("alpha")
    )
    if bias is not None:
        terms.append(g.scale(bias, g.saved("beta")))
    return g.plus(terms)


@rule("Mm", "Bmm")
def mm(g):
    a, b = g.src
    second = "mat2" 
    return g.plus(
        product(g, lambda: g.tensor("self"), lambda: g.tensor(second), a, b, g.shape)
    )
