"""Dry captures: inside of a CUDA graph nothing reads a value, asks for memory, waits, or compiles a kernel."""

import pytest

import jactri
from benchmarks import operators
from benchmarks.gpu.bench import own
from benchmarks.gpu.device import Cuda, precision
from benchmarks.gpu.sizes import sized

WORKLOADS = [s.workload for s in sized([])]


@pytest.fixture(params=["ieee", "tf32"])
def setting(request):
    with precision(request.param):
        yield request.param


def compiled(workload, net, x):
    if workload.operator is not None:
        return operators.compiled(workload, net, x, engine="fx")
    return jactri.compile(net, x, per_sample=True, engine="fx")


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_compile_captures(workload, setting, device):
    net, x = device.problem(workload)
    made = compiled(workload, net, x)
    made(x)
    assert "CUDA graph" in repr(made), repr(made)
    assert not device.refused


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_a_call_is_captured(workload, backend, setting, device):
    net, x = device.problem(workload)
    call = own(backend).make(workload, net)
    Cuda().graph(lambda: call(x))
    assert not device.refused
