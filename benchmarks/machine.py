"""What the numbers were taken on: versions, the GEMM peak, and how much memory a call takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import peers_jax

ROOT = Path(__file__).resolve().parent.parent


def git(*args: str) -> str:
    """A git command's output in the checkout, or "" where there is none."""
    try:
        done = subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cpu() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def description() -> dict[str, Any]:
    """Versions, processor, threads and commit; nothing that names the machine."""
    import jactri

    commit = git("rev-parse", "HEAD")
    return {
        "commit": commit or None,
        "uncommitted_changes": bool(git("status", "--porcelain")) if commit else None,
        "jactri": getattr(jactri, "__version__", None),
        "torch": torch.__version__,
        "jax": peers_jax.version(),
        "python": platform.python_version(),
        "system": platform.system(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": time.strftime("%Y-%m-%d"),
    }


@dataclass
class Peak:
    """The machine's float32 GEMM rate at 2048^3: `torch.mm` or oneDNN, whichever is faster."""

    by: str
    run: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)

    SIZE = 2048

    def sample(self) -> float:
        """Time one product, remember it, return seconds."""
        start = time.perf_counter()
        self.run()
        self.seconds.append(time.perf_counter() - start)
        return self.seconds[-1]

    @property
    def flops(self) -> float:
        """Flops a second, by the median of all samples so far."""
        return 2 * self.SIZE**3 / statistics.median(self.seconds)


def gemm_peak(samples: int = 5) -> Peak:
    """Measure both libraries and keep the faster one."""
    a, b = torch.randn(Peak.SIZE, Peak.SIZE), torch.randn(Peak.SIZE, Peak.SIZE)
    out = torch.empty(Peak.SIZE, Peak.SIZE)
    peaks = [Peak("torch.mm", lambda: torch.mm(a, b, out=out))]
    pointwise = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if pointwise is not None and torch.backends.mkldnn.is_available():
        peaks.append(Peak("oneDNN", lambda: pointwise(a, b, None, "none", [], "")))
    for peak in peaks:
        for _ in range(samples + 1):
            peak.sample()
        del peak.seconds[0]
    return min(peaks, key=lambda p: statistics.median(p.seconds))


COPIED = 1 << 28


def copy_rate(samples: int = 7) -> float:
    """Bytes a second, read and written, of copying a buffer that is larger than caches are."""
    source, target = torch.ones(2, COPIED // 4)
    seconds = []
    for _ in range(samples + 1):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * COPIED / statistics.median(seconds[1:])


@dataclass(frozen=True)
class Roof:
    """What a machine can do: flops a second in products, by what, and bytes a second copied."""

    flops: float
    by: str
    copied: float

    def least_seconds(self, flops: int, size: int) -> float:
        """The time below which so many flops and bytes cannot be done."""
        return max(flops / self.flops, size / self.copied)


def roof() -> Roof:
    """Measure the CPU's."""
    peak = gemm_peak()
    return Roof(peak.flops, peak.by, copy_rate())


def _status(key: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def extra_peak(call: Callable[[], Any]) -> int | None:
    """Bytes by which a call raises the process above what it holds before; None if unknown.

    The result counts. Whatever the call reuses from earlier calls does not.
    """
    gc.collect()
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        result = call()
        peak = _status("VmHWM")
    except OSError:
        return None
    del result
    return max(0, peak - before)
