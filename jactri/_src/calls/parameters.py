"""`parameter_jacobian`: the Jacobian of a module in its parameters, kept as the factors that it is a product of."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ..base.memory import OFFER, Budget, Offer, si
from ..base.tables import Shown, Table
from ..parameters.factored import Factors, inner
from ..parameters.factors import write
from ..parameters.inner import Link, each_with_itself, of_second
from ..parameters.pairs import check_real, flat
from ..parameters.recorded import Recorded
from ..prologue.arguments import Options, check_options
from ..prologue.running import public
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
            a probe, as for `jacobian` under ``per_sample``.
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
        to in between is refused.

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
    run = Recorded(module, x, params, create_graph, "parameter_jacobian", per_sample=per_sample)
    return ParameterJacobian(Factors(run, chunk_size, memory_limit))


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

    def __init__(self, factors: Factors):
        run = factors.run
        self._factors, self._run = factors, run
        self.output: Tensor = run.y if run.create_graph else run.y.detach()

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

        Zeros where an output does not depend on a parameter.

        Args:
            out: tensors of these shapes to write it to; they are returned.

        Raises:
            RuntimeError: an ``out`` that does not fit, or with ``create_graph``.
            ValueError: ``out`` has other names; a ``memory_limit`` that is too small.
        """
        run = self._run
        shape = tuple(run.y.shape)
        if out is not None:
            self._check_out(out)
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
            if run.structure is None:
                self._dense_without(made, budget)
                return made
            for sel in self._factors.selections(budget, offer):
                pieces = self._factors.pieces(sel)
                for name, p in run.params.items():
                    view = made[name].view((*run.seeds, *p.shape))
                    for letter, span in (sel or {}).items():
                        view = view.narrow(letter, *span)
                    write(pieces[name], view, len(run.seeds))
        return made

    def _check_out(self, out) -> None:
        run = self._run
        if run.create_graph:
            raise RuntimeError(
                "out= and create_graph=True exclude each other: a result written in place has no graph"
            )
        if not isinstance(out, dict):
            raise TypeError(
                f"out must be a dict of tensors by parameter name, got {type(out).__name__}"
            )
        self._check_names(out, "out")
        for name, p in run.params.items():
            t, want = out[name], (*run.y.shape, *p.shape)
            if not isinstance(t, Tensor):
                raise TypeError(f"out[{name!r}] must be a Tensor, got {type(t)}")
            if tuple(t.shape) != want or t.dtype != p.dtype or t.device != p.device:
                raise RuntimeError(
                    f"out[{name!r}] must have shape {want}, dtype {p.dtype} and device {p.device}, got "
                    f"{tuple(t.shape)}, {t.dtype} and {t.device}"
                )
            if t.requires_grad:
                raise RuntimeError(f"out[{name!r}] requires grad; pass a detached tensor")

    def _check_names(self, given, what: str) -> None:
        wrong = [name for name in given if name not in self._run.params]
        missing = [name for name in self._run.params if name not in given]
        if wrong or missing:
            raise ValueError(
                f"{what} must have the names of this Jacobian, {', '.join(self.names[:8])}"
                f"{', ...' if len(self.names) > 8 else ''}; unknown: {wrong}, missing: {missing}"
            )

    def _dense_without(self, made: dict[str, Tensor], budget: Budget) -> None:
        """The Jacobian where there is no graph to follow: zeros, or by autograd."""
        run = self._run
        for t in made.values():
            t.zero_()
        if run.by_autograd:
            run.check_unchanged()
            (row,) = whole.rows(
                [run.y], list(run.params.values()), False, run.reason,
                budget=budget, chunk_size=self._factors.chunk_size,
            )  # fmt: skip
            for t, block in zip(made.values(), row, strict=True):
                t.copy_(block)

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
        self._check_names(v, "v")
        k = self._block(v)
        with run.computing():
            if run.structure is None:
                return self._by_rows(v, k, run.by_autograd)
            run.check_unchanged()
            blocks = [v[name] if k is not None else v[name].unsqueeze(0) for name in run.params]
            ends = (run.y,), tuple(run.params.values())
            (made,) = push(*ends, blocks, self._options(), run.of_parameters)
            made = made.to(run.y.dtype)
            return made[0] if k is None else made

    def _options(self) -> Options:
        """Those of a product."""
        of = self._factors
        return Options(of.run.create_graph, of.chunk_size, of.memory_limit, None)

    def _by_rows(self, v: dict[str, Tensor], k: int | None, depends: bool = True) -> Tensor:
        """``J v`` by the whole Jacobian."""
        y = self._run.y
        total = y.new_zeros(y.shape if k is None else (k, *y.shape))
        for name, j in self.dense().items() if depends and k != 0 else ():
            made = flat(v[name].to(j.dtype), k or 1) @ flat(j, y.numel()).t()
            total = total + made.reshape(total.shape).to(total.dtype)
        return total

    def _block(self, v: dict[str, Tensor]) -> int | None:
        """The length of the leading axis of a block of tangents, or None."""
        k: Any = ()
        for name, p in self._run.params.items():
            t = v[name]
            if not isinstance(t, Tensor):
                raise TypeError(f"v[{name!r}] must be a Tensor, got {type(t)}")
            check_real(f"v[{name!r}]", t, "the parameter", p)
            mine = t.shape[0] if t.dim() == p.dim() + 1 else None
            if tuple(t.shape) != (*(() if mine is None else (mine,)), *p.shape) or k not in (
                (),
                mine,
            ):
                raise RuntimeError(
                    f"v[{name!r}] must have the parameter's shape {tuple(p.shape)}, or all of v one leading axis more, "
                    f"got {tuple(t.shape)}"
                )
            k = mine
        return k

    def _transposed(self, u: Tensor) -> dict[str, Tensor]:
        run = self._run
        if not isinstance(u, Tensor):
            raise TypeError(f"u must be a Tensor, got {type(u)}")
        shape = run.y.shape
        block = u.dim() == len(shape) + 1
        if tuple(u.shape[block:]) != tuple(shape):
            raise RuntimeError(
                f"u must have the output's shape {tuple(shape)}, or one leading axis more, got {tuple(u.shape)}"
            )
        check_real("u", u, "the output", run.y)
        with run.computing():
            c = (u if block else u.unsqueeze(0)).to(run.y.dtype)
            k = c.shape[0]
            if run.structure is None:
                found = {}
                for name, j in self.dense().items() if run.by_autograd else ():
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
        return made

    @public
    def gram(self) -> Tensor:
        """``J J^T`` over all parameters, ``(N, *out, N, *out)``: the NTK of the samples with themselves.

        Cost: for Linear layers ``2 (N m)^2`` multiply-adds an output feature, ``m`` the entries of a sample's output.
        """
        run = self._run
        shape = tuple(run.y.shape)
        if run.structure is None:
            return formed_gram(self._factors, self._factors)
        batch, out = run.letters()
        with run.computing():
            link = Link((), (*batch, *out, *of_second(batch), *of_second(out)))
            made = inner(self._factors, self._factors, link, what="J J^T")
            return made.reshape(*shape, *shape)

    @public
    def variance(self, v: dict[str, Tensor]) -> Tensor:
        """``J_n diag(v) J_n^T`` for every sample ``n``, ``(N, *out, *out)``.

        That is the covariance of the linearised output if the parameters are independent with variances ``v``, as in a
        Laplace approximation with a diagonal Hessian (Immer et al. 2021, arXiv:2008.08400).

        Args:
            v: ``{name: tensor}`` of the parameters' shapes, real. For a complex parameter, the variance of its real and
                of its imaginary part alike.
        """
        run = self._run
        self._check_names(v, "v")
        for name, p in run.params.items():
            if not isinstance(v[name], Tensor) or v[name].shape != p.shape:
                got = tuple(v[name].shape) if isinstance(v[name], Tensor) else type(v[name])
                raise RuntimeError(
                    f"v[{name!r}] must be a tensor of shape {tuple(p.shape)}, got {got}"
                )
            if v[name].is_complex() and (not p.is_complex() or bool(v[name].imag.any())):
                raise RuntimeError(
                    f"v[{name!r}] must hold variances, which are real, got {v[name].dtype}"
                )
        n, m = run.n, prod(run.out)
        with run.computing():
            if run.structure is None:
                made = run.y.new_zeros(n, m, m)
                for name, j in self.dense().items() if run.by_autograd else ():
                    w = v[name].to(j.dtype)
                    w = flat(torch.complex(w.real, w.real) if w.is_complex() else w, 1)
                    rows = flat(j, n * m).reshape(n, m, -1)
                    made = made + ((rows * w) @ rows.mT).to(made.dtype)
            else:
                batch, out = run.letters()
                link = Link(each_with_itself(batch), (*batch, *out, *of_second(out)))
                made = inner(self._factors, self._factors, link, v, what="J diag(v) J^T")
            return made.reshape(n, *run.out, *run.out)


def formed_gram(first: Factors, second: Factors) -> Tensor:
    """``J J^T`` of two Jacobians, ``(*output, *output)``, by the Jacobians themselves."""
    run, other = first.run, second.run
    a, b = run.y, other.y
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
