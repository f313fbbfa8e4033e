"""Checks, timings and peak memory of one workload, for jactri and for torch's own ways."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import jactri

Jacobian = Callable[[], torch.Tensor]

# Relative to the largest entry; float32 rounding through the demo's networks stays 10 times below it.
TOLERANCE = 1e-4


PACKAGES = ("jactri", "torch.autograd.functional", "torch.func")
"""What the ways of `contenders` belong to: the first word of their names."""


class DemoFailure(RuntimeError):
    """A result of the demo was wrong, so that nothing may be said about its speed."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network and the batch at which its per-sample Jacobian (N, *out, *in) is wanted."""

    name: str
    net: nn.Module
    inputs: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the demo's table; ``ms`` and ``mib`` are of the fastest way of each of `PACKAGES`."""

    name: str
    shape: tuple[int, ...]
    error: float
    ms: dict[str, float]  # medians
    mib: dict[str, float]

    @property
    def peer(self) -> str:
        """The faster of torch's two packages."""
        return min(PACKAGES[1:], key=self.ms.__getitem__)

    @property
    def speedup(self) -> float:
        """How many times faster jactri is than the better of torch's two packages."""
        return self.ms[self.peer] / self.ms["jactri"]


def contenders(work: Workload) -> dict[str, Jacobian]:
    """Every way to get the same (N, *out, *in), by name; jactri comes first."""
    net, x = work.net, work.inputs

    def of_sum(vectorize: bool) -> torch.Tensor:
        # The usual trick: no sample reaches another's output, so the sum's rows hold every sample's Jacobian.
        rows = torch.autograd.functional.jacobian(
            lambda batch: net(batch).sum(0), x, vectorize=vectorize
        )
        return rows.movedim(-x.dim(), 0)

    def of_sample(transform: Callable[..., Callable[..., torch.Tensor]]) -> torch.Tensor:
        return torch.vmap(transform(lambda sample: net(sample.unsqueeze(0)).squeeze(0)))(x)

    return {
        "jactri": lambda: jactri.jacobian(net, x, per_sample=True),
        "torch.autograd.functional loop": lambda: of_sum(False),
        "torch.autograd.functional vectorize": lambda: of_sum(True),
        "torch.func jacrev": lambda: of_sample(torch.func.jacrev),
        "torch.func jacfwd": lambda: of_sample(torch.func.jacfwd),
    }


def relative_difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, in units of the largest wanted entry; infinite where a NaN hides."""
    worst = (got.double() - want.double()).abs().max() / want.double().abs().max()
    return worst.item() if torch.isfinite(worst) else math.inf


def float64_error(work: Workload, result: torch.Tensor, picks: torch.Tensor) -> float:
    """How far the picked samples of ``result`` are from float64 autograd, taken one sample at a time."""
    net = copy.deepcopy(work.net).double()
    truth = [
        torch.autograd.functional.jacobian(
            lambda sample: net(sample.unsqueeze(0)).squeeze(0), sample
        )
        for sample in work.inputs[picks].double()
    ]
    return relative_difference(result[picks], torch.stack(truth))


def package(name: str) -> str:
    """The package that a way of `contenders` belongs to; a column of the table is its fastest way."""
    return name.split(" ")[0]


def interleaved_medians(
    ways: dict[str, Jacobian], budget_s: float, rounds: tuple[int, int], tick: Callable[[], None]
) -> dict[str, float]:
    """Median milliseconds of each way, run in turn so that a slow moment of the machine hits all.

    ``rounds`` bounds the number of turns; between the bounds, ``budget_s`` decides. A way that two
    turns showed to be three times slower than another of its package takes no further turns. Every
    way must have been called before, its warm-up. ``tick`` is called between turns, untimed.
    """
    seen: dict[str, list[float]] = {name: [] for name in ways}
    running = dict(ways)
    begun = time.perf_counter()
    turn = 0
    while turn < rounds[0] or (turn < rounds[1] and time.perf_counter() - begun < budget_s):
        for name, way in running.items():
            start = time.perf_counter()
            way()
            seen[name].append(1e3 * (time.perf_counter() - start))
        turn += 1
        if turn == 2:
            best: dict[str, float] = {}
            for name, times in seen.items():
                best[package(name)] = min(best.get(package(name), math.inf), *times)
            running = {n: way for n, way in ways.items() if min(seen[n]) < 3 * best[package(n)]}
        tick()
    return {name: statistics.median(times) for name, times in seen.items()}


def peak_mib(way: Jacobian) -> float:
    """The most memory that torch's CPU allocator held at once during one call, above what it held before it.

    The profiler reports each allocation and release with its size, so the figure is exact and repeatable; scratch
    memory that a BLAS library takes for itself is not in it.
    """
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # else the profiler writes to stderr at each start
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = way()
    del kept
    # The public event list folds these into their operators; the raw one keeps them in order.
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def measure(
    work: Workload,
    picks: torch.Tensor,
    budget_s: float,
    rounds: tuple[int, int],
    tick: Callable[[], None],
) -> tuple[Row, torch.Tensor]:
    """One line of the table and jactri's Jacobian; checked first, against float64 and against every other way.

    Raises:
        DemoFailure: a result is further away than ``TOLERANCE``.
    """
    ways = contenders(work)
    ours = ways["jactri"]()
    error = float64_error(work, ours, picks)
    if error > TOLERANCE:
        raise DemoFailure(
            f"{work.name}: jactri is {error:.1e} from float64 autograd, allowed {TOLERANCE:.0e}"
        )
    for name, way in ways.items():
        if (difference := relative_difference(way(), ours)) > TOLERANCE:
            raise DemoFailure(
                f"{work.name}: {name} is {difference:.1e} from jactri, allowed {TOLERANCE:.0e}"
            )
    times = interleaved_medians(ways, budget_s, rounds, tick)
    fastest = {
        wanted: min((name for name in times if package(name) == wanted), key=times.__getitem__)
        for wanted in PACKAGES
    }
    row = Row(
        name=work.name,
        shape=tuple(ours.shape),
        error=error,
        ms={name: times[way] for name, way in fastest.items()},
        mib={name: peak_mib(ways[way]) for name, way in fastest.items()},
    )
    return row, ours
