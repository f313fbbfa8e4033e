"""Hooks on gradients. For autograd they are a part of the function, and so they are here.

The maps of a graph are those of its ops; a hook that changes what it gets makes another function of it. No node tells
whether it has hooks. But every one that is registered takes a number, so that a function which registers none costs
nothing. Else one cotangent is pulled twice: by autograd, which runs hooks, and by the nodes alone, called one after the
other. Where that differs, autograd computes, as for other graphs that blocks cannot follow.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.modules._functions import BackwardHookFunction
from torch.utils.hooks import RemovableHandle

from ..base.backends import captured
from ..base.constants import arbitrary, firm
from ..base.elsewhere import check_graph
from ..base.tracing import own, tracing
from . import pulling
from .behind import nodes_behind
from .graph import Graph, Reader, UnsupportedGraph, follow

_FSDP = "torch.distributed.fsdp"
MODULE_HOOKS = BackwardHookFunction._backward_cls
"""What a module with backward hooks leaves in the graph, around its inputs and around its outputs."""


class ChangedByHook(UnsupportedGraph):
    """Hooks of the graph, which is ``graph`` without them, change gradients."""

    def __init__(self, at: str, linear: bool, why: str | None, graph: Graph):
        super().__init__(f"a hook that changes gradients, at {at}")
        self.linear, self.why, self.graph = linear, why, graph


def check(graph: Graph, ys: Sequence[Tensor], xs: Sequence[Tensor]) -> None:
    """Raise ChangedByHook where hooks on the graph between ``xs`` and ``ys`` change gradients, and warn.

    Raises RuntimeError for hooks that give something else each time.
    """
    ys = [y for y in ys if y.requires_grad and y.numel()]
    if not ys or tracked() or only_look(ys):
        return
    first, second = (
        [arbitrary(y.shape, y).roll(k).reshape(y.shape) * (1 - 2 * k) for y in ys] for k in (0, 1)
    )
    check_graph(ys)
    with torch.no_grad():
        reader = _Nodes()
        nodes = follow(ys, xs, reader)
        try:
            given = _by_autograd(ys, xs, first)
        except (
            RuntimeError
        ) as error:  # of an op that has no backward: there is nothing to compare with
            if "not implemented" not in str(error):
                raise
            return
        pulled, noise = _pulled(nodes, first)
        plain = [pulled.get(v) for v in nodes.inputs]
        # what acts on positive gradients only does so on one of these
        against = _by_autograd(ys, xs, [-c for c in first])
        if _alike(given, plain, noise) and _alike(against, _times(-1, plain), noise):
            return
        if not _alike(_by_autograd(ys, xs, first), given):
            raise RuntimeError(
                "a hook on gradients (of Tensor.register_hook, say) gives another result each time that it runs, as "
                "one that removes itself does: no Jacobian can be had row by row; register one that stays as it is"
            )
        both = _by_autograd(ys, xs, [a + b for a, b in zip(first, second, strict=True)])
        summed = [_add(a, b) for a, b in zip(given, _by_autograd(ys, xs, second), strict=True)]
        linear = _alike(both, summed) and _alike(against, _times(-1, given))
        at = _where(nodes, reader, ys, xs, first)
    why = None
    if torch.is_grad_enabled() and not _recorded(ys, xs, first):
        why = (
            f"a hook on gradients, at {at}, computes what autograd does not record (under no_grad, or of detached "
            "tensors), so what it gives has no derivative; write it in torch's ops, or call without it"
        )
    warnings.warn(
        f"a hook on gradients, at {at}, changes them: as in torch.autograd, that is a part of the function, whose "
        "Jacobian autograd computes as a whole",
        stacklevel=2,
    )
    raise ChangedByHook(at, linear, why, graph)


def check_complex(graph: Graph, ys: Sequence[Tensor], xs: Sequence[Tensor]) -> None:
    """Raise UnsupportedGraph where gradients through complex numbers are not those of autograd, or are not finite.

    Its formulas are not all conjugated as the derivative is (``index_add`` with a complex ``alpha``, in torch 2.13);
    and one part of a number that is infinite may make NaN of the other. Costs a backward pass, and one in pairs.
    """
    ends = [
        v is not None and y.requires_grad and y.numel() > 0
        for v, y in zip(graph.outputs, ys, strict=True)
    ]
    if not any(ends) or any(t.is_complex() for t in (*ys, *xs)):
        return  # refused elsewhere
    if own():
        return  # what is compiled is held against the call itself
    if captured(ys[0].device) or tracing():
        raise UnsupportedGraph("complex values, whose gradients no trace can compare")
    check_graph(ys)
    cs = [firm(y.shape, y) if used else None for y, used in zip(ys, ends, strict=True)]
    # in the mode that the maps will be used in: they keep what they compute
    found = {v: g.detach() for v, g in pulling.pulled(graph, cs, graph.inputs).items()}
    live = [k for k, used in enumerate(ends) if used]
    with torch.no_grad():
        ours = [None if v is None else found.get(v) for v in graph.inputs]
        theirs = _by_autograd([ys[k] for k in live], xs, [cs[k] for k in live])
        finite = all(bool(g.isfinite().all()) for g in (*ours, *theirs) if g is not None)
        if not finite or not _alike(ours, theirs, _noise(found)):
            raise UnsupportedGraph("complex values whose gradients autograd has otherwise")


class _Nodes(Reader):
    """A reader that understands no op: every node is called."""

    hooks = pairs = False

    def __init__(self):
        super().__init__()
        self.overrides = None
        self.edges: dict[int, GradientEdge] = {}
        """Of every value."""

    def visit(self, node, src):
        self._turn_to(node, src)
        ids = self.called()
        self.edges.update({v: GradientEdge(node, nr) for nr, v in enumerate(ids) if v is not None})
        return ids


def _by_autograd(ys, xs, cotangents) -> list[Tensor | None]:
    clones = [c.clone() for c in cotangents]  # a hook may write to them
    return list(torch.autograd.grad(ys, xs, clones, retain_graph=True, allow_unused=True))


Called = tuple[dict[int, Tensor], dict[int, Tensor]]
"""The gradients in the outputs of a node, by value, and those that it gives to its sources."""


def _calls(graph: Graph, cotangents) -> Iterator[Called]:
    """The nodes of a graph of `_Nodes`, each called once, with the gradients in all of its outputs.

    As autograd's engine does: some nodes (that of group_norm, in torch 2.13) give another result output by output.
    Gradients live until their node is called. Last come those in values that no node makes, with nothing given on.
    """
    found: dict[int, Tensor] = {}

    def add(into: dict[int, Tensor], v: int, g: Tensor) -> None:
        into[v] = into[v] + g if v in into else g

    for v, c in zip(graph.outputs, cotangents, strict=True):
        if v is not None:
            add(found, v, c)
    values, v = graph.values, len(graph.values) - 1
    while v >= 0:
        sources = values[v].sources
        if not sources:
            v -= 1
            continue
        call, given = sources[0][1].call, {}
        while v >= 0 and values[v].sources and values[v].sources[0][1].call is call:
            if v in found:
                given[v] = found.pop(v)
            v -= 1
        if not given:
            continue
        by_number = {values[u].sources[0][1].nr: g for u, g in given.items()}
        grads = call.edges(call.cotangents(by_number))
        made: dict[int, Tensor] = {}
        for s, edge in sources:
            if (g := grads[edge.edge]) is not None:
                g = g.real if g.is_complex() and not values[s].dtype.is_complex else g
                add(made, s, g.sum_to_size(values[s].shape).to(values[s].dtype))
        yield given, made
        for s, g in made.items():
            add(found, s, g)
        del given, by_number, grads, made, g
    yield found, {}


def _pulled(graph: Graph, cotangents) -> tuple[dict[int, Tensor], float]:
    """The gradients in the inputs of a graph of `_Nodes`, and how far they may be off (see `_noise`)."""
    ends, noise = set(graph.inputs), 0.0
    kept: dict[int, Tensor] = {}
    for given, _ in _calls(graph, cotangents):
        kept.update((v, g) for v, g in given.items() if v in ends)
        noise = max(noise, _noise(given))
        del given
    return kept, noise


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _times(factor: float, found: list[Tensor | None]) -> list[Tensor | None]:
    return [None if g is None else factor * g for g in found]


def _noise(found: dict[int, Tensor]) -> float:
    """How far gradients may be off that cancel: the rounding of the largest on the way."""
    sizes = [
        torch.finfo(g.dtype).eps * g.abs().nan_to_num(posinf=0).max()
        for g in found.values()
        if g.numel()
    ]
    return 4 * max(map(float, sizes), default=0.0)


_PART = 1 << 18
"""Entries that are compared at once: what a comparison makes is as large as these."""


def _size(a: Tensor, b: Tensor) -> Tensor:
    size = torch.maximum(a.abs(), b.abs())
    return torch.where(size.isfinite(), size, 0.0).max()


def _near(a: Tensor, b: Tensor, bound: Tensor) -> bool:
    same = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= bound)
    return bool(same.all())


def _alike(found, wanted, noise: float = 0.0) -> bool:
    """Whether gradients are the same but for rounding, in which only the order of sums differs."""
    for a, b in zip(found, wanted, strict=True):
        if a is None and b is None:
            continue
        a = torch.zeros_like(b) if a is None else a
        b = torch.zeros_like(a) if b is None else b.to(a.dtype)
        if not a.numel():
            continue
        one, two = (t.reshape(-1).split(_PART) for t in (a, b))
        size = reduce(torch.maximum, [_size(p, q) for p, q in zip(one, two, strict=True)])
        bound = torch.finfo(a.dtype).eps ** (2 / 3) * size + noise
        if not all(_near(p, q, bound) for p, q in zip(one, two, strict=True)):
            return False
    return True


def _where(graph: Graph, reader: _Nodes, ys, xs, cotangents) -> str:
    """The op at which autograd has other gradients than the nodes, the one nearest to the outputs.

    The engine runs every node by itself, from the gradients that come to it without hooks.
    """
    ends = {
        **reader.edges,
        **{v: x for v, x in zip(graph.inputs, xs, strict=True) if v is not None},
    }

    def changed(given: dict[int, Tensor], v: int, g: Tensor) -> bool:
        """Whether the engine comes from what is given to another gradient at a value."""
        found = _by_autograd([ends[u] for u in given], [ends[v]], given.values())
        return not _alike(found, [g])

    for given, made in _calls(graph, cotangents):
        at = next((v for v, g in given.items() if changed({v: g}, v, g)), None)
        if at is None and made:
            v = max(made)  # to which no way leads through others
            if changed(given, v, made[v]):  # by a hook on the value, or on the node
                at = v if changed({v: made[v]}, v, made[v]) else min(given)
        del given, made
        if at is not None and graph.values[at].sources:
            return graph.values[at].op
        if at is not None:
            return [u.op for u in graph.values if any(s == at for s, _ in u.sources)][-1]
    return "an input"


def _recorded(ys, xs, cotangents) -> bool:
    """Whether autograd knows that gradients are linear in the cotangents: ``g = (dg / dc) c``, all of it."""
    with torch.enable_grad():
        cs = [c.detach().requires_grad_() for c in cotangents]
        clones = [c.clone() for c in cs]
        found = torch.autograd.grad(ys, xs, clones, create_graph=True, allow_unused=True)
        weighed = [(g * arbitrary(g.shape, g)).sum() for g in found if g is not None]
        if not weighed:
            return True
        total = sum(w.double() for w in weighed)
        if not total.requires_grad:
            return False
        back = torch.autograd.grad(total, cs, retain_graph=True, allow_unused=True)
    with torch.no_grad():
        again = sum((b * c).sum().double() for b, c in zip(back, cs, strict=True) if b is not None)
        return _alike([total.detach().to(weighed[0].dtype)], [torch.as_tensor(again)])


# -- hooks that are known not to look at gradients ------------------------------------------------


def only_look(ys: Sequence[Tensor]) -> bool:
    """Whether there are no hooks at all, or they are FSDP's."""
    return RemovableHandle.next_id == 0 or _sharded(ys, nodes_behind(ys))


def tracked() -> bool:
    """Whether torch's own tracker of modules is on, as FlopCounterMode's is.

    Its hooks only look, and ``torch.autograd.grad`` refuses to run them.
    """
    known = sys.modules.get("torch.utils.module_tracker")
    return known is not None and any(
        isinstance(getattr(hook, "__self__", None), known.ModuleTracker)
        for hook in torch.nn.modules.module._global_forward_pre_hooks.values()
    )


def removed(handle: RemovableHandle) -> None:
    """Remove a hook of all modules. torch keeps a note that it took keyword arguments, as if it were there still."""
    handle.remove()
    torch.nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id, None)


def _sharded(ys: Sequence[Tensor], nodes) -> bool:
    """Whether the graph is one of FSDP, whose hooks change no gradient, but free weights after a backward pass."""
    if _FSDP not in sys.modules:
        return False
    hooks = [h for y in ys for h in (y._backward_hooks or {}).values()]
    found = [getattr(h, "func", h) for h in hooks] + [getattr(n, "_forward_cls", n) for n in nodes]
    return any(getattr(f, "__module__", "").startswith(_FSDP) for f in found)
