"""Generalised Gauss-Newton products: J^T H J for the Hessian H of a loss in the output (Schraudolph 2002)."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..base.tables import Shown, Table
from ..maps.layout import Selection
from ..maps.lettered import cut
from ..parameters.factored import Factors, entries
from ..parameters.inner import SECOND, Link, each_with_itself, of_second
from ..parameters.pairs import check_real, flat
from ..parameters.recorded import Recorded
from ..prologue.arguments import check_options
from ..prologue.running import public
from ..spread import weights
from ..spread.kernels import check_proven
from ..spread.shards import ALONE, Share, taken_here
from ..spread.sums import totals
from .parameters import ParameterJacobian


@public
def ggn(
    module: torch.nn.Module,
    x: Tensor | tuple[Tensor, ...],
    loss_hessian: Tensor | Callable[[Tensor], Tensor],
    params: Any = None,
    *,
    per_sample: bool | str = True,
    create_graph: bool = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
) -> GGN:
    """The generalised Gauss-Newton matrix ``sum_n J_n^T H_n J_n`` of a loss summed over samples, as an operator.

    Formula: Schraudolph 2002; Martens 2020, arXiv:1412.1193.

    Args:
        module: as of `parameter_jacobian`.
        x: as of `parameter_jacobian`.
        loss_hessian: of the loss in the output, a sample at a time: a tensor ``(N, *out)`` (its diagonal), a tensor
            ``(N, *out, *out)``, or a function of blocks ``(K, N, *out)`` that returns products of the same shape. For
            the softmax's cross-entropy: ``torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)``; for half the
            squared error, ones.
        params: as of `parameter_jacobian`.
        per_sample: as of `parameter_jacobian`.
        create_graph: as of `parameter_jacobian`.
        chunk_size: as of `parameter_jacobian`.
        memory_limit: as of `parameter_jacobian`.

    Returns:
        A `GGN`: ``g @ v`` for ``v`` ``{name: tensor}``, and ``g.diagonal()``.

    Raises:
        TypeError: a ``loss_hessian`` that is neither a tensor nor a function.
        RuntimeError: a Hessian of another shape, or a complex one; and what `parameter_jacobian` raises.

    Cost:
        A product: a forward and a backward pass. The diagonal: what the factors of `parameter_jacobian` take. For
        weights that are DTensors, either a backward pass a row; results are placed as they are.

    Examples:
        >>> net, x = nn.Linear(3, 4), torch.randn(5, 3)
        >>> p = net(x).softmax(1).detach()
        >>> G = jactri.ggn(net, x, torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2))
        >>> {name: tuple(d.shape) for name, d in G.diagonal().items()}
        {'weight': (4, 3), 'bias': (4,)}
        >>> torch.allclose(G.diagonal()["bias"], (p - p * p).sum(0), atol=1e-5)
        True
    """
    check_options("auto", chunk_size, None, create_graph)
    share, x, per_sample = taken_here("ggn", "x", x, per_sample, create_graph)
    run = Recorded(module, x, params, create_graph, "ggn", per_sample=per_sample)
    check_proven(run, share)
    return GGN(Factors(run, chunk_size, memory_limit), loss_hessian, share)


class GGN(Shown):
    """``sum_n J_n^T H_n J_n``: what `ggn` returns.

    Attributes:
        jacobian: the `ParameterJacobian`.
        hessian: H, as it was given.

    Examples:
        >>> net, x = nn.Linear(3, 2), torch.randn(5, 3)
        >>> G = jactri.ggn(net, x, torch.ones(5, 2))  # of half the squared error
        >>> v = {name: torch.randn_like(p) for name, p in net.named_parameters()}
        >>> along = G.jacobian @ v
        >>> curvature = sum(((G @ v)[name] * v[name]).sum() for name in v)  # v' G v
        >>> torch.allclose(curvature, along.square().sum(), rtol=1e-4)
        True
    """

    def __init__(self, factors: Factors[Recorded], loss_hessian, share: Share = ALONE):
        self._factors, self._share = factors, share
        self.jacobian, self.hessian = ParameterJacobian(factors, share), loss_hessian
        self._local, y = ParameterJacobian(factors), factors.run.y
        loss_hessian = share.own(loss_hessian, "loss_hessian", 0, factors.run.create_graph)
        self._own = loss_hessian
        shape = tuple(y.shape)
        if isinstance(loss_hessian, Tensor):
            if tuple(loss_hessian.shape) not in (shape, (*shape, *shape[1:])):
                raise RuntimeError(
                    f"loss_hessian must have shape {shape} (its diagonal) or {(*shape, *shape[1:])}, got "
                    f"{tuple(loss_hessian.shape)}"
                )
            check_real("loss_hessian", loss_hessian, "the output", y)
        elif not callable(loss_hessian):
            raise TypeError(
                f"loss_hessian must be a Tensor or a function, got {type(loss_hessian)}"
            )

    def _parts(self) -> list[str | Table]:
        h = self.hessian
        told = f"{tuple(h.shape)} {h.dtype}" if isinstance(h, Tensor) else "a function"
        return [f"GGN(loss_hessian {told}), J' H J of", *self.jacobian._parts()]

    @property
    def output(self) -> Tensor:
        """The module's."""
        return self.jacobian.output

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters."""
        return self.jacobian.names

    def _times(self, block: Tensor) -> Tensor:
        """``H`` times a block ``(K, N, *out)``."""
        h, shape = self._own, self._factors.run.y.shape
        if not isinstance(h, Tensor):
            block = self._share.dropped(block, 1)  # it knows of this rank's samples
            made = h(block)
            if not isinstance(made, Tensor) or made.shape != block.shape:
                got = tuple(made.shape) if isinstance(made, Tensor) else type(made)
                raise RuntimeError(
                    f"loss_hessian was called with a block of shape {tuple(block.shape)} and must return one like it, "
                    f"got {got}"
                )
            check_real("what loss_hessian returned", made, "the output", block)
            return self._share.filled(made, 1)
        if h.shape == shape:
            return block * h
        n, m = shape[0], prod(shape[1:])
        return torch.einsum(
            "nij,knj->kni", h.reshape(n, m, m), block.reshape(block.shape[0], n, m)
        ).reshape(block.shape)

    @public
    def __matmul__(self, v: dict[str, Tensor]) -> dict[str, Tensor]:
        """The product with ``{name: tensor}`` of the parameters' shapes, or with one more leading axis, a block."""
        if not isinstance(v, dict):
            return NotImplemented
        jac, run = self._local, self._factors.run
        with run.computing():
            pushed = jac @ v
            block = pushed.dim() > run.y.dim()
            turned = self._times(pushed if block else pushed.unsqueeze(0))
            if run.sharded:
                return weights.pulled(run, turned.to(run.y.dtype), block, self._share)
            made = jac.T @ (turned if block else turned[0])
            return totals(made, self._share)

    @public
    def diagonal(self) -> dict[str, Tensor]:
        """The diagonal of the matrix, ``{name: tensor}`` of the parameters' shapes, real.

        For a complex entry, the sum of the two that its real and its imaginary part have.
        """
        run = self._factors.run
        with run.computing():
            h, n, m = self._own, run.n, prod(run.out)
            if not isinstance(h, Tensor):
                eye = torch.eye(m, dtype=run.y.dtype, device=run.y.device).reshape(m, 1, *run.out)
                h = self._times(eye.expand(m, n, *run.out)).reshape(m, n, m).permute(1, 2, 0)
            if run.structure is None:
                h = h.reshape(n, m, m) if h.numel() != n * m else h.reshape(n, m)
                if run.sharded:
                    return weights.diagonal(run, h, self._share)
                made = self._formed(h)
            else:
                made = self._contracted(h, h.numel() == n * m and h.shape == run.y.shape)
            return totals(made, self._share)

    def _formed(self, h: Tensor) -> dict[str, Tensor]:
        run, made = self._factors.run, {}
        dense = self._local.dense() if run.n and run.by_autograd else {}
        for name, p in run.params.items():
            if name not in dense:
                made[name] = torch.zeros(p.shape, dtype=p.dtype.to_real(), device=p.device)
                continue
            j = flat(dense[name], run.n * prod(run.out)).reshape(*h.shape[:2], -1)
            w = h.to(j.dtype)
            hj = w.unsqueeze(-1) * j if w.dim() == 2 else w @ j
            made[name] = (hj * j).sum((0, 1)).reshape(*p.shape, -1).sum(-1)
        return made

    def _contracted(self, h: Tensor, is_diagonal: bool) -> dict[str, Tensor]:
        run = self._factors.run
        batch, out = run.letters()
        letters = (*batch, *out) if is_diagonal else (*batch, *out, *of_second(out))
        h = h.reshape([run.seeds[s % SECOND] for s in letters])

        def third(left: Selection | None, right: Selection | None):
            spans = {**(left or {}), **{s + SECOND: span for s, span in (right or {}).items()}}
            return cut(h, letters, spans), letters

        link = Link(each_with_itself((*batch, *out) if is_diagonal else batch), (), own=True)
        return entries(self._factors, link, third)
