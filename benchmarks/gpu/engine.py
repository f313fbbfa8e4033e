"""Autograd's engine in Python, for tensors on a device that is not there: torch's own asks it for streams.

It does what ``torch.autograd.grad`` needs: nodes in the order of their dependencies, gradients summed and reduced to
the shapes of the forward pass. Hooks do not run, and nothing is accumulated into ``.grad``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


class Engine:
    """In place of ``torch.autograd.Variable._execution_engine``."""

    def __init__(self, real: Any):
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def run_backward(
        self, outputs, grads, keep_graph, create_graph, inputs=(), allow_unreachable=False, accumulate_grad=True
    ):  # fmt: skip
        """The gradients of ``inputs``; for tensors that are elsewhere, torch's own."""
        if not any(isinstance(t, Tensor) and t.is_cuda for t in (*outputs, *grads, *inputs)):
            return self.real.run_backward(
                outputs, grads, keep_graph, create_graph, inputs, allow_unreachable, accumulate_grad=accumulate_grad
            )  # fmt: skip
        if accumulate_grad:
            raise NotImplementedError("backward() on a device that is not there")
        roots, wanted = [_edge(t) for t in outputs], [_edge(t) for t in inputs]
        with torch.set_grad_enabled(create_graph):
            found = _run(roots, grads, wanted)
        if not allow_unreachable and None in [found.get(w) for w in wanted]:
            raise RuntimeError(
                "One of the differentiated Tensors appears to not have been used in the graph. Set allow_unused=True "
                "if this is the desired behavior."
            )
        return tuple(found.get(w) for w in wanted)


def _edge(t: Tensor | GradientEdge) -> tuple[Any, int]:
    e = t if isinstance(t, GradientEdge) else get_gradient_edge(t)
    return e.node, e.output_nr


def _run(roots, grads, wanted) -> dict[tuple[Any, int], Tensor]:
    uses, needed = _order([n for n, _ in roots], {n for n, _ in wanted})
    buffers: dict[Any, dict[int, Tensor]] = {}
    for (node, place), g in zip(roots, grads, strict=True):
        _add(buffers, node, place, g)
    ready = [n for n in dict.fromkeys(n for n, _ in roots) if not uses[n]]
    found: dict[tuple[Any, int], Tensor] = {}
    while ready:
        node = ready.pop()
        given = buffers.pop(node, {})
        for w in wanted:
            if w[0] is node and w[1] in given:
                found[w] = given[w[1]]
        follows = [(n, i) for n, i in node.next_functions]
        if not any(n in needed for n, _ in follows if n is not None):
            made: tuple = ()
        else:
            made = _called(node, [given.get(i) for i in range(len(node._input_metadata))])
        for k, (n, i) in enumerate(follows):
            if n is None:
                continue
            if k < len(made) and made[k] is not None and n in needed:
                _add(buffers, n, i, made[k])
            uses[n] -= 1
            if not uses[n]:
                ready.append(n)
    return found


def _order(roots, ends) -> tuple[Counter, set]:
    """How often each node is a next one, and which lead to one of ``ends`` or are one."""
    uses: Counter = Counter()
    needed, seen, stack = set(), set(), [(r, False) for r in roots]
    while stack:
        node, left = stack.pop()
        after = [n for n, _ in node.next_functions if n is not None]
        if left:
            if node in ends or not needed.isdisjoint(after):
                needed.add(node)
        elif node not in seen:
            seen.add(node)
            uses.update(after)
            stack += [(node, True), *((n, False) for n in after)]
    return uses, needed


def _called(node: Any, given: list[Tensor | None]) -> tuple:
    """A node's own gradients; zeros stand for what is not there where the node asks for it, as for the engine."""
    if all(g is None for g in given):
        return ()
    call = node.apply if isinstance(node, torch._C._FunctionBase) else node
    if call is not node and getattr(node, "materialize_grads", True):
        given = [
            _zeros(m) if g is None else g for g, m in zip(given, node._input_metadata, strict=True)
        ]
    made = call(*given)
    return made if isinstance(made, tuple) else (made,)


def _zeros(like: Any) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def _add(buffers: dict, node: Any, place: int, g: Tensor) -> None:
    want = node._input_metadata[place]
    if g.shape != want.shape:
        g = g.sum_to_size(want.shape)
    if g.dtype != want.dtype:
        g = g.to(want.dtype)
    kept = buffers.setdefault(node, {})
    kept[place] = kept[place] + g if place in kept else g
