"""Time jactri and its peers side by side: ``python -m benchmarks.compare [W1 W2 ...]``.

Every contender's result is held against float64 first; a wrong one is named and not timed.
The ratio is "best torch peer / jactri", taken within rounds. Exit status 1 if jactri was wrong
or failed anywhere; never because of a time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import checks, machine, memory, timing
from .peers import Peer, compiled, contender, peers_of, to_compile
from .workloads import ALL, LARGE, Workload, select, truth

ROW = "  {:<28}{:>11}{:>11}{:>11}{:>7}{:>10}{:>8}{:>10}{:>10}"
HEAD = ("", "median ms", "p20", "p80", "rounds", "GFLOP/s", "peak", "error", "first ms")
COUNTED = ("torch", "compiled")  # whom "best torch peer" is chosen from


def prepare(workload: Workload, peer: Peer) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Build a contender, check its result, and time its first and a later call."""
    call = contender(workload, peer)
    first, result = timing.once(call)
    facts: dict[str, Any] = {"kind": peer.kind, "first_call_s": first}
    if peer.kind != "reference":
        facts["error"] = checks.error_of(workload, result)
    del result
    facts["estimate_s"] = timing.estimate(call)
    return call, facts


@dataclass
class Field:
    """The contenders of a workload: those that may be timed, what is known of them, and the rest."""

    workload: Workload
    left_out: dict[str, str]
    until: float = math.inf
    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)

    @property
    def estimates(self) -> dict[str, float]:
        """Seconds a call, by the first few."""
        return {n: f["estimate_s"] for n, f in self.facts.items()}

    def add(self, peer: Peer, traceback: bool) -> None:
        """Check a contender. From the second on, there must be time left for those before it."""
        left = self.until - time.perf_counter()
        if self.calls and timing.least_seconds(self.estimates) > left:
            self.left_out[peer.name] = "no time left"
            return
        try:
            self.calls[peer.name], self.facts[peer.name] = prepare(self.workload, peer)
        except Exception as error:  # a contender that fails is reported and the rest goes on
            if traceback:
                raise
            text = str(error).strip().splitlines() or [""]
            self.rejected[peer.name] = f"{type(error).__name__}: {text[0][:200]}"


def contend(
    workload: Workload,
    options: argparse.Namespace,
    peak: machine.Peak,
    until: float = math.inf,
    without: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Check and time all contenders of one workload; return everything that is known.

    Timing ends at `until`, on the clock of `time.perf_counter`, if `options.budget` lasts longer.
    """
    peers, left_out = peers_of(workload)
    peers = [p for p in peers if p.name not in without and (options.compile or not p.built)]
    entered = Field(workload, left_out, until)
    calls, facts, rejected = entered.calls, entered.facts, entered.rejected
    for peer in peers:
        entered.add(peer, options.traceback)
    chosen = to_compile(workload, entered.estimates) if options.compile else None
    if chosen is not None:
        entered.add(compiled(chosen), options.traceback)
    result: dict[str, Any] = {
        "workload": workload.name,
        "title": workload.title,
        "shape": workload.shape,
        "least_flops": workload.flops,
        "least_bytes": workload.bytes,
        "answer_bytes": workload.answer_bytes,
        "left_out": left_out,
        "rejected": rejected,
        "contenders": facts,
    }
    truth.cache_clear()  # up to 800 MB that timing does not need
    if not calls:
        return result
    table = timing.interleave(
        calls,
        entered.estimates,
        rounds=options.rounds,
        budget=min(options.budget, until - time.perf_counter()),
        fewest=timing.FEWEST_ROUNDS if until == math.inf else 1,
        between=peak.sample,
        seed=options.seed,
    )
    for name, fact in facts.items():
        spread = table.spread(name)
        fact["seconds"] = asdict(spread)
        fact["samples_s"] = list(table.seconds[name].values())
        fact["loops"] = table.loops[name]
        if fact["kind"] != "reference":
            fact["gflops_per_s"] = workload.flops / spread.median / 1e9
            fact["gbytes_per_s"] = workload.bytes / spread.median / 1e9
            fact["share_of_peak"] = workload.flops / spread.median / peak.flops
    result["gemm_peak"] = {"by": peak.by, "gflops_per_s": peak.flops / 1e9}
    result["copy_peak"] = {"gbytes_per_s": machine.copy_rate() / 1e9}
    if "jactri" in calls:
        result["ratios"] = ratios(workload, table, facts)
    if workload.name == "overhead":
        forward = "forward pass"
        result["above_forward_s"] = {
            n: asdict(table.paired(n, forward, lambda a, b: a - b))
            for n in calls
            if n != forward and forward in calls
        }
    if workload.measures_memory and options.memory:
        kinds = [p for p in peers if p.name in calls]
        result["memory"] = {p.name: memory.in_subprocess(workload, p) for p in kinds}
    return result


def ratios(w: Workload, table: timing.Rounds, facts: dict[str, Any]) -> dict[str, Any]:
    """jactri against the best of each kind of contender, and against the goal's peer."""

    def against(name: str | None, by: str = "jactri") -> dict[str, Any] | None:
        return name and {"peer": name, "by": by, **asdict(table.ratio(name, by))}

    def best(*kinds: str) -> str | None:
        return table.fastest([n for n, f in facts.items() if f["kind"] in kinds])

    found = {
        "best torch peer": against(best(*COUNTED)),
        "best uncompiled": against(best("torch")),
        "best compiled": against(best("compiled")),
        "expert": against(best("expert")),
        "jax": against(best("jax")),
        "forward pass": against("forward pass" if "forward pass" in facts else None),
    }
    for kind in ("best uncompiled", "best compiled"):
        if found[kind] == found["best torch peer"]:
            found[kind] = None
    for name, how in (
        ("jactri out=", "into out="),
        ("jactri compile", "compiled"),
        ("jactri compile out=", "compiled, into out="),
        ("jactri aot", "aot"),
        ("jactri aot out=", "aot, into out="),
    ):
        if name in facts:
            found[f"best torch peer, {how}"] = against(best(*COUNTED), name)
    if w.goal:
        name = best(*COUNTED) if w.goal.peer == "best" else w.goal.peer
        if name in facts:
            found["goal"] = {**(against(name) or {}), "goal": w.goal.ratio}
    return {k: v for k, v in found.items() if v}


def show(result: dict[str, Any]) -> None:
    """Print one workload's outcome."""
    shape = " x ".join(map(str, result["shape"]))
    print(f"\n{result['workload']}: {result['title']}")
    print(
        f"  J {shape}; least work {result['least_flops'] / 1e9:.3g} GFLOP, "
        f"{result['least_bytes'] / 1e6:.3g} MB",
        end="",
    )
    if "gemm_peak" in result:
        peak = result["gemm_peak"]
        print(
            f"; GEMM peak {peak['gflops_per_s']:.0f} GFLOP/s ({peak['by']}), "
            f"copy {result['copy_peak']['gbytes_per_s']:.3g} GB/s"
        )
        print(ROW.format(*HEAD))
    timed = {n: f for n, f in result["contenders"].items() if "seconds" in f}
    for name, fact in sorted(timed.items(), key=lambda item: item[1]["seconds"]["median"]):
        s = fact["seconds"]
        times = [f"{1e3 * s[k]:.4g}" for k in ("median", "p20", "p80")]
        rate = share = error = "-"
        if "error" in fact:
            rate, share = f"{fact['gflops_per_s']:.4g}", f"{fact['share_of_peak']:.0%}"
            error = f"{fact['error']:.1e}"
        first = f"{1e3 * fact['first_call_s']:.4g}"
        print(ROW.format(name, *times, s["count"], rate, share, error, first))
    for name, reason in result["rejected"].items():
        print(f"  NOT TIMED {name}: {reason}")
    for name, reason in result["left_out"].items():
        print(f"  left out {name}: {reason}")
    for key, r in result.get("ratios", {}).items():
        goal = f"; goal: at least {r['goal']:.3g}" if "goal" in r else ""
        print(
            f"  {key + ':':<28}{r['peer']} / {r['by']} = {r['median']:.2f}  (p20 {r['p20']:.2f}, "
            f"p80 {r['p80']:.2f}, {r['count']} paired rounds){goal}"
        )
    for name, s in result.get("above_forward_s", {}).items():
        us = [f"{1e6 * s[k]:.1f}" for k in ("median", "p20", "p80")]
        print(f"  above the forward pass: {name} {us[0]} us  (p20 {us[1]}, p80 {us[2]})")
    for name, m in result.get("memory", {}).items():
        if m.get("extra_peak_bytes") is None:
            print(f"  extra peak memory: {name} not measured {m.get('failed', '')}")
        else:
            mib = m["extra_peak_bytes"] / 2**20
            print(f"  extra peak memory: {name} {mib:.1f} MiB = {m['of_answer']:.2f} answers")
    sys.stdout.flush()


def count(text: str) -> int:
    """A number of things on a command line: 1 or more."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _file(text: str) -> Path:
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder")
    return Path(text)


def add_options(
    parser: argparse.ArgumentParser, budget: float, meaning: str, rounds: int = 21
) -> None:
    """What every command that times has."""
    parser.add_argument("--rounds", type=count, default=rounds, help=f"default: {rounds}")
    parser.add_argument(
        "--budget", type=_seconds, default=budget, help=f"{meaning}; default: {budget:g}"
    )
    parser.add_argument("--threads", type=count, help="default: torch's own choice")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--json", type=_file, metavar="FILE", help="write everything there")
    parser.add_argument("--seed", type=int, default=0, help="of the order of contenders")
    parser.add_argument("--traceback", action="store_true", help="stop at a failing contender")


def start(options: argparse.Namespace) -> dict[str, Any]:
    """Set threads, print and return what the run is taken on."""
    if options.threads:
        torch.set_num_threads(options.threads)
        if options.threads == 1 and "jax" not in sys.modules:
            os.environ["XLA_FLAGS"] = (
                os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
            )
    warnings.simplefilter("ignore")
    about = machine.description()
    print(", ".join(f"{k} {v}" for k, v in about.items() if v is not None), flush=True)
    return about


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="default: all")
    parser.add_argument("--list", action="store_true", help="name the workloads and stop")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    add_options(parser, 60.0, "seconds of timing a workload")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 1 if jactri itself was wrong or failed."""
    options = parse(arguments)
    if options.list:
        for w in (*ALL, *LARGE):
            print(f"{w.name:<12}{w.title}")
        return 0
    try:
        workloads = select(options.workloads)
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
        return 2
    about = start(options)
    results = []
    for workload in workloads:
        results.append(contend(workload, options, machine.gemm_peak()))
        show(results[-1])
        if options.json:  # after every workload: a run that is cut short keeps what it has
            options.json.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"machine": about, "results": results}, indent=1)
            options.json.write_text(text + "\n")
    wrong = [r["workload"] for r in results if any(n.startswith("jactri") for n in r["rejected"])]
    if wrong:
        print(f"\njactri was wrong or failed on: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
