"""What a call of every GPU workload does, in whole numbers, without a GPU: ``python -m benchmarks.gpu.traffic`` (JSON).

Counted in a steady call, forward pass included, on the device of `fake`: by backend ("triton": the first way of our
own; "torch") the ``ops`` that torch is given and the ``bytes_moved`` by them, the ``launches`` of our kernels and the
``launch_bytes`` of the tensors that they are given, each once. `benchmarks.counts` holds them against its file.
"""

from __future__ import annotations

import json
import sys

from jactri._src.device import chooser

from ..counts import Counter, Counts
from . import fake
from .bench import own
from .device import precision
from .sizes import sized

BACKENDS = ("triton", "torch")


def measure(names: list[str]) -> dict[str, Counts]:
    """By "workload backend"; in this process, which `fake` patches."""
    device = fake.install()
    found = {}
    for size in sized(names):
        for backend in BACKENDS:
            chooser.forget()
            with device, precision("ieee"):
                net, x = device.problem(size.workload)
                call = own(backend).make(size.workload, net)
                for _ in range(2):
                    call(x)
                device.clear()
                with Counter() as counter:
                    call(x)
            found[f"{size.name} {backend}"] = {
                "ops": counter.counts["ops"],
                "bytes_moved": counter.counts["bytes_moved"],
                "launches": len(device.launches),
                "launch_bytes": sum(one.bytes for one in device.launches),
            }
    return found


if __name__ == "__main__":
    json.dump(measure(sys.argv[1:]), sys.stdout)
