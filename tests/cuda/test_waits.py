"""A steady call waits for no value of the device: the GPU would run dry. Where a value decides, the count is exact."""

from collections import Counter

import pytest
import torch
from calls import CALLS, NETS, WIDTH, N

import jactri
from benchmarks.gpu.bench import own
from benchmarks.gpu.device import Cuda
from benchmarks.gpu.sizes import sized

WORKLOADS = [s.workload for s in sized([])]


def waits(device, call):
    """Of a steady call, by the function of jactri that waits; those of the caller's own function left out."""
    for _ in range(3):
        device.clear()
        call()
    return Counter(w.site for w in device.waits if w.site != "outside")


def problem(device, name):
    return device.net(NETS[name]().eval()), torch.empty(N, WIDTH, device="cuda")


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_a_workload_waits_for_nothing(workload, device):
    net, x = device.problem(workload)
    call = own("auto").make(workload, net)
    assert not waits(device, lambda: call(x))


@pytest.mark.parametrize("name", CALLS)
def test_a_call_waits_for_nothing(name, device):
    net, x = problem(device, "mlp")
    assert not waits(device, lambda: CALLS[name](net, x))


VALUES_DECIDE = {
    # whether an infinity lies behind a selection: tangents that are not finite are formed anew by rows
    ("root behind relu", "jvp"): {"poles.finite": 1},
    ("root behind relu", "laplacian"): {"poles.finite": 1},
    # which sample a row belongs to
    ("experts", "jacobian, per_sample"): {"intervals.within": 1},
    # where a write went: autograd's node does not show it
    ("written", "vjp"): {"inplace._together": 1, "inplace.regular": 3, "index.unmoved": 1},
    # whether a Function of other people's is right under vmap
    ("custom", "jacobian"): {"vmapped.shown": 1},
}  # fmt: skip

PLAIN = {"mlp"} | {net for net, _ in VALUES_DECIDE}


@pytest.mark.parametrize("name", [n for n in NETS if n not in (*PLAIN, "complex", "in a loop")])
def test_a_network_waits_for_nothing(name, device):
    net, x = problem(device, name)
    for call in ("jacobian, per_sample", "vjp"):
        assert not waits(device, lambda call=call: CALLS[call](net, x)), call


@pytest.mark.parametrize("net_, call", VALUES_DECIDE, ids="-".join)
def test_where_a_value_decides(net_, call, device):
    net, x = problem(device, net_)
    assert waits(device, lambda: CALLS[call](net, x)) == VALUES_DECIDE[net_, call]


@pytest.mark.parametrize("name", ["root behind relu", "masked", "padded", "masked attention"])
@pytest.mark.parametrize("call", ["jacobian", "gradient", "jtj"])
def test_no_wait_for_what_reverse_mode_need_not_know(name, call, device):
    net, x = problem(device, name)
    assert not waits(device, lambda: CALLS[call](net, x))


def test_a_plan_that_is_far_faster_is_worth_a_wait(device):
    first, last = (device.net(torch.nn.Linear(n, 512)) for n in (4, 512))
    x = torch.empty(4096, 4, device="cuda")

    def call():
        return jactri.jacobian(lambda v: last(first(v).relu().sqrt()), x, per_sample=True)

    assert waits(device, call) == {"poles.met": 1}


class Roots(torch.nn.Module):
    """What acts on each token, behind attention in reverse: one matrix a token, made first, saves most of it."""

    def __init__(self, d):
        super().__init__()
        self.into = torch.nn.Linear(d, d)
        self.up, self.down = torch.nn.Linear(d, 4 * d), torch.nn.Linear(4 * d, d)
        self.attention = torch.nn.MultiheadAttention(d, 4, batch_first=True)

    def forward(self, x):
        x = self.into(x)
        x = x + self.down(self.up(x).relu().sqrt())
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("tokens, found", [(64, {"poles.met": 1}), (8, {})])
def test_reverse_mode_in_another_order_may_be_worth_a_wait(tokens, found, device):
    net, x = device.net(Roots(64)), torch.empty(4, tokens, 64, device="cuda")

    def call(f=jactri.jacobian, **options):
        return f(net, x, per_sample=True, strategy="reverse-mode", **options)

    assert waits(device, call) == found
    made_first = [s for s in call(jactri.explain).steps if s.structure == "matrices"]
    assert bool(made_first) == bool(found)


CAPTURED = [
    (net, call)
    for net in ("root behind relu", "written", "padded", "gathered", "indexed")
    for call in ("jacobian", "vjp", "jvp", "laplacian")
    if (net, call) != ("written", "laplacian")  # only values tell whether its samples mix
]


@pytest.mark.parametrize("name, call", CAPTURED)
def test_a_capture_reads_no_value(name, call, device):
    net, x = problem(device, name)
    Cuda().graph(lambda: CALLS[call](net, x))
    assert not [w for w in device.refused if w.site != "outside"]


def test_a_capture_in_which_samples_may_mix(device):
    net, x = problem(device, "experts")
    with pytest.raises(RuntimeError, match=r"capture of a CUDA graph.*per_sample='assume'"):
        Cuda().graph(lambda: jactri.jacobian(net, x, per_sample=True))
    device.clear()
    Cuda().graph(lambda: jactri.jacobian(net, x, per_sample="assume"))
    assert not [w for w in device.refused if w.site != "outside"]
