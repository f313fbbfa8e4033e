"""`Banded`: a Jacobian of which the entries of a pattern are kept, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.memory import si
from ..base.scipy_arrays import as_numpy, scipy_sparse
from ..base.tables import Picture, Shown, spy

_FEW = 1 << 16
"""Entries of a band that are no matter, whatever the matrix has."""


@dataclass(frozen=True, repr=False)
class Banded(Shown):
    """A Jacobian whose rows hold the entries of a pattern only: what ``layout="banded"`` of `jacobian` returns.

    Attributes:
        values: ``(*out, W)`` with the most entries of a row on the last axis, for ``per_sample`` Jacobians with the
            samples first, as in ``out``; 0 where a row has fewer.
        columns: of the shape of one sample's values, the flat index in the input (of one sample) of each; -1 where a
            row has fewer.
        shape: of the Jacobian.

    Examples:
        >>> conv = nn.Conv1d(1, 1, kernel_size=3, padding=1)
        >>> x = torch.randn(1, 1, 6)
        >>> band = jactri.jacobian(conv, x, layout="banded")
        >>> band.values.shape, band.columns[0, 0, 0].tolist()
        (torch.Size([1, 1, 6, 3]), [0, 1, -1])
        >>> torch.allclose(band.to_dense(), jactri.jacobian(conv, x))
        True
    """

    values: Tensor
    columns: Tensor
    shape: tuple[int, ...]

    def _sizes(self) -> tuple[int, int, int]:
        """How many samples there are, and the rows and columns of one."""
        rows = prod(self.columns.shape[:-1])
        samples = prod(self.values.shape[:-1]) // max(rows, 1)
        return samples, rows, prod(self.shape) // max(samples * rows, 1)

    def _parts(self) -> list[str | Picture]:
        there, width = self.columns >= 0, self.columns.shape[-1]
        _, rows, n = self._sizes()
        size, whole = self.values.nbytes, prod(self.shape) * self.values.element_size()
        text = (
            f"Banded(shape {tuple(self.shape)}, {self.values.dtype} on {self.values.device}: up to {width} entries a "
            f"row, values {tuple(self.values.shape)} of {si(size)}B, dense {si(whole)}B)"
        )
        row = torch.arange(rows, device=there.device).repeat_interleave(width)[there.flatten()]
        return [text, spy(row, self.columns[there], (rows, n))]

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.csr_array``: the matrix of all rows by all entries of the input.

        Jacobians of samples are blocks on its diagonal. Values are detached.

        Raises:
            ModuleNotFoundError: SciPy is not installed.
        """
        sparse = scipy_sparse("Banded.to_scipy")
        values, columns, shape = self._matrix()
        there = columns >= 0
        start = np.concatenate([[0], np.cumsum(there.sum(1))])
        return sparse.csr_array((values[there], columns[there], start), shape=shape)

    def to_lapack(self) -> tuple[tuple[int, int], np.ndarray]:
        """What ``scipy.linalg.solve_banded`` takes: ``(l, u), ab``, with ``ab[u + i - j, j]`` the entry ``(i, j)``.

        ``l`` and ``u`` are how many diagonals there are below and above the main one, by the pattern. Jacobians of
        samples are blocks on the diagonal of one matrix.

        Raises:
            ValueError: a matrix that is not square; a band that is larger than the matrix itself.

        Cost:
            Memory for ``(l + u + 1) * n`` entries. Solving costs about ``2 n l (l + u)`` flops.

        Examples:
            >>> def residual(u):  # of u'' = u ** 3 + 1 with 0 at both ends
            ...     v = torch.nn.functional.pad(u, (1, 1))
            ...     return v[:-2] - 2 * u + v[2:] - (u**3 + 1) / 400
            >>> J = jactri.jacobian(residual, torch.zeros(19), layout="banded")
            >>> (l, u), ab = J.to_lapack()
            >>> l, u, ab.shape
            (1, 1, (3, 19))
        """
        values, columns, (m, n) = self._matrix()
        if m != n:
            raise ValueError(
                f"solve_banded takes square matrices, but this one is {m} by {n}; for least squares, "
                "scipy.sparse.linalg.lsmr(band.to_scipy(), b), or jactri.normal_equations"
            )
        row, at = np.nonzero(columns >= 0)
        values, column = values[row, at], columns[row, at]
        below, above = (max(0, int((d * (row - column)).max(initial=0))) for d in (1, -1))
        if below + above + 1 > n and n * (below + above + 1) > _FEW:
            raise ValueError(
                f"entries lie up to {below} rows below and {above} above the diagonal of a matrix of {n} rows, so its "
                "band is larger than itself; solve scipy.sparse.linalg.splu(band.to_scipy().tocsc()) or .to_dense(), "
                "or put unknowns that depend on one another side by side"
            )
        ab = np.zeros((below + above + 1, n), values.dtype)
        ab[above + row - column, column] = values
        return (below, above), ab

    def _matrix(self) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        """Values and columns ``(rows, width)`` of the matrix, and its shape."""
        samples, rows, n = self._sizes()
        width = self.columns.shape[-1]
        values = as_numpy(self.values).reshape(samples * rows, width)
        columns = as_numpy(self.columns).reshape(1, rows, width)
        offset = np.arange(samples)[:, None, None] * n
        columns = np.where(columns < 0, columns, columns + offset)
        return values, columns.reshape(samples * rows, width), (samples * rows, samples * n)

    def to_dense(self) -> Tensor:
        """The Jacobian itself, of ``shape``."""
        width = self.columns.shape[-1]
        samples, rows, n = self._sizes()
        columns = self.columns.reshape(1, rows, width).expand(samples, -1, -1)
        values = self.values.reshape(samples, rows, width)
        dense = values.new_zeros(
            samples, rows, n + 1
        )  # what is nowhere goes to a column of its own
        dense = dense.scatter(2, columns.remainder(n + 1), values)
        return dense[..., :n].reshape(self.shape)
