"""Jacobians that can be differentiated, whose graph is made when a backward pass comes, and not before.

A Jacobian with a graph costs more: no kernel, no block in place, all blocks kept. Most Jacobians of a module whose
parameters require grad are never differentiated; one that is, is computed once more, with its graph.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .api import Request, compute

_ACCUMULATE = torch._C._functions.AccumulateGrad


class Outside:
    """What a tensor depends on besides the inputs of a call of ours: the caller's ``leaves``, by id.

    ``early``: whether a node lies between that is older than ``start``, a sequence number: something that the caller
    computed before may be differentiated for, and no tensor of it can be had from the graph.
    """

    def __init__(self, y: Tensor, start: int):
        self.leaves: dict[int, Tensor] = {}
        self.early = False
        if y.grad_fn is None:
            if y.requires_grad:
                self._meet(y)
            return
        seen, stack = {y.grad_fn}, [y.grad_fn]
        while stack:
            node = stack.pop()
            if node.__class__ is _ACCUMULATE:
                self._meet(node.variable)
                continue
            self.early = self.early or node._sequence_nr() < start
            for p, _ in node.next_functions:
                if p is not None and p not in seen:
                    seen.add(p)
                    stack.append(p)

    def _meet(self, x: Tensor) -> None:
        if not getattr(x, "_jactri_leaf", False):
            self.leaves[id(x)] = x

    def __bool__(self) -> bool:
        return bool(self.leaves)


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
    ys, leaves, asked: Request, start: int, at_once: bool, roots=None
) -> list[list[Tensor]]:
    """``compute(ys, leaves, asked)``, whose blocks require grad where outputs depend on what the caller can vary.

    ``start`` is the sequence number before the function ran, ``roots`` are its outputs, one for each of ``ys``, where
    those are gradients of them. ``at_once``: make the graph now, as for somebody who is certain to use it.
    """
    found = [Outside(y, start) for y in (ys if roots is None else roots)]
    if not any(found):
        return compute(ys, leaves, asked)
    with_graph = replace(asked, create_graph=True)
    if at_once or any(f.early for f in found if f):
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
