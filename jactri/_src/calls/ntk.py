"""The empirical neural tangent kernel, from the factors of parameter Jacobians."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..base.remedies import one_of
from ..parameters.factored import Factors, inner
from ..parameters.inner import Link, of_second
from ..parameters.recorded import Recorded
from ..prologue.arguments import check_options
from ..prologue.running import public
from ..spread.kernels import check_proven, of_ranks
from ..spread.shards import ALONE, Share, taken_here
from .parameters import formed_gram

COMPUTE = ("full", "trace", "diagonal")


@public
def empirical_ntk(
    module: torch.nn.Module,
    x1: Tensor | tuple[Tensor, ...],
    x2: Tensor | tuple[Tensor, ...] | None = None,
    *,
    compute: str = "full",
    params: Any = None,
    per_sample: bool | str = True,
    create_graph: bool = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
) -> Tensor:
    """The kernel ``J(x1) J(x2)^T`` of a module's Jacobians in its parameters (Jacot et al. 2018, arXiv:1806.07572).

    The Jacobians are not formed: for a layer the kernel is the product of that of its cotangents and that of its inputs
    (Novak et al. 2022, arXiv:2206.08720).

    Args:
        module: as of `parameter_jacobian`.
        x1: a batch of ``N1`` samples, which must not mix.
        x2: a batch of ``N2`` samples; without it, ``x1`` with itself, computed once.
        compute: ``"full"``: ``(N1, N2, *out, *out)``; ``"diagonal"``: of that, ``(N1, N2, *out)``; ``"trace"``: its
            sum, ``(N1, N2)``.
        params: as of `parameter_jacobian`.
        per_sample: as of `parameter_jacobian`.
        create_graph: as of `parameter_jacobian`.
        chunk_size: as of `parameter_jacobian`.
        memory_limit: bytes (or ``"2GB"``) that the call may allocate after the forward passes, the kernel included; by
            default half of what is free. Entries of the output run in chunks under it, and parameters in ranges.

    Returns:
        The kernel, of the shape that ``compute`` says, in the output's dtype.

    Raises:
        ValueError: another ``compute``; and what `parameter_jacobian` raises.
        RuntimeError: outputs of different shapes.

    Cost:
        Two forward passes and reverse sweeps; then for a Linear layer ``(N1 m) (N2 m)`` multiply-adds an output
        feature.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> train, test = torch.randn(6, 3), torch.randn(4, 3)
        >>> kernel = jactri.empirical_ntk(net, test, train)
        >>> kernel.shape
        torch.Size([4, 6, 2, 2])
        >>> trace = jactri.empirical_ntk(net, test, train, compute="trace")
        >>> torch.allclose(trace, kernel.diagonal(0, 2, 3).sum(-1), atol=1e-4)
        True
    """
    check(compute)
    check_options("auto", chunk_size, None, create_graph)
    xs = (x1,) if x2 is None else (x1, x2)
    runs, shares = [], []
    for i, x in enumerate(xs):
        name = f"x{i + 1}"
        share, x, proving = taken_here("empirical_ntk", name, x, per_sample, create_graph)
        runs.append(Recorded(module, x, params, create_graph, "empirical_ntk", per_sample=proving))
        check_proven(runs[-1], share)
        shares.append(share)
    return of_runs(runs, compute, chunk_size, memory_limit, shares)


def check(compute: str) -> None:
    """Raise ValueError for what ``compute`` cannot be."""
    if compute not in COMPUTE:
        raise ValueError(one_of("compute", compute, COMPUTE))


def of_runs(
    runs: list[Recorded], compute: str, chunk_size, memory_limit, shares: Sequence[Share] = (ALONE,)
) -> Tensor:
    """The kernel of one forward pass with itself, or of two; ``shares``: how their batches are shared out."""
    a, b = runs[0], runs[-1]
    if a.out != b.out:
        raise RuntimeError(
            f"the outputs for x1 and x2 must have one shape behind the batch, got {a.out} and {b.out}"
        )
    shapes = (a.n,), _shapes(a.out)[compute]
    with a.computing():
        made = [Factors(run, chunk_size, memory_limit) for run in runs]
        return of_ranks(
            partial(_kernel, compute), (made[0], made[-1]), (shares[0], shares[-1]), shapes
        )


def _shapes(out: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """What the kernel of two samples is."""
    return {"full": (*out, *out), "diagonal": out, "trace": ()}


def _kernel(compute: str, first: Factors[Recorded], second: Factors[Any]) -> Tensor:
    a, b = first.run, second.run
    n1, n2, out = a.n, b.n, a.out
    m, axes, shapes = prod(out), len(out), _shapes(out)
    if not (n1 and n2 and m):
        return a.y.new_zeros((n1, n2, *shapes[compute]))
    if a.structure is None or b.structure is None:
        made = formed_gram(first, second).movedim(axes + 1, 1)
        return _reduced(made.reshape(n1, n2, m, m), compute).reshape(n1, n2, *shapes[compute])
    (batch1, out1), (batch2, out2) = a.letters(), b.letters()
    lead = (*batch1, *of_second(batch2))
    alike = [a.seeds[s] for s in out1] == [b.seeds[s] for s in out2]
    if compute == "full" or not alike:
        made = inner(first, second, Link((), (*lead, *out1, *of_second(out2))))
        if compute != "full":
            made = _reduced(made.reshape(n1, n2, m, m), compute)
    elif compute == "diagonal":
        made = inner(first, second, Link(tuple(zip(out1, out2, strict=True)), (*lead, *out1)))
    else:
        made = inner(first, second, Link(tuple(zip(out1, out2, strict=True)), lead))
    return made.reshape(n1, n2, *shapes[compute])


def _reduced(kernel: Tensor, compute: str) -> Tensor:
    if compute == "full":
        return kernel
    diagonal = kernel.diagonal(0, 2, 3)
    return diagonal if compute == "diagonal" else diagonal.sum(-1)
