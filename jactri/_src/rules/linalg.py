"""Matrix equations, factorisations and determinants, batched over the leading axes.

With ``A X = B``: ``A dX = dB - dA X``, one solve with the factors that the forward pass made. The formulas of the
others are those of Giles, "An extended collection of matrix derivative results for forward and reverse mode AD" (2008),
and, for Cholesky's factor, Murray, "Differentiation of the Cholesky decomposition" (2016, arXiv:1602.07527).
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..maps.contraction import MatMul
from ..maps.curvature import Curves
from ..maps.equations import (
    CholeskyBend,
    CholeskyInverseBend,
    CholeskySolveBend,
    DeterminantBend,
    ExponentialBend,
    InverseBend,
    LogDeterminantBend,
    LuBend,
    LuSolveBend,
    SolveBend,
)
from ..maps.linear_map import Diagonal, Identity, Scale
from ..maps.solving import Exponential, Solve, by_cholesky, by_lu, of_lu, triangular
from . import batches, known, rule
from .elementwise import Partials, Zero

SWAP = (0, 2, 1)
"""The transpose of a batch of matrices."""


def _batch(g, s: int | None, batch: tuple[int, ...]) -> int | None:
    """A value of matrices ``(b, ., .)``, broadcast to the batch axes of the result."""
    if s is None:
        return None
    tail = g.values[s].shape[-2:]
    return g.view(g.expand(s, (*batch, *tail)), (prod(batch), *tail))


def _flat(t: Tensor, batch: tuple[int, ...], tail: int = 2) -> Tensor:
    """A saved tensor the same way."""
    last = tuple(t.shape[t.dim() - tail :])
    return t.expand(*batch, *last).reshape(prod(batch), *last)


def _less(g, b: int | None, terms: list[int], shape) -> int:
    """``b`` less the terms."""
    parts = [(g.scale(t, -1), Identity()) for t in terms]
    return g.add(parts if b is None else [(b, Identity()), *parts], shape)


def _times(g, s: int, matrix: Tensor, side: str = "right") -> int:
    """``s @ matrix``, or ``matrix @ s``."""
    b, rows, columns = g.values[s].shape
    shape = (b, rows, matrix.shape[-1]) if side == "right" else (b, matrix.shape[-2], columns)
    return g.single(s, MatMul(matrix, side), shape)


def _symmetric(g, s: int, factor: float = 1.0) -> int:
    """``factor * (s + s.mT)``."""
    return g.add([(s, Scale(factor)), (g.permute(s, SWAP), Scale(factor))], g.values[s].shape)


def _equation(g, a: int | None, b: int | None, x: Tensor, solve: Solve) -> int:
    """``A X = B``, all ``(b, ., .)``."""
    terms = [] if a is None else [_times(g, a, x)]
    return g.single(_less(g, b, terms, tuple(x.shape)), solve)


def equation_bend(r) -> Curves | None:
    solves, products = r.edges(Solve), r.edges(MatMul)
    if not solves:
        return None
    ((v, rhs, edge),) = solves
    return {v: SolveBend(products[0][1], rhs, edge)} if products else {}


@rule("LinalgSolveEx", curve=equation_bend, kept=batches)
def solve_ex(g):
    a, b = g.src
    matrix, x, left = g.tensor("A"), g.tensor("result"), g.saved("left")
    vector = x.dim() < matrix.dim()
    if vector:
        x = x.unsqueeze(-1)
        b = None if b is None else g.view(b, (*g.values[b].shape, 1))
    batch = tuple(x.shape[:-2])
    factors = (
        _flat(matrix, batch),
        _flat(g.tensor("LU"), batch),
        _flat(g.tensor("pivots"), batch, 1),
    )
    a, b, x = _batch(g, a, batch), _batch(g, b, batch), _flat(x, batch)
    if left:
        out = _equation(g, a, b, x, Solve(by_lu, *factors))
    else:  # A' X' = B'
        out = _transposed(g, a, b, x, Solve(_other_way(by_lu), *factors))
    return g.view(out, g.shape), *[None] * (len(g.meta) - 1)


def _other_way(solve):
    return lambda factors, b, transposed: solve(factors, b, not transposed)


def _transposed(g, a, b, x: Tensor, solve: Solve) -> int:
    """``X A = B`` as an equation of transposes."""
    a = None if a is None else g.permute(a, SWAP)
    b = None if b is None else g.permute(b, SWAP)
    return g.permute(_equation(g, a, b, x.mT, solve), SWAP)


def _triangle(g, s: int | None, upper: bool, unit: bool) -> int | None:
    """The entries of a triangular matrix that count."""
    if s is None:
        return None
    n, m = g.values[s].shape[-1], g.meta[0]

    def mask():
        ones = torch.ones(n, n, dtype=m.dtype, device=m.device)
        return ones.triu(int(unit)) if upper else ones.tril(-int(unit))

    return g.mask(s, mask)


@rule("LinalgSolveTriangular", curve=equation_bend, kept=batches)
def solve_triangular(g):
    a, b = g.src
    x, upper, unit = g.tensor("result"), g.saved("upper"), g.saved("unitriangular")
    batch = tuple(x.shape[:-2])
    solve = triangular(upper, unit)
    matrix = _flat(g.tensor("self"), batch)
    a = _triangle(g, _batch(g, a, batch), upper, unit)
    b, x = _batch(g, b, batch), _flat(x, batch)
    if g.saved("left"):
        out = _equation(g, a, b, x, Solve(solve, matrix))
    else:
        out = _transposed(g, a, b, x, Solve(_other_way(solve), matrix))
    return g.view(out, g.shape)


@rule("TriangularSolve", curve=equation_bend, kept=batches)
def triangular_solve(g):
    """The older form: B comes first, and A is returned as the second result."""
    b, a = g.src
    x, upper, unit = g.tensor("solution"), g.saved("upper"), g.saved("unitriangular")
    batch, turned = tuple(x.shape[:-2]), g.saved("transpose")
    matrix, solve = _flat(g.tensor("A"), batch), triangular(upper, unit)
    second = None if a is None else g.expand(a, tuple(g.meta[1].shape))
    a = _triangle(g, _batch(g, a, batch), upper, unit)
    if turned:
        a, solve = None if a is None else g.permute(a, SWAP), _other_way(solve)
    out = _equation(g, a, _batch(g, b, batch), _flat(x, batch), Solve(solve, matrix))
    return g.view(out, g.shape), second


def lu_factor_bend(r) -> Curves | None:
    if not r.edges(Solve):
        return None
    _, left, right = r.edges(MatMul)
    m = next(s for v, s, _ in r.edges(Diagonal) if v == left[1])
    return {max(left[0], right[0]) + 1: LuBend((m,), left[2].partner, right[2].partner)}


@rule("LinalgLuFactorEx", curve=lu_factor_bend, kept=batches)
def lu_factor_ex(g):
    """``A = P L U``: with ``M = L^-1 P' dA U^-1``, ``dL = L tril(M, -1)`` and ``dU = triu(M) U``, in one matrix."""
    (a,), packed = g.src, g.tensor("LU")
    batch, n = tuple(packed.shape[:-2]), packed.shape[-1]
    if packed.shape[-2] != n:
        return None
    swaps, low, up = torch.lu_unpack(_flat(packed, batch), _flat(g.tensor("pivots"), batch, 1))
    m = g.single(
        _times(g, _batch(g, a, batch), swaps.mT, "left"), Solve(triangular(False, True), low)
    )
    m = g.single(g.permute(m, SWAP), Solve(_other_way(triangular(True, False)), up))
    m = g.permute(m, SWAP)
    terms = (
        _times(g, _triangle(g, m, False, True), low, "left"),
        _times(g, _triangle(g, m, True, False), up),
    )
    out = g.add([(t, Identity()) for t in terms], g.values[m].shape)
    return g.view(out, g.shape), *[None] * (len(g.meta) - 1)


def lu_solve_bend(r) -> Curves | None:
    ((v, rhs, edge),), masked = r.edges(Solve), r.edges(Diagonal)
    if not masked:
        return {}
    packed, pivots = edge.factors
    swaps, low, up = torch.lu_unpack(packed, pivots)
    left = r.saved("left")
    x = r.tensor("result")
    x = (x if left else x.mT).reshape(r.values[v].shape)
    turned = r.saved("adjoint") == left
    return {v: LuSolveBend(masked[0][1], rhs, edge, turned, swaps, low, up, x)}


@rule("LinalgLuSolve", curve=lu_solve_bend, kept=batches)
def lu_solve(g):
    """``P L U X = B``, or with the transpose of ``P L U``."""
    f, b = g.src
    x, left = g.tensor("result"), g.saved("left")
    batch = tuple(x.shape[:-2])
    packed, pivots = _flat(g.tensor("LU"), batch), _flat(g.tensor("pivots"), batch, 1)
    f, b, x = _batch(g, f, batch), _batch(g, b, batch), _flat(x, batch)
    if not left:
        b, x = None if b is None else g.permute(b, SWAP), x.mT
    plain, terms = g.saved("adjoint") == (not left), []
    if f is not None:
        swaps, low, up = torch.lu_unpack(packed, pivots)
        dl, du = _triangle(g, f, False, True), _triangle(g, f, True, False)
        if plain:
            terms = [_times(g, dl, up @ x), _times(g, _times(g, du, x), low, "left")]
            terms = [_times(g, t, swaps, "left") for t in terms]
        else:
            x = swaps.mT @ x
            dl, du = g.permute(dl, SWAP), g.permute(du, SWAP)
            terms = [_times(g, _times(g, dl, x), up.mT, "left"), _times(g, du, low.mT @ x)]
    solve = Solve(of_lu if plain else _other_way(of_lu), packed, pivots)
    out = g.single(_less(g, b, terms, tuple(x.shape)), solve)
    return g.view(out if left else g.permute(out, SWAP), g.shape)


def inverse_bend(r) -> Curves | None:
    (right, left), (scaled,) = r.edges(MatMul), r.edges(Scale)
    return {scaled[0]: InverseBend((right[0],), left[2].partner)}


@rule("LinalgInvEx", curve=inverse_bend, kept=batches)
def inv_ex(g):
    """``-X dA X``."""
    (a,), x = g.src, g.tensor("inverse")
    batch = tuple(x.shape[:-2])
    x = _flat(x, batch)
    out = g.scale(_times(g, _times(g, _batch(g, a, batch), x), x, "left"), -1)
    return g.view(out, g.shape), *[None] * (len(g.meta) - 1)


def _determinant(g, output: int) -> int:
    """``<G, dA>`` with the node's own gradient G, as autograd has it for singular matrices as well."""
    (a,) = g.src
    n = len(g.values[a].shape)
    return g.sum(Partials(g, False, output).diagonal(g, a, 0), (n - 2, n - 1))


def determinant_bend(r) -> Curves | None:
    """At a singular matrix the first derivative that autograd records differs from the one that it does not."""
    ((_, s, edge),), value = r.edges(Diagonal), r.tensor("result")
    if not bool((value != 0).all()):
        return None
    return {r.ids[0]: DeterminantBend(s, r.tensor("A"), value, lambda: edge.d)}


@rule("LinalgDet", curve=determinant_bend, kept=batches)
def det(g):
    return _determinant(g, 0), *[None] * (len(g.meta) - 1)


def log_determinant_bend(r) -> Curves | None:
    ((_, s, edge),) = r.edges(Diagonal)
    return {r.ids[1]: LogDeterminantBend(s, lambda: edge.d)}


@rule("LinalgSlogdet", curve=log_determinant_bend, kept=batches)
def slogdet(g):
    """The sign does not change, the logarithm of the absolute value does."""
    (a,) = g.src
    n = len(g.values[a].shape)
    sign = g.sum(g.single(a, Zero()), (n - 2, n - 1))
    return sign, _determinant(g, 1), *[None] * (len(g.meta) - 2)


def cholesky_bend(r) -> Curves | None:
    ((v, phi, edge),) = r.edges(MatMul)
    return {v: CholeskyBend((phi,), edge.partner)}


@rule("LinalgCholeskyEx", curve=cholesky_bend, kept=batches)
def cholesky_ex(g):
    """``dL = L Phi(L^-1 dA L^-T)``, Phi the lower triangle with half of the diagonal, dA the symmetric part."""
    (a,), factor, upper = g.src, g.tensor("L"), g.saved("upper")
    batch, m = tuple(factor.shape[:-2]), g.meta[0]
    factor = _flat(factor.mT if upper else factor, batch)
    n = factor.shape[-1]
    solve = Solve(triangular(False, False), factor)
    s = _symmetric(g, _batch(g, a, batch), 0.5)
    s = g.single(g.permute(g.single(s, solve), SWAP), solve)
    half = torch.ones(n, n, dtype=m.dtype, device=m.device).tril()
    half.diagonal().mul_(0.5)
    out = _times(g, g.single(s, Diagonal(half)), factor, "left")
    out = g.permute(out, SWAP) if upper else out
    return g.view(out, g.shape), *[None] * (len(g.meta) - 1)


def cholesky_solve_bend(r) -> Curves | None:
    ((v, rhs, edge),), products = r.edges(Solve), r.edges(MatMul)
    if not products:
        return {}
    # dL (L' X), then L (dL' X)
    first, right, left = products
    return {v: CholeskySolveBend(first[1], rhs, edge, left[2].partner, right[2].partner)}


@rule("CholeskySolve", curve=cholesky_solve_bend, kept=batches)
def cholesky_solve(g):
    """``K X = B`` with ``K = L L.mT``, ``dK = dL L.mT + L dL.mT``."""
    b, f = g.src
    x, factor, upper = g.tensor("result"), g.tensor("input2"), g.saved("upper")
    batch = tuple(x.shape[:-2])
    factor = _flat(factor.mT if upper else factor, batch)
    x, terms, f = _flat(x, batch), [], _lower(g, f, batch, upper)
    if f is not None:
        terms = [
            _times(g, f, factor.mT @ x),
            _times(g, _times(g, g.permute(f, SWAP), x), factor, "left"),
        ]
    rhs = _less(g, _batch(g, b, batch), terms, tuple(x.shape))
    return g.view(g.single(rhs, Solve(by_cholesky, factor)), g.shape)


def _lower(g, f: int | None, batch, upper: bool) -> int | None:
    """A factor that may be given as upper, as lower."""
    f = _batch(g, f, batch)
    return g.permute(f, SWAP) if upper and f is not None else f


def cholesky_inverse_bend(r) -> Curves | None:
    factor, right, left = r.edges(MatMul)
    end = r.edges(Scale)[-1][0]
    return {end: CholeskyInverseBend((factor[1], right[0]), left[2].partner)}


@rule("CholeskyInverse", curve=cholesky_inverse_bend, kept=batches)
def cholesky_inverse(g):
    """``X = K^-1``, ``-X dK X``."""
    (f,), x, factor, upper = g.src, g.tensor("result"), g.tensor("self"), g.saved("upper")
    batch = tuple(x.shape[:-2])
    factor, x = _flat(factor.mT if upper else factor, batch), _flat(x, batch)
    k = _symmetric(g, _times(g, _lower(g, f, batch, upper), factor.mT))
    return g.view(g.scale(_times(g, _times(g, k, x), x, "left"), -1), g.shape)


def exponential_bend(r) -> Curves | None:
    ((v, s, edge),) = r.edges(Exponential)
    return {v: ExponentialBend((s,), edge.a)}


@rule("LinalgMatrixExp", curve=exponential_bend, kept=batches)
def matrix_exp(g):
    (a,), x = g.src, g.tensor("self")
    batch = tuple(x.shape[:-2])
    return g.view(g.single(_batch(g, a, batch), Exponential(_flat(x, batch))), g.shape)


known(
    "LinalgEig", "LinalgEigh", "LinalgLstsq", "LinalgLu", "LinalgPinv", "LinalgQr", "LinalgSvd", "LuUnpack",
    kept=batches,
)  # fmt: skip
