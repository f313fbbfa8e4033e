"""`hessian`: a drop-in for ``torch.autograd.functional.hessian``, dense or by the entries that can be non-zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..base.remedies import NO_DERIVATIVE, one_of
from ..prologue.arguments import HESSIAN, STRATEGIES, Options, check_batch, check_samples, taken
from ..prologue.patterns import taken_pattern
from ..prologue.running import eagerly, prepare, public
from ..read import handover
from ..read.overriding import refuse
from ..read.vmapped import looping
from ..spread.shards import by_rank
from . import symmetric
from .api import compute, nest
from .strictness import check_blocks, check_dependence, check_ends
from .twice import gradients


@public
@by_rank("inputs")
def hessian(
    func: Callable[..., Tensor],
    inputs: Tensor | tuple[Tensor, ...],
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool = False,
    outer_jacobian_strategy: str = "auto",
    *,
    per_sample: bool | str = False,
    return_lower: bool = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
    layout: torch.layout | str = torch.strided,
    blocksize: tuple[int, int] | None = None,
    pattern: Any = None,
    check: bool = False,
) -> Any:
    """The Hessian of ``func`` at ``inputs``: what ``torch.autograd.functional.hessian`` returns, faster.

    ``func`` runs once, and so does its backward pass; the graph of the gradient is read as `jacobian` reads that of a
    function. A sparse ``layout`` has those entries only that this graph allows, and those of its transpose. Of each
    pair on both sides of the diagonal one is computed: columns are summed in products so that every entry, or its
    mirror image, is alone in some place (a star colouring: Gebremedhin, Tarafdar, Manne and Pothen, SIAM J. Sci.
    Comput. 29, 2007).

    Args:
        func: takes the tensors of ``inputs``, returns a tensor of one element; under ``per_sample`` one of each sample.
        inputs: a floating-point tensor or a tuple of them. They are not modified.
        create_graph: return a Hessian that can be differentiated.
        strict: raise where the output, or a gradient, does not depend on an input, instead of returning zeros.
        vectorize: accepted for compatibility; jactri is always vectorized.
        outer_jacobian_strategy: how the gradient is differentiated: ``"forward-mode"``, ``"reverse-mode"``,
            ``"mixed"`` or ``"auto"``, as by `jacobian`.
        per_sample: the first axis of all inputs, and of the output, is a batch of ``N`` samples that do not influence
            one another, which is proven as by `jacobian`; return the Hessian of each. ``"assume"``: take that for
            granted.
        return_lower: return ``(output, gradient, hessian)`` from the one evaluation.
        chunk_size: how many seeds run at once.
        memory_limit: bytes (or ``"2GB"``) that the call may allocate after ``func`` has run, the answer included.
        backend: as of `jacobian`.
        layout: ``torch.sparse_coo``: sparse tensors of the same shapes; ``torch.sparse_csr``, ``sparse_csc`` or
            ``sparse_bsr``: matrices ``(in_i.numel(), in_j.numel())``, under ``per_sample`` one a sample; ``"banded"``:
            a `Banded`. `to_scipy` hands them to solvers.
        blocksize: of blocks, for ``torch.sparse_bsr``, as of `jacobian`.
        pattern: the entries that can be non-zero, as of `jacobian`: nested as the Hessian, in any layout, taken at its
            word. One triangle will do: what has an entry on one side of the diagonal has it on the other.
        check: hold two products against the entries, and raise for one that the pattern leaves out.

    Returns:
        ``H[i][j]`` of shape ``in_i.shape + in_j.shape``, under ``per_sample`` ``(N, *in_i, *in_j)``; a tensor where
        ``inputs`` is one. Of the dtype and device of the i-th input. A sparse one is symmetric to the last bit, but
        where an entry is not finite, and for functions with an ``autograd.Function`` or hooks inside, whose gradients
        may be none. At a kink, second derivatives are those of autograd's double backward (of ReLU: 0); where the two
        of a pair differ there, a sparse Hessian has one of them twice.

    Raises:
        TypeError: inputs or an output that are no tensors.
        RuntimeError: integer or complex inputs; an output that is a tuple, of integers, or of more than one element (a
            sample); an op whose backward cannot be differentiated, by its name; what ``strict`` forbids; under
            ``per_sample``, samples that mix (the op is named).
        ValueError: an option out of range, as by `jacobian`; a sparse ``layout`` where every entry can be non-zero (the
            op is named).
        AssertionError: an unknown strategy.

    Cost:
        A forward and a backward pass, and a sweep over their graph. A sparse one: as many products as it has colours,
        however large it is: three for a tridiagonal matrix, two for an arrowhead. Every entry is read from one of
        them as it is. (Fewer would do where entries are solved for, one after the other; then the errors of one are in
        the next.) Patterns and colours are remembered.

    Examples:
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
        >>> torch.allclose(jactri.hessian(lambda x: 0.5 * x @ A @ x, torch.randn(2)), A)
        True
        >>> chain = lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        >>> H = jactri.hessian(chain, torch.zeros(1000), layout=torch.sparse_csr)
        >>> H.shape, H.values().numel()
        (torch.Size([1000, 1000]), 2998)
    """
    if outer_jacobian_strategy not in STRATEGIES:
        raise AssertionError(one_of("outer_jacobian_strategy", outer_jacobian_strategy, STRATEGIES))
    asked = Options(
        create_graph, chunk_size, memory_limit, backend, per_sample, outer_jacobian_strategy, strict, layout=layout,
        what=HESSIAN, blocksize=blocksize, pattern=pattern, check=check,
    )  # fmt: skip
    tupled, xs = taken("hessian", inputs, asked)
    for i, x in enumerate(xs):
        if x.is_complex():
            raise RuntimeError(
                f"hessian takes real inputs, but inputs[{i}] {tuple(x.shape)} is of {x.dtype}; pass "
                "torch.view_as_real(x) and make it complex inside of func"
            )
    if handover.transforming(xs):
        return _inside(eagerly(func), xs, tupled, asked, return_lower)
    refuse("a second derivative")
    check_samples(per_sample)
    ran = prepare(func, xs, create_graph, "hessian")
    if ran.tupled:
        raise RuntimeError(_NO_TENSOR.format(f"a tuple of {len(ran.ys)}"))
    (y,), leaves = ran.ys, ran.leaves
    check_output(y, leaves, per_sample)
    if strict:
        check_ends((y,), leaves, False)
    gs = _gradients(y, leaves, per_sample)
    if pattern is not None:
        asked.pattern = taken_pattern(pattern, gs, leaves, tupled, tupled, per_sample, "Hessian")
    if asked.form == "dense" and pattern is None:
        mixed = len({x.dtype for x in xs}) > 1  # the dtype is that of the first of the two
        rows = compute(gs, leaves, replace(asked, strategy="forward-mode") if mixed else asked)
    else:
        if strict:
            check_dependence(gs, leaves)
        rows = symmetric.rows(y, gs, leaves, asked)
        if strict and create_graph:
            check_blocks(rows)
    answer = nest(rows, tupled, tupled)
    if asked.form == "dense":
        answer = ran.dressed(answer, xs)
    if not return_lower:
        return answer
    slope = tuple(gs if create_graph else [g.detach() for g in gs])
    return ran.output(create_graph), ran.dressed(slope if tupled else slope[0], xs), answer


_NO_TENSOR = (
    "The function given to hessian should return a single Tensor, but it returned {}; return the one that is meant, or "
    "call jactri.func.hessian, which takes any tree of them"
)


def check_output(y: Tensor, xs, per_sample: bool | str) -> None:
    """Raise RuntimeError unless an output is one real number (of each sample); ValueError for no samples."""
    if not y.is_floating_point():
        instead = "return its real part" if y.is_complex() else NO_DERIVATIVE
        raise RuntimeError(
            f"func of hessian must return a real tensor, got one of {y.dtype}: {instead}"
        )
    check_batch(per_sample, (y,), xs)
    if per_sample and y.numel() != y.shape[0]:
        raise RuntimeError(
            f"per_sample=True: func of hessian must return one number of each sample, ({y.shape[0]},), but it returned "
            f"shape {tuple(y.shape)}; sum over the others, lambda x: func(x).flatten(1).sum(1), or choose one"
        )
    if not per_sample and y.numel() != 1:
        raise RuntimeError(
            "The Tensor returned by the function given to hessian should contain a single element, but it has shape "
            f"{tuple(y.shape)}: return its sum, lambda x: func(x).sum(), pass per_sample=True where it is one number "
            "of each sample, or call jactri.func.hessian, which takes any output"
        )


def _gradients(y: Tensor, leaves, per_sample: bool | str) -> list[Tensor]:
    """By every input, with a graph; under ``per_sample`` of each sample's number by its own part of the inputs."""
    if per_sample:
        found = compute((y,), leaves, Options(create_graph=True, per_sample=per_sample))[0]
    else:
        found = gradients(y, leaves)
    with torch.enable_grad():
        return [g.reshape(x.shape) for g, x in zip(found, leaves, strict=True)]


def _inside(func, xs, tupled: bool, asked: Options, lower: bool) -> Any:
    """In a torch.func transform, which composes."""
    handover.refuse(strict=asked.strict, pattern=asked.pattern is not None)
    if asked.form != "dense":
        raise RuntimeError(
            f"layout={asked.layout} is not possible inside of a torch.func transform"
        )
    places = tuple(range(len(xs)))

    def number(*point: Tensor) -> Tensor:
        if asked.per_sample:
            point = tuple(p.unsqueeze(0) for p in point)
        y = func(*point)
        if not isinstance(y, Tensor):
            raise RuntimeError(_NO_TENSOR.format(type(y)))
        check_output(y, point, asked.per_sample)
        return y.reshape(())

    def one(*point: Tensor):
        second = handover.transform("hessian", number, places, False, asked.chunk_size, "same")
        answer = nest(second(*point), tupled, tupled)
        if not lower:
            return answer
        slope = handover.jacrev(number, places)(*point)
        return number(*point), slope if tupled else slope[0], answer

    if not asked.per_sample:
        return one(*xs)
    with looping():
        return torch.vmap(one)(*xs)
