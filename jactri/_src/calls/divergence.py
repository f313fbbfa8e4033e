"""`divergence`: the trace of every sample's Jacobian, exact or estimated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..base.backends import capturing
from ..base.classes import dressed
from ..base.memory import Budget
from ..meet.diagonal import summed
from ..meet.trace import Ways, trace, ways
from ..plan.owners import apart
from ..plan.planning import proof, prove_by_probe
from ..plan.samples import probe_mixing
from ..prologue.arguments import Options
from ..prologue.running import computing, eagerly, public
from ..read import handover
from ..read.graph import Graph, UnsupportedGraph
from ..read.reading import read
from ..read.vmapped import looping
from ..spread.shards import by_rank
from . import points
from .vectors import pull


@public
@by_rank("x")
def divergence(
    func: Callable[[Tensor], Tensor],
    x: Tensor,
    create_graph: bool = False,
    *,
    per_sample: bool | str = True,
    estimate: int | None = None,
    generator: torch.Generator | None = None,
    return_lower: bool = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """The divergence ``sum_i d func_i / d x_i`` of a vector field at each sample.

    Args:
        func: maps ``x`` to a tensor of its shape. It runs once.
        x: floating-point, ``(N, *in)``: N samples; or of one axis, a single point ``(n,)``.
        create_graph: return what can be differentiated again.
        per_sample: ``"assume"``: it is not proven that samples do not mix. The divergence sums ``d func[n, i] / d x[n,
            i]`` either way; an estimate of samples that mix is one of these sums all the same, with a larger error.
        estimate: K: an unbiased estimate from K products with random vectors of signs (Hutchinson 1990), instead of the
            divergence itself.
        generator: where the signs are drawn from; by default torch's own generator.
        return_lower: return ``(output, divergence)``; with ``estimate``, ``(output, estimate, standard_error)``.
        chunk_size: how many seeds, or random vectors, run at once.
        memory_limit: bytes (or ``"2GB"``) that the call may allocate after ``func`` has run.
        backend: as of `jactri.jacobian`.

    Returns:
        ``(N,)``, for a single point ``()``. With ``estimate``: ``(estimate, standard_error)``, both of that shape; the
        standard error is that of a mean of K independent terms, and NaN for K = 1, which tells nothing of their spread.

    Raises:
        TypeError: ``x``, or what ``func`` returns, is no tensor.
        RuntimeError: they are not of floating point; an output that has not the shape of ``x``; samples mix.
        ValueError: ``estimate`` below 1, a ``memory_limit`` too small for one seed, an option out of range.

    Cost:
        Linear layers with one or two elementwise functions in between: after the forward pass, one product of
        ``(N, h1) @ (h1, h2)``, with a matrix of weights; forming it costs ``2 h1 h2 n`` flops, on a CPU only where a
        weight has changed. Anything else, and where that is predicted to cost less: that of `jactri.diagonal`, whose
        last product is a contraction. An estimate: a backward pass for each of the K vectors.

    Examples:
        >>> field = lambda p: torch.stack([p[:, 0] * p[:, 1], p[:, 1] ** 2], 1)
        >>> points = torch.linspace(-1, 1, 10).reshape(5, 2)
        >>> exact = jactri.divergence(field, points)
        >>> torch.allclose(exact, 3 * points[:, 1], atol=1e-6)
        True

        An estimate from 64 random vectors, and how far it may be off:

        >>> mean, error = jactri.divergence(field, points, estimate=64)
        >>> bool(((mean - exact).abs() <= 4 * error + 1e-6).all())
        True
    """
    asked = Options(create_graph, chunk_size, memory_limit, backend, per_sample)
    points.check(x, "divergence", asked)
    if estimate is not None and (
        not isinstance(estimate, int) or isinstance(estimate, bool) or estimate < 1
    ):
        raise ValueError(f"estimate must be a number of random vectors above 0, got {estimate!r}")
    if generator is not None and estimate is None:
        raise ValueError("generator is for an estimate: pass estimate=K, or leave generator out")
    if handover.transforming((x,)):
        return _inside(eagerly(func), x, estimate, return_lower)
    out, y, leaf = points.evaluate(func, x, "divergence", create_graph, same=True)
    with computing(create_graph, backend):
        if estimate is None:
            made = (of_output(y, leaf, asked),)
        else:
            made = _estimate(y, leaf, asked, estimate, generator)
    if not create_graph:
        made = tuple(m.detach() for m in made)
    made = dressed(made, (out, x))
    if return_lower:
        return points.result(out, asked), *made
    return made if len(made) > 1 else made[0]


def of_output(y: Tensor, x: Tensor, asked: Options) -> Tensor:
    """The divergence of a recorded computation, differentiable in grad mode."""
    batch = points.batched(x)
    shape = x.shape[:1] if batch else ()
    if x.numel() == 0 or not y.requires_grad:
        return torch.zeros(shape, dtype=x.dtype, device=x.device)
    try:
        graph = read([y], [x])
    except UnsupportedGraph:
        entries = points.jacobian(y, x, asked).reshape(
            *shape, x[0].numel() if batch else x.numel(), -1
        )
        return entries.diagonal(0, -2, -1).sum(-1)
    if graph.outputs[0] is None or graph.inputs[0] is None:
        return torch.zeros(shape, dtype=x.dtype, device=x.device)
    found, budget = ways(graph, batch), Budget(asked.memory_limit, x.device)
    # seeds are summed over samples that are shown to be apart by more than ties
    if (
        batch
        and not found.closed
        and _prove(graph, y, x, asked, budget)
        and (fewer := summed(graph))
    ):
        every = sorted([*fewer, *found.orders], key=lambda order: order.seconds)
        found = Ways(every, closed=False)
    return trace(graph, found, batch, asked.chunk_size, budget).to(x.dtype)


def _prove(graph: Graph, y: Tensor, x: Tensor, asked: Options, budget: Budget) -> bool:
    """Whether samples do not mix; raises where they do, unless the caller has claimed that they do not."""
    if asked.assume and capturing(x.device):
        return False
    plan = proof(graph, "auto", (y,), (x,))
    if plan.tied or apart(graph):
        return True
    if asked.assume:
        return probe_mixing((y,), (x,), graph, room=budget.bounded) is None
    prove_by_probe(graph, plan, (y,), (x,), budget)
    return True


def _estimate(y: Tensor, x: Tensor, asked: Options, count: int, generator):
    """The mean of ``v' J v`` over vectors of random signs, and its standard error."""
    batch = points.batched(x)
    shape = x.shape[:1] if batch else torch.Size()
    nothing = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    if x.numel() == 0 or not y.requires_grad:
        zero = torch.zeros(shape, dtype=x.dtype, device=x.device)
        return zero, nothing if count == 1 else zero
    try:
        graph = read([y], [x])
    except UnsupportedGraph:
        graph = None
    if (
        batch
        and not asked.assume
        and graph is not None
        and None not in (graph.outputs[0], graph.inputs[0])
    ):
        _prove(graph, y, x, asked, Budget(asked.memory_limit, x.device))
    signs = torch.randint(0, 2, (count, *y.shape), generator=generator, device=y.device)
    signs = signs.to(y.dtype).mul_(2).sub_(1)
    (product,) = pull((y,), (x,), (signs,), asked, graph)
    product = product * signs
    each = product.flatten(2).sum(2) if batch else product.flatten(1).sum(1)
    mean = each.mean(0)
    if count == 1:
        return mean, nothing
    return mean, each.std(0) / count**0.5


def _inside(func, x: Tensor, estimate: int | None, lower: bool):
    """In a torch.func transform, which composes."""
    if estimate is not None:
        raise RuntimeError("estimate is not available inside of a torch.func transform")
    from torch.func import vmap

    batch = points.batched(x)

    def one(point: Tensor):
        def single(v: Tensor):
            y = func(v.unsqueeze(0)).squeeze(0) if batch else func(v)
            return y, y

        entries, y = handover.jacrev(single, has_aux=True)(point)
        points.check_same(y, point, "divergence")
        trace = entries.reshape(point.numel(), -1).diagonal().sum()
        return (y, trace) if lower else trace

    if not batch:
        return one(x)
    with looping():
        return vmap(one)(x)
