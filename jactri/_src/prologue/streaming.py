"""Tangents that go with the function's own run: what autograd records of an op is read, and let go, at once.

The function runs once, in grad mode, as for any call. After each op (as a mode of torch's functions sees them) the
graph behind its result is followed to the tensors whose tangents are known, all K tangents are pushed through its
maps, and the result begins a new graph: the function gets the same memory, behind which there is nothing but a leaf
that holds the tangents. So the saved values of one op exist at a time, and tangents live as long as Python holds their
tensors.

Correctness does not rest on the mode seeing all that happens: what it does not cut (views, custom Functions, complex
numbers, subclasses, what other threads run) stays in autograd's graph, and is read with the next op that uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._autograd import _get_sequence_nr, _top_saved_tensors_default_hooks
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from ..base.tracing import may_write
from ..plan.poles import suspects
from ..read.behind import Walk
from ..read.graph import Graph, UnsupportedGraph
from ..read.handover import transforming
from ..read.hooks import MODULE_HOOKS, tracked
from ..read.joining import for_given
from ..read.reading import read
from ..rules import record_of, rule
from .running import computing, record, saved_as_it_is, stream_now

Whole = Callable[[Sequence[Tensor], Sequence[Tensor], list[Tensor], Graph | None], list[Tensor]]
"""Tangents of the outputs of a recorded computation, of its inputs, by all that there is (see `calls.vectors.push`)."""

WRITES = 16
"""After how many writes to parts of a tensor it begins a new graph. Till then each one's tangents are held."""

ROWS = 4
"""For how many tangents an elementwise op's node is called: for more, its derivative is formed once."""

_ACCUMULATE = torch._C._functions.AccumulateGrad

_REFUSED = {
    torch.autograd.grad: "calls torch.autograd.grad",
    torch.autograd.backward: "calls torch.autograd.backward",
    Tensor.backward: "calls backward()",
    Tensor.register_hook: "registers a hook on a gradient (Tensor.register_hook)",
}
"""What needs the graph that is gone."""


class Cut(torch.autograd.Function):
    """The memory of a leaf as a tensor that is none, so that it may be written to, and its views too.

    ``into``: a tensor that is to remain the same object, with that memory.
    """

    @staticmethod
    def forward(ctx, leaf: Tensor, into: Tensor | None = None):
        if into is None:
            return leaf.detach()
        ctx.mark_dirty(into)
        return into

    @staticmethod
    def backward(ctx, c):
        return c, None


_CUT = Cut._backward_cls  # type: ignore[attr-defined]


@rule(Cut)
def cut(g):
    return g.src[0]


class _Apart:
    """The nodes that no tangents lead to, by which a walk ends.

    Of what the function itself records, a node carries that note: to hold the node here would hold what it saved. What
    is older is the caller's, and is held till the call ends.
    """

    def __init__(self):
        self._start, self._older, self._mark = _get_sequence_nr(), set[object](), object()

    def __contains__(self, node) -> bool:
        if node._sequence_nr() < self._start:
            return node in self._older
        return self._mark in node.metadata

    def note(self, walk: Walk, leaves: Sequence[Tensor]) -> None:
        """All of a walk that these leaves, the only ones with tangents, do not lead to."""
        alive, reached = {id(x) for x in leaves}, set[object]()
        for node in walk.order:
            if node.__class__ is _ACCUMULATE:
                if id(node.variable) in alive:
                    reached.add(node)
            elif not reached.isdisjoint(p for p, _ in walk.edges[node]):
                reached.add(node)
            elif node._sequence_nr() < self._start:
                self._older.add(node)
            else:
                node.metadata[self._mark] = None


class Streamed(TorchFunctionMode):
    """Runs a function with tangents of its inputs: blocks ``(K, *input)`` in, those of any of its tensors out."""

    def __init__(self, blocks: Sequence[Tensor], whole: Whole, backend: str = "auto"):
        super().__init__()
        self._blocks, self._whole, self._backend = blocks, whole, backend
        self._pauses = self._first = 0
        self._packed = self._reads = False
        # kept here, not with the tensors: a buffer, and leaves behind it, may outlive the call
        self._held, self._writes = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self._apart = _Apart()

    def begin(self, leaves: Sequence[Tensor]) -> None:
        """Give the inputs, leaves of nobody else, their tangents."""
        for leaf, block in zip(leaves, self._blocks, strict=True):
            self._give(leaf, block)

    def record(self, func: Callable, *given: Tensor) -> Any:
        """As `running.record`, with tangents."""
        self._first = RemovableHandle.next_id
        with stream_now(self), self:
            return record(func, *given)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Let autograd record: for calls of jactri within the function."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def products(self, ys: Sequence[Tensor]) -> list[Tensor]:
        """`tangents` of the function's outputs, each in memory of its own."""
        made, taken = [], {_memory(b) for b in self._blocks}
        for y, t in zip(ys, self.tangents(ys), strict=True):
            columns = len(self._blocks[0])
            t = y.new_zeros(columns, *y.shape) if t is None else t.contiguous()
            t = t.clone() if _memory(t) in taken else t
            taken.add(_memory(t))
            made.append(t)
        return made

    def tangents(self, ys: Sequence[Tensor]) -> list[Tensor | None]:
        """The block ``(K, *y)`` of each tensor; None for one that does not depend on the inputs."""
        if not self._packed or self._reads:
            return self._tangents(ys)
        # custom Functions escape the mode: reading one may run a checkpointed segment, which has to save what it did
        # the first time, where all other ops were read at once
        self._reads = True
        try:
            with stream_now(self), saved_as_it_is(), self:
                return self._tangents(ys)
        finally:
            self._reads = False

    def _tangents(self, ys: Sequence[Tensor]) -> list[Tensor | None]:
        walk = Walk(ys, (), self._apart)
        leaves = self._leaves(ys, walk)
        self._apart.note(walk, leaves)
        if not leaves:
            return [None] * len(ys)
        blocks = [self._held[x] for x in leaves]
        hooks = RemovableHandle.next_id - self._first
        with computing(False, self._backend):
            if len(ys) == len(leaves) == 1 and not hooks:
                made = _at_once(ys[0], leaves[0], blocks[0], walk)
                if made is not None:
                    return [made]
            if hooks:
                if not tracked() and any(p.__class__ is MODULE_HOOKS for p in walk.order):
                    _refuse(
                        "has a module with backward hooks, which see a backward pass of all of it"
                    )
                for x in leaves:
                    x._jactri_handles = hooks  # type: ignore[attr-defined]
            try:
                graph = read(ys, leaves, walk=walk)
            except UnsupportedGraph:
                return self._whole(ys, leaves, blocks, None)
            if len(graph.values) > 2 and suspects(graph):
                return self._whole(ys, leaves, blocks, graph)
            return along(for_given(graph, len(blocks[0])), blocks)

    # -- the mode -----------------------------------------------------------------------------------

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            self._pauses
            or not torch.is_grad_enabled()
            or transforming(())
            or forward_ad._current_level >= 0
        ):
            return func(*args, **kwargs)
        packed = _top_saved_tensors_default_hooks(True) is not None
        if self._reads:
            with saved_as_it_is() if packed else nullcontext():
                return func(*args, **kwargs)
        if func in _REFUSED and not (func is Tensor.register_hook and tracked()):
            self._check(func, args, kwargs)
        versions = [_version(a) for a in _tensors(args, kwargs)]
        if packed:  # of a checkpoint, say: what is saved is read at once
            self._packed = True
            with saved_as_it_is():
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if out.__class__ is Tensor:
            return self._cut([out], args, kwargs, versions)[0] if _live(out) else out
        if out is None:
            if func is Tensor.__setitem__:
                self._written(args[0])
        elif isinstance(out, (tuple, list)) and any(map(_live, out)):
            made = self._cut(list(out), args, kwargs, versions)
            return getattr(out, "_make", out.__class__)(made)
        return out

    def _cut(self, outs: list, args, kwargs, versions: list[int]) -> list:
        """What an op returned, with new graphs behind what is its own; what it wrote to begins one as it is."""
        given = list(_tensors(args, kwargs))
        roots = [_root(a) for a in given]
        fresh: list[int] = []
        for i, y in enumerate(outs):
            if not _live(y):
                continue
            at = next((k for k, a in enumerate(given) if y is a), None)
            if at is not None:
                if _version(y) != versions[at]:  # else it was handed through
                    self._written(y, whole=True)
            elif not any(_root(y) is r for r in roots):
                fresh.append(i)
        if fresh:
            for i, block in zip(fresh, self.tangents([outs[i] for i in fresh]), strict=True):
                if block is not None:
                    outs[i] = Cut.apply(self._give(outs[i].detach().requires_grad_(), block))
        return outs

    def _written(self, y: Tensor, whole: bool = False) -> None:
        """After a write to a tensor, or to a part of it; ``whole``: to all of it, where it is no view."""
        root = _root(y)
        if not _live(root):
            return
        if not whole or root is not y:
            self._writes[root] = count = self._writes.get(root, 0) + 1
            if count < WRITES:
                return
        (block,) = self.tangents([root])
        if block is not None:
            leaf = self._give(root.detach().requires_grad_(), block)
            root.detach_()
            Cut.apply(leaf, root)
            self._writes[root] = 0

    def _check(self, func, args, kwargs) -> None:
        """Raise for what would need the graph behind a tensor that has tangents."""
        for y in _tensors(args, kwargs):
            if self._leaves([y], Walk([y], (), self._apart)):
                _refuse(_REFUSED[func])

    # -- tangents -----------------------------------------------------------------------------------

    def _give(self, leaf: Tensor, block: Tensor) -> Tensor:
        self._held[leaf] = block
        return leaf

    def _leaves(self, ys: Sequence[Tensor], walk: Walk) -> list[Tensor]:
        """The leaves behind some tensors that hold tangents."""
        found = [node.variable for node in walk.order if node.__class__ is _ACCUMULATE]
        found += [y for y in ys if y.grad_fn is None]
        return list({id(x): x for x in found if x in self._held}.values())


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(
        f"func {what}, for which the graph of func is needed; differentiate=None lets it go as it is made. Leave "
        "differentiate out (the graph is there until the call ends), or pass differentiate='output' or 'both'"
    )


def along(graph: Graph, blocks: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Blocks ``(K, *input)``, or None for zeros, pushed through a graph, value by value: ``(K, *output)``.

    A block that no value needs any more is let go, and so are the maps: the graph is used up.
    """
    values, writable = graph.values, may_write()
    left = [0] * len(values)  # how often a block is used, on the way to an output
    for end in graph.outputs:
        if end is not None:
            left[end] += 1
    for v in reversed(range(len(values))):
        for s, _ in values[v].sources if left[v] else ():
            left[s] += 1
    made: list[tuple[Tensor, bool] | None] = [None] * len(values)
    for v, block in zip(graph.inputs, blocks, strict=True):
        if v is not None and block is not None:
            made[v] = block, False
    for v, value in enumerate(values):
        total, own = None, False
        together: dict[int, Tensor] = {}
        for s, edge in value.sources if left[v] else ():
            found = made[s]
            left[s] -= 1
            if found is None:
                continue
            last = not left[s]
            made[s] = None if last else (found[0], False)  # what is made of it may share its memory
            block, mine = found
            del found
            if edge.whole is not None:
                together[edge.place] = block
                continue
            new, fresh = edge.push(block, mine and last and writable)
            del block
            if total is None:
                total, own = new, fresh
            elif own and writable and (new.dtype, new.shape) == (total.dtype, total.shape):
                total.add_(new)
            elif fresh and writable and (new.dtype, new.shape) == (total.dtype, total.shape):
                total, own = new.add_(total), True
            else:
                total, own = total + new, True
            del new
        if together:
            total, own = value.sources[0][1].whole.join(together), True
        value.sources = ()  # derivatives go with their maps
        if total is not None:
            made[v] = total, own
    return [None if v is None or made[v] is None else made[v][0] for v in graph.outputs]


def _at_once(y: Tensor, x: Tensor, block: Tensor, walk: Walk) -> Tensor | None:
    """The tangents of a leaf as it is, or of one elementwise op on it; None for all else.

    What multiplies by a diagonal is the same for tangents and cotangents, so that its node may be called: without the
    derivative in memory, but once for each tangent.
    """
    node = y.grad_fn
    if node is None or node.__class__ is _CUT:
        return block
    between = [p for p in walk.order if p.__class__ is not _CUT]
    if (
        len(between) != 2
        or len(block) > ROWS
        or record_of(node.name()).form is None
        or (y.shape, y.dtype, y.device) != (x.shape, x.dtype, x.device)
        or sum(p is not None for p, _ in node.next_functions) != 1
    ):
        return None
    if len(block) == 1:
        return _first(node(block[0])).unsqueeze(0)
    if not may_write():
        return None
    made = torch.empty_like(block)
    for row, t in zip(made, block, strict=True):
        row.copy_(_first(node(t)))
    return made


def _first(made) -> Tensor:
    return made[0] if isinstance(made, tuple) else made


def _live(y: Any) -> bool:
    """Whether a result is one that may begin a new graph: real numbers with a graph, and more behind than a leaf."""
    if y.__class__ is not Tensor or not y.requires_grad:
        return False
    node = y.grad_fn
    return (
        node is not None
        and node.__class__ is not _CUT
        and y.is_floating_point()
        and y.layout is torch.strided
    )


def _root(x: Tensor) -> Tensor:
    """The tensor of which this one is a view, or itself."""
    return x._base if x._is_view() else x  # type: ignore[return-value]


def _tensors(args, kwargs) -> Iterator[Tensor]:
    """The tensors among arguments, and in lists of them."""
    for a in (*args, *kwargs.values()):
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (tuple, list)):
            yield from (b for b in a if isinstance(b, Tensor))


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
