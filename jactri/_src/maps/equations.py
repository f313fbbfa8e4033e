"""Second-order terms of matrix equations, factorisations and determinants (first-order: `rules.linalg`).

Each follows from its equation, differentiated twice along a tangent: of ``A X = B`` it is ``A D2X = -2 dA dX``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .contraction import MatMul
from .curvature import Curvature, Tangents, full, summed_product
from .layout import FREE
from .solving import Solve, corner


def _together(t: Tangents, *values: int) -> list[Tensor]:
    """Blocks ``(K, b, ., .)`` of the same seeds, with no ties but those that the batch axis has in all."""
    axes = {t.layout(v).axes[0] for v in values}
    ties = frozenset(f for _, f in axes.pop() if f != FREE) if len(axes) == 1 else frozenset()
    return [full(t, v, ties) for v in values]


class _Batched(Curvature):
    """Of a value ``(b, ., .)`` by saved matrices ``(b, ., .)``."""

    __slots__ = ("saved",)

    def __init__(self, sources: tuple[int, ...], *saved):
        self.sources, self.saved = sources, saved

    def narrow(self, cut, ndim):
        if cut.axis != 0:
            return None
        return type(self)(self.sources, *(cut.of(m, ndim) for m in self.saved))


class SolveBend(Curvature):
    """``A X = B``: ``D2X = -2 A^-1 dA dX``."""

    __slots__ = ("edge",)

    def __init__(self, a: int, rhs: int, edge: Solve):
        self.sources, self.edge = (a, rhs), edge

    def narrow(self, cut, ndim):
        if cut.axis != 0:
            return None
        return SolveBend(*self.sources, self.edge.narrow(cut, cut, (), ()))

    def solve(self, t: Tensor) -> Tensor:
        return self.edge.push(t, False)[0]

    def term(self, t):
        da, rhs = _together(t, *self.sources)
        total = summed_product(t.seeds, da, self.solve(rhs)) * -2
        return self.solve(total.unsqueeze(0))[0]


class InverseBend(_Batched):
    """``X = A^-1`` of ``w_k = dA_k X``: ``D2X = 2 X dA X dA X``."""

    __slots__ = ()

    def term(self, t):
        (x,) = self.saved
        (w,) = _together(t, *self.sources)
        return torch.bmm(x, summed_product(t.seeds, w, w)) * 2


class CholeskyInverseBend(_Batched):
    """``X = (L L')^-1``: ``D2X = 2 X dK X dK X - 2 X dL dL' X``, of dL and ``dK X``."""

    __slots__ = ()

    def term(self, t):
        (x,) = self.saved
        f, w = _together(t, *self.sources)
        bend = summed_product(t.seeds, w, w) - torch.bmm(summed_product(t.seeds, f, f.mT), x)
        return torch.bmm(x, bend) * 2


class CholeskyBend(_Batched):
    """``A = L L'``, of ``phi_k = L^-1 dL_k``: ``D2L = -2 L Phi(phi phi')``."""

    __slots__ = ()

    def term(self, t):
        (factor,) = self.saved
        (phi,) = _together(t, *self.sources)
        low = summed_product(t.seeds, phi, phi.mT).tril()
        return torch.bmm(factor, low - torch.diag_embed(low.diagonal(0, -2, -1) / 2)) * -2


class CholeskySolveBend(SolveBend):
    """``L L' X = B``: ``D2X = -2 K^-1 (dK dX + dL dL' X)``, ``dK = dL L' + L dL'``."""

    __slots__ = ("factor", "x")

    def __init__(self, f: int, rhs: int, edge: Solve, factor: Tensor, x: Tensor):
        super().__init__(f, rhs, edge)
        self.factor, self.x = factor, x

    def narrow(self, cut, ndim):
        base = super().narrow(cut, ndim)
        saved = [cut.of(m, ndim) for m in (self.factor, self.x)]
        return None if base is None else CholeskySolveBend(*self.sources, base.edge, *saved)

    def term(self, t):
        df, rhs = _together(t, *self.sources)
        dk = MatMul(self.factor.mT, "right").push(df, False)[0]
        total = summed_product(t.seeds, dk + dk.mT, self.solve(rhs))
        total = total + torch.bmm(summed_product(t.seeds, df, df.mT), self.x)
        return self.solve(total.unsqueeze(0) * -2)[0]


class LuBend(_Batched):
    """``A = P L U``, of ``M_k = L^-1 P' dA_k U^-1``: as the first derivative, of ``-2 tril(M, -1) triu(M)``."""

    __slots__ = ()

    def term(self, t):
        low, up = self.saved
        (m,) = _together(t, *self.sources)
        n = summed_product(t.seeds, m.tril(-1), m.triu()) * -2
        return torch.bmm(low, n.tril(-1)) + torch.bmm(n.triu(), up)


class LuSolveBend(SolveBend):
    """``P L U X = B``: ``D2X = -2 A^-1 (dA dX + P dL dU X)``, ``dA = P (dL U + L dU)``; or of the transpose."""

    __slots__ = ("saved", "turned")

    def __init__(self, f: int, rhs: int, edge: Solve, turned: bool, *saved: Tensor):
        """``saved``: P, L, U, X."""
        super().__init__(f, rhs, edge)
        self.turned, self.saved = turned, saved

    def narrow(self, cut, ndim):
        base = super().narrow(cut, ndim)
        if base is None:
            return None
        saved = (cut.of(m, ndim) for m in self.saved)
        return LuSolveBend(*self.sources, base.edge, self.turned, *saved)

    def term(self, t):
        swaps, low, up, x = self.saved
        df, rhs = _together(t, *self.sources)
        dl, du = df.tril(-1), df.triu()
        da = swaps @ (dl @ up + low @ du)
        bend = swaps @ summed_product(t.seeds, dl, du)
        if self.turned:
            da, bend = da.mT, bend.mT
        total = summed_product(t.seeds, da, self.solve(rhs)) + torch.bmm(bend, x)
        return self.solve(total.unsqueeze(0) * -2)[0]


class ExponentialBend(_Batched):
    """Twice the corner of the exponential of three blocks."""

    __slots__ = ()

    def term(self, t):
        (a,) = self.saved
        (e,) = _together(t, *self.sources)
        return t.seeds.signed(corner(a, e, 3)).sum(0) * 2


class LogDeterminantBend(Curvature):
    """``log |det A|``: ``-tr(A^-1 dA A^-1 dA)``.

    ``gradient`` gives ``A^-T``. Where rows (or columns) of A are tied to the seeds, as those of a Slater matrix to the
    electrons, a tangent has one row ``i``, and the trace is the square of ``<dA_i, A^-T_i>``: ``n^2`` for each
    direction of an electron instead of ``n^3`` for each of all.
    """

    __slots__ = ("gradient",)

    def __init__(self, source: int, gradient: Callable[[], Tensor]):
        self.sources, self.gradient = (source,), gradient

    def narrow(self, cut, ndim):
        g = self.gradient
        return type(self)(self.sources[0], lambda: cut.of(g(), ndim + 2))

    def term(self, t):
        (s,) = self.sources
        layout = t.layout(s)
        n = len(layout.shape)
        tied = [a for a in (n - 2, n - 1) if layout.is_tied(a)]
        ties = frozenset(f for a in (*range(n - 2), *tied) for _, f in layout.axes[a] if f != FREE)
        block = full(t, s, ties)
        if not tied:
            return self.dense(t, block)
        along = block * self.gradient()
        for a in {n - 2, n - 1}.difference(tied):
            along = along.sum(a + 1, keepdim=True)
        return -t.seeds.squares(along).sum((-2, -1))

    def dense(self, t, block: Tensor) -> Tensor:
        z = _solved(self.gradient(), block)
        return -t.seeds.products(z, z.mT).sum((-2, -1))


def _solved(gradient: Tensor, block: Tensor) -> Tensor:
    """``A^-1 u_k``."""
    inverse = gradient.mT
    flat = block.reshape(block.shape[0], -1, *block.shape[-2:])
    z = MatMul(inverse.reshape(-1, *inverse.shape[-2:]), "left").push(flat, False)[0]
    return z.reshape(block.shape)


class DeterminantBend(LogDeterminantBend):
    """``det A``: ``det A (tr(A^-1 dA)^2 - tr(A^-1 dA A^-1 dA))``; none along one row or column, in which it is linear.

    Near a singular matrix that cancels. Where nothing is differentiated again, singular values are used: with
    ``A = U s V'`` and ``E = U' dA V``, ``det U det V sum_{i != j} (E_ii E_jj - E_ij E_ji) prod_{k != i, j} s_k``.
    """

    __slots__ = ("matrix", "value")

    def __init__(self, source: int, matrix: Tensor, value: Tensor, gradient: Callable[[], Tensor]):
        super().__init__(source, gradient)
        self.matrix, self.value = matrix, value

    def narrow(self, cut, ndim):
        g = self.gradient
        return DeterminantBend(
            self.sources[0],
            cut.of(self.matrix, ndim + 2),
            cut.of(self.value, ndim),
            lambda: cut.of(g(), ndim + 2),
        )

    def term(self, t):
        layout = t.layout(self.sources[0])
        n = len(layout.shape)
        if layout.is_tied(n - 2) or layout.is_tied(n - 1):
            return torch.zeros_like(self.value)
        return super().term(t)

    def dense(self, t, block):
        if torch.is_grad_enabled():
            value = self.value[..., None, None]
            z = _solved(self.gradient() / value, block)
            trace = z.diagonal(0, -2, -1).sum(-1)
            return self.value * (
                t.seeds.products(trace, trace) - t.seeds.products(z, z.mT).sum((-2, -1))
            )
        u, s, vh = torch.linalg.svd(self.matrix)
        flat = block.reshape(block.shape[0], -1, *block.shape[-2:])
        size = u.shape[-1]
        e = MatMul(u.mT.reshape(-1, size, size), "left").push(flat, False)[0]
        e = MatMul(vh.mT.reshape(-1, size, size), "right").push(e, False)[0].reshape(block.shape)
        trace = e.diagonal(0, -2, -1)
        pairs = t.seeds.products(trace.unsqueeze(-1), trace.unsqueeze(-2)) - t.seeds.products(
            e, e.mT
        )
        left_out = torch.eye(size, dtype=torch.bool, device=s.device)
        left_out = left_out.unsqueeze(0) | left_out.unsqueeze(1)  # (i, j, k): k is i or j
        others = s[..., None, None, :].masked_fill(left_out, 1).prod(-1)
        total = (pairs * others.tril(-1)).sum((-2, -1)) * 2
        return torch.linalg.det(u) * torch.linalg.det(vh) * total
