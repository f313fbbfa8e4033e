"""Who looks at what runs: the layer of every node of autograd's graph is noted, and named ranges are opened.

Somebody looks who has a torch profiler on, sets ``JACTRI_NVTX=1``, or calls `jactri.profile`. While nobody does,
nothing is noted and no range opened: `watching` is asked where the function runs and where its graph is read. Ranges
lie around the function and around every step of a plan; their times are for `jactri.profile`.
"""

from __future__ import annotations

import inspect
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod

import torch
from torch._C import _len_torch_dispatch_stack
from torch._C._autograd import _profiler_type
from torch._C._profiler import ActiveProfilerType
from torch.autograd import _get_sequence_nr, _profiler_enabled
from torch.nn import Module
from torch.nn.modules import module as modules

from ..base.memory import si

NVTX = os.environ.get("JACTRI_NVTX", "0") not in ("", "0")
"""Whether to push NVTX ranges where torch's profiler is off, as Nsight and proton need them. Read at the import."""

session_now: ContextVar = ContextVar("session", default=None)
"""The `Session` that measures what runs, or None."""

_thread = threading.local()


def watching() -> bool:
    """Whether anybody looks at what runs."""
    return _profiler_enabled() or NVTX or session_now.get() is not None


class Layers:
    """Which layer made an autograd node, for all nodes that are made in this context, in this thread.

    A call of a module covers the sequence numbers of the nodes that it makes; a node belongs to the innermost one.
    Names are paths within ``func`` (a module or its method, or a function that holds modules in variables), and of
    modules that are not found there, within the outermost one that is called, under its class name.
    """

    def __init__(self, func: Callable | None = None):
        self._names: dict[Module, str] = {}
        self._open: list[tuple[Module | None, str]] = [(None, "")]
        self._starts, self._layers = [0], [""]
        self._thread = threading.get_ident()  # sequence numbers are counted by thread
        for variable, root in roots(func):
            self._add(root, variable)

    def _add(self, root: Module, prefix: str) -> None:
        for path, part in root.named_modules():
            kind = type(part).__name__
            where = ".".join(p for p in (prefix, path) if p)
            self._names.setdefault(part, kind if where in ("", kind) else f"{where} {kind}")

    def __enter__(self) -> Layers:
        self._hooks = [
            modules.register_module_forward_pre_hook(self._enter),
            # also where a module raises: the function may go on without it
            modules.register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()
        self._mark("")
        self._names.clear()  # what is kept for the reader must not keep models alive
        self._open.clear()
        _thread.layers = self

    def _enter(self, part: Module, args) -> None:
        if threading.get_ident() != self._thread:
            return
        if part not in self._names:
            self._add(part, type(part).__name__)
        self._open.append((part, self._names[part]))
        self._mark(self._names[part])

    def _leave(self, part: Module, args, result) -> None:
        if threading.get_ident() != self._thread or not any(p is part for p, _ in self._open):
            return
        while self._open.pop()[0] is not part:
            pass
        self._mark(self._open[-1][1])

    def _mark(self, layer: str) -> None:
        self._starts.append(_get_sequence_nr())
        self._layers.append(layer)

    def of(self, node) -> str:
        """The layer of an autograd node, or an empty text."""
        return self._layers[bisect_right(self._starts, node._sequence_nr()) - 1]


def roots(func) -> Iterator[tuple[str, Module]]:
    """The modules that a function is or holds in variables, with the names of those."""
    for root in (func, getattr(func, "__self__", None)):
        if isinstance(root, Module):
            yield "", root
    if inspect.isfunction(func):
        try:
            found = inspect.getclosurevars(func)
        except ValueError:  # a variable that is not set yet
            return
        for name, value in {**found.globals, **found.nonlocals}.items():
            if isinstance(value, Module):
                yield name, value


def noted() -> Layers | None:
    """The layers of the function that this thread ran last while somebody looked, or in `named_layers`."""
    session = session_now.get()
    return getattr(_thread, "layers", None) if session is None or session.named else None


# -- ranges -----------------------------------------------------------------------------------------


def call(run: Callable, func: Callable, xs):
    """Run the user's function by ``run`` while somebody looks: under a range, its layers noted."""
    session, start = session_now.get(), time.perf_counter()
    if session is not None and not session.named:
        result = run(func, *xs)
    else:
        with Layers(func), _range("jactri function", *_kinds()):
            result = run(func, *xs)
    if session is not None:
        _wait(xs[0].device)
        session.function += time.perf_counter() - start
    return result


def _kinds() -> tuple[bool, bool]:
    """Which ranges to open: torch's and NVTX's. Under ``emit_nvtx``, torch's are NVTX ranges already.

    A dispatch mode (`compile` records ops by one) would take torch's ranges for ops of the computation.
    """
    record = _profiler_enabled() and not _len_torch_dispatch_stack()
    emitted = record and _profiler_type() == ActiveProfilerType.NVTX
    return record, NVTX and not emitted and torch.cuda.is_available()


@contextmanager
def _range(name: str, record: bool, nvtx: bool) -> Iterator[None]:
    if nvtx:
        torch.cuda.nvtx.range_push(name)
    try:
        if record:
            with torch.profiler.record_function(name):
                yield
        else:
            yield
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Marks:
    """A range around every stage and step of one run of a plan, and their times if `jactri.profile` asks."""

    def __init__(self, graph, plan):
        self.graph, self.plan = graph, plan
        self.kinds = _kinds()
        self.session = session_now.get()
        self.numbers: dict[tuple[int, int], int] = {}
        self.names: dict[tuple[int, ...], str] = {}
        for sweep in (*plan.parts, *plan.sweeps):  # in the order of `explain`
            for v in sweep.values:
                self.numbers[id(sweep), v] = len(self.numbers)
        if self.session is not None:
            self.session.begin(self)
        self.start = time.perf_counter()

    def close(self) -> None:
        """The plan has run."""
        if self.session is not None:
            for value in self.graph.values[:1]:
                _wait(value.device)
            self.session.accumulation += time.perf_counter() - self.start

    def staged(self, stage: Callable) -> Callable:
        """What runs a part or a sweep, with a range around it."""

        def run(graph, sweep, *rest):
            part = any(sweep is p for p in self.plan.parts)
            cost = _cost(sweep.flops, sweep.bytes, len(sweep.selections()))
            name = f"jactri {'part' if part else 'sweep'} {sweep.direction} {cost}"
            with _range(name, *self.kinds):
                stage(graph, sweep, *rest)

        return run

    def step(self, sweep, item):
        """The range of a step, or of steps that run as one."""
        steps = getattr(item, "steps", (item,))
        numbers = tuple(self.numbers[id(sweep), s.value] for s in steps)

        def name() -> str:
            ops = [op_of(self.graph, s) for s in steps]
            words = dict.fromkeys((*(layer_of(self.graph, s) for s in steps), *ops))
            once = sweep.layouts[steps[-1].value].tied.issuperset(sweep.chunks)
            # steps that run as one write the last block only
            cost = _cost(item.flops, steps[-1].bytes, 1 if once else len(sweep.selections()))
            return f"{sweep.direction} {' '.join(w for w in words if w)} {cost}"

        return self._open(numbers, name)

    def product(self, multiply: Callable, join, source: int) -> Callable:
        """What computes a product of a join, with a range around it."""

        def run(*arguments):
            with self._open((self.numbers[id(join), source],), name):
                return multiply(*arguments)

        def name() -> str:
            at = "x".join(map(str, self.graph.values[join.at].shape))
            written = join.layouts[source].numel * join.itemsizes[source]
            flops = 2.0 * prod(join.products[source].sizes)
            return f"product at {at} {_cost(flops, written, len(join.selections()))}"

        return run

    @contextmanager
    def _open(self, numbers: tuple[int, ...], name: Callable[[], str]) -> Iterator[None]:
        text = ""
        if any(self.kinds):
            text = self.names.get(numbers)
            if text is None:
                last = f"-{numbers[-1]}" if len(numbers) > 1 else ""
                text = self.names[numbers] = f"jactri #{numbers[0]}{last} {name()}"
        with _range(text, *self.kinds):
            if self.session is None:
                yield
            else:
                with self.session.clock(numbers):
                    yield


def _cost(flops: float, written: float, chunks: int) -> str:
    """Predicted, for all chunks."""
    return f"[{si(flops)}FLOP {si(written)}B{f' in {chunks} chunks' if chunks > 1 else ''}]"


def layer_of(graph, step) -> str:
    """The layers whose derivatives a step multiplies with."""
    if not graph.layers:
        return ""
    found = dict.fromkeys(graph.layers.get(t.owner, "") for t in step.terms)
    return " + ".join(name for name in found if name)


def op_of(graph, step) -> str:
    """The op that a step multiplies with. Of several: those that autograd computes, or the first."""
    return " + ".join(opaque_of(graph, step)) or graph.values[step.terms[0].owner].op


def opaque_of(graph, step) -> list[str]:
    """The nodes that autograd computes in a step."""
    edges = [t.map_in(graph) for t in step.terms]
    return list(dict.fromkeys(e.name for e in edges if e.structure == "opaque"))


@dataclass(slots=True)
class Entry:
    """A range that was open once: in which run of a plan, around which steps, for how long."""

    run: int
    numbers: tuple[int, ...]
    seconds: float = 0.0
    nested: bool = False
    """Whether other ranges were open inside, which hold its time."""


class Session:
    """A context that measures calls of `jacobian`: seconds of their phases, and of all steps in ``entries``.

    ``named``: note the layers, and open the ranges around the function, too.
    """

    def __init__(self, named: bool = False):
        self.named = named
        self.runs: list[Marks] = []
        self.entries: list[Entry] = []
        self.function = self.accumulation = self.total = 0.0
        self._open: list[Entry] = []

    def __enter__(self) -> Session:
        self._token = session_now.set(self)
        return self

    def __exit__(self, *error) -> None:
        session_now.reset(self._token)

    def begin(self, marks: Marks) -> None:
        """A plan starts to run."""
        self.runs.append(marks)

    @contextmanager
    def clock(self, numbers: tuple[int, ...]) -> Iterator[None]:
        """Measure the steps with these numbers."""
        entry = Entry(len(self.runs) - 1, numbers)
        if self._open:
            self._open[-1].nested = True
        self._open.append(entry)
        self.entries.append(entry)
        start = time.perf_counter()
        try:
            yield
        finally:
            entry.seconds = time.perf_counter() - start
            self._open.pop()
