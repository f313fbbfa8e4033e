"""Interleaved timing: all contenders of a workload in one process, in a new order each round.

A machine's speed drifts (clock, neighbours, heat). Contenders timed one after another would each
see different weather; in a round they all see the same, so ratios are taken within rounds.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# A sample shorter than this is repeated: the clock and the loop would count in it.
SHORTEST = 0.005
# A contender this many times slower than the fastest is sampled in a few rounds only,
# and in one round only where a few would take more than this share of the budget.
SLOW = 6.0
SLOW_ROUNDS = 5
SLOW_SHARE = 0.1
FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Spread:
    """Median and the 20th and 80th percentile of some samples."""

    median: float
    p20: float
    p80: float
    count: int

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        """Summarise samples."""
        p20, median, p80 = (float(v) for v in np.percentile(samples, (20, 50, 80)))
        return cls(median, p20, p80, len(samples))


@dataclass
class Rounds:
    """Seconds a call, per contender and round."""

    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    loops: dict[str, int] = field(default_factory=dict)

    def spread(self, name: str) -> Spread:
        """The spread of one contender."""
        return Spread.of(list(self.seconds[name].values()))

    def paired(self, one: str, other: str, combine: Callable[[float, float], float]) -> Spread:
        """The spread of a function of two contenders' times in the same round."""
        a, b = self.seconds[one], self.seconds[other]
        return Spread.of([combine(a[r], b[r]) for r in sorted(a.keys() & b.keys())])

    def ratio(self, slow: str, fast: str) -> Spread:
        """How many times as long `slow` takes."""
        return self.paired(slow, fast, lambda a, b: a / b)

    def fastest(self, names: list[str]) -> str | None:
        """The contender with the lowest median."""
        return min(names, key=lambda n: self.spread(n).median, default=None)


def once(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def estimate(call: Callable[[], Any], calls: int = 5, budget: float = 0.2) -> float:
    """Seconds of the fastest of a few calls: one alone may have had to wait for a neighbour."""
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < calls and sum(seconds) < budget):
        seconds.append(once(call)[0])
    return min(seconds)


def least_seconds(estimates: dict[str, float]) -> float:
    """What it takes to time contenders at all: few rounds, and slow ones in one of them."""
    slow = SLOW * min(estimates.values(), default=0.0)
    return sum(2 * s * (1 if s > slow else FEWEST_ROUNDS) for s in estimates.values())


def interleave(
    calls: dict[str, Callable[[], Any]],
    estimate: dict[str, float],
    *,
    rounds: int,
    budget: float,
    fewest: int = FEWEST_ROUNDS,
    between: Callable[[], Any] = lambda: None,
    seed: int = 0,
) -> Rounds:
    """Time the calls in rounds, each round in a new order, for `budget` seconds or `fewest` rounds.

    `estimate` (seconds a call) sets the inner loops; `between` runs once a round, untimed.
    Each sample follows an untimed call of the same contender.
    """
    order = random.Random(seed)
    table = Rounds(
        {name: {} for name in calls},
        {name: max(1, min(2000, int(SHORTEST / max(estimate[name], 1e-7)))) for name in calls},
    )
    limit = dict.fromkeys(calls, rounds)
    for name in calls:
        if estimate[name] > SLOW * min(estimate.values()):
            fits = int(SLOW_SHARE * budget / (2 * estimate[name]))
            limit[name] = min(rounds, max(1, min(SLOW_ROUNDS, fits)))
    stop = time.perf_counter() + budget
    collecting = gc.isenabled()
    try:
        for r in range(rounds):
            if r >= fewest and time.perf_counter() > stop:
                break
            between()
            names = [n for n in calls if r < limit[n]]
            order.shuffle(names)
            gc.collect()
            gc.disable()
            for name in names:
                call, loops = calls[name], table.loops[name]
                call()  # the one before left its own data in the caches, and its holes in the heap
                start = time.perf_counter()
                for _ in range(loops):
                    call()
                table.seconds[name][r] = (time.perf_counter() - start) / loops
            gc.enable()
    finally:
        if collecting:
            gc.enable()
        else:
            gc.disable()
    return table
