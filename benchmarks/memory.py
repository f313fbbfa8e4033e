"""Peak memory of one contender in a process of its own.

``python -m benchmarks.memory WORKLOAD CONTENDER`` prints one line of JSON. The process is warmed
up on two samples, so that libraries and thread pools are there but no workspace of the full size
is; then the full call's peak is read, and its result checked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from . import checks, machine
from .peers import Peer, peers_of
from .workloads import Workload, problem, select


def measure(workload: Workload, peer: Peer) -> dict[str, Any]:
    """Extra peak bytes of one call, and that over the answer's bytes."""
    net, x = problem(workload)
    call = peer.make(workload, net)
    call(x[:2])
    kept: list[Any] = []
    extra = machine.extra_peak(lambda: kept.append(call(x)))
    error = checks.error_of(workload, kept.pop())
    return {
        "extra_peak_bytes": extra,
        "of_answer": None if extra is None else extra / workload.answer_bytes,
        "error": error,
    }


def in_subprocess(workload: Workload, peer: Peer, timeout: float = 600) -> dict[str, Any]:
    """`measure` in a fresh process."""
    threads = str(torch.get_num_threads())
    return fresh("benchmarks.memory", workload.name, peer.name, threads, timeout=timeout)[0]


def fresh(module: str, *words: str, timeout: float = 600) -> tuple[dict[str, Any], list[str]]:
    """What ``python -m module words`` found, its last line; and what stands on its stderr."""
    command = [sys.executable, "-m", module, *words]
    try:
        done = subprocess.run(
            command, cwd=machine.ROOT, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {timeout:.0f} s"}, []
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode:
        return {"failed": (lines or [f"exit status {done.returncode}"])[-1]}, lines
    return json.loads(done.stdout.splitlines()[-1]), lines


def main(arguments: list[str]) -> None:
    """Measure what the command line names."""
    name, peer_name, *threads = arguments
    if threads:
        torch.set_num_threads(int(threads[0]))
    workload = select([name])[0]
    peer = next(p for p in peers_of(workload)[0] if p.name == peer_name)
    print(json.dumps(measure(workload, peer)))


if __name__ == "__main__":
    main(sys.argv[1:])
