"""Derivatives of activations inside kernels, from the value that autograd saved, with autograd's choices at kinks.

Each takes the saved value in float32 and ``P``, a tuple of the activation's constants. `DERIVATIVES` names them:
a `Derivative` says which constants to give, in which order, and has the second derivative too (names ending in 2;
those of piecewise linear functions are zero, also at kinks). What is not here arrives as a ready diagonal.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
"""Of this file. Triton hashes a function that lies in a tuple by its name alone, so that its cache on disk would answer
with the code of an older one: kernels that take derivatives in a tuple take this constant, too."""


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


@triton.jit
def _most(x, most: tl.constexpr):
    return tl.where(x > most, most, x)  # unlike minimum, a NaN stays


@triton.jit
def elu2(x, P: tl.constexpr):
    return tl.where(x < 0, P[0] * P[1] * P[2] * P[2] * tl.exp(tl.minimum(x, 0.0) * P[2]), 0.0)


@triton.jit
def elu_result2(y, P: tl.constexpr):
    return tl.where(y < 0, P[2] * P[2] * (y + P[0] * P[1]), 0.0)


@triton.jit
def gelu2(x, P: tl.constexpr):
    x = _most(tl.abs(x), 20.0)  # x^2 must stay finite where the density is 0
    return (2.0 - x * x) * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def gelu_tanh2(x, P: tl.constexpr):
    # f = x s(v): f'' = s' (2 v' + x (v'' + (1 - 2 s) v'^2)), even in x; s' = e / (1 + e)^2, 1 - 2 s = (e - 1) / (1 + e)
    x = _most(tl.abs(x), 20.0)
    v = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    v1 = 1.5957691216057308 + 0.2140644488178008 * x * x
    e = tl.exp(-v)
    r = 1.0 / (1.0 + e)
    return e * r * r * (2.0 * v1 + x * (0.4281288976356016 * x + (e - 1.0) * r * v1 * v1))


@triton.jit
def silu2(x, P: tl.constexpr):
    # even in x, with e = exp(-|x|): s' = e / (1 + e)^2, 1 - 2 s = (e - 1) / (1 + e)
    x = _most(tl.abs(x), 1e4)
    e = tl.exp(-x)
    r = 1.0 / (1.0 + e)
    return e * r * r * (2.0 + x * (e - 1.0) * r)


@triton.jit
def mish2(x, P: tl.constexpr):
    # t = tanh(softplus(x)) = q / (q + 2): t' = 4 (q + 1) / (q + 2)^2 s, f'' = t' (2 + x (1 - s - 2 t s))
    x = -_most(-_most(x, 20.0), 1e4)
    w = tl.exp(x)
    q = w * (w + 2.0)
    r = 1.0 / (q + 2.0)
    s = w / (1.0 + w)
    return 4.0 * (q + 1.0) * r * r * s * (2.0 + x * (1.0 / (1.0 + w) - 2.0 * q * r * s))


@triton.jit
def sigmoid2(y, P: tl.constexpr):
    return y * (1.0 - y) * (1.0 - 2.0 * y)


@triton.jit
def tanh2(y, P: tl.constexpr):
    return -2.0 * y * (1.0 - y * y)


@triton.jit
def softplus2(x, P: tl.constexpr):
    s = tl.sigmoid(x * P[0])
    return tl.where(x * P[0] > P[1], 0.0, P[0] * s * (1.0 - s))


@triton.jit
def hardswish2(x, P: tl.constexpr):
    return tl.where((x > -3.0) & (x < 3.0), 1.0 / 3.0, 0.0)


@triton.jit
def softsign2(x, P: tl.constexpr):
    r = 1.0 / (1.0 + tl.abs(x))
    return tl.where(x < 0, 2.0, tl.where(x > 0, -2.0, 0.0)) * r * r * r


@triton.jit
def logsigmoid2(x, P: tl.constexpr):
    return -tl.sigmoid(x) * tl.sigmoid(-x)


@triton.jit
def sin2(x, P: tl.constexpr):
    return -tl.sin(x)


@dataclass(frozen=True)
class Derivative:
    """A derivative function, the saved value that it reads ("x" or "y") and the names of its constants.

    ``second`` is the second derivative of the activation out of the same value; None where it is zero everywhere.
    ``costly``: it takes ten instructions an element or more (10 to 15; gelu 40, mish 36, sin 87); the others take one
    to five, where a load of one that is ready takes one.
    """

    function: Any
    of: str
    constants: tuple[str, ...] = ()
    second: Any = None
    costly: bool = False


DERIVATIVES = {
    "relu": Derivative(relu, "y"),
    "leaky_relu": Derivative(leaky_relu, "x", ("slope",)),
    "elu": Derivative(elu, "x", ("alpha", "scale", "input_scale"), second=elu2, costly=True),
    "elu_result": Derivative(
        elu_result, "y", ("alpha", "scale", "input_scale"), second=elu_result2
    ),
    "gelu": Derivative(gelu, "x", second=gelu2, costly=True),
    "gelu_tanh": Derivative(gelu_tanh, "x", second=gelu_tanh2, costly=True),
    "silu": Derivative(silu, "x", second=silu2, costly=True),
    "mish": Derivative(mish, "x", second=mish2, costly=True),
    "sigmoid": Derivative(sigmoid, "y", second=sigmoid2),
    "tanh": Derivative(tanh, "y", second=tanh2),
    "softplus": Derivative(softplus, "x", ("beta", "threshold"), second=softplus2, costly=True),
    "hardtanh": Derivative(hardtanh, "x", ("least", "most")),
    "hardswish": Derivative(hardswish, "x", second=hardswish2),
    "hardsigmoid": Derivative(hardsigmoid, "x"),
    "softsign": Derivative(softsign, "x", second=softsign2, costly=True),
    "logsigmoid": Derivative(logsigmoid, "x", second=logsigmoid2, costly=True),
    "sin": Derivative(sin, "x", second=sin2, costly=True),
    "exp": Derivative(exp, "y", second=exp),
    "ready": Derivative(ready, "d"),
}
