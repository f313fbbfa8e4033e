"""`profile`: where the time of a call goes, step by step, and a trace of it."""

from __future__ import annotations

import contextlib
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType

from ..base import backends, rates
from ..base.memory import si
from ..base.tables import Shown, Table
from ..calls.api import jacobian
from ..compile.reached import modules_of
from ..plan.planner import predict
from ..prologue.arguments import as_tuple
from ..prologue.running import buffers_kept, public
from ..read.ranges import Layers, Session
from .report import StepReport, steps_of

Seconds = dict[int, float]
"""Step -> the time that it took; steps that ran as one are counted at the last of them."""


@dataclass(frozen=True)
class ProfiledStep:
    """A step of a call, with its times.

    Attributes:
        step: the `StepReport`, its layer in ``step.layer``.
        predicted_ms: milliseconds that the planner predicts.
        measured_ms: milliseconds that it took; None for a step that runs as one with a later step, which has the
            time of both.
        roofline: how much of the measured time the device needs at least at its measured rates; None where nothing is
            computed.
    """

    step: StepReport
    predicted_ms: float
    measured_ms: float | None
    roofline: float | None


@dataclass(frozen=True, repr=False)
class Profile(Shown):
    """What `profile` returns; ``str()`` of it is the table. All times are milliseconds of one call.

    Attributes:
        steps: a `ProfiledStep` for each step, in the order in which they run.
        plan: the order of accumulation, and why.
        function_ms: the function itself, with what autograd records.
        planning_ms: reading the graph, planning, checking arguments: all that is neither the function nor accumulation.
        accumulation_ms: the steps, and what lies between them: chunks put in their places, Python.
        total_ms: the whole call.
        repeats: of how many calls this is the one with the median accumulation.
        rates: what the device was measured to do: ``flops`` of float32 products, ``bandwidth`` in bytes, both a second.
        trace: where the Chrome trace was written; None where none was.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> found = jactri.profile(net, torch.randn(4, 3), per_sample=True, repeats=1)
        >>> found.total_ms >= found.function_ms + found.accumulation_ms
        True
    """

    steps: tuple[ProfiledStep, ...]
    plan: str
    function_ms: float
    planning_ms: float
    accumulation_ms: float
    total_ms: float
    repeats: int
    rates: rates.Rates
    trace: str | None

    def _parts(self) -> list[str | Table]:
        head = ("step", "layer", "op", "structure", "shape", "seeds", "flops", "bytes", "predicted ms", "measured ms",
                "roofline")  # fmt: skip
        rows = [
            (
                str(i), s.step.layer or "-", s.step.op, s.step.structure,
                "x".join(map(str, s.step.shape)) or "scalar", str(s.step.columns), si(s.step.flops), si(s.step.bytes),
                f"{s.predicted_ms:.3g}", "in a step below" if s.measured_ms is None else f"{s.measured_ms:.3g}",
                "-" if s.roofline is None else f"{s.roofline:.0%}",
            )
            for i, s in enumerate(self.steps)
        ]  # fmt: skip
        lines: list[str | Table] = [self.plan]
        if rows:
            lines.append(Table(head, rows))
        inside = sum(s.measured_ms or 0.0 for s in self.steps)
        lines += [
            f"function {self.function_ms:.3g} ms, reading and planning {self.planning_ms:.3g} ms, accumulation "
            f"{self.accumulation_ms:.3g} ms (steps {inside:.3g} ms), whole call {self.total_ms:.3g} ms; the median of "
            f"{self.repeats} call{'s' * (self.repeats != 1)}",
            f"roofline: {si(self.rates.flops)}flop/s of float32 products, {si(self.rates.bandwidth)}B/s copied; as "
            "much is taken to be read as is written",
        ]
        if any((s.roofline or 0.0) > 1 for s in self.steps):
            lines.append(
                "above 100%: blocks stay in cache, or the rates were measured on a busy machine"
            )
        if self.trace:
            lines.append(f"trace: {self.trace}")
        return lines


@public
def profile(
    func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    path: str | os.PathLike | None = None,
    *,
    per_sample: bool | str = False,
    strategy: str = "auto",
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
    repeats: int = 5,
) -> Profile:
    """Where the time of ``jactri.jacobian(func, inputs, ...)`` goes. Print the result: a row a step, as in `explain`.

    The times are those of the call with the median accumulation, and on a CUDA device, for the steps, those of their
    kernels.

    Args:
        func: as of `jacobian`.
        inputs: as of `jacobian`.
        path: where to write a Chrome trace of one more call (``.json``, or ``.json.gz``) with a named range around
            every step; open it in Perfetto or ``chrome://tracing``.
        per_sample: as of `jacobian`.
        strategy: as of `jacobian`.
        chunk_size: as of `jacobian`.
        memory_limit: as of `jacobian`.
        backend: as of `jacobian`.
        repeats: how many calls are measured.

    Returns:
        A `Profile`.

    Raises:
        ValueError: ``repeats`` below 1.
        RuntimeError: a torch profiler is on.
        OSError: a ``path`` that cannot be written to, before anything is computed. Else what `jacobian` raises.

    Cost:
        ``repeats + 2`` calls of `jacobian`, one more for a trace. Buffers of modules in training mode are put back.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> found = jactri.profile(net, torch.randn(4, 3), per_sample=True, repeats=1)
        >>> {row.step.layer for row in found.steps} >= {"0 Linear", "1 Tanh"}
        True
    """
    if not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats must be a positive integer, got {repeats!r}")
    if torch.autograd._profiler_enabled():
        raise RuntimeError(
            "profile starts torch's profiler, and one is on; call profile outside of it, or jacobian inside"
        )
    _, xs = as_tuple(inputs, "inputs", "profile")
    made = _writable(path)
    device = xs[0].device if xs else torch.device("cpu")

    def call(session: Session) -> None:
        _synchronize(device)
        start = time.perf_counter()
        with session:
            jacobian(
                func, inputs, strategy=strategy, per_sample=per_sample, chunk_size=chunk_size,
                memory_limit=memory_limit, backend=backend,
            )  # fmt: skip
        _synchronize(device)
        session.total = time.perf_counter() - start

    def measure(named: bool = False) -> _Call:
        session = Session(named)
        if device.type != "cuda":
            call(session)
        else:
            with _profiler(device) as profiler:
                call(session)
            _on_device(session, profiler.profiler.kineto_results.events())
        return _Call.of(session, backend)

    with buffers_kept(modules_of(func)), contextlib.ExitStack() as undo:
        if made:  # no empty file is left where this raises
            undo.callback(Path(path).unlink, missing_ok=True)
        call(Session())  # what is built and measured once
        named = measure(named=True)
        calls = sorted((measure() for _ in range(repeats)), key=lambda c: c.accumulation)
        if path is not None:
            with _profiler(device) as profiler:
                call(Session(named=True))
            profiler.export_chrome_trace(os.fspath(path))
        undo.pop_all()
    middle = calls[(repeats - 1) // 2]
    speed = rates.measured(device)
    return Profile(
        tuple(_rows(named, middle, speed)),
        _plan(middle),
        1e3 * middle.function,
        1e3 * max(middle.total - middle.function - middle.accumulation, 0.0),
        1e3 * middle.accumulation,
        1e3 * middle.total,
        repeats,
        speed,
        None if path is None else os.fspath(path),
    )


def named_layers(func: Callable | None = None) -> Layers:
    """A context that notes the layers which run in it, for the ranges of `jacobian_of` after it in the same thread.

    `jacobian` and `profile` do so themselves. The ranges are those that torch's profiler, or NVTX, shows of each step.

    Args:
        func: what modules are named by, as in ``named_layers(net)``; without it, by their classes.

    Returns:
        A context manager.

    Examples:
        >>> net, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
        >>> with jactri.named_layers(net):
        ...     y = net(x)
        >>> with torch.profiler.profile() as trace:
        ...     J = jactri.jacobian_of(y, x, per_sample=True)
        >>> any("Linear" in event.name for event in trace.events())
        True
    """
    return Layers(func)


def _writable(path) -> bool:
    """Raise what opening ``path`` for writing raises; returns whether this made the file."""
    if path is None:
        return False
    made = not os.path.lexists(path)
    try:
        open(path, "ab").close()
    except OSError as error:
        raise type(error)(
            error.errno,
            f"the trace cannot be written: {error.strerror}; pass a path that can be written to",
            os.fspath(path),
        ) from None
    return made


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _profiler(device: torch.device):
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=kinds)


def _on_device(session: Session, events: Iterable) -> None:
    """Set the times of a session's entries to those of the kernels that were launched inside of their ranges."""
    ranges, launches, kernels = [], {}, []
    for e in events:
        if e.device_type() != DeviceType.CPU:
            if not e.name().startswith("jactri "):  # a range as the device saw it
                kernels.append((e.correlation_id(), e.duration_ns()))
        elif e.name().startswith("jactri #"):
            ranges.append((e.start_ns(), e.start_ns() + e.duration_ns()))
        elif e.name().startswith(("cu", "hip")):  # a call of the runtime or the driver
            launches[e.correlation_id()] = e.start_ns()
    timed = sorted((launches[c], ns) for c, ns in kernels if c in launches)
    starts = [start for start, _ in timed]
    for entry, (start, end) in zip(session.entries, sorted(ranges), strict=True):
        inside = timed[bisect_left(starts, start) : bisect_left(starts, end)]
        entry.seconds = 1e-9 * sum(ns for _, ns in inside)


@dataclass
class _Call:
    """A measured call. ``runs``: by run of a plan (one, or one a range of samples), its steps and their times."""

    runs: list[tuple[tuple[StepReport, ...], Seconds, str]]
    function: float
    accumulation: float
    total: float

    @classmethod
    def of(cls, session: Session, backend: str) -> _Call:
        runs = []
        for k, marks in enumerate(session.runs):
            with torch.no_grad(), backends.use(backend):
                steps = tuple(steps_of(marks.graph, marks.plan))
            seconds: Seconds = {}
            for entry in session.entries:
                if entry.run == k and not entry.nested:
                    last = entry.numbers[-1]
                    seconds[last] = seconds.get(last, 0.0) + entry.seconds
            runs.append((steps, seconds, f"{marks.plan.strategy}: {marks.plan.reason}"))
        return cls(runs, session.function, session.accumulation, session.total)


def _plan(call: _Call) -> str:
    if not call.runs:
        return "no steps: autograd computed the function as a whole, or there was nothing to do"
    more = f", in {len(call.runs)} ranges of samples" if len(call.runs) > 1 else ""
    return call.runs[0][2] + more


def _rows(named: _Call, call: _Call, speed: rates.Rates) -> list[ProfiledStep]:
    """The rows of a call; runs of the same steps (on other samples) are added up."""
    kinds: dict[tuple[StepReport, ...], tuple[tuple[StepReport, ...], int, Seconds]] = {}
    for k, (steps, seconds, _) in enumerate(call.runs):
        shown = named.runs[k][0] if k < len(named.runs) else steps
        if tuple(replace(s, layer="") for s in shown) != steps:
            shown = steps  # the function does something else every time
        _, count, sums = kinds.get(steps, (shown, 0, {}))
        sums = {i: sums.get(i, 0.0) + t for i, t in seconds.items()}
        kinds[steps] = shown, count + 1, sums
    rows = []
    for shown, count, sums in kinds.values():
        flops = 0.0
        for i, step in enumerate(shown):
            step = replace(step, flops=step.flops * count, bytes=step.bytes * count)
            predicted = predict(step.flops, step.bytes, count, speed)
            flops += step.flops
            took, share = sums.get(i), None
            if took is not None:
                least = max(flops / speed.flops, 2 * step.bytes / speed.bandwidth)
                share = least / took if least and took else None
                took, flops = 1e3 * took, 0.0
            rows.append(ProfiledStep(step, 1e3 * predicted, took, share))
    return rows
