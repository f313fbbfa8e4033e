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

import torch
from resources import Resources, read_amd, read_nvidia
from triton import knobs, runtime
from triton.backends.compiler import GPUTarget

import jactri.kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that one program may use."""


class _Utils:
    def __init__(self, name, target):
        self.name, self.target = name, target

    def get_device_properties(self, device):
        return {
            "max_shared_mem": SHARED[self.name], "multiprocessor_count": 132, "max_num_regs": 65536,
            "warpSize": self.target.warp_size, "sm_clock_rate": 0, "mem_clock_rate": 0, "mem_bus_width": 0,
        }  # fmt: skip

    def load_binary(self, *args):
        return None, None, 0, 0, 1024


class Driver:
    """What triton 3.6 and 3.9 ask of a driver on the way to a launch."""

    def __init__(self, name):
        self.target = TARGETS[name]
        self.utils = _Utils(name, self.target)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty):
        return ty

    def launcher_cls(self, src, metadata):
        return lambda *args, **options: None


@dataclass(frozen=True)
class Compiled:
    """One kernel as it came out."""

    kernel: str
    seconds: float
    warps: int
    resources: Resources


def _forget() -> None:
    """Drop what the kernels have compiled: a jitted function does not know that the driver changed."""
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
