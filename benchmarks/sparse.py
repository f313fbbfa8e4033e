"""Sparse Jacobians beside other tools for them: ``python -m benchmarks.sparse [NAME ...]``.

The reference problems of asdex and of SparseConnectivityTracer, and meshes, graphs, bundles and networks (see
`benchmarks.sparse_problems`), float64, each written once for torch and for JAX. `jactri.jacobian` in CSR form runs
beside asdex and sparsejac under jit, products of torch.func by colours, and its dense Jacobians where they fit; and
`jactri.compile` of the same, unless ``--no-compile``. What a function holds is a constant to jit, and may change here.

First, at small sizes, every answer is held against rows of autograd; then, at full size, every answer times random
vectors from either side against products of autograd. Then products (colours) and entries of the patterns are counted,
and calls timed interleaved in one process, planned and compiled before. Ratios are the time of the fastest of the
others to jactri's: above 1, jactri is faster. asdex and sparsejac are peers where they are installed (``pip install
asdex sparsejac``), and "-" where they are not. Exit status 1 if jactri was wrong or failed; never because of a time or
a count.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import compare, report, timing
from .checks import WrongResult
from .record import Record
from .sparse_peers import COMPILED, OURS, Coloured, Made, entries_of, missing, ours, peers, versions
from .sparse_problems import PROBLEMS, Problem, select

TOLERANCE = 1e-9
"""Largest error allowed, relative to the largest number of what it is held against."""

PROBES = 2
"""Random vectors from either side."""


def truth(problem: Problem) -> Tensor:
    """The dense matrix at small sizes, by rows of autograd."""
    function, x = problem.torch(quick=True)
    rows = torch.autograd.functional.jacobian(function, x)
    return rows.reshape(-1, x.numel())


def gap(found: Tensor, want: Tensor) -> float:
    """The largest error relative to the largest number. Raises `WrongResult`."""
    if found.shape != want.shape or found.dtype != want.dtype:
        raise WrongResult(
            f"{found.dtype} of shape {tuple(found.shape)}, not {want.dtype} of {tuple(want.shape)}"
        )
    error = ((found - want).abs().max() / want.abs().max()).item()
    if not error <= TOLERANCE:
        raise WrongResult(f"error {error:.1e} of the largest entry, {TOLERANCE:.0e} allowed")
    return error


class Probes:
    """Products of the Jacobian at full size with random vectors, by autograd."""

    def __init__(self, problem: Problem, quick: bool):
        function, x = problem.torch(quick)
        draw = torch.Generator().manual_seed(0)
        self.pairs = []
        for _ in range(PROBES):
            v = torch.randn(x.shape, generator=draw, dtype=x.dtype)
            y, jv = torch.func.jvp(function, (x,), (v,))
            u = torch.randn(y.shape, generator=draw, dtype=x.dtype)
            _, uj = torch.autograd.functional.vjp(function, x, u)
            self.pairs.append(tuple(t.reshape(-1, 1) for t in (v, jv, u, uj)))

    def error(self, matrix: Tensor) -> float:
        """Of a matrix, dense or sparse. Raises `WrongResult`."""
        if matrix.layout is torch.sparse_csr:
            matrix = matrix.to_sparse_coo()
        across = matrix.t()
        return max(max(gap(matrix @ v, jv), gap(across @ u, uj)) for v, jv, u, uj in self.pairs)


class Field:
    """The contenders of a problem: those that were right, what is known of them, and the rest."""

    def __init__(self, problem: Problem, quick: bool, traceback: bool):
        self.problem, self.quick, self.traceback = problem, quick, traceback
        self.want, self.probes = truth(problem), Probes(problem, quick)
        self.calls: dict[str, Callable[[], Any]] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.rejected: dict[str, str] = {}

    def add(self, name: str, small: Callable[[], Made], full: Callable[[], Made]) -> Any:
        """Check a contender at small sizes and at those that are timed; its answer there, or None."""
        try:
            made = small()
            gap(made.matrix(made.call()).to_dense(), self.want)
            planned, made = timing.once(full)
            first, answer = timing.once(made.call)
            error = self.probes.error(made.matrix(answer))
        except Exception as error:  # a contender that fails is reported and the rest goes on
            if self.traceback:
                raise
            text = str(error).strip().splitlines() or [""]
            self.rejected[name] = f"{type(error).__name__}: {text[0][:200]}"
            return None
        if name == OURS:  # whose first call plans, and was made
            first, planned = planned, max(0.0, planned - first)
        else:
            first += planned
        self.calls[name] = made.call
        self.facts[name] = {**made.facts, "plan_s": planned, "first_s": first, "error": error}
        self.facts[name]["estimate_s"] = timing.estimate(made.call)
        return answer


def contend(problem: Problem, options: argparse.Namespace) -> dict[str, Any]:
    """All that is to be known of one problem."""
    field = Field(problem, options.quick, options.traceback)
    result: dict[str, Any] = {
        "problem": problem.name, "title": problem.title, "quick": options.quick,
        "contenders": field.facts, "rejected": field.rejected, "left_out": {},
    }  # fmt: skip
    sizes = (True, options.quick)
    answer = field.add(OURS, *(partial(ours, problem, q) for q in sizes))
    if answer is None:
        return result
    patterns = entries_of(ours(problem, True).call()), entries_of(answer)
    result["shape"] = list(patterns[1].shape)
    coloured = [Coloured.of(p) for p in patterns]
    result["largest_first"] = coloured[1].count
    small, full = (
        peers(problem, q, p, c) for q, p, c in zip(sizes, patterns, coloured, strict=True)
    )
    for name, build in full.items():
        if name == COMPILED and not options.compile:
            continue
        if (reason := missing(name)) is not None:
            result["left_out"][name] = reason
        else:
            field.add(name, small[name], build)
    table = timing.interleave(
        field.calls, {n: f["estimate_s"] for n, f in field.facts.items()},
        rounds=options.rounds, budget=options.budget, seed=options.seed,
    )  # fmt: skip
    for name, fact in field.facts.items():
        fact["seconds"] = asdict(table.spread(name))
    own = [n for n in (OURS, COMPILED) if n in field.facts]
    others = [n for n in field.facts if n not in own]
    result["peer"] = best = table.fastest(others)
    result["ratios"] = {n: asdict(table.ratio(best, n)) for n in own} if best else {}
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__)
    parser.add_argument("problems", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--list", action="store_true", help="name the problems and stop")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: whether it runs, not what it costs"
    )
    compare.add_options(parser, 5.0, "seconds of timing a problem")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 1 if jactri was wrong or failed."""
    options = parse(arguments)
    if options.list:
        for problem in PROBLEMS:
            print(f"{problem.name:<22}{problem.title}")
        return 0
    try:
        problems = select(options.problems)
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    about = {**compare.start(options), **versions()}
    record = Record(options.json, math.inf, kind="sparse", machine=about)
    for problem in problems:
        result = contend(problem, options)
        record.add(result)
        for name, why in result["rejected"].items():
            print(f"NOT TIMED {problem.name}, {name}: {why}", flush=True)
        for name in (OURS, COMPILED):
            if name in result["rejected"]:
                record.failed(f"{problem.name}, {name}", result["rejected"][name])
        print(report.sparse_row(result), flush=True)
    print(f"\n{report.table(record.data)}\n")
    return record.close()


if __name__ == "__main__":
    sys.exit(main())
