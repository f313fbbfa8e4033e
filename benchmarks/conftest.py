"""pytest-benchmark set-up: collects ``bench_*.py`` and makes one case a workload and contender.

``pytest benchmarks --benchmark-only`` runs everything; ``-k "W1 and jactri"`` picks cases;
``--no-compile`` leaves out torch.compile, which takes long to set up. Each result is checked
before it is timed. Network and input lie on the GPU where there is one (``--device cpu``: not),
and a call there ends when the device is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest

from . import checks, machine
from .gpu.device import Device, chosen, precision, rates
from .peers import Peer, compiled, contender, peers_of, preferred
from .workloads import Workload

Run = Callable[[Workload, Peer], Callable[[], Any]]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switches."""
    parser.addoption(
        "--no-compile", action="store_true", help="benchmarks: nothing of torch's compiler"
    )
    with contextlib.suppress(ValueError):  # tests/conftest.py has it, and both can run together
        parser.addoption("--device", help="benchmarks: auto (a GPU where there is one), cpu, cuda")


def pytest_configure(config: pytest.Config) -> None:
    """Collect bench_*.py here, whatever the project's own pattern is; refuse an unknown device."""
    device_of(config)
    if "bench_*.py" not in config.getini("python_files"):
        config.addinivalue_line("python_files", "bench_*.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the peers warn: their warnings are not this project's."""
    for item in items:
        if "case" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@lru_cache(maxsize=1)
def device_of(config: pytest.Config) -> Device:
    """The device that the command line asks for."""
    try:
        return chosen(config.getoption("--device") or "auto")
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Keep versions, processor and device, drop the machine's name."""
    for key in ("node", "release", "python_build"):
        machine_info.pop(key, None)
    machine_info.update(machine.description())
    if device_of(config).name != "cpu":
        machine_info.update(device_of(config).describe())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case for each workload of the module and each of its contenders."""
    if "case" not in metafunc.fixturenames:
        return
    cases = []
    for workload in metafunc.module.WORKLOADS:
        peers = peers_of(workload, device_of(metafunc.config).device)[0]
        if metafunc.config.getoption("--no-compile"):
            peers = [p for p in peers if not p.built]
        else:
            peers.append(compiled(preferred(workload)))
        cases += [pytest.param((workload, p), id=f"{workload.name}-{p.name}") for p in peers]
    metafunc.parametrize("case", cases)


@pytest.fixture(scope="session")
def device(request):
    """Where networks and inputs lie; products and convolutions there are float32, not tf32."""
    with precision("ieee"):
        yield device_of(request.config)


@pytest.fixture(scope="session")
def roof(device: Device) -> machine.Roof:
    """The device's rates, measured once."""
    if device.name == "cpu":
        return machine.roof()
    found = rates(device, copy_bytes=4 << 30, side=8192)
    return machine.Roof(found["ieee_flops_per_s"], "torch.mm", found["copy_bytes_per_s"])


@pytest.fixture
def timed(benchmark, device: Device, roof: machine.Roof) -> Run:
    """Check a contender against float64, then time it; returns the call that was timed."""

    def run(workload: Workload, peer: Peer) -> Callable[[], Any]:
        call = contender(workload, peer, device.device, device.synchronize)
        benchmark.group = f"{workload.name}: {workload.title}"
        info = benchmark.extra_info
        try:
            result = call()
        except Exception as error:
            if peer.kind != "compiled":
                raise
            pytest.skip(f"{peer.name}: {type(error).__name__}: {error}"[:300])
        if peer.kind != "reference":
            info["error"] = checks.error_of(workload, result)
        del result
        measure = machine.extra_peak if device.name == "cpu" else device.peak
        info["device"] = device.name
        info["kind"] = peer.kind
        info["shape"] = list(workload.shape)
        info["least_flops"] = workload.flops
        info["least_bytes"] = workload.bytes
        info["extra_peak_bytes"] = measure(call)
        benchmark(call)
        if benchmark.stats is not None and peer.kind != "reference":
            seconds = benchmark.stats.stats.median
            least = roof.least_seconds(workload.flops, workload.bytes)
            info["gflops_per_s"] = round(workload.flops / seconds / 1e9, 3)
            info["gbytes_per_s"] = round(workload.bytes / seconds / 1e9, 3)
            info["gemm_peak_gflops_per_s"] = round(roof.flops / 1e9, 1)
            info["gemm_peak_by"] = roof.by
            info["copy_peak_gbytes_per_s"] = round(roof.copied / 1e9, 2)
            info["share_of_gemm_peak"] = round(workload.flops / seconds / roof.flops, 4)
            info["share_of_roof"] = round(least / seconds, 4)
        return call

    return run
