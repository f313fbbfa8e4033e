"""Elementwise ops: one row each.

For any elementwise op the node applied to ones *is* the local derivative, so most rows are only names. Rows with an
analytic derivative are the hot ones, in terms of the value that autograd saved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import one
from . import rule

aten = torch.ops.aten

ANALYTIC = {
    # node: (saved value, derivative as a function of it); values at kinks are autograd's
    "Tanh": ("result", lambda y: aten.tanh_backward(one(y), y)),
    "Sigmoid": ("result", lambda y: aten.sigmoid_backward(one(y), y)),
    "Relu": ("result", lambda y: aten.threshold_backward(one(y), y, 0)),
    "Silu": ("self", lambda x: aten.silu_backward(one(x), x)),
    "Exp": ("result", lambda y: y),
    "Sin": ("self", torch.cos),
    "Cos": ("self", lambda x: -torch.sin(x)),
    "Log": ("self", torch.reciprocal),
    "Sqrt": ("result", lambda y: 0.5 / y),
    "Reciprocal": ("result", lambda y: -y * y),
}

UNARY = """
Abs Acos Acosh Asin Asinh Atan Atanh Ceil Celu Clamp ClampMax ClampMin Cosh Deg2Rad Digamma Elu Erf
Erfc Erfinv Exp2 Expm1 Floor Frac Gelu Hardshrink Hardsigmoid Hardswish Hardtanh I0 LeakyRelu Lgamma Log10
Log1P Log2 LogSigmoid Logit Mish Mvlgamma NanToNum Polygamma Pow Rad2Deg Round Rsqrt
SgnBackward0 Sign Sinc Sinh Softplus Softshrink SpecialEntr SpecialErfcx SpecialI0E SpecialI1
SpecialI1E SpecialLogNdtr SpecialNdtri Tan Threshold Trunc
""".split()

BINARY = "Atan2 Fmod Hypot Maximum Minimum Remainder Fmax Fmin Xlogy SpecialXlog1Py".split()


def _analytic(name: str, derivative):
    def run(g):
        saved = g.tensor(name)
        return g.diagonal(g.src[0], lambda: derivative(saved))

    return run


for _node, (_name, _derivative) in ANALYTIC.items():
    rule(_node)(_analytic(_name, _derivative))


@rule(*UNARY)
def unary(g):
    x = g.match(g.src[0])
    return g.diagonal(x, lambda node=g.node, m=g.meta[0]: _of_ones(node, m)[0])


def _of_ones(node, m) -> tuple[Tensor | None, ...]:
    ones = torch.ones((), dtype=m.dtype, device=m.device).expand(tuple(m.shape))
    out = node(ones)
    return out if isinstance(out, tuple) else (out,)


@rule(*BINARY)
def binary(g):
    return elementwise(g)


def elementwise(g):
    """Any number of operands: the derivative in each is the node applied to ones."""
    shape = g.shape
    partials = g.vjp_of_ones()
    terms = []
    for edge, s in enumerate(g.src):
        if s is None:
            continue
        d = partials[edge]
        if d is None or tuple(d.shape) != shape:
            return None  # already reduced by the node: the factors cannot be told apart
        terms.append(g.diagonal(g.match(s), d))
    return g.plus(terms)


@rule("Add", "Sub", "Rsub")
def add(g):
    name = g.name
    alpha = g.saved("alpha")
    factors = {"AddBackward0": (1, alpha), "SubBackward0": (1, -alpha), "RsubBackward0": (-alpha, 1)}[name]
    return g.plus([g.scale(s, f) for s, f in zip(g.src, factors, strict=False) if s is not None])


@rule("Neg")
def neg(g):
    return g.scale(g.src[0], -1)


@rule("Mul")
def mul(g):
    terms = []
    for s, partner in zip(g.src, ("other", "self"), strict=True):
        if s is not None:
            terms.append(g.diagonal(g.match(s), g.tensor(partner)))
    return g.plus(terms)


@rule("Clone", "Alias", "ViewAs", "Contiguous", "LiftFresh")
def same(g):
    return g.src[0]


@rule("ToCopy")
def to_copy(g):
    return g.cast(g.src[0])
