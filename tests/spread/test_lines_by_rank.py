"""Convolutional Jacobians by the lines of images: each rank runs patches from its lines, and no others."""

import numpy as np
import pytest
import torch
from alone import as_rank, put_together
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import jactri
from jactri._src.plan import parts

F64 = torch.float64


def draw(*shape):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(0))


def convs(*layers):
    made = []
    for layer in layers:
        made += [layer.to(F64), nn.Tanh()]
    net = nn.Sequential(*made[:-1])
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(draw(*p.shape) / 2)
    return net


def plain(c=2, h=3, k=3):
    return convs(
        nn.Conv2d(c, h, k, padding=k // 2), nn.Conv2d(h, h, k, padding=k // 2), nn.Conv2d(h, c, k, padding=k // 2)
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = plain(2, 3), nn.Conv2d(2, 2, 3, padding=1, dtype=F64)

    def forward(self, x):
        return self.outer(x.sin() + self.inner(x))


# name: (function, inputs, options)
CASES = {
    "images": (plain(), draw(1, 2, 12, 11), {}),
    "wide": (plain(), draw(1, 2, 9, 14), {}),
    "many channels": (plain(12, 2), draw(1, 12, 9, 8), {}),
    "one channel": (plain(1, 4), draw(1, 1, 13, 12), {}),
    "several": (plain(), draw(3, 2, 12, 9), {}),
    "strides": (convs(nn.Conv2d(2, 3, 3, 2, 1), nn.Conv2d(3, 2, 3, 1, 1)), draw(1, 2, 22, 18), {}),
    "transposed": (convs(nn.Conv2d(2, 3, 3, 1, 1), nn.ConvTranspose2d(3, 2, 3, 2, 1)), draw(1, 2, 9, 7), {}),
    "no padding": (convs(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, (2, 3))), draw(1, 2, 15, 11), {}),
    "dilated groups": (
        convs(nn.Conv2d(2, 4, 3, padding=2, dilation=2, groups=2), nn.Conv2d(4, 2, 1)), draw(1, 2, 14, 13), {}
    ),
    "residual": (Residual(), draw(2, 2, 14, 12), {}),
    "two outputs": (lambda x: (plain()(x), plain(2, 4)[0](x).cos()), draw(1, 2, 12, 9), {}),
    "fewer lines than ranks": (plain(1, 2), draw(1, 1, 3, 3), {}),
    "a memory limit": (plain(), draw(1, 2, 12, 11), {"memory_limit": "2MB"}),
}  # fmt: skip


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_parts_make_the_jacobian(name, count, strategy):
    func, x, options = CASES[name]
    found, _ = put_together(func, x, count, strategy=strategy, **options)
    want = torch.autograd.functional.jacobian(func, x)
    for mine, block in zip(found, want if isinstance(want, tuple) else (want,), strict=True):
        assert torch.allclose(mine, block, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("shape", [(1, 2, 16, 15), (2, 2, 16, 9), (1, 2, 16, 20)])
def test_a_rank_runs_its_lines(strategy, shape):
    func, x = plain(2, 6), draw(*shape)

    def flops(**options):
        with FlopCounterMode(display=False) as counted:
            jactri.jacobian(func, x, strategy=strategy, **options)
        return counted.get_total_flops()

    with FlopCounterMode(display=False) as forward:
        func(x)
    flops()  # matrices of weights are made once
    whole = flops() - forward.get_total_flops()
    for rank in range(4):
        with as_rank(rank, 4) as mesh:
            mine = flops(mesh=mesh) - forward.get_total_flops()
        assert mine <= 1.05 * whole / 4


def test_a_file(tmp_path, monkeypatch):
    """A line at a time, by the same mechanism."""
    run, made = parts.Parts.lines, []

    def lines(*asked):
        made.append(run(*asked))
        return made[-1]

    monkeypatch.setattr(parts.Parts, "lines", lines)
    func, x = plain(), draw(1, 2, 12, 11)
    shape = (*x.shape, *x.shape)
    out = np.memmap(tmp_path / "J", mode="w+", dtype="float64", shape=shape)
    with as_rank(0, 1) as mesh:
        jactri.jacobian(func, x, mesh=mesh, out=out, strategy="reverse-mode")
    assert len(made) == 12 and None not in made
    want = torch.autograd.functional.jacobian(func, x)
    assert torch.allclose(torch.from_numpy(out), want, rtol=1e-11, atol=1e-12)
