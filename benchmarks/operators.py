"""What is asked for beside a Jacobian (Laplacian, divergence, parameter Jacobian, tangent kernel), and torch peers.

A contender returns what its users would use, as it is; `Operator.flat` makes one tensor of it, to be held against
float64. The peers are what people write with torch.func and with torch.autograd, as its tutorials show it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import jactri
from jactri._src.base import backends

if TYPE_CHECKING:
    from .workloads import Workload

Call = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Operator:
    """What a workload asks for.

    ``shape``: of `flat` results; ``truth``: one such result in float64, of a float64 network and input, by the
    plainest way there is; ``jactri(net, x, **options)``: our call; ``of``: what `jactri.compile` is told to compile,
    ``lower`` with the lower derivatives; ``trains``: whether the parameters, and not the
    input, are differentiated; ``pairs``: whether the second axis of the answer is samples again.
    """

    name: str
    shape: Callable[[Workload], tuple[int, ...]]
    truth: Callable[[nn.Module, Tensor], Tensor]
    jactri: Callable[..., Any]
    flat: Callable[[Any], Tensor]
    of: Callable[..., Any]
    lower: bool = False
    trains: bool = False
    pairs: bool = False


def _side_by_side(result: Any) -> Tensor:
    """(output, gradient, Laplacian) or (gradient, Laplacian), of scalar functions, as (N, n + 1)."""
    *_, gradient, laplacian = result
    return torch.cat([gradient.reshape(len(gradient), -1), laplacian.reshape(-1, 1)], 1)


def trace(y: Tensor, x: Tensor) -> Tensor:
    """The trace of each sample's Jacobian, a row at a time: (N,)."""
    return sum(
        torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(x.shape[1])
    )


def _laplacian_truth(net: nn.Module, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return _side_by_side((gradient.detach(), trace(gradient, x)))


def _laplacian(net: nn.Module, x: Tensor, **options: Any) -> Any:
    return jactri.laplacian(net, x, return_lower=True, **options)


def _divergence_truth(net: nn.Module, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    return trace(net(x), x)


def _divergence(net: nn.Module, x: Tensor, **options: Any) -> Any:
    return jactri.divergence(net, x, **options)


def _of_parameters(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The Jacobian of each sample in all parameters, by torch.func."""
    weights = {n: p.detach() for n, p in net.named_parameters()}
    return vmap(jacrev(lambda w, v: functional_call(net, w, v)), (None, 0))(weights, x)


def _all_columns(result: dict[str, Tensor]) -> Tensor:
    """(N, outputs, parameters) of a dictionary, in the order of its names."""
    return torch.cat([result[n].flatten(2) for n in sorted(result)], 2)


def _parameters_truth(net: nn.Module, x: Tensor) -> Tensor:
    """Row by row and sample by sample, by autograd.grad."""
    names = dict(sorted(net.named_parameters()))
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(o, list(names.values()), retain_graph=True)])
        for y in net(x) for o in y
    ]  # fmt: skip
    return torch.stack(rows).reshape(len(x), -1, sum(p.numel() for p in names.values()))


def _parameters(net: nn.Module, x: Tensor, backend: str = "auto") -> Any:
    with backends.use(backend):
        return jactri.parameter_jacobian(net, x).dense()


def _kernel_truth(net: nn.Module, x: Tensor) -> Tensor:
    jac = _parameters_truth(net, x)
    return torch.einsum("nap,mbp->nmab", jac, jac)


def _kernel(net: nn.Module, x: Tensor, backend: str = "auto") -> Any:
    with backends.use(backend):
        return jactri.empirical_ntk(net, x)


def _parameter_count(w: Workload) -> int:
    return sum(p.numel() for p in w.build().parameters())


LAPLACIAN = Operator(
    "Laplacian",
    lambda w: (w.samples, w.columns + 1),
    _laplacian_truth,
    _laplacian,
    _side_by_side,
    jactri.laplacian,
    lower=True,
)
DIVERGENCE = Operator(
    "divergence",
    lambda w: (w.samples,),
    _divergence_truth,
    _divergence,
    lambda d: d,
    jactri.divergence,
)
PARAMETERS = Operator(
    "parameter Jacobian", lambda w: (w.samples, w.rows, _parameter_count(w)),
    _parameters_truth, _parameters, _all_columns, jactri.parameter_jacobian, trains=True,
)  # fmt: skip
KERNEL = Operator(
    "tangent kernel", lambda w: (w.samples, w.samples, w.rows, w.rows),
    _kernel_truth, _kernel, lambda k: k, jactri.empirical_ntk, trains=True, pairs=True,
)  # fmt: skip


# ---- peers: (workload, network) -> a function of the input


def ours(w: Workload, net: nn.Module) -> Call:
    """jactri."""
    return lambda x: w.operator.jactri(net, x)


def compiled(w: Workload, net: nn.Module, x: Tensor, engine: str = "inductor") -> jactri.Compiled:
    """`jactri.compile` of it, for inputs like ``x``."""
    lower = {"return_lower": True} if w.operator.lower else {}
    return jactri.compile(net, x, of=w.operator.of, engine=engine, **lower)


def ours_compiled(w: Workload, net: nn.Module, engine: str = "inductor") -> Callable[..., Any]:
    """The same, compiled at the first call."""
    made: list[jactri.Compiled] = []

    def call(x: Tensor, **options: Any) -> Any:
        if not made:
            made.append(compiled(w, net, x, engine))
        return made[0](x, **options)

    return call


def into_kept(call: Callable[..., Any]) -> Call:
    """A call with ``out=``, into memory that is there."""
    kept: list[Any] = []

    def into(x: Tensor) -> Any:
        if not kept:
            kept.append(call(x))
        return call(x, out=kept[0])

    return into


def parameters_out(w: Workload, net: nn.Module) -> Call:
    """jactri, into memory that is there."""
    return into_kept(lambda x, out=None: jactri.parameter_jacobian(net, x).dense(out))


def parameters_compiled_out(w: Workload, net: nn.Module, engine: str = "inductor") -> Call:
    """Both."""
    return into_kept(ours_compiled(w, net, engine))


def _scalar(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda v: net(v)[0]


def hessian_trace(w: Workload, net: nn.Module) -> Call:
    """vmap of the whole Hessian's trace, and the gradient."""
    f = _scalar(net)
    return vmap(lambda v: (grad(f)(v), hessian(f)(v).diagonal().sum()))


def jvp_of_grad(w: Workload, net: nn.Module) -> Call:
    """Forward over reverse, one direction at a time."""
    gradient = vmap(grad(_scalar(net)))

    def call(x: Tensor) -> Any:
        total = 0
        for i in range(w.columns):
            e = torch.zeros_like(x)
            e[:, i] = 1
            g, along = jvp(gradient, (x,), (e,))
            total = total + along[:, i]
        return g, total

    return call


def jvp_of_jvp(w: Workload, net: nn.Module) -> Call:
    """Forward over forward, one direction at a time."""

    def call(x: Tensor) -> Any:
        total, columns = 0, []
        for i in range(w.columns):
            e = torch.zeros_like(x)
            e[:, i] = 1
            d, dd = jvp(lambda v, e=e: jvp(net, (v,), (e,))[1], (x,), (e,))
            total = total + dd[:, 0]
            columns.append(d[:, 0])
        return torch.stack(columns, 1), total

    return call


def grad_of_grad(w: Workload, net: nn.Module) -> Call:
    """What PINNs are usually written with: autograd.grad twice, a row at a time."""

    def call(x: Tensor) -> Any:
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return g.detach(), trace(g, x)

    return call


def trace_of(transform: Callable) -> Callable:
    """vmap of the whole Jacobian's trace."""

    def make(w: Workload, net: nn.Module) -> Call:
        return vmap(lambda v: transform(net)(v).diagonal().sum())

    return make


trace_of_jacrev, trace_of_jacfwd = trace_of(jacrev), trace_of(jacfwd)


def trace_by_loop(w: Workload, net: nn.Module) -> Call:
    """The exact trace of continuous normalising flows: autograd.grad, a row at a time."""

    def call(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return trace(net(x), x)

    return call


def bilinear(w: Workload, net: nn.Module) -> Call:
    """W8's divergence by hand: tr(W3 D2 W2 D1 W1) = d2' (W2 * (W1 W3)') d1."""
    w1, w2, w3 = (m.weight for m in net if isinstance(m, nn.Linear))

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            a = net[1](net[0](x))
            b = net[3](net[2](a))
            form = w2 * (w1 @ w3).T
            return (((1 - b * b) @ form) * (1 - a * a)).sum(1)

    return call


def parameters_by_func(w: Workload, net: nn.Module) -> Call:
    """vmap(jacrev) of functional_call."""
    return lambda x: _of_parameters(net, x)


def kernel_by_contraction(w: Workload, net: nn.Module) -> Call:
    """torch's tutorial on neural tangent kernels: Jacobians first, then their products."""

    def call(x: Tensor) -> Tensor:
        jac = [j.flatten(2) for j in _of_parameters(net, x).values()]
        return sum(torch.einsum("Naf,Mbf->NMab", j, j) for j in jac)

    return call


def kernel_by_matmul(w: Workload, net: nn.Module) -> Call:
    """The same with one product a parameter."""

    def call(x: Tensor) -> Tensor:
        jac = [j.flatten(2).flatten(0, 1) for j in _of_parameters(net, x).values()]
        total = sum(j @ j.T for j in jac)
        n = w.samples
        return total.reshape(n, w.rows, n, w.rows).transpose(1, 2)

    return call
