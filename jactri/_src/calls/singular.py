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
"""Of a basis at most, a third of which, the best, are kept when it is restarted,"""
LEAST = 3
"""and at the least."""

PASSES = 200


def basis_bytes(shape: tuple[int, int], k: int, dtype: torch.dtype, blocks: int) -> int:
    """Bytes that `leading` takes at its worst moment, but for products, with a basis of so many blocks."""
    least, most = sorted(shape)
    # basis and vectors of the one side; image, its copy in LAPACK and vectors of the other
    return (2 * least + 3 * most) * min(least, blocks * (k + OVERSAMPLE)) * dtype.itemsize


def leading(
    push: Times, pull: Times, shape: tuple[int, int], k: int, tol: float, dtype: torch.dtype, device,
    blocks: int = BLOCKS,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``U`` ``(m, k)``, ``S`` ``(k,)``, ``V`` ``(n, k)`` of an ``(m, n)`` matrix ``A``, from ``A v`` and ``A' u``.

    Block Golub-Kahan-Lanczos in exact Rayleigh-Ritz form: a random block (Halko, Martinsson and Tropp 2011,
    arXiv:0909.4061), then the residuals of the leading triplets, orthogonal to all that is there; restarted with the
    best of the basis (Baglama and Reichel 2005). It ends where ``|A' u - s v| <= tol S[0]`` for all of them (``A v = s
    u`` holds by construction), or where the basis is all of the space. Raises LinAlgError where it does not end.
    """
    m, n = shape
    if m < n:
        v, s, u = leading(pull, push, (n, m), k, tol, dtype, device, blocks)
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
        top = float(s[0])
        if basis.shape[1] == n or top == 0:
            return u[:, :k], s[:k], v[:, :k]
        # by the largest: squares of what is left of large numbers would overflow
        block = pull(u[:, :width]).to(dtype) / top - v[:, :width] * (s[:width] / top)
        off = float(block[:, :k].norm(dim=0).max())
        if off <= tol:
            return u[:, :k], s[:k], v[:, :k]
        if basis.shape[1] + width > blocks * width:
            kept = blocks // 3 * width
            basis, image = v[:, :kept].clone(), u[:, :kept] * s[:kept]
        del u, v, w
        block = block[:, : n - basis.shape[1]]
    raise torch.linalg.LinAlgError(
        f"the {k} largest singular values did not converge in {PASSES} passes: residuals are {off:.2g} "
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
