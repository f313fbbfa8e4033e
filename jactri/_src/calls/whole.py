"""The last fallback: the whole function by autograd, a block of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.elsewhere import check_local
from ..base.memory import Budget
from ..plan.owners import apart
from ..plan.planning import proof, prove_by_probe
from ..plan.samples import REMEDY, probe_mixing
from ..prologue.arguments import ASSUME, block_shape
from ..read.graph import UnsupportedGraph
from ..read.opaque import why_not
from ..read.unrecorded import guarded
from ..read.vmapped import Vmapped


def rows(
    ys, xs, per_sample, reason: UnsupportedGraph, *, budget: Budget, chunk_size=None, dests=None
):
    """``J[j][i]`` by vector-Jacobian products of the whole graph.

    Serves what the blocks of the engine do not represent: complex, sparse and nested tensors, hooks that change
    gradients. ``reason`` says which. Under ``per_sample`` a probe decides whether samples mix (of
    hooks; the rest is proven as ever), and RuntimeError is raised if they do.
    """
    check_local(ys, xs)
    if per_sample and not reason.linear:
        raise RuntimeError(
            f"per_sample=True, but the function holds {reason}, and what it gives for the gradients of several samples "
            "is not made of what it gives for each; drop per_sample for the rows of autograd, or remove the hook"
        )
    prove = per_sample and per_sample != ASSUME
    if prove and reason.graph is not None:
        plan = proof(reason.graph, "auto", ys, xs)
        if not plan.tied and not apart(reason.graph):
            prove_by_probe(reason.graph, plan, ys, xs)
    if prove and (leak := probe_mixing(ys, xs)) is not None:
        raise RuntimeError(
            f"per_sample=True, but samples mix: {leak}; the function holds {reason}, which jactri cannot follow op by "
            "op. Drop per_sample for the whole Jacobian" + REMEDY
        )
    why = (reason.why or why_not(ys)) if torch.is_grad_enabled() else None
    create_graph = torch.is_grad_enabled() and why is None
    out = []
    for j, y in enumerate(ys):
        dest = dests[j] if dests else [None] * len(xs)
        if not y.requires_grad:
            out.append([zero_block(y, x, per_sample, x, d) for x, d in zip(xs, dest, strict=True)])
            continue
        if y.dtype.is_complex:
            raise RuntimeError(
                f"outputs[{j}] is complex ({y.dtype}): its Jacobian is not one real-linear matrix; return "
                "torch.view_as_real(output) or its real part"
            )
        ones = torch.ones_like(y)
        used = torch.autograd.grad(y, xs, ones, retain_graph=True, allow_unused=True)
        live = [x for x, g in zip(xs, used, strict=True) if g is not None]

        def one_row(row, y=y, live=live):
            return torch.autograd.grad(y, live, row, retain_graph=True, create_graph=create_graph)

        product = Vmapped(one_row, f"the whole function ({y.grad_fn.name()})")
        n = y[0].numel() if per_sample else y.numel()
        count = chunk_size or rows_at_once(y, xs, n, budget)
        pieces = []
        for start in range(0, n, count):
            k = min(count, n - start)
            eye = torch.zeros(k, n, dtype=y.dtype, device=y.device)
            eye[torch.arange(k), start + torch.arange(k)] = 1
            if per_sample:  # one row for all samples at once
                seeds = eye.reshape(k, 1, *y.shape[1:]).expand(k, *y.shape)
            else:
                seeds = eye.reshape(k, *y.shape)
            pieces.append(product(seeds))
        made = [torch.cat(p) for p in zip(*pieces, strict=True)]
        blocks = iter(made if why is None else guarded(made, [y], why))
        row = []
        for x, g, d in zip(xs, used, dest, strict=True):
            if g is None:
                row.append(zero_block(y, x, per_sample, x, d))
                continue
            block = next(blocks)
            if per_sample:
                block = block.reshape(*y.shape[1:], *x.shape)
                block = block.movedim(y.dim() - 1, 0)
            block = block.reshape(block_shape(y, x, per_sample))
            row.append(d.copy_(block) if d is not None else block)
        out.append(row)
    return out


def rows_at_once(y, xs, most: int, budget: Budget) -> int:
    """Rows that fit the memory, by a guess: what lies between the ends is taken for ten times as large."""
    ends = y.numel() * y.element_size() + sum(x.numel() * x.element_size() for x in xs)
    return budget.count(10 * ends, most)


def zero_block(
    y: Tensor, x: Tensor, per_sample: bool | str, like: Tensor, dest: Tensor | None = None
) -> Tensor:
    """The block of an output that does not depend on an input."""
    if dest is not None:
        return dest.zero_()
    return torch.zeros(block_shape(y, x, per_sample), dtype=like.dtype, device=like.device)
