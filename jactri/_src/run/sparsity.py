"""`Sparsity`: which entries of a Jacobian can be non-zero; and a caller's own pattern, of any kind, as `Csr`."""

from __future__ import annotations

import os
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ..base.csr import Csr
from ..base.memory import si
from ..base.tables import Picture, Shown, spy
from ..plan.compressing import compressed
from .coo import unravel
from .solvers import to_scipy

_KEY = "jactri.Sparsity"
_CELLS = 512
"""Of a picture, along each axis, at most."""


class Colours(NamedTuple):
    """How many products give all entries of a pattern.

    Attributes:
        columns: with tangents, each the sum of columns that share no row.
        rows: with cotangents, each the sum of rows that share no column.
    """

    columns: int
    rows: int

    @property
    def products(self) -> int:
        """Both together."""
        return self.columns + self.rows


class Sparsity(Shown, Tensor):
    """Which entries of a Jacobian can be non-zero: a boolean ``torch.sparse_coo`` tensor of its shape.

    `sparsity` finds it, `of` makes one of a mask or a SciPy matrix. As ``pattern=`` of `jacobian`, it is not looked for
    again, and its colours are found once. It shows itself as its size, and in a notebook as a picture. What is computed
    of it is a plain tensor.

    Attributes:
        rows: how many of its axes are the output's.
        per_sample: whether it is of the blocks of samples, ``(N, *out, *in)``.

    Examples:
        >>> func = lambda x: torch.cat([x.sum()[None], x[1:] * x[0]])  # an arrowhead
        >>> pattern = jactri.sparsity(func, torch.randn(8))
        >>> pattern.nnz, pattern.colours
        (22, Colours(columns=2, rows=1))
        >>> print(pattern.spy())
        ┌────┐
        │⡟⢍⠉⠉│
        │⡇⠀⠑⢄│
        └────┘
        >>> J = jactri.jacobian(func, torch.randn(8), layout=torch.sparse_csr, pattern=pattern)
        >>> J.values().shape
        torch.Size([22])
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    rows: int
    per_sample: bool
    _matrices: dict[tuple[int | None, int], Csr]

    def __new__(cls, *args: Any, **options: Any) -> Sparsity:
        raise TypeError(
            "jactri.sparsity(func, inputs) finds a Sparsity, and jactri.Sparsity.of(pattern) makes one of a mask or a "
            "SciPy matrix"
        )

    @staticmethod
    def of(
        pattern: Any, out: tuple[int, ...] | None = None, into: tuple[int, ...] | None = None
    ) -> Sparsity:
        """A pattern of your own, converted once for many calls.

        Args:
            pattern: a boolean tensor or array, a sparse tensor or a SciPy matrix, of shape ``(*out, *into)`` or the
                matrix of their entries. What a sparse one stores is there, whatever its values.
            out: the shape of the output, as ``(3,)``; of one sample, for ``per_sample`` Jacobians. By default a
                matrix is of an output and an input of one axis.
            into: that of the input.

        Raises:
            TypeError: a pattern of numbers, or of another kind; a shape that is none; no shapes for what is no matrix.
            RuntimeError: a pattern of another shape.

        Examples:
            >>> mask = torch.eye(3, 4, dtype=torch.bool)
            >>> jactri.Sparsity.of(mask).nnz
            3
            >>> jactri.Sparsity.of(mask, (3, 1), (2, 2)).shape
            torch.Size([3, 1, 2, 2])
        """
        if out is None and into is None:
            if isinstance(pattern, Sparsity):
                return pattern
            shape = _shape(pattern, "pattern")
            if len(shape) != 2:
                raise TypeError(
                    f"pattern has shape {shape}; pass the shapes of the output and of the input, "
                    "Sparsity.of(pattern, out, into), which only a matrix does without"
                )
            out, into = shape[:1], shape[1:]
        for name, shape in (("out", out), ("into", into)):
            if not isinstance(shape, (tuple, list)):
                raise TypeError(f"{name} must be a shape, as (3,), got {shape!r}")
        matrix = csr_of(pattern, torch.Size(out), torch.Size(into), "pattern")
        return _of(matrix, (*out, *into), len(out), False)

    def __deepcopy__(self, memo) -> Sparsity:
        copied = memo[id(self)] = of_mask(self.clone(), self.rows, self.per_sample)
        return copied

    def __reduce_ex__(self, protocol):
        return self.clone().__reduce_ex__(protocol)  # a plain tensor, which any torch can load

    @property
    def nnz(self) -> int:
        """How many entries can be non-zero."""
        return self._nnz()

    @property
    def colours(self) -> Colours:
        """The products that a Jacobian with this pattern takes, as `Colours`: of columns, of rows or of both.

        For blocks of samples one product serves all of them.
        """
        out, into = self.shape[: self.rows], self.shape[self.rows :]
        samples = self.shape[0] if self.per_sample else None
        how = compressed(
            matrix_of(self, samples), "auto", tuple(out[samples is not None :]), tuple(into)
        )
        return Colours(how.tangents.count, how.cotangents.count)

    def spy(self, width: int = 72) -> str:
        """The pattern as text, in characters of braille: print it.

        Each dot is an entry or, of a matrix of more, some of them, with a dot where any is there.

        Args:
            width: characters of a line, at most; as many lines are half of that.

        Raises:
            ValueError: a width below 3.
        """
        if not isinstance(width, int) or width < 3:
            raise ValueError(f"width must be an integer of at least 3, got {width!r}")
        rows, columns = matrix_of(self).shape
        scale = max(columns / (2 * (width - 2)), rows / (4 * max(width // 2 - 2, 1)), 1)
        return self._picture((ceil(rows / scale), ceil(columns / scale))).braille()

    def plot(self, ax: Any = None) -> Any:
        """Draw the pattern with matplotlib, the darker the more entries are there.

        Args:
            ax: matplotlib's axes to draw on; by default those of a new figure.

        Returns:
            The axes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        if ax is None:
            try:
                from matplotlib import pyplot
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] != "matplotlib":
                    raise
                raise ModuleNotFoundError(
                    "Sparsity.plot needs matplotlib, which is not installed: pip install matplotlib; "
                    "print(pattern.spy()) needs nothing",
                    name="matplotlib",
                ) from None
            ax = pyplot.subplots()[1]
        rows, columns = matrix_of(self).shape
        shares = self._picture((_CELLS, _CELLS)).shares.numpy()
        shade = np.where(shares > 0, 0.35 + 0.65 * shares, 0)
        near = rows and columns and 0.1 < rows / columns < 10
        ax.imshow(
            shade, cmap="Greys", vmin=0, vmax=1, interpolation="nearest",
            extent=(-0.5, columns - 0.5, rows - 0.5, -0.5) if rows and columns else None,
            aspect="equal" if near else "auto",
        )  # fmt: skip
        ax.set(xlabel="input", ylabel="output", title=f"{self.nnz} of {rows * columns} entries")
        return ax

    def save(self, path: str | os.PathLike) -> None:
        """Write it to a file of NumPy's format ``.npz``, which holds numbers and no code.

        Args:
            path: of the file, which is replaced in one step.
        """
        matrix, path = matrix_of(self), Path(path)
        beside = path.with_name(path.name + ".new")
        told = np.array([self.rows, self.per_sample, *self.shape], np.int64)
        try:
            with open(beside, "wb") as file:
                np.savez_compressed(
                    file, **{_KEY: told, "start": matrix.start, "column": matrix.column}
                )
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | os.PathLike, device: torch.device | str = "cpu") -> Sparsity:
        """What `save` wrote.

        Args:
            path: of the file.
            device: where the tensor is to be.

        Raises:
            FileNotFoundError: there is no such file.
            RuntimeError: a file that `save` did not write.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
                told, start, column = (found[name] for name in (_KEY, "start", "column"))
        except (ValueError, KeyError, EOFError, BadZipFile, TypeError, AttributeError) as error:
            raise RuntimeError(
                f"{os.fspath(path)!r} was not written by Sparsity.save ({error}); of a matrix that SciPy saved, "
                "jactri.Sparsity.of(scipy.sparse.load_npz(path)) is one"
            ) from None
        if not _sound(told, start, column):
            raise RuntimeError(
                f"{os.fspath(path)!r} does not hold together: it was written to since"
            )
        rows, per_sample, *shape = told.tolist()
        matrix = Csr(start, column, prod(shape[rows:]))
        return _of(matrix, tuple(shape), rows, bool(per_sample), device)

    def to_scipy(self) -> Any:
        """The matrix of output entries by input entries, a boolean ``scipy.sparse.csr_array``.

        Raises:
            ModuleNotFoundError: SciPy is not installed.
        """
        return to_scipy(self).tocsr()

    def _picture(self, cells: tuple[int, int]) -> Picture:
        matrix = matrix_of(self)
        row, column = map(torch.from_numpy, (matrix.row, matrix.column))
        return spy(row, column, matrix.shape, cells)

    def _parts(self) -> list[str | Picture]:
        total, dense = self.nnz, prod(self.shape)
        text = (
            f"Sparsity(shape {tuple(self.shape)} on {self.device}: {total} of {dense} entries can be non-zero"
            + (f", {total / dense:.3g} of them" if dense else "")
            + f"; {si(self._indices().nbytes + total)}B)"
        )
        return [text, self._picture((64, 64))]


def _sound(told: np.ndarray, start: np.ndarray, column: np.ndarray) -> bool:
    """Whether numbers from a file are those of a pattern."""
    if any(t.ndim != 1 or t.dtype != np.int64 for t in (told, start, column)) or len(told) < 2:
        return False
    rows, per_sample, *shape = told.tolist()
    if not 0 <= per_sample <= min(1, rows) <= rows <= len(shape) or min(shape, default=0) < 0:
        return False
    matrix = Csr(start, column, prod(shape[rows:]))
    if matrix.height != prod(shape[:rows]) or start[0] or (matrix.counts < 0).any():
        return False
    within = (column >= 0) & (column < matrix.width)
    return start[-1] == len(column) and bool(within.all() and (np.diff(matrix.keys) > 0).all())


def of_mask(mask: Tensor, rows: int, per_sample: bool = False) -> Sparsity:
    """The pattern of a coalesced mask."""
    found = Tensor._make_subclass(Sparsity, mask)
    found.rows, found.per_sample, found._matrices = rows, bool(per_sample), {}
    return found


def matrix_of(pattern: Sparsity, samples: int | None = None) -> Csr:
    """Output entries by input entries; with ``samples``, which are above one another: what any of them has."""
    key = samples, _version(pattern)
    if key not in pattern._matrices:
        outer, inner = pattern.shape[: pattern.rows], pattern.shape[pattern.rows :]
        if samples is None:
            index = pattern._indices().cpu().numpy()
            row, column = _flat(index[: len(outer)], outer), _flat(index[len(outer) :], inner)
            found = Csr.of(row, column, prod(outer), prod(inner))
        else:
            found = _of_sample(matrix_of(pattern), samples, prod(outer[1:]))
        pattern._matrices[key] = found
    return pattern._matrices[key]


def _version(pattern: Sparsity) -> int:
    """Another one once it, or its indices, were written to."""
    return 0 if pattern.is_inference() else pattern._version


def _of(
    matrix: Csr, shape: tuple[int, ...], rows: int, per_sample: bool, device: Any = "cpu"
) -> Sparsity:
    out, into = (
        unravel(torch.from_numpy(at), end)
        for at, end in ((matrix.row, shape[:rows]), (matrix.column, shape[rows:]))
    )
    hits = torch.ones(matrix.nnz, dtype=torch.bool, device="cpu")
    mask = torch.sparse_coo_tensor(
        torch.cat([out, into]), hits, shape, device="cpu", is_coalesced=True, check_invariants=False
    )
    found = of_mask(mask.to(device), rows, per_sample)
    found._matrices[None, _version(found)] = matrix
    return found


def _flat(index, shape: tuple[int, ...]) -> np.ndarray:
    """Indices by axis as those of the flattened axes."""
    flat = np.zeros(index.shape[1], np.int64)
    for i, n in zip(index, shape, strict=True):
        flat = flat * n + i
    return flat


# -- patterns of a caller's ------------------------------------------------------------------------


def csr_of(
    pattern: Any,
    out: torch.Size,
    into: torch.Size,
    name: str,
    per_sample: bool = False,
    of: str = "Jacobian",
) -> Csr:
    """A caller's pattern of the Jacobian of ``out`` by ``into`` as a matrix; ``per_sample``: of what any sample has.

    ``of`` is what messages call it. Raises TypeError for what is no pattern, RuntimeError for one of another shape.
    """
    shape = _shape(pattern, name)
    ends = (out[1:], into[1:]) if per_sample else (out, into)
    m, n = (end.numel() for end in ends)
    known = {(*ends[0], *ends[1]): None, (m, n): None}
    if per_sample:
        known = {(*out, *ends[1]): out[0], (out[0], m, n): out[0], **known}
    if shape not in known:
        raise RuntimeError(_misfit(pattern, name, shape, known, (m, n), per_sample, of))
    samples = known[shape]
    height = m * (1 if samples is None else samples)
    if isinstance(pattern, Sparsity):
        at = pattern.rows
        if (prod(shape[:at]), prod(shape[at:])) == (height, n):
            return matrix_of(pattern, samples)
    matrix = _matrix(pattern, height, n)
    return matrix if samples is None else _of_sample(matrix, samples, m)


def _of_sample(matrix: Csr, samples: int, height: int) -> Csr:
    """What any sample has, of a matrix with the samples above one another."""
    if samples == 1:
        return matrix
    return Csr.of(matrix.row % max(height, 1), matrix.column, height, matrix.width)


def _shape(pattern: Any, name: str) -> tuple[int, ...]:
    """Its shape. Raises TypeError for what is no pattern."""
    if isinstance(pattern, (Tensor, np.ndarray)):
        tensor = isinstance(pattern, Tensor)
        sparse = tensor and pattern.layout is not torch.strided
        if not sparse and pattern.dtype != (torch.bool if tensor else bool):
            raise TypeError(
                f"{name} must be boolean, got {'a tensor' if tensor else 'an array'} of {pattern.dtype}: the entries "
                "of a Jacobian J that are not zero are J != 0"
            )
        if sparse and not isinstance(pattern, Sparsity) and pattern.dense_dim():
            raise TypeError(
                f"{name} is a sparse tensor with {pattern.dense_dim()} dense axes; pass pattern.to_dense() != 0, or "
                "one without them"
            )
    elif not (hasattr(pattern, "tocsr") and hasattr(pattern, "shape")):
        raise TypeError(
            f"{name} must be what jactri.sparsity returns, a boolean tensor or array, a sparse tensor or a SciPy "
            f"matrix, got {type(pattern)}"
        )
    return tuple(pattern.shape)


def _misfit(
    pattern: Any,
    name: str,
    shape: tuple,
    known: dict,
    size: tuple[int, int],
    per_sample: bool,
    of: str,
) -> str:
    """The message for a pattern of another shape than those that are known."""
    m, n = size
    if shape == (n, m):
        remedy = f"pass {name}.T, whose rows are outputs"
    elif prod(shape) == m * n and isinstance(pattern, (Tensor, np.ndarray)):
        remedy = f"pass {name}.reshape({m}, {n}) if its entries are in that order"
    elif of != "Jacobian":  # sparsity(func, inputs) is that of the first derivative
        remedy = f"leave {name} out, and it is found"
    else:
        option = ", per_sample=True" if per_sample else ""
        remedy = f"jactri.sparsity(func, inputs{option}) finds one"
    one, *others = dict.fromkeys(map(str, known))
    expected = f"{one}, the {of}'s" + "".join(f", or {o}" for o in others)
    return f"{name} has shape {shape}; expected {expected}; {remedy}"


def _matrix(pattern: Any, rows: int, columns: int) -> Csr:
    """A pattern of ``rows * columns`` entries, in their order."""
    if not isinstance(pattern, (Tensor, np.ndarray)):  # of SciPy
        found = pattern.tocsr()
        counts = np.diff(found.indptr)
        row, column = np.arange(len(counts)).repeat(counts), np.asarray(found.indices)
        return Csr.of(row, column.astype(np.int64), rows, columns)
    if isinstance(pattern, np.ndarray) or pattern.layout is torch.strided:
        mask = pattern.detach().cpu().numpy() if isinstance(pattern, Tensor) else pattern
        return Csr.of_dense(np.asarray(mask).reshape(rows, columns))
    if pattern.layout is not torch.sparse_coo:
        pattern = pattern.detach().to_sparse(layout=torch.sparse_coo)
    flat = _flat(pattern._indices().cpu().numpy(), tuple(pattern.shape))
    row, column = np.divmod(flat, max(columns, 1))
    return Csr.of(row, column, rows, columns)
