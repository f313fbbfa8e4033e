"""`parameter_jacobian`: the Jacobian of a module in its parameters, kept as the factors that it is a product of."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..base.memory import OFFER, Budget, Offer, si
from ..maps.layout import Selection
from ..maps.letters import Letters
from ..parameters.factors import Piece, pieces_of, write
from ..parameters.inner import (
    SECOND,
    Entries,
    Link,
    Total,
    accumulate,
    each_with_itself,
    of_second,
    with_bias,
)
from ..parameters.pairs import check_real, flat
from ..parameters.recorded import Recorded
from ..prologue.arguments import Options, check_options
from ..prologue.running import public
from . import whole
from .vectors import pull, push

FORMED = 1 << 28
"""Bytes of Jacobians that are formed at once on the way to a product of them, at most."""


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
        a `ParameterJacobian`. Factors are computed at first use and kept while they fit; a parameter that was written
        to in between is refused.

    Raises:
        TypeError: ``module`` is no Module; ``x`` or the output is no tensor.
        ValueError: no parameters; names or tensors that are not the module's; no batch axis; a ``memory_limit`` too
            small.
        RuntimeError: parameters that are frozen; samples that mix (the op is named); an output that is not real.

    A complex parameter is a pair of real ones: its Jacobian holds ``d out / d re + i d out / d im``, as autograd's
    gradients do; products with it, and sums over it, go over both, as those of ``torch.view_as_real`` of it would.

    Cost:
        the forward pass; then for factors one reverse sweep with as many seeds as a sample's output has entries.
    """
    check_options("auto", chunk_size, None, create_graph)
    run = Recorded(module, x, params, create_graph, "parameter_jacobian", per_sample=per_sample)
    return ParameterJacobian(run, chunk_size, memory_limit)


class ParameterJacobian:
    """The Jacobian of a module's output ``(N, *out)`` in its parameters: see `parameter_jacobian`.

    ``output`` is the module's (detached unless ``create_graph``), ``names`` the parameters. ``jac @ v`` and
    ``jac.T @ u`` are products with it; it is formed by `dense` only.
    """

    def __init__(self, run: Recorded, chunk_size: int | None, memory_limit: int | str | None):
        self._run = run
        self._chunk_size, self._memory_limit = chunk_size, memory_limit
        self._kept: dict[str, list[Piece]] | None = None
        self.output: Tensor = run.y if run.create_graph else run.y.detach()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._run.params)

    @property
    def T(self) -> Transposed:
        """The transpose, for ``jac.T @ u``."""
        return Transposed(self)

    def __repr__(self) -> str:
        run = self._run
        entries = sum(p.numel() for p in run.params.values())
        size = run.y.numel() * sum(p.numel() * p.element_size() for p in run.params.values())
        head = (
            f"ParameterJacobian(output {tuple(run.y.shape)}, {len(run.params)} parameters with {entries} entries, "
            f"formed {si(size)}B"
        )
        if run.structure is None:
            return head + ")"
        lines = [f"{head}, factors {si(run.factor_bytes())}B:"]
        kinds = run.kinds()
        width = max(map(len, kinds))
        lines += [f"  {name:{width}}  {', '.join(uses)}" for name, uses in kinds.items()]
        return "\n".join(lines) + ")"

    # -- formed -----------------------------------------------------------------------------------

    @public
    def dense(self, out: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The Jacobian itself: ``{name: (N, *out, *parameter)}``, in the parameter's dtype.

        ``out``: tensors of these shapes to write it to; they are returned. Zeros where an output does not depend on a
        parameter.

        Raises RuntimeError for an ``out`` that does not fit or with ``create_graph``, ValueError for other names.
        """
        run = self._run
        shape = tuple(run.y.shape)
        if out is not None:
            self._check_out(out)
        with run.computing():
            taken = sum(p.numel() * p.element_size() for p in run.params.values()) * run.y.numel()
            offer = OFFER if out is not None else Offer(out="out=")
            budget = self._budget("the Jacobian", 0 if out is not None else taken, offer)
            made = {}
            for name, p in run.params.items():
                if out is not None:
                    made[name] = out[name]
                else:
                    made[name] = torch.empty((*shape, *p.shape), dtype=p.dtype, device=p.device)
            if run.structure is None:
                self._dense_without(made, budget)
                return made
            for sel in run.selections(self._chunk_size, budget, offer):
                pieces = self._pieces(sel)
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

    def _budget(self, what: str, size: float, offer: Offer = OFFER) -> Budget:
        """The memory of a method beside its answer, of ``size`` bytes. Raises MemoryLimitTooSmall."""
        budget = Budget(self._memory_limit, self._run.y.device)
        budget.check(what, size, offer)
        return budget.less(size)

    def _dense_without(self, made: dict[str, Tensor], budget: Budget) -> None:
        """The Jacobian where there is no graph to follow: zeros, or by autograd."""
        run = self._run
        for t in made.values():
            t.zero_()
        if run.by_autograd:
            run.check_unchanged()
            (row,) = whole.rows(
                [run.y], list(run.params.values()), False, run.reason, budget=budget, chunk_size=self._chunk_size
            )  # fmt: skip
            for t, block in zip(made.values(), row, strict=True):
                t.copy_(block)

    # -- factors ----------------------------------------------------------------------------------

    def _pieces(self, sel: Selection | None) -> dict[str, list[Piece]]:
        """The factors of every parameter; none for one that the output does not use."""
        run = self._run
        if sel is None and self._kept is not None:
            return self._kept
        run.check_unchanged()
        with run.computing():
            found = pieces_of(run.graph, run.structure, sel)
        pieces = {name: [] if v is None else found.get(v, []) for name, v in run.values.items()}
        if sel is None:
            self._kept = pieces
        return pieces

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
        return Options(self._run.create_graph, self._chunk_size, self._memory_limit, None)

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
            return self._dense_gram(self)
        batch, out = run.letters()
        with run.computing():
            link = Link((), (*batch, *out, *of_second(batch), *of_second(out)))
            made = inner(self, self, link, what="J J^T")
            return made.reshape(*shape, *shape)

    def _dense_gram(self, other: ParameterJacobian) -> Tensor:
        a, b = self._run.y, other._run.y
        self._budget("J J^T", a.numel() * b.numel() * a.element_size())
        with self._run.computing():
            total = a.new_zeros(a.numel(), b.numel())
            mine = self.dense() if self._run.reached and other._run.reached else {}
            theirs = mine if other is self else other.dense()
            for name, j in mine.items():
                made = flat(j, a.numel()) @ flat(theirs[name], b.numel()).t()
                total = total + made.to(total.dtype)
            return total.reshape(*a.shape, *b.shape)

    @public
    def variance(self, v: dict[str, Tensor]) -> Tensor:
        """``J_n diag(v) J_n^T`` for every sample ``n``, ``(N, *out, *out)``.

        That is the covariance of the linearised output if the parameters are independent with variances ``v``, as in a
        Laplace approximation with a diagonal Hessian. For a complex parameter ``v`` is the variance of its real and of
        its imaginary part alike.
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
                made = inner(self, self, link, v, what="J diag(v) J^T")
            return made.reshape(n, *run.out, *run.out)


class Transposed:
    """``J^T``: ``jac.T @ u`` for ``u`` ``(N, *out)`` is ``{name: tensor}``, summed over samples; blocks alike."""

    def __init__(self, base: ParameterJacobian):
        self._base = base

    @property
    def T(self) -> ParameterJacobian:
        return self._base

    @public
    def __matmul__(self, u: Tensor) -> dict[str, Tensor]:
        return self._base._transposed(u)


def inner(
    first: ParameterJacobian,
    second: ParameterJacobian,
    link: Link,
    weights: dict[str, Tensor] | None = None,
    what: str = "the kernel",
) -> Tensor:
    """The sum over all parameters that ``link`` describes, its axes those letters.

    ``weights``: a weight for every entry of the parameters. ``what`` it is, for a refusal.
    """
    a, b = first._run, second._run
    if len(link.out) > 1:
        wanted, link = link.out, replace(link, out=_batch_last(a, b, link.out))
        if wanted != link.out:
            made = inner(first, second, link, weights, what)
            return made.permute([link.out.index(s) for s in wanted])
    same = first is second
    full = {**dict(enumerate(a.seeds)), **{s + SECOND: n for s, n in enumerate(b.seeds)}}
    size = prod([full[s] for s in link.out]) * a.y.element_size()
    budget = first._budget(what, size)
    sels = a.selections(first._chunk_size, budget), b.selections(second._chunk_size, budget)
    whole_answer = len(sels[0]) == len(sels[1]) == 1 and sels[0][0] is None and sels[1][0] is None
    with a.computing():
        answer = None
        if not whole_answer:
            answer = a.y.new_zeros([full[s] for s in link.out])
        for left in sels[0]:
            mine = first._pieces(left)
            for right in sels[1]:
                if any((left or {}).get(s) != (right or {}).get(t) for s, t in link.shared):
                    continue
                theirs = mine if same and left == right else second._pieces(right)
                cut = {**(left or {}), **{s + SECOND: span for s, span in (right or {}).items()}}
                sizes = {s: cut[s][1] if s in cut else n for s, n in full.items()}
                total = Total(sizes, link.out, a.y.dtype, a.y.device)
                _add_all(total, first, second, mine, theirs, link, weights, formed(budget))
                part = total.result()
                if answer is None:
                    return part
                view = answer
                for i, s in enumerate(link.out):
                    if s in cut:
                        view = view.narrow(i, *cut[s])
                view.add_(part)
        return answer


def _batch_last(a: Recorded, b: Recorded, out: Letters) -> Letters:
    """The letters of a result with the samples of each factor behind the rest of its output.

    A kernel of inputs varies by samples only: along them a product with it runs through memory.
    """
    if min(a.n, b.n) < 16:
        return out
    batch = {*a.letters()[0], *of_second(b.letters()[0])}
    return tuple(sorted(out, key=lambda s: (s >= SECOND, s in batch)))


def _add_all(
    total: Total,
    first: ParameterJacobian,
    second: ParameterJacobian,
    mine,
    theirs,
    link: Link,
    weights,
    budget: float,
) -> None:
    run = first._run
    seeds = len(run.seeds), len(second._run.seeds)
    joined: dict[str, tuple[str, Piece, Piece]] = {}
    if weights is None:
        own = with_bias(mine)
        other = own if theirs is mine else with_bias(theirs)
        joined = {
            name: (bias, p, other[name][1])
            for name, (bias, p) in own.items()
            if name in other and other[name][0] == bias
        }
    done = {bias for bias, _, _ in joined.values()}
    for name, p in run.params.items():
        if name in done:
            continue
        shape, ps = tuple(p.shape), (mine[name], theirs[name])
        if name in joined:
            _, one, two = joined[name]
            ps = ([one], [one] if theirs is mine else [two])
            shape = tuple(prod([one.sizes[s] for s in axis]) for axis in one.axes)
        if theirs is mine:
            ps = (ps[0], ps[0])
        extra = None if weights is None else (weights[name].to(p.dtype), None)
        accumulate(total, *ps, shape, link, seeds, budget, extra)


def formed(budget: Budget) -> float:
    """The bytes for Jacobians that are formed on the way."""
    return float(FORMED if budget.bound is None else min(budget.bound / 4, FORMED))


def entries(jac: ParameterJacobian, link: Link, third, both: bool) -> dict[str, Tensor]:
    """For every parameter the sum over pairs of output entries of two Jacobians and a third operand.

    ``third(left, right)`` gives that operand with its letters, for selections. ``both``: of different entries too.
    """
    run = jac._run
    size = sum(p.numel() * p.element_size() for p in run.params.values())
    budget = jac._budget("the diagonal", size)
    sels = run.selections(jac._chunk_size, budget)
    made = {name: torch.zeros_like(p, requires_grad=False) for name, p in run.params.items()}
    for left, right in [(a, b) for a in sels for b in sels if both or a == b]:
        mine = jac._pieces(left)
        theirs = mine if left == right else jac._pieces(right)
        for name, p in run.params.items():
            accumulate(
                Entries(made[name]), mine[name], theirs[name], tuple(p.shape), link, (len(run.seeds),) * 2,
                formed(budget), third(left, right),
            )  # fmt: skip
    return made
