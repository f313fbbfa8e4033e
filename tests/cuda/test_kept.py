"""Nothing made of weights outlives a call on a GPU, and a call makes it once: none waits to compare weights."""

import contextlib
from collections import Counter

import pytest
import torch
from torch import nn

import jactri
from benchmarks.gpu.sizes import sized
from jactri._src.base import constants, weights
from jactri.kernels import operands

WORKLOADS = {s.workload.name: s.workload for s in sized([])}


def jacobian(net, x, **options):
    return jactri.jacobian(net, x, per_sample=True, **options)


def images():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 1, 3, padding=1),
    )  # fmt: skip


def matrices():
    return nn.Sequential(
        nn.Linear(64, 65, False), nn.Linear(65, 64, False), nn.Tanh(), nn.Linear(64, 48)
    )


def field():
    return nn.Sequential(
        nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20)
    )


CALLS = {
    "images": (images, jacobian, (4, 1, 32, 32)),
    "matrices": (matrices, jacobian, (128, 64)),
    "divergence": (field, jactri.divergence, (128, 20)),
    "divergence at a point": (field, jactri.divergence, (20,)),
    "Laplacian": (lambda: nn.Sequential(field(), nn.Linear(20, 1)), jactri.laplacian, (128, 20)),
}  # fmt: skip


def problem(name, device):
    if name not in CALLS:
        w = WORKLOADS[name]
        net, x = device.problem(w)
        return (jacobian if w.operator is None else w.operator.jactri), net, x
    build, call, shape = CALLS[name]
    return call, device.net(build().eval().requires_grad_(False)), torch.empty(shape, device="cuda")


def held():
    return [t for e in weights._all() for _, tensors, _ in e.made.values() for t in tensors]


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("name", ["W6", "W8-divergence", *CALLS])
def test_a_call_waits_for_nothing(name, backend, device):
    call, net, x = problem(name, device)
    for _ in range(2):
        call(net, x, backend=backend)
    device.clear()
    before = held()
    call(net, x, backend=backend)
    assert not device.waits
    assert list(map(id, held())) == list(map(id, before))
    assert not [t for t in before if t.is_cuda]


PARTS = {
    "narrow": ((32, 96, 64, 24), {}, {"chunk_size": 8}),
    "wide": ((32, 256, 192, 24), {}, {"chunk_size": 8}),
    "little memory": ((32, 256, 192, 24), {}, {"memory_limit": 5 << 20}),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_call_in_parts_prepares_a_matrix_once(name, device, monkeypatch):
    widths, whole, parts = PARTS[name]
    layers = [m for i in range(3) for m in (nn.Linear(*widths[i : i + 2]), nn.Tanh())]
    net = device.net(nn.Sequential(*layers[:-1]).requires_grad_(False))
    x = torch.empty(512, widths[0], device="cuda")
    shapes, plain = [], operands._prepared

    def spy(given, precision):
        shapes.extend(tuple(m.shape) for m in given)
        return plain(given, precision)

    monkeypatch.setattr(operands, "_prepared", spy)
    launches = {}
    for options in (whole, parts):
        options = {"backend": "triton", "strategy": "reverse-mode", **options}
        for _ in range(2):
            shapes.clear()
            device.clear()
            jacobian(net, x, **options)
        assert len(shapes) == len(set(shapes)), shapes
        launches[len(options)] = Counter(l.kernel for l in device.launches)
    few, many = launches[2], launches[3]
    assert sum(many.values()) - many["_prepare"] > sum(few.values()) - few["_prepare"]
    assert many["_prepare"] <= few["_prepare"] + 1


class Tables(nn.Module):
    """In training mode, with buffers that it reads: one of them expanded."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.register_buffer("scale", torch.ones(5))
        self.register_buffer("rows", torch.ones(1).expand(5))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return (self.linear(x) * self.scale + self.rows).tanh()


def test_buffers_are_put_back_without_a_look(device):
    net = device.net(Tables()).train()
    net.rows = torch.empty(1, device="cuda").expand(5)
    x = torch.empty(4, 6, device="cuda")
    call = jactri.compile(net, x, of=jactri.parameter_jacobian, engine="fx")
    assert "one CUDA graph" in repr(call) and not device.refused
    versions = {name: b._version for name, b in net.named_buffers()}
    device.clear()
    jactri.parameter_jacobian(net, x).dense()
    assert not device.waits
    assert versions == {name: b._version for name, b in net.named_buffers()}


def test_constants_of_a_capture_are_not_kept(device):
    """They have no values before the first replay."""
    made = []

    def make():
        made.append(torch.ones(3, device="cuda"))
        return (made[-1],)

    for keep in (False, True):
        with torch.cuda.graph(torch.cuda.CUDAGraph()) if not keep else contextlib.nullcontext():
            constants.fixed(("a test", keep), make)
        assert any(t is made[-1] for t in constants.constants()) == keep
    del constants._fixed["a test", True]
