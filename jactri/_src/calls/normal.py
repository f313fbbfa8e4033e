"""`normal_equations`: ``J^T M J`` and ``J^T M r`` of residuals with a sparse Jacobian, by its blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..base.classes import plain
from ..base.memory import Budget, si
from ..base.scipy_arrays import as_numpy
from ..base.tables import Picture, Shown, Table
from ..meet.normal import Rows, block_diagonal, gradient, gram
from ..prologue.arguments import Options, as_tuple, check_real, taken
from ..prologue.patterns import taken_pattern
from ..prologue.running import Ran, computing, prepare, public
from ..read import handover
from ..run.blocks import Blocks, Sizes, variable
from ..run.solvers import to_scipy
from .api import compute, nest


@public
def normal_equations(
    func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    weight: Tensor | tuple[Tensor | None, ...] | None = None,
    *,
    layout: torch.layout = torch.sparse_bsr,
    blocksize: int | tuple[int, ...] | None = None,
    pattern: Any = None,
    check: bool = False,
    strategy: str = "auto",
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
) -> NormalEquations:
    """The normal equations of least squares, ``J^T M J d = -J^T M r``, of residuals whose Jacobian is sparse.

    For bundle adjustment, pose graphs, mesh and curve fitting: each residual knows a few variables. ``func`` runs once,
    J is computed by its entries that can be non-zero (see `sparsity`), and the products are of its blocks: nothing is
    dense. With several inputs, as cameras and points, the matrix comes as blocks of inputs, which is what a Schur
    complement needs. In a loop over the same indices, patterns and plans are remembered.

    Args:
        func: takes the tensors of ``inputs``, returns the residuals r as a tensor or a tuple of tensors.
        inputs: a real floating-point tensor or a tuple of them. They are not modified.
        weight: M. None for the identity; of the residuals' shape for a diagonal; for residuals ``(..., r)`` a matrix
            for each r, ``(..., r, r)``, with ``torch.sparse_bsr``; nested as the outputs, None allowed for some.
        layout: of the matrices: ``torch.sparse_bsr``, or ``torch.sparse_csr``, ``torch.sparse_csc`` with no entry that
            cannot be non-zero.
        blocksize: of ``torch.sparse_bsr``, how many entries of an input, one after another, are one variable; for
            several inputs a tuple. By default the last axis of an input that has others, else 1.
        pattern: the entries of J that can be non-zero, where they are known, as of `jacobian`. It may be any function
            then, and nothing has to be found.
        check: test the pattern, as of `jacobian`.
        strategy: the order of accumulation of J, as of `jacobian`.
        chunk_size: how many seeds run at once.
        memory_limit: bytes (or ``"2GB"``) that J may take to be computed, and the matrix beside it.
        backend: as of `jacobian`.

    Returns:
        A `NormalEquations`, whose results are detached.

    Raises:
        TypeError: inputs, outputs or weights that are not tensors (or None) or tuples of them; a ``blocksize`` that is
            no integer.
        RuntimeError: integer or complex inputs; complex outputs; a weight that does not match an output; inside of a
            ``torch.func`` transform.
        ValueError: every entry of J can be non-zero (the op is named), as far as is known, and J is not small (the
            block of an input that all residuals depend on may be dense); another layout; a ``blocksize`` that does not
            divide an input; a ``memory_limit`` that is too small; under ``check``, an entry that the pattern
            leaves out.

    Cost:
        That of the sparse Jacobian. The matrix: ``2 r k^2`` flops and ``k^2`` entries moved for ``r`` residuals that
        share ``k`` entries of the inputs; memory for it, for J, and 4 bytes of indices for a pair of blocks.

    Examples:
        A chain of points, held at one end, that want to be 1 apart and to stay near where they are:

        >>> at = torch.randn(6, 2)
        >>> i = torch.arange(5)
        >>> def residuals(p):
        ...     return (p[i + 1] - p[i]).norm(dim=1) - 1, 0.1 * (p - at)
        >>> found = jactri.normal_equations(residuals, at)
        >>> found.matrix.shape, found.matrix.values().shape  # blocks of neighbours
        (torch.Size([12, 12]), torch.Size([16, 2, 2]))
        >>> J = torch.cat([j.reshape(-1, 12) for j in torch.autograd.functional.jacobian(residuals, at)])
        >>> torch.allclose(found.matrix.to_dense(), J.T @ J, atol=1e-5)
        True
        >>> r = torch.cat([r.flatten() for r in found.residual])
        >>> torch.allclose(found.gradient.flatten(), J.T @ r, atol=1e-5)
        True
        >>> found.block_diagonal().shape  # a preconditioner
        torch.Size([6, 2, 2])
    """
    asked = Options(
        False, chunk_size, memory_limit, backend, False, strategy, layout=layout, pattern=pattern, check=check,
    )  # fmt: skip
    return equations("normal_equations", func, inputs, weight, asked, blocksize)


class NormalEquations(Shown):
    """``J^T M J d = -J^T M r`` at a point: see `normal_equations`. What is not asked for is not computed.

    J, and nothing of its graph, lives as long as this does.

    Examples:
        >>> x = torch.linspace(-1, 1, 6)
        >>> found = jactri.normal_equations(lambda x: x[1:] * x[:-1], x, layout=torch.sparse_csr)
        >>> found.matrix.layout, found.matrix.values().numel()  # three diagonals
        (torch.sparse_csr, 16)
        >>> J = found.jacobian.to_dense()
        >>> torch.allclose(found.matrix.to_dense(), J.T @ J)
        True
        >>> torch.allclose(found.gradient, J.T @ found.residual)
        True
    """

    def __init__(
        self,
        ran: Ran,
        xs: tuple[Tensor, ...],
        tupled: bool,
        weights: list[Tensor | None],
        rows: Rows,
        asked: Options,
        form: str,
    ):
        self._tupled_out, self._tupled = ran.tupled, tupled
        self._shapes = [x.shape for x in xs]
        self._ys = [y if asked.create_graph else y.detach() for y in ran.ys]
        self._residual = ran.output(asked.create_graph)
        self._weights, self._rows, self._asked, self._form = weights, rows, asked, form

    @property
    def residual(self) -> Any:
        """``r``, what the function returned."""
        return self._residual

    @cached_property
    def jacobian(self) -> Any:
        """J in the layout that was asked for, ``J[j][i]``, nested as of `jacobian`.

        In ``torch.sparse_bsr`` its blocks have the rows of the residuals' last axis and the columns of a variable.
        """
        rows = [[b.to(self._form) for b in row] for row in self._rows]
        return nest(rows, self._tupled_out, self._tupled)

    @cached_property
    def matrix(self) -> Any:
        """``J^T M J``: sparse, of all entries of an input by all of another; of several inputs ``H[i][k]``.

        Entries are those of the pattern, zeros among them included. Exactly symmetric where M is.
        """
        with self._computing():
            budget = Budget(self._asked.memory_limit, self._ys[0].device)
            made = gram(self._rows, self._weights, budget)
        found = tuple(tuple(b.to(self._form) for b in row) for row in made)
        return found if self._tupled else found[0][0]

    @cached_property
    def gradient(self) -> Any:
        """``J^T M r``, of the inputs' shapes: the gradient of half of ``r^T M r``."""
        with self._computing():
            vs = [
                y.reshape(-1, row[0].size[0]) for y, row in zip(self._ys, self._rows, strict=True)
            ]
            made = tuple(
                gradient(self._rows, self._weights, vs, i).view(shape)
                for i, shape in enumerate(self._shapes)
            )
        return made if self._tupled else made[0]

    def block_diagonal(self) -> Any:
        """The blocks on the diagonal of ``J^T M J``, ``(variables, c, c)`` for variables of ``c`` entries, by input.

        For a preconditioner, or to eliminate variables. They are zero where no residual knows the variable. The rest of
        the matrix is not computed.
        """
        with self._computing():
            made = tuple(
                block_diagonal(self._rows, self._weights, i) for i in range(len(self._shapes))
            )
        return made if self._tupled else made[0]

    def to_scipy(self) -> tuple[Any, Any]:
        """``(H, g)`` for a solver: ``J^T M J`` of all inputs as one ``scipy.sparse`` array, ``J^T M r`` as a vector.

        All entries of an input come one after another, and so do the inputs. H is what `jactri.to_scipy` makes of
        `matrix`, g is NumPy's.

        Raises:
            ModuleNotFoundError: SciPy is not installed.
        """
        made = self.gradient if self._tupled else (self.gradient,)
        whole = torch.cat([g.reshape(-1).to(made[0].device) for g in made])
        return to_scipy(self.matrix), as_numpy(whole)

    def _computing(self) -> computing:
        return computing(self._asked.create_graph, self._asked.backend)

    def _parts(self) -> list[str | Table | Picture]:
        residuals, unknowns = (sum(b.shape[k] for b in bs) for k, bs in enumerate(self._ends()))
        blocks = [b for row in self._rows for b in row]
        size = sum(b.values.nbytes for b in blocks)
        y = self._ys[0]
        text = (
            f"NormalEquations({residuals} residuals, {unknowns} unknowns, {y.dtype} on {y.device}: "
            f"J has {sum(b.values.numel() for b in blocks)} entries that can be non-zero, values {si(size)}B)"
        )
        lines = [
            (
                str(j),
                str(i),
                f"{b.shape[0]} x {b.shape[1]}",
                f"{len(b.column)} of {b.size[0]} x {b.size[1]}",
            )
            for j, row in enumerate(self._rows)
            for i, b in enumerate(row)
        ]
        return [text, Table(("residual", "input", "matrix", "blocks"), lines)]

    def _ends(self) -> tuple[list[Blocks], list[Blocks]]:
        """One block of every output, and of every input."""
        return [row[0] for row in self._rows], list(self._rows[0])


_KNOWN = ("bsr", "csr", "csc")


def equations(
    call: str, func, inputs, weight, asked: Options, blocksize: int | tuple[int, ...] | None
) -> NormalEquations:
    """The normal equations for a public call of that name."""
    tupled, xs = taken(call, inputs, asked)
    if asked.form not in _KNOWN:
        dense = (
            " (without blocksize, jactri.jtj gives a dense matrix)" if asked.form == "dense" else ""
        )
        raise ValueError(
            f"the layout of {call} must be torch.sparse_bsr, torch.sparse_csr or torch.sparse_csc, got "
            f"{asked.layout!r}{dense}"
        )
    if asked.per_sample:
        raise ValueError(
            "per_sample and a sparse layout exclude each other: without per_sample, samples that do not mix are blocks "
            "on the diagonal of the matrix"
        )
    columns = _variables(blocksize, xs, asked.form)
    weights = weight if isinstance(weight, tuple) else (weight,)
    for w in weights:
        if w is not None:
            as_tuple(w, "weight", call)
    if handover.transforming((*xs, *(w for w in weights if w is not None))):
        raise RuntimeError(
            f"{call} with layout={asked.layout} is not possible inside of a torch.func transform"
        )
    ran = prepare(func, xs, asked.create_graph, call)
    check_real(call, ran.ys, xs)
    rows = tuple(variable(y.shape) if asked.form == "bsr" else 1 for y in ran.ys)
    ready = _weights(weights, ran.ys, rows, asked)
    if asked.pattern is not None:
        asked.pattern = taken_pattern(asked.pattern, ran.ys, ran.leaves, ran.tupled, tupled, False)
    form, asked.form, asked.blocksize = asked.form, "blocks", Sizes(rows, columns)
    made = compute(ran.ys, ran.leaves, asked)
    return NormalEquations(ran, xs, tupled, ready, made, asked, form)


def _variables(blocksize: Any, xs: tuple[Tensor, ...], form: str) -> tuple[int, ...]:
    """How many entries of each input are one variable."""
    if blocksize is None:
        return tuple(variable(x.shape) if form == "bsr" else 1 for x in xs)
    sizes = blocksize if isinstance(blocksize, tuple) else (blocksize,) * len(xs)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in sizes):
        raise TypeError(
            "blocksize must be an integer, how many entries of an input are one variable, or a tuple of one for each "
            f"input, or None, got {blocksize!r}"
        )
    if form != "bsr":
        raise ValueError(
            "blocksize is for layout=torch.sparse_bsr; leave it out, or ask for that layout"
        )
    if len(sizes) != len(xs):
        raise ValueError(f"blocksize={blocksize!r} has {len(sizes)} sizes for {len(xs)} inputs")
    for i, (n, x) in enumerate(zip(sizes, xs, strict=True)):
        if n < 1 or x.numel() % n:
            raise ValueError(
                f"blocksize={blocksize!r}: inputs[{i}] has {x.numel()} entries (shape {tuple(x.shape)}), which are no "
                f"variables of {n}; without blocksize, a variable is as large as the last axis"
            )
    return tuple(sizes)


def _weights(weights, ys, rows: tuple[int, ...], asked: Options) -> list[Tensor | None]:
    """Weights by rows of blocks: ``(count, r)``, or a matrix each, ``(count, r, r)``."""
    if len(weights) == 1 and weights[0] is None:
        weights = weights * len(ys)
    if len(weights) != len(ys):
        raise RuntimeError(
            f"weight must be nested as the outputs: got {len(weights)} for {len(ys)} outputs"
        )
    made: list[Tensor | None] = []
    for j, (w, y, r) in enumerate(zip(weights, ys, rows, strict=True)):
        if w is None:
            made.append(None)
            continue
        shape = tuple(y.shape)
        each = (*shape, shape[-1]) if len(shape) > 1 else None
        if not w.is_floating_point() or tuple(w.shape) not in (shape, each):
            matrices = "" if each is None else f", or {each} for a matrix for each of the last axis"
            raise RuntimeError(
                f"weight for outputs[{j}] has shape {tuple(w.shape)} and dtype {w.dtype}; with a sparse layout, "
                f"expected a floating-point tensor of shape {shape} for a diagonal{matrices}"
            )
        if w.device != y.device:
            raise RuntimeError(
                f"weight for outputs[{j}] is on {w.device}; expected {y.device}, as outputs[{j}] is"
            )
        matrix = tuple(w.shape) != shape
        if matrix and asked.form != "bsr":
            raise ValueError(
                f"weight for outputs[{j}] is a matrix for each of its last axis, which takes layout=torch.sparse_bsr, "
                f"not {asked.layout}"
            )
        w = (plain(w) if asked.create_graph else plain(w).detach()).to(y.dtype)
        made.append(w.reshape(-1, r, r) if matrix else w.reshape(-1, r))
    return made
