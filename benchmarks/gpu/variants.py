"""Which kernels a session on a GPU asks for: every launch of the workloads, and of every way that may be timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch

from jactri import chooser

from . import fake
from .bench import own
from .device import SETTINGS, Cuda, precision
from .sizes import Sized, sized


def asked(names: list[str], shrink: int = 1) -> list[tuple[str, fake.Variant]]:
    """(name, variant) of all kernels of the workloads, the most valuable first. Patches the process, see `fake`.

    First what the benchmark of the default backend runs, a workload after the other, then the other backends, then
    bfloat16, of which only the accuracy is looked at.
    """
    device = fake.install()
    sizes = sized(names, shrink)
    first, *others = (b for b in Cuda.backends if b != "torch")
    with device, _all_ways():
        for setting, backend, size in (
            *((s, first, w) for w, s in product(sizes, SETTINGS)),
            *product(SETTINGS, others, sizes),
            *product(("bf16",), (first, *others), sizes),
        ):
            if setting != "bf16" or size.workload.operator is None:
                _call(device, size, setting, backend)
    return [(name, variant) for (name, _), variant in device.variants.items()]


def _call(device: fake.Device, size: Sized, setting: str, backend: str) -> None:
    """Two calls, as the first may choose and keep what the second one uses."""
    half = setting == "bf16"
    chooser.forget()
    with precision("ieee" if half else setting):
        net, x = device.problem(size.workload, torch.bfloat16 if half else torch.float32)
        call = own(backend).make(size.workload, net)
        call(x)
        call(x)


@contextlib.contextmanager
def _all_ways() -> Iterator[None]:
    """Whatever is run in a way that was chosen is run in all ways that there are, at the sizes of timing and whole."""
    plain: Callable = chooser.run

    def run(problem: chooser.Problem, out: torch.Tensor | None = None) -> Any:
        for composition, configs, dots in problem.kind().offers():
            for config, dot in product(configs, dots):
                way = chooser.Way(composition, dot, config)
                for part, into in ((problem, out), (problem.timed(), None)):
                    part.launch(way, into)
        return plain(problem, out)

    chooser.run = run
    try:
        yield
    finally:
        chooser.run = plain
