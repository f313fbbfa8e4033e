"""What every test starts from: fixed seeds, and fresh memory full of NaN.

``pytest --device cuda`` runs the suite with tensors on a GPU, without the files that are about the CPU.
"""

import contextlib
import gc
import logging
import os
import random

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker has its share of the cores, its children too
    _workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // _workers))

import numpy as np
import pytest
import torch

# torch.manual_seed notes a stack trace for every kind of device that is not there, which takes a millisecond
for _absent in (torch.cuda, torch.xpu, torch.mtia):
    if not _absent.is_available():
        _absent.manual_seed_all = lambda seed: None

CPU_ONLY = {
    "test_backends.py": "oneDNN and torch.mm on the CPU",
    "test_benchmarks.py": "benchmarks, tried on the CPU",
    "test_memory.py": "memory of the process",
    "test_cli.py": "the command line, whose demo and doctor look at the CPU",
    "test_lens_command.py": "the same",
    "test_export.py": "packages for the CPU",
    "test_examples.py": "programs for the CPU",
    "test_packaging.py": "wheels and imports",
    "test_gpu_command.py": "the command, tried on the CPU",
    "test_gpu_suite.py": "starts this suite itself",
    "test_gpu_report.py": "files, and no tensors",
    "test_lease.py": "processes, and no tensors",
    "test_layout.py": "index arithmetic alone",
    "test_counts.py": "figures of the CPU's plans and ops",
    "test_planner.py": "plans, which hold no tensor",
    "test_ranges.py": "a range a step; kernels run steps together",
    "test_profiling.py": "times of the CPU",
    "test_compiled.py": "graphs of the CPU; benchmarks.gpu checks the captures",
    "test_compiled_operators.py": "the same",
    "test_compiled_reached.py": "the same",
    "test_compiled_explain.py": "kernels of the CPU",
    "test_captured.py": "a stand-in for CUDA graphs, on the CPU",
    "test_journal.py": "files, written from the CPU",
    "test_opinfo.py": "samples, drawn on the CPU",
    "test_sparsity.py": "pictures, files and other people's matrices",
}


def pytest_addoption(parser):
    with contextlib.suppress(ValueError):  # benchmarks/conftest.py may have it
        parser.addoption("--device", help="where the tests put their tensors; default: cpu")


def pytest_collection_modifyitems(config, items):
    if device_of(config) == "cpu":
        return
    left_out = [i for i in items if i.path.name in CPU_ONLY]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [i for i in items if i.path.name not in CPU_ONLY]


def pytest_collection_finish():
    gc.freeze()  # tests are there until the end: no collection needs to look at all of them again
    for name, logger in logging.root.manager.loggerDict.items():
        # pytest adds its handlers to every logger that does not propagate, six times a test: torch has 50.
        # That of its traces writes whatever has a handler.
        ours = name.startswith("torch") and not name.startswith("torch.__trace")
        if ours and isinstance(logger, logging.Logger):
            logger.propagate = True


def pytest_unconfigure():
    gc.unfreeze()  # what libraries free at the end, they find


def device_of(config):
    return config.getoption("device") or "cpu"


@pytest.fixture(autouse=True)
def _tensors_on_the_device(request, monkeypatch):
    device = device_of(request.config)
    if device == "cpu":
        yield
        return
    # torch allows convolutions tf32 by default, which no test of float32 does
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda d=None: generator(device if d is None else d))
    with torch.device(device):
        yield


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "clean_memory: timings and memory peaks, which filling memory would spoil"
    )


@pytest.fixture(autouse=True)
def _fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(request):
    """torch.empty gives NaN: a result that reads memory nobody wrote cannot pass by luck."""
    call = getattr(request.node, "callspec", None)
    refused = call is not None and not getattr(call.params.get("case"), "poison", True)
    if refused or request.node.get_closest_marker("clean_memory"):
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    # on CUDA some ops that the tests call have no deterministic way: memory is filled all the same
    torch.use_deterministic_algorithms(True, warn_only=device_of(request.config) != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


@pytest.fixture
def one_thread():
    """For thousands of tiny tensors, where waking a second thread costs more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
