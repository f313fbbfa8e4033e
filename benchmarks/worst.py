"""Where jactri may cost more than what people write without it: ``python -m benchmarks.worst [NAME ...]``.

Each input of `benchmarks.worst_cases` is computed by jactri, by a loop of backward passes, and by torch's own forward
mode or torch.func where they apply. Answers are held against float64 first. Then calls are timed interleaved; the peak
of memory, and the time of a first call at these sizes, are taken in fresh processes, in which the libraries are loaded,
the machine's rates are known (jactri measures them once a process, in 20 ms and 10 MB), and nothing else was computed.
Ratios are jactri to the others' fastest: above 1, jactri is worse. What takes longer than `SLOW` seconds is timed once.

A ``memory_limit`` counts from where the function has run, so the memory of that is taken off the peak. Exit status 1
if jactri was wrong or failed anywhere; never because of a time or a size.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from jactri._src.base import rates
from jactri._src.base.memory import MemoryLimitTooSmall, parse_bytes

from . import checks, compare, machine, memory, report, timing
from .naive import FORWARD, Given, Limit
from .record import Record
from .worst_cases import CASES, Case, select

NOISE = 4 << 20
"""Bytes that a process may grow by for reasons of its own: sizes below are taken for as large in ratios."""

SLOW = 2.0
"""Seconds of a call above which one is enough: the one whose answer is held against the truth."""

OVER = 1.2
"""How far above its limit a peak counts as kept."""


def contenders(given: Given, limit: Limit = None) -> dict[str, Callable[[], Tensor]]:
    """Calls by their names, jactri first."""
    return {"jactri": lambda: given.ours(limit), **given.peers}


def truth(case: Case, quick: bool) -> Tensor:
    """The answer in float64, by torch's forward mode or else by the first of the others."""
    peers = case.given(quick, torch.float64).peers
    return peers.get(FORWARD, next(iter(peers.values())))()


def alone(
    case: Case, name: str, limit: Limit, quick: bool, want: Tensor | None = None
) -> dict[str, Any]:
    """One contender's ("forward": the function's) first call in this process: seconds, and bytes above what it held.

    Its answer is held against `want`.
    """
    warnings.simplefilter("ignore")  # what is left on stderr, nobody meant
    rates.measured(torch.device("cpu"))
    first, given = case.given(quick=True), case.given(quick)
    for g in (first, given):
        call = {"forward": g.forward, **contenders(g, limit)}[name]
        if g is first:
            call()
    kept: list[Any] = []
    try:
        extra = machine.extra_peak(lambda: kept.extend(timing.once(call)))
    except MemoryLimitTooSmall as error:
        return {"refused": str(error)}
    if want is not None:
        checks.distance(kept[1], want, case.dtype)
    return {"seconds": kept[0], "peak_bytes": extra}


def in_subprocess(
    case: Case, name: str, limit: Limit, quick: bool, want: Tensor | None = None
) -> dict[str, Any]:
    """`alone` in a fresh process, and how many lines it wrote to stderr."""
    words = [case.name, "--alone", name, "--threads", str(torch.get_num_threads())]
    words += ["--quick"] * quick + ([f"--limit={limit}"] if limit else [])
    with tempfile.NamedTemporaryFile() as file:
        if want is not None:
            torch.save(want, file.name)
            words.append(f"--truth={file.name}")
        found, lines = memory.fresh("benchmarks.worst", *words)
    return {**found, "stderr_lines": len(lines)}


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """All that is to be known of one case."""
    quick, given = options.quick, case.given(options.quick)
    result: dict[str, Any] = {"case": case.name, "title": case.title, "quick": quick}
    facts, rejected = result["contenders"], result["rejected"] = {}, {}
    want, calls = truth(case, quick), contenders(given)
    for name, call in calls.items():
        try:
            seconds, answer = timing.once(call)
            error = checks.distance(answer, want, case.dtype)
            del answer
            if seconds <= SLOW or name == "jactri":  # whose first call plans
                seconds = timing.estimate(call)
            facts[name] = {"error": error, "estimate_s": seconds}
        except Exception as error:  # a contender that fails is reported and the rest goes on
            if options.traceback:
                raise
            rejected[name] = f"{type(error).__name__}: {str(error)[:200]}"
    if "jactri" not in facts or len(facts) == 1:
        return result
    estimates = {n: f["estimate_s"] for n, f in facts.items()}
    table = timing.interleave(
        {n: calls[n] for n in facts if estimates[n] <= SLOW},
        {n: s for n, s in estimates.items() if s <= SLOW},
        rounds=options.rounds, budget=options.budget, fewest=1, seed=options.seed,
    )  # fmt: skip
    for name in [n for n, s in estimates.items() if s > SLOW]:
        table.seconds[name] = {0: estimates[name]}
    for name, fact in facts.items():
        fact["seconds"] = asdict(table.spread(name))
    best = table.fastest([n for n in facts if n != "jactri"])
    result["peer"] = best
    result["ratio"] = asdict(table.ratio("jactri", best))
    if given.plan is not None:
        result["planned_bytes"] = int(given.plan().peak_bytes)
    if options.memory:
        result |= processes(case, best, quick, want)
    return result


def processes(case: Case, best: str, quick: bool, want: Tensor) -> dict[str, Any]:
    """Peaks and first calls, of jactri, of its best peer and of the function itself; and peaks under limits."""
    found = {n: in_subprocess(case, n, None, quick) for n in ("forward", "jactri", best)}
    result: dict[str, Any] = {"alone": found, "limits": {}}
    peaks = {n: f.get("peak_bytes") for n, f in found.items()}
    if None not in peaks.values():
        result["peak_ratio"] = max(peaks["jactri"], NOISE) / max(peaks[best], NOISE)
        result["first_ratio"] = found["jactri"]["seconds"] / found[best]["seconds"]
        result["above_forward_bytes"] = max(0, peaks["jactri"] - peaks["forward"])
        for limit in case.limits:
            result["limits"][limit] = under = in_subprocess(case, "jactri", limit, quick, want)
            if under.get("peak_bytes") is not None:
                under["above_forward_bytes"] = max(0, under["peak_bytes"] - peaks["forward"])
                allowed = OVER * parse_bytes(limit) + NOISE
                under["kept"] = under["above_forward_bytes"] <= allowed
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worst", description=__doc__)
    parser.add_argument(
        "cases", nargs="*", metavar="NAME", help='default: all; "function-": several'
    )
    parser.add_argument("--list", action="store_true", help="name the inputs and stop")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: whether it runs, not what it costs"
    )
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="no fresh processes"
    )
    parser.add_argument(
        "--alone", metavar="CONTENDER", help="its first call in this process, as one line of JSON"
    )
    parser.add_argument("--limit", help="with --alone jactri: its memory_limit")
    parser.add_argument("--truth", help="with --alone: a file of what its answer is held against")
    compare.add_options(parser, 5.0, "seconds of timing an input")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 1 if jactri was wrong or failed."""
    options = parse(arguments)
    if options.list:
        for case in CASES:
            print(f"{case.name:<22}{case.title}")
        return 0
    try:
        cases = select(options.cases)
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    if options.alone:
        torch.set_num_threads(options.threads or torch.get_num_threads())
        want = torch.load(options.truth) if options.truth else None
        print(json.dumps(alone(cases[0], options.alone, options.limit, options.quick, want)))
        return 0
    about = compare.start(options)
    record = Record(options.json, math.inf, kind="worst", machine=about)
    for case in cases:
        result = measure(case, options)
        record.add(result)
        for name, why in result["rejected"].items():
            print(f"NOT TIMED {case.name}, {name}: {why}", flush=True)
        if "jactri" in result["rejected"]:
            record.failed(case.name, result["rejected"]["jactri"])
        elif failed := [f["failed"] for f in _runs(result) if "failed" in f]:
            record.failed(case.name, failed[0])
        print(report.worst_row(result), flush=True)
    print(f"\n{report.table(record.data)}\n")
    return record.close()


def _runs(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [*result.get("alone", {}).values(), *result.get("limits", {}).values()]


if __name__ == "__main__":
    sys.exit(main())
