"""`compile`: a call traced once into one graph, which PyTorch's own compiler runs from then on."""

from __future__ import annotations

import inspect
import logging
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import _is_any_autocast_enabled
from torch.nn import Parameter
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from . import engines, handover
from . import func as transforms
from .api import jacobian
from .joint import differentiable, joint
from .operators.diagonal import diagonal
from .operators.divergence import divergence
from .operators.gradient import gradient
from .operators.gram import jjt, jtj
from .operators.laplacian import bilaplacian, laplacian
from .operators.ntk import empirical_ntk
from .operators.parameters import parameter_jacobian
from .operators.vectors import jvp, vjp
from .reached import Reached
from .running import public
from .traced import Traced, Untraceable, trace

_log = logging.getLogger("jactri")

_KEPT = 8
"""Signatures whose plans are kept."""

_PLAIN = (Tensor, Parameter)

_OF_TUPLES = (jacobian, jtj, jjt)
"""Calls that take several inputs as one tuple."""

_OF_FUNCTIONS = (transforms.jacrev, transforms.jacfwd, transforms.hessian)
"""Calls that take a function and give one."""

_OF_POINTS = (
    gradient, divergence, laplacian, bilaplacian, diagonal, parameter_jacobian, empirical_ntk, jvp, vjp,
)  # fmt: skip

_CALLS = (*_OF_TUPLES, *_OF_POINTS, *_OF_FUNCTIONS, None)

_FOR_LONG_CALLS = frozenset({"progress", "resume", "layout", "strict", "estimate", "out"})
"""Options that no compiled call takes."""

_TAKE_OUT = (jacobian, parameter_jacobian)

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.complex128: 1e-8, torch.complex64: 1e-3}
"""Of the largest entry: what a graph may be off by, which sums in another order."""
_LOW = 5e-2
"""The same, of types of less precision."""


class Plan:
    """What runs a signature's calls: the engine's function, and the tensors that it is handed beside the inputs."""

    def __init__(self, traced: Traced, reached: Reached, run: engines.Run):
        self.traced, self.spec = traced, traced.spec
        self._reached, self._run = reached, run
        self._fixed = list(traced.held)
        self._places = [
            (k, place.table, place.name)
            for k, places in enumerate(traced.places)
            for place in places[:1]
        ]
        self._tied = [
            (place.table, place.name, places[0])
            for places in traced.places
            for place in places[1:]
        ]
        self._like = [(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in traced.held]

    def held(self) -> list[Tensor] | str:
        """What the function holds now, or what of it asks for another plan."""
        changed = self._reached.changed()
        if changed is not None:
            return changed
        found = self._fixed
        for k, table, name in self._places:
            found[k] = table.get(name)
        for t, (shape, stride, dtype, device, grad) in zip(found, self._like, strict=True):
            if (
                t is None or t.dtype is not dtype or t.shape != shape or t.stride() != stride
                or t.device != device or t.requires_grad is not grad
            ):  # fmt: skip
                return "a tensor that func holds"
        for table, name, first in self._tied:
            if table.get(name) is not first.table.get(first.name):
                return "which weights are one"
        return found

    def __call__(self, inputs: list[Tensor], held: list[Tensor]) -> Sequence[Tensor]:
        return self._run([*inputs, *held])


class Eager:
    """An ordinary call each time, and why."""

    def __init__(self, reason: str):
        self.reason = reason


class Compiled:
    """A call of jactri as one compiled graph; made by `compile`.

    ``traces`` counts how often it was traced, ``graph`` is the last graph (`torch.fx.GraphModule`; None where it runs
    eagerly), ``seconds`` what its tracing and its compilation took. Print it to see how it runs.
    """

    def __init__(self, of, func, engine: str, options: dict[str, Any]):
        self.func, self.of, self.engine = func, of, engine
        self.traces, self.seconds = 0, (0.0, 0.0)
        self._options = options
        self._call = _call(of, func, options)
        self._grads = of is None or of in _OF_FUNCTIONS or bool(options.get("create_graph"))
        self._plans: dict[tuple, Plan | Eager] = {}
        self._lock = threading.RLock()
        self._last: Plan | Eager | None = None

    @property
    def graph(self) -> fx.GraphModule | None:
        return self._last.traced.graph if isinstance(self._last, Plan) else None

    def __repr__(self) -> str:
        name = getattr(self.func, "__name__", type(self.func).__name__)
        of = "" if self.of is jacobian else f", of={getattr(self.of, '__name__', None)}"
        if isinstance(self._last, Eager):
            how = f"runs eagerly: {self._last.reason}"
        else:
            ops = sum(n.op == "call_function" for n in self.graph.graph.nodes)
            traced, compiled = self.seconds
            how = f"{self.engine} runs {ops} ops, traced in {traced:.2g} s, compiled in {compiled:.2g} s"
        return f"jactri.compile({name}{of}): {how}; {self.traces} traces"

    @public
    def __call__(self, *inputs: Any, out: Any = None) -> Any:
        """What the call returns at ``inputs``.

        ``out``: tensors to write the answer to, as of `jactri.jacobian` and `ParameterJacobian.dense`; they are what is
        returned. Other calls take none.
        """
        try:
            key = tuple([(x.__class__, x.shape, x.stride(), x.dtype, x.device) for x in inputs])
            flat, nested = list(inputs), None
        except AttributeError:
            flat, nested = tree_flatten(inputs)
            key = nested, self._key(flat)
        if out is not None:
            key = key, self._out_key(out)
        if self._grads and torch.is_grad_enabled():
            key = key, tuple([x.requires_grad for x in flat])
        if _is_any_autocast_enabled():
            key = key, _autocast()
        if _len_torch_dispatch_stack():  # whoever watches the ops sees those of an ordinary call
            return self._call(inputs, out)
        if handover.transforming(flat):
            name = "func" if self.of is None else f"jactri.{self.of.__name__}"
            raise RuntimeError(f"a compiled call cannot run inside of a torch.func transform; call {name} there")
        plan = self._plans.get(key)
        if plan.__class__ is Eager:
            return self._call(inputs, out)
        held = "the shapes, strides, dtypes, devices or modes" if plan is None else plan.held()
        if held.__class__ is str:
            return self._planned(key, inputs, flat, nested, out, held)
        written = [] if out is None else tree_leaves(out)
        if self._grads and torch.is_grad_enabled():
            found = plan([*flat, *written], held)
        else:
            with torch.no_grad():
                found = plan([*flat, *written], held)
        return tree_unflatten(found, plan.spec) if out is None else out

    def _key(self, flat: list[Any]) -> tuple:
        for x in flat:
            if not isinstance(x, Tensor):
                raise TypeError(f"a compiled call takes tensors, got {type(x).__name__}: fix it by a lambda or functools.partial")
        return tuple([(x.__class__, x.shape, x.stride(), x.dtype, x.device) for x in flat])

    def _out_key(self, out: Any):
        if self.of not in _TAKE_OUT:
            raise TypeError(f"a compiled {self.of.__name__ if self.of else 'func'} takes no out=")
        flat, nested = tree_flatten(out)
        for t in flat:
            if not isinstance(t, Tensor):
                raise TypeError(
                    f"out must hold tensors, got {type(t)}; for an array, pass torch.from_numpy(array)"
                )
        return nested, self._key(flat)

    def _planned(self, key, inputs, flat, nested, out, why: str) -> Any:
        """The answer of an ordinary call, and a plan for calls like it."""
        with self._lock:
            answer = self._call(inputs, out)
            plan = self._plan(inputs, flat, nested, out, answer)
            self.traces += 1
            if self.traces > 1:
                _log.info("compiled %s traced again: %s changed", self._name, why)
            if len(self._plans) >= _KEPT and key not in self._plans:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = self._last = plan
        return answer

    @property
    def _name(self) -> str:
        return "func" if self.of is None else self.of.__name__

    def _plan(self, inputs, flat, nested, out, answer) -> Plan | Eager:
        if not all(x.__class__ in _PLAIN for x in flat):
            return self._eagerly(f"an input is a {next(x.__class__ for x in flat if x.__class__ not in _PLAIN).__name__}")
        written, spec_out = ([], None) if out is None else tree_flatten(out)
        count = len(flat)

        def call(*given):
            xs = given[:count] if nested is None else tree_unflatten(given[:count], nested)
            return self._call(xs, None if out is None else tree_unflatten(given[count:], spec_out))

        start = time.perf_counter()
        reached = Reached(self.func, self._options)
        try:
            traced = trace(call, flat, written, reached)
            made = None
            if any(t.requires_grad for t in tree_leaves(answer)):
                made = joint(call, traced, flat, reached)
        except Untraceable as reason:
            return self._eagerly(str(reason))
        middle = time.perf_counter()
        given = [*flat, *written, *traced.held]
        if made is None:
            run = self._built(traced.graph, given)
        else:
            run = self._built_joint(made, given)
        plan = Plan(traced, reached, run)
        self.seconds = middle - start, time.perf_counter() - middle
        again = [torch.empty_like(t) for t in written]
        with torch.set_grad_enabled(made is not None):
            found = run([*flat, *again, *traced.held])
        off = apart(found if out is None else again, tree_leaves(answer if out is None else out))
        if off is not None:
            _log.warning("compiled %s is %s off the ordinary call and not used", self._name, off)
            return Eager(f"the compiled graph is off: {off}")
        return plan

    def _eagerly(self, reason: str) -> Eager:
        _log.info("compiled %s runs eagerly: %s", self._name, reason)
        return Eager(reason)

    def _built(self, graph: fx.GraphModule, like: list[Tensor]) -> engines.Run:
        with torch.no_grad():
            return engines.build(self.engine, graph, [t.detach() for t in like])

    def _built_joint(self, made, like) -> engines.Run:
        forward = self._built(made.forward, like)
        with torch.no_grad():
            found = forward([t.detach() for t in like])
        cotangents = [torch.zeros_like(t) for t in found[: made.results]]
        backward = self._built(made.backward, [*found[made.results :], *cotangents])
        return differentiable(made, forward, backward)

    def verify(self, *inputs: Any) -> float:
        """The largest difference from the ordinary call at ``inputs``, relative to the largest entry of its tensor.

        Raises RuntimeError where it is more than rounding explains.
        """
        got, want = self(*inputs), self._call(inputs, None)
        off = apart(tree_leaves(got), tree_leaves(want))
        if off is not None:
            raise RuntimeError(f"the compiled {self._name} is not what the ordinary call gives: {off}")
        pairs = zip(tree_leaves(got), tree_leaves(want), strict=True)
        return max((_relative(a, b) for a, b in pairs), default=0.0)


def apart(got: Sequence[Tensor], want: Sequence[Tensor]) -> str | None:
    """What of ``got`` differs from ``want`` by more than rounding."""
    if len(got) != len(want):
        return f"{len(got)} tensors, not {len(want)}"
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return f"tensor {k} is {tuple(a.shape)} of {a.dtype} on {a.device}, not {tuple(b.shape)} of {b.dtype} on {b.device}"
        off = _relative(a, b)
        if not off <= _TOLERANCE.get(b.dtype, _LOW if b.is_floating_point() else 0.0):
            return f"tensor {k} by {off:.1e} of its largest entry"
    return None


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    if a.numel() == 0:
        return 0.0
    same = (a == b) | ((a != a) & (b != b))  # NaN is where NaN is
    away = (a - b).abs().masked_fill(same, 0).max().item() if a.dtype != torch.bool else float((a != b).any())
    size = b.abs().masked_fill(~b.isfinite(), 0).max().item() if b.dtype != torch.bool else 1.0
    return 0.0 if away == 0 else away / size if size else float("inf")


def _autocast() -> tuple:
    return tuple(
        torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
    )


def _call(of, func, options) -> Callable[[Sequence[Any], Any], Any]:
    """The ordinary call, as a function of its inputs and ``out``."""
    if of is None:
        return lambda xs, out: func(*xs)
    if of in _OF_FUNCTIONS:
        made = of(func, **options)
        return lambda xs, out: made(*xs)
    if of is parameter_jacobian:
        return lambda xs, out: of(func, *xs, **options).dense(out)
    if of is jacobian:
        return lambda xs, out: of(func, xs[0] if len(xs) == 1 else tuple(xs), out=out, **options)
    if of in _OF_TUPLES:
        return lambda xs, out: of(func, xs[0] if len(xs) == 1 else tuple(xs), **options)
    return lambda xs, out: of(func, *xs, **options)


def compile(
    func: Callable[..., Any],
    *example_inputs: Any,
    of: Callable[..., Any] | None = jacobian,
    engine: str = "inductor",
    **options: Any,
) -> Compiled:
    """TODO."""
    if of not in _CALLS:
        names = ", ".join("None" if f is None else f"jactri.{f.__name__}" for f in _CALLS)
        raise TypeError(f"of must be one of {names}, got {of!r}")
    if engine not in engines.ENGINES:
        raise ValueError(f"engine must be one of {engines.ENGINES}, got {engine!r}")
    made = Compiled(of, func, engine, options)
    made(*example_inputs)
    return made
