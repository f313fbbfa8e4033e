"""Everything that touches the device: clocks, caches, graphs, memory, and what the card can do.

`Cpu` answers the same questions on a machine without a GPU, so that the command itself can be tried anywhere.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from jactri.kernels import support

from ..machine import git

SETTINGS = ("ieee", "tf32")


@contextlib.contextmanager
def precision(setting: str) -> Iterator[None]:
    """float32 products and convolutions at this precision, as torch's own switches say it."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [s.fp32_precision for s in switches]
    for s in switches:
        s.fp32_precision = setting
    try:
        yield
    finally:
        for s, old in zip(switches, before, strict=True):
            s.fp32_precision = old


def versions() -> dict[str, Any]:
    """Versions, commit and date; nothing that names the machine."""
    import jactri

    try:
        import triton

        has = triton.__version__
    except ImportError:
        has = None
    commit = git("rev-parse", "HEAD")
    return {
        "commit": commit or None,
        "uncommitted_changes": bool(git("status", "--porcelain")) if commit else None,
        "jactri": jactri.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": has,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def there() -> bool:
    """Whether torch sees a CUDA device; none is begun to be used."""
    return torch.cuda.is_available()


def asked(field: str) -> str | None:
    """What nvidia-smi says of the first card, which nobody needs to use for it; None where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.splitlines() or [None])[0]


class Cuda:
    """A CUDA device."""

    name = "cuda"
    backends = ("auto", "torch", "triton")
    device = torch.device("cuda")

    def __init__(self) -> None:
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device=self.device)

    def describe(self) -> dict[str, Any]:
        """Name, capability, memory and driver."""
        p = torch.cuda.get_device_properties(0)
        return {
            "device": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1),
            "multiprocessors": p.multi_processor_count, "driver": asked("driver_version"),
        }  # fmt: skip

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], Any], flush: bool = True) -> float:
        """Device time of one call, the L2 cache emptied before."""
        if flush:
            self._flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def graph(self, call: Callable[[], Any]) -> Callable[[], None]:
        """A CUDA graph of the call, to be replayed."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        made = torch.cuda.CUDAGraph()
        with torch.cuda.graph(made):
            call()
        return made.replay

    def peak(self, call: Callable[[], Any]) -> int:
        """Bytes by which a call raises the allocator above what it holds before, the result included."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        torch.cuda.empty_cache()


class Cpu:
    """A stand-in: the same answers by the CPU's own clock. Its figures mean nothing."""

    name = "cpu"
    backends = ("auto", "torch", "triton") if support.interpreted() else ("auto", "torch")
    device = torch.device("cpu")

    def describe(self) -> dict[str, Any]:
        return {"device": "CPU (a trial of the command, not a measurement)"}

    def synchronize(self) -> None:
        pass

    def milliseconds(self, call: Callable[[], Any], flush: bool = True) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    def graph(self, call: Callable[[], Any]) -> Callable[[], None]:
        raise RuntimeError("a CPU has no CUDA graphs")

    def peak(self, call: Callable[[], Any]) -> int:
        call()
        return 0

    def release(self) -> None:
        pass


Device = Cuda | Cpu


def chosen(name: str) -> Device:
    """The device of a command line's word: "auto" is the GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {name}: choose auto, cpu or cuda")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("--device cuda: torch sees no CUDA device")
    return Cuda() if there and name != "cpu" else Cpu()


def rates(device: Device, copy_bytes: int, side: int) -> dict[str, float]:
    """What the card reaches: bytes a second of a copy (read and written), flops a second of square products."""
    found = {}
    pair = torch.empty(2, copy_bytes, dtype=torch.int8, device=device.device)
    times = [device.milliseconds(lambda: pair[0].copy_(pair[1]), flush=False) for _ in range(8)]
    found["copy_bytes_per_s"] = 2 * copy_bytes / (1e-3 * statistics.median(times[2:]))
    for name, setting, dtype in (
        ("ieee", "ieee", torch.float32), ("tf32", "tf32", torch.float32), ("bf16", "ieee", torch.bfloat16)
    ):  # fmt: skip
        a, b = (torch.randn(side, side, device=device.device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)

        def product(a=a, b=b, out=out):
            torch.mm(a, b, out=out)

        with precision(setting):
            times = [device.milliseconds(product, flush=False) for _ in range(7)]
        found[f"{name}_flops_per_s"] = 2 * side**3 / (1e-3 * statistics.median(times[2:]))
    return found
