"""Which kernels a session on a GPU asks for: each launch of the workloads, each way that may win, the smoke tests."""

from __future__ import annotations

import contextlib
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from jactri._src.device import chooser
from jactri.kernels.support import Unfit

from . import fake
from .bench import own
from .cache import ROOT
from .device import SETTINGS, Cuda, precision
from .sizes import Sized, sized
from .suite import SMOKE, smoke

Asked = list[tuple[str, fake.Variant]]


def asked(names: list[str]) -> Asked:
    """(name, variant) of all kernels of the workloads, the most valuable first. Patches the process, see `fake`.

    First those of the smoke tests, if no workload is named; then what the benchmark of the default backend runs, a
    workload after the other; then the other backends, then bfloat16, of which only the accuracy is looked at.
    """
    device = fake.install()
    sizes = sized(names)
    first, *others = (b for b in Cuda.backends if b != "torch")
    with device, _all_ways():
        for setting, backend, size in (
            *((s, first, w) for w, s in product(sizes, SETTINGS)),
            *product(SETTINGS, others, sizes),
            *product(("bf16",), (first, *others), sizes),
        ):
            if setting != "bf16" or size.workload.operator is None:
                _call(device, size, setting, backend)
    found = _noted(device)
    if not names:
        for kernel in SMOKE:
            _tested(device, smoke(kernel))
        found = _noted(device)[len(found) :] + found
    return found


def _noted(device: fake.Device) -> Asked:
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

    def run(problem: chooser.Problem, out: Tensor | None = None) -> Any:
        for composition, configs, dots in problem.kind().offers():
            for config, dot in product(configs, dots):
                way = chooser.Way(composition, dot, config)
                for part, into in ((problem, out), (problem.timed(), None)):
                    with contextlib.suppress(Unfit):
                        part.launch(way, into)
        return plain(problem, out)

    with mock.patch.object(chooser, "run", run):
        yield


def _tested(device: fake.Device, arguments: list[str]) -> None:
    """Run tests of tests/kernels for what they launch.

    There are no values to hold against others, so comparisons are taken away; what a test launches after a line that
    fails all the same, or by values that it draws, is not asked for: how many do is printed.
    """
    import pytest

    counts: Counter[str] = Counter()

    class OnDevice:
        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_call(self, item):
            with device:
                return (yield)

        def pytest_runtest_logreport(self, report):
            if report.when == "call":
                counts[report.outcome] += 1

    def gradients(outputs: Any, inputs: Any, *given: Any, **options: Any) -> tuple[Tensor, ...]:
        inputs = [inputs] if isinstance(inputs, Tensor) else inputs
        return tuple(torch.empty_like(i).requires_grad_(i.is_floating_point()) for i in inputs)

    here = str(ROOT / "tests" / "kernels")
    with mock.patch.object(sys, "path", [here, *sys.path]), contextlib.ExitStack() as patches:
        import guard
        import precision as limits

        for owner, name, made in (
            (torch.cuda, "is_available", lambda: True),
            (torch.autograd, "grad", gradients),  # the engine asks the device for its streams
            (torch.testing, "assert_close", lambda *given, **options: None),
            (guard.Canvas, "check", lambda canvas: None),
            (limits, "distance", lambda got, truth: 0.0),
        ):
            patches.enter_context(mock.patch.object(owner, name, made))
        patches.enter_context(contextlib.redirect_stdout(io.StringIO()))
        quiet = ["-q", "--no-header", "-p", "no:cacheprovider", "-o", "addopts=", "-W", "ignore"]
        pytest.main([*quiet, "--rootdir", str(ROOT), *arguments], plugins=[OnDevice()])
    if counts["failed"]:
        print(f"{counts['failed']} of {counts.total()} tests end early here: {' '.join(arguments)}")
