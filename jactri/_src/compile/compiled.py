"""`compile`: a call traced once into one graph, which PyTorch's own compiler runs from then on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._C import _is_any_autocast_enabled
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ...kernels import launches
from ...kernels.support import Unfit
from ..base import backends
from ..base.cache import Cache
from ..base.tables import Shown
from ..calls.api import jacobian
from ..prologue.running import public
from ..read import handover, overriding
from ..run.formed import Unformed
from . import calls, engines
from .agreement import apart, apart_in_gradients, dtypes, relative
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


class Compiled(Shown):
    """A call of jactri as one compiled graph; made by `compile`. Print it to see how it runs.

    Attributes:
        func: the function that was given.
        of: the call that is computed; None for ``func`` itself.
        engine: ``"inductor"``, ``"aot"`` or ``"fx"``.
        freeze: whether all that ``func`` holds is a constant.
        traces: how often it was traced.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        >>> step = jactri.compile(net, torch.randn(4, 3), per_sample=True, engine="fx")
        >>> x = torch.randn(4, 3)
        >>> step(x).shape, step.traces
        (torch.Size([4, 8, 3]), 1)
        >>> step(torch.randn(6, 3)).shape, step.traces  # another shape, another trace
        (torch.Size([6, 8, 3]), 2)
        >>> step.verify(x) < 1e-5
        True
    """

    def __init__(self, of, func, engine: str, freeze: bool, options: dict[str, Any]):
        overriding.refuse("jactri.compile")
        self.func, self.of, self.engine = func, of, engine
        self.freeze, self.traces = freeze, 0
        self._name = calls.name(of)
        self._options, self._call = options, calls.ordinary(of, func, options)
        self._create_graph = bool(options.get("create_graph"))
        self._as_func = of is None or of in calls.OF_FUNCTIONS  # in grad mode, with a graph
        self._sparse = options.get("layout", torch.strided) is not torch.strided
        self._plans: Cache[tuple, Plan | Eager] = Cache(_KEPT)
        self._lock = threading.RLock()
        self._last: Plan | Eager | None = None
        self._told: set[str] = set()

    @property
    def graph(self) -> fx.GraphModule | None:
        """The graph of the last trace; None where the call runs eagerly."""
        return self._last.graph if isinstance(self._last, Plan) else None

    @property
    def seconds(self) -> tuple[float, float]:
        """How long the last trace took, and its compilation."""
        return self._last.seconds if isinstance(self._last, Plan) else (0.0, 0.0)

    @property
    def reason(self) -> str | None:
        """Why the call runs eagerly, as the ordinary call; None if it does not."""
        return self._last.reason if isinstance(self._last, Eager) else None

    def _title(self) -> str:
        name = getattr(self.func, "__name__", type(self.func).__name__)
        of = "" if self.of is jacobian else f", of={self._name}"
        return f"jactri.compile({name}{of})"

    def _parts(self) -> list[str]:
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
        return [f"{self._title()}: {how}; traces: {self.traces}"]

    def __call__(self, *inputs: Any, out: Any = None) -> Any:
        """What the call returns at ``inputs``.

        Args:
            inputs: nested as the examples. Another shape, stride, dtype, device or mode is another trace.
            out: tensors to write the answer to, as of `jactri.jacobian` and `ParameterJacobian.dense`; they are what is
                returned. Other calls take none.
        """
        if self._as_func and torch.is_inference_mode_enabled():  # where func's answer has no graph
            with torch.inference_mode(False), torch.no_grad():
                return self._answer(inputs, out)
        answer = self._answer(inputs, out)
        return _formed(answer) if self._sparse else answer

    @public
    def _answer(self, inputs: tuple, out: Any) -> Any:
        overriding.refuse("a compiled call", "call jactri's ordinary call")
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
        if self._sparse and not _sure(answer):
            return self._call(inputs, out)
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
        from .traced import Untraceable, folded, frozen, trace

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
                else:
                    traced = folded(traced)
        except Untraceable as reason:
            return self._eager(str(reason), reached)
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
            return self._eager(off, reached)
        want = tree_leaves(answer)
        inside = dtypes(traced.graph)
        off = apart([*found, *again], want, inside)
        if off is None and both is not None:
            ends = [t for t in (*flat, *traced.held) if t.requires_grad]
            off = apart_in_gradients(found, want, ends, inside)
        if off is not None:
            return self._eager(off, reached)
        return Plan(traced, reached, run, built, seconds)

    def _eager(self, reason: str, reached: Reached) -> Eager:
        """An ordinary call each time: what is not what was asked for is told, once a reason."""
        if reason not in self._told:
            self._told.add(reason)
            _log.warning("compiled %s runs eagerly: %s", self._name, reason)
        return Eager(reason, reached)

    def _built(
        self, traced: Traced, both: Joint | None, given: list[Tensor], inputs: int, written: int
    ) -> tuple[engines.Run, tuple[engines.Built, ...]]:
        """What runs a trace, or both its graphs, and what an engine made of each."""
        if both is not None:
            from .joint import differentiable

            return differentiable(both, self.engine, given)
        built = engines.build(self.engine, traced.graph, given, self.freeze)
        run = built.run if self.freeze else _detached(built.run, traced)
        if self.freeze or any(True for _ in traced.graph.buffers()):
            run = _owned(run, given)
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
        again at each call. Or why the call runs eagerly.

        Args:
            inputs: are traced if they were not yet.
        """
        plan = self._last
        if inputs:
            self(*inputs)
            plan = self._plans.get(self._key(inputs, None)[0], plan)
        return plan.explained(self._title())

    @public
    def verify(self, *inputs: Any) -> float:
        """How far the compiled call is from the ordinary one at ``inputs``, relative to the largest entry.

        Args:
            inputs: as those of a call.

        Raises:
            RuntimeError: it is more than rounding: 1e-8 in double precision, 1e-3 in single, 0.05 in less; the
                narrowest counts that ``func`` computes in.
        """
        got, want = tree_leaves(self._answer(inputs, None)), tree_leaves(self._call(inputs, None))
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
        if a.untyped_storage()._cdata == b.untyped_storage()._cdata
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


def _formed(answer: Any) -> Any:
    """An answer of values, with the sparse tensors that they are of."""
    if isinstance(answer, Unformed):
        return answer.formed()
    return tree_map(
        lambda t: t.formed() if isinstance(t, Unformed) else t, answer, is_leaf=_is_unformed
    )


def _sure(answer: Any) -> bool:
    """Whether the values of a graph are those of the ordinary call, which looks at whether all are finite."""
    leaves = [answer] if isinstance(answer, Unformed) else tree_leaves(answer, _is_unformed)
    found = [t for t in leaves if isinstance(t, Unformed)]
    return all(bool(t.values.isfinite().all()) for t in found if t.unsure)


def _is_unformed(t: Any) -> bool:
    return isinstance(t, Unformed)


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

    ``compile(func, x)(x)`` is ``jacobian(func, x)``, and ``compile(func, x, y)(x, y)`` is ``jacobian(func, (x, y))``.
    The Python of ``func`` runs while tracing only. Tensors that ``func`` reaches through modules (that it is, is bound
    to, closes over, names, is a partial of, or calls) are looked up again at each call, so that an update, a
    replacement, ``.train()`` or ``.eval()`` is seen. Everything else is as it was when the call was traced, but for
    tensors that are written to in place.

    Other shapes, strides, dtypes, devices, grad modes or autocast trace again: that is counted in ``traces`` and logged
    by the logger ``jactri``; the last 8 are kept. A graph is compared with the ordinary call once, at the inputs that
    it is traced for, and `Compiled.verify` compares it at others. What cannot be traced runs as the ordinary call, and
    printing the callable says why: what reads values in Python (``item``, ``numpy``, branches on tensors), writes to
    inputs or buffers, or leaves it to a probe whether samples mix.

    With ``create_graph=True``, and for ``of=None``, the answer can be differentiated once, in inputs and weights: the
    backward is a compiled graph, too, parted from the call's by min-cut. On CUDA a call without a derivative is one
    CUDA graph (with ``"inductor"`` and ``"fx"``, of tensors on one device): inputs are copied to its memory, the answer
    from there. jactri's Triton kernels run where they do in an ordinary call (``backend``): each launch is an op of the
    graph, ``jactri.kernel``, at the precision that torch allowed when it was traced. A package, that of ``"aot"`` too,
    has torch's ops in their place.

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
        options: those of ``of``, but for what is for one long call (``progress``, ``strict``, ``estimate``). Tensors
            among them may be updated in place. A sparse ``layout`` needs the ``pattern``, a `Sparsity`, which is taken
            at its word in all calls; where values of it are not finite, the ordinary call runs.

    Returns:
        A `Compiled`: call it with inputs like the examples.

    Raises:
        TypeError: another ``of``, an option or a number of inputs that it does not take; a ``pattern`` that is no
            `Sparsity`.
        ValueError: ``freeze=True`` with a derivative in weights; a sparse ``layout`` without a ``pattern``.
        RuntimeError: inside of a torch.func transform; ``"aot"`` with ``backend="triton"``; with ``freeze=True``, an
            answer that is to be differentiated in an input. Else, at compilation too, what ``of`` raises.

    Cost:
        At compilation an ordinary call, a trace (0.2 s to some seconds), the engine's compilation, one call, and
        where the answer can be differentiated a backward of both calls. Then about 10 microseconds beside the engine's.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x = torch.randn(4, 3)
        >>> trace = jactri.compile(net, x, of=jactri.divergence, engine="fx")
        >>> with torch.no_grad():
        ...     _ = net[2].weight.mul_(2.0)  # an update is seen
        >>> torch.allclose(trace(x), jactri.divergence(net, x), atol=1e-5)
        True
    """
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
