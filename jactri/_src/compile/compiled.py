"""`compile`: a call traced once into one graph, which PyTorch's own compiler runs from then on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._C import _DisableAutocast, _is_any_autocast_enabled
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ...kernels import launches
from ...kernels.support import Unfit
from ..base import backends
from ..base.cache import Cache
from ..base.constants import arbitrary
from ..calls.api import jacobian
from ..prologue.running import public
from ..read import handover
from . import calls, engines
from .captured import captured
from .compilation import Compilation
from .plans import Eager, Plan, state
from .reached import Reached, called

if TYPE_CHECKING:
    from .joint import Joint
    from .traced import Traced

_log = logging.getLogger("jactri")

_KEPT = 8
"""Signatures whose plans are kept."""

_TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 1e-3,
    torch.complex128: 1e-8,
    torch.complex64: 1e-3,
}
"""Of the largest entry: what a graph may be off by, which sums in another order."""
_LOW = 5e-2
"""The same, of types of less precision."""
_CANCELS = 64
"""Roundings of the largest entry of all tensors together, by which one whose entries cancel may be off."""


class Compiled:
    """A call of jactri as one compiled graph; made by `compile`.

    ``traces`` counts how often it was traced; ``graph`` is the graph of the last trace (`torch.fx.GraphModule`; None
    where the call runs eagerly), ``reason`` why it runs eagerly (or None), ``seconds`` how long the last trace and its
    compilation took. Print it to see how it runs.
    """

    def __init__(self, of, func, engine: str, freeze: bool, options: dict[str, Any]):
        self.func, self.of, self.engine = func, of, engine
        self.freeze, self.traces = freeze, 0
        self._name = calls.name(of)
        self._options, self._call = options, calls.ordinary(of, func, options)
        self._create_graph = bool(options.get("create_graph"))
        self._as_func = of is None or of in calls.OF_FUNCTIONS  # in grad mode, with a graph
        self._plans: Cache[tuple, Plan | Eager] = Cache(_KEPT)
        self._lock = threading.RLock()
        self._last: Plan | Eager | None = None

    @property
    def graph(self) -> fx.GraphModule | None:
        return self._last.graph if isinstance(self._last, Plan) else None

    @property
    def seconds(self) -> tuple[float, float]:
        return self._last.seconds if isinstance(self._last, Plan) else (0.0, 0.0)

    @property
    def reason(self) -> str | None:
        return self._last.reason if isinstance(self._last, Eager) else None

    def _title(self) -> str:
        name = getattr(self.func, "__name__", type(self.func).__name__)
        of = "" if self.of is jacobian else f", of={self._name}"
        return f"jactri.compile({name}{of})"

    def __repr__(self) -> str:
        how = f"runs eagerly: {self.reason}"
        if self.graph is not None:
            ops = [n.target for n in self.graph.graph.nodes if n.op == "call_function"]
            kernels = ops.count(launches.OP)
            traced, built = self.seconds
            how = f"{self.engine} runs {len(ops)} ops, "
            how += f"{kernels} of them kernels of jactri, " if kernels else ""
            how += f"traced in {traced:.2g} s, compiled in {built:.2g} s"
            if isinstance(self._last, Plan) and self._last.cuda_graph:
                how += ", one CUDA graph"
        return f"{self._title()}: {how}; traces: {self.traces}"

    def __call__(self, *inputs: Any, out: Any = None) -> Any:
        """What the call returns at ``inputs``.

        ``out``: tensors to write the answer to, as of `jactri.jacobian` and `ParameterJacobian.dense`; they are what is
        returned. Other calls take none.
        """
        if self._as_func and torch.is_inference_mode_enabled():  # where func's answer has no graph
            with torch.inference_mode(False), torch.no_grad():
                return self._answer(inputs, out)
        return self._answer(inputs, out)

    @public
    def _answer(self, inputs: tuple, out: Any) -> Any:
        key, flat, nested = self._key(inputs, out)
        if _len_torch_dispatch_stack():  # whoever watches the ops sees those of an ordinary call
            return self._call(inputs, out)
        if handover.transforming(flat):
            call = "func" if self.of is None else f"jactri.{self._name}"
            raise RuntimeError(
                f"a compiled {self._name} cannot run inside of a torch.func transform; call {call} there"
            )
        plan = self._plans.get(key)
        if plan is None:
            changed = "the shapes, strides, dtypes, devices or modes"
            return self._planned(key, inputs, flat, nested, out, changed)
        if isinstance(plan, Eager):
            why = plan.changed()
            if why is None:
                return self._call(inputs, out)
            return self._planned(key, inputs, flat, nested, out, why)
        held = plan.held()
        if isinstance(held, str):
            return self._planned(key, inputs, flat, nested, out, held)
        found = plan.run([*flat, *(() if out is None else tree_leaves(out)), *held])
        answer = found[0] if plan.leaf else tree_unflatten(found, plan.spec)
        return answer if out is None else self._with(answer, out)

    def _key(self, inputs: tuple, out: Any) -> tuple[tuple, Sequence[Tensor], Any]:
        """What tells calls apart that need plans of their own; the inputs as one list, and their nesting."""
        key: tuple
        try:
            key = tuple([
                (x.__class__, x.shape, x.stride(), x.dtype, x.device, x.is_conj(), x.is_neg())
                for x in inputs
            ])  # fmt: skip
            flat, nested = inputs, None
        except AttributeError:
            flat, nested = tree_flatten(inputs)
            key = str(nested), self._signature(flat)
        if out is not None:
            key = key, self._checked(out)
        if self._create_graph or (self._as_func and torch.is_grad_enabled()):
            key = key, tuple([x.requires_grad for x in flat])
        if _is_any_autocast_enabled():
            key = key, _autocast()
        return key, flat, nested

    def _with(self, answer: tuple, out: Any) -> Any:
        """What a call returns that wrote to ``out``."""
        return (*answer, out) if self._options.get("return_output") else out

    def _signature(self, flat: list[Any]) -> tuple:
        calls.check_tensors(flat, f"a compiled {self._name}")
        return tuple([
            (x.__class__, x.shape, x.stride(), x.dtype, x.device, x.is_conj(), x.is_neg())
            for x in flat
        ])  # fmt: skip

    def _checked(self, out: Any) -> tuple:
        """What a plan for ``out`` is for. Raises TypeError for what cannot be written to."""
        if self.of not in calls.TAKE_OUT:
            raise TypeError(f"a compiled {self._name} takes no out=")
        flat, nested = tree_flatten(out)
        for t in flat:
            if not isinstance(t, Tensor):
                raise TypeError(
                    f"out must hold tensors, got {type(t)}; for an array, pass torch.from_numpy(array)"
                )
        return str(nested), tuple([state(t) for t in flat])

    def _planned(self, key, inputs, flat, nested, out, changed: str) -> Any:
        """The answer of an ordinary call, and a plan for calls like it."""
        calls.check_count(self.of, len(inputs))
        with self._lock:
            with called() as modules:
                answer = self._call(inputs, out)
            reached = Reached(self.func, self._options, modules, self.of in calls.IN_WEIGHTS)
            self._last = plan = self._plan(flat, nested, out, answer, reached)
            self.traces += 1
            if self.traces > 1:
                _log.info("compiled %s traced again: %s changed", self._name, changed)
            self._plans[key] = plan
        if out is None:
            return answer
        return self._with(answer[:1] if self._options.get("return_output") else (), out)

    def _plan(self, flat, nested, out, answer, reached: Reached) -> Plan | Eager:
        # these import torch._dynamo, which takes seconds
        from .joint import joint
        from .traced import Untraceable, frozen, trace

        written, written_as = ([], None) if out is None else tree_flatten(out)
        count = len(flat)

        def call(*given):
            xs = given[:count] if nested is None else tree_unflatten(given[:count], nested)
            if out is None:
                return self._call(xs, None)
            made = self._call(xs, tree_unflatten(given[count:], written_as))
            return made[:1] if self._options.get("return_output") else ()

        start = time.perf_counter()
        both = None
        if self.freeze:
            self._check_frozen(flat, answer, reached)
        try:
            with backends.packaging(self.engine == "aot"):
                traced = trace(call, flat, written, reached, self.freeze)
                if self.freeze:
                    traced = frozen(traced)
                elif any(t.requires_grad for t in tree_leaves(answer)):
                    both = joint(call, traced, flat, reached)
        except Untraceable as reason:
            _log.info("compiled %s runs eagerly: %s", self._name, reason)
            return Eager(str(reason), reached)
        middle = time.perf_counter()
        if both is not None:
            traced = replace(traced, held=both.held)
        given = [*flat, *written, *traced.held]
        try:
            run, built = self._built(traced, both, given, count, len(written))
            seconds = middle - start, time.perf_counter() - middle
            _log.info("compiled %s: traced in %.2g s, compiled in %.2g s", self._name, *seconds)
            again = [torch.full_like(t, torch.nan) for t in written]
            found = run([*flat, *again, *traced.held])
        except (RuntimeError, Unfit) as error:  # no ordinary call ran this: values decided there
            off = f"its graph fails: {error}".split("\n")[0]
            _log.warning("compiled %s runs eagerly: %s", self._name, off)
            return Eager(off, reached)
        want = tree_leaves(answer)
        inside = dtypes(traced.graph)
        off = apart([*found, *again], want, inside)
        if off is None and both is not None:
            ends = [t for t in (*flat, *traced.held) if t.requires_grad]
            off = _apart_in_gradients(found, want, ends, inside)
        if off is not None:
            _log.warning("compiled %s runs eagerly: %s", self._name, off)
            return Eager(off, reached)
        return Plan(traced, reached, run, built, seconds)

    def _built(
        self, traced: Traced, both: Joint | None, given: list[Tensor], inputs: int, written: int
    ) -> tuple[engines.Run, tuple[engines.Built, ...]]:
        """What runs a trace, or both its graphs, and what an engine made of each."""
        if both is not None:
            from .joint import differentiable

            return differentiable(both, self.engine, given)
        built = engines.build(self.engine, traced.graph, given, self.freeze)
        run = _owned(built.run, given) if self.freeze else _detached(built.run, traced)
        if self.engine != "aot":  # whose own events a capture cannot ask
            run = captured(run, traced.graph, given, inputs, written)
        return run, (built,)

    def _check_frozen(self, flat, answer, reached: Reached) -> None:
        """Raise for derivatives that weights as constants do not have."""
        weights = [reached.called(x) for x in flat if id(x) in reached.tensors]
        if weights:
            raise ValueError(
                f"freeze=True takes weights as constants, and {weights[0]} is an input: compile without freeze"
            )
        if any(x.requires_grad for x in flat) and any(t.requires_grad for t in tree_leaves(answer)):
            raise RuntimeError(
                "with freeze=True the answer has no derivative, but an input requires grad: call it under "
                "torch.no_grad() or detach the input; compile without freeze to differentiate"
            )

    @public
    def explain(self, *inputs: Any) -> Compilation:
        """What the engine made of the call at ``inputs``, or of the last trace: print it.

        By graph (of the call, and of its backward where it can be differentiated): the kernels that the compiler wrote,
        with the ops that each holds, and the calls that it left to libraries; then what modules hold and is looked up
        again at each call. Or why the call runs eagerly. ``inputs`` are traced if they were not yet.
        """
        plan = self._last
        if inputs:
            self(*inputs)
            plan = self._plans.get(self._key(inputs, None)[0], plan)
        return plan.explained(self._title())

    @public
    def verify(self, *inputs: Any) -> float:
        """How far the compiled call is from the ordinary one at ``inputs``, relative to the largest entry.

        Raises RuntimeError where that is more than rounding: 1e-8 in double precision, 1e-3 in single, 0.05 in less;
        the narrowest counts that ``func`` computes in.
        """
        got, want = tree_leaves(self(*inputs)), tree_leaves(self._call(inputs, None))
        plan = self._plans.get(self._key(inputs, None)[0])
        off = apart(got, want, () if plan is None or plan.graph is None else dtypes(plan.graph))
        if off is not None:
            raise RuntimeError(f"the compiled {self._name} is not the ordinary one: {off}")
        return max(map(relative, got, want), default=0.0)


def _detached(run: engines.Run, traced: Traced) -> engines.Run:
    """Without the graphs of tensors that it returns as it was given them."""
    given = [k for k, n in enumerate(traced.results) if n.op == "placeholder"]
    return _with_some(run, given, Tensor.detach)


def _owned(run: engines.Run, given: list[Tensor]) -> engines.Run:
    """With answers in memory of their own: what follows from constants alone is computed once, and is one tensor."""
    both = zip(run(list(given)), run(list(given)), strict=True)
    again = [
        k
        for k, (a, b) in enumerate(both)
        if a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    ]
    return _with_some(run, again, Tensor.clone)


def _with_some(
    run: engines.Run, which: list[int], change: Callable[[Tensor], Tensor]
) -> engines.Run:
    """With some of the results changed."""
    if not which:
        return run

    def changed(tensors):
        found = list(run(tensors))
        for k in which:
            found[k] = change(found[k])
        return found

    return changed


def dtypes(graph: fx.GraphModule) -> set[torch.dtype]:
    """Those that the ops of a graph compute in."""
    made = [n.meta.get("val") for n in graph.graph.nodes if n.op == "call_function"]
    found = {t.dtype for t in tree_leaves(made) if isinstance(t, Tensor)}
    return {d for d in found if d.is_floating_point or d.is_complex}


def _allowed(t: Tensor, inside: Iterable[torch.dtype]) -> float:
    """What a result may be off by, which was computed in these dtypes, too."""
    if not (t.is_floating_point() or t.is_complex()):
        return 0.0
    return max(_TOLERANCE.get(d, _LOW) for d in (t.dtype, *inside))


def apart(
    got: Sequence[Tensor], want: Sequence[Tensor], inside: Iterable[torch.dtype] = ()
) -> str | None:
    """What of ``got`` differs from ``want`` by more than rounding, that of the dtypes ``inside``, too."""
    if len(got) != len(want):
        return f"{len(got)} tensors for {len(want)}"
    beside, largest = [], 0.0
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return f"tensor {k} is {tuple(a.shape)}, {a.dtype}, not {tuple(b.shape)}, {b.dtype}"
        away, size = _distance(a, b)
        if not away <= _allowed(b, inside) * size:
            beside.append((k, away, size, b.dtype))
        largest = max(largest, size)
    for k, away, size, dtype in beside:
        # what cancels, as the gradient of a key's bias in attention, is off by the rounding of its terms
        if not (dtype.is_floating_point and away <= _CANCELS * torch.finfo(dtype).eps * largest):
            off = away / size if size else float("inf")
            return f"tensor {k} is off by {off:.1e} of its largest entry"
    return None


def _apart_in_gradients(
    got: Sequence[Tensor],
    want: Sequence[Tensor],
    ends: Sequence[Tensor],
    inside: Iterable[torch.dtype],
) -> str | None:
    """What of the gradients of ``got`` in ``ends`` differs from those of ``want`` by more than rounding."""
    both: list[list[Tensor]] = []
    for ys in (got, want):
        live = [y for y in ys if y.requires_grad]
        cotangents = [arbitrary(y.shape, y) for y in live]
        if len(live) != sum(y.requires_grad for y in want):
            return "other tensors have gradients"
        with _DisableAutocast():
            grads = torch.autograd.grad(
                live, ends, cotangents, retain_graph=True, allow_unused=True
            )
        both.append(
            [torch.zeros_like(x) if g is None else g for x, g in zip(ends, grads, strict=True)]
        )
    off = apart(both[0], both[1], inside)
    return None if off is None else f"of the gradients, {off}"


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors relative to the largest finite entry of ``b``."""
    away, size = _distance(a, b)
    return 0.0 if away == 0 else away / size if size else float("inf")


def _distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The largest difference of two tensors, and the largest finite entry of ``b``."""
    a, b = a.detach(), b.detach()
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf"), 1.0
    if a.numel() == 0:
        return 0.0, 0.0
    away = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0).max().item()
    return away, b.abs().masked_fill(~b.isfinite(), 0).max().item()


def _autocast() -> tuple:
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)


def compile(
    func: Callable[..., Any],
    *example_inputs: Any,
    of: Callable[..., Any] | None = jacobian,
    engine: str = "inductor",
    freeze: bool = False,
    **options: Any,
) -> Compiled:
    """A call of jactri for many inputs alike, traced once into one graph and compiled by PyTorch's compiler.

    The Python of ``func`` runs while tracing only. Tensors that ``func`` reaches through modules (that it is, is bound
    to, closes over, names, is a partial of, or calls) are looked up again at each call, so that an update, a
    replacement, ``.train()`` or ``.eval()`` is seen. Everything else is as it was when the call was traced, but for
    tensors that are written to in place.

    ``compile(func, x)(x)`` is ``jacobian(func, x)``, and ``compile(func, x, y)(x, y)`` is ``jacobian(func, (x, y))``.
    Other shapes, strides, dtypes, devices, grad modes or autocast trace again: that is counted in ``traces`` and logged
    by the logger ``jactri``; the last 8 are kept. A graph is compared with the ordinary call once, at the inputs that
    it is traced for, and `Compiled.verify` compares it at others. What cannot be traced runs as the ordinary call, and
    printing the callable says why: what reads values in Python (``item``, ``numpy``, branches on tensors), writes to
    inputs or buffers, or leaves it to a probe whether samples mix.

    Args:
        func: as for ``of``.
        example_inputs: tensors, or tuples, lists and dicts of them, like those that it will be called with.
        of: what is computed: `jacobian` and the other calls of jactri, `func.hessian`, ``None`` for ``func`` itself, as
            a loss that contains calls of jactri.
        engine: ``"inductor"`` compiles the graph by `torch.compile`'s backend: fused loops, some seconds of
            compilation, which its cache on disk saves the next process. ``"aot"`` makes an AOTInductor package of it:
            no Python runs in a call, compiled in each process anew. ``"fx"`` runs the ops of the graph as they are:
            nothing is compiled. Without a C++ compiler, what is compiled for a CPU falls back to ``"fx"``, with a
            warning.
        freeze: whether all that ``func`` holds is a constant of the graph, as it is when the graph is traced: **an
            update, in place or by replacement, is not seen**, until another trace (a second shape, ``.train()``);
            `Compiled.verify` tells. ``"inductor"`` computes with constants what it can, once, and packs matrices and
            filters for its products: on the CPU that was measured, products of matrices gained nothing by it. It costs
            a copy of them, and its code for a CPU is not cached on disk where something is packed. The answer has no
            graph; what differentiates in weights (``create_graph``, `parameter_jacobian`, `empirical_ntk`, weights as
            inputs) is refused.
        options: those of ``of``, but for what is for one long call (``progress``, ``layout``, ``strict``,
            ``estimate``). Tensors among them may be updated in place.

    With ``create_graph=True``, and for ``of=None``, the answer can be differentiated once, in inputs and weights: the
    backward is a compiled graph, too, traced together with the call and parted from it by min-cut. On CUDA a call
    without a derivative is one CUDA graph (with ``"inductor"`` and ``"fx"``, of tensors on one device): its inputs are
    copied to the graph's memory, its answer from there. jactri's Triton kernels run where they do in an ordinary call
    (``backend``), by its choices: each launch is an op of the graph, ``jactri.kernel``, which Inductor leaves as it is
    and fuses around, at the precision that torch allowed when it was traced. A package, that of ``"aot"`` too, has
    torch's ops in their place.

    Raises: what ``of`` raises, at compilation too; TypeError for another ``of``, an option or a number of inputs that
    it does not take; ValueError for ``freeze=True`` with a derivative in weights; RuntimeError inside of a torch.func
    transform, for ``"aot"`` with ``backend="triton"``, and with ``freeze=True`` for an answer that is to be
    differentiated in an input.

    Cost: at compilation an ordinary call, a trace (0.2 s to some seconds), the engine's compilation, one call, and
    where the answer can be differentiated a backward of both calls. Then about 10 microseconds beside what the engine
    takes.

    Example:
        >>> step = jactri.compile(net, x, per_sample=True)
        >>> jac = step(x)
    """
    if "static" in options:
        raise TypeError(
            "compile takes no 'static': every compiled call is; engine= chooses what runs it"
        )
    calls.check("compile", of, options, example_inputs)
    engine = engines.usable(engine, example_inputs)
    if engine == "aot":
        backends.check_packaged("compile(engine='aot')", options)
    if freeze and (of in calls.IN_WEIGHTS or options.get("create_graph")):
        what = f"jactri.{of.__name__}" if of in calls.IN_WEIGHTS else "create_graph=True"
        raise ValueError(
            f"freeze=True takes weights as constants, and {what} differentiates in them: compile it without freeze"
        )
    made = Compiled(of, func, engine, freeze, options)
    made(*example_inputs)
    return made
