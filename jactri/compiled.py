"""`compile`: an accumulation at fixed shapes, computed again and again with as little Python as possible."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from . import handover
from .api import jacobian
from .arguments import as_tuple
from .constants import constants
from .cudagraph import Graphed
from .guard import Guard, alike, key, unchanged
from .hooks import check_hooks, harmless
from .kept import kept_tensors
from .operators.jobs import JOBS, Ends, Job
from .running import computing, public
from .tape import Recorder, Stale, Tape, Unrecordable, function, tensors
from .traced import Traced

_log = logging.getLogger("jactri")

_KEPT = 8
"""Signatures of inputs whose recordings are kept."""

_IN_VAIN = 3
"""Plans in a row that may go stale before they served a second call."""


_WITH_FORWARD = (Graphed, Traced)


class Replay:
    """The accumulation for one graph, as straight-line code (see `tape`), behind a `Guard` of that graph."""

    def __init__(self, job: Job, ends: Ends, out: Any):
        if job.backend == "triton":
            raise Unrecordable("Triton's kernels are not ops that can be recorded")
        if not all(x.is_floating_point() for x in ends.leaves):
            raise Unrecordable("which samples an integer input picks is not in the graph")
        check_hooks(job, ends)
        job, given = job.by_ops(), tensors(out)
        job.rows(ends, out)  # what is measured or probed once must not be recorded
        guard = Guard(ends.ys, ends.leaves)
        with Recorder(job.limit(ends.ys[0].device)) as recorder:
            self.first = job.rows(ends, out)
        tape = Tape(recorder, self.first, given)
        saved, bases = _by_memory(guard.places), _by_memory(guard.bases)
        bound = []
        fixed = {id(t) for t in (*constants(), *kept_tensors(), *job.held)} | recorder.numbers
        for i, t in enumerate(tape.outside):
            if id(t) in fixed:
                tape.constants[f"x{i}"] = t
            elif places := [*saved.get(key(t), ()), *bases.get(key(t), ())]:
                bound += [unchanged(place, t) for place in bases.get(key(t), ())]
                bound.append(f"x{i} = {places[0]}")
                if t.numel():
                    bound.append(
                        f"if not x{i}.untyped_storage().size(): raise Stale('freed memory')"
                    )
                bound += [alike(places[0], other) for other in places[1:]]
            else:
                raise Unrecordable(
                    f"a tensor {tuple(t.shape)} comes from neither the graph nor its ops"
                )
        lines = [*guard.lines, *bound, *tape.code, f"return [{', '.join(tape.results)}]"]
        self.job, self.outputs, self.inputs = job, len(ends.ys), len(ends.leaves)
        parameters = [f"y{j}" for j in range(self.outputs)]
        parameters += [f"leaf{i}" for i in range(self.inputs)]
        parameters += [f"o{i}" for i in range(len(given))]
        self.run = function("replay", parameters, lines, {**guard.constants, **tape.constants})
        self.how = f"replays {tape.ops} ops"

    def __call__(self, ends: Ends, out: Any) -> list[Tensor]:
        """The tensors of the answer. Raises Stale if the graph is not the recorded one."""
        if len(ends.ys) != self.outputs or len(ends.leaves) != self.inputs:
            raise Stale("the number of outputs or parameters")
        if not harmless(self.job, ends):
            raise Stale("hooks on gradients")
        with computing(False):
            return self.run(*ends.ys, *ends.leaves, *tensors(out))


def _by_memory(places: list[tuple[Tensor, str]]) -> dict[tuple, list[str]]:
    found: dict[tuple, list[str]] = {}
    for t, place in places:
        found.setdefault(key(t), []).append(place)
    return found


class Eager:
    """What cannot be replayed: an ordinary accumulation at every call."""

    def __init__(self, reason: str, job: Job):
        self.how, self.job = f"runs call by call: {reason}", job

    def __call__(self, ends: Ends, out: Any) -> list[Tensor]:
        return self.job.rows(ends, out)


def _signature(out: Any) -> Any:
    """What a plan for ``out`` is for. Raises TypeError for what is no tensor."""
    if isinstance(out, Tensor):
        return out.shape, out.stride(), out.dtype, out.device, out.requires_grad
    if isinstance(out, tuple):
        return tuple([_signature(item) for item in out])
    if isinstance(out, dict):
        return tuple([(name, _signature(item)) for name, item in out.items()])
    raise TypeError(
        f"out must hold tensors, got {type(out)}; for an array, pass torch.from_numpy(array)"
    )


class Compiled:
    """A call of jactri at fixed shapes; made by `compile`.

    ``replans`` counts how often it was planned again, for other inputs or another graph. Print it to see how it runs.
    """

    def __init__(self, job: Job, static: bool):
        self.func, self.replans = job.func, -1
        self._job, self._static = job, static
        self._plans: dict[tuple, Replay | Traced | Graphed | Eager] = {}
        self._in_vain: dict[tuple, int] = {}
        self._lock = threading.Lock()
        self._last: Replay | Traced | Graphed | Eager | None = None

    def __repr__(self) -> str:
        name = getattr(self.func, "__name__", type(self.func).__name__)
        of = "" if self._job.name == "jacobian" else f", of={self._job.name}"
        return f"jactri.compile({name}{of}): {self._last.how}, {self.replans} plans after the first"

    @public
    def __call__(self, *inputs: Tensor, out: Any = None) -> Any:
        """What the compiled call returns at ``inputs``.

        ``out``: tensors to write the answer to, as of `jactri.jacobian` and `ParameterJacobian.dense`; they are what is
        returned. Other calls take none.
        """
        try:
            signature = tuple([(x.shape, x.dtype, x.device) for x in inputs])
        except AttributeError:
            as_tuple(inputs, "inputs", f"a compiled {self._job.name}")  # raises for no tensor
            raise
        if len(inputs) != self._job.count:
            raise TypeError(
                f"this was compiled for {self._job.count} inputs, and is called with {len(inputs)}"
            )
        if out is not None:
            self._job.check_out(out)
            signature = signature, _signature(out)
        if handover.transforming(inputs):
            raise RuntimeError(
                f"a compiled {self._job.name} cannot run inside of a torch.func transform; call "
                f"jactri.{self._job.name} there"
            )
        job, plan = self._job, self._plans.get(signature)
        # whoever watches the ops sees those of an ordinary call
        watched = _len_torch_dispatch_stack()
        if not watched and self._whole(plan, inputs):
            found = self._replayed(plan, signature, inputs, out)
            if found is not None:
                return job.answer(*found, out)
            plan = self._plans.get(signature)
            if plan.__class__ in _WITH_FORWARD:  # another thread has made one meanwhile
                plan = None
        ends = job.forward(inputs)
        if watched:
            return job.answer(ends, job.rows(ends, out), out)
        try:
            if plan is None:
                raise Stale("the shapes, dtypes or devices")
            rows = plan(ends, out)
        except Stale as change:
            rows = self._planned(signature, ends, out, change)
        return job.answer(ends, rows, out)

    def _keep(self, signature, plan, change) -> None:
        """Take a plan for inputs of a signature, in place of the one that there was."""
        with self._lock:
            self.replans += 1
            if self.replans:
                _log.info(
                    "compiled %s planned again, %s changed; it %s", self._job.name, change, plan.how
                )
            if len(self._plans) >= _KEPT and signature not in self._plans:
                oldest = next(iter(self._plans))
                self._plans.pop(oldest)
                self._in_vain.pop(oldest, None)
            self._plans[signature] = self._last = plan

    def _planned(self, signature, ends: Ends, out, change) -> list[Tensor]:
        """Make a plan for a graph; the tensors of its answer."""
        try:
            plan = Replay(self._job, ends, out)
            rows, plan.first = plan.first, None
        except Unrecordable as reason:
            _log.info("a compiled %s is not recorded: %s", self._job.name, reason)
            plan = Eager(str(reason), self._job)
            rows = plan(ends, out)
        self._keep(signature, plan, change)
        return rows

    def _whole(self, plan, inputs) -> bool:
        """Whether the forward pass is to be replayed as well."""
        if plan is None:
            return self._static or any(x.is_cuda for x in inputs)
        return plan.__class__ in _WITH_FORWARD

    def _replayed(self, plan, signature, inputs, out):
        """Ends and the tensors of the answer, of a replay with its forward pass; None where there can be none."""
        try:
            if plan is None:
                raise Stale("the shapes, dtypes or devices")
            found = plan(inputs, tensors(out))
            self._in_vain[signature] = 0
            return found
        except Stale as change:
            on_gpu = any(x.is_cuda for x in inputs)
            try:
                times = self._in_vain[signature] = self._in_vain.get(signature, 0) + 1
                if times > _IN_VAIN:
                    raise Unrecordable(
                        f"{change} changed before each of {times} calls; a number that func holds can be a tensor "
                        "that is written to in place"
                    )
                plan = (Graphed if on_gpu else Traced)(self._job, inputs, out)
                found = plan(inputs, tensors(out))
            except (Unrecordable, Stale) as reason:
                _log.info(
                    "a compiled %s is not %s: %s", self._job.name, "captured" if on_gpu else "static", reason
                )  # fmt: skip
                if on_gpu:
                    self._keep(signature, Eager(str(reason), self._job), change)
                else:  # the accumulation alone may be
                    self._plans.pop(signature, None)
                return None
            self._keep(signature, plan, change)
            return found


def compile(
    func: Callable[..., Any],
    *example_inputs: Tensor,
    of: Callable[..., Any] = jacobian,
    static: bool = False,
    **options: Any,
) -> Compiled:
    """A callable for the Jacobian of ``func`` at inputs like ``example_inputs``, for many calls at fixed shapes.

    ``compile(func, x)(x)`` is ``jacobian(func, x)``, ``compile(func, x, y)(x, y)`` is ``jacobian(func, (x, y))``; each
    call returns tensors of its own, or writes to ``out=``.

    Args:
        func: as for ``of``.
        example_inputs: tensors of the shapes, dtypes and devices that it will be called with.
        of: what is computed. `jacobian`, or `gradient`, `divergence`, `laplacian`, `diagonal`, `jtj`, `jjt`,
            `parameter_jacobian` (the answer is that of its ``dense()``), `empirical_ntk` (of one or two inputs).
        static: on a CPU, replay the forward pass as well, as is done on CUDA in any case; see below.
        options: those of ``of``, but for ``create_graph`` and what is for one long call (``progress``, ``layout``,
            ``strict``, ``estimate``). Tensors among them may be updated in place.

    On a CPU, ``func`` runs at every call and its graph is compared, node by node, with the one that was planned for;
    the accumulation is replayed as straight-line code. So nothing is assumed of ``func``: another branch, a parameter
    that was updated or replaced, or other options of an op give the right answer, by a new plan where needed.

    ``static=True`` asks for more and assumes more: the ops of ``func`` itself are replayed, none of its Python runs, no
    graph is recorded, large products of float32 are oneDNN's where it is faster, and what only the graph needed is not
    computed. ``func`` must then run the same ops at every call. What it holds may change: tensors may be updated in
    place, and what is replaced is noticed and gives a new plan, where its code names it: globals, closures, defaults,
    arguments of partials, imported modules, attributes of modules, objects, functions and classes that it reaches,
    items of lists, tuples and dictionaries (up to 1000) among them; submodules, hooks, modes and methods; and another
    value that it reads off a tensor, as to choose a branch. What it reads in other ways (files, clocks, iterators,
    random numbers of Python, sets and deques, attributes of tensors, numpy arrays written to in place, context
    variables) is as it was at the time of planning. Where the ops cannot be fixed (random ones, autocast, values that
    leave torch as by ``numpy()``, Python code in an autograd Function, buffers that it writes to, what changes before
    every call), it runs as without ``static``; printing the callable tells, and the logger ``jactri`` why.

    On CUDA, one CUDA graph holds the forward pass and the accumulation; a call copies the inputs in and the answer
    out. With the same tensors as ``out=`` at every call, the graph writes to them, and nothing is copied out. What is
    said of ``static`` holds, and as for ``torch.cuda.make_graphed_callables``, ``func`` must be capturable: no branch
    on values, no transfer to the CPU.

    Other shapes, dtypes or devices give a new plan; the last 8 are kept. New plans are counted in ``replans`` and
    logged by the logger ``jactri``. What cannot be recorded (Python autograd functions, random or data-dependent ops,
    samples that only a probe can tell apart) runs call by call; printing the callable says why. It may be called from
    several threads.

    Raises: what ``of`` raises, at compilation too; TypeError for another ``of``, an option that it does not take, or
    another number of inputs; RuntimeError inside of a torch.func transform.

    Cost: at compilation one call and a second or so on CUDA; on a CPU two calls, the second of which holds all that it
    computes at once (within ``memory_limit``, or half of what is free: else it runs call by call). Then, on a CPU, the
    forward pass, about 1.5 microseconds for each node of the graph and 1.5 for each op of the accumulation, and their
    work; with ``static`` 3 microseconds for each op, and 10 for a look at what ``func`` holds.
    """
    kind = JOBS.get(of)
    if kind is None:
        raise TypeError(
            f"of must be one of {', '.join('jactri.' + f.__name__ for f in JOBS)}, got {of!r}"
        )
    wrong = [name for name in options if name not in kind.options()]
    if wrong:
        raise TypeError(
            f"compile of {kind.name} takes no {', '.join(map(repr, wrong))}; its options are "
            f"{', '.join(kind.options())}"
        )
    _, xs = as_tuple(example_inputs, "example_inputs", "compile")
    if not xs:
        raise IndexError("example_inputs is empty: pass the tensors that func takes")
    job = kind(func, len(xs), **options)
    job.check(xs)
    made = Compiled(job, static)
    made(*xs)
    return made
