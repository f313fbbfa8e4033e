"""`laplacian`, weighted or not, and `bilaplacian`."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, prod

import torch
from torch import Tensor

from ..base.classes import dressed
from ..base.memory import Budget, hold
from ..maps.curvature import Curves, Seeds
from ..plan.owners import apart
from ..plan.poles import finite, suspects
from ..plan.samples import places
from ..prologue.arguments import Options
from ..prologue.running import computing, eagerly, public
from ..read import handover
from ..read.graph import Graph, UnsupportedGraph
from ..read.opaque import refuse_or_log
from ..read.overriding import refuse
from ..read.vmapped import looping
from ..second.curves import UnknownCurvature, read_curves
from ..second.forward import Course, LaplacianRun, course, narrowed
from ..spread.shards import by_rank
from . import points
from . import weight as weights

CACHE_BYTES = 5 << 19
"""On a CPU, samples run in chunks whose largest block has about this size: it stays in a core's cache."""

ROWS = 2048
"""Rows of a product from which its rate no longer grows; fewer samples at once gain nothing."""

FEWEST = 8
"""Seeds of which no fewer run at once for the cache's sake: each chunk computes derivatives and a Laplacian anew."""


@public
@by_rank("x", "weight")
def laplacian(
    func: Callable[[Tensor], Tensor],
    x: Tensor,
    weight: Tensor | None = None,
    create_graph: bool = False,
    *,
    per_sample: bool | str = True,
    return_lower: bool = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """The Laplacian ``sum_i d2 func / d x_i^2`` at each sample, or with a weight ``sum_ij A_ij d2 func / d x_i d x_j``.

    ``func`` runs once. The graph that autograd recorded is read, and value, Jacobian and Laplacian go through it in one
    sweep: the forward Laplacian (Li et al. 2023, arXiv:2307.08214), which is collapsed Taylor mode of second order
    (Dangel et al. 2025, arXiv:2505.13644). Where an op in the graph has no known second-order term, the Jacobian of the
    gradient's graph is taken instead, and its trace; that is exact as well, and slower.

    Args:
        func: maps ``x`` to a tensor ``(N, *out)``, for a single point to ``(*out,)``.
        x: floating-point, ``(N, *in)``: N samples; or of one axis, a single point ``(n,)``.
        weight: A, of shape ``(*in, *in)``, or ``(N, *in, *in)`` with one for each sample; dtype and device of ``x``.
            Only its symmetric part counts. A low rank makes it cheaper.
        create_graph: return what can be differentiated again, with respect to parameters, ``x`` and ``weight``.
        per_sample: ``"assume"``: that samples do not mix is taken for granted where the algebra of axes does not show
            it. What is returned is then the trace of ``d g.sum(0) / d x[n]``, of the gradients ``g`` that `gradient`
            returns (at twice its cost, not by a forward Laplacian).
        return_lower: return ``(output, jacobian, laplacian)``, the Jacobian of shape ``(N, *out, *in)``.
        chunk_size: how many directions (columns of the Jacobian) run at once.
        memory_limit: bytes (or ``"2GB"``) that the call may allocate after ``func`` has run, the answer included; by
            default half of what is free. Not kept under ``create_graph``, whose graph holds all.
        backend: ``"torch"``, ``"triton"`` or ``"auto"``, as of `jactri.jacobian`.

    Returns:
        ``(N, *out)``, for a single point ``(*out,)``. At a kink, second derivatives are those of autograd's double
        backward (of ReLU: 0).

    Raises:
        TypeError: ``x``, ``weight`` or what ``func`` returns is no tensor.
        RuntimeError: they are not of floating point; samples mix (the op is named); a ``weight`` of another dtype or
            device.
        ValueError: ``func`` does not return a value for each sample; a ``weight`` of a wrong shape; a ``memory_limit``
            too small for one direction of one sample; an option out of range.

    Cost:
        ``n + 2`` rows a sample through every layer after the first: the forward pass, n tangents and the Laplacian;
        with a weight of rank r, ``r + 2``. On a CPU, samples run in chunks that stay in cache.

    Examples:
        >>> points = torch.randn(100, 3)
        >>> square = lambda p: p.square().sum(1)
        >>> u, gradient, lap = jactri.laplacian(square, points, return_lower=True)
        >>> torch.allclose(lap, torch.tensor(6.0)), torch.allclose(gradient, 2 * points)
        (True, True)

        With a weight, as the diffusion matrix of a Fokker-Planck equation: here ``2 tr A``.

        >>> A = torch.diag(torch.tensor([1.0, 2.0, 0.0]))
        >>> torch.allclose(jactri.laplacian(square, points, A), torch.tensor(6.0))
        True
    """
    asked = Options(create_graph, chunk_size, memory_limit, backend, per_sample)
    points.check(x, "laplacian", asked)
    with torch.set_grad_enabled(create_graph or torch.is_grad_enabled()):
        a = None if weight is None else weights.check(weight, x)
    if handover.transforming((x,) if weight is None else (x, weight)):
        return _inside(eagerly(func), x, a, return_lower)
    out, y, leaf = points.evaluate(func, x, "laplacian", create_graph)
    first, answer = dressed(of_output(y, leaf, a, asked, return_lower), (out, x))
    return (points.result(out, asked), first, answer) if return_lower else answer


@public
@by_rank("x")
def bilaplacian(
    func: Callable[[Tensor], Tensor],
    x: Tensor,
    create_graph: bool = False,
    *,
    per_sample: bool | str = True,
    return_lower: bool = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """The Laplacian of the Laplacian, ``sum_ij d4 func / d x_i^2 d x_j^2``, at each sample.

    The graph of the first Laplacian is read again. ``func`` should have four derivatives: at kinks the result is what
    autograd's derivatives give.

    Args:
        func: as of `laplacian`, like all that follow.
        x: floating-point, ``(N, *in)``, or a single point ``(n,)``.
        create_graph: return what can be differentiated again.
        per_sample: ``"assume"``: that samples do not mix is taken for granted.
        return_lower: return ``(output, laplacian, bilaplacian)``.
        chunk_size: how many directions run at once.
        memory_limit: bytes that the call may allocate, but for what its graphs hold.
        backend: ``"torch"``, ``"triton"`` or ``"auto"``.

    Returns:
        ``(N, *out)``, for a single point ``(*out,)``.

    Raises:
        TypeError, RuntimeError, ValueError: as by `laplacian`.

    Cost:
        Two Laplacians, the second over a graph of ``n + 1`` rows a sample; all of it is held.

    Examples:
        >>> points = torch.randn(5, 2, dtype=torch.float64)
        >>> r4 = lambda p: p.square().sum(1) ** 2
        >>> jactri.bilaplacian(r4, points).round(decimals=6)
        tensor([64., 64., 64., 64., 64.], dtype=torch.float64)
    """
    asked = Options(create_graph, chunk_size, memory_limit, backend, per_sample)
    points.check(x, "bilaplacian", asked)
    if handover.transforming((x,)):
        func = eagerly(func)

        def once(v: Tensor) -> Tensor:
            return _inside(func, v, None, False)

        answer = _inside(once, x, None, False)
        return (func(x), once(x), answer) if return_lower else answer
    out, y, leaf = points.evaluate(func, x, "bilaplacian", create_graph)
    held = Options(True, chunk_size, memory_limit, "auto", per_sample)
    _, lap = of_output(y, leaf, None, held, False)
    _, answer = of_output(lap, leaf, None, asked, False)
    lap, answer = dressed((points.result(lap, asked), answer), (out, x))
    return (points.result(out, asked), lap, answer) if return_lower else answer


def of_output(
    y: Tensor, x: Tensor, a: Tensor | None, asked: Options, lower: bool
) -> tuple[Tensor | None, Tensor]:
    """The Jacobian (if ``lower``) and the Laplacian of a recorded computation; ``a`` is a symmetric weight."""
    refuse("a second derivative")
    with computing(asked.create_graph, asked.backend):
        shape = (*y.shape, *points.inner(x))
        if y.numel() == 0 or x.numel() == 0 or not y.requires_grad:
            first = torch.zeros(shape, dtype=x.dtype, device=x.device) if lower else None
            return first, torch.zeros_like(y)
        first = None
        try:
            graph, curves = read_curves(y, x)
            found = _forward(graph, curves, y, x, a, asked=asked, lower=lower and a is None)
            if suspects(graph, curves) and not _finite(found):
                found = (
                    None  # what autograd's second derivatives are there, only reverse mode tells
                )
        except (UnknownCurvature, UnsupportedGraph) as reason:
            refuse_or_log(
                str(reason),
                y.shape,
                [x.shape],
                "has no known second-order term in a forward Laplacian",
            )
            found = None
        if found is None:
            first, answer = by_gradient(y, x, a, asked)
        else:
            first, answer = found
            if lower and first is None:
                first = points.jacobian(y, x, asked)
    if not asked.create_graph:
        answer = answer.detach()
        first = None if first is None else first.detach()
    return first, answer


def _finite(found) -> bool:
    """Whether a result is there and finite."""
    return found is not None and all(finite(t) for t in found if t is not None)


def _forward(graph: Graph, curves: Curves, y: Tensor, x: Tensor, a, *, asked: Options, lower: bool):
    """``(jacobian or None, laplacian)`` by the forward Laplacian; None where samples are not proven to be apart."""
    batch = points.batched(x)
    shape = (*y.shape, *points.inner(x))
    if graph.outputs[0] is None or graph.inputs[0] is None:  # y does not depend on x
        like = {"dtype": y.dtype, "device": y.device}
        return torch.zeros(shape, **like) if lower else None, torch.zeros_like(y)
    n = prod(points.inner(x))
    block, plus, count = None, None, n
    if a is not None:
        block, plus = weights.directions(a, x, asked.create_graph)
        count = block.shape[0]
        if count == 0:
            return None, torch.zeros_like(y)
    unit = block is None
    plan = course(graph, curves, batch, None if unit else count)
    tied = batch and plan.tied
    if not plan.tied:  # every direction at all samples at once, as at a single point
        with torch.enable_grad():  # to second order
            if asked.assume or not apart(graph):
                return None
        unit, plan = False, course(graph, curves, False, count)
    seeds, samples, where, plan = _chunks(
        graph, curves, plan, y, x, count=count, unit=unit, lower=lower, asked=asked
    )
    formed = block is not None or seeds < count or not unit
    spans: list[tuple[int, int] | None] = [None]
    if where is not None:
        spans = [(i, min(samples, y.shape[0] - i)) for i in range(0, y.shape[0], samples)]
    whole = len(spans) == 1 and seeds >= count
    out = first = None
    if not whole and not asked.create_graph:
        out = torch.zeros(y.shape, dtype=y.dtype, device=y.device)
        if lower:
            first = torch.empty((*y.shape, n), dtype=y.dtype, device=y.device)
    columns, courses = [], {}
    for span in spans:
        part, own = (graph, curves) if span is None else narrowed(graph, curves, where, *span)
        length = None if span is None else span[1]
        for start in range(0, count, seeds):
            stop = min(start + seeds, count)
            directions = None
            if formed:
                directions = _directions(block, start, stop, span, x, batch)
            size = None if directions is None else stop - start
            if (size, length) not in courses:
                courses[size, length] = course(part, own, tied, size, length)
            signs = Seeds(None if plus is None else min(max(plus - start, 0), stop - start))
            tangents, lap = LaplacianRun(part, own, courses[size, length], signs)(directions)
            tangents = tangents.movedim(0, -1)
            if whole:
                lap = torch.zeros_like(y) if lap is None else lap
                return tangents.reshape(shape) if lower else None, lap
            if asked.create_graph:  # all samples, some seeds
                if lap is not None:
                    out = lap if out is None else out + lap
                columns.append(tangents)
                continue
            target = out if span is None else out.narrow(0, *span)
            if lap is not None:
                target += lap
            if lower:
                target = first if span is None else first.narrow(0, *span)
                target[..., start:stop] = tangents
    if asked.create_graph:
        first = torch.cat([c.expand(*y.shape, -1) for c in columns], -1) if lower else None
        out = torch.zeros_like(y) if out is None else out
    return None if first is None else first.reshape(shape), out


def _directions(
    block: Tensor | None, start: int, stop: int, span, x: Tensor, batch: bool
) -> Tensor:
    """A chunk of seeds (of the unit vectors, if there is no block of them), for a range of samples."""
    if block is None:
        size = points.inner(x)
        units = torch.eye(stop - start, dtype=x.dtype, device=x.device)
        units = torch.nn.functional.pad(units, (start, prod(size) - stop))
        block = units.reshape(stop - start, *((1,) if batch else ()), *size)
    else:
        block = block[start:stop]
    if not batch:
        return block
    n = x.shape[0] if span is None else span[1]
    if block.shape[1] == 1:
        return block.expand(-1, n, *block.shape[2:])
    return block if span is None else block.narrow(1, *span)


def _chunks(
    graph,
    curves,
    plan: Course,
    y: Tensor,
    x: Tensor,
    *,
    count: int,
    unit: bool,
    lower: bool,
    asked: Options,
) -> tuple[int, int, dict | None, Course]:
    """How many seeds and how many samples run at once, and the course of that.

    Third, where the samples are in every value, or None where all run in one. ``unit``: the seeds are the unit vectors.
    """
    batch = points.batched(x)
    n = x.shape[0] if batch else 1
    seeds = count if asked.chunk_size is None else min(asked.chunk_size, count)
    if seeds < count and unit:
        plan = course(graph, curves, batch, count)
    values = [graph.values[v] for v in plan.sweep.layouts]
    widest, shape = max((prod(v.shape) * v.dtype.itemsize, v.shape) for v in values)
    rows = max(prod(shape[:-1]) // n, 1)  # a seed of a sample has in a product

    def need(k: int, c: int) -> float:
        """Bytes of the blocks for k seeds of c samples: tangents with their Laplacian, derivatives, sums of squares."""
        return (plan.peak * (k + 1) / count + 6 * widest) * c / n

    if asked.create_graph:
        return seeds, n, None, plan
    budget = Budget(asked.memory_limit, x.device)
    answers = y.numel() * y.element_size() * (1 + (prod(points.inner(x)) if lower else 0))
    limit = budget.less(answers).limit(need(seeds, n))
    samples, where, most = n, None, n
    cached = x.device.type == "cpu"
    if cached:
        fewest = ceil(ROWS / (rows * (seeds + 1)))
        most = max(CACHE_BYTES * n // max(widest * (seeds + 1), 1), fewest, 1)
    if batch and n > 1 and (most < n or need(seeds, n) > limit):
        where = places(graph, [plan.sweep])
        if where is not None and narrowed(graph, curves, where, 0, 1) is not None:
            samples = ceil(n / ceil(n / most))
            while need(seeds, samples) > limit and samples > 1:
                samples = (samples + 1) // 2
    fits = seeds
    alone = samples in (1, n) and asked.chunk_size is None
    if cached and alone and 2 * plan.sweep.largest(graph) > widest * seeds:
        # one sample may be more than the cache holds, and has no ties that a chunk would lose
        while (
            fits > FEWEST
            and widest * samples * (fits + 1) > CACHE_BYTES * n
            and 2 * rows * samples * (fits // 2 + 1) >= ROWS
        ):
            fits = (fits + 1) // 2
    if unit and seeds == count and (fits < count or need(seeds, samples) > limit):
        plan = course(graph, curves, batch, count)
    seeds = fits
    while need(seeds, samples) > limit:
        if seeds == 1:
            what = "one direction of one sample" if samples == 1 else "one direction"
            raise budget.refusal(what, need(1, samples) + answers, answers)
        seeds = (seeds + 1) // 2
    if asked.memory_limit is None:
        hold(need(seeds, samples), x.device)
    return seeds, samples, where if samples < n else None, plan


def by_gradient(y: Tensor, x: Tensor, a, asked: Options) -> tuple[Tensor, Tensor]:
    """The Jacobian, and the trace of the Jacobian of its graph: exact wherever `jactri.jacobian` is."""
    first = points.jacobian(y, x, asked, create_graph=True)
    batch = points.batched(x)
    size = points.inner(x)
    n = prod(size)
    with torch.enable_grad():
        flat = first.reshape(*y.shape, n)
    if not first.requires_grad:
        return first, torch.zeros_like(y)
    # columns at once, so that what is computed beside the trace stays small
    each = max(y.numel() * n * y.element_size(), 1)
    budget = Budget(asked.memory_limit, x.device).less(each)
    columns = budget.count(2 * each, min(n, asked.chunk_size or n))
    total = torch.zeros_like(y)
    for start in range(0, n, columns):
        stop = min(start + columns, n)
        with torch.enable_grad():
            part = flat[..., start:stop].contiguous()
        if not part.requires_grad:
            continue
        second = points.jacobian(part, x, asked).reshape(*y.shape, stop - start, n)
        if a is None:
            total = total + second[..., start:stop].diagonal(0, -2, -1).sum(-1)
        else:
            rows = a[..., start:stop, :]
            if batch and rows.dim() == 3:
                rows = rows.reshape(-1, *[1] * (y.dim() - 1), *rows.shape[1:])
            total = total + (second * rows).sum((-2, -1))
    return first, total


def _inside(func, x: Tensor, a: Tensor | None, lower: bool):
    """In a torch.func transform, which composes: the trace of its own Hessian."""
    from torch.func import vmap

    def one(point: Tensor, form: Tensor | None):
        def single(v: Tensor) -> Tensor:
            return func(v.unsqueeze(0)).squeeze(0) if points.batched(x) else func(v)

        n = point.numel()
        second = handover.hessian(single)(point)
        second = second.reshape(*second.shape[: second.dim() - 2 * point.dim()], n, n)
        if form is None:
            lap = second.diagonal(0, -2, -1).sum(-1)
        else:
            lap = (second * form).sum((-2, -1))
        return (single(point), handover.jacrev(single)(point), lap) if lower else lap

    if not points.batched(x):
        return one(x, a)
    with looping():
        return vmap(one, in_dims=(0, 0 if a is not None and a.dim() == 3 else None))(x, a)
