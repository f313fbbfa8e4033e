"""Time against batch size, width and depth: ``python -m benchmarks.scaling [--axis batch]``.

The network is that of W1, a tanh MLP from 32 to 32, with one size changed at a time. Contenders are
checked and timed as in benchmarks.compare, on the CPU. Small points come first, and what the budget
has no time for is named; a last contender may run a little over it. Exit status 1 if jactri was
wrong or failed anywhere.
"""

from __future__ import annotations

import argparse
import sys
import time

from torch import nn

from . import compare, machine
from .record import Record
from .workloads import Workload, mlp

ENDS = 32
BASE = {"batch": 1024, "width": 256, "depth": 2}
AXES = {
    "batch": (1, 4, 16, 64, 256, 1024, 4096),
    "width": (32, 64, 128, 256, 512, 1024),
    "depth": (1, 2, 4, 8, 16),
}
WITHOUT = ("jactri out=",)  # the fresh answer is small here


def workload(batch: int, width: int, depth: int) -> Workload:
    """`depth` hidden layers of `width` units, on `batch` samples."""
    widths = (ENDS, *(width,) * depth, ENDS)
    return mlp(f"N{batch}-w{width}-d{depth}", "dynamics MLP", widths, nn.Tanh, samples=batch)


def points(axes: list[str]) -> list[dict[str, int]]:
    """The sizes to time, cheapest first, so that a short run has some of every axis."""
    found = [{**BASE, axis: size} for axis in axes for size in AXES[axis]]
    once = {tuple(p.values()): p for p in found}
    return sorted(once.values(), key=lambda p: workload(**p).flops)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--axis", choices=AXES, help="default: all")
    compare.add_options(parser, 600.0, "seconds of the whole run")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 1 if jactri was wrong or failed."""
    options = parse(arguments)
    axes = [options.axis] if options.axis else list(AXES)
    about = {"kind": "scaling", "command": "scaling", "machine": compare.start(options)}
    record = Record(options.json, options.budget, **about)
    record.data |= {"base": BASE, "axes": {a: AXES[a] for a in axes}}
    todo = points(axes)
    for k, point in enumerate(todo):
        w = workload(**point)
        if not record.has_time(w.name):
            continue
        until = time.perf_counter() + record.left / (len(todo) - k)
        result = compare.contend(w, options, machine.gemm_peak(), until, WITHOUT)
        record.add(point | result)
        compare.show(result)
        if "jactri" in result["rejected"]:
            record.failed(f"{w.name} jactri", result["rejected"]["jactri"])
    return record.close()


if __name__ == "__main__":
    sys.exit(main())
