"""Gradients as functions: their graphs hold the backward ops' own nodes."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import A, C, D, M, R, S, seeded

X = R(3, 4)


def gradient(func):
    """x -> the gradient of sum(sin(func(x)))."""

    def call(x):
        x = x.clone() if not x.requires_grad else x
        with torch.enable_grad():
            y = x if x.requires_grad else x.requires_grad_()
            (g,) = torch.autograd.grad(func(y).sin().sum(), y, create_graph=True)
        return g

    return call


SMOOTH = {
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": F.softplus, "silu": F.silu,
    "gelu": F.gelu, "mish": F.mish, "elu": F.elu, "relu": F.relu, "leaky_relu": F.leaky_relu,
    "logsigmoid": F.logsigmoid, "hardswish": F.hardswish, "exp_sin": lambda x: x.sin().exp(),
    "glu": F.glu, "softmax": lambda x: x.softmax(-1), "log_softmax": lambda x: x.log_softmax(-1),
    "hardtanh": F.hardtanh, "softshrink": lambda x: F.softshrink(x, 0.1),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0), "pow_3": lambda x: x**3, "sqrt": lambda x: (x * x + 1).sqrt(),
    "layer_norm": lambda x: F.layer_norm(x, (4,)), "division": lambda x: 1 / (x * x + 1),
    "group_norm": lambda x: F.group_norm(x, 1), "logsumexp": lambda x: x.logsumexp(-1),
    "cumsum": lambda x: x.cumsum(-1), "index": lambda x: x[:, [0, 0, 1]] ** 2,
}  # fmt: skip
CASES = [
    C(f"gradient_of_{name}", gradient(func), A(3, 4), samples=True, second=False, factor=16,
      reason="second derivatives cancel")
    for name, func in SMOOTH.items()
]  # fmt: skip
CASES += [
    C("gradient_of_conv", gradient(lambda x: F.conv1d(x, x.new_ones(2, 2, 2)).tanh()), R(2, 2, 4),
      samples=True, second=False),
    C("gradient_of_max_pool", gradient(lambda x: F.max_pool1d(x * x, 2)), D(2, 1, 4), samples=True,
      second=False),
    C("gradient_of_avg_pool", gradient(lambda x: F.avg_pool2d(x * x, 2)), R(2, 1, 2, 4),
      samples=True, second=False),
    C("gradient_of_interpolate", gradient(lambda x: F.interpolate(x * x, scale_factor=2,
      mode="linear")), R(2, 1, 3), samples=True, second=False),
    C("gradient_of_attention", gradient(lambda x: (x @ x.mT).softmax(-1) @ x), R(2, 3, 2),
      samples=True, second=False, factor=16, reason="second derivatives cancel"),
    C("gradient_of_mm", gradient(lambda x: x @ x.T @ x), S(2, 3), second=False),
    C("gradient_of_prod", gradient(lambda x: x.prod(-1)), A(3, 3), samples=True, second=False),
    C("gradient_of_std", gradient(lambda x: x.std(-1)), A(3, 4), samples=True, second=False,
      factor=16, reason="second derivatives cancel"),
    M("gradient_of_energy", lambda: nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 1)),
      X, func=lambda m, x: gradient(m)(x), samples=True, second=False),
]  # fmt: skip

# The backward ops of pools, resizes, losses and norms: name, function, input, samples kept apart.
BACKWARDS = [
    ("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x * x, 2), R(2, 1, 3), True),
    ("adaptive_avg_pool2d", lambda x: F.adaptive_avg_pool2d(x * x, (1, 2)), R(2, 1, 2, 3), True),
    ("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x * x, (1, 1, 2)), R(2, 1, 2, 1, 3), True),
    ("adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x * x, 2), D(2, 1, 3), True),
    ("adaptive_max_pool2d", lambda x: F.adaptive_max_pool2d(x * x, (1, 2)), D(2, 1, 2, 3), True),
    ("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x * x, 1), D(2, 1, 2, 1, 2), True),
    ("avg_pool3d", lambda x: F.avg_pool3d(x * x, (1, 2, 2), stride=1), R(1, 1, 2, 2, 3), True),
    ("max_pool2d", lambda x: F.max_pool2d(x * x, 2, stride=1), D(2, 1, 2, 3), True),
    ("max_pool3d", lambda x: F.max_pool3d(x * x, (1, 2, 2)), D(1, 1, 2, 2, 2), True),
    ("fractional_max_pool2d",
     seeded(lambda x: F.fractional_max_pool2d(x * x, 2, output_size=2)), D(1, 1, 4, 4), False),
    ("fractional_max_pool3d",
     seeded(lambda x: F.fractional_max_pool3d(x * x, 2, output_size=1)), D(1, 1, 3, 3, 3), False),
    ("batch_norm_train",
     lambda x: F.batch_norm(x, None, None, x.new_tensor([0.5, 1, 2]), training=True), R(4, 3), False),
    ("batch_norm_eval", lambda x: F.batch_norm(x * x, x.new_zeros(3), x.new_full((3,), 2.0)),
     R(4, 3), True),
    ("prelu", lambda x: F.prelu(x * x.abs(), x.new_tensor([0.3])), A(3, 4), True),
    ("mse_loss", lambda x: F.mse_loss(x * x, x.new_ones(3, 4)), R(3, 4), False),
    ("mse_loss_none", lambda x: F.mse_loss(x, x.new_ones(3, 4), reduction="none"), R(3, 4), True),
    ("huber_loss", lambda x: F.huber_loss(x, x.new_ones(3, 4), delta=0.6), R(3, 4), False),
    ("smooth_l1_loss", lambda x: F.smooth_l1_loss(x, x.new_ones(3, 4)), R(3, 4), False),
    ("soft_margin_loss", lambda x: F.soft_margin_loss(x, x.new_ones(3, 4)), R(3, 4), False),
    ("bce", lambda x: F.binary_cross_entropy(x.sigmoid(), x.new_full((3, 4), 0.3)), R(3, 4), False),
    ("bce_with_logits", lambda x: F.binary_cross_entropy_with_logits(x, x.new_full((3, 4), 0.3)),
     R(3, 4), False),
    ("nll_loss", lambda x: F.nll_loss(x * x, torch.tensor([1, 0, 3], device=x.device)), R(3, 4),
     False),
    ("nll_loss_2d", lambda x: F.nll_loss(x * x, torch.tensor([[[1, 0]]], device=x.device)),
     R(1, 2, 1, 2), False),
    ("cross_entropy", lambda x: F.cross_entropy(x, torch.tensor([1, 0, 3], device=x.device)),
     R(3, 4), False),
    ("cross_entropy_none", lambda x: F.cross_entropy(x, torch.tensor([1, 0, 3], device=x.device),
     reduction="none"), R(3, 4), True),
    ("kl_div", lambda x: F.kl_div(x.log_softmax(-1), x.new_full((3, 4), 0.25),
     reduction="sum"), R(3, 4), False),
] + [
    (f"interpolate_{mode}_{len(shape) - 2}d",
     lambda x, m=mode: F.interpolate(x * x, size=[3, 2, 3][: x.ndim - 2], mode=m),
     R(*shape), True)
    for mode, shape in [
        ("nearest", (2, 1, 2)), ("nearest", (2, 1, 2, 1)), ("nearest", (1, 1, 2, 1, 2)),
        ("nearest-exact", (2, 1, 2)), ("nearest-exact", (2, 1, 2, 1)),
        ("nearest-exact", (1, 1, 2, 1, 2)), ("bilinear", (2, 1, 2, 2)), ("bicubic", (1, 1, 3, 2)),
        ("trilinear", (1, 1, 2, 1, 2)),
    ]
] + [
    (f"interpolate_{mode}_antialias",
     lambda x, m=mode: F.interpolate(x * x, size=(2, 3), mode=m, antialias=True), R(1, 1, 3, 2), True)
    for mode in ("bilinear", "bicubic")
]  # fmt: skip
CASES += [
    C(f"gradient_of_{name}", gradient(func), spec, samples=samples or None, second=False, factor=16,
      reason="second derivatives cancel",
      strided=name != "nll_loss_2d")  # there torch asks for contiguous memory
    for name, func, spec, samples in BACKWARDS
]  # fmt: skip
