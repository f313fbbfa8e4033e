"""Jacobians that can be differentiated, whose graph is made when a backward pass comes, and not before.

A Jacobian with a graph costs more: no kernel, no block in place, all blocks kept. Most Jacobians of a module whose
parameters require grad are never differentiated; one that is, is computed once more, with its graph. Jacobians of
small networks have theirs at once, which costs them next to nothing.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..base.memory import Budget
from ..plan.planning import Wanted, plan_for
from ..prologue.arguments import Options
from ..prologue.running import computing
from ..read.behind import Outside
from ..read.graph import UnsupportedGraph
from ..read.overriding import refuse
from ..read.reading import read
from .api import compute

_CHEAP = 1e-3
"""Predicted seconds up to which a graph is made at once: about what a backward pass loses that makes it."""


class _Deferred(torch.autograd.Function):
    """The blocks as they are, a function of the leaves outside; its backward makes their graph."""

    @staticmethod
    def forward(ctx, recipe, *outside):
        ys, ctx.leaves, ctx.asked, blocks, constant = recipe
        ctx.set_materialize_grads(False)
        # freed by a backward pass that does not retain its graph, and then as loud as any other node
        ctx.save_for_backward(*ys)
        ctx.outside, ctx.blocks, ctx.before = outside, None, False
        ctx.mark_non_differentiable(*(b for b, c in zip(blocks, constant, strict=True) if c))
        return blocks

    @staticmethod
    def backward(ctx, *grads):
        ys, blocks = ctx.saved_tensors, ctx.blocks
        if blocks is None:
            rows = compute(ys, ctx.leaves, ctx.asked)
            blocks = [b for row in rows for b in row]
        if ctx.before:  # whoever takes pass after pass, as one for each row, shall not pay for a graph each time
            ctx.blocks = blocks
        ctx.before = True
        used = [
            (b, g) for b, g in zip(blocks, grads, strict=True) if g is not None and b.requires_grad
        ]
        if not used:
            return (None,) * (1 + len(ctx.outside))
        made, given = zip(*used, strict=True)
        return None, *torch.autograd.grad(
            made, ctx.outside, given, retain_graph=True, create_graph=torch.is_grad_enabled(), allow_unused=True
        )  # fmt: skip


def differentiable(
    ys, leaves, asked: Options, start: int, at_once: bool, roots=None
) -> list[list[Tensor]]:
    """``compute(ys, leaves, asked)``, whose blocks require grad where outputs depend on what the caller can vary.

    ``start`` is the sequence number before the function ran, ``roots`` are its outputs, one for each of ``ys``, where
    those are gradients of them. ``at_once``: make the graph now, as for somebody who is certain to use it.
    """
    roots = ys if roots is None else roots
    walked = {id(y): Outside(y, start) for y in roots}
    found = [walked[id(y)] for y in roots]
    if not any(found):
        return compute(ys, leaves, asked)
    refuse("a result that can be differentiated", "call jactri.func under torch.no_grad()")
    with_graph = replace(asked, create_graph=True)
    if at_once or any(f.early for f in found if f) or _cheap(ys, leaves, asked):
        return [
            [b if f and Outside(b, start) else b.detach() for b in row]
            for f, row in zip(found, compute(ys, leaves, with_graph), strict=True)
        ]
    rows = compute(ys, leaves, asked)
    constant = [not f for f, row in zip(found, rows, strict=True) for _ in row]
    outside = {k: x for f in found for k, x in f.leaves.items()}
    blocks = tuple(b for row in rows for b in row)
    recipe = ys, leaves, with_graph, blocks, constant
    made = iter(_Deferred.apply(recipe, *outside.values()))
    return [[next(made) for _ in row] for row in rows]


def _cheap(ys, leaves, asked: Options) -> bool:
    with computing(False):
        try:
            graph = read(ys, leaves)
        except UnsupportedGraph:
            return False
        budget = Budget.unbounded(leaves[0].device)
        wanted = Wanted(budget, asked.strategy, chunk_size=asked.chunk_size)
        plan = plan_for(graph, ys, leaves, wanted)
    return min(plan.seconds.values(), default=0.0) < _CHEAP
