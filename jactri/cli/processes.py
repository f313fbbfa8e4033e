"""The processes that run one command: those of torchrun, or this one alone."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from jactri._src.spread.agreement import Ranks, of_mesh


def several() -> bool:
    """Whether this process is one of several."""
    if not dist.is_available():
        return False
    if dist.is_initialized():
        return dist.get_world_size() > 1
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def processes(hours: float, command: str) -> Iterator[Ranks]:
    """The processes of torchrun, or this one alone; ``hours``: how long one waits for the others."""
    from torch.distributed.device_mesh import init_device_mesh

    wait, own = datetime.timedelta(hours=hours), not dist.is_initialized()
    if own and several():
        dist.init_process_group("gloo", timeout=wait)
    elif own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=wait)
    try:
        # what is sent are a few numbers from the host, whatever the device
        yield of_mesh(init_device_mesh("cpu", (dist.get_world_size(),)), command)
    finally:
        if own:
            dist.destroy_process_group()
