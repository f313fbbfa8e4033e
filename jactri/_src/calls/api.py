"""The calls: `jacobian`, a drop-in for ``torch.autograd.functional.jacobian``, and `jacobian_of`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..base.classes import dressed, plain
from ..base.elsewhere import FSDP, is_distributed
from ..base.journal import Journal, identity, on_disk
from ..base.memory import Budget, MemoryLimitTooSmall
from ..base.progress import Watch, bar
from ..plan.folding import fold
from ..plan.owners import apart
from ..plan.planning import (
    Piece,
    Wanted,
    check_answer,
    plan_for,
    proof,
    prove_by_probe,
    split_masked,
    split_samples,
)
from ..prologue.arguments import (
    ASSUME,
    Options,
    as_tuple,
    check_batch,
    destinations,
    out_rows,
    taken,
)
from ..prologue.patterns import taken_pattern
from ..prologue.running import computing, eagerly, prepare, public
from ..read import handover, overriding
from ..read.behind import Walk, leaves_behind, reached
from ..read.graph import UnsupportedGraph
from ..read.opaque import refuse_or_log
from ..read.reading import read
from ..run.blocks import Sizes
from ..run.entries import check_pattern, nothing
from ..run.formed import BLOCKED
from ..spread.agreement import of_mesh
from ..spread.shards import by_rank, check_several
from . import few, meshed, patterned, reentrant, whole
from .pieces import run_piece
from .strictness import check_blocks, check_dependence


@public
@by_rank("inputs")
def jacobian(
    func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool = False,
    strategy: str = "auto",
    *,
    per_sample: bool | str = False,
    return_output: bool = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    out: Any = None,
    backend: str = "auto",
    progress: bool = False,
    resume: bool = True,
    layout: torch.layout | str = torch.strided,
    blocksize: tuple[int, int] | None = None,
    pattern: Any = None,
    check: bool = False,
    mesh: Any = None,
) -> Any:
    """The Jacobian of ``func`` at ``inputs``: what ``torch.autograd.functional.jacobian`` returns, faster.

    ``func`` runs once, in eager PyTorch; the graph that autograd recorded is read into structured local Jacobians,
    which are multiplied in the cheaper order (Griewank and Walther, Evaluating Derivatives, 2008, chapter 10). Ops
    without a structure are computed by autograd. What of ``func`` is compiled by ``torch.compile`` runs eagerly (in all
    threads, while ``func`` runs). Within autocast ``func`` is cast as ever; products of the Jacobian are in the dtypes
    that its graph has.

    Args:
        func: takes the tensors of ``inputs``, returns a tensor or a tuple of tensors.
        inputs: a floating-point tensor or a tuple of them. They are not modified. DTensors under ``per_sample``: func
            gets this rank's samples as plain tensors, and the Jacobian is a DTensor placed alike.
        create_graph: return a Jacobian that can be differentiated (in both directions).
        strict: raise if an output does not depend on an input, instead of returning zeros.
        vectorize: accepted for compatibility; jactri is always vectorized.
        strategy: ``"forward-mode"`` (a column at a time: cheap for few inputs), ``"reverse-mode"`` (a row at a time:
            cheap for few outputs), ``"mixed"`` (both meet at a cut) or ``"auto"``, which predicts the cost of all.
        per_sample: the first axis of all inputs and outputs is a batch of ``N`` samples which do not influence
            one another; return their Jacobians only, ``(N, *out, *in)``. This is proven op by op, or where
            that cannot tell by a probe: some ``log2(N)`` backward passes, which must leave exact zeros. A probe speaks
            of this point, and under ``create_graph`` of one derivative more: where samples mix by what vanishes there
            with its second derivatives, as ``x.mean(0)**3`` at a mean of 0, the Jacobian and its gradients are right,
            and second derivatives of the Jacobian are not. ``"assume"``: take it for granted where the algebra of axes
            does not show it, as where samples share rounding or the step size of a solver. What is returned is then
            ``d outputs.sum(0) / d inputs[n]`` for sample n, the gradients of outputs summed over the batch (with
            ``strategy="forward-mode"``, the derivative of output n where all samples move alike), which is the
            Jacobian of each sample as far as they do not mix.
        return_output: return ``(output, jacobian)`` from the one evaluation; the output is detached unless
            ``create_graph``.
        chunk_size: how many seeds (rows in reverse, columns in forward mode) run at once.
        memory_limit: bytes (or ``"2GB"``) that the call may allocate after ``func`` has run, the answer included;
            by default half of what is free. Sizes the chunks.
        out: a tensor, numpy array or ``numpy.memmap`` to write the Jacobian to, or tuples of them nested as the result
            is; it is returned. It may be on the CPU for inputs on another device. Into a memmap, a Jacobian larger
            than memory is streamed chunk by chunk.
        backend: ``"torch"``; ``"triton"``, jactri's kernels wherever they cover a step (CUDA, or Triton's interpreter);
            or ``"auto"``, the faster of the two.
        progress: show a progress bar over the chunks.
        resume: go on where an interrupted call left a memmap ``out`` (opened with mode ``"r+"``); with False, start
            over. What was left is known by the file ``.progress`` beside the memmap's.
        layout: ``torch.sparse_coo``: a sparse tensor of the same shape; ``torch.sparse_csr``, ``sparse_csc`` or
            ``sparse_bsr``: the matrix ``(out.numel(), in.numel())``, under ``per_sample`` one a sample; ``"banded"``: a
            `Banded`. Only the entries that `sparsity` finds are computed, zeros among them included; `to_scipy` hands
            them to solvers.
        blocksize: rows and columns of a block of ``torch.sparse_bsr``; by default the last axes of output and input (of
            a sample) where these have others beside them, else 1. A block is there if any of its entries is.
        pattern: the entries that can be non-zero, nested as the result: what `sparsity` gave, a boolean tensor or
            array, a sparse tensor or a SciPy matrix, of the Jacobian's shape or of the matrix's, under ``per_sample``
            also of one sample's. It is taken at its word: nothing is analysed, and products are as few as its
            `Sparsity.colours` (convolutions may run by windows instead). In any layout; what it leaves out is zero.
        check: hold products with two tangents against the entries, and raise for one that the pattern leaves out.
        mesh: a ``torch.distributed.device_mesh.DeviceMesh`` of one axis, whose ranks all make this call, with the same
            inputs and weights. Each computes its part of the rows (in forward mode of the columns; where samples do not
            mix and are many, of the samples) and sends nothing. The Jacobian is a DTensor, sharded along the longest
            such axis; or ``out``, a memmap of one file that rank 0 made and all opened with ``"r+"``, which is whole
            when the call returns. An interrupted one is resumed by as many ranks as you like.

    Returns:
        ``J[i][j]`` of shape ``out_i.shape + in_j.shape`` with a tuple level for each of outputs and inputs that
        is a tuple; a tensor where neither is. dtype and device of the input (of the output under
        ``strategy="forward-mode"``). Strides are unspecified: use ``reshape``, not ``view``, on the result.
        Where tensor hooks change gradients, autograd computes it, hooks included. Entries that are zero by
        structure are zero, also where autograd gives a NaN.

    Raises:
        TypeError: inputs or outputs that are not tensors or tuples of them.
        RuntimeError: integer inputs; under ``strict``, a missing dependence; under ``per_sample``, samples that mix
            (the op is named); an ``out`` that does not fit; a ``pattern`` of another shape; with ``mesh``, ranks that
            differ in what they were given (by name, on all of them) or that failed, ``create_graph``, a sparse
            ``layout``, a ``pattern``, an ``out`` that is no file.
        ValueError: ``chunk_size`` below 1, a ``memory_limit`` too small for one seed, an unknown backend or layout, no
            common batch axis under ``per_sample``; a sparse ``layout`` where every entry can be non-zero (the op is
            named); a ``blocksize`` that does not divide the matrix; under ``check``, an entry that is not in the
            pattern and not zero; a ``mesh`` of several axes.
        AssertionError: an unknown strategy.
        IndexError: an empty tuple of inputs or outputs.

    Cost:
        One forward pass plus, for each block of ``K`` seeds, about ``2 K`` times the multiply-adds of the forward pass
        that lie between two nonlinear ops; samples that do not mix cost ``N`` blocks, not ``N * N``, in either shape.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
        >>> x = torch.randn(8, 3)
        >>> J = jactri.jacobian(net, x)
        >>> J.shape
        torch.Size([8, 2, 8, 3])
        >>> torch.allclose(J, torch.autograd.functional.jacobian(net, x), atol=1e-5)
        True

        Samples do not mix: the blocks that are not zero, with the output.

        >>> y, blocks = jactri.jacobian(net, x, per_sample=True, return_output=True)
        >>> blocks.shape
        torch.Size([8, 2, 3])
        >>> torch.allclose(blocks[5], J[5, :, 5], atol=1e-5)
        True
    """
    asked = Options(
        create_graph, chunk_size, memory_limit, backend, per_sample, strategy, strict, progress, resume, out,
        layout, of="", blocksize=blocksize, pattern=pattern, check=check,
    )  # fmt: skip
    if mesh is not None:
        asked.ranks = of_mesh(mesh, "jacobian")
    with _UNWATCHED if mesh is None else asked.ranks.together():
        tupled, xs = taken("jacobian", inputs, asked)
    if handover.transforming(xs):
        if mesh is not None:
            raise RuntimeError("mesh= is not possible inside of a torch.func transform")
        if asked.form != "dense":
            raise RuntimeError(f"layout={layout} is not possible inside of a torch.func transform")
        handover.refuse(pattern=pattern is not None)
        return handover.jacobian(
            eagerly(func), xs, tupled, strategy=strategy, strict=strict, per_sample=per_sample,
            return_output=return_output, chunk_size=chunk_size, out=out,
        )  # fmt: skip
    with _UNWATCHED if mesh is None else asked.ranks.together():
        ran = prepare(func, xs, create_graph)
        if out is not None:
            asked.out = out_rows(out, ran.tupled, tupled)
        if pattern is not None:
            asked.pattern = taken_pattern(
                pattern, ran.ys, ran.leaves, ran.tupled, tupled, per_sample
            )
        rows = compute(ran.ys, ran.leaves, asked)
    answer = out
    if out is None:
        answer = nest(rows, ran.tupled, tupled)
        if asked.form == "dense" and mesh is None:
            answer = ran.dressed(answer, xs)
    return (ran.output(create_graph), answer) if return_output else answer


@public
def jacobian_of(
    outputs: Tensor | tuple[Tensor, ...],
    inputs: Tensor | tuple[Tensor, ...],
    create_graph: bool = False,
    strict: bool = False,
    *,
    strategy: str = "auto",
    per_sample: bool | str = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    out: Any = None,
    backend: str = "auto",
    progress: bool = False,
    resume: bool = True,
    layout: torch.layout | str = torch.strided,
    blocksize: tuple[int, int] | None = None,
    pattern: Any = None,
    check: bool = False,
    mesh: Any = None,
) -> Any:
    """The Jacobian of ``outputs`` that are already computed, with respect to tensors in their graph.

    The graph is read, not consumed: it can be used again afterwards. Results are those of `jacobian`.

    Args:
        outputs: a tensor or a tuple of them, computed in grad mode.
        inputs: leaves or intermediate tensors that require grad, as one tensor or a tuple.
        create_graph: as of `jacobian`, like all that follow.
        strict: raise where an output does not depend on an input.
        strategy: the order of accumulation.
        per_sample: the blocks of samples that do not mix, ``(N, *out, *in)``.
        chunk_size: how many seeds run at once.
        memory_limit: bytes that the call may allocate, the answer included.
        out: tensors, arrays or memmaps to write to.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        progress: show a progress bar over the chunks.
        resume: go on where an interrupted call left a memmap.
        layout: dense, sparse or banded.
        blocksize: of blocks, for ``torch.sparse_bsr``.
        pattern: the entries that can be non-zero, where they are known.
        check: test the pattern.
        mesh: the ranks that compute a part each; all have computed the same outputs.

    Returns:
        What `jacobian` returns, nested as ``outputs`` and ``inputs`` are.

    Raises:
        RuntimeError: an input that does not require grad, or that none of the outputs was computed from (as by
            ``torch.autograd.grad``); a graph that was freed. Else what `jacobian` raises.

    Cost:
        That of `jacobian`, without the forward pass. Whether the graph has hooks on gradients cannot be seen: where any
        hook was registered since the process began, finding out costs three backward passes.

    Examples:
        >>> x = torch.randn(8, 3, requires_grad=True)
        >>> hidden = torch.tanh(x @ torch.randn(3, 5))
        >>> y = hidden @ torch.randn(5, 2)
        >>> of_x, of_hidden = jactri.jacobian_of(y, (x, hidden), per_sample=True)
        >>> of_x.shape, of_hidden.shape
        (torch.Size([8, 2, 3]), torch.Size([8, 2, 5]))
        >>> (grad,) = torch.autograd.grad(y.sum(), x)  # the graph is still there
        >>> torch.allclose(of_x.sum(1), grad, atol=1e-5)
        True
    """
    asked = Options(
        create_graph, chunk_size, memory_limit, backend, per_sample, strategy, strict, progress, resume, out,
        layout, None, of="", blocksize=blocksize, pattern=pattern, check=check,
    )  # fmt: skip
    if mesh is not None:
        asked.ranks = of_mesh(mesh, "jacobian_of")
    with _UNWATCHED if mesh is None else asked.ranks.together():
        return _of(outputs, inputs, asked)


def _of(outputs, inputs, asked: Options) -> Any:
    per_sample, out, shared = asked.per_sample, asked.out, asked.ranks is not None
    tupled, xs = taken("jacobian_of", inputs, asked)
    tupled_out, ys = as_tuple(outputs, "outputs", "jacobian_of")
    if not xs:
        raise IndexError("inputs is an empty tuple: pass at least one tensor")
    for i, x in enumerate(xs):
        if not x.requires_grad:
            raise RuntimeError(
                f"inputs[{i}] does not require grad, so outputs have no graph to it; call requires_grad_() on it "
                "before computing outputs (for what a layer returned to a hook, on the input of the model)"
            )
    check_several("jacobian_of", xs, per_sample)
    found = reached(ys, xs)
    for i in range(len(xs) if ys else 0):
        if i not in found:
            raise RuntimeError(
                f"inputs[{i}] of shape {tuple(xs[i].shape)} is not in the graph of outputs, which are independent of "
                "it; pass the very tensor that they were computed from (a view or a copy of it, as x[0], is another). "
                "Where zeros are meant, write torch.zeros(*y.shape, *x.shape) for its block"
                + (f". It is a DTensor: {FSDP}" if is_distributed(xs[i]) else "")
                + ("" if any(y.requires_grad for y in ys) else _NO_GRAPH)
            )
    if out is not None:
        asked.out = out_rows(out, tupled_out, tupled)
    if asked.pattern is not None:
        asked.pattern = taken_pattern(asked.pattern, ys, xs, tupled_out, tupled, per_sample)
    rows = compute([plain(y) for y in ys], xs, asked)
    if out is not None:
        return out
    answer = nest(rows, tupled_out, tupled)
    return dressed(answer, (*ys, *xs)) if asked.form == "dense" and not shared else answer


_NO_GRAPH = (
    ". No output has a graph: compute them in grad mode (with torch.enable_grad(), not under torch.no_grad()), and do "
    "not detach them"
)


def compute(ys, xs, asked: Options) -> list[list[Tensor]]:
    """``J[j][i]`` for every output and input of a recorded computation."""
    if not ys:
        raise IndexError("outputs is an empty tuple: return at least one tensor")
    if asked.strict:
        check_dependence(ys, xs)
    check_batch(asked.per_sample, ys, xs)
    dests = None if asked.out is None else destinations(asked.out, ys, xs, asked.per_sample)
    if reentrant.in_backward():
        rows = reentrant.aside(lambda: _in_mode(ys, xs, asked, dests))
    else:
        rows = _in_mode(ys, xs, asked, dests)
    if asked.strict and asked.create_graph:
        check_blocks(rows)
    return rows


def _in_mode(ys, xs, asked: Options, dests):
    with computing(asked.create_graph, asked.backend):
        return _rows(ys, xs, asked, dests)


def _rows(ys, xs, asked: Options, dests):
    if asked.ranks is not None:
        return meshed.rows(ys, xs, asked, dests, _rows)
    strategy, per_sample = asked.strategy, asked.per_sample
    budget, sparse = Budget(asked.memory_limit, xs[0].device), asked.form != "dense"
    wanted = Wanted(
        budget, strategy, per_sample, False, asked.chunk_size, dests is not None, False, sparse, of=asked.of,
    )  # fmt: skip
    if asked.form in BLOCKED and not isinstance(asked.blocksize, Sizes):
        asked.blocksize = Sizes.asked(asked.blocksize, ys, xs, per_sample)
    if asked.pattern is not None:
        return patterned.rows(ys, xs, asked, budget, dests)
    if dests is None and not sparse:
        check_answer(ys, xs, wanted, asked.what)
    if (row := few.gradient(ys, xs, asked, dests)) is not None:
        return [row]
    walk = Walk(ys, xs)
    if (engine := few.foreseen(walk, ys, xs, asked, budget)) is not None:
        rows = few.rows(ys, xs, asked, budget, engine, dests)
        if rows is not None:
            return rows
    try:
        graph = read(ys, xs, handles=asked.handles, walk=walk)
        del walk  # it holds as many nodes
    except UnsupportedGraph as reason:
        if sparse:
            raise ValueError(
                f"the function holds {reason}, of which no pattern is known; use layout=torch.strided, or "
                "name the entries by pattern="
            ) from None
        refuse_or_log("the function", ys[0].shape, [x.shape for x in xs], f"holds {reason}")
        return whole.rows(
            ys, xs, per_sample, reason, budget=budget, strategy=strategy, chunk_size=asked.chunk_size,
            dests=dests,
        )  # fmt: skip
    graph = fold(graph)
    journal = None
    if asked.out is not None and (maps := on_disk(a for row in asked.out for a in row)):
        weights = [p for y in ys for p in leaves_behind(y, xs)]
        what = identity(graph.key, ys, xs, weights, per_sample)
        # a function of the caller's, as an override may be, has no name that tells it from another
        journal = Journal(maps, what, asked.resume and not overriding.now.get())
        # under one and the same limit, the chunks are those of the call that is resumed
        limit = Budget(asked.memory_limit or journal.limit, budget.device).total
        budget = Budget(int(limit), budget.device)
        wanted = wanted._replace(budget=budget, steady=True)
    plan = None
    if per_sample:
        limited = budget.given is not None
        plan = proof(
            graph, strategy, ys, xs, given=dests is not None, sparse=sparse, limited=limited
        )
        if not plan.tied and not sparse:
            if per_sample == ASSUME:
                strategy = "reverse-mode" if strategy == "auto" else strategy
            elif not apart(graph):
                prove_by_probe(graph, plan, ys, xs, budget)
            plan, wanted = None, wanted._replace(strategy=strategy, summed=True)
        elif asked.chunk_size is not None or budget.limit(plan.peak) < inf:
            plan = None
    forward = strategy == "forward-mode"
    if sparse:
        check_pattern(graph, ys, xs, per_sample, asked.form == "blocks")
        if (made := patterned.by_both(graph, ys, xs, asked, budget)) is not None:
            return made
    try:
        pieces: list[Piece] = [(None, graph, plan or plan_for(graph, ys, xs, wanted))]
        if journal is None:
            pieces = split_masked(graph, pieces[0][2], ys, xs, wanted) or pieces
    except MemoryLimitTooSmall:
        pieces = None if sparse else split_samples(graph, ys, xs, wanted)
        if pieces is None:
            raise
    if pieces[0][0] is not None and (dests is None or journal is None):
        blocks = dests or [[None] * len(xs) for _ in ys]
        dests = [
            [
                whole.zero_block(y, x, per_sample, y if forward else x, block)
                for x, block in zip(xs, row, strict=True)
            ]
            for y, row in zip(ys, blocks, strict=True)
        ]
    if journal is not None:
        journal.planned([(ends and ends.key, p.signature) for ends, _, p in pieces], budget.total)
    watched = asked.progress or journal is not None
    with _watching(pieces, asked.progress, journal) if watched else _UNWATCHED as watch:
        for ends, part, part_plan in pieces:
            answers = run_piece(part, part_plan, ends, ys, xs, asked, dests, watch)
            if ends is not None:
                for answer in answers.values():
                    answer.finish()
        if pieces[0][0] is not None:
            return dests
        return [
            [
                answers[j, i].finish()
                if (j, i) in answers
                else nothing(asked.form, y, x, per_sample, y if forward else x, asked.block(j, i))
                if sparse
                else whole.zero_block(
                    y, x, per_sample, y if forward else x, dests[j][i] if dests else None
                )
                for i, x in enumerate(xs)
            ]
            for j, y in enumerate(ys)
        ]


_UNWATCHED = contextlib.nullcontext()


@contextlib.contextmanager
def _watching(pieces, progress: bool, journal: Journal | None):
    """What is told of every chunk."""
    with contextlib.ExitStack() as stack:
        advance = None
        if progress:
            chunks = sum(len(s.selections()) for _, _, p in pieces for s in p.sweeps)
            advance = stack.enter_context(bar(chunks))
        if journal is not None:
            stack.enter_context(journal)
        yield Watch(advance, journal)


def nest(rows, tupled_out: bool, tupled: bool):
    if tupled:
        rows = tuple(tuple(row) for row in rows)
    else:
        rows = tuple(row[0] for row in rows)
    return rows if tupled_out else rows[0]
