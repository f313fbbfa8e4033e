"""Elementwise ops in several operands, and what has no derivative, or only passes one on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.tracing import constant, number, tracing
from ..maps.curvature import Curves
from ..maps.layout import one
from ..maps.linear_map import View
from . import rule
from .elementwise import (
    Partials,
    Zero,
    fit,
    flat,
    multiplied,
    op,
    pairs,
    several,
    twice,
    unary,
)
from .squares import squared

# -- curvature --------------------------------------------------------------------------------------


def weighted_product(r):
    if not all(r.active(1, 2)):
        return {}
    return pairs(r, ((0, 1),), lambda value: (2.0 * value,), constants=(r.saved("value"),))


def _quotient(a: Tensor, b: Tensor, value: float = 1.0) -> tuple[Tensor, Tensor]:
    square = b * b
    return -2 * value / square, 2 * value * a / (square * b)


def _divisor(a: Tensor, b: Tensor, value: float = 1.0) -> tuple[Tensor]:
    return (2 * value * a / (b * b * b),)


def quotient(r):
    first, names, constants = 0, ("self", "other"), ()
    if r.name == "AddcdivBackward0":
        first, names, constants = 1, ("tensor1", "tensor2"), (r.saved("value"),)
    above, below = r.active(first, first + 1)
    if not below:
        return {}
    saved = [r.tensor(n) for n in names]
    if above:
        return pairs(r, ((0, 1), (1, 1)), _quotient, saved, constants)
    return pairs(r, ((0, 0),), _divisor, saved, constants)


def in_two(second, *names: str):
    """The curvature of an op in two operands, by its second derivatives (aa, twice ab, bb) out of what was saved."""

    def read(r) -> Curves | None:
        if not all(r.active(0, 1)):
            return twice(r)
        return pairs(r, ((0, 0), (0, 1), (1, 1)), second, [r.tensor(name) for name in names])

    return read


def power(x, e):
    log, y = torch.log(x), x**e
    return e * (e - 1) * x ** (e - 2), 2 * x ** (e - 1) * (1 + e * log), log * log * y


def angle(y, x):
    square = 1 / (x * x + y * y)
    mixed = 2 * x * y * square * square
    return -mixed, 2 * (y * y - x * x) * square * square, mixed


def length(x, y):
    cube = torch.hypot(x, y) ** -3
    return y * y * cube, -2 * x * y * cube, x * x * cube


def logaddexp(base: float):
    def second(x, y):
        p = torch.sigmoid((x - y) * base)
        spread = p * (1 - p) * base
        return spread, -2 * spread, spread

    return second


def xlogy(r):
    if not all(r.active(0, 1)):
        return twice(r) if r.active(1)[0] else {}
    saved = r.tensor("self"), r.tensor("other")
    return pairs(r, ((0, 1), (1, 1)), lambda x, y: (2 / y, -x / (y * y)), saved)


def lerp(r):
    """``start + weight * (end - start)``."""
    start, end, weight = r.active(0, 1, 2)
    if not weight or not (start or end):
        return {}
    if start and end:
        return pairs(r, ((0, 2), (1, 2)), lambda: (-2.0, 2.0))
    return pairs(r, ((0, 1),), lambda c: (c,), constants=(2.0 if end else -2.0,))


# -- one row each -----------------------------------------------------------------------------------

op("Atan2", read=several, curve=in_two(angle, "self", "other"))
op("Clamp.0 ClampMax.1 ClampMin.1 Fmax Fmin Maximum Minimum", read=several, curve=flat, scales=True)
op("Div.2", read=several, curve=flat)
op("Hypot", read=several, curve=in_two(length, "self", "other"))
op("Igamma Igammac Ldexp SpecialZeta.0", read=several)
op("Lerp.1", read=several, curve=lerp)
op("Logaddexp", read=several, curve=in_two(logaddexp(1.0), "self", "other"))
op("Logaddexp2", read=several, curve=in_two(logaddexp(0.6931471805599453), "self", "other"))
op("Pow.1", read=several, curve=in_two(power, "self", "exponent"), scales=True)
op("SpecialXlog1Py.0", read=several, scales=True)
op("Xlogy.0", read=several, curve=xlogy, scales=True)

# -- rules ------------------------------------------------------------------------------------------


@rule("Addcmul", curve=weighted_product, regular=True)
@rule("Addcdiv", curve=quotient)
def addcmul(g):
    terms = [g.src[0]] if g.src[0] is not None else []
    partials = Partials(g)
    for edge in (1, 2):
        if g.src[edge] is not None:
            terms.append(partials.diagonal(g, g.match(g.src[edge]), edge))
    return g.plus(terms)


@rule("Add", "Sub")
def add(g):
    a, b = g.src
    if b is None:
        return g.match(a)
    alpha = g.saved("alpha")
    b = _scaled(g, b, alpha if g.name == "AddBackward0" else -alpha)
    return g.match(b) if a is None else g.plus((a, b))


def _scaled(g, source: int, factor: complex) -> int:
    """A real number times a complex one is a complex one."""
    return g.scale(g.match(source) if isinstance(factor, complex) else source, factor)


@rule("Rsub")
def rsub(g):
    a, b = g.src
    terms = [_scaled(g, a, -g.saved("alpha"))] if a is not None else []
    return g.plus(terms if b is None else [*terms, b])


@rule("Rsub.1")
def rsub_scalar(g):
    return g.match(_scaled(g, g.src[0], -g.saved("alpha")))


@rule("Add.1", "Sub.1", "Fmod.0", "Frac", "Remainder.0")
def first(g):
    """The derivative in the only differentiable operand is 1."""
    return g.match(g.src[0])


@rule("Fmod.1", "Remainder.1", curve=flat)
def remainder(g):
    terms = [g.src[0]] if g.src[0] is not None else []
    if g.src[1] is not None:
        terms.append(Partials(g).diagonal(g, g.match(g.src[1]), 1))
    return g.plus(terms)


@rule("Neg", moves=True)
@rule("NegView")
def neg(g):
    return g.scale(g.src[0], -1)


def _number(t: Tensor):
    """The value of a scalar operand that nothing differentiates, where reading it costs no synchronisation."""
    if t.dim() > 0 or t.requires_grad or t.device.type != "cpu":
        return None
    return None if tracing() and not constant(t) else number(t)


@rule("Mul", curve=multiplied, regular=True)
def mul(g):
    a, b = g.src
    m = g.meta[0]
    if g.distances and None not in g.src and (found := squared(g, a, b)) is not None:
        return found
    if a is not None and a == b:  # x * x
        x, y = g.tensor("self"), g.tensor("other")
        return g.diagonal(g.match(a), lambda: fit(x + y, m))
    terms = []
    for s, name in ((a, "other"), (b, "self")):
        if s is None:
            continue
        partner = g.tensor(name)
        value = _number(partner)
        if value is not None:
            terms.append(g.scale(g.match(s), value))
        else:
            terms.append(g.diagonal(g.match(s), fit(partner, m)))
    return g.plus(terms)


@rule("Div", curve=quotient, moves=True)
def div(g):
    a, b = g.src
    m, divisor, terms = g.meta[0], g.tensor("other"), []
    if a is not None:
        value = _number(divisor)
        if value:
            terms.append(g.scale(g.match(a), 1 / value))
        else:
            d = fit(
                divisor, m
            )  # its quotient, not its reciprocal: second derivatives then cancel as autograd's do
            terms.append(g.diagonal(g.match(a), lambda: one(d) / d))
    if b is not None:
        x = g.tensor("self")
        terms.append(g.diagonal(g.match(b), lambda: fit((x / divisor).div_(-divisor), m)))
    return g.plus(terms)


@rule("Mul.1", moves=True)
def mul_scalar(g):
    return g.scale(g.match(g.src[0]), g.saved("other"))


@rule("Div.1", curve=flat, moves=True)
def div_scalar(g):
    value = g.saved("other")
    return g.scale(g.match(g.src[0]), 1 / value) if value else unary(g)


@rule("Lerp")
def lerp_scalar(g):
    weight = g.saved("weight")
    factors = (1 - weight, weight)
    return g.plus([g.scale(s, f) for s, f in zip(g.src, factors, strict=True) if s is not None])


@rule("Copysign", curve=flat)
def copysign(g):
    a, b = g.src
    terms = [] if b is None else [g.single(g.match(b), Zero())]
    if a is not None:
        terms.append(Partials(g).diagonal(g, g.match(a), 0))
    return g.plus(terms)


@rule("Where", curve=flat)
def where(g):
    condition, m = g.tensor("condition").bool(), g.meta[0]
    terms = []
    for s, wanted in zip(g.src[-2:], (True, False), strict=True):  # a bool operand has no edge
        if s is not None:
            terms.append(g.mask(g.match(s), lambda w=wanted: (condition == w).to(m.dtype)))
    return g.plus(terms)


@rule("MaskedFill.0-1", curve=flat)
def masked_fill(g):
    mask, m = g.tensor("mask"), g.meta[0]
    terms = []
    if g.src[0] is not None:
        terms.append(g.mask(g.match(g.src[0]), lambda: (~mask).to(m.dtype)))
    if len(g.src) > 1 and g.src[1] is not None:
        terms.append(g.mask(g.match(g.src[1]), lambda: mask.to(m.dtype)))
    return g.plus(terms)


@rule("Glu", regular=True)
def glu(g):
    """Halves ``a * sigmoid(b)``: each entry of the input feeds one entry of the output."""
    (s,), call, m = g.src, g.call, g.meta[0]
    shape = g.values[s].shape
    axis = g.axis("dim", len(shape))
    s = g.diagonal(s, lambda: call(one(m).expand(tuple(m.shape))))
    halves = (*shape[:axis], 2, shape[axis] // 2, *shape[axis + 1 :])
    return g.sum(g.single(s, View(shape, halves), halves), (axis,))


@rule(
    "Bernoulli", "Ceil", "Fill.0", "Fill.2", "Floor", "Poisson", "Round.0-1", "Sgn", "Sign", "Trunc", "Zero"
)  # fmt: skip
def zero(g):
    return g.single(g.src[0], Zero())


@rule("Fill.1", "Fill.3")
def fill(g):
    old, new = g.src
    terms = [] if old is None else [g.single(old, Zero())]
    return g.plus(terms if new is None else [*terms, new])


@rule("Clone", "Alias", moves=True)
@rule("LiftFresh")
def same(g):
    return g.src[0]


@rule("ToCopy", moves=True)
def to_copy(g):
    return g.cast(g.src[0])


@rule("torch::autograd::CopyBackwards")
def copy_(g):
    """``a.copy_(b)``: the old value is written over."""
    old, new = g.src
    terms = [] if old is None else [g.single(old, Zero())]
    return g.plus(terms if new is None else [*terms, new])
