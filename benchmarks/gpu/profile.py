"""``profile``: which kernels a call of jactri spends its time in, and how many it launches."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

import jactri

from ..record import Record
from .device import Device
from .sizes import Sized, problem

CALLS = 5


def run(device: Device, record: Record, workloads: list[Sized], traces: Path | None) -> None:
    """Fill the record: for each workload its kernels by time, for one call."""
    record.data["tools"] = {
        name: shutil.which(name) is not None for name in ("ncu", "nsys", "proton")
    }
    activities = [ProfilerActivity.CPU]
    if device.name == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for size in workloads:
        if not record.has_time(f"profile {size.name}", 15):
            continue
        try:
            record.add(_profiled(device, size, activities, traces))
        except Exception as error:  # a workload may fail in any way: the others go on
            record.failed(f"profile {size.name}", error)
            continue
        found = record.data["results"][-1]
        print(
            f"{found['workload']}: {found['launches']:.0f} launches, {found['device_us']:.0f} us on the device a call"
        )
        for k in found["kernels"][:8]:
            print(f"  {k['us']:9.1f} us  {k['count']:6.1f} x  {k['name'][:100]}")


def _profiled(device: Device, size: Sized, activities, traces: Path | None) -> dict[str, Any]:
    net, x = problem(size.workload, device.device)

    w = size.workload

    def call():
        if w.operator is not None:
            w.operator.jactri(net, x)
        else:
            jactri.jacobian(net, x, per_sample=True)

    for _ in range(3):
        call()
    device.synchronize()
    with profile(activities=activities) as taken:
        for _ in range(CALLS):
            call()
        device.synchronize()
    on_device = device.name == "cuda"
    kernels = []
    for event in taken.key_averages():
        us = event.self_device_time_total if on_device else event.self_cpu_time_total
        if us > 0 and (not on_device or str(event.device_type).endswith("CUDA")):
            kernels.append({"name": event.key, "us": us / CALLS, "count": event.count / CALLS})
    kernels.sort(key=lambda k: -k["us"])
    if traces is not None:
        taken.export_chrome_trace(str(traces / f"{size.name}.trace.json"))
    return {
        "workload": size.name, "title": size.workload.title, "device_us": sum(k["us"] for k in kernels),
        "launches": sum(k["count"] for k in kernels), "kernels": kernels[:30],
    }  # fmt: skip
