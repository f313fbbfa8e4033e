"""Products with the Jacobian: `jvp` and `vjp`, for one vector or a block of them in one sweep.

The sweep is that of a Jacobian, from blocks that are given instead of an identity (see `sweep.follow_given`): all
tangents are pushed, and all cotangents pulled, together. `push` and `pull` are the same on a recorded computation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..base.classes import plain
from ..base.memory import Budget
from ..base.remedies import one_of
from ..plan.poles import finite, suspects
from ..prologue.arguments import Options, as_tuple, taken
from ..prologue.running import computing, detached, eagerly, prepare, public
from ..prologue.streaming import Streamed
from ..read import handover, overriding
from ..read.graph import Graph, UnsupportedGraph
from ..read.joining import for_given
from ..read.opaque import refuse_or_log
from ..read.reading import read
from ..run.given import multiply
from . import few
from .api import compute
from .by_autograd import pulled, pushed
from .strictness import check_ends, check_varying

Blocks = Sequence[Tensor | None]

Read = Graph | UnsupportedGraph | None


@public
def jvp(
    func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    tangents: Tensor | tuple[Tensor, ...] | None = None,
    create_graph: bool = False,
    strict: bool = False,
    *,
    differentiate: str | None = "auto",
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
) -> tuple[Any, Any]:
    """The output of ``func`` at ``inputs``, and its Jacobian times ``tangents``: ``sum_i J[:, i] t_i``.

    Args:
        func: takes the tensors of ``inputs``, returns a tensor or a tuple of tensors. It runs once.
        inputs: a floating-point tensor or a tuple of them. They are not modified.
        tangents: nested as ``inputs``; each of its input's shape, or each ``(K, *input)``: a block of K tangents, which
            are pushed at once. For one input of a single element they may be left out: a one.
        create_graph: ``True`` is ``differentiate="both"``.
        strict: raise for an input that no output depends on, for an output that depends on no input, and under
            ``create_graph`` for a product that is constant.
        differentiate: what keeps a graph. ``None``: nothing, and nothing is recorded on the way; the tangents go with
            the run of ``func``, op by op, in the memory of ``K + 1`` runs without grad. ``"output"``: the output, which
            is to be trained by a target made of the product, detached. ``"both"``: the product too, in the inputs and
            in the tangents. ``"auto"``: nothing, as ``None``, but the graph is there until the call ends.
        chunk_size: how many of the K tangents run at once.
        memory_limit: bytes (or ``"2GB"``) that the call may allocate after ``func`` has run, the product included.
        backend: as of `jacobian`.

    Returns:
        ``(output, product)``: the product is nested as the output, of its shapes and dtypes, with K in front for
        blocks. Both are detached unless ``differentiate`` says else. Where an output does not depend on the inputs:
        zeros.

    Raises:
        TypeError: inputs, tangents or outputs that are not tensors or tuples of them.
        RuntimeError: integer inputs; tangents that do not match the inputs (the argument, its shape and the shape
            expected are named), or that are missing; blocks of different K; what ``strict`` forbids. Under
            ``differentiate=None``, a ``func`` that calls ``torch.autograd.grad`` itself.
        ValueError: ``chunk_size`` below 1, a ``memory_limit`` too small for one tangent, an unknown backend or
            ``differentiate``; ``differentiate=None`` with ``chunk_size``, ``memory_limit`` or ``strict``.

    Cost:
        About as many flops as ``K`` forward passes, beside the one of ``func``.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
        >>> x, tangents = torch.randn(8, 3), torch.randn(4, 8, 3)  # K = 4
        >>> y, along = jactri.jvp(net, x, tangents)
        >>> J = jactri.jacobian(net, x, per_sample=True)
        >>> torch.allclose(along, torch.einsum("noi,kni->kno", J, tangents), atol=1e-5)
        True
    """
    _check_differentiate(differentiate, create_graph)
    create_graph = create_graph or differentiate == "both"
    asked = Options(create_graph, chunk_size, memory_limit, backend, strict=strict)
    _, xs = taken("jvp", inputs, asked)
    ts = _given(tangents, "tangents", "jvp", "inputs", xs)
    block = check_vectors("tangents", ts, "inputs", xs)
    if differentiate is None:
        refused = {"chunk_size": chunk_size, "memory_limit": memory_limit, "strict": strict or None}
        _check_alone(**refused)
    if handover.transforming((*xs, *ts)):
        handover.refuse(strict=strict)
        output, product = handover.jvp(eagerly(func), xs, ts, block, chunk_size)
        output = detached(output) if differentiate is None else output
        return output, detached(product) if differentiate in (None, "output") else product
    if differentiate is None and not (block and not len(ts[0])) and not overriding.now.get():
        return _streamed(func, xs, ts, block, asked)
    kept = create_graph or differentiate == "output"
    ran = prepare(func, xs, kept, "jvp")
    if strict:
        check_ends(ran.ys, ran.leaves, True)
    with computing(create_graph):
        blocks = ts if block else [t.unsqueeze(0) for t in ts]
        made = push(ran.ys, ran.leaves, blocks, asked)
        product = _nested(made, block, ran.tupled)
    if strict and create_graph:
        check_varying(made, "output")
    return ran.output(kept), ran.dressed(product, xs)


_DIFFERENTIATE = (None, "output", "both", "auto")


def _check_differentiate(differentiate, create_graph: bool) -> None:
    if differentiate not in _DIFFERENTIATE:
        raise ValueError(one_of("differentiate", differentiate, _DIFFERENTIATE))
    if create_graph and differentiate not in ("auto", "both"):
        raise ValueError(
            f"create_graph=True is differentiate='both', and excludes differentiate={differentiate!r}; leave "
            "create_graph out"
        )


def _check_alone(**options) -> None:
    """Raise for options that need the graph of the function as a whole."""
    for name, given in options.items():
        if given is not None:
            raise ValueError(
                f"differentiate=None pushes all tangents while func runs, and takes no {name}={given!r}; leave one of "
                "the two out"
            )


def _streamed(func, xs, ts, block: bool, asked: Options) -> tuple[Any, Any]:
    """`jvp` in one pass, nothing of which is kept."""
    ts = [_ready(t if block else t.unsqueeze(0), x, False) for t, x in zip(ts, xs, strict=True)]

    def whole(ys, leaves, blocks, graph):
        return push(ys, leaves, blocks, Options(backend=asked.backend), graph)

    stream = Streamed(ts, whole, asked.backend)
    ran = prepare(func, xs, False, "jvp", stream=stream)
    with torch.no_grad():
        product = _nested(stream.products(ran.ys), block, ran.tupled)
    return ran.output(False), ran.dressed(product, xs)


@public
def vjp(
    func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    cotangents: Tensor | tuple[Tensor, ...] | None = None,
    create_graph: bool = False,
    strict: bool = False,
    *,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
) -> tuple[Any, Any]:
    """The output of ``func`` at ``inputs``, and ``cotangents`` times its Jacobian: ``sum_j c_j J[j, :]``.

    Args:
        func: takes the tensors of ``inputs``, returns a tensor or a tuple of tensors. It runs once.
        inputs: a floating-point tensor or a tuple of them. They are not modified.
        cotangents: nested as the outputs; each of its output's shape, or each ``(K, *output)``: a block of K
            cotangents, which are pulled at once. For one output of a single element they may be left out: a one.
        create_graph: the product can be differentiated, in the inputs and in the cotangents; so can the output.
        strict: raise for an input that no output depends on, for an output without a graph, and under
            ``create_graph`` for a product that is constant.
        chunk_size: how many of the K cotangents run at once.
        memory_limit: bytes (or ``"2GB"``) that the call may allocate after ``func`` has run, the product included.
        backend: as of `jacobian`.

    Returns:
        ``(output, product)``: the product is nested as the inputs, of their shapes and dtypes, with K in front for
        blocks. The output is detached unless ``create_graph``. For an input that no output depends on: zeros.

    Raises:
        TypeError: inputs, cotangents or outputs that are not tensors or tuples of them.
        RuntimeError: integer inputs; cotangents that do not match the outputs (the argument, its shape and the shape
            expected are named), or that are missing; blocks of different K; what ``strict`` forbids.
        ValueError: ``chunk_size`` below 1, a ``memory_limit`` too small for one cotangent, an unknown backend.

    Cost:
        About as many flops as ``K`` backward passes to the inputs, beside the forward pass of ``func``.

    Examples:
        >>> x = torch.randn(8, 3)
        >>> func = lambda x, b: (x + b).sin()
        >>> y, (of_x, of_b) = jactri.vjp(func, (x, torch.zeros(3)), torch.ones(8, 3))
        >>> torch.allclose(of_x, x.cos())
        True
        >>> torch.allclose(of_b, x.cos().sum(0), atol=1e-5)
        True
    """
    asked = Options(create_graph, chunk_size, memory_limit, backend, strict=strict)
    tupled, xs = taken("vjp", inputs, asked)
    cs = None if cotangents is None else as_tuple(cotangents, "cotangents", "vjp")[1]

    def ready(ys):
        given = _given(cs, "cotangents", "vjp", "outputs", ys)
        return given, check_vectors("cotangents", given, "outputs", ys)

    if handover.transforming((*xs, *(cs or ()))):
        handover.refuse(strict=strict)
        return handover.vjp(eagerly(func), xs, tupled, ready, chunk_size)
    ran = prepare(func, xs, create_graph, "vjp")
    if not ran.ys:
        raise IndexError("outputs is an empty tuple: return at least one tensor")
    if strict:
        check_ends(ran.ys, ran.leaves, False)
    with computing(create_graph):
        cs, block = ready(ran.ys)
        blocks = cs if block else [c.unsqueeze(0) for c in cs]
        made = pull(ran.ys, ran.leaves, blocks, asked)
        product = _nested(made, block, tupled)
    if strict and create_graph:
        check_varying(made, "input")
    return ran.output(create_graph), ran.dressed(product, xs)


def _given(vectors, name: str, call: str, of: str, tensors) -> tuple[Tensor, ...]:
    """The caller's vectors; where there are none, a one for a single number. Raises RuntimeError for more."""
    if vectors is not None:
        return as_tuple(vectors, name, call)[1]
    if len(tensors) != 1 or tensors[0].numel() != 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise RuntimeError(
            f"{name} of {call} can be left out only where the {of} are one tensor with a single element, but they have "
            f"the shapes {shapes}; pass {name}, nested as the {of}"
        )
    return (torch.ones_like(tensors[0]),)


def check_vectors(name: str, vectors, of: str, tensors, last: bool = False) -> bool:
    """Whether ``vectors`` are blocks, with an axis K in front, or ``last``. Raises RuntimeError for no match."""
    if len(vectors) != len(tensors):
        raise RuntimeError(
            f"{name} must be nested as the {of}: got {len(vectors)} for {len(tensors)} {of}"
        )
    columns = None
    for i, (v, t) in enumerate(zip(vectors, tensors, strict=True)):
        want = tuple(t.shape)
        block = v.dim() == t.dim() + 1
        if tuple(v.shape[: t.dim()] if last else v.shape[block:]) != want or v.dim() > t.dim() + 1:
            sizes = ", ".join(map(str, (*want, "K") if last else ("K", *want)))
            raise RuntimeError(
                f"{name}[{i}] has shape {tuple(v.shape)}; expected {want}, the shape of {of}[{i}], or ({sizes}) for a "
                f"block of K {name}"
            )
        if not (v.is_floating_point() or v.is_complex()):
            raise RuntimeError(
                f"{name}[{i}] has dtype {v.dtype}; expected that of {of}[{i}]; pass v.to({t.dtype})"
            )
        if v.is_complex() and not t.is_complex():
            raise RuntimeError(f"{name}[{i}] is complex ({v.dtype}), but {of}[{i}] is {t.dtype}")
        if v.device != t.device:
            raise RuntimeError(
                f"{name}[{i}] is on {v.device}; expected {t.device}, as {of}[{i}] is; pass v.to({str(t.device)!r})"
            )
        own = v.shape[-1 if last else 0] if block else None
        if i and own != columns:
            raise RuntimeError(
                f"{name}[0] is {_kind(columns)} and {name}[{i}] is {_kind(own)}; pass blocks of one size K for all "
                f"{of}, or one vector for each"
            )
        columns = own
    return columns is not None


def _kind(columns: int | None) -> str:
    return "one vector" if columns is None else f"a block of K = {columns}"


def _nested(made: list[Tensor], block: bool, tupled: bool):
    product = tuple(made if block else [m.squeeze(0) for m in made])
    return product if tupled else product[0]


def push(
    ys: Sequence[Tensor],
    xs: Sequence[Tensor],
    tangents: Blocks,
    asked: Options,
    graph: Read = None,
    keep: bool = False,
    spent: float = 0.0,
) -> list[Tensor]:
    """``J t`` of a recorded computation: blocks ``(K, *x)`` of tangents, one an input, to ``(K, *y)``, one an output.

    None stands for tangents of zero. ``graph``: that of ``ys`` and ``xs``, or why there is none, where that is known.
    ``keep``: whether derivatives are kept with it, for other products. ``spent``: bytes of the limit that are.
    """
    return _multiply(ys, xs, tangents, False, asked, graph, keep, spent)


def pull(
    ys: Sequence[Tensor],
    xs: Sequence[Tensor],
    cotangents: Blocks,
    asked: Options,
    graph: Read = None,
    keep: bool = False,
    spent: float = 0.0,
) -> list[Tensor]:
    """``c J`` of a recorded computation: blocks ``(K, *y)`` of cotangents, one an output, to ``(K, *x)``, one an input.

    None stands for cotangents of zero. ``graph``: that of ``ys`` and ``xs``, or why there is none, where that is known.
    ``keep``: whether derivatives are kept with it, for other products. ``spent``: bytes of the limit that are.
    """
    return _multiply(ys, xs, cotangents, True, asked, graph, keep, spent)


def _multiply(
    ys, xs, blocks, reverse: bool, asked: Options, graph: Read, keep: bool, spent: float
) -> list[Tensor]:
    seeds, ends = (ys, xs) if reverse else (xs, ys)
    columns = next(b.shape[0] for b in blocks if b is not None)
    blocks = [
        None if b is None else _ready(b, t, asked.create_graph)
        for b, t in zip(blocks, seeds, strict=True)
    ]
    with computing(asked.create_graph, asked.backend):
        if not columns:
            return [e.new_zeros(0, *e.shape) for e in ends]
        if reverse and graph is None:
            made = few.product(ys, xs, blocks, columns, asked)
            if made is not None:
                return made
        if not isinstance(graph, UnsupportedGraph):
            try:
                graph = for_given(graph or read(ys, xs), columns)
            except UnsupportedGraph as error:
                graph = error.with_traceback(None)  # which holds this frame, and so the graph
        if isinstance(graph, UnsupportedGraph):
            shapes = [x.shape for x in xs]
            refuse_or_log("the function", ys[0].shape, shapes, f"holds {graph}")
            whole = pulled if reverse else pushed
            return whole(ys, xs, blocks, columns, graph)
        budget = Budget(asked.memory_limit, xs[0].device)
        total = multiply(
            graph, blocks, reverse, budget=budget, chunk_size=asked.chunk_size, keep=keep
        )
        if not reverse and suspects(graph) and not all(finite(t) for t in total if t is not None):
            rows = _by_jacobian(ys, xs, blocks, asked)
            pairs = zip(total, rows, strict=True)
            total = [t if t is None else torch.where(t.isfinite(), t, r) for t, r in pairs]
        return [
            e.new_zeros(columns, *e.shape) if t is None else t
            for t, e in zip(total, ends, strict=True)
        ]


def _by_jacobian(ys, xs, tangents, options: Options) -> list[Tensor]:
    """`push` by the rows of the Jacobian: as autograd has it where a pole lies behind a selection (see `poles`)."""
    by_rows = replace(options, strategy="reverse-mode", backend="torch", strict=False)
    made = []
    for y, row in zip(ys, compute(ys, xs, by_rows), strict=True):
        total = sum(
            t.flatten(1) @ block.reshape(y.numel(), -1).t()
            for t, block in zip(tangents, row, strict=True)
            if t is not None
        )
        made.append(total.reshape(-1, *y.shape).to(y.dtype))
    return made


def _ready(block: Tensor, like: Tensor, create_graph: bool) -> Tensor:
    """A block as the sweep takes it."""
    block = plain(block)
    if block.is_inference():
        block = block.clone()
    if not create_graph:
        block = block.detach()
    return block.to(like.dtype)
