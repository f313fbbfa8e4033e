"""`to_scipy`: sparse Jacobians as what SciPy's solvers take."""

from __future__ import annotations

from math import prod
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.scipy_arrays import as_numpy, scipy_sparse
from .banded import Banded


def to_scipy(J: Any, rows: int | tuple[int, ...] | None = None) -> Any:
    """A sparse Jacobian, or a nest of them, as one ``scipy.sparse`` array: a matrix of all outputs by all inputs.

    Args:
        J: what `jacobian`, `jtj`, `sparsity` and `Linearization.sparse` return for a sparse layout, nested as it is.
            Matrices of samples (CSR, CSC or BSR of three axes, a `Banded`) become blocks on the diagonal.
        rows: of COO tensors with more than two axes, how many of these are an output's; for several outputs a tuple. A
            `sparsity` knows it.

    Returns:
        A ``csr_array``, ``csc_array``, ``bsr_array`` or ``coo_array``, as the tensor is; of a `Banded` a
        ``csr_array``, and of several blocks too. Values are the tensor's own memory where they can be (one block, on
        the CPU, not in half precision, which becomes float32), detached.

    Raises:
        ModuleNotFoundError: SciPy is not installed.
        TypeError: dense tensors, and what is no tensor.
        ValueError: a COO tensor of which ``rows`` is not known; blocks that do not fit together.

    Cost:
        One CSR, CSC or BSR matrix: none, but for indices, of which SciPy makes int32 where these suffice.

    Examples:
        >>> x = torch.linspace(0, 1, 5)
        >>> J = jactri.jacobian(lambda x: x[1:] ** 2 - x[:-1], x, layout=torch.sparse_csr)
        >>> S = jactri.to_scipy(J)
        >>> S.format, S.shape, S.nnz
        ('csr', (4, 5), 8)
        >>> mask = jactri.sparsity(lambda x: x[1:] ** 2 - x[:-1], x)
        >>> (jactri.to_scipy(mask) != (S != 0)).nnz  # here no entry is zero by its value, but for the first
        0
    """
    sparse = scipy_sparse("to_scipy")
    if not isinstance(J, tuple):
        return _one(J, rows, sparse)
    if not J or not all(isinstance(row, tuple) for row in J):
        raise ValueError(
            f"J is a tuple of {len(J)}, which may be the outputs or the inputs: pass (J,) for one output by several "
            "inputs, tuple((block,) for block in J) for several outputs by one input"
        )
    counts = rows if isinstance(rows, tuple) else (rows,) * len(J)
    if len(counts) != len(J) or any(len(row) != len(J[0]) for row in J):
        raise ValueError(
            "J must be nested as jacobian's result is, a tuple of outputs of tuples of as many inputs, and rows a "
            f"number or one for each output; got {[len(row) for row in J]} inputs and rows={rows!r}"
        )
    blocks = [[_one(b, n, sparse) for b in row] for row, n in zip(J, counts, strict=True)]
    heights = [{b.shape[0] for b in row} for row in blocks]
    widths = [{row[i].shape[1] for row in blocks} for i in range(len(blocks[0]))]
    if any(len(found) > 1 for found in (*heights, *widths)):
        shapes = [[b.shape for b in row] for row in blocks]
        raise ValueError(f"the blocks of J do not fit together: their matrices are {shapes}")
    if len(blocks) == len(blocks[0]) == 1:
        return blocks[0][0]
    shape = sum(h.pop() for h in heights), sum(w.pop() for w in widths)
    return _placed(blocks, shape, sparse)  # block_array takes no blocks without a row or a column


def _one(J: Any, rows: Any, sparse: ModuleType) -> Any:
    """One tensor as one matrix."""
    if isinstance(J, Banded):
        return J.to_scipy()
    if not isinstance(J, Tensor):
        raise TypeError(f"J must be a sparse tensor, a Banded or tuples of them, got {type(J)}")
    if J.layout is torch.sparse_coo:
        return _coo(J, rows, sparse)
    if J.layout not in _PARTS:
        raise TypeError(
            f"J is a tensor of layout {J.layout}; to_scipy takes sparse ones: ask jacobian for "
            "layout=torch.sparse_csr, or give the solver J.numpy()"
        )
    kind, major, minor = _PARTS[J.layout]
    ends, places, values = (
        as_numpy(t) for t in (getattr(J, major)(), getattr(J, minor)(), J.values())
    )
    shape = tuple(J.shape)
    if len(shape) == 3:
        ends, places, values, shape = _diagonal(ends, places, values, shape, kind)
    elif len(shape) != 2:
        raise ValueError(f"J must be a matrix, or one for each sample, but has the shape {shape}")
    return getattr(sparse, f"{kind}_array")((values, places, ends), shape=shape)


_PARTS = {
    torch.sparse_csr: ("csr", "crow_indices", "col_indices"),
    torch.sparse_csc: ("csc", "ccol_indices", "row_indices"),
    torch.sparse_bsr: ("bsr", "crow_indices", "col_indices"),
}
"""By layout: SciPy's name, and where indices are."""


def _diagonal(ends, places, values, shape, kind: str):
    """The matrices of samples as one, with these on its diagonal."""
    n, rows, columns = shape
    each = np.arange(n)[:, None]
    last = values.shape[2:]  # of a block
    minor = rows if kind == "csc" else columns // (last[1] if last else 1)
    first = ends[:, :-1] + each * places.shape[1]
    ends = np.append(first.ravel(), n * places.shape[1])
    return ends, (places + each * minor).ravel(), values.reshape(-1, *last), (n * rows, n * columns)


def _coo(J: Tensor, rows: Any, sparse: ModuleType) -> Any:
    rows = getattr(J, "rows", None) if rows is None else rows
    if rows is None and J.dim() == 2:
        rows = 1
    if not isinstance(rows, int) or not 0 <= rows <= J.dim():
        raise ValueError(
            f"J is a COO tensor of shape {tuple(J.shape)}, rows={rows}: pass rows=, how many of its axes are the "
            "output's, or ask for layout=torch.sparse_csr, which is a matrix"
        )
    J = J if J.is_coalesced() else J.coalesce()
    index, sizes = as_numpy(J.indices()), (J.shape[:rows], J.shape[rows:])
    flat = []
    for at, size in zip((index[:rows], index[rows:]), sizes, strict=True):
        found = np.zeros(index.shape[1], np.int64)
        for i, n in zip(at, size, strict=True):
            found = found * n + i
        flat.append(found)
    values = as_numpy(J.values())
    return sparse.coo_array((values, tuple(flat)), shape=tuple(map(prod, sizes)))


def _placed(blocks, shape: tuple[int, int], sparse: ModuleType) -> Any:
    """Blocks in their places."""
    top, parts = 0, []
    for row in blocks:
        left = 0
        for block in row:
            found = block.tocoo()
            parts.append((found.data, found.row + top, found.col + left))
            left += block.shape[1]
        top += row[0].shape[0]
    data, row, column = (np.concatenate(p) for p in zip(*parts, strict=True))
    return sparse.csr_array((data, (row, column)), shape=shape)
