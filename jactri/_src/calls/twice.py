"""The gradient with its graph, of which second derivatives are taken."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.elsewhere import check_graph
from ..prologue.arguments import Options
from ..prologue.running import computing
from ..read.behind import handles_of
from ..read.opaque import others
from .api import compute


def of_torch(y: Tensor, leaves) -> bool:
    """Whether torch's own nodes make the derivatives of an output, and no hooks: then its second are symmetric."""
    return not handles_of(leaves) and not others([y])


def gradients(y: Tensor, leaves) -> list[Tensor]:
    """The Jacobian of one output by every input, with a graph."""
    # which it differentiates as far as they are recorded; a hook that changes nothing now may cut that short
    if y.numel() == 1 and of_torch(y, leaves):
        with computing(True):
            if y.requires_grad:
                check_graph([y])
                found = torch.autograd.grad(y.sum(), leaves, create_graph=True, allow_unused=True)
            else:
                found = (None,) * len(leaves)
            dense = all(g is None or g.layout is torch.strided for g in found)
            if dense and not _dead_end(found):
                shapes = [(*y.shape, *x.shape) for x in leaves]
                return [
                    x.new_zeros(s) if g is None else g.reshape(s)
                    for g, x, s in zip(found, leaves, shapes, strict=True)
                ]
    asked = Options(create_graph=True, of="jactri.jacobian with ")
    return compute((y,), leaves, asked)[0]


DEAD_ENDS = {
    "torch::autograd::NotImplemented",
    "CdistBackwardBackward0",
    "PdistBackwardBackward0",
    "EuclideanDistBackward0",  # differentiated to 0 where points coincide, whatever is true there
}
"""Nodes in the graph of a gradient that autograd cannot differentiate, or not rightly."""


def _dead_end(gradients) -> bool:
    """Whether autograd cannot differentiate them, as through a fused attention's backward, where our Jacobian can."""
    seen: set = set()
    stack = [g.grad_fn for g in gradients if g is not None]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node.name() in DEAD_ENDS:
            return True
        seen.add(node)
        stack += [p for p, _ in node.next_functions]
    return False
