"""The largest singular values of an operator that is known by its products with blocks of vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Times = Callable[[Tensor], Tensor]
"""The product with a matrix, a vector a column."""

OVERSAMPLE = 6
"""Columns of a block beside those that are asked for: Halko, Martinsson and Tropp 2011 take 5 to 10."""

BLOCKS = 12
"""Of a basis at most,"""
KEPT = 4
"""and those of the best of it, with which it is restarted."""

PASSES = 200


def leading(
    push: Times, pull: Times, shape: tuple[int, int], k: int, tol: float, dtype: torch.dtype, device
) -> tuple[Tensor, Tensor, Tensor]:
    """``U`` ``(m, k)``, ``S`` ``(k,)``, ``V`` ``(n, k)`` of an ``(m, n)`` matrix ``A``, from ``A v`` and ``A' u``.

    Block Golub-Kahan-Lanczos in exact Rayleigh-Ritz form: a random block (Halko, Martinsson and Tropp 2011,
    arXiv:0909.4061), then the residuals of the leading triplets, orthogonal to all that is there; restarted with the
    best of the basis (Baglama and Reichel 2005). It ends where ``|A' u - s v| <= tol S[0]`` for all of them (``A v = s
    u`` holds by construction), or where the basis is all of the space. Raises LinAlgError where it does not end.
    """
    m, n = shape
    if m < n:
        v, s, u = leading(pull, push, (n, m), k, tol, dtype, device)
        return u, s, v
    width = min(n, k + OVERSAMPLE)
    random = torch.Generator(device).manual_seed(0)  # not the caller's, and the same every time

    def draw(count: int) -> Tensor:
        return torch.randn(n, count, generator=random, dtype=dtype, device=device)

    basis = torch.zeros(n, 0, dtype=dtype, device=device)
    image = torch.zeros(m, 0, dtype=dtype, device=device)
    block, off = draw(width), 0.0
    for _ in range(PASSES):
        block = _orthonormal(block, basis, draw)
        basis = torch.cat([basis, block], 1)
        image = torch.cat([image, push(block).to(dtype)], 1)
        u, s, w = torch.linalg.svd(image, full_matrices=False)
        v = basis @ w.mT
        if basis.shape[1] == n:
            return u[:, :k], s[:k], v[:, :k]
        block = pull(u[:, :width]).to(dtype) - v[:, :width] * s[:width]
        off = float(block[:, :k].norm(dim=0).max())
        if off <= tol * float(s[0]):
            return u[:, :k], s[:k], v[:, :k]
        if basis.shape[1] + width > BLOCKS * width:
            kept = KEPT * width
            basis, image = v[:, :kept], u[:, :kept] * s[:kept]
        block = block[:, : n - basis.shape[1]]
    raise torch.linalg.LinAlgError(
        f"the {k} largest singular values did not converge in {PASSES} passes: residuals are {off / float(s[0]):.2g} "
        f"of the largest, and tol is {tol:.2g}; pass a larger tol, or another k"
    )


def _orthonormal(block: Tensor, basis: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
    """A block as columns that are orthonormal, and orthogonal to the basis; random ones for those that vanish."""
    sizes = block.norm(dim=0)
    gone = sizes <= torch.finfo(block.dtype).tiny
    if bool(gone.any()):
        block = torch.where(gone, draw(block.shape[1]), block)
        sizes = block.norm(dim=0)
    block = block / sizes
    for _ in range(
        3
    ):  # what rounding leaves of the basis in small residuals goes with the second, and the third
        block = block - basis @ (basis.mT @ block)
        block, _ = torch.linalg.qr(block)
    return block
