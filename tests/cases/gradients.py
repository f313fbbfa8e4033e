"""Gradients as functions: their graphs hold the backward ops' own nodes."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import A, C, D, M, R, S

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
