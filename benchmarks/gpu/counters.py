"""What bounds each kernel of a call, by the hardware's counters (Nsight Compute).

The workload runs in a process of its own under ``ncu``, which repeats every kernel until all counters are read; the
clocks are left as they are. A kernel is said to be bound by what is used most: memory, tensor pipe, L2, or issue
slots; where none is used by half, by its occupancy, or by latency where that is high.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from typing import Any

import torch

from ..machine import ROOT
from ..record import Record
from .device import precision
from .sizes import Sized, problem

METRICS = {
    "us": "gpu__time_duration.sum",
    "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor pipe": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "issue": "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
USES = ("memory", "L2", "tensor pipe", "issue")
HALF, LOW = 50.0, 25.0
MOST = 200
"""Launches a call of which the counters are read."""
WARM_UP = 3


def run(record: Record, size: Sized, shrink: int, setting: str = "ieee") -> None:
    """A workload's kernels by time, with what bounds them."""
    found = _profiled(shutil.which("ncu") or "ncu", size.name, setting, shrink, record.left)
    record.data["line"] = "; ".join(map(line, found[:2]))
    record.add({"workload": size.name, "setting": setting, "kernels": found})


def line(k: dict[str, Any]) -> str:
    """A kernel in a line of text."""
    uses = ", ".join(f"{u} {k[u]:.0f}%" for u in (*USES, "occupancy") if k.get(u) is not None)
    return f"{k['name'][:40]} {k['us']:.1f} us, {k['count']} x, bound by {k['bound by']} ({uses})"


def _profiled(
    ncu: str, name: str, setting: str, shrink: int, seconds: float
) -> list[dict[str, Any]]:
    """The kernels of one call. A counter that this card does not know is left out."""
    metrics = dict(METRICS)
    while True:
        command = [
            ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
            "--profile-from-start", "off", "--launch-count", str(MOST), "--metrics", ",".join(metrics.values()),
            sys.executable, "-m", "benchmarks.gpu.counters", name, setting, str(shrink),
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 1)
        )
        text = done.stdout + done.stderr
        unknown = [
            k for k, m in metrics.items() if re.search(rf"find metric.*{re.escape(m)}", text)
        ]
        if not unknown:
            break
        for k in unknown:
            del metrics[k]
    if done.returncode:
        raise ValueError(f"ncu ended with {done.returncode}: {text[-1500:]}")
    return kernels(done.stdout, metrics)


def kernels(text: str, metrics: dict[str, str]) -> list[dict[str, Any]]:
    """What ``ncu --csv --page raw`` printed, a row a kernel: launches of one name added up, the longest first.

    Times add up; uses are means over the time; ``us`` is microseconds. Raises ValueError where there is no table.
    """
    lines = text.splitlines()
    head = next((i for i, t in enumerate(lines) if t.startswith('"ID"')), None)
    if head is None:
        raise ValueError(f"no table in what ncu printed: {text[-1500:]}")
    found: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[head:]):
        if not row["ID"]:  # the row of units
            continue
        values = {k: _number(row.get(m)) for k, m in metrics.items()}
        us = (values.pop("us", None) or 0.0) / 1e3  # of nanoseconds
        sums = found.setdefault(row["Kernel Name"], {"us": 0.0, "count": 0, "sums": {}})
        sums["us"] += us
        sums["count"] += 1
        for k, v in values.items():
            if v is not None:
                sums["sums"][k] = sums["sums"].get(k, 0.0) + us * v
    result = []
    for name, s in found.items():
        means = {k: v / s["us"] for k, v in s["sums"].items()} if s["us"] else {}
        entry = {"name": name, "us": s["us"], "count": s["count"], **means}
        result.append({**entry, "bound by": bound_by(entry)})
    return sorted(result, key=lambda k: -k["us"])


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:  # a counter that was not read
        return None


def bound_by(kernel: dict[str, Any]) -> str:
    """What a kernel uses most, or what keeps it from using anything by half."""
    uses = {u: kernel[u] for u in USES if u in kernel}
    most = max(uses, key=uses.get, default=None)
    if most is not None and uses[most] >= HALF:
        return most
    return "occupancy" if kernel.get("occupancy", 100.0) < LOW else "latency"


def main(arguments: list[str]) -> None:
    """One call of a workload, after some that are not looked at: what runs under ncu."""
    from .bench import own
    from .device import Cuda
    from .sizes import sized

    name, setting, shrink = arguments
    device = Cuda()
    (size,) = [s for s in sized([name], int(shrink)) if s.name == name]
    net, x = problem(size.workload, device.device)
    call = own("auto").make(size.workload, net)
    with precision(setting):
        for _ in range(WARM_UP):
            call(x)
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile():
            call(x)
            torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
