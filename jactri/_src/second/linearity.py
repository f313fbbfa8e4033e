"""Whether an op is linear in what depends on the input, by the graph of its backward: it then has no curvature."""

from __future__ import annotations

import torch

from ..read.graph import Reader
from ..read.nodes import builtin


def linear(r: Reader, ids) -> bool:
    """Whether the current node of a reader is linear in all that depends on the input, taken together.

    ``ids`` are the values of its outputs. Only torch's own ops are judged: the backward of others may compute outside
    of autograd.

    Its backward is a function of the cotangent and of what was saved: whether it is recorded as one of an operand that
    depends on the input, or of a result, is seen from its graph. A saved index is neither: piecewise linear ops bend
    nowhere but at kinks.
    """
    node, m = r.node, r.meta
    if not builtin(node):
        return False
    behind = node.next_functions
    ends = {p for p, _ in behind} | {node}
    bends = {p for (p, _), s in zip(behind, r.src, strict=True) if s is not None} | {node}
    for nr, i in enumerate(ids):
        if i is None:
            continue
        with torch.enable_grad():
            c = torch.zeros(tuple(m[nr].shape), dtype=m[nr].dtype, device=m[nr].device)
            c.requires_grad_()
            out = r.call(*[c if k == nr else None for k in range(len(m))])
        out = out if isinstance(out, tuple) else (out,)
        stack = []
        for g, s in zip(out, r.src, strict=False):
            if s is not None and g is not None:
                if not g.requires_grad:
                    return False  # not recorded
                stack.append(torch.autograd.graph.get_gradient_edge(g).node)
        seen = set(stack)
        while stack:
            p = stack.pop()
            if p in bends:
                return False
            if p in ends:
                continue
            fresh = {q for q, _ in p.next_functions if q is not None} - seen
            seen |= fresh
            stack += fresh
    return True
