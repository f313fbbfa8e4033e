"""`compile`: a Jacobian at fixed shapes, computed again and again with as little Python as possible."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from . import backends, handover
from .api import Request, compute, detached, nest, record, uncompiled
from .arguments import as_tuple, check_options, fresh_leaf
from .constants import constants
from .cudagraph import Graphed
from .guard import Guard, alike, key
from .kept import kept_tensors
from .tape import Recorder, Stale, Tape, Unrecordable, function

_log = logging.getLogger("jactri")

_KEPT = 8
"""Signatures of inputs whose recordings are kept."""


class Replay:
    """The accumulation for one graph, as straight-line code (see `tape`), behind a `Guard` of that graph."""

    def __init__(self, ys, leaves, tupled_out: bool, asked: Request):
        if asked.backend == "triton":
            raise Unrecordable("Triton's kernels are not ops that can be recorded")
        asked = replace(asked, backend="torch")
        compute(ys, leaves, asked)  # what is measured or probed once must not be recorded
        guard = Guard(ys, leaves)
        with Recorder() as recorder:
            self.first = compute(ys, leaves, asked)
        results = [block for row in self.first for block in row]
        tape = Tape(recorder, results)
        saved: dict[tuple, list[str]] = {}
        for t, place in guard.places:
            saved.setdefault(key(t), []).append(place)
        bound, fixed = [], {id(t) for t in (*constants(), *kept_tensors())}
        fixed |= recorder.numbers
        for i, t in enumerate(tape.outside):
            if id(t) in fixed:
                tape.constants[f"x{i}"] = t
            elif (places := saved.get(key(t))) is not None:
                bound.append(f"x{i} = {places[0]}")
                bound += [alike(places[0], other) for other in places[1:]]
            else:
                raise Unrecordable(
                    f"a tensor {tuple(t.shape)} comes from neither the graph nor its ops"
                )
        lines = [*guard.lines, *bound, *tape.code, f"return [{', '.join(tape.results)}]"]
        self.outputs, self.columns, self.tupled_out = len(ys), len(leaves), tupled_out
        parameters = [f"y{j}" for j in range(len(ys))] + [f"leaf{i}" for i in range(len(leaves))]
        self.run = function("replay", parameters, lines, {**guard.constants, **tape.constants})
        self.how = f"replays {len(tape.code)} ops"

    def __call__(self, ys, leaves, tupled_out: bool) -> list[list[Tensor]]:
        """The Jacobians. Raises Stale if the graph is not the recorded one."""
        if len(ys) != self.outputs or tupled_out != self.tupled_out:
            raise Stale("the number of outputs")
        with torch.no_grad():
            flat = self.run(*ys, *leaves)
        n = self.columns
        return [flat[k : k + n] for k in range(0, len(flat), n)]


class Eager:
    """What cannot be replayed: an ordinary accumulation at every call."""

    def __init__(self, reason: str, asked: Request):
        self.how, self.asked = f"runs call by call: {reason}", asked

    def __call__(self, ys, leaves, tupled_out: bool) -> list[list[Tensor]]:
        return compute(ys, leaves, self.asked)


class Compiled:
    """A Jacobian at fixed shapes; made by `compile`.

    ``replans`` counts how often it was planned again, for other inputs or another graph. Print it to see how it runs.
    """

    def __init__(self, func, asked: Request, return_output: bool, tupled: bool):
        self.func, self.replans = uncompiled(func), -1
        self._asked, self._return_output, self._tupled = asked, return_output, tupled
        self._plans: dict[tuple, Replay | Graphed | Eager] = {}
        self._lock = threading.Lock()
        self._last: Replay | Graphed | Eager | None = None

    def __repr__(self) -> str:
        name = getattr(self.func, "__name__", type(self.func).__name__)
        return f"jactri.compile({name}): {self._last.how}, {self.replans} plans after the first"

    def __call__(self, *inputs: Tensor) -> Any:
        """The Jacobian at ``inputs``, nested as `jactri.jacobian` nests it; with ``return_output``, the output too."""
        try:
            signature = tuple([(x.shape, x.dtype, x.device) for x in inputs])
        except AttributeError:
            as_tuple(inputs, "inputs", "a compiled Jacobian")  # raises for what is not a tensor
            raise
        if handover.transforming(inputs):
            raise RuntimeError(
                "a compiled Jacobian cannot run inside of a torch.func transform; call jactri.jacobian there"
            )
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self(*inputs)
        plan = self._plans.get(signature)
        if plan.__class__ is Graphed or (plan is None and any(x.is_cuda for x in inputs)):
            found = self._replayed(plan, signature, inputs)
            if found is not None:
                return self._answer(*found)
            plan = self._plans[signature]
        with torch.enable_grad():
            leaves = [fresh_leaf(x, False) for x in inputs]
            result = record(self.func, *leaves)
        tupled_out, ys = as_tuple(result, "outputs of the user-provided function", "jacobian")
        if _len_torch_dispatch_stack():  # whoever watches the ops sees those of an ordinary call
            return self._answer(result, compute(ys, leaves, self._asked), tupled_out)
        try:
            if plan is None:
                raise Stale("the shapes, dtypes or devices")
            rows = plan(ys, leaves, tupled_out)
        except Stale as change:
            rows = self._planned(signature, ys, leaves, tupled_out, change)
        return self._answer(result, rows, tupled_out)

    def _answer(self, result, rows, tupled_out: bool):
        answer = nest(rows, tupled_out, self._tupled)
        return (detached(result), answer) if self._return_output else answer

    def _keep(self, signature, plan, change) -> None:
        """Take a plan for inputs of a signature, in place of the one that there was."""
        with self._lock:
            self.replans += 1
            if self.replans:
                _log.info("compiled Jacobian planned again, %s changed; it %s", change, plan.how)
            if len(self._plans) >= _KEPT and signature not in self._plans:
                self._plans.pop(next(iter(self._plans)))
            self._plans[signature] = self._last = plan

    def _planned(self, signature, ys, leaves, tupled_out: bool, change) -> list[list[Tensor]]:
        """Make a plan for a graph; its Jacobians."""
        try:
            plan = Replay(ys, leaves, tupled_out, self._asked)
            rows, plan.first = plan.first, None
        except Unrecordable as reason:
            _log.info("a compiled Jacobian is not recorded: %s", reason)
            plan = Eager(str(reason), self._asked)
            rows = plan(ys, leaves, tupled_out)
        self._keep(signature, plan, change)
        return rows

    def _replayed(self, plan, signature, inputs):
        """Output, Jacobians and whether outputs are a tuple, by a CUDA graph; None where there can be none."""
        try:
            if plan is None:
                raise Stale("the shapes, dtypes or devices")
            return plan(inputs)
        except Stale as change:
            try:
                plan = Graphed(self.func, inputs, self._asked)
            except Unrecordable as reason:
                _log.info("a compiled Jacobian is not captured: %s", reason)
                self._keep(signature, Eager(str(reason), self._asked), change)
                return None
            self._keep(signature, plan, change)
            return plan(inputs)


def compile(
    func: Callable[..., Any],
    *example_inputs: Tensor,
    per_sample: bool = False,
    strategy: str = "auto",
    return_output: bool = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
) -> Compiled:
    """A callable for the Jacobian of ``func`` at inputs like ``example_inputs``, for many calls at fixed shapes.

    ``compile(func, x)(x)`` is ``jacobian(func, x)``, ``compile(func, x, y)(x, y)`` is ``jacobian(func, (x, y))``; each
    call returns tensors of its own. The options are those of `jacobian`.

    On a CPU, ``func`` runs at every call and its graph is compared, node by node, with the one that was planned for;
    the accumulation is replayed as straight-line code. So nothing is assumed of ``func``: another branch, a parameter
    that was updated or replaced, or other options of an op give the right answer, by a new plan where needed.

    On CUDA, one CUDA graph holds the forward pass and the accumulation; a call copies the inputs in and the Jacobian
    out. As for ``torch.cuda.make_graphed_callables``, ``func`` must then be capturable: the same ops on tensors of the
    same shapes at every call, no branch on values, no transfer to the CPU. Parameters and buffers of modules, and
    tensors, that ``func`` holds (itself, its closure, its globals, the arguments of a partial) may be updated in place;
    replacing one, or changing between train and eval, gives a new plan. Python numbers that it reads elsewhere are
    those of the time of planning.

    Other shapes, dtypes or devices give a new plan; the last 8 are kept. New plans are counted in ``replans`` and
    logged by the logger ``jactri``. What cannot be recorded (Python autograd functions, random or data-dependent ops,
    samples that only a probe can tell apart) runs as `jacobian` at every call; printing the callable says why. It may
    be called from several threads.

    Raises: what `jacobian` raises, at compilation too; RuntimeError inside of a torch.func transform.

    Cost: one `jacobian` call and a second or so on CUDA at compilation. Then, on a CPU, the forward pass, about 1.5
    microseconds for each node of the graph and 1.5 for each op of the accumulation, and their work.
    """
    check_options(strategy, chunk_size, None, False)
    _, xs = as_tuple(example_inputs, "example_inputs", "compile")
    if not xs:
        raise IndexError("example_inputs is empty: pass the tensors that func takes")
    backends.check_asked(backend, xs[0].device, False)
    asked = Request(
        strategy, False, False, per_sample, chunk_size, memory_limit, False, backend, True, None
    )
    made = Compiled(func, asked, return_output, len(xs) > 1)
    made(*xs)
    return made
