"""Accuracy and memory at GPU sizes, and which calls a CUDA graph captures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import jactri

from .. import operators
from ..peers import BY_OPERATOR
from ..record import Record
from ..workloads import Workload
from .device import SETTINGS, Device, precision
from .sizes import Sized, distance, problem, truth

SLACK = {"ieee": 2.0**-22, "tf32": 1e-3, "bf16": 2.0**-6}
"""What jactri may be off by beside twice the error of torch.func at the same setting."""


def accuracy(device: Device, record: Record, size: Sized) -> None:
    """jactri's error against float64 beside that of torch.func, and its memory beside the answer's."""
    w = size.workload
    net, x = problem(w, device.device)
    want = truth(w, net, x, min(w.samples, 8))
    few = replace(w, samples=len(want))
    for setting in SETTINGS if w.operator else (*SETTINGS, "bf16"):
        if not record.has_time(setting):
            continue
        half = setting == "bf16"
        f, given = (net.bfloat16(), x.bfloat16()) if half else (net, x)
        found: dict[str, Any] = {"workload": w.name, "setting": setting}
        with precision("ieee" if half else setting):
            theirs = distance(_plain(few, f)(given[: len(want)]), want, w.operator)
            found["torch.func"] = theirs
            for backend in (*device.backends, "compiled"):
                try:
                    call = ours(w, f, given, backend)
                    off = found[backend] = distance(call(), want, w.operator)
                    if not off <= 2 * theirs + SLACK[setting]:
                        raise AssertionError(f"off by {off:.1e}, torch.func by {theirs:.1e}")
                    if backend == "auto" and not half:
                        peak = device.peak(call)
                        found["peak_of_answer"] = peak / w.answer_bytes
                        if w.operator is None:
                            told = jactri.explain(f, given, per_sample=True)
                            found["peak_of_predicted"] = peak / told.peak_bytes
                except Exception as error:  # one backend may fail in any way: the others go on
                    record.failed(f"{setting} {backend}", error)
                device.release()
        record.add(found)
    errors = (f"{r['setting']} {r['auto']:.1e}" for r in record.data["results"] if "auto" in r)
    record.data["line"] = f"off by {', '.join(errors)}"


def capture(device: Device, record: Record, size: Sized) -> None:
    """Whether a CUDA graph takes the plain call, and the compiled one, and is right when it is replayed; or why not."""
    w = size.workload
    net, x = problem(w, device.device)
    want = truth(w, net, x, min(w.samples, 8))
    with precision("ieee"):
        for what in ("auto", "compiled"):
            try:
                static = x.roll(1, 0)
                call = ours(w, net, static if what == "auto" else x, what)
                why = None
                if what == "auto":
                    call, why = _captured(device, call)
                    static.copy_(x)
                off = distance(call(), want, w.operator)
                if not off <= 1e-5:
                    raise AssertionError(f"off by {off:.1e} when replayed")
                how = why or (repr(call.func) if what == "compiled" else "replays a CUDA graph")
                taken = "CUDA graph" in how and why is None
                record.add({"call": what, "captured": taken, "how": how, "error": off})
            except Exception as error:  # whatever it is, it is what is asked for
                record.failed(what, error)
            device.release()
    record.data["line"] = "; ".join(
        f"{r['call']} {'captured' if r['captured'] else 'not captured: ' + r['how'][:120]}"
        for r in record.data["results"]
    )


def _captured(device: Device, call: Callable[[], Any]) -> tuple[Callable[[], Any], str | None]:
    """The replay of a graph of the call; the call itself, and why, where there is none."""
    kept: list[Any] = []

    def once() -> None:
        kept[:] = [call()]

    try:
        replay = device.graph(once)
    except Exception as error:  # what cannot be captured says so in many ways
        return call, f"{type(error).__name__}: {error}"[:500]

    def replayed() -> Any:
        replay()
        return kept[0]

    return replayed, None


def _plain(w: Workload, net: torch.nn.Module) -> Callable[[torch.Tensor], Any]:
    """torch's way to compare with; of an operator, the first that its peers have."""
    if w.operator is not None:
        return next(p for p in BY_OPERATOR[w.operator] if p.kind == "torch").make(w, net)
    mode = torch.func.jacfwd if w.columns < w.rows and not w.no_forward else torch.func.jacrev
    return torch.func.vmap(mode(net))


def ours(w: Workload, net, x: torch.Tensor, backend: str) -> Callable[[], Any]:
    """jactri's call by a backend; "compiled": for another input of that shape."""
    if backend != "compiled":
        if w.operator is not None:
            return partial(w.operator.jactri, net, x, backend=backend)
        return partial(jactri.jacobian, net, x, per_sample=True, backend=backend)
    like = torch.zeros_like(x)
    if w.operator is not None:
        return partial(operators.compiled(w, net, like), x)
    return partial(jactri.compile(net, like, per_sample=True), x)
