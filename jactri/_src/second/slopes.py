"""First and second derivatives of elementwise ops, from what autograd saved.

By the name of the node: the saved value, its constants, and a formula that gives both derivatives. Kinks are where
autograd has them; second derivatives there are those of its double backward. Ops that are not here are differentiated
by autograd (see `curves`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
import torch
from torch import Tensor

from ..maps.layout import one

Slopes = tuple[Tensor, Tensor]


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


def sin(x: Tensor) -> Slopes:
    return torch.cos(x), -torch.sin(x)


def cos(x: Tensor) -> Slopes:
    return -torch.sin(x), -torch.cos(x)


def tan(y: Tensor) -> Slopes:
    d = 1 + y * y
    return d, 2 * y * d


def atan(x: Tensor) -> Slopes:
    d = 1 / (1 + x * x)
    return d, -2 * x * d * d


def asinh(x: Tensor) -> Slopes:
    d = (1 + x * x).rsqrt()
    return d, -x * d * d * d


def sinh(x: Tensor) -> Slopes:
    return torch.cosh(x), torch.sinh(x)


def cosh(x: Tensor) -> Slopes:
    return torch.sinh(x), torch.cosh(x)


def exp(y: Tensor) -> Slopes:
    return y, y


def exp2(y: Tensor) -> Slopes:
    d = y * math.log(2)
    return d, d * math.log(2)


def expm1(y: Tensor) -> Slopes:
    return y + 1, y + 1


def log(x: Tensor, base: float = 1.0) -> Slopes:
    d = 1 / (x * base)
    return d, -d / x


def log1p(x: Tensor) -> Slopes:
    d = 1 / (x + 1)
    return d, -d * d


def sqrt(y: Tensor) -> Slopes:
    d = 0.5 / y
    return d, -d * d / y


def rsqrt(y: Tensor) -> Slopes:
    square = y * y
    d = -0.5 * y * square
    return d, -1.5 * square * d


def reciprocal(y: Tensor) -> Slopes:
    d = -(y * y)
    return d, -2 * y * d


def power(x: Tensor, exponent: float) -> Slopes:
    if exponent in (0, 1):
        return torch.full_like(x, exponent), torch.zeros_like(x)
    if exponent == 2:
        return x + x, torch.full_like(x, 2)
    if exponent == 3:
        return 3 * x * x, 6 * x
    return exponent * x ** (exponent - 1), exponent * (exponent - 1) * x ** (exponent - 2)


def erf(x: Tensor) -> Slopes:
    d = torch.exp(-x * x) * (2 / math.sqrt(math.pi))
    return d, -2 * x * d


def erfc(x: Tensor) -> Slopes:
    d, bend = erf(x)
    return -d, -bend


def _none(read) -> tuple:
    return ()


def _elu(read) -> tuple:
    return read("alpha"), read("scale"), read("input_scale")


def _celu(read) -> tuple:
    # autograd rounds alpha to float32 here
    return read("alpha"), 1.0, 1 / float(numpy.float32(read("alpha")))


Row = tuple[str, Callable[..., Slopes], Callable]

FORMULAS: dict[str, Row] = {
    # node: (saved value, formula, its constants out of what the node saved)
    "Atan": ("self", atan, _none),
    "Asinh": ("self", asinh, _none),
    "Celu.0": ("self", elu, _celu),
    "Celu.1": ("result", elu_result, _celu),
    "Cos": ("self", cos, _none),
    "Cosh": ("self", cosh, _none),
    "Elu.0": ("self", elu, _elu),
    "Elu.1": ("result", elu_result, _elu),
    "Erf": ("self", erf, _none),
    "Erfc": ("self", erfc, _none),
    "Exp": ("result", exp, _none),
    "Exp2": ("result", exp2, _none),
    "Expm1": ("result", expm1, _none),
    "Gelu": ("self", gelu, _none),
    "Log": ("self", log, _none),
    "Log10": ("self", log, lambda read: (math.log(10),)),
    "Log1P": ("self", log1p, _none),
    "Log2": ("self", log, lambda read: (math.log(2),)),
    "LogSigmoid": ("self", log_sigmoid, _none),
    "Mish": ("self", mish, _none),
    "Pow": ("self", power, lambda read: (read("exponent"),)),
    "Reciprocal": ("result", reciprocal, _none),
    "Rsqrt": ("result", rsqrt, _none),
    "Sigmoid": ("result", sigmoid, _none),
    "Silu": ("self", silu, _none),
    "Sin": ("self", sin, _none),
    "Sinh": ("self", sinh, _none),
    "Softplus": ("self", softplus, lambda read: (read("beta"), read("threshold"))),
    "Sqrt": ("result", sqrt, _none),
    "Tan": ("result", tan, _none),
    "Tanh": ("result", tanh, _none),
}
"""Named as `rules.node_names` reads names."""

FLAT = """
Abs Add.0-1 Ceil Clamp.0-1 ClampMax.0-1 ClampMin.0-1 Copysign.0-1 Deg2Rad Fill.0-3 Floor Fmax Fmin Fmod.0-1 Frac
Hardshrink Hardsigmoid Hardtanh LeakyRelu.0-1 Maximum Minimum NanToNum NativeDropout Neg Rad2Deg Relu Round.0-1
RreluWithNoise.0-1 Rsub.0-1 Sgn Sign Softshrink Sub.0-1 Threshold.0-1 Trunc Where Zero Div.2-3 MaskedFill.0-1
Amax Amin Max.1 Min.1 Median.0 Nanmedian.0 Nansum Trace Aminmax IndexFill.0-1 NllLoss NllLoss2D Remainder.1
HardshrinkBackward HardtanhBackward LeakyReluBackward SoftshrinkBackward ThresholdBackward
""".split()
"""Ops whose first derivative in every operand does not change with any of them, but for kinks."""
