"""jactri's CUDA path on a device that is not there (`benchmarks.gpu.fake`): ``pytest tests/cuda``, on any machine.

The device patches its process, so these run by themselves.
"""

import json
import os
import shutil
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest
from triton.backends.nvidia import driver

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


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory):
    """A libcuda that starts nothing, built by the C compiler; skips where there is none, or a real one."""
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    if find_library("cuda") is not None:
        pytest.skip("a real libcuda is installed here")
    here, file = Path(__file__).parent, tmp_path_factory.mktemp("mock") / "libcuda.so.1"
    include = Path(driver.__file__).parent / "include"
    command = ["gcc", "-shared", "-fPIC", "-w", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*command, "-o", file, here / "libcuda.c"], check=True)

    def run(*names, **environment):
        """Counts of launchers.py for these workloads."""
        paths = os.pathsep.join([str(here.parents[1]), *sys.path])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", here / "launchers.py", file, *names],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": paths, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
