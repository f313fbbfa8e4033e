"""Products of two batches of matrices against float64, and where sweeps take them."""

import copy
from itertools import pairwise

import pytest
import torch
from guard import Canvas, guarded
from precision import WAYS, distance, limit
from torch import nn

import jactri
from jactri._src.base import backends
from jactri._src.device import batching, chooser
from jactri.kernels import batched, naive
from jactri.kernels.linear import Config

SHAPES = [(3, 5, 7, 9), (1, 1, 1, 1), (2, 70, 32, 130), (5, 16, 33, 17), (2, 129, 3, 64), (3, 65, 100, 8)]  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh():
    chooser.forget()
    yield
    chooser.forget()


def _check(shape, way, device, dtype=torch.float32, order=None, gap=1, config=None):
    b, m, k, n = shape
    left = guarded(torch.randn(b, m, k, device=device).to(dtype), order, gap)
    right = guarded(torch.randn(b, k, n, device=device).to(dtype), order, gap)
    canvas = Canvas((b, m, n), dtype, device, order, gap)
    got = batched.batched(left, right, precision=way, out=canvas.view, config=config)
    assert got is canvas.view
    truth = naive.batched(left.double(), right.double())
    off, plain = distance(got, truth), distance(torch.bmm(left.float(), right.float()), truth)
    canvas.check()
    assert off <= limit(way, dtype, 1, plain), off


@pytest.mark.parametrize("way", WAYS[:-1])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_precisions(shape, way, device):
    _check(shape, way, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_half(shape, dtype, device):
    _check(shape, "half", device, dtype)


@pytest.mark.parametrize("config", [*batched.CONFIGS, Config(64, 16, 16, 4, 1)])
@pytest.mark.parametrize("way", ["bf16x6", "tf32x3"])
def test_every_configuration(way, config, device):
    _check((2, 130, 70, 150), way, device, config=config)


def test_where_few_features_meet_one_tile_is_compiled():
    assert len(batched.configs(32)) == 1 and batched.configs(65) == batched.CONFIGS


@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
def test_strides(order, gap, device):
    for way in ("bf16x6", "tf32x3"):
        _check((3, 20, 35, 33), way, device, order=order, gap=gap)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 4, 0), (2, 3, 0, 4)])
def test_nothing_to_compute_or_to_sum(shape, device):
    b, m, k, n = shape
    left, right = torch.ones(b, m, k, device=device), torch.ones(b, k, n, device=device)
    got = batched.batched(left, right, precision="bf16x6")
    assert got.shape == (b, m, n) and not got.any()


def test_a_stretched_operand_is_read_where_it_lies(device):
    left = torch.randn(1, 6, 5, device=device).expand(4, 6, 5)
    right = torch.randn(4, 5, 7, device=device)
    got = batched.batched(left, right, precision="bf16x6")
    assert distance(got, left.double() @ right.double()) < 1e-6


def _autoencoder():
    widths = (64, 20, 3, 20, 64)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])  # fmt: skip


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        return torch.softmax(q @ k.mT / 6**0.5, -1) @ v


CALLS = {
    "two halves meet": (_autoencoder, (3, 64), "mixed"),
    "attention": (_Attention, (2, 5, 6), "auto"),
}


@pytest.mark.parametrize("call", CALLS)
def test_where_blocks_meet(call, device, monkeypatch):
    ran, plain = [], batched.batched
    monkeypatch.setattr(batched, "batched", lambda *a, **k: ran.append(a) or plain(*a, **k))
    build, shape, strategy = CALLS[call]
    f, x = build().to(device), torch.randn(shape, device=device)
    options = {"per_sample": True, "strategy": strategy}
    truth = jactri.jacobian(copy.deepcopy(f).double(), x.double(), **options)
    options["backend"] = "triton"
    got = jactri.jacobian(f, x, **options)
    assert distance(got, truth) < 2e-6 and ran
    out = torch.full_like(got, float("nan"))
    assert jactri.jacobian(f, x, out=out, **options) is out
    assert distance(out, truth) < 2e-6
    if call == "two halves meet":
        text = str(jactri.explain(f, x, **options))
        assert "batched (bf16x6, tile 64x64x32, 4 warps): 1 launch" in text


def test_a_small_product_is_torchs_unless_the_kernel_is_asked_for(device, monkeypatch):
    ran, plain = [], batched.batched
    monkeypatch.setattr(batched, "batched", lambda *a, **k: ran.append(a) or plain(*a, **k))
    monkeypatch.setattr(backends, "kernels_for", lambda t: True)
    left, right = torch.randn(2, 3, 4, device=device), torch.randn(2, 4, 5, device=device)
    with torch.no_grad():
        for forced in (False, True, False):
            with backends.use("triton" if forced else "auto"):
                assert distance(batching.bmm(left, right), left.double() @ right.double()) < 1e-6
            assert bool(ran) == forced
            ran.clear()
        monkeypatch.setattr(chooser, "WORTH", 0)
        batching.bmm(left, right)
        assert ran


def test_the_kernel_has_no_derivative_so_that_torch_computes_what_is_differentiated(device):
    left = torch.randn(2, 3, 4, device=device, requires_grad=True)
    right = torch.randn(2, 4, 5, device=device)
    with backends.use("triton"):
        assert batching.bmm(left, right).requires_grad
