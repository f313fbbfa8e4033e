"""Functions of one operand, of mathematics and the like: a row for each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .elementwise import Form, Slopes, by, flat, op, saved, unary
from .squares import squared

# -- both derivatives -------------------------------------------------------------------------------


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


def pow_scalar(g):
    exponent = g.saved("exponent")
    if exponent == 0:  # not infinity times 0
        m = g.meta[0]
        return g.mask(g.match(g.src[0]), lambda: torch.zeros((), dtype=m.dtype, device=m.device))
    if exponent != 2:
        return unary(g)
    if g.distances and (found := squared(g, g.src[0], g.src[0])) is not None:
        return found
    x = g.tensor("self")
    return g.diagonal(g.match(g.src[0]), lambda: x + x, fresh=True)


# -- one row each -----------------------------------------------------------------------------------

op("Abs Angle NanToNum", curve=flat, bounded=True)
op("Acos Acosh Asin Atanh")
op("Asinh", Form("self", asinh))
op("Atan", Form("self", atan), bounded=True)
op("Clamp.1 ClampMax.0 ClampMin.0", curve=flat, selects=True)
op("Copysign.1 Deg2Rad Div.3 Rad2Deg", curve=flat)
op("Cos", Form("self", cos), bounded=True)
op("Cosh", Form("self", cosh))
op("Digamma Lgamma Mvlgamma Polygamma.0-1")
op("Erf", Form("self", erf), bounded=True)
op("Erfc", Form("self", erfc))
op("Erfinv I0")
op("Exp", Form("result", exp, "exp"), by(lambda y: y))
op("Exp2", Form("result", exp2))
op("Expm1", Form("result", expm1))
op("Log", Form("self", log), by(torch.reciprocal))
op("Log10", Form("self", log, constants=lambda read: (math.log(10),)))
op("Log1P", Form("self", log1p))
op("Log2", Form("self", log, constants=lambda read: (math.log(2),)))
op("Logit Sinc SpecialXlog1Py.1-2 Xlogy.1-2", scales=True)
op("Pow", Form("self", power, constants=saved("exponent")), pow_scalar)
op("Pow.2")
op("Reciprocal", Form("result", reciprocal))
op("Rsqrt", Form("result", rsqrt))
op("Sin", Form("self", sin, "sin"), by(torch.cos), bounded=True)
op("Sinh", Form("self", sinh))
op("SpecialEntr SpecialErfcx SpecialLogNdtr SpecialNdtri SpecialZeta.1")
op("SpecialI0E SpecialI1 SpecialI1E")
op("Sqrt", Form("result", sqrt), by(lambda y: 0.5 / y))
op("Tan", Form("result", tan))
