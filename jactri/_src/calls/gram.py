"""Gram matrices of the Jacobian: `jtj`, ``J^T M J``, and `jjt`, ``J M J^T``.

One end of the Jacobian is contracted (the outputs in `jtj`, the inputs in `jjt`), the other is the outer one. Seeds at
the contracted end come in chunks that are summed up, so that J is never there as a whole; seeds at the outer end need
all of it. At a cut ``J = R F`` of the graph, ``R^T M R`` comes first where that is cheaper: a bottleneck, or a last
Linear layer, whose ``W^T W`` all samples share. It is the order of a chain of matrix products (see `mixed`), by flops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base import backends
from ..base.cache import Cache
from ..base.classes import plain
from ..base.memory import OFFER, Budget, MemoryLimitTooSmall, Offer
from ..maps.letters import Network
from ..meet.gram import GramRequest, between, gram, pairs, summed_up, weight_in
from ..parameters.factored import Factors, inner
from ..parameters.inner import Link, of_second
from ..parameters.used import Used
from ..parameters.uses import Structure, find
from ..plan.owners import apart
from ..plan.planning import Wanted, check_answer, proof, prove_by_probe, samples_of
from ..plan.poles import met, suspects
from ..plan.sweep import follow
from ..prologue.arguments import (
    ASSUME,
    Options,
    as_tuple,
    check_batch,
    check_real,
    outputs,
    taken,
)
from ..prologue.running import computing, eagerly, prepare, public
from ..read import handover
from ..read.graph import Graph, UnsupportedGraph
from ..read.opaque import refuse_or_log
from ..read.reading import read
from ..spread.shards import by_rank
from . import whole
from .api import compute
from .normal import equations


@public
@by_rank("inputs", "weight")
def jtj(
    func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    weight: Tensor | tuple[Tensor | None, ...] | None = None,
    create_graph: bool = False,
    *,
    per_sample: bool | str = False,
    return_output: bool = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
    layout: torch.layout = torch.strided,
    blocksize: int | tuple[int, ...] | None = None,
) -> Any:
    """``J^T M J``: the metric that ``func`` pulls back to its inputs, a Gauss-Newton matrix.

    Args:
        func: takes the tensors of ``inputs``, returns a tensor or a tuple of tensors, over which is summed.
        inputs: a floating-point tensor or a tuple of them. They are not modified.
        weight: M. None for the identity; a real tensor, of the output's shape for a diagonal or of ``out + out``;
            nested as the outputs, None allowed for some. Under ``per_sample``, ``out`` is the shape of one sample, and
            a weight of its own for each has N in front. For outputs ``(N, m)``, a weight of two axes is ``(m, m)``.
        create_graph: the result can be differentiated, in the inputs and in the weight.
        per_sample: as of `jacobian`: samples must not mix, and the result is one matrix for each. With ``"assume"``,
            it is made of the Jacobians that `jacobian` then returns.
        return_output: return ``(output, result)``; the output is detached unless ``create_graph``.
        chunk_size: how many seeds run at once.
        memory_limit: bytes (or ``"2GB"``) that the call may allocate after ``func`` has run, the result included.
        backend: as of `jacobian`.
        layout: ``torch.sparse_bsr``, ``sparse_csr`` or ``sparse_csc`` where J is sparse, which then is never dense; see
            `normal_equations`, which gives J^T r and more from the same run, and says which weights it takes.
        blocksize: of ``torch.sparse_bsr``, how many entries of an input are one variable, as of `normal_equations`.

    Returns:
        ``G[i][k]`` of shape ``in_i + in_k`` (per sample: ``(N, *in_i, *in_k)``), a tensor for one input that is no
        tuple. Exactly symmetric where M is (but for a dense M that is itself differentiated). With a sparse ``layout``
        the matrix ``(in_i.numel(), in_k.numel())``.

    Raises:
        TypeError: inputs, outputs or weights that are not tensors (or None) or tuples of them.
        RuntimeError: integer or complex inputs; complex outputs; a weight that does not match an output; under
            ``per_sample``, samples that mix.
        ValueError: ``chunk_size`` below 1, a ``memory_limit`` too small, an unknown backend, no common batch axis
            under ``per_sample``; another ``layout``, and what `normal_equations` raises of one.

    Cost:
        The sweeps of a Jacobian and ``2 m n^2`` flops a sample, or less: of ``2 h^2 (m + n)`` and ``2 h n^2`` with a
        value of ``h`` entries through which all goes. Chunks of J are summed up where J does not fit.

    Examples:
        >>> decoder = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 30))
        >>> z = torch.randn(8, 2)
        >>> metric = jactri.jtj(decoder, z, per_sample=True)
        >>> J = jactri.jacobian(decoder, z, per_sample=True)
        >>> metric.shape, torch.allclose(metric, J.mT @ J, atol=1e-4)
        (torch.Size([8, 2, 2]), True)
    """
    asked = Options(create_graph, chunk_size, memory_limit, backend, per_sample, layout=layout)
    if layout is not torch.strided or blocksize is not None:
        made = equations("jtj", func, inputs, weight, asked, blocksize)
        return (made.residual, made.matrix) if return_output else made.matrix
    return _gram("jtj", func, inputs, weight, asked, return_output)


@public
@by_rank("inputs", "weight")
def jjt(
    func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    weight: Tensor | tuple[Tensor | None, ...] | None = None,
    create_graph: bool = False,
    *,
    per_sample: bool | str = False,
    return_output: bool = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
) -> Any:
    """``J M J^T``: the covariance M of the inputs, propagated to the outputs; a tangent kernel.

    It is `jtj` with inputs and outputs exchanged. Inputs may be complex: then the sum is over their real and their
    imaginary parts, both with the same M.

    Args:
        func: takes the tensors of ``inputs``, returns a tensor or a tuple of tensors.
        inputs: a floating-point or complex tensor, or a tuple of them, over which is summed.
        weight: M, nested as the inputs: as of `jtj`, of the shape of an input (a diagonal) or ``in + in``.
        create_graph: the result can be differentiated, in the inputs and in the weight.
        per_sample: one matrix a sample, as of `jtj`.
        return_output: return ``(output, result)``.
        chunk_size: how many seeds run at once.
        memory_limit: bytes that the call may allocate after ``func`` has run, the result included.
        backend: as of `jacobian`.

    Returns:
        ``G[j][k]`` of shape ``out_j + out_k`` (per sample: ``(N, *out_j, *out_k)``), a tensor for one output that is
        no tuple. Exactly symmetric where M is (but for a dense M that is itself differentiated).

    Raises:
        TypeError, RuntimeError, ValueError: as by `jtj`, of inputs in place of outputs.

    Cost:
        That of `jtj`, with ``m`` and ``n`` exchanged.

    Examples:
        >>> def position(p):  # of a radius and an angle
        ...     r, angle = p.unbind(1)
        ...     return torch.stack([r * angle.cos(), r * angle.sin()], 1)
        >>> measured = torch.tensor([[2.0, 0.0]])
        >>> noise = torch.diag(torch.tensor([0.01, 0.04]))
        >>> jactri.jjt(position, measured, noise, per_sample=True)  # r^2 times the angle's
        tensor([[[0.0100, 0.0000],
                 [0.0000, 0.1600]]])
    """
    asked = Options(create_graph, chunk_size, memory_limit, backend, per_sample)
    return _gram("jjt", func, inputs, weight, asked, return_output)


def _gram(kind: str, func, inputs, weight, asked: Options, return_output: bool):
    tupled, xs = taken(kind, inputs, asked)
    weights = weight if isinstance(weight, tuple) else (weight,)
    for w in weights:
        if w is not None:
            as_tuple(w, "weight", kind)
    if handover.transforming((*xs, *(w for w in weights if w is not None))):
        rows, tupled_out, result = _composed(
            kind, eagerly(func), xs, weights, asked.per_sample, asked.chunk_size
        )
        return nested(kind, rows, tupled, tupled_out, result, return_output)
    ran = prepare(func, xs, asked.create_graph, kind)
    rows = ran.dressed(rows_of(kind, ran.ys, ran.leaves, weight, asked), xs)
    output = ran.output(asked.create_graph) if return_output else None
    return nested(kind, rows, tupled, ran.tupled, output, return_output)


def rows_of(kind: str, ys, xs, weight, options: Options):
    """``G[i][k]`` of a recorded computation, for all pairs of inputs (``jtj``) or outputs."""
    if not ys:
        raise IndexError("outputs is an empty tuple: return at least one tensor")
    per_sample, create_graph = options.per_sample, options.create_graph
    check_real(kind, ys, xs if kind == "jtj" else ())
    check_batch(per_sample, ys, xs)
    weights = weight if isinstance(weight, tuple) else (weight,)
    ends = ("outputs", ys) if kind == "jtj" else ("inputs", xs)
    forms = check_weights(weights, *ends, per_sample)
    with computing(create_graph, options.backend):
        budget = Budget(options.memory_limit, xs[0].device)
        outer, n = xs if kind == "jtj" else ys, samples_of(ys, xs)
        size = sum(t.numel() * t.element_size() for t in outer) * sum(t.numel() for t in outer)
        alone = n > 1 and not per_sample
        offer = Offer(n, size / n) if alone else OFFER
        budget.check(f"the matrix of {kind}", size / n if per_sample and n else size, offer)
        asked = GramRequest(kind, forms, bool(per_sample), options.chunk_size, budget, offer)
        return _rows(ys, xs, _ready(weights, ends[1], create_graph), asked, options.assume)


def nested(kind, rows, tupled: bool, tupled_out: bool, result, return_output: bool):
    """Nested as asked for."""
    if not (tupled if kind == "jtj" else tupled_out):
        rows = rows[0][0]
    return (result, rows) if return_output else rows


def check_weights(weights, of: str, tensors, per_sample: bool | str) -> tuple[str, ...]:
    """The form of every weight: "identity", "diagonal" or "dense", with " a sample" for one of each.

    Raises RuntimeError for a weight that does not match.
    """
    if len(weights) == 1 and weights[0] is None:
        weights = weights * len(tensors)
    if len(weights) != len(tensors):
        raise RuntimeError(
            f"weight must be nested as the {of}: got {len(weights)} for {len(tensors)} {of}"
        )
    return tuple(
        _form(i, w, of, t, per_sample)
        for i, (w, t) in enumerate(zip(weights, tensors, strict=True))
    )


def _form(i: int, weight: Tensor | None, of: str, t: Tensor, per_sample: bool | str) -> str:
    if weight is None:
        return "identity"
    shape = tuple(t.shape[1:] if per_sample else t.shape)
    allowed = {"dense": shape + shape, "diagonal": shape}
    if per_sample:
        n = t.shape[:1]
        # of (N, m) and (m, m), the shape must not decide: it would change with the number of samples
        each = {} if len(shape) == 1 else {"diagonal a sample": (*n, *shape)}
        allowed = {**allowed, "dense a sample": (*n, *shape, *shape), **each}
    if not shape:  # a number is its own diagonal
        allowed = {k: v for k, v in allowed.items() if not k.startswith("dense")}
    for form, want in allowed.items():
        if weight.dim() == len(want):
            if tuple(weight.shape) == want and weight.is_floating_point():
                if weight.device != t.device:
                    raise RuntimeError(
                        f"weight for {of}[{i}] is on {weight.device}; expected {t.device}, as {of}[{i}] is"
                    )
                return form
            break
    wanted = ", ".join(f"{v} ({k})" for k, v in allowed.items())
    raise RuntimeError(
        f"weight for {of}[{i}] has shape {tuple(weight.shape)} and dtype {weight.dtype}; expected a floating-point "
        f"tensor of one of the shapes {wanted}"
        + (
            "; pass a diagonal of each sample by torch.diag_embed"
            if per_sample and len(shape) == 1
            else ""
        )
    )


def _ready(weights, tensors, create_graph: bool) -> list[Tensor | None]:
    if len(weights) != len(tensors):
        weights = weights * len(tensors)
    out = []
    for w, t in zip(weights, tensors, strict=True):
        if w is not None:
            w = plain(w)
            w = (w if create_graph else w.detach()).to(t.dtype.to_real())
        out.append(w)
    return out


def _rows(ys, xs, weights, asked: GramRequest, assume: bool):
    """``G[i][k]`` for all pairs of outer ends."""
    ends = (ys, xs) if asked.kind == "jtj" else (xs, ys)
    half = not asked.dense or _symmetric(weights, asked)
    per_sample = ASSUME if assume else asked.per_sample

    def of_jacobians(rows):
        if asked.kind == "jtj":
            rows = list(zip(*rows, strict=True))
        made = _of_jacobians(rows, ends, weights, asked, half)
        return _finished(made, range(len(ends[1])), ends[1], asked, half)

    try:
        graph = read(ys, xs)
    except UnsupportedGraph as reason:
        refuse_or_log("the function", ys[0].shape, [x.shape for x in xs], f"holds {reason}")
        wanted = Wanted(asked.budget, per_sample=per_sample)
        check_answer(ys, xs, wanted, "the Jacobian that it is made of")
        return of_jacobians(
            whole.rows(ys, xs, per_sample, reason, budget=asked.budget, chunk_size=asked.chunk_size)
        )
    if asked.kind == "jjt" and not asked.per_sample:
        found = _by_uses(graph, ys[0], xs, weights, asked)
        if found is not None:
            return _finished(found, graph.outputs, ys, asked, half)
    summed = False
    if asked.per_sample:
        plan = proof(graph, "auto", ys, xs)
        summed = not plan.tied
        if summed and assume:
            options = Options(
                create_graph=torch.is_grad_enabled(), per_sample=ASSUME, chunk_size=asked.chunk_size,
                memory_limit=asked.budget.given, backend=None,
            )  # fmt: skip
            return of_jacobians(compute(ys, xs, options))
        if summed and not apart(graph):
            prove_by_probe(graph, plan, ys, xs, asked.budget)
    outer = graph.inputs if asked.kind == "jtj" else graph.outputs
    made = gram(graph, weights, asked, summed, half)
    return _finished(made, outer, ends[1], asked, half)


_uses: Cache[tuple, Structure | None] = Cache(64)


def _by_uses(
    graph: Graph, y: Tensor, xs, weights, asked: GramRequest
) -> dict[tuple[int, int], Tensor] | None:
    """``J M J^T`` by the factors of the Jacobian in the inputs; None where these are not small.

    They are where inputs are weights of layers that a batch went through (see `parameters`).
    """
    seed, complex_end = graph.outputs[0], any(x.is_complex() for x in xs)
    if len(graph.outputs) > 1 or seed is None or asked.dense or complex_end:
        return None
    key = graph.key, backends.kernels_on(y.device)
    structure = _uses.of(key, lambda: _small(graph, seed))
    if structure is None or met(graph, suspects(graph, seeds=True)):
        return None
    names = [str(i) for i in range(len(xs))]
    used = Used(
        y, dict(zip(names, xs, strict=True)), dict(zip(names, graph.inputs, strict=True)), graph,
        structure, torch.is_grad_enabled(),
    )  # fmt: skip
    factors = Factors(used, asked.chunk_size, asked.budget.given)
    (batch, out), all_of = (
        used.letters(),
        {n: w for n, w in zip(names, weights, strict=True) if w is not None},
    )
    link = Link((), (*batch, *out, *of_second(batch), *of_second(out)))
    try:
        made = inner(factors, factors, link, all_of or None, "the matrix of jjt")
    except MemoryLimitTooSmall:
        return None  # a column at a time may take less
    return {(seed, seed): made.reshape(*y.shape, *y.shape)}


def _small(graph: Graph, seed: int) -> Structure | None:
    """The uses of a graph's inputs, if their factors take less than half of the Jacobian."""
    shape, inputs = graph.values[seed].shape, [v for v in graph.inputs if v is not None]
    if not shape or shape[0] < 2 or seed in inputs or not inputs:
        return None
    structure = find(graph, seed, inputs, [], [])
    whole = follow(graph, seed, True, list(inputs)).ends(graph)
    return structure if 2 * (structure.kept + structure.seen) < whole else None


def _symmetric(weights, asked: GramRequest) -> bool:
    """Whether every weight is, and stays so: what is differentiated may be any matrix."""
    for w, form in zip(weights, asked.forms, strict=True):
        if form.startswith("dense"):
            lead = int(form.endswith("sample"))
            n = (w.dim() - lead) // 2
            flat = w.flatten(lead + n).flatten(lead, lead + n - 1)
            if (w.requires_grad and torch.is_grad_enabled()) or backends.capturing(w.device):
                return False
            if not torch.equal(flat, flat.mT):
                return False
    return True


def _composed(kind, func, xs, weights, per_sample, chunk_size):
    """By torch.func, of a whole Jacobian."""
    shapes: list = []

    def as_tuples(*args):
        y = func(*args)
        shapes[:] = [isinstance(y, tuple)]
        return outputs(y, kind)[1]

    ys, rows = handover.jacobian(as_tuples, xs, True, per_sample=per_sample, chunk_size=chunk_size)
    check_real(kind, ys, xs if kind == "jtj" else ())
    ends = (ys, xs) if kind == "jtj" else (xs, ys)
    forms = check_weights(weights, "outputs" if kind == "jtj" else "inputs", ends[0], per_sample)
    asked = GramRequest(kind, forms, per_sample, chunk_size, Budget.unbounded(xs[0].device))
    if kind == "jtj":
        rows = list(zip(*rows, strict=True))
    half = not asked.dense
    made = _of_jacobians(rows, ends, _ready(weights, ends[0], True), asked, half)
    made = _finished(made, range(len(ends[1])), ends[1], asked, half)
    (tupled_out,) = shapes
    result = ys if tupled_out else ys[0]
    return made, tupled_out, result


def _of_jacobians(
    rows, ends, weights, asked: GramRequest, half: bool
) -> dict[tuple[int, int], Tensor]:
    """The products of whole Jacobians ``rows[outer][contracted]``."""
    contracted, outer = ends
    lead = int(asked.per_sample)

    def operand(network: Network, data: Tensor, end: Tensor, to: Tensor):
        near, far = network.axes(end.shape), network.axes(to.shape)
        if lead:
            far[0] = list(near[0])
        first, last = (near, far) if asked.kind == "jtj" else (far, near)
        dims = [c for axis in (*first, *last[lead:]) for c in axis]
        return network.add(dims, (near, far), data), near, far

    def products():
        # the real and the imaginary part of a complex end are two, with one weight
        parts = [
            (c, end, part)
            for c, end in enumerate(contracted)
            for part in ((torch.real, torch.imag) if end.is_complex() else (torch.real,))
        ]
        for number, (c, end, part) in enumerate(parts):
            for a, b in pairs(range(len(outer)), half):
                network = Network()
                left, right = (operand(network, part(rows[e][c]), end, outer[e]) for e in (a, b))
                form = asked.forms[c]
                middle = weight_in(network, form, weights[c], end.shape, asked.per_sample)
                yield (a, b), number, network, between(network, left, middle, right)

    return {pair: s.dense(asked.per_sample) for pair, s in summed_up(products()).items()}


def _finished(made, values, outer, asked: GramRequest, half: bool):
    """All pairs of outer ends, nested, in their shapes; exactly symmetric if the products are."""
    lead = int(asked.per_sample)
    rows: list[list[Tensor]] = []
    for i, a in enumerate(values):
        rows.append([])
        for k, b in enumerate(values):
            n, m = outer[i].dim() - lead, outer[k].dim() - lead
            shape = (*outer[i].shape, *outer[k].shape[lead:])
            dtype = torch.promote_types(outer[i].dtype, outer[k].dtype)
            turned = [*range(lead), *range(lead + m, lead + m + n), *range(lead, lead + m)]
            if (a, b) in made:
                block = made[a, b]
                if half and a == b:
                    block = block + block.permute(turned)
                    block = block / 2 if torch.is_grad_enabled() else block.mul_(0.5)
                    made[a, b] = block  # what it was made of is not held
            elif (b, a) in made:
                block = made[b, a].permute(turned).clone()
            else:
                block = torch.zeros(shape, dtype=dtype, device=outer[i].device)
            rows[i].append(block.to(dtype).reshape(shape))
    return tuple(tuple(row) for row in rows)
