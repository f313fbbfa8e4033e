"""pytest-benchmark set-up: collects ``bench_*.py`` and makes one case a workload and contender.

``pytest benchmarks --benchmark-only`` runs everything; ``-k "W1 and jactri"`` picks cases;
``--compile`` adds a torch.compile case a workload. Each result is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from . import checks, machine
from .peers import Peer, compiled, peers_of, preferred
from .workloads import Workload, problem

Run = Callable[[Workload, Peer], Callable[[], Any]]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switch for torch.compile, which takes long."""
    parser.addoption("--compile", action="store_true", help="benchmarks: add torch.compile peers")


def pytest_configure(config: pytest.Config) -> None:
    """Collect bench_*.py here, whatever the project's own pattern is."""
    if "bench_*.py" not in config.getini("python_files"):
        config.addinivalue_line("python_files", "bench_*.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the peers warn: their warnings are not this project's."""
    for item in items:
        if "case" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings("ignore"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Keep versions and processor, drop the machine's name."""
    for key in ("node", "release", "python_build"):
        machine_info.pop(key, None)
    machine_info.update(machine.description())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case for each workload of the module and each of its contenders."""
    if "case" not in metafunc.fixturenames:
        return
    cases = []
    for workload in metafunc.module.WORKLOADS:
        peers = peers_of(workload)[0]
        if metafunc.config.getoption("--compile"):
            peers.append(compiled(preferred(workload)))
        cases += [pytest.param((workload, p), id=f"{workload.name}-{p.name}") for p in peers]
    metafunc.parametrize("case", cases)


@pytest.fixture(scope="session")
def peak() -> machine.Peak:
    """The machine's GEMM rate, measured once."""
    return machine.gemm_peak()


@pytest.fixture
def timed(benchmark, peak: machine.Peak) -> Run:
    """Check a contender against float64, then time it; returns the call that was timed."""

    def run(workload: Workload, peer: Peer) -> Callable[[], Any]:
        net, x = problem(workload)
        made = peer.make(workload, net)

        def call() -> Any:
            return made(x)

        benchmark.group = f"{workload.name}: {workload.title}"
        info = benchmark.extra_info
        result = call()
        if peer.kind != "reference":
            info["error"] = checks.error_of(workload, result)
        del result
        info["kind"] = peer.kind
        info["shape"] = list(workload.shape)
        info["least_flops"] = workload.flops
        info["least_bytes"] = workload.bytes
        info["extra_peak_bytes"] = machine.extra_peak(call)
        benchmark(call)
        if benchmark.stats is not None and peer.kind != "reference":
            seconds = benchmark.stats.stats.median
            info["gflops_per_s"] = round(workload.flops / seconds / 1e9, 3)
            info["gbytes_per_s"] = round(workload.bytes / seconds / 1e9, 3)
            info["gemm_peak_gflops_per_s"] = round(peak.flops / 1e9, 1)
            info["gemm_peak_by"] = peak.by
            info["share_of_gemm_peak"] = round(workload.flops / seconds / peak.flops, 4)
        return call

    return run
