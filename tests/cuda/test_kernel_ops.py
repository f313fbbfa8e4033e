"""Compiled calls on a GPU: their kernels are those of an ordinary call, each launch an op of the graph."""

from collections import Counter

import pytest
import torch
from calls import NETS, WIDTH, N

import jactri
from benchmarks.gpu.bench import own
from benchmarks.gpu.device import precision
from benchmarks.gpu.sizes import sized
from jactri._src.base import backends
from jactri._src.compile import engines
from jactri._src.device import chooser
from jactri.kernels import launches

WORKLOADS = [s.workload for s in sized([])]


@pytest.fixture(autouse=True)
def _fresh():
    chooser.forget()
    yield
    chooser.forget()


def compiled(workload, net, x, **options):
    of = jactri.jacobian if workload.operator is None else workload.operator.of
    if of is jactri.jacobian:
        options["per_sample"] = True
    elif workload.operator.lower:
        options["return_lower"] = True
    return jactri.compile(net, x, of=of, engine="fx", **options)


def in_graph(step):
    """Kernels of a graph by name, as a launch has it."""
    nodes = [n for n in step.graph.graph.nodes if n.target is launches.OP]
    return Counter(n.args[0].partition(".")[2] for n in nodes)


def steady(device, call):
    """Kernels that a call launches, once all is compiled and chosen."""
    call()
    device.clear()
    call()
    return Counter(launch.kernel for launch in device.launches)


@pytest.mark.parametrize(
    "setting, backend", [("ieee", "auto"), ("tf32", "auto"), ("ieee", "torch"), ("ieee", "triton")]
)
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_a_workload_launches_what_an_ordinary_call_does(workload, setting, backend, device):
    with precision(setting):
        net, x = device.problem(workload)
        call = own(backend).make(workload, net)
        ordinary = steady(device, lambda: call(x))
        keyword = {} if workload.operator and workload.operator.trains else {"backend": backend}
        with backends.use(backend):
            step = compiled(workload, net, x, **keyword)
        assert step.graph is not None, step.reason
        assert in_graph(step) == ordinary
        assert device.captured == ordinary.total() and not device.refused
        device.clear()
        step(x)
        assert not device.waits and not device.queries


@pytest.mark.parametrize("net", ["mlp", "softmax", "convolution"])
def test_torch_where_it_is_faster(net, device, monkeypatch):
    monkeypatch.setattr(chooser, "_tunable", lambda kind: True)  # small as it is
    device.fastest = "torch"
    net, x = device.net(NETS[net]().eval()), torch.empty(N, WIDTH, device="cuda")
    step = jactri.compile(net, x, per_sample=True, engine="fx")
    assert step.graph is not None and not in_graph(step)
    assert in_graph(jactri.compile(net, x, per_sample=True, engine="fx", backend="triton"))


CALLS = {
    "jacobian": (jactri.jacobian, {}),
    "diagonal": (jactri.diagonal, {}),
    "jtj": (jactri.jtj, {"per_sample": True}),
    "ntk": (jactri.empirical_ntk, {}),
    "parameters": (jactri.parameter_jacobian, {}),
    "jacrev": (jactri.func.jacrev, {}),
    "jacfwd": (jactri.func.jacfwd, {}),
}


@pytest.mark.parametrize("net", ["mlp", "softmax", "convolution"])
@pytest.mark.parametrize("call", CALLS)
def test_other_calls(call, net, device):
    of, options = CALLS[call]
    net, x = device.net(NETS[net]().eval()), torch.empty(N, WIDTH, device="cuda")
    step = jactri.compile(net, x, of=of, engine="fx", **options)
    assert step.graph is not None, step.reason
    assert in_graph(step) == steady(device, lambda: step._call((x,), None))


@pytest.mark.parametrize("net", ["mlp", "softmax", "convolution"])
def test_what_is_differentiated_has_no_kernels(net, device):
    net, x = device.net(NETS[net]().eval()), torch.empty(N, WIDTH, device="cuda")
    step = jactri.compile(net, x, per_sample=True, create_graph=True, engine="fx")
    assert step.graph is not None and not in_graph(step)
    device.clear()
    assert torch.autograd.grad(step(x).sum(), net.first.weight)[0] is not None
    assert not device.launches


def test_packages_have_torchs_ops(device, monkeypatch):
    monkeypatch.setitem(
        engines._BUILD, "aot", lambda graph, like, *_: (engines._fx(graph, like), None)
    )
    net, x = device.net(NETS["mlp"]().eval()), torch.empty(N, WIDTH, device="cuda")
    step = jactri.compile(net, x, per_sample=True, engine="aot")
    assert step.graph is not None and not in_graph(step)
    with pytest.raises(RuntimeError, match=r"a package.*engine='inductor'"):
        jactri.compile(net, x, per_sample=True, engine="aot", backend="triton")


def test_an_answer_in_the_callers_tensor(device):
    net, x = device.net(NETS["mlp"]().eval()), torch.empty(N, WIDTH, device="cuda")
    out = torch.empty(N, WIDTH, WIDTH, device="cuda")
    step = jactri.compile(net, x, per_sample=True, engine="fx")
    assert step(x, out=out) is out
    assert in_graph(step) and not device.refused
