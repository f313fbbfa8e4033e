"""`parameter_jacobian`: the Jacobian of a module in its parameters, kept as the factors that it is a product of."""

from __future__ import annotations

from functools import reduce
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..base.memory import OFFER, Budget, Offer, si
from ..base.tables import Shown, Table
from ..parameters import operands
from ..parameters.factored import Factors, inner
from ..parameters.factors import write
from ..parameters.inner import Link, each_with_itself, of_second
from ..parameters.pairs import check_real, flat
from ..parameters.recorded import Recorded
from ..parameters.used import selections
from ..prologue.arguments import Options, check_options
from ..prologue.running import public
from ..spread import weights
from ..spread.kernels import check_proven, of_ranks
from ..spread.shards import ALONE, Share, taken_here
from ..spread.sums import totals, whole_of
from . import whole
from .vectors import pull, push


@public
def parameter_jacobian(
    module: torch.nn.Module,
    x: Tensor | tuple[Tensor, ...],
    params: Any = None,
    *,
    per_sample: bool | str = True,
    create_graph: bool = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
) -> ParameterJacobian:
    """The Jacobian of ``module(x)`` in the module's parameters, not formed until it is asked for.

    The module runs once. For every use of a parameter the result keeps the cotangents of that layer's output and what
    the layer saw, whose product is the Jacobian: an outer product for a Linear layer, patches for a convolution,
    indices for an embedding. Sums over the parameters are contractions of those.

    A complex parameter is a pair of real ones: its Jacobian holds ``d out / d re + i d out / d im``, as autograd's
    gradients do; products with it, and sums over it, go over both, as those of ``torch.view_as_real`` of it would.

    Args:
        module: takes the tensors of ``x``, returns one tensor ``(N, *out)``. It runs as it is: its training flags stay,
            and buffers that the forward pass writes to are put back.
        x: a tensor ``(N, *in)`` or a tuple of them, the first axis a batch of ``N`` samples that do not influence one
            another. This is proven op by op (for integer inputs, from what they look up), or where that cannot tell by
            a probe, as for `jacobian` under ``per_sample``. DTensors, sharded by samples, and plain tensors within
            `jactri.distributed.samples`: results of samples are this rank's, and sums over them go over all ranks.
        params: names, tensors of ``module.parameters()``, or None for all that require grad. A shared parameter is one,
            under its first name (or the one given).
        per_sample: ``"assume"``: it is not proven that samples do not influence one another. The Jacobian is that of
            the output ``n`` in the parameters either way.
        create_graph: results can be differentiated, in parameters and ``x``.
        chunk_size: how many entries of a sample's output run at once.
        memory_limit: bytes (or ``"2GB"``) that a method may allocate, its result included; by default half of what is
            free. Sizes the chunks.

    Returns:
        A `ParameterJacobian`. Factors are computed at first use and kept while they fit; a parameter that was written
        to in between is refused. For weights that are DTensors, each method makes a backward pass a row instead.

    Raises:
        TypeError: ``module`` is no Module; ``x`` or the output is no tensor.
        ValueError: no parameters; names or tensors that are not the module's; no batch axis; a ``memory_limit`` too
            small.
        RuntimeError: parameters that are frozen; samples that mix (the op is named); an output that is not real.

    Cost:
        The forward pass; then for factors one reverse sweep with as many seeds as a sample's output has entries.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> jac = jactri.parameter_jacobian(net, torch.randn(5, 3))
        >>> jac.dense()["0.weight"].shape
        torch.Size([5, 2, 8, 3])
        >>> step = {name: torch.randn_like(p) for name, p in net.named_parameters()}
        >>> (jac @ step).shape  # how the outputs change along it, to first order
        torch.Size([5, 2])
    """
    check_options("auto", chunk_size, None, create_graph)
    share, x, proving = taken_here("parameter_jacobian", "x", x, per_sample, create_graph)
    run = Recorded(module, x, params, create_graph, "parameter_jacobian", per_sample=proving)
    check_proven(run, share)
    return ParameterJacobian(Factors(run, chunk_size, memory_limit), share)


class ParameterJacobian(Shown):
    """The Jacobian of a module's output ``(N, *out)`` in its parameters: see `parameter_jacobian`.

    ``jac @ v`` and ``jac.T @ u`` are products with it; it is formed by `dense` only.

    Attributes:
        output: the module's (detached unless ``create_graph``).

    Examples:
        >>> net = nn.Linear(3, 2)
        >>> jac = jactri.parameter_jacobian(net, torch.randn(5, 3))
        >>> jac.names
        ('weight', 'bias')
        >>> u = torch.randn(5, 2)
        >>> (grad,) = torch.autograd.grad((net(torch.ones(5, 3)) * u).sum(), net.bias)
        >>> torch.allclose((jac.T @ u)["bias"], grad)
        True
        >>> prior = {name: torch.ones_like(p) for name, p in net.named_parameters()}
        >>> jac.variance(prior).shape, jac.gram().shape
        (torch.Size([5, 2, 2]), torch.Size([5, 2, 5, 2]))
    """

    def __init__(self, factors: Factors[Recorded], share: Share = ALONE):
        run = factors.run
        self._factors, self._run, self._share = factors, run, share
        self.output: Tensor = share.rows(run.y if run.create_graph else run.y.detach())

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters."""
        return tuple(self._run.params)

    @property
    def T(self) -> Transposed:
        """The transpose, for products.

        ``jac.T @ u`` for ``u`` ``(N, *out)``, or a block of them, is ``{name: tensor}``, summed over samples.
        """
        return Transposed(self)

    def _parts(self) -> list[str | Table]:
        run = self._run
        entries = sum(p.numel() for p in run.params.values())
        sizes = {name: run.y.numel() * p.nbytes for name, p in run.params.items()}
        known = run.structure is not None
        uses = run.kinds() if known else dict.fromkeys(run.params, ("-",))
        text = (
            f"ParameterJacobian(output {tuple(run.y.shape)} {run.y.dtype} on {run.y.device}, {len(run.params)} "
            f"parameters with {entries} entries, formed {si(sum(sizes.values()))}B"
            + (f", factors {si(run.factor_bytes())}B)" if known else ")")
        )
        rows = [
            (name, str(tuple(p.shape)), str(p.dtype), f"{si(sizes[name])}B", ", ".join(uses[name]))
            for name, p in run.params.items()
        ]
        return [text, Table(("parameter", "shape", "dtype", "formed", "kept as"), rows)]

    # -- formed -----------------------------------------------------------------------------------

    @public
    def dense(self, out: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The Jacobian itself: ``{name: (N, *out, *parameter)}``, in the parameter's dtype.

        Zeros where an output does not depend on a parameter. Of a weight that is a DTensor, one placed as it is.

        Args:
            out: tensors of these shapes to write it to; they are returned.

        Raises:
            RuntimeError: an ``out`` that does not fit, or with ``create_graph``.
            ValueError: ``out`` has other names; a ``memory_limit`` that is too small.
        """
        if out is not None:
            self._run.check_whole("out= of dense")
            self._share.check_out("dense")
            operands.check_out(self._run, out)
        elif self._run.sharded:
            return weights.dense(self._factors, self._share)
        return {name: self._share.rows(t) for name, t in self._dense(out).items()}

    def _dense(self, out: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """That of this process's samples."""
        run = self._run
        if run.sharded:
            return whole_of(weights.dense(self._factors, ALONE), False)
        shape = tuple(run.y.shape)
        with run.computing():
            taken = sum(p.numel() * p.element_size() for p in run.params.values()) * run.y.numel()
            offer = OFFER if out is not None else Offer(out="out=")
            budget = self._factors.budget("the Jacobian", 0 if out is not None else taken, offer)
            made = {}
            for name, p in run.params.items():
                if out is not None:
                    made[name] = out[name]
                else:
                    made[name] = torch.empty((*shape, *p.shape), dtype=p.dtype, device=p.device)
            self._write(made, budget, offer)
        return made

    def _write(self, made: dict[str, Tensor], budget: Budget, offer: Offer = OFFER) -> None:
        """The Jacobian into tensors of its shapes."""
        run = self._run
        if run.structure is None:
            self._dense_without(made, budget)
            return
        for sel in selections(run.seeds, self._factors.chunks(budget, offer)):
            pieces = self._factors.pieces(sel, budget)
            for name, p in run.params.items():
                view = made[name].view((*run.seeds, *p.shape))
                for letter, span in (sel or {}).items():
                    view = view.narrow(letter, *span)
                write(pieces[name], view, len(run.seeds))

    @public
    def matrix(self) -> Tensor:
        """The Jacobian as one matrix: ``(N, *out, P)``, the ``P`` entries of all parameters in the order of `names`.

        In the dtype that holds those of all parameters. `split` takes its last axis apart again.

        Raises:
            ValueError: a ``memory_limit`` that is too small.

        Cost:
            That of `dense`, and no memory beside the matrix where parameters have one dtype (and no ``create_graph``).

        Examples:
            >>> net = nn.Linear(3, 2)
            >>> jac = jactri.parameter_jacobian(net, torch.randn(5, 3))
            >>> J = jac.matrix()
            >>> J.shape
            torch.Size([5, 2, 8])
            >>> kernel = J.flatten(0, 1) @ J.flatten(0, 1).T
            >>> torch.allclose(kernel.reshape(5, 2, 5, 2), jac.gram(), atol=1e-5)
            True
        """
        run = self._run
        dtypes = {p.dtype for p in run.params.values()}
        wide = reduce(torch.promote_types, dtypes)
        if run.create_graph or len(dtypes) > 1 or run.sharded:
            with run.computing():
                dense, lead = self._dense().items(), run.y.shape
                parts = [t.reshape(*lead, run.params[name].numel()).to(wide) for name, t in dense]
                return self._share.rows(torch.cat(parts, -1))
        entries = sum(p.numel() for p in run.params.values())
        with run.computing():
            taken = run.y.numel() * entries * wide.itemsize
            budget = self._factors.budget("the Jacobian", taken)
            made = torch.empty((*run.y.shape, entries), dtype=wide, device=run.y.device)
            self._write(self.split(made), budget)
            return self._share.rows(made)

    @public
    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """What has the ``P`` entries of all parameters on its last axis, by name: of `matrix`, what `dense` gives.

        Args:
            matrix: ``(*lead, P)``, with any leading axes: the rows of a matrix, a step of an optimizer ``(P,)``, a
                block of samples of all parameters ``(K, P)``.

        Returns:
            ``{name: (*lead, *parameter)}``, in the parameters' dtypes (of complex entries of a real parameter, the real
            parts); views where ``matrix`` has that dtype.

        Raises:
            TypeError: ``matrix`` is no tensor.
            RuntimeError: its last axis has another length.

        Cost:
            None where they are views.

        Examples:
            >>> net = nn.Linear(3, 2)
            >>> jac = jactri.parameter_jacobian(net, torch.randn(5, 3))
            >>> step = jac.split(torch.randn(8))
            >>> {name: tuple(t.shape) for name, t in step.items()}
            {'weight': (2, 3), 'bias': (2,)}
            >>> (jac @ step).shape
            torch.Size([5, 2])
        """
        return operands.split(self._run.params, matrix)

    def _dense_without(self, made: dict[str, Tensor], budget: Budget) -> None:
        """The Jacobian where there is no graph to follow: zeros, or by autograd."""
        run = self._run
        for t in made.values():
            t.zero_()
        if run.by_autograd:
            run.check_unchanged()
            whole.rows(
                [run.y], list(run.params.values()), False, run.reason,
                budget=budget, chunk_size=self._factors.chunk_size, dests=[[*made.values()]],
            )  # fmt: skip

    # -- products ---------------------------------------------------------------------------------

    @public
    def __matmul__(self, v: dict[str, Tensor]) -> Tensor:
        """``J v`` for ``v`` ``{name: tensor}`` of the parameters' shapes: ``(N, *out)``.

        For a complex parameter that is ``Re(conj(J) v)``, the derivative of the output along ``v``. With one
        more leading axis ``K`` on every tensor, ``(K, N, *out)``. Cost: about one forward pass each.
        """
        run = self._run
        if not isinstance(v, dict):
            return NotImplemented
        operands.check_names(run.params, v, "v")
        v = v if run.sharded else whole_of(v, run.create_graph)
        k = operands.block(run.params, v)
        with run.computing():
            if run.structure is None:
                made = self._by_rows(v, k, run.by_autograd)
                return self._share.rows(made, 0 if k is None else 1)
            run.check_unchanged()
            blocks = [v[name] if k is not None else v[name].unsqueeze(0) for name in run.params]
            ends = (run.y,), tuple(run.params.values())
            (made,) = push(*ends, blocks, self._options(), run.of_parameters)
            made = made.to(run.y.dtype)
            return self._share.rows(made[0] if k is None else made, 0 if k is None else 1)

    def _options(self) -> Options:
        """Those of a product."""
        of = self._factors
        return Options(of.run.create_graph, of.chunk_size, of.memory_limit, None)

    def _by_rows(self, v: dict[str, Tensor], k: int | None, depends: bool = True) -> Tensor:
        """``J v`` by the whole Jacobian."""
        if self._run.sharded:
            return weights.pushed(self._run, v, k)
        y = self._run.y
        total = y.new_zeros(y.shape if k is None else (k, *y.shape))
        for name, j in self._dense().items() if depends and k != 0 else ():
            made = flat(v[name].to(j.dtype), k or 1) @ flat(j, y.numel()).t()
            total = total + made.reshape(total.shape).to(total.dtype)
        return total

    def _transposed(self, u: Tensor) -> dict[str, Tensor]:
        run = self._run
        if not isinstance(u, Tensor):
            raise TypeError(f"u must be a Tensor, got {type(u)}")
        shape = run.y.shape
        block = u.dim() == len(shape) + 1
        u = self._share.own(u, "u", int(block), run.create_graph)
        if tuple(u.shape[block:]) != tuple(shape):
            raise RuntimeError(
                f"u must have the output's shape {tuple(shape)}, or one leading axis more, got {tuple(u.shape)}"
            )
        check_real("u", u, "the output", run.y)
        with run.computing():
            c = (u if block else u.unsqueeze(0)).to(run.y.dtype)
            if run.sharded:
                return weights.pulled(run, c, block, self._share)
            k = c.shape[0]
            if run.structure is None:
                found = {}
                for name, j in self._dense().items() if run.by_autograd else ():
                    flat = c.reshape(k, -1).to(j.dtype) @ j.reshape(run.y.numel(), -1)
                    found[name] = flat.reshape(k, *run.params[name].shape)
            else:
                run.check_unchanged()
                ends = (run.y,), tuple(run.params.values())
                products = pull(*ends, [c], self._options(), run.of_parameters)
                found = dict(zip(run.params, products, strict=True))
            made = {}
            for name, p in run.params.items():
                t = found.get(name)
                if t is None:
                    t = torch.zeros((k, *p.shape), dtype=p.dtype, device=p.device)
                made[name] = t if block else t[0]
            return totals(made, self._share)

    @public
    def gram(self, other: ParameterJacobian | None = None) -> Tensor:
        """``J J^T`` over all parameters, ``(N, *out, N, *out)``: the NTK of the samples with themselves.

        With another Jacobian ``K``, ``J K^T``: ``(N, *out, N', *out')``. That may be of other inputs, of an output of
        another shape, or of another module with parameters of the same names and shapes: a step of training later, or
        another head on the same body.

        Args:
            other: the Jacobian K; without it, this one.

        Raises:
            TypeError: ``other`` is no `ParameterJacobian`.
            ValueError: its parameters have other names or shapes (``params`` of `parameter_jacobian` picks the common
                ones), or another dtype or device; a ``memory_limit`` that is too small.

        Cost:
            For Linear layers ``2 (N m)^2`` multiply-adds an output feature, ``m`` the entries of a sample's output.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
            >>> train, test = torch.randn(6, 3), torch.randn(4, 3)
            >>> J, K = (jactri.parameter_jacobian(net, x) for x in (test, train))
            >>> J.gram(K).shape
            torch.Size([4, 2, 6, 2])
        """
        if other is None:
            other = self
        if not isinstance(other, ParameterJacobian):
            raise TypeError(f"other must be a ParameterJacobian, got {type(other)}")
        run, its = self._run, other._run
        operands.check_alike(run.params, its.params)
        factors, shares = (self._factors, other._factors), (self._share, other._share)
        return of_ranks(_gram, factors, shares, (tuple(run.y.shape), its.out))

    @public
    def variance(self, v: dict[str, Tensor], diagonal: bool = False) -> Tensor:
        """``J_n diag(v) J_n^T`` for every sample ``n``, ``(N, *out, *out)``; its diagonal, ``(N, *out)``.

        That is the covariance of the linearised output if the parameters are independent with variances ``v``, as in a
        Laplace approximation with a diagonal Hessian (Immer et al. 2021, arXiv:2008.08400).

        Args:
            v: ``{name: tensor}`` of the parameters' shapes, real. For a complex parameter, the variance of its real and
                of its imaginary part alike.
            diagonal: only the variance of each entry of the output; the matrix is not formed.

        Raises:
            ValueError: ``v`` has other names; a ``memory_limit`` that is too small.
            RuntimeError: a ``v`` of another shape, or complex.

        Cost:
            For Linear layers ``m^2`` multiply-adds (with ``diagonal``, ``m``) a weight and sample, ``m`` the entries of
            a sample's output.

        Examples:
            >>> net = nn.Linear(3, 2)
            >>> prior = {name: torch.ones_like(p) for name, p in net.named_parameters()}
            >>> x = torch.randn(5, 3)
            >>> jac = jactri.parameter_jacobian(net, x)
            >>> of_each = jac.variance(prior, diagonal=True)
            >>> torch.allclose(of_each, 1 + x.square().sum(1, keepdim=True))
            True
            >>> torch.allclose(of_each, jac.variance(prior).diagonal(0, 1, 2))
            True
        """
        run = self._run
        v = v if run.sharded else whole_of(v, run.create_graph)
        operands.check_variances(run.params, v)
        n, m = run.n, prod(run.out)
        with run.computing():
            if run.sharded:
                made = weights.variance(run, v, diagonal)
            elif run.structure is None:
                made = run.y.new_zeros((n, m) if diagonal else (n, m, m))
                for name, j in self._dense().items() if run.by_autograd else ():
                    w = v[name].to(j.dtype)
                    w = flat(torch.complex(w.real, w.real) if w.is_complex() else w, 1)
                    rows = flat(j, n * m).reshape(n, m, -1)
                    part = (rows * w * rows).sum(-1) if diagonal else (rows * w) @ rows.mT
                    made = made + part.to(made.dtype)
            else:
                batch, out = run.letters()
                alike = (*batch, *out) if diagonal else batch
                more = () if diagonal else of_second(out)
                link = Link(each_with_itself(alike), (*batch, *out, *more))
                made = inner(self._factors, self._factors, link, v, what="J diag(v) J^T")
            return self._share.rows(made.reshape(n, *run.out, *(() if diagonal else run.out)))


def _gram(first: Factors[Recorded], second: Factors[Any]) -> Tensor:
    """``J K^T`` of what is here: ``(N, *out, N', *out')``."""
    run, its = first.run, second.run
    if run.structure is None or its.structure is None:
        return formed_gram(first, second)
    (batch, out), (batch2, out2) = run.letters(), its.letters()
    with run.computing():
        link = Link((), (*batch, *out, *of_second(batch2), *of_second(out2)))
        made = inner(first, second, link, what="J J^T")
        return made.reshape(run.n, *run.out, its.n, *its.out)


def formed_gram(first: Factors[Recorded], second: Factors[Recorded]) -> Tensor:
    """``J J^T`` of two Jacobians, ``(*output, *output)``, by the Jacobians themselves."""
    run, other = first.run, second.run
    a, b = run.y, other.y
    if run.sharded or other.sharded:
        return weights.gram(first, second)
    first.budget("J J^T", a.numel() * b.numel() * a.element_size())
    with run.computing():
        total = a.new_zeros(a.numel(), b.numel())
        mine = ParameterJacobian(first).dense() if run.reached and other.reached else {}
        theirs = mine if second is first else ParameterJacobian(second).dense()
        for name, j in mine.items():
            made = flat(j, a.numel()) @ flat(theirs[name], b.numel()).t()
            total = total + made.to(total.dtype)
        return total.reshape(*a.shape, *b.shape)


class Transposed(Shown):
    """``J^T``: ``jac.T @ u`` for ``u`` ``(N, *out)`` is ``{name: tensor}``, summed over samples; blocks alike."""

    def __init__(self, base: ParameterJacobian):
        self._of = base

    def _parts(self) -> list[str | Table]:
        return ["the transpose of", *self._of._parts()]

    @property
    def T(self) -> ParameterJacobian:
        return self._of

    @public
    def __matmul__(self, u: Tensor) -> dict[str, Tensor]:
        return self._of._transposed(u)
