"""How much memory there is, and how amounts are written."""

from __future__ import annotations

import os
import re

import torch

from .tracing import aside

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(amount: int | str) -> int:
    """``1500``, ``"1500"``, ``"1.5KB"``, ``"2GB"`` (powers of 1000) or ``"2GiB"`` (powers of 1024) in bytes.

    Raises ValueError for anything else, zero and negative amounts included.
    """
    if isinstance(amount, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", amount, re.IGNORECASE)
        if match:
            number, unit, binary = match.groups()
            scale = _UNITS[unit.upper()]
            if binary:
                scale = 1 << (10 * "KMGT".index(unit.upper()) + 10) if unit else 1
            amount = int(float(number) * scale)
    if not isinstance(amount, int) or isinstance(amount, bool) or amount <= 0:
        raise ValueError(f"memory_limit must be bytes above 0 or a text like '2GB', got {amount!r}")
    return amount


def si(number: float) -> str:
    """A number with a decimal prefix: 1.23 M."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {letter}"
    return f"{number:.3g} "


_seen: dict[torch.device, int] = {}


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a device now; inside of a CUDA graph's capture, which does not let one ask, what
    was found last."""
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _seen.get(device) or torch.cuda.get_device_properties(device).total_memory
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        _seen[device] = free
        return free
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


_MOST = (32 << 20) - (64 << 10)
_held = 0


def hold(amount: float, device: torch.device) -> None:
    """Have the CPU's allocator hold on to freed memory, twice ``amount`` bytes, for blocks that come and go.

    glibc gives memory back to the system from twice the size of the largest block that was freed so far (at most
    64 MiB; "dynamic" in mallopt(3)): in sweeps of smaller blocks each would fault its pages in anew, which can cost
    more than the arithmetic. A block freed untouched tells it. Other allocators take no notice.

    Not for calls with a memory_limit: held memory falls into pieces, and their peak was seen 1.4 times the limit.
    """
    global _held
    amount = int(min(amount, _MOST))
    if device.type == "cpu" and amount > _held:
        _held = amount
        with aside():
            torch.empty(amount, dtype=torch.uint8)
