"""What every test starts from: fixed seeds, and fresh memory full of NaN."""

import random

import numpy as np
import pytest
import torch


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
    torch.use_deterministic_algorithms(True)
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
