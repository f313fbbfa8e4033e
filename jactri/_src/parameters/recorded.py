"""One forward pass of a module, read as the graph from its parameters to its output."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import Tensor

from ..base import backends
from ..base.cache import Cache
from ..base.classes import leaf_and_given, plain
from ..base.elsewhere import (
    FSDP,
    WRAPPED,
    check_graph,
    check_here,
    check_local,
    is_distributed,
)
from ..base.remedies import NO_DERIVATIVE, returned
from ..plan.owners import apart_behind
from ..plan.samples import REMEDY, probe_mixing
from ..prologue.arguments import ASSUME, as_tuple, check_samples
from ..prologue.running import buffers_kept, computing, record
from ..read import handover, overriding
from ..read.behind import leaves_behind, reached
from ..read.graph import Graph, UnsupportedGraph
from ..read.opaque import Opaque, refuse_or_log
from ..read.reading import read
from .used import Used
from .uses import SamplesMix, Structure, find, kind_of, looked_up, unstructured

_structures: Cache[tuple, Structure | SamplesMix] = Cache(64)


def chosen(module, params) -> dict[str, Tensor]:
    """The parameters that a call is about, by name. Raises for what is not one of the module's, or frozen."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"module must be a torch.nn.Module, got {type(module).__name__}; wrap a function in a "
            "module, or write it as one of parameters for jactri.func.jacrev: lambda p: "
            "torch.func.functional_call(net, p, x)"
        )
    named = dict(module.named_parameters())
    if not named:
        raise ValueError(f"the module {type(module).__name__} has no parameters")
    if params is None:
        found = {name: p for name, p in named.items() if p.requires_grad}
        if not found:
            raise RuntimeError(
                f"all {len(named)} parameters of {type(module).__name__} are frozen (requires_grad is False); call "
                "requires_grad_() on those that are meant"
            )
        return found
    if isinstance(params, (str, Tensor)):
        params = [params]
    if not isinstance(params, Iterable):
        raise TypeError(f"params must be names or tensors, got {type(params).__name__}")
    every = dict(module.named_parameters(remove_duplicate=False))
    names = {id(p): name for name, p in named.items()}
    found = {}
    for item in params:
        if isinstance(item, str):
            if item not in every:
                close = difflib.get_close_matches(item, every, 3) or list(every)[:5]
                raise ValueError(
                    f"params: {type(module).__name__} has no parameter {item!r}; names like it: {', '.join(close)}"
                )
            name = item
        elif isinstance(item, Tensor):
            if id(item) not in names:
                raise ValueError(
                    f"params: a tensor of shape {tuple(item.shape)} is no parameter of {type(module).__name__}; pass "
                    "names, or the very tensors of module.parameters()"
                )
            name = names[id(item)]
        else:
            raise TypeError(f"params must hold names or tensors, got {type(item).__name__}")
        p = every[name]
        if not p.requires_grad:
            raise RuntimeError(
                f"params: {name!r} is frozen (requires_grad is False), so the output has no graph to it; call "
                "requires_grad_() on it first"
            )
        if any(p is q for q in found.values()):
            raise ValueError(f"params: {name!r} is given twice, or shared with one that is given")
        found[name] = p
    if not found:
        raise ValueError("params is empty: pass at least one name, or None for all")
    return found


class Recorded(Used):
    """The output ``y`` of one forward pass, the graph to its parameters, and the structure of their uses.

    Without ``read`` the graph is read later, by `read`; at once where buffers are put back, which it needs.
    ``graph`` is None where blocks cannot follow (complex values), and where the batch or the output is empty;
    ``structure`` then is, too.
    """

    def __init__(
        self, module, x, params, create_graph: bool, call: str, read: bool = True, per_sample=True
    ):
        check_samples(per_sample, True)
        self.assume = per_sample == ASSUME
        self.module, self.params = module, chosen(module, params)
        _, xs = as_tuple(x, "x", call)
        if any(t.dim() == 0 for t in xs):
            raise ValueError(
                "x needs a batch of samples on its first axis, but it is 0-dimensional; pass x.unsqueeze(0)"
            )
        if not xs:
            raise IndexError("x is an empty tuple: pass at least one tensor")
        if handover.transforming([*xs, *self.params.values()]):
            raise RuntimeError(
                f"{call} is not available inside of a torch.func transform; use torch.func.functional_call there"
            )
        self.create_graph, self._overrides = create_graph, overriding.now.get()
        self._was_read = False
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            buffers_kept(module.modules()) as written,
        ):
            ends = [
                leaf_and_given(t, create_graph) if _differentiable(t) else (_ordinary(t),) * 2
                for t in xs
            ]
            leaves = [leaf for leaf, _ in ends]
            y, self.handles = record(module, *(given for _, given in ends))
            self.params, self.sharded = _after_forward(module, self.params, y)
            if self.sharded and create_graph:
                raise _sharded("create_graph=True", self.sharded)
            if any(p._backward_hooks for p in self.params.values()):
                self.handles = None
            self._check_output(y, leaves, module)
            y = plain(y)
            self.y, self.n, self.leaves = y, y.shape[0], leaves
            self.watched = [(name, p, p._version) for name, p in self.params.items()]
            self.watched += [("x", t, t._version) for t in leaves]
            self.by_autograd = False
            self.reason: UnsupportedGraph | None = None
            """Whether the graph holds what blocks do not represent: then the Jacobian is formed by autograd."""
            self.graph: Graph | None = None
            """From the parameters, and inputs that require grad, to the output; ``of_parameters``: from these alone."""
            self.structure: Structure | None = None
            if read or written:
                self._read()

    @staticmethod
    def _check_output(y, leaves, module) -> None:
        name = type(module).__name__
        if not isinstance(y, Tensor):
            raise TypeError(
                f"the output of {name} must be a Tensor, but it has type {type(y)}"
                + returned(y, of_module=True)
            )
        if not _differentiable(y):
            raise RuntimeError(
                f"the output of {name} has dtype {y.dtype}"
                + (
                    "; return torch.view_as_real(output)"
                    if y.is_complex()
                    else f", {NO_DERIVATIVE}"
                )
            )
        n = leaves[0].shape[0]
        for i, t in enumerate(leaves):
            if t.shape[0] != n:
                raise ValueError(
                    f"x[{i}] has {t.shape[0]} samples on its first axis, and x[0] has {n}"
                )
        if y.dim() == 0 or y.shape[0] != n:
            raise ValueError(
                f"the output of {name} needs the batch of samples on its first axis, but has shape "
                f"{tuple(y.shape)} for {n} samples; for one sample, pass x.unsqueeze(0)"
            )

    # -- structure --------------------------------------------------------------------------------

    def read(self) -> Recorded:
        """Raises RuntimeError where samples mix."""
        if not self._was_read:
            with torch.inference_mode(False):
                self._read()
        return self

    def _read(self) -> None:
        with overriding.using(self._overrides), computing(self.create_graph):
            self._find()
        self._was_read = True  # not where that raised

    def _find(self) -> None:
        y, leaves = self.y, self.leaves
        if not (y.numel() and y.requires_grad):
            return
        real = [t for t in leaves if t.requires_grad]
        try:
            self.graph = graph = read([y], [*self.params.values(), *real], handles=self.handles)
        except UnsupportedGraph as reason:
            shapes = [p.shape for p in self.params.values()]
            refuse_or_log("the module", y.shape, shapes, f"holds {reason}")
            if self.sharded:
                self._check_kept()
            if real and not self.assume:
                with torch.no_grad():
                    leak = probe_mixing([y], real)
                if leak is not None:
                    raise _mixing(f"it holds {reason}, and {leak}") from None
            missing = set(range(len(self.params))) - reached([y], list(self.params.values()))
            self._check_reached(missing)
            self.by_autograd, self.reason = True, reason
            if reason.graph is None:
                return
            self.graph = graph = reason.graph  # for the proof that samples do not mix
        count = len(self.params)
        starts = graph.inputs[:count]
        self.values = dict(zip(self.params, starts, strict=True))
        self.of_parameters = graph
        if len(graph.inputs) > count:
            key = (graph.key, count)
            self.of_parameters = Graph(graph.values, starts, graph.outputs, key, graph.layers)
        self._check_reached({i for i, s in enumerate(starts) if s is None})
        (seed,) = graph.outputs
        if seed is None or all(s is None for s in starts):
            self.graph = None
            return
        data = [s for s in graph.inputs[count:] if s is not None]
        whole = [t for t in leaves if not t.requires_grad]
        picked = looked_up(graph, self.n, whole) if whole and not real else []
        # in the mode of what comes: the graph's maps keep what they compute
        self.structure = self._structure(graph, seed, starts, data, picked, real)
        if self.by_autograd:
            self.graph = self.structure = None

    def _check_kept(self) -> None:
        """Raise where a backward pass frees weights.

        The next one would gather them again, and ranks with more samples make more passes than others.
        """
        params = [*self.params.values()]
        torch.autograd.grad(
            [self.y], params, torch.zeros_like(self.y), retain_graph=True, allow_unused=True
        )
        check_graph([self.y])

    def _check_reached(self, missing: set[int]) -> None:
        """Raise where weights of other tensors stand in for the parameters that the output does not depend on.

        That is where it depends on leaves of which none is the module's, and where one is a flat parameter of FSDP's.
        """
        if not missing:
            return
        own = {id(p) for p in self.module.parameters()}
        found = leaves_behind(self.y, self.leaves)
        foreign = [t for t in found if id(t) not in own]
        flat = any(getattr(t, "_is_flat_param", False) for t in foreign)
        if not foreign or not (flat or len(foreign) == len(found)):
            return
        names = [name for i, name in enumerate(self.params) if i in missing]
        shapes = ", ".join(str(tuple(t.shape)) for t in foreign[:3])
        raise RuntimeError(
            f"the output of {type(self.module).__name__} does not depend on its parameters {', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}, but on {len(foreign)} other tensors that require grad (shapes "
            f"{shapes}{', ...' if len(foreign) > 3 else ''}): its weights live elsewhere. For those, use "
            "jactri.jacobian_of(output, tensors), or a module that they are parameters of"
            + (f"; {WRAPPED}" if flat else "")
        )

    def _structure(self, graph, seed, starts, data, picked, real, opened=()):
        kernels = backends.kernels_on(self.y.device)
        key = (graph.key, self.y.device.type, kernels, len(starts), tuple(picked), opened)
        found = _structures.of(key, lambda: _found(graph, seed, starts, data, picked))
        if not isinstance(found, SamplesMix):
            return found
        # values decide, those of this call
        if not (self.assume or apart_behind(graph, seed, data, picked)):
            if not opened and (opened := _keep_samples(graph, self.n)):
                return self._structure(graph, seed, starts, data, picked, real, opened)
            value = graph.values[found.value]
            why = f"the op {value.op} (output {tuple(value.shape)}) does not keep the batch axis"
            if not real:
                raise _mixing(why)
            if (leak := probe_mixing([self.y], real, graph)) is not None:
                raise _mixing(f"{why}, and {leak}")
        whole = _structures.of((key, "whole"), lambda: unstructured(graph, seed, starts))
        assert isinstance(whole, Structure)
        return whole

    def computing(self):
        if overriding.now.get() not in ((), self._overrides):
            overriding.refuse("a Jacobian that was made outside of the block", "make it inside")
        return super().computing()

    @property
    def reached(self) -> bool:
        """Whether the output depends on a parameter, and neither is empty."""
        return self.by_autograd or self.structure is not None

    def factor_bytes(self) -> float:
        """Bytes of the blocks at all uses, those that are one counted once."""
        sweep = self.structure.sweep
        owner: dict[int, int] = {}
        for step in sweep.steps:
            owner[step.value] = step.value
            if step.shares:
                owner[step.value] = owner.get(step.terms[0].other, sweep.seed)
        held = {owner[t] for t in sweep.targets if t in owner} - {sweep.seed}
        return sum(sweep.stored(self.graph, v) for v in held)

    def kinds(self) -> dict[str, list[str]]:
        """What the uses of every parameter are, in words."""
        structure, found = self.structure, {}
        for name, value in self.values.items():
            uses = [u for u in structure.uses if u.root == value]
            words = [kind_of(u) for u in uses]
            if value in structure.formed:
                words.append("formed")
            counted = dict.fromkeys(words)
            found[name] = [
                word if words.count(word) == 1 else f"{words.count(word)} times {word}"
                for word in counted
            ] or ["not used"]
        return found

    def check_whole(self, what: str) -> None:
        """Raise RuntimeError for weights that are DTensors, of which ``what`` is not possible."""
        if self.sharded:
            raise _sharded(what, self.sharded)

    def check_unchanged(self) -> None:
        """Raise if something was written to since the forward pass, or freed."""
        for name, t, version in self.watched:
            check_here(t, name)
            if t._version != version:
                raise RuntimeError(
                    f"{name} was modified in place after the forward pass (an optimizer's step?), so its Jacobian "
                    "cannot be computed any more; call parameter_jacobian again, or .dense() before the step"
                )


def _after_forward(module, params: dict[str, Tensor], y) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters with which the module ran, and names of those that are DTensors.

    FSDP puts whole ones in the place of its distributed ones, and takes them back if it may.
    """
    if not any(map(is_distributed, params.values())):
        return params, []
    every = dict(module.named_parameters(remove_duplicate=False))
    params = {name: every.get(name, p) for name, p in params.items()}
    spread = [name for name, p in params.items() if is_distributed(p)]
    if not spread:
        return params, []
    used = reached([y], list(params.values())) if isinstance(y, Tensor) else set()
    if not any(i in used for i, p in enumerate(params.values()) if is_distributed(p)):
        raise RuntimeError(
            f"parameters are DTensors after the forward pass ({_some(spread)}), and the output was computed from other "
            f"tensors, so a process has a part of their numbers only: {FSDP}"
        )
    check_local([y], [])
    return params, spread


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _sharded(what: str, names: list[str]) -> RuntimeError:
    return RuntimeError(
        f"{what} is not possible for parameters that are DTensors ({_some(names)}), of which a process has a part "
        "of the numbers only: leave it out, or for tensor parallel weights use a module with the whole ones "
        "(full_tensor())"
    )


def _mixing(why: str) -> RuntimeError:
    return RuntimeError(
        f"samples mix: {why}. A Jacobian a sample does not exist then; make the samples independent (BatchNorm: call "
        "net.eval(); attention: batch_first=True)" + REMEDY
    )


def _found(*given) -> Structure | SamplesMix:
    """What `find` returns, or raises of samples that mix."""
    try:
        return find(*given)
    except SamplesMix as mix:
        return mix.with_traceback(None)


def _differentiable(t: Tensor) -> bool:
    return t.dtype.is_floating_point


def _ordinary(t: Tensor) -> Tensor:
    return t.clone() if t.is_inference() else t


def _keep_samples(graph: Graph, n: int) -> tuple:
    """Let ops that are called instead of understood keep the axes of samples that a probe finds unmixed.

    Returns which edges, and their axes: none in grad mode, in which what a probe says is not enough.
    """
    found: list[tuple[int, int, int]] = []
    if torch.is_grad_enabled():
        return ()
    for v, value in enumerate(graph.values):
        for e, (s, edge) in enumerate(value.sources):
            source = graph.values[s].shape
            if not isinstance(edge, Opaque) or edge.kept(source, value.shape):
                continue
            for a in range(min(len(source), len(value.shape))):
                if source[a] == value.shape[a] == n and edge.unmixed(a):
                    edge.keep(((a, a),))
                    found.append((v, e, a))
                    break
    return tuple(found)
