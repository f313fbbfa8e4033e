"""Linear maps of matrix equations: solutions for a right-hand side, and functions of a matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .linear_map import LinearMap


class Solve(LinearMap):
    """The solution of ``A X = B`` as a function of B, ``(b, n, m)``, by what ``A`` was factored into before.

    All seeds of a block are columns of one right-hand side. ``solve(factors, B, transposed)`` is given the ``factors``,
    each ``(b, ...)``, and must be differentiable in them where grad mode is on.
    """

    __slots__ = ("_solve", "factors")
    name, structure = "solve", "batched matrix"

    def __init__(
        self, solve: Callable[[tuple[Tensor, ...], Tensor, bool], Tensor], *factors: Tensor
    ):
        self._solve, self.factors = solve, factors

    def kept(self, in_shape, out_shape):
        return (0, 0), (2, 2)

    def work(self, in_shape, out_shape, reverse):
        return 2.0 * in_shape[1]

    def narrow(self, source, target, in_shape, out_shape):
        if source.axis != 0:
            return self
        parts = (f.narrow(0, source.start, source.length) for f in self.factors)
        return Solve(self._solve, *parts)

    def _columns(self, t: Tensor, transposed: bool) -> tuple[Tensor, bool]:
        k, b, n, m = t.shape
        columns = t.permute(1, 2, 0, 3).reshape(b, n, k * m)
        return self._solve(self.factors, columns, transposed).view(b, n, k, m).permute(
            2, 0, 1, 3
        ), True

    def push(self, t, own):
        return self._columns(t, False)

    def pull(self, c, own):
        return self._columns(c, True)


def by_lu(factors: tuple[Tensor, ...], b: Tensor, transposed: bool) -> Tensor:
    """Of a matrix, its LU factors and pivots. The factors carry no derivative: under grad mode A is factored again."""
    a, lu, pivots = factors
    if torch.is_grad_enabled():
        return torch.linalg.solve(a.mT if transposed else a, b).contiguous()
    return torch.linalg.lu_solve(lu, pivots, b, adjoint=transposed).contiguous()


def of_lu(factors: tuple[Tensor, ...], b: Tensor, transposed: bool) -> Tensor:
    """Of LU factors and pivots that are given, not made of a matrix."""
    return torch.linalg.lu_solve(*factors, b, adjoint=transposed).contiguous()


def triangular(upper: bool, unit: bool):
    """Of a triangular matrix."""

    def solve(factors: tuple[Tensor, ...], b: Tensor, transposed: bool) -> Tensor:
        (a,) = factors
        a = a.mT if transposed else a
        return torch.linalg.solve_triangular(
            a, b, upper=upper != transposed, unitriangular=unit
        ).contiguous()

    return solve


def by_cholesky(factors: tuple[Tensor, ...], b: Tensor, transposed: bool) -> Tensor:
    """Of a symmetric matrix, by its lower factor."""
    return torch.cholesky_solve(b, *factors).contiguous()


class Exponential(LinearMap):
    """The derivative of ``exp A`` in A, ``(b, n, n)``, by a block matrix.

    ``exp [[A, E], [0, A]]`` has it in its corner (Higham, "Functions of Matrices", 2008, (3.16)); its transpose is
    that of ``A.mT``.
    """

    __slots__ = ("a",)
    name, structure = "matrix exponential", "batched matrix"

    def __init__(self, a: Tensor):
        self.a = a

    def kept(self, in_shape, out_shape):
        return ((0, 0),)

    def work(self, in_shape, out_shape, reverse):
        return 400.0 * in_shape[1]

    def narrow(self, source, target, in_shape, out_shape):
        return Exponential(self.a.narrow(0, source.start, source.length))

    def push(self, t, own):
        return corner(self.a, t, 2), True

    def pull(self, c, own):
        return corner(self.a.mT, c, 2), True


def corner(a: Tensor, e: Tensor, count: int) -> Tensor:
    """The last block of the first row of ``exp`` of ``count`` times ``a`` on the diagonal and ``e`` above each.

    Of two it is the derivative along e; of three, half of the second derivative.
    """
    n, zero, a = a.shape[-1], torch.zeros_like(e), a.expand(e.shape)
    rows = [
        torch.cat([a if j == i else e if j == i + 1 else zero for j in range(count)], -1)
        for i in range(count)
    ]
    return torch.linalg.matrix_exp(torch.cat(rows, -2))[..., :n, -n:]
