"""Whole networks as people write them: right in both dtypes, samples proven apart, and no fallback."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import jactri


class Residual(nn.Module):
    def __init__(self, inner, outer, stride):
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)])
        self.skip = nn.Conv2d(inner, outer, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.skip(x))


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.places = nn.Parameter(torch.randn(1, 5, 16))
        self.body = encoder()
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.places
        return self.head(self.body(tokens)[:, 0])


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 6, batch_first=True)
        self.lstm = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.lstm(self.gru(x)[0])[0][:, -1])


def encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        Residual(8, 8, 1), Residual(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def unet():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.SiLU(),
        nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.Upsample(scale_factor=2, mode="bilinear"), nn.AvgPool2d(2),
        nn.Conv2d(4, 1, 3, padding=1),
    )  # fmt: skip


def dynamics(x):
    """Writes into parts of a result, as hand-written equations of motion do."""
    q, p, u = x[:, :2], x[:, 2:4], x[:, 4:]
    dx = torch.zeros_like(x)
    dx[:, 0] = p[:, 0]
    dx[:, 1] = torch.sin(q[:, 0]) * p[:, 1]
    dx[:, 2:4] = -q * u.mean(1, keepdim=True)
    dx[:, 4] = torch.atan2(q[:, 1], p[:, 0])
    dx[:, 5] = torch.where(q[:, 0] > 0, p[:, 1] ** 2, torch.exp(-p[:, 1]))
    return x + 0.1 * dx


def flow(x):
    a = torch.eye(4, dtype=x.dtype) + 0.1 * x.unsqueeze(-1) * x.unsqueeze(-2)
    return torch.linalg.slogdet(a)[1].unsqueeze(1) + torch.linalg.solve(a, x.unsqueeze(-1)).squeeze(
        -1
    )


NETWORKS = {
    "residual": (resnet, (3, 3, 12, 12)),
    "image to image": (unet, (2, 1, 8, 8)),
    "transformer": (encoder, (2, 5, 16)),
    "vision transformer": (VisionTransformer, (3, 1, 8, 8)),
    "recurrent": (Sequence, (3, 6, 4)),
    "dynamics": (lambda: dynamics, (7, 6)),
    "flow": (lambda: flow, (6, 4)),
}


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_right_without_fallbacks(name, per_sample):
    build, shape = NETWORKS[name]
    func = build()
    if isinstance(func, nn.Module):
        func.eval()
    report = jactri.check(func, torch.randn(shape), per_sample=per_sample, raise_on_error=True)
    assert not report.fallbacks


@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_can_be_differentiated_again(name, strategy):
    build, shape = NETWORKS[name]
    func = build()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    if isinstance(func, nn.Module):
        func.eval().double()
        if name == "recurrent":
            x = x[:, :3].detach().requires_grad_()
    weight = None

    def penalty(call, **kw):
        nonlocal weight
        blocks = call(func, x, create_graph=True, **kw)
        if weight is None:
            weight = torch.randn_like(blocks)
        return torch.autograd.grad((blocks * weight).square().sum(), x)[0]

    got = penalty(jactri.jacobian, strategy=strategy)
    with sdpa_kernel(SDPBackend.MATH):  # torch cannot differentiate its fused attention twice
        want = penalty(torch.autograd.functional.jacobian)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
