"""What lies behind a tensor in autograd's graph, by its edges alone: which tensors it was computed from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def reached(ys: Sequence[Tensor], xs: Sequence[Tensor]) -> set[int]:
    """Which of ``xs``, by number, the graph of ``ys`` leads to."""
    ends: dict[object, list[int]] = {}
    for i, x in enumerate(xs):
        ends.setdefault(_place(x), []).append(i)
    found: set[int] = set()
    seen: set[object] = set()
    stack = [_place(y) for y in ys if y.requires_grad]
    while stack and len(found) < len(xs):
        place = stack.pop()
        found.update(ends.get(place, ()))
        if place.__class__ is int or place[0] in seen:
            continue
        seen.add(place[0])
        for p, nr in place[0].next_functions:
            if p is not None:
                stack.append(id(p.variable) if p.__class__ is _ACCUMULATE else (p, nr))
    return found


def leaves_behind(y: Tensor, ends: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of the graph of ``y`` that are not ``ends`` nor behind them."""
    stops = set(map(_place, ends))
    found, seen, stack = {}, set(), [_place(y)]
    while stack:
        place = stack.pop()
        if place in seen or place in stops or place.__class__ is int:
            continue
        seen.add(place)
        for p, nr in place[0].next_functions:
            if p.__class__ is not _ACCUMULATE:
                stack += [(p, nr)] if p is not None else []
            elif id(p.variable) not in stops:
                found[id(p.variable)] = p.variable
    return list(found.values())


def _place(x: Tensor):
    """Where a tensor is in a graph: the output of a node, or the id of a leaf."""
    return id(x) if x.grad_fn is None else (x.grad_fn, x.output_nr)


def handles_of(inputs: Sequence[Tensor]) -> int:
    """How many hooks a function registered when it was called with these."""
    count = 0
    for x in inputs:
        count = max(count, getattr(x, "_jactri_handles", 0))
    return count


def nodes_behind(ys: Sequence[Tensor]) -> set:
    """Autograd's nodes behind some tensors."""
    seen, stack = set(), [y.grad_fn for y in ys]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return seen
