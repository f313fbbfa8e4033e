"""How fast a device multiplies and moves data: what the planner turns flops and bytes into seconds with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from . import backends
from .tracing import aside


@dataclass(frozen=True)
class Rates:
    """Flops a second of float32 products, bytes a second of a copy (read and written), seconds a step."""

    flops: float
    bandwidth: float
    step: float

    def seconds(self, flops: float, moved: float, steps: int = 0) -> float:
        """Predicted time of so many flops and bytes, read or written, in so many steps one after the other."""
        return flops / self.flops + moved / self.bandwidth + self.step * steps


ROUGH = {"cpu": Rates(1e11, 1e10, 4e-6), "cuda": Rates(5e13, 2e12, 8e-6)}
"""Orders of magnitude by device type: enough where one plan is far better than the others."""


BLOCK_BYTES = 1 << 27
"""On a GPU blocks are not cut for a cache, but to about this size: it takes 40 us to move, ten launches."""


def block_bytes(device_type: str, in_cache: int) -> int:
    """To about how many bytes the blocks of a sweep are cut; ``in_cache``: where a core's cache decides, on a CPU."""
    return in_cache if device_type == "cpu" else BLOCK_BYTES


def rough(device_type: str) -> Rates:
    """What is assumed of a kind of device before anything is measured."""
    return ROUGH.get(device_type, ROUGH["cpu"])


@cache
def measured(device: torch.device) -> Rates:
    """The rates of a device, measured once a process (CPU: 20 ms), with torch's precision settings of that moment."""
    guess = rough(device.type)
    if device.type not in ROUGH:
        return guess
    n = 512 if device.type == "cpu" else 4096
    with aside(), torch.inference_mode(False), torch.no_grad():
        a = b = torch.ones(n, n, device=device)
        product = _median(lambda: backends.product(a, b, True), device)
        call = _median(lambda: a[:4, :4] * 2.0, device)
        # the first are given back: little is to be taken at once
        a, b = torch.ones(2, taken(device.type) >> 3, device=device)
        copy = _median(lambda: a.copy_(b), device)
    return Rates(2.0 * n**3 / product, 2 * a.nbytes / copy, max(call, guess.step / 2))


def taken(device_type: str) -> int:
    """The bytes that `measured` takes of a device the first time."""
    return 1 << 23 if device_type == "cpu" else 1 << 29


def _median(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the median of five after a warm-up."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[2]
