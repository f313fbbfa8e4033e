"""`linearize`: the Jacobian at a point as an operator, of a function that runs once and a graph that is read once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..base.memory import Budget, si
from ..base.remedies import one_of
from ..base.tables import Shown, Table
from ..prologue.arguments import Options, as_tuple, check_blocksize, taken
from ..prologue.running import prepare, public
from ..read import handover
from . import gram
from .api import nest
from .diagonal import check_shape, diagonal_of
from .recording import Recording, turned
from .singular import BLOCKS, LEAST, basis_bytes, leading
from .vectors import check_vectors


@public
def linearize(
    func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    *,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
) -> Linearization:
    """The Jacobian of ``func`` at ``inputs`` as an operator: ``func`` runs once, products with it as often as you like.

    Its graph is read once and lives as long as the operator; plans are made at the first product of ``K`` vectors, and
    remembered. ``torch.func.linearize`` runs the function twice, and has no transpose.

    Args:
        func: takes the tensors of ``inputs``, returns a tensor or a tuple of tensors.
        inputs: a real floating-point tensor or a tuple of them. They are not modified.
        chunk_size: how many vectors, or seeds, run at once in a method.
        memory_limit: bytes (or ``"2GB"``) that a method may allocate, its result included.
        backend: as of `jacobian`.

    Returns:
        A `Linearization`, all of whose results are detached: for products that can be differentiated, call `jvp` or
        `vjp` with ``create_graph=True``. Overrides that are in force hold for all that is computed with it.

    Raises:
        TypeError: inputs or outputs that are not tensors or tuples of them.
        RuntimeError: integer or complex inputs; complex outputs; inside of a ``torch.func`` transform.
        IndexError: an empty tuple of inputs or outputs.
        ValueError: ``chunk_size`` below 1, an unknown backend.

    Cost:
        One forward pass and the memory of its graph; from the first product on, that of derivatives of elementwise ops,
        about as much as autograd saved for these. A product of ``K`` vectors: about as many flops as ``K`` forward or
        backward passes to the inputs.

    Examples:
        >>> net, x = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)), torch.randn(8, 3)
        >>> op = jactri.linearize(net, x)
        >>> op.shape, op.output.shape
        ((16, 24), torch.Size([8, 2]))
        >>> v, u = torch.randn(8, 3), torch.randn(8, 2)
        >>> (op @ v).shape, (op.T @ u).shape
        (torch.Size([8, 2]), torch.Size([8, 3]))
        >>> torch.allclose((u * (op @ v)).sum(), ((op.T @ u) * v).sum(), atol=1e-4)
        True
    """
    asked = Options(False, chunk_size, memory_limit, backend)
    tupled, xs = taken("linearize", inputs, asked)
    Budget(memory_limit, torch.device("cpu"))  # raises for what is no limit
    _check_real("inputs", xs)
    if handover.transforming(xs):
        raise RuntimeError(
            "linearize is not available inside of a torch.func transform; use torch.func.linearize there"
        )
    ran = prepare(func, xs, False, "linearize")
    if not ran.ys:
        raise IndexError("outputs is an empty tuple: return at least one tensor")
    _check_real("outputs", ran.ys)
    return Linearization(Recording(ran, xs, tupled, asked))


def _check_real(of: str, tensors: Sequence[Tensor]) -> None:
    for i, t in enumerate(tensors):
        if t.is_complex():
            remedy = (
                "pass torch.view_as_real(x), and make it complex inside of func"
                if of == "inputs"
                else "return torch.view_as_real(output)"
            )
            raise RuntimeError(
                f"linearize takes real {of}, but {of}[{i}] is {t.dtype}, whose Jacobian is not one real-linear matrix; "
                f"{remedy}"
            )


class Linearization(Shown):
    """The Jacobian ``J`` of a function at a point, which is not formed until it is asked for: see `linearize`.

    ``op @ v`` takes a vector nested as the inputs, each of its input's shape, and gives one nested as the output.
    Several vectors are columns, on a last axis: ``(*in, K)`` to ``(*out, K)``, for inputs of one axis the product of
    matrices. ``op.T @ u`` is the product with the transpose, ``(*out, K)`` to ``(*in, K)``. From the left vectors are
    rows, on a first axis: ``u @ op`` takes ``(K, *out)`` to ``(K, *in)``, as `vjp` does. `matvec` and `matmat` take
    all entries of all inputs as one axis, as SciPy does.

    The graph lives as long as the operator (or its transpose). Where an input, output, weight, or what an op saved was
    written to in place, all methods raise RuntimeError, as autograd does, by its version counters: what these do not
    see (``.data``, NumPy, optimizers with ``fused=True``) is not noticed.

    Examples:
        >>> op = jactri.linearize(lambda x: x.cumsum(0).sin(), torch.zeros(3))
        >>> op.dense()
        tensor([[1., 0., 0.],
                [1., 1., 0.],
                [1., 1., 1.]])
        >>> op @ torch.tensor([1.0, 2.0, 3.0])
        tensor([1., 3., 6.])
        >>> torch.allclose(op.T @ torch.eye(3), op.dense().T)  # three columns
        True
    """

    __array_ufunc__ = None  # an array's @ leaves it to us

    def __init__(self, point: Recording, transposed: bool = False):
        self._point, self._transposed = point, transposed

    # -- what it is -------------------------------------------------------------------------------

    @property
    def output(self) -> Any:
        """That of the function, detached. To write to it would be to write to what the graph holds: clone it first."""
        return self._point.output

    @property
    def shape(self) -> tuple[int, int]:
        """How many entries the outputs and the inputs have; of the transpose, the inputs and the outputs."""
        m, n = (sum(t.numel() for t in end) for end in (self._point.ys, self._point.xs))
        return (n, m) if self._transposed else (m, n)

    @property
    def dtype(self) -> torch.dtype:
        """The one that holds those of all inputs and outputs."""
        made = self._point.xs[0].dtype
        for t in (*self._point.xs, *self._point.ys):
            made = torch.promote_types(made, t.dtype)
        return made

    @property
    def device(self) -> torch.device:
        """That of the first input."""
        return self._point.xs[0].device

    @property
    def T(self) -> Linearization:
        """The transpose, of the same graph."""
        return Linearization(self._point, not self._transposed)

    def _parts(self) -> list[str | Table]:
        m, n = self.shape
        what = "the transpose of a Jacobian" if self._transposed else "a Jacobian"
        size = si(m * n * self.dtype.itemsize)
        rows = [
            (f"{name[:-1]} {i}", str(tuple(t.shape)), str(t.dtype), str(t.device))
            for name, ends in (("inputs", self._point.xs), ("outputs", self._point.ys))
            for i, t in enumerate(ends)
        ]
        text = f"Linearization({m} x {n}, {self.dtype} on {self.device}: {what}, formed {size}B)"
        return [text, Table(("", "shape", "dtype", "device"), rows)]

    def __reduce_ex__(self, protocol) -> NoReturn:
        raise TypeError(
            "a Linearization holds autograd's graph, which cannot be copied or pickled: save A = op.dense(), "
            "op.sparse(torch.sparse_csr), or the factors of op.svd(k); jactri.linearize(lambda v: A @ v, x) is then an "
            "operator again"
        )

    # -- products ---------------------------------------------------------------------------------

    @public
    def __matmul__(self, v: Tensor | tuple[Tensor, ...]) -> Any:
        return self._product(v, self._transposed, True)

    @public
    def __rmatmul__(self, u: Tensor | tuple[Tensor, ...]) -> Any:
        return self._product(u, not self._transposed, False)

    def _product(self, vectors, reverse: bool, last: bool):
        point = self._point
        of, ends = point.ends(reverse)
        if isinstance(vectors, Linearization):
            raise TypeError(
                "a Linearization multiplies tensors, not another one: op.gram() is op.T @ op, op.T.gram() is "
                "op @ op.T, and op.to_scipy() @ other.to_scipy() is an operator"
            )
        _, vs = as_tuple(vectors, "vectors", "a Linearization's @")
        block = check_vectors("vectors", vs, of, ends, last)
        columns = block and last
        blocks = [v.movedim(-1, 0) if columns else v if block else v.unsqueeze(0) for v in vs]
        made = [
            m.movedim(0, -1) if columns else m if block else m.squeeze(0)
            for m in point.times(blocks, reverse)
        ]
        tupled = point.tupled if reverse else point.ran.tupled
        return point.ran.dressed(tuple(made) if tupled else made[0], point.given)

    @public
    def matvec(self, v: Tensor) -> Tensor:
        """The product with one vector of all entries, ``(n,)`` to ``(m,)`` for a `shape` of ``(m, n)``.

        Args:
            v: the entries of all inputs, one input after the other.

        Raises:
            RuntimeError: another shape, dtype or device.
        """
        self._check_flat(v, 1)
        return self._flat(v.unsqueeze(1)).squeeze(1)

    @public
    def matmat(self, v: Tensor) -> Tensor:
        """The product with the columns of a matrix, ``(n, K)`` to ``(m, K)`` for a `shape` of ``(m, n)``, at once.

        Args:
            v: in each column the entries of all inputs, one input after the other.

        Raises:
            RuntimeError: another shape, dtype or device.
            ValueError: a ``memory_limit`` too small for one column.
        """
        self._check_flat(v, 2)
        return self._flat(v)

    def _flat(self, v: Tensor, turned: bool = False, spent: float = 0.0) -> Tensor:
        """The product with columns, or ``turned`` that of the transpose."""
        return self._point.flat(v.mT, self._transposed != turned, spent).mT.to(self.dtype)

    def _check_flat(self, v: Any, dims: int) -> None:
        n = self.shape[1]
        want = f"({n},)" if dims == 1 else f"({n}, K)"
        if not isinstance(v, Tensor):
            raise TypeError(
                f"v must be a tensor {want} of the entries of all ends one after the other, got {type(v)}; op @ v "
                "takes tuples, and op.to_scipy() arrays"
            )
        if v.dim() != dims or v.shape[0] != n or not v.is_floating_point():
            raise RuntimeError(
                f"v has shape {tuple(v.shape)} and dtype {v.dtype}; expected a real floating-point tensor {want}, the "
                "entries of all ends one after the other (op @ v takes each in its shape)"
            )
        if v.device != self.device:
            raise RuntimeError(
                f"v is on {v.device}; expected {self.device}; pass v.to({str(self.device)!r})"
            )

    # -- formed -----------------------------------------------------------------------------------

    @public
    def dense(self, per_sample: bool | str = False) -> Any:
        """The Jacobian as `jacobian` returns it: ``(*out, *in)``; of the transpose ``(*in, *out)``.

        Args:
            per_sample: the blocks of samples that do not mix, ``(N, *out, *in)``, as of `jacobian`.

        Raises:
            RuntimeError: under ``per_sample``, samples that mix.
            ValueError: a ``memory_limit`` that is too small, no common batch axis under ``per_sample``.
        """
        made = self._formed(self._point.rows(per_sample=per_sample), bool(per_sample))
        return self._point.ran.dressed(made, self._point.given)

    def _formed(self, rows, per_sample: bool = False, layout: torch.layout = torch.strided):
        """Blocks ``rows[output][input]``, nested as asked for."""
        point = self._point
        if not self._transposed:
            return nest(rows, point.ran.tupled, point.tupled)
        rows = [
            [
                turned(row[i], y.dim() - per_sample, x.dim() - per_sample, layout)
                for row, y in zip(rows, point.ys, strict=True)
            ]
            for i, x in enumerate(point.xs)
        ]
        return nest(rows, point.tupled, point.ran.tupled)

    @public
    def sparse(
        self,
        layout: torch.layout | str = torch.sparse_coo,
        blocksize: tuple[int, int] | None = None,
    ) -> Any:
        """The entries that can be non-zero, as `jacobian` with a ``layout`` returns them.

        Args:
            layout: ``torch.sparse_coo``, of the shape of `dense`, or ``torch.sparse_csr``, ``sparse_csc`` or
                ``sparse_bsr``, a matrix of the entries of an output and an input, or, not of a transpose, ``"banded"``.
            blocksize: of ``torch.sparse_bsr``, rows and columns of a block (of the transpose: its own).

        Raises:
            ValueError: every entry can be non-zero (the op is named), another layout, a ``blocksize`` that does not
                divide the matrix.
        """
        if layout is torch.strided or (layout == "banded" and self._transposed):
            known = "torch.sparse_coo, torch.sparse_csr, torch.sparse_csc or torch.sparse_bsr"
            raise ValueError(
                f"layout must be {known}, or of what is not transposed 'banded', got {layout!r}"
            )
        if self._transposed and blocksize is not None:
            check_blocksize(blocksize, "bsr")
            blocksize = blocksize[::-1]
        rows = self._point.rows(layout=layout, blocksize=blocksize)
        return self._formed(rows, layout=layout)

    @public
    def diagonal(self) -> Tensor:
        """``d out_i / d x_i``, as `jactri.diagonal`, of one input and one output of its shape.

        Raises:
            TypeError: several inputs or outputs.
            RuntimeError: shapes that differ.
        """
        point = self._point
        if point.tupled:
            raise TypeError(
                f"diagonal needs one input, got a tuple of {len(point.xs)}: linearize in one of them"
            )
        check_shape(point.ys if point.ran.tupled else point.ran.result, point.xs[0])
        asked = point.asked
        budget = Budget(asked.memory_limit, self.device)
        made = point.run(lambda: diagonal_of(point.ys[0], point.xs[0], asked, budget))
        return point.ran.dressed(made, point.given)

    @public
    def gram(
        self,
        weight: Tensor | tuple[Tensor | None, ...] | None = None,
        per_sample: bool | str = False,
    ) -> Any:
        """``J^T M J``, as `jtj` returns it; of the transpose ``J M J^T``, as `jjt`.

        Args:
            weight: M, nested as the outputs (of the transpose: as the inputs), as of `jtj`.
            per_sample: one matrix a sample, as of `jtj`.

        Raises:
            TypeError, RuntimeError, ValueError: as by `jtj`.
        """
        point, kind = self._point, "jjt" if self._transposed else "jtj"
        for w in weight if isinstance(weight, tuple) else (weight,):
            if w is not None:
                as_tuple(w, "weight", kind)
        asked = point.options(per_sample=per_sample)
        rows = point.run(lambda: gram.rows_of(kind, point.ys, point.xs, weight, asked))
        rows = point.ran.dressed(rows, point.given)
        return gram.nested(kind, rows, point.tupled, point.ran.tupled, None, False)

    # -- its size ---------------------------------------------------------------------------------

    @public
    def norm(self, ord: str | int = "fro", tol: float | None = None) -> Tensor:
        """A norm of the matrix, as a tensor without axes.

        Args:
            ord: ``"fro"``, the root of the sum of all squares, exact to rounding; or ``2``, the largest singular value.
            tol: of the latter, as of `svd`.

        Raises:
            ValueError: another ``ord``, a ``memory_limit`` that is too small.
            LinAlgError: as by `svd`.

        Cost:
            ``"fro"``: products with as many vectors as the smaller side has entries, some at a time; with as many as
            that of one sample, where these are proven not to mix. ``2``: that of `svd`.
        """
        if ord == "fro":
            return self._point.frobenius().to(self.dtype)
        if ord != 2 or isinstance(ord, bool):
            raise ValueError(one_of("ord", ord, ("fro", 2)))
        if not all(self.shape):
            return torch.zeros((), dtype=self.dtype, device=self.device)
        return self.svd(1, tol)[1][0]

    @public
    def svd(self, k: int, tol: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The ``k`` largest singular values and their vectors, ``(U, S, V)``, as of ``torch.svd_lowrank``.

        ``U`` is ``(m, k)``, ``S`` ``(k,)`` in descending order, ``V`` ``(n, k)``, for a `shape` of ``(m, n)``: the best
        approximation of rank ``k`` is ``U @ S.diag() @ V.T``. Reshape ``V[:, i]`` to the input for the direction that
        the output is most sensitive to.

        Args:
            k: at least 1, at most the smaller side.
            tol: the residuals ``|J^T u - s v|`` end below ``tol * S[0]``; each entry of S is then no farther than that
                from a singular value, mostly than its square. None: the root of the eps of the coarsest dtype that the
                function computes in.

        Raises:
            ValueError: a ``k`` or a ``tol`` out of range, a ``memory_limit`` that is too small.
            LinAlgError: no convergence in 200 passes (values that are nearly one, and a small ``tol``); entries that
                are not finite.

        Cost:
            A pass is a product with ``k + 6`` tangents and one with as many cotangents (Halko, Martinsson and Tropp
            2011; Baglama and Reichel 2005): some 10 where the values decay, 30 for a random matrix, more the closer
            the largest are. Memory for about ``30 (k + 6)`` vectors of either side, or for a quarter under a
            ``memory_limit``, which takes more passes. The start is random, and the same every time; torch's generators
            are left alone.

        Examples:
            >>> op = jactri.linearize(lambda x: x * torch.tensor([3.0, 2.0, 1.0]), torch.zeros(3))
            >>> U, S, V = op.svd(2)
            >>> torch.allclose(S, torch.tensor([3.0, 2.0]), atol=1e-5)
            True
        """
        least = min(self.shape)
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= least:
            raise ValueError(
                f"k must be an integer from 1 to {least}, the smaller of {self.shape}, got {k!r}"
            )
        own = self.dtype
        if tol is not None and not (isinstance(tol, (int, float)) and tol > 0):
            raise ValueError(f"tol must be a number above 0 or None, got {tol!r}")
        tol = self._point.coarsest**0.5 if tol is None else tol
        wide = torch.promote_types(own, torch.float32)
        budget, blocks = Budget(self._point.asked.memory_limit, self.device), BLOCKS
        while blocks > LEAST and 2 * basis_bytes(self.shape, k, wide, blocks) > budget.left:
            blocks -= 1
        spent = basis_bytes(self.shape, k, wide, blocks)  # half is for products
        budget.check("svd", 2 * spent)

        def push(v: Tensor) -> Tensor:
            return self._flat(v, spent=spent)

        def pull(u: Tensor) -> Tensor:
            return self._flat(u, True, spent)

        made = self._point.run(
            lambda: leading(push, pull, self.shape, k, tol, wide, self.device, blocks)
        )
        u, s, v = (t.to(own) for t in made)
        return u, s, v

    # -- elsewhere --------------------------------------------------------------------------------

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator``, with ``matvec``, ``rmatvec``, ``matmat`` and ``rmatmat``.

        For LSQR, LSMR, GMRES, ``svds`` and the like. Vectors are real NumPy arrays on the CPU, in the operator's dtype
        (float32 for half ones), copied to its device and back.

        Raises:
            ModuleNotFoundError: SciPy is not installed.
        """
        from scipy.sparse.linalg import LinearOperator

        wide = self.dtype if self.dtype.itemsize > 2 else torch.float32

        def product(turned: bool):
            def call(v):
                given = torch.tensor(v, device=self.device)
                if given.is_complex():
                    raise RuntimeError(
                        f"a vector is complex ({given.dtype}), but the Jacobian is {self.dtype}; pass its real and its "
                        "imaginary part"
                    )
                columns = given.unsqueeze(1) if given.dim() == 1 else given
                made = (self.T if turned else self).matmat(columns.to(self.dtype))
                return made.to(wide).cpu().numpy().reshape(len(made), *v.shape[1:])

            return call

        to, back = product(False), product(True)
        return LinearOperator(
            self.shape, matvec=to, rmatvec=back, matmat=to, rmatmat=back,
            dtype=str(wide).removeprefix("torch."),
        )  # fmt: skip
