"""`overrides`: derivatives of the caller's own in place of those of ops and modules, for a block of code."""

from __future__ import annotations

import difflib
import functools
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import module as modules
from torch.utils._pytree import tree_leaves, tree_map

from ..prologue.running import recording
from ..read import overriding
from ..read.graph import Reader
from ..read.hooks import removed
from ..read.overriding import Applied, Calls, Override
from ..read.structure import Node, said
from .custom import emitted, named, structured, target_of
from .derivatives import ModuleCall, Own, zero

Derivative = Callable[[Any], Any] | float

_KINDS = ("", "native", "fused", "safe", "masked", "cudnn", "miopen")
"""How torch names nodes of one op that it computes in several ways."""


@contextmanager
def overrides(mapping: Mapping[Any, Derivative], model: Module | None = None) -> Iterator[None]:
    """Put derivatives in the place of those of ops or modules, in all that jactri computes within the ``with`` block.

    The function computes what it does; only its linear maps are others, the same in forward and reverse mode, for
    `jacobian`, `jacobian_of`, `jvp`, `vjp`, `gradient`, `diagonal`, `divergence`, `jjt`, `jtj`, `parameter_jacobian`,
    `empirical_ntk`, `ggn`, `layer_jacobian` and `sparsity`; `explain` shows how many nodes were met. Blocks nest: the
    innermost decides. Other threads, calls of torch's own, and the model outside of jactri's calls see nothing of it,
    and neither do the sums of `layer_jacobian`.

    Args:
        mapping: derivatives by what they are for. A key is

            - the name of an op (``"softmax"``, ``"layer_norm"``) or of its node (``"SoftmaxBackward0"``), a class of
              ``autograd.Function``, or an op of ``torch.library``: every such node;
            - a module, a class of modules, or with ``model`` a pattern of names in it (``"layers.*.norm"``, where
              ``*`` stands for dots, too): each call of one as a whole, from its first tensor argument (of those that
              have a gradient) to its output;
            - a pair ``(module, op)`` of the two: nodes of that op which such modules make.

            A value is `zero`, `identity`, `ratio`, `uniform`, `detached_std`, a number (the derivative of every entry),
            or a function. That gets a `Node`, or for a module an object with ``module``, ``input`` and ``output``
            (detached), and returns the derivative of every entry, a tensor that broadcasts to the output, or a number;
            for a node it may return what `rule` takes, too, such as ``node.matrix(...)``. Nothing is verified.
        model: in which patterns of modules are looked up.

    Raises:
        TypeError: a key or value that is none of these; (in a call) a module without one tensor in and out.
        ValueError: a name that no op or module has; (in a call) an override that was for nothing in it: the ops that
            ran are named.
        RuntimeError: it is inside of a function that jactri differentiates; (in a call) what cannot honour them:
            ``create_graph``, ``strict``, second derivatives, transforms of torch.func around the call, compiled calls,
            `check`, `JacobianMean`, functions that autograd computes as a whole, a module as a whole that writes to its
            input in place without saying so by ``inplace=True``, and nodes that hide an op (fused attention hides its
            softmax: only `zero` is known there).

    Cost:
        That of the call; `jvp` with ``differentiate=None`` holds the graph until it ends, and an interrupted call on a
        memmap ``out`` starts anew.

    Examples:
        >>> x = torch.randn(4)
        >>> f = lambda x: x.softmax(0) * x
        >>> with jactri.overrides({"softmax": jactri.zero}):  # attention weights, held constant
        ...     J = jactri.jacobian(f, x)
        >>> torch.allclose(J, x.softmax(0).diag())
        True

        A module as a whole, by its name; and ops in modules of a class:

        >>> net = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2))
        >>> with jactri.overrides({"1": jactri.identity, (nn.Linear, "addmm"): jactri.uniform}, model=net):
        ...     J = jactri.jacobian(net, torch.randn(5, 3), per_sample=True)
        >>> torch.allclose(J, (net[2].weight @ net[0].weight).expand(5, 2, 3))
        True
    """
    if not isinstance(mapping, Mapping) or not mapping:
        raise TypeError(
            f"mapping must be a dict such as {{'softmax': jactri.zero}}, got {mapping!r}"
        )
    if model is not None and not isinstance(model, Module):
        raise TypeError(f"model must be a Module, got {type(model)}")
    if recording():
        raise RuntimeError(
            "jactri.overrides inside of a function that jactri differentiates comes too late: the graph is read when "
            "the function has run; open the block around the call of jactri"
        )
    made = [_entry(key, value, model) for key, value in mapping.items()]
    watched = [w for _, w in made if w is not None]
    with ExitStack() as stack:
        stack.enter_context(
            overriding.using((*overriding.now.get(), *reversed([o for o, _ in made])))
        )
        if watched:  # the hooks see only what runs in here
            hooks = (
                modules.register_module_forward_pre_hook(functools.partial(_enter, watched)),
                modules.register_module_forward_hook(
                    functools.partial(_replace, watched), with_kwargs=True
                ),
                # also where a module raises: the function may go on without it
                modules.register_module_forward_hook(
                    functools.partial(_leave, watched), always_call=True
                ),
            )
            for hook in hooks:
                stack.callback(removed, hook)
        yield


class _Begun(NamedTuple):
    """A call of a module as a whole, before it runs, which may write to what it is given."""

    module: Module
    versions: list[tuple[Tensor, int]]
    copies: dict[int, Tensor]


class _Watched:
    """Modules that an override is for: as a whole, or what they make (``calls``)."""

    __slots__ = ("_begun", "calls", "override", "own", "value")

    def __init__(self, own: Callable[[Module], bool], override: Override, value: Derivative):
        self.own, self.override, self.value, self.calls = own, override, value, override.calls
        self._begun = threading.local()

    def enter(self, module: Module, args) -> None:
        """A module begins: what it is given is noted, and copied where it or a part says that it writes to it."""
        if self.calls is not None:
            self.calls.enter()
            return
        given = [t for t in args if isinstance(t, Tensor) and not t.is_inference()]
        writes = any(getattr(m, "inplace", False) for m in module.modules())
        copies = {id(t): t.clone() for t in given if writes}
        self._stack().append(_Begun(module, [(t, t._version) for t in given], copies))

    def leave(self, module: Module) -> None:
        """It ends, or raises."""
        if self.calls is not None:
            self.calls.leave()
            return
        stack = self._stack()
        while any(b.module is module for b in stack) and stack.pop().module is not module:
            pass  # what an interrupt ended

    def before(self, module: Module, x: Tensor) -> Tensor:
        """An argument as it was before the module ran."""
        begun = next((b for b in reversed(self._stack()) if b.module is module), None)
        if begun is None:
            return x
        if any(t is x and t._version != version for t, version in begun.versions):
            if (copy := begun.copies.get(id(x))) is not None:
                return copy
            raise RuntimeError(
                f"override of {self.override.key}: {type(module).__name__} writes to its input in place, whose "
                "derivative is then none of the module as a whole; have it write to a copy, or name an op inside of "
                "it, as (module, 'relu')"
            )
        return x

    def _stack(self) -> list[_Begun]:
        if not hasattr(self._begun, "stack"):
            self._begun.stack = []
        return self._begun.stack


def _entry(key, value, model: Module | None) -> tuple[Override, _Watched | None]:
    if isinstance(value, bool) or not (callable(value) or isinstance(value, int | float)):
        raise TypeError(
            f"the override of {key!r} must be a number or a function, such as jactri.zero, got {value!r}"
        )
    how = getattr(value, "__name__", repr(value))
    if isinstance(key, tuple):
        if len(key) != 2:
            raise TypeError(f"{key!r}: a pair is (module, op), such as ('layers.*.norm', 'rsqrt')")
        own, where = _modules(key[0], model)
        ops, op = _ops(key[1])
        text, calls = f"{op} in {where}", Calls()
        override = Override(text, how, ops, _reader(value, text), value is zero, calls)
        return override, _Watched(own, override, value)
    if _is_module(key, model):
        own, text = _modules(key, model)
        override = Override(text, how, frozenset(), _reader(value, text), value is zero, None)
        return override, _Watched(own, override, value)
    ops, text = _ops(key)
    return Override(text, how, ops, _reader(value, text), value is zero, None), None


# -- what keys are for ------------------------------------------------------------------------------


def _names(pattern: str, model: Module | None) -> list[Module]:
    return [] if model is None else [m for n, m in _paths(model) if fnmatchcase(n, pattern)]


def _paths(model: Module) -> list[tuple[str, Module]]:
    """The modules below by all names that they have."""
    return [(n, m) for n, m in model.named_modules(remove_duplicate=False) if n]


def _is_module(key, model: Module | None) -> bool:
    if isinstance(key, str):
        found = bool(_names(key, model))
        if found and _nodes(key):
            raise ValueError(
                f"{key!r} is an op and a module of model: pass the name of the node "
                f"({sorted(_nodes(key))[0]!r}), or the module itself"
            )
        if not found and model is not None and not _nodes(key):
            known = [*(n for n, _ in _paths(model)), *_short()]
            raise ValueError(f"{key!r} is neither an op nor a module of model{_like(key, known)}")
        return found
    return isinstance(key, Module) or (isinstance(key, type) and issubclass(key, Module))


def _modules(key, model: Module | None) -> tuple[Callable[[Module], bool], str]:
    if isinstance(key, str):
        found = _names(key, model)
        if model is None:
            raise ValueError(f"{key!r} is a name in a model: pass overrides(mapping, model=model)")
        if not found:
            known = [n for n, _ in _paths(model)]
            raise ValueError(f"model has no module {key!r}{_like(key, known)}")
        chosen = {id(m): m for m in found}
        return lambda m: id(m) in chosen, repr(key)
    if isinstance(key, Module):
        return lambda m: m is key, f"this {type(key).__name__}"
    if isinstance(key, type) and issubclass(key, Module):
        return lambda m: isinstance(m, key), key.__name__
    raise TypeError(f"{key!r} is no module, no class of modules and no pattern of their names")


def _ops(key) -> tuple[frozenset, str]:
    """Names of nodes, or a class of Functions, and a text."""
    if isinstance(key, str):
        if not (found := _nodes(key)):
            raise ValueError(
                f"{key!r} is no op that autograd has a node for{_like(key, _short())}; y.grad_fn.name() tells the name "
                "of the node that made y. Of a module, pass model"
            )
        return found, repr(key)
    try:
        target = target_of(key)
    except TypeError as error:
        raise TypeError(
            f"{key!r} is no key of jactri.overrides: pass the name of an op or of its node, a class of "
            "autograd.Function, an op of torch.library, a module, a class of modules, or a pair (module, op)"
        ) from error
    return frozenset((target,)), named(target)


def _nodes(key: str) -> frozenset:
    """The names of nodes that a name of an op, or of a node, stands for."""
    if "Backward" in key or "::" in key:
        return frozenset((target_of(key),))
    name = key.replace("_", "").lower()
    wanted = {kind + name for kind in _KINDS}
    wide = {"batchnorm": "batchnorm", "scaleddotproductattention": "scaleddotproduct"}.get(name)
    return frozenset(
        full
        for full, op in _known().items()
        if op in wanted or (wide is not None and wide in op and "backward" not in op)
    )


@functools.cache
def _known() -> dict[str, str]:
    """Names of all nodes of torch's own, and of their ops in small letters."""
    found = {}
    for name in dir(torch._C._functions):
        if match := re.fullmatch(r"(\w+)Backward\d+", name):
            found[name] = match[1].lower()
    return found


def _short() -> list[str]:
    return sorted(set(_known().values()))


def _like(key: str, known: list[str]) -> str:
    found = difflib.get_close_matches(key, known, 3) + difflib.get_close_matches(
        key.replace("_", "").lower(), known, 3
    )
    return f"; there are {', '.join(map(repr, dict.fromkeys(found)))}" if found else ""


# -- nodes ------------------------------------------------------------------------------------------


def _reader(value: Derivative, key: str) -> Callable[[Reader], tuple[int | None, ...]]:
    """What emits the maps of a node."""
    where = f"override of {key}"

    def read(g: Reader) -> tuple[int | None, ...]:
        node = Node(g, where)
        made = value(node) if callable(value) else value
        if isinstance(made, Own):
            return made.emit(g, where)
        if isinstance(made, Tensor | int | float):
            row = tuple(None if p is None else node.elementwise(made) for p in node.inputs)
            _check_shapes(node, where)
            made = (row, *(None,) * (len(node.outputs) - 1)) if len(node.outputs) > 1 else row
        rows = structured(made, node, where)
        if rows is None:
            raise TypeError(f"{where}: it returned None; return a tensor, a number or a structure")
        return emitted(g, rows, where)

    return read


def _check_shapes(node: Node, where: str) -> None:
    out = node.outputs[0].shape
    for place in node.inputs:
        if place is not None:
            try:
                fits = torch.broadcast_shapes(place.shape, out) == torch.Size(out)
            except RuntimeError:
                fits = False
            if not fits:
                raise ValueError(
                    f"{where}: a derivative of each entry is for ops that keep the shape, and {node.name} takes "
                    f"{place.shape} to {out}; jactri.zero and jactri.uniform are for any op"
                )


# -- modules ----------------------------------------------------------------------------------------


def _mine(watched: list[_Watched], module: Module) -> list[_Watched]:
    """Those that are for a module, and in force in this context."""
    now = overriding.now.get()
    return [w for w in watched if w.override in now and w.own(module)] if now else []


def _enter(watched: list[_Watched], module: Module, args) -> None:
    for w in _mine(watched, module):
        if w.calls is not None or (w.value is not zero and recording()):
            w.enter(module, args)


def _leave(watched: list[_Watched], module: Module, args, output) -> None:
    for w in _mine(watched, module):
        w.leave(module)


def _replace(watched: list[_Watched], module: Module, args, kwargs, output):
    """The module's output, where something is put in place of its derivative; None leaves it."""
    changed = None
    if recording() and torch.is_grad_enabled():
        for w in reversed(_mine(watched, module)):  # the first of a mapping decides
            if w.calls is None:
                output = changed = _replaced(w, module, args, kwargs, output)
    return changed


_PARTS = (Tensor, type(None), bool, int, float, complex, str)


def _replaced(w: _Watched, module: Module, args, kwargs, output):
    if w.value is zero:
        leaves = tree_leaves(output)
        if not all(isinstance(t, _PARTS) for t in leaves) or not any(
            isinstance(t, Tensor) for t in leaves
        ):
            other = next((t for t in leaves if not isinstance(t, _PARTS)), output)
            raise TypeError(
                f"override of {w.override.key}: its output holds a {type(other).__name__}, in which no tensors are "
                "known; name a module inside of it, or tell torch.utils._pytree of the class"
            )
        return tree_map(lambda t: _put(t, None, w.override, None), output)
    given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    given = [t for t in given if t.requires_grad] or given
    if not isinstance(output, Tensor) or not given:
        raise TypeError(
            f"override of {w.override.key}: only jactri.zero is for a module that does not take a tensor to a tensor, "
            f"and this one returns {type(output).__name__}; name an op inside of it, as (module, 'softmax')"
        )
    x = w.before(module, given[0])
    if x.shape != output.shape:
        raise ValueError(
            f"override of {w.override.key}: a derivative of each entry needs one shape, and it takes "
            f"{tuple(x.shape)} to {tuple(output.shape)}"
        )
    with torch.no_grad():
        call = ModuleCall(module, x.detach(), output.detach())
        slope = w.value(call) if callable(w.value) else w.value
        if isinstance(slope, Own):
            slope = None
        elif isinstance(slope, Tensor):
            slope = slope.to(device=output.device, dtype=output.dtype).expand(output.shape)
        elif isinstance(slope, int | float):
            slope = float(slope)
        else:
            raise TypeError(
                f"override of {w.override.key}: for a module it must return a tensor or a number, got {said(slope)}"
            )
    return _put(output, x, w.override, slope)


def _put(y, x: Tensor | None, override: Override, slope):
    if not isinstance(y, Tensor) or not y.is_floating_point():
        return y
    if not (y.requires_grad or (x is not None and x.requires_grad)):
        return y
    return _Overridden.apply(y, x, Applied(override, slope))


class _Overridden(torch.autograd.Function):
    """A module's output, whose derivative in the module's input is the caller's. It saves nothing: a checkpoint may run
    the module again where nothing is overridden, and has to save the same."""

    @staticmethod
    def forward(ctx, y, x, applied):
        ctx.applied = applied
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        slope = ctx.applied.slope
        return None, None if slope is None else grad * slope, None
