"""The real launchers on CPU tensors, compiling for any GPU and launching nothing.

Triton asks its driver which GPU there is, and to load and start what it compiled. This one answers the first as told
and does nothing for the rest, so that wrappers, specialisation of arguments and options are those of a real launch.
"""

import contextlib
import importlib
import io
import pkgutil
import re
import time
from dataclasses import dataclass

from resources import Resources, read_amd, read_nvidia
from triton import knobs, runtime
from triton.compiler.compiler import max_shared_mem

import jactri.kernels
from benchmarks.gpu.driver import Driver


@dataclass(frozen=True)
class Compiled:
    """One kernel as it came out."""

    kernel: str
    seconds: float
    warps: int
    resources: Resources


def _forget() -> None:
    """Drop what the kernels have compiled, and how much memory is shared: triton does not know of another driver."""
    max_shared_mem.cache_clear()
    for module in pkgutil.iter_modules(jactri.kernels.__path__):
        for value in vars(importlib.import_module(f"jactri.kernels.{module.name}")).values():
            if hasattr(value, "device_caches"):
                value.device_caches.clear()


def compiled(name: str, call) -> list[Compiled]:
    """What ``call``, which uses launchers on CPU tensors, compiles for a target."""
    active, listener = runtime.driver._active, knobs.compilation.listener
    seen: list[dict] = []
    log = io.StringIO()
    _forget()
    runtime.driver.set_active(Driver(name))
    knobs.compilation.listener = lambda **given: seen.append({**given, "log": log.getvalue()})
    knobs.nvidia.dump_ptxas_log = True
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(log):
            call()
    finally:
        knobs.compilation.listener, runtime.driver._active = listener, active
    seconds = time.perf_counter() - start
    out, read = [], 0
    for one in seen:
        metadata = one["metadata"]
        files = {p.rpartition(".")[2]: p for p in one["metadata_group"].values()}
        own, read = one["log"][read:], len(one["log"])
        if name.startswith("sm_"):
            found = read_nvidia(files["cubin"], own, metadata["shared"])
        else:
            found = read_amd(files["amdgcn"], metadata["shared"])
        kernel = re.sub(r"^_", "", metadata["name"])
        out.append(Compiled(kernel, seconds / len(seen), metadata["num_warps"], found))
    return out
