"""Derivatives of activations inside kernels, from the value that autograd saved, with autograd's choices at kinks.

Each takes the saved value in float32 and ``P``, a tuple of the activation's constants. `DERIVATIVES` names them:
a `Derivative` says which constants to give, in which order. What is not here arrives as a ready diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl


@triton.jit
def relu(y, P: tl.constexpr):
    return tl.where(y <= 0, 0.0, 1.0)  # a NaN is not <= 0: autograd passes its gradient on


@triton.jit
def leaky_relu(x, P: tl.constexpr):
    return tl.where(x > 0, 1.0, P[0])


@triton.jit
def elu(x, P: tl.constexpr):
    # scale * (x, or alpha * (exp(input_scale * x) - 1) below 0)
    return tl.where(x <= 0, P[0] * P[1] * P[2] * tl.exp(tl.minimum(x, 0.0) * P[2]), P[1])


@triton.jit
def elu_result(y, P: tl.constexpr):
    return tl.where(y <= 0, P[2] * (y + P[0] * P[1]), P[1])


@triton.jit
def gelu(x, P: tl.constexpr):
    return (
        0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    )


@triton.jit
def gelu_tanh(x, P: tl.constexpr):
    # with s = sigmoid(2 u) and e = exp(-2 |u|): (1 + tanh u) / 2 = s, (1 - tanh^2 u) / 4 = s (1 - s) = e / (1 + e)^2,
    # without the cancellation of 1 - s, which x^3 would blow up
    v = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    e = tl.exp(-tl.abs(v))
    r = 1.0 / (1.0 + e)
    return tl.where(v >= 0, r, e * r) + x * (e * r * r) * (
        1.5957691216057308 + 0.2140644488178008 * x * x
    )


@triton.jit
def silu(x, P: tl.constexpr):
    s = tl.sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def mish(x, P: tl.constexpr):
    # with w = e^x and q = w (w + 2): tanh(softplus(x)) = q / (q + 2), and 1 - tanh^2 = 4 (q + 1) / (q + 2)^2
    w = tl.exp(tl.minimum(x, 20.0))
    q = w * (w + 2.0)
    r = 1.0 / (q + 2.0)
    return q * r + x * tl.sigmoid(x) * (4.0 * (q + 1.0) * r * r)


@triton.jit
def sigmoid(y, P: tl.constexpr):
    return y * (1.0 - y)


@triton.jit
def tanh(y, P: tl.constexpr):
    return 1.0 - y * y


@triton.jit
def softplus(x, P: tl.constexpr):
    return tl.where(x * P[0] > P[1], 1.0, tl.sigmoid(x * P[0]))


@triton.jit
def hardtanh(x, P: tl.constexpr):
    return tl.where((x <= P[0]) | (x >= P[1]), 0.0, 1.0)


@triton.jit
def hardswish(x, P: tl.constexpr):
    return tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, x / 3.0 + 0.5, 1.0))


@triton.jit
def hardsigmoid(x, P: tl.constexpr):
    return tl.where((x > -3.0) & (x < 3.0), 1.0 / 6.0, 0.0)


@triton.jit
def softsign(x, P: tl.constexpr):
    r = 1.0 / (1.0 + tl.abs(x))
    return r * r


@triton.jit
def logsigmoid(x, P: tl.constexpr):
    return tl.sigmoid(-x)


@triton.jit
def sin(x, P: tl.constexpr):
    return tl.cos(x)


@triton.jit
def exp(y, P: tl.constexpr):
    return y


@triton.jit
def ready(d, P: tl.constexpr):
    """The derivative itself, computed elsewhere."""
    return d


@dataclass(frozen=True)
class Derivative:
    """A derivative function, the saved value that it reads ("x" or "y") and the names of its constants."""

    function: Any
    of: str
    constants: tuple[str, ...] = ()


DERIVATIVES = {
    "relu": Derivative(relu, "y"),
    "leaky_relu": Derivative(leaky_relu, "x", ("slope",)),
    "elu": Derivative(elu, "x", ("alpha", "scale", "input_scale")),
    "elu_result": Derivative(elu_result, "y", ("alpha", "scale", "input_scale")),
    "gelu": Derivative(gelu, "x"),
    "gelu_tanh": Derivative(gelu_tanh, "x"),
    "silu": Derivative(silu, "x"),
    "mish": Derivative(mish, "x"),
    "sigmoid": Derivative(sigmoid, "y"),
    "tanh": Derivative(tanh, "y"),
    "softplus": Derivative(softplus, "x", ("beta", "threshold")),
    "hardtanh": Derivative(hardtanh, "x", ("least", "most")),
    "hardswish": Derivative(hardswish, "x"),
    "hardsigmoid": Derivative(hardsigmoid, "x"),
    "softsign": Derivative(softsign, "x"),
    "logsigmoid": Derivative(logsigmoid, "x"),
    "sin": Derivative(sin, "x"),
    "exp": Derivative(exp, "y"),
    "ready": Derivative(ready, "d"),
}
