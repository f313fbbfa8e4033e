"""jactri's CUDA path on a device that is not there (`benchmarks.gpu.fake`): ``pytest tests/cuda``, on any machine.

The device patches its process, so these run by themselves.
"""

from pathlib import Path

import pytest

from benchmarks.gpu import fake

DEVICE = fake.install()


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.clean_memory)  # there is none to fill


@pytest.fixture
def device():
    DEVICE.clear()
    DEVICE.answer, DEVICE.fastest = 1, "kernels"
    with DEVICE:
        yield DEVICE
