"""A driver for triton that knows what a GPU can do, and has none: compiles go through, launches do nothing."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory that one program may use."""


class _Utils:
    def __init__(self, name: str, target: GPUTarget):
        self.name, self.target = name, target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED[self.name], "multiprocessor_count": 132, "max_num_regs": 65536,
            "warpSize": self.target.warp_size, "sm_clock_rate": 0, "mem_clock_rate": 0, "mem_bus_width": 0,
        }  # fmt: skip

    def load_binary(self, *args: Any) -> tuple:
        return None, None, 0, 0, 1024


class Driver:
    """What triton 3.6 and 3.9 ask of a driver on the way to a launch."""

    def __init__(self, name: str):
        self.target = TARGETS[name]
        self.utils = _Utils(name, self.target)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return lambda *args, **options: None
