"""Gradients as functions: their graphs hold the backward ops' own nodes."""

import torch
import torch.nn.functional as F
from torch import nn

from .case import A, C, D, M, P, R, S, seeded

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


def gradients(func):
    """xs -> the gradients of sum(sin(func(*xs))) in all of them."""

    def call(*xs):
        ys = tuple(x if x.requires_grad else x.clone().requires_grad_() for x in xs)
        with torch.enable_grad():
            return torch.autograd.grad(func(*ys).sin().sum(), ys, create_graph=True)

    return call


CANCEL = {"second": False, "factor": 16, "reason": "second derivatives cancel"}
CASES += [
    C("gradients_of_linear", gradients(F.linear), R(3, 2), R(2, 2), R(2), **CANCEL),
    C("gradients_of_conv1d", gradients(F.conv1d), R(2, 2, 4), R(3, 2, 2), R(3),
      nodes="ConvolutionBackward", **CANCEL),
    C("gradients_of_conv2d", gradients(lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1)),
      R(2, 1, 3, 3), R(2, 1, 2, 2), R(2), nodes="ConvolutionBackward", **CANCEL),
    C("gradients_of_grouped_conv", gradients(lambda x, w: F.conv1d(x, w, groups=2, dilation=2)),
      R(2, 2, 4), R(2, 1, 2), nodes="ConvolutionBackward", **CANCEL),
    C("gradients_of_conv_transpose", gradients(lambda x, w, b: F.conv_transpose1d(x, w, b,
      stride=2, padding=1, output_padding=1)), R(2, 2, 2), R(2, 3, 3), R(3),
      nodes="ConvolutionBackward", **CANCEL),
    C("gradients_of_layer_norm", gradients(lambda x, w, b: F.layer_norm(x, (4,), w, b)), R(3, 4),
      R(4), R(4), nodes="NativeLayerNormBackward", **CANCEL),
    C("gradients_of_layer_norm_2", gradients(lambda x, w, b: F.layer_norm(x, (3, 2), w, b)),
      R(2, 3, 2), R(3, 2), R(3, 2), nodes="NativeLayerNormBackward", **CANCEL),
    C("gradients_of_group_norm", gradients(lambda x, w, b: F.group_norm(x, 2, w, b)), R(2, 4, 3),
      R(4), R(4), **CANCEL),
    C("gradients_of_batch_norm", gradients(lambda x, w, b: F.batch_norm(x, None, None, w, b,
      training=True)), R(4, 2, 2), R(2), R(2), nodes="NativeBatchNormBackward", **CANCEL),
    C("gradients_of_batch_norm_eval", gradients(lambda x, w, b: F.batch_norm(x, x.new_zeros(2),
      x.new_full((2,), 2.0), w, b)), R(4, 2, 2), R(2), R(2), nodes="NativeBatchNormBackward",
      **CANCEL),
    C("gradients_of_prelu", gradients(F.prelu), A(2, 3, 2), R(3), nodes="PreluKernelBackward",
      **CANCEL),
    C("gradients_of_embedding", gradients(lambda w: F.embedding(torch.tensor([1, 0, 1],
      device=w.device), w)), R(3, 2), **CANCEL),
    C("gradients_of_bmm", gradients(torch.bmm), R(2, 2, 3), R(2, 3, 2), samples=True, **CANCEL),
    C("gradients_of_mul", gradients(torch.mul), R(3, 4), R(3, 1), samples=True, **CANCEL),
    C("gradients_of_div", gradients(torch.div), R(3, 4), A(4), **CANCEL),
    C("gradients_of_pow", gradients(torch.pow), P(3, 4), R(3, 4),
      samples=True, **CANCEL),
    C("gradients_of_where", gradients(lambda x, y: torch.where(x > 0, x * y, y)), A(3, 4), R(4),
      **CANCEL),
    C("gradients_of_mse", gradients(F.mse_loss), R(3, 4), R(3, 4), **CANCEL),
    C("gradients_of_bce_with_logits", gradients(F.binary_cross_entropy_with_logits), R(3, 4),
      R(3, 4), **CANCEL),
    C("gradients_of_interpolated_product", gradients(lambda x, y: F.interpolate(x * y,
      scale_factor=2, mode="bilinear")), R(1, 1, 2, 2), R(1, 1, 2, 2), samples=True, **CANCEL),
    C("gradients_of_lstm_cell", gradients(lambda x, h, w: torch.tanh(F.linear(torch.cat([x, h], 1),
      w)) * h), R(2, 2), R(2, 3), R(3, 5), **CANCEL),
    C("gradients_of_attention", gradients(lambda q, k, v: (q @ k.mT).softmax(-1) @ v), R(2, 2, 2),
      R(2, 3, 2), R(2, 3, 2), samples=True, **CANCEL),
    C("gradients_of_weight_norm", gradients(lambda v, g: torch._weight_norm(v, g, 0)), R(3, 4),
      R(3, 1), samples=True, empty=False, **CANCEL),
    C("gradients_of_cdist", gradients(lambda x, y: (x[:, None] - y).norm(dim=-1)), R(3, 2), R(2, 2),
      **CANCEL),
]  # fmt: skip
