"""Matrix products: a Linear layer is one matrix that all samples share; attention multiplies a matrix a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ..maps.contraction import MatMul
from ..maps.convolution import Conv, ConvWeight
from ..maps.curvature import Curves, Matrices
from ..maps.functional import Functional
from ..maps.linear_map import Cast, View, keep_all_but
from ..maps.low_rank import Softmax
from ..maps.maps import Batched
from ..maps.sparse_product import SparseMatMul
from ..maps.unmasked import Unmasked
from . import rule
from .elementwise import multiplied, only


def met(edges, factor: float = 1.0) -> Curves:
    """The curvature of products of two matrices that both depend on the input."""
    right = [(v, s) for v, s, e in edges if e.side == "right"]
    left = [(v, s) for v, s, e in edges if e.side == "left"]
    if not right or not left:
        return {}
    ((v, a),), ((w, b),) = right, left
    return {max(v, w): Matrices(a, b, factor)}


def matrices(r) -> Curves:
    return met(r.edges(MatMul))


def in_one_factor(r) -> Curves | None:
    """Products of several factors, where only one depends on the input."""
    factors = {"AddmvBackward0": (1, 2), "TrilinearBackward0": (0, 1, 2)}.get(r.name, (0, 1))
    known = only(r, MatMul, SparseMatMul, Conv, ConvWeight, Functional)
    return {} if known and sum(r.active(*factors)) <= 1 else None


def matmul(
    partner: Tensor, side: str = "right", unmasked: Unmasked | None = None
) -> MatMul | SparseMatMul:
    """Multiplication by a matrix, dense or sparse, on one side; or by a batch of them."""
    if partner.layout is torch.strided:
        return MatMul(partner, side, unmasked)
    return SparseMatMul(partner, side)


def _unmasked(g, v: int) -> Unmasked | None:
    """What a mask leaves of an operand, if that is a softmax."""
    last = g.values[v].shape[-2:]
    while len(g.values[v].sources) == 1 and g.values[v].shape[-2:] == last:
        ((v, edge),) = g.values[v].sources
        if isinstance(edge, Softmax):
            return edge.unmasked if g.values[v].shape[-2:] == last else None
        if edge.__class__ not in (View, Cast):
            return None
    return None


def product(g, a, b, left: str, right: str, shape) -> list[int]:
    """``a @ b`` for 2-D or 3-D operands; ``left`` and ``right`` name them among what autograd saved."""
    terms = []
    for s, other, name, side in ((a, b, right, "right"), (b, a, left, "left")):
        if s is not None:
            partner = g.tensor(name)
            dense = partner.layout is torch.strided
            if (
                other is None
                and dense
                and partner.dim() == 3
                and partner.stride(0) == 0 < len(partner)
            ):
                partner = partner[0]  # a weight that was expanded for all
            masked = other is not None and partner.dim() == 3
            edge = matmul(partner, side, _unmasked(g, other) if masked else None)
            if other is not None and edge.__class__ is SparseMatMul:
                g.unsupported("a sparse tensor that depends on the input")
            terms.append(g.single(s, edge, shape))
    return terms


def _accumulated(g, terms: list[int]) -> int:
    """``beta * bias + alpha * terms``."""
    alpha = g.saved("alpha")
    if alpha != 1:
        terms = [g.scale(t, alpha) for t in terms]
    if g.src[0] is not None:
        terms.append(g.scale(g.src[0], g.saved("beta")))
    return g.plus(terms)


@rule("Mm", "Bmm", curve=matrices)
def mm(g):
    a, b = g.src
    return g.plus(product(g, a, b, "self", "mat2", g.shape))


@rule("Addmm", "SparseAddmm", curve=matrices)
def addmm(g):
    _, a, b = g.src
    return _accumulated(g, product(g, a, b, "mat1", "mat2", g.shape))


@rule("Baddbmm", curve=matrices)
def baddbmm(g):
    _, a, b = g.src
    return _accumulated(g, product(g, a, b, "batch1", "batch2", g.shape))


@rule("Addbmm", curve=matrices)
def addbmm(g):
    """``sum_b batch1[b] @ batch2[b]``."""
    _, a, b = g.src
    if a is None and b is None:
        return _accumulated(g, [])
    shape = (g.values[b if a is None else a].shape[0], *g.shape)
    return _accumulated(g, [g.sum(t, (0,)) for t in product(g, a, b, "batch1", "batch2", shape)])


def _matrix_vector(g, matrix, vector, name_m: str, name_v: str) -> list[int]:
    """``matrix @ vector``, each as a product of matrices."""
    terms, (m,) = [], g.shape
    if matrix is not None:
        column = g.tensor(name_v).unsqueeze(-1)
        terms.append(g.view(g.single(matrix, matmul(column, "right"), (m, 1)), (m,)))
    if vector is not None:
        row = g.view(vector, (1, *g.values[vector].shape))
        terms.append(g.view(g.single(row, matmul(g.tensor(name_m).t(), "right"), (1, m)), (m,)))
    return terms


@rule("Mv", curve=in_one_factor)
def mv(g):
    return g.plus(_matrix_vector(g, *g.src, "self", "vec"))


@rule("Addmv", curve=in_one_factor)
def addmv(g):
    return _accumulated(g, _matrix_vector(g, *g.src[1:], "mat", "vec"))


@rule("Addr", curve=multiplied, regular=True)
def addr(g):
    """``vec1[:, None] * vec2[None, :]``."""
    terms, (m, n) = [], g.shape
    for s, shape, partner in ((g.src[1], (m, 1), "vec2"), (g.src[2], (1, n), "vec1")):
        if s is not None:
            other = g.tensor(partner)
            other = other if partner == "vec2" else other.unsqueeze(-1)
            terms.append(g.diagonal(g.expand(g.view(s, shape), (m, n)), other))
    return _accumulated(g, terms)


@rule("Dot", "Vdot", curve=multiplied)
def dot(g):
    second = "tensor" if g.name == "DotBackward0" else "other"
    terms = []
    for s, partner in zip(g.src, (second, "self"), strict=True):
        if s is not None:
            terms.append(g.sum(g.diagonal(s, g.tensor(partner)), (0,)))
    return g.plus(terms)


@rule("LinalgCross", curve=in_one_factor)
def cross(g):
    """``a x b``, linear in each; its transpose in ``a`` is ``c -> b x c``."""
    axis = g.axis("dim", len(g.shape))
    kept = keep_all_but((axis,), len(g.shape))
    terms = []
    for s, partner, sign in zip(g.src, ("other", "self"), (1, -1), strict=True):
        if s is None:
            continue
        p = g.tensor(partner)

        def push(t, p=p, sign=sign):
            return sign * t.cross(p.expand_as(t), dim=axis + 1)

        def pull(c, p=p, sign=sign):
            return -sign * c.cross(p.expand_as(c), dim=axis + 1)

        terms.append(g.single(g.match(s), Functional("cross", push, pull, kept)))
    return g.plus(terms)


@rule("Trilinear", curve=in_one_factor)
def bilinear(g):
    """``sum_ij x[n, i] w[o, i, j] z[n, j]``, as nn.Bilinear asks for it: a matrix for each of the three."""
    pattern = tuple(tuple(g.saved(name)) for name in ("expand1", "expand2", "expand3", "sumdim"))
    if pattern != ((1, 3), (0,), (1, 2), (2, 3)):
        return None
    x, w, z = g.src
    (n, o), terms = g.shape, []
    for s, formula, names in ((x, "oij,nj->nio", ("i2", "i3")), (z, "oij,ni->njo", ("i2", "i1"))):
        if s is not None:
            partners = [g.tensor(name) for name in names]
            edge = Batched(lambda f=formula, p=partners: torch.einsum(f, *p), "right")
            row = g.view(s, (n, 1, g.values[s].shape[1]))
            terms.append(g.view(g.single(row, edge, (n, 1, o)), (n, o)))
    if w is not None:
        pairs = (g.tensor("i1").unsqueeze(2) * g.tensor("i3").unsqueeze(1)).flatten(1)
        flat = g.view(w, (o, pairs.shape[1]))
        terms.append(g.permute(g.single(flat, matmul(pairs.t(), "right"), (o, n)), (1, 0)))
    return g.plus(terms)


@rule(
    "Coalesce", "SparseCompressedTensor", "SparseCooTensorWithDimsAndTensors", "SparseLogSoftmax", "SparseMask",
    "SparseSampledAddmm", "SparseSoftmax", "SparseSparseMatmul", "SparseSum", "ToDense", "ToSparse.0-1", "ToSparseBsc",
    "ToSparseBsr", "ToSparseCsc", "ToSparseCsr", "Values",
)  # fmt: skip
def sparse(g):
    g.unsupported("a sparse tensor that depends on the input")
