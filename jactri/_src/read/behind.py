"""What lies behind a tensor in autograd's graph, by its edges alone: which tensors it was computed from."""

from __future__ import annotations

from collections.abc import Container, Sequence
from math import prod
from typing import Any, NamedTuple

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


class Work(NamedTuple):
    """Of one backward pass: the nodes, the bytes of all gradients, those that are read or written, and flops."""

    nodes: int
    held: float
    moved: float
    flops: float


class Walk:
    """The nodes behind some tensors, producers first, with leaves where they are met; nothing of them is read.

    ``edges``: of every node but the leaves, its ``next_functions``; none where an input of a call ends the search, or
    one of ``stops``.
    """

    __slots__ = ("edges", "order")

    def __init__(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], stops: Container[object] = ()
    ):
        ends = {x.grad_fn for x in inputs if x.requires_grad}  # None: a leaf
        # an interior input ends the search behind it, unless another input may lie there
        stops = ends if len(ends) == 1 else stops
        self.order: list = []
        self.edges: dict[Any, tuple] = {}
        met: set[object] = set()  # leaves, and nodes that are in order
        for y in outputs:
            if y.grad_fn is not None:
                self._open(y.grad_fn, stops, met)

    def work(self, samples: int) -> Work | None:
        """What a backward pass does at most, every edge a dense matrix; None where values are complex or nested.

        ``samples``: of how many, which do not influence one another, the values are.
        """
        sizes: dict[object, list[int]] = {}
        held = moved = flops = 0.0
        for node in self.order:
            if node.__class__ is _ACCUMULATE:
                sizes[node] = [node.variable.numel()]
                continue
            made, itemsize = [], 0
            for m in node._input_metadata:
                kind = m.dtype
                if kind.is_complex or m.is_nested_tensor:
                    return None
                made.append(prod(m.shape))
                itemsize = max(itemsize, kind.itemsize)
            sizes[node] = made
            out = sum(made)
            for p, nr in self.edges[node]:
                if p is not None:
                    size = sizes[p][nr]
                    held += size * itemsize
                    moved += (3 * size + out * size / samples**2) * itemsize
                    flops += 2 * out * size / samples
        return Work(len(self.edges), held, moved, flops)

    def _open(self, root, stops, met: set[object]) -> None:
        """All that lies behind ``root``, without recursion."""
        opened, order = self.edges, self.order
        stack = [root]
        while stack:
            node = stack[-1]
            if node not in opened:
                edges = opened[node] = () if node in stops else node.next_functions
                for p, _ in edges:
                    if p is None or p in met:
                        continue
                    if p.__class__ is _ACCUMULATE:
                        met.add(p)
                        order.append(p)
                    elif p not in opened:
                        stack.append(p)
                if stack[-1] is not node:
                    continue
            stack.pop()
            if node not in met:
                met.add(node)
                order.append(node)


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


def dtypes_behind(ys: Sequence[Tensor], xs: Sequence[Tensor]) -> set[torch.dtype]:
    """The dtypes of all that lies between some tensors and inputs of a call."""
    nodes = [node for node in Walk(ys, xs).order if node.__class__ is not _ACCUMULATE]
    return {m.dtype for node in nodes for m in node._input_metadata}


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
