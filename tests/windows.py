"""Functions whose Jacobians have a pattern: (function, shape of the input, whether it is their whole support)."""

import torch
from torch import nn
from torch.nn import functional as F

F64 = torch.float64


def _net(*parts):
    torch.manual_seed(0)
    return nn.Sequential(*[p() for p in parts]).double().eval()


def conv(*a, d=2, **k):
    return lambda: getattr(nn, f"Conv{d}d")(*a, **k)


def back(*a, d=2, **k):
    return lambda: getattr(nn, f"ConvTranspose{d}d")(*a, **k)


class Residual(nn.Module):
    """Two convolutions beside the identity, or a 1x1 convolution."""

    def __init__(self, c, out=None, stride=1):
        super().__init__()
        out = out or c
        self.a = nn.Conv2d(c, out, 3, stride, 1)
        self.b = nn.Conv2d(out, out, 3, 1, 1)
        self.beside = nn.Identity() if (c, stride) == (out, 1) else nn.Conv2d(c, out, 1, stride)

    def forward(self, x):
        return torch.tanh(self.b(torch.tanh(self.a(x))) + self.beside(x))


def flat_image(x):
    net = _net(conv(1, 2, 3, padding=1), nn.Tanh, conv(2, 1, 3, padding=1))
    return net(x.view(len(x), 1, 6, 7)).flatten(1)


FUNCTIONS = {
    "one convolution": (_net(conv(2, 3, 3, padding=1)), (2, 2, 6, 7), True),
    "two convolutions, nothing between": (
        _net(conv(2, 3, 3, padding=1), conv(3, 1, 3, padding=1)),
        (2, 2, 6, 7),
        True,
    ),
    "three convolutions": (
        _net(
            conv(1, 4, 3, padding=1),
            nn.Tanh,
            conv(4, 4, 3, padding=1),
            nn.SiLU,
            conv(4, 2, 3, padding=1),
        ),
        (2, 1, 12, 11),
        True,
    ),
    "padding that shrinks and grows": (
        _net(conv(2, 3, 3), nn.Tanh, conv(3, 2, (1, 3), padding=(2, 3)), nn.Tanh, conv(2, 1, 2)),
        (2, 2, 7, 8),
        True,
    ),
    "dilation": (
        _net(conv(1, 3, 3, padding=2, dilation=2), nn.Tanh, conv(3, 1, 3, padding=1)),
        (2, 1, 9, 9),
        True,
    ),
    "strides": (
        _net(conv(1, 3, 3, 2, 1), nn.Tanh, conv(3, 2, 3, 2, 1)),
        (2, 1, 12, 13),
        True,
    ),
    "a stride larger than the kernel": (_net(conv(1, 3, 2, 3), nn.Tanh), (2, 1, 11, 12), True),
    "down and up": (
        _net(conv(1, 3, 3, 2, 1), nn.Tanh, back(3, 2, 3, 2, 1, output_padding=1)),
        (2, 1, 8, 10),
        True,
    ),
    "up": (
        _net(back(2, 3, 3, 2), nn.Tanh, back(3, 1, 2, 1, dilation=2)),
        (2, 2, 4, 5),
        True,
    ),
    "groups": (
        _net(conv(4, 4, 3, padding=1, groups=2), nn.Tanh, conv(4, 4, 3, padding=1, groups=4)),
        (2, 4, 6, 6),
        True,
    ),
    "groups that differ": (
        _net(
            conv(6, 4, 1, groups=2),
            nn.Tanh,
            conv(4, 6, 3, padding=1, groups=2),
            conv(6, 3, 1, groups=3),
        ),
        (2, 6, 5, 6),
        True,
    ),
    "groups, up": (
        _net(back(4, 6, 3, 2, groups=2), nn.Tanh, conv(6, 6, 1, groups=3)),
        (2, 4, 4, 5),
        True,
    ),
    "groups in lines": (_net(conv(8, 4, 3, padding=1, groups=4, d=1), nn.Tanh), (2, 8, 9), True),
    "depthwise": (_net(conv(3, 6, 3, padding=1, groups=3), nn.Tanh), (2, 3, 6, 6), True),
    "depthwise alone": (_net(conv(3, 3, 3, padding=1, groups=3), nn.Tanh), (2, 3, 6, 6), True),
    "batch norm in eval": (
        _net(
            conv(2, 3, 3, padding=1), lambda: nn.BatchNorm2d(3), nn.Tanh, conv(3, 2, 3, padding=1)
        ),
        (2, 2, 6, 6),
        True,
    ),
    "max pool": (
        _net(conv(1, 2, 3, padding=1), lambda: nn.MaxPool2d(2), conv(2, 1, 3, padding=1)),
        (2, 1, 9, 8),
        False,
    ),
    "overlapping max pool": (
        _net(conv(1, 2, 1), lambda: nn.MaxPool2d(3, 1, 1), nn.Tanh),
        (2, 1, 6, 7),
        False,
    ),
    "average pool": (
        _net(conv(1, 2, 3), nn.Tanh, lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
        (2, 1, 9, 8),
        True,
    ),
    "adaptive pools": (
        _net(lambda: nn.AdaptiveAvgPool2d((5, 4)), nn.Tanh, lambda: nn.AdaptiveMaxPool2d(3)),
        (2, 2, 8, 9),
        False,
    ),
    "bilinear": (
        _net(conv(1, 2, 3), lambda: nn.Upsample(scale_factor=2, mode="bilinear"), nn.Tanh),
        (2, 1, 6, 6),
        True,
    ),
    "nearest": (
        _net(lambda: nn.Upsample(scale_factor=3), nn.Tanh, conv(2, 1, 3, padding=1)),
        (2, 2, 4, 5),
        True,
    ),
    "pixel shuffle": (
        _net(
            conv(2, 4, 3, padding=1), lambda: nn.PixelShuffle(2), nn.Tanh, conv(1, 2, 3, padding=1)
        ),
        (2, 2, 5, 6),
        False,
    ),
    "reflection": (
        _net(conv(1, 2, 3, padding=1, padding_mode="reflect"), nn.Tanh),
        (2, 1, 6, 7),
        True,
    ),
    "replication": (
        _net(conv(1, 2, 5, padding=2, padding_mode="replicate"), nn.Tanh),
        (2, 1, 6, 7),
        True,
    ),
    "residual": (_net(lambda: Residual(2), lambda: Residual(2)), (2, 2, 9, 10), True),
    "residual with stride": (_net(lambda: Residual(2, 3, 2)), (2, 2, 9, 10), True),
    "lines": (
        _net(conv(2, 3, 5, padding=2, d=1), nn.Tanh, conv(3, 2, 3, padding=1, d=1)),
        (2, 2, 17),
        True,
    ),
    "strided lines": (_net(conv(1, 3, 4, 3, d=1), nn.Tanh), (3, 1, 17), True),
    "volumes": (_net(conv(1, 2, 3, padding=1, d=3), nn.Tanh), (1, 1, 4, 5, 4), True),
    "a flat image": (flat_image, (2, 42), True),
    "flip, roll and running sum": (
        lambda x: x.flip(2).roll(2, 1).cumsum(1).tanh(),
        (2, 5, 4),
        True,
    ),
    "slices": (lambda x: torch.cat([x[:, 1:-1:2], x[:, :3].sin()], 1), (2, 9), True),
    "elementwise": (lambda x: x.sin() * x, (2, 3, 4), True),
    "a linear layer a pixel": (
        lambda x: F.conv2d(x, torch.ones(2, 3, 1, 1, dtype=F64)).exp(),
        (2, 3, 4, 5),
        True,
    ),
    "a batch of a perceptron": (
        _net(lambda: nn.Linear(3, 4), nn.Tanh, lambda: nn.Linear(4, 2)),
        (3, 3),
        True,
    ),
}
DENSE_SAMPLES = {"a batch of a perceptron"}
"""Functions of which nothing is known to be zero in a sample's Jacobian."""
