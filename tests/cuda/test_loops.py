"""On a GPU the host does as much for many samples as for few: no loop over samples, no cut for a CPU's cache."""

import pytest

from benchmarks.counts import Counter
from benchmarks.gpu.bench import own
from benchmarks.gpu.sizes import sized
from benchmarks.workloads import resized
from jactri._src.device import chooser

WORKLOADS = [s.workload for s in sized([])]


def done(device, workload, backend):
    """Ops of torch and launches of kernels in a steady call."""
    chooser.forget()
    net, x = device.problem(workload)
    call = own(backend).make(workload, net)
    call(x)
    device.clear()
    with Counter() as counter:
        call(x)
    return counter.counts["ops"], [launch.kernel for launch in device.launches]


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_ops_do_not_grow_with_samples(workload, backend, device):
    few, many = (done(device, resized(workload, n), backend) for n in (16, 48))
    assert many[0] <= few[0] and many[1] == few[1]


@pytest.mark.parametrize("fastest", ["kernels", "torch"])
def test_a_steady_call_times_nothing(fastest, device, monkeypatch):
    device.fastest = fastest
    (size,) = sized(["W7"])
    net, x = device.problem(size.workload)
    chooser.forget()
    call = own("auto").make(size.workload, net)
    call(x)
    timed = {type(k).__name__ for k, c in chooser._choices.items() if c.tried}
    assert timed >= {"ChainKind", "PassKind"}
    monkeypatch.setattr(chooser, "_tuned", lambda *_: pytest.fail("timed twice"))
    device.clear()
    call(x)
    assert bool(device.launches) == (fastest == "kernels")
