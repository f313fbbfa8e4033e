"""Activations: a row for each, and for its derivative, which is an op of its own in the graph of a gradient."""

from __future__ import annotations

import math

import numpy
import torch
from torch import Tensor

from ..maps.curvature import Curves
from ..maps.layout import one
from . import rule
from .elementwise import (
    Form,
    Partials,
    Read,
    Slopes,
    flat,
    op,
    pairs,
    saved,
    several,
    twice,
    unary_full,
)

# -- both derivatives -------------------------------------------------------------------------------


def tanh(y: Tensor) -> Slopes:
    # 1 - y^2 and -2 y (1 - y^2), each in one pass over memory
    d = torch.addcmul(one(y), y, y, value=-1)
    return d, torch.addcmul(y.new_zeros(()), y, d, value=-2)


def sigmoid(y: Tensor) -> Slopes:
    d = torch.addcmul(y, y, y, value=-1)
    return d, torch.addcmul(d, d, y, value=-2)


def softplus(x: Tensor, beta: float, threshold: float) -> Slopes:
    z = x * beta
    s, linear = torch.sigmoid(z), z > threshold
    return s.masked_fill(linear, 1), (s * (1 - s) * beta).masked_fill(linear, 0)


def silu(x: Tensor) -> Slopes:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s)), s * (1 - s) * (2 + x * (1 - 2 * s))


def gelu(x: Tensor) -> Slopes:
    square = x * x
    density = torch.exp(square * -0.5) * (1 / math.sqrt(2 * math.pi))
    return torch.special.ndtr(x) + x * density, density * (2 - square)


def gelu_tanh(x: Tensor) -> Slopes:
    c, a = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    t = torch.tanh(c * (x + a * x * square))
    u1, u2 = c * (1 + 3 * a * square), 6 * a * c * x
    e = 1 - t * t
    half = 0.5 * x * e
    return 0.5 * (1 + t) + half * u1, e * u1 + half * (u2 - 2 * t * u1 * u1)


def elu(x: Tensor, alpha: float, scale: float, inner: float) -> Slopes:
    below = x <= 0
    d = torch.exp(x.masked_fill(~below, 0) * inner) * (alpha * scale * inner)
    return torch.where(below, d, scale), torch.where(x < 0, d * inner, 0)


def elu_result(y: Tensor, alpha: float, scale: float, inner: float) -> Slopes:
    below = y <= 0
    d = (y + alpha * scale) * inner
    return torch.where(below, d, scale), torch.where(y < 0, d * inner, 0)


def mish(x: Tensor) -> Slopes:
    t, s = torch.tanh(torch.nn.functional.softplus(x)), torch.sigmoid(x)
    slope = (1 - t * t) * s
    return t + x * slope, slope * (2 + x * (1 - s - 2 * t * s))


def log_sigmoid(x: Tensor) -> Slopes:
    d = torch.sigmoid(-x)
    return d, d * d - d


def of_elu(read: Read) -> tuple[float, ...]:
    return read("alpha"), read("scale"), read("input_scale")


def of_celu(read: Read) -> tuple[float, ...]:
    # autograd rounds alpha to float32 here
    return read("alpha"), 1.0, 1 / float(numpy.float32(read("alpha")))


GELU = {"none": Form("self", gelu, "gelu"), "tanh": Form("self", gelu_tanh, "gelu_tanh")}
"""By the ``approximate`` of the op."""


# -- curvature of the derivatives, and of what has more than one operand -----------------------------


def of_result(second):
    """That of ``c f'(y)`` in the cotangent c and the result y, by its second derivatives (twice cy, yy)."""

    def read(r) -> Curves | None:
        if not all(r.active(0, 1)):
            return twice(r) if r.active(1)[0] else {}
        saved = r.tensor("grad_output"), r.tensor("result" if r.has("result") else "output")
        return pairs(r, ((0, 1), (1, 1)), second, saved)

    return read


def prelu(r):
    if not all(r.active(0, 1)):
        return {}
    return pairs(r, ((0, 1),), lambda x: (2.0 * (x <= 0),), (r.tensor("self"),))


# -- one row each -----------------------------------------------------------------------------------


# fmt: off
op("Celu.0", Form("self", elu, "elu", of_celu), bounded=True)
op("Celu.1", Form("result", elu_result, "elu_result", of_celu), bounded=True)
op("Elu.0", Form("self", elu, "elu", of_elu), bounded=True)
op("Elu.1", Form("result", elu_result, "elu_result", of_elu), bounded=True)
op("Gelu", lambda read: GELU[read("approximate")], unary_full, bounded=True)
op("Hardshrink Softshrink Threshold.0-1", curve=flat, selects=True)
op("Hardsigmoid", Form("self", kernel="hardsigmoid"), curve=flat, scales=True, bounded=True)
op("Hardswish", Form("self", kernel="hardswish"), scales=True, bounded=True)
op("Hardtanh", Form("self", None, "hardtanh", saved("min_val", "max_val")), curve=flat, selects=True)
op("LeakyRelu.0", Form("self", None, "leaky_relu", saved("negative_slope")), curve=flat, bounded=True)
op("LeakyRelu.1", Form("result", None, "leaky_relu", saved("negative_slope")), curve=flat, bounded=True)
op("LogSigmoid", Form("self", log_sigmoid, "logsigmoid"), unary_full, bounded=True)
op("Mish", Form("self", mish, "mish"), bounded=True)
op("NativeDropout RreluWithNoise.0-1", curve=flat, bounded=True)
op("PreluKernel", read=several, curve=prelu, bounded=True)
op("Relu", Form("result", kernel="relu"), curve=flat, selects=True)
op("Sigmoid", Form("result", sigmoid, "sigmoid"), bounded=True)
op("Silu", Form("self", silu, "silu"), bounded=True)
op("Softplus", Form("self", softplus, "softplus", saved("beta", "threshold")), bounded=True)
op("Tanh", Form("result", tanh, "tanh"), bounded=True)

op("EluBackward GeluBackward LogSigmoidBackward SoftplusBackward", read=several)
op("HardshrinkBackward HardtanhBackward SoftshrinkBackward", read=several, curve=flat, selects=True)
op("HardswishBackward", read=several, scales=True)
op("LeakyReluBackward", read=several, curve=flat)
op("SigmoidBackward", read=several, curve=of_result(lambda c, y: (2 - 4 * y, -2 * c)))
op("TanhBackward", read=several, curve=of_result(lambda c, y: (-4 * y, -2 * c)))
op("ThresholdBackward", read=several, curve=flat, selects=True)
# fmt: on


@rule("PreluKernelBackward")
def prelu_backward(g):
    """The gradients in the input and in the slope."""
    outputs = []
    for nr in range(2):
        partials = Partials(g, output=nr)
        outputs.append(
            g.plus(
                [partials.diagonal(g, g.match(s), e) for e, s in enumerate(g.src) if s is not None]
            )
        )
    return tuple(outputs)
