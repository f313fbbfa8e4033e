"""What is made of weights alone follows every write to them, also those that no version counter sees."""

import pytest
import torch
from tolerances import assert_close
from torch import nn
from torch.func import jacrev, vmap

import jactri
from jactri._src.base import weights
from jactri._src.plan import patches


def fused(p):
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.1, fused=True).step()


def fused_adamw(p):
    p.grad = torch.ones_like(p)
    torch.optim.AdamW([p], lr=0.1, fused=True).step()


def freed(p):
    """As FSDP does: the memory goes, and comes back with other numbers."""
    numbers = p.detach() * 1.5
    storage = p.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    p.data.copy_(numbers)


def by_numpy(p):
    if p.device.type != "cpu":
        pytest.skip("numpy has the CPU's memory")
    p.detach().numpy().__imul__(1.5)


def unversioned(p):
    with torch.autograd._unsafe_preserve_version_counter(p), torch.no_grad():
        p.mul_(1.5)


def replaced(p):
    p.data = p.detach() * 1.5


@torch.inference_mode()
def inferring(p):
    p.mul_(1.5)


@torch.no_grad()
def swapped(p):
    p.set_(p.detach() * 1.5)


WRITES = {
    "in place": torch.no_grad()(lambda p: p.mul_(1.5)),
    "foreach": torch.no_grad()(lambda p: torch._foreach_mul_([p], 1.5)),
    "in inference mode": inferring,
    "fused SGD": fused,
    "fused AdamW": fused_adamw,
    ".data": lambda p: p.data.clamp_(-0.1, 0.1),
    ".data =": replaced,
    "set_": swapped,
    "numpy": by_numpy,
    "DLPack": lambda p: torch.from_dlpack(p.detach()).mul_(1.5),
    "storage": lambda p: p.untyped_storage().copy_((p.detach() * 1.5).untyped_storage()),
    "freed and back": freed,
    "without a version": unversioned,
}


def field():
    return nn.Sequential(
        nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)
    ), torch.randn(3, 4)


def images():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(),
        nn.Conv2d(4, 1, 3, padding=1),
    )  # fmt: skip
    return net, torch.randn(2, 1, 13, 12)


def classes():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 3 * 3, 5),
    )  # fmt: skip
    return net, torch.randn(2, 3, 8, 8)


def bottleneck():
    """Two matrices that are one for many seeds."""
    return nn.Sequential(
        nn.Linear(8, 9, False), nn.Linear(9, 8, False), nn.Tanh(), nn.Linear(8, 6)
    ), torch.randn(5, 8)


def divergence(net, x):
    return jactri.divergence(net, x)


def jacobian(net, x):
    return jactri.jacobian(net, x, per_sample=True)


CALLS = {
    "divergence": (field, divergence, torch.float64),
    "patches": (images, jacobian, torch.float64),
    "packed": (classes, jacobian, torch.float32),
    "one matrix": (bottleneck, jacobian, torch.float64),
}


def truth(net, x, call):
    weights = {name: p.detach().double() for name, p in net.named_parameters()}

    def one(v):
        return torch.func.functional_call(net, weights, v[None])[0]

    rows = vmap(jacrev(one))(x.double())
    return rows.diagonal(0, 1, 2).sum(1) if call is divergence else rows


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", CALLS)
def test_every_write_is_seen(name, write):
    parts, call, dtype = CALLS[name]
    net, x = (t.to(dtype) for t in parts())
    call(net, x)
    for p in [p for p in net.parameters() if p.dim() > 1]:
        WRITES[write](p)
        assert_close(call(net, x), truth(net, x, call), dtype, length=2000, scale=5.0)


def test_off_the_cpu_nothing_is_kept():
    """There no value can be read without waiting, and versions do not tell."""
    weight = torch.empty(3, 3, device="meta")
    before, made = len(weights._all()), []

    def form():
        made.append(weight @ weight)
        return made[-1]

    with torch.no_grad():
        for _ in range(2):
            weights.made_of(weight, "square", form, lambda m: (m,))
    assert len(made) == 2
    assert len(weights._all()) == before


def test_a_call_forms_the_matrices_of_its_patches_once(monkeypatch):
    """However many chunks it runs in."""
    net, x = images()
    formed, form = [], patches._matrix
    chunks, cut = [], patches.PatchRun.chunks

    def noted(edge, at, reverse):
        formed.append((edge, at))
        return form(edge, at, reverse)

    def counted(run):
        for chunk in cut(run):
            chunks.append(chunk)
            yield chunk

    monkeypatch.setattr(patches, "_matrix", noted)
    monkeypatch.setattr(patches.PatchRun, "chunks", counted)
    monkeypatch.setattr(patches, "CHUNK_BYTES", 1 << 12)
    got = jacobian(net, x)
    assert len(chunks) > 4 or x.device.type != "cpu"
    assert len(formed) == len(set(formed)) <= 3
    assert_close(got, truth(net, x, jacobian), torch.float32, length=2000)
    jacobian(net, x)
    assert len(formed) == 2 * len(set(formed[: len(formed) // 2]))
