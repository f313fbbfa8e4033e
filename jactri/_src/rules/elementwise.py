"""Elementwise ops: mostly one name each.

For any elementwise op the node applied to ones *is* the local derivative, exactly as autograd has it (kinks and second
derivatives included), so most rows are only names. Only what is cheaper than the node itself has a formula here.
"""

from __future__ import annotations

from math import nan

import torch
from torch import Tensor

from ...kernels.support import Factor
from ..base.tracing import constant, number, tracing
from ..maps.layout import one
from ..maps.linear_map import Elementwise, View
from . import node_names, rule
from .squares import squared

FORMULAS = {
    # node: (saved value, derivative as a function of it)
    "Sin": ("self", torch.cos),
    "Log": ("self", torch.reciprocal),
    "Sqrt": ("result", lambda y: 0.5 / y),
}

UNARY = """
Abs Acos Acosh Asin Asinh Atan Atanh Celu.0-1 Clamp.1 ClampMax.0 ClampMin.0 Copysign.1 Cos Cosh Deg2Rad Digamma
Div.3 Elu.0-1 Erf Erfc Erfinv Exp2 Expm1 Hardshrink Hardsigmoid Hardswish Hardtanh I0 LeakyRelu.0-1 Lgamma Log10
Log1P Log2 Logit Mish Mvlgamma NanToNum NativeDropout Polygamma.0-1 Pow.2 Rad2Deg Reciprocal Relu
RreluWithNoise.0-1 Rsqrt Sigmoid Silu Sinc Sinh Softplus Softshrink SpecialEntr SpecialErfcx SpecialI0E SpecialI1
SpecialI1E SpecialLogNdtr SpecialNdtri SpecialXlog1Py.1-2 SpecialZeta.1 Tan Tanh Threshold.0-1 Xlogy.1-2
""".split()

BINARY = """
Atan2 Clamp.0 ClampMax.1 ClampMin.1 Div.2 Fmax Fmin Hypot Igamma Igammac Ldexp Lerp.1 Logaddexp Logaddexp2 Maximum
Minimum Pow.1 PreluKernel SpecialXlog1Py.0 SpecialZeta.0 Xlogy.0
EluBackward GeluBackward HardshrinkBackward HardswishBackward HardtanhBackward LeakyReluBackward LogSigmoidBackward
SigmoidBackward SoftplusBackward SoftshrinkBackward TanhBackward ThresholdBackward
""".split()
"""The second part of the list are derivatives of activations, as they occur in the graph of a gradient."""


def _full_names(names: str) -> frozenset[str]:
    return frozenset(full for name in names.split() for full in node_names(name))


SELECTS = _full_names("""
Clamp.0-1 ClampMax.0-1 ClampMin.0-1 Fmax Fmin Hardshrink Hardtanh Relu Softshrink Threshold.0-1
HardshrinkBackward HardtanhBackward SoftshrinkBackward ThresholdBackward
""")
"""Those whose backward selects, and does nothing else: the derivative is 1 where a gradient passes, and 0 elsewhere."""

SCALES = _full_names("""
Hardsigmoid Hardswish HardswishBackward Logit Maximum Minimum Pow.1 Sinc SpecialXlog1Py.0-2 Xlogy.0-2
""")
"""Those whose backward selects and scales: where, the node tells (see `passing`)."""


def _none(read) -> tuple[float, ...]:
    return ()


def _elu(read) -> tuple[float, ...]:
    return read("alpha"), read("scale"), read("input_scale")


def _celu(read) -> tuple[float, ...]:
    return read("alpha"), 1.0, 1 / read("alpha")


KERNELS = {
    # node: (derivative in kernels.activations, saved value, its constants out of what the node saved)
    "ReluBackward0": ("relu", "result", _none),
    "LeakyReluBackward0": ("leaky_relu", "self", lambda read: (read("negative_slope"),)),
    "LeakyReluBackward1": ("leaky_relu", "result", lambda read: (read("negative_slope"),)),
    "EluBackward0": ("elu", "self", _elu),
    "EluBackward1": ("elu_result", "result", _elu),
    "CeluBackward0": ("elu", "self", _celu),
    "CeluBackward1": ("elu_result", "result", _celu),
    "GeluBackward0": ("gelu", "self", _none),
    "SiluBackward0": ("silu", "self", _none),
    "MishBackward0": ("mish", "self", _none),
    "SigmoidBackward0": ("sigmoid", "result", _none),
    "TanhBackward0": ("tanh", "result", _none),
    "SoftplusBackward0": ("softplus", "self", lambda read: (read("beta"), read("threshold"))),
    "HardtanhBackward0": ("hardtanh", "self", lambda read: (read("min_val"), read("max_val"))),
    "HardswishBackward0": ("hardswish", "self", _none),
    "HardsigmoidBackward0": ("hardsigmoid", "self", _none),
    "LogSigmoidBackward0": ("logsigmoid", "self", _none),
    "SinBackward0": ("sin", "self", _none),
    "ExpBackward0": ("exp", "result", _none),
}
"""Activations whose derivative kernels compute themselves; others, in-place variants among them, arrive ready."""


def _kernel(node: str, read) -> Factor | None:
    """How kernels compute the derivative of a node of this name, or None; ``read`` gives what it saved."""
    if node not in KERNELS:
        return None
    name, saved, constants = KERNELS[node]
    if name == "gelu" and read("approximate") == "tanh":
        name = "gelu_tanh"
    return Factor(read(saved), name, tuple(map(float, constants(read))))


class Zero(Elementwise):
    """A dependence whose derivative is exactly zero (rounding, a value written over)."""

    __slots__ = ()
    name, structure = "zero", "diagonal"

    def reach(self, t, in_shape, out_shape, reverse, values):
        return torch.zeros_like(t)

    def push(self, t, own):
        return torch.zeros_like(t), True

    pull = push


def _formula(name: str, derivative):
    def run(g):
        saved = g.tensor(name)
        return g.diagonal(g.src[0], lambda: derivative(saved), activation=g.later(_kernel))

    return run


@rule("Exp")
def exp(g):
    return g.diagonal(g.src[0], g.tensor("result"), activation=g.later(_kernel))


for _node, (_name, _derivative) in FORMULAS.items():
    rule(_node)(_formula(_name, _derivative))


@rule(*UNARY)
def unary(g):
    node, (m, *rest) = g.node, g.meta
    rest = [None] * len(rest)

    def derivative(c: Tensor | None = None) -> Tensor:
        c = one(m) if c is None else c
        c = c if m.device.type == "cpu" else c.expand(tuple(m.shape))
        out = node(c, *rest)
        return out[0] if out.__class__ is tuple else out

    s, name, kernel = g.match(g.src[0]), g.name, g.later(_kernel)
    if name in SELECTS:
        value = g.mask(s, derivative, None, True, kernel)
    elif name in SCALES:
        value = g.mask(s, derivative, lambda: passing(derivative, m), True, kernel)
    else:
        value = g.diagonal(s, derivative, True, kernel)
    return (value, *rest) if rest else value


def passing(pull, meta) -> Tensor:
    """1 where a node lets a gradient pass, 0 where it selects something else; ``pull`` is the node of one cotangent.

    Asked with a NaN, which no product makes zero.
    """
    return pull(one(meta) * nan).detach().isnan().to(meta.dtype)


@rule("Gelu", "LogSigmoid")
def unary_full(g):
    """Nodes whose kernels want a cotangent of the full shape."""
    node, m = g.node, g.meta[0]
    return g.diagonal(
        g.src[0], lambda: node(one(m).expand(tuple(m.shape))), activation=g.later(_kernel)
    )


class Partials:
    """The derivatives of a node in each of its operands, computed together at first use."""

    __slots__ = ("_all", "count", "meta", "node", "output", "whole")

    def __init__(self, g, whole: bool = True, output: int = 0):
        """``whole``: every operand has the shape of the output; ``output``: which of them."""
        g.check_memory()
        self.node, self.count, self.output = g.node, len(g.meta), output
        self.meta, self.whole, self._all = g.meta[output], whole, None

    def __call__(self, edge: int) -> Tensor:
        m = self.meta
        if self._all is None:
            self._all = self._pull(one(m))
        d = self._all[edge]
        if d is None:
            return torch.zeros((), dtype=m.dtype, device=m.device)
        if self.whole and d.shape != tuple(m.shape):  # summed over broadcasts: the entries are lost
            raise AssertionError(f"{self.node.name()}: derivative of shape {tuple(d.shape)}")
        return fit(d, m)

    def _pull(self, c: Tensor) -> tuple[Tensor | None, ...]:
        """The node of one cotangent for all entries."""
        given: list[Tensor | None] = [None] * self.count
        given[self.output] = c.expand(tuple(self.meta.shape))
        out = self.node(*given)
        return out if isinstance(out, tuple) else (out,)

    def diagonal(self, g, s: int, edge: int) -> int:
        """Scaling of the value ``s``, which has the operand's shape, by its derivative."""
        return g.diagonal(s, lambda: self(edge))

    def mask(self, g, s: int, edge: int) -> int:
        """The same of an op that selects: 1 where the operand's gradient passes."""
        return g.mask(s, lambda: self(edge))

    def scaled_mask(self, g, s: int, edge: int) -> int:
        """The same of an op that selects and scales."""

        def pull(c: Tensor) -> Tensor:
            d = self._pull(c)[edge]
            return torch.zeros_like(c) if d is None else d

        return g.mask(s, lambda: self(edge), lambda: passing(pull, self.meta))


def fit(d: Tensor, meta) -> Tensor:
    """A derivative in the dtype, on the device and in the layout of the value that it multiplies."""
    if d.layout is not torch.strided:  # of an op with a sparse constant
        d = d.to_dense()
    if d.dtype != meta.dtype or d.device != meta.device:
        return d.to(device=meta.device, dtype=meta.dtype)
    return d


@rule(*BINARY)
def elementwise(g):
    """Any number of operands."""
    partials = Partials(g)
    emit = partials.diagonal
    if g.name in SELECTS:
        emit = partials.mask
    elif g.name in SCALES:
        emit = partials.scaled_mask
    return g.plus([emit(g, g.match(s), edge) for edge, s in enumerate(g.src) if s is not None])


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


@rule("Addcmul", "Addcdiv")
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
    b = g.scale(b, alpha if g.name == "AddBackward0" else -alpha)
    return g.match(b) if a is None else g.plus((a, b))


@rule("Rsub")
def rsub(g):
    a, b = g.src
    terms = [g.scale(a, -g.saved("alpha"))] if a is not None else []
    return g.plus(terms if b is None else [*terms, b])


@rule("Rsub.1")
def rsub_scalar(g):
    return g.match(g.scale(g.src[0], -g.saved("alpha")))


@rule("Add.1", "Sub.1", "Fmod.0", "Frac", "Remainder.0")
def first(g):
    """The derivative in the only differentiable operand is 1."""
    return g.match(g.src[0])


@rule("Fmod.1", "Remainder.1")
def remainder(g):
    terms = [g.src[0]] if g.src[0] is not None else []
    if g.src[1] is not None:
        terms.append(Partials(g).diagonal(g, g.match(g.src[1]), 1))
    return g.plus(terms)


@rule("Neg")
def neg(g):
    return g.scale(g.src[0], -1)


def _number(t: Tensor):
    """The value of a scalar operand that nothing differentiates, where reading it costs no synchronisation."""
    if t.dim() > 0 or t.requires_grad or t.device.type != "cpu":
        return None
    return None if tracing() and not constant(t) else number(t)


@rule("Mul")
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


@rule("Div")
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


@rule("Mul.1")
def mul_scalar(g):
    return g.scale(g.match(g.src[0]), g.saved("other"))


@rule("Div.1")
def div_scalar(g):
    value = g.saved("other")
    return g.scale(g.match(g.src[0]), 1 / value) if value else unary(g)


@rule("Pow")
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


@rule("Lerp")
def lerp_scalar(g):
    weight = g.saved("weight")
    factors = (1 - weight, weight)
    return g.plus([g.scale(s, f) for s, f in zip(g.src, factors, strict=True) if s is not None])


@rule("Copysign")
def copysign(g):
    a, b = g.src
    terms = [] if b is None else [g.single(g.match(b), Zero())]
    if a is not None:
        terms.append(Partials(g).diagonal(g, g.match(a), 0))
    return g.plus(terms)


@rule("Where")
def where(g):
    condition, m = g.tensor("condition").bool(), g.meta[0]
    terms = []
    for s, wanted in zip(g.src[-2:], (True, False), strict=True):  # a bool operand has no edge
        if s is not None:
            terms.append(g.mask(g.match(s), lambda w=wanted: (condition == w).to(m.dtype)))
    return g.plus(terms)


@rule("MaskedFill.0-1")
def masked_fill(g):
    mask, m = g.tensor("mask"), g.meta[0]
    terms = []
    if g.src[0] is not None:
        terms.append(g.mask(g.match(g.src[0]), lambda: (~mask).to(m.dtype)))
    if len(g.src) > 1 and g.src[1] is not None:
        terms.append(g.mask(g.match(g.src[1]), lambda: mask.to(m.dtype)))
    return g.plus(terms)


@rule("Glu")
def glu(g):
    """Halves ``a * sigmoid(b)``: each entry of the input feeds one entry of the output."""
    (s,), node, m = g.src, g.node, g.meta[0]
    shape = g.values[s].shape
    axis = g.axis("dim", len(shape))
    s = g.diagonal(s, lambda: node(one(m).expand(tuple(m.shape))))
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


@rule("Clone", "Alias", "LiftFresh")
def same(g):
    return g.src[0]


@rule("ToCopy")
def to_copy(g):
    return g.cast(g.src[0])


@rule("torch::autograd::CopyBackwards")
def copy_(g):
    """``a.copy_(b)``: the old value is written over."""
    old, new = g.src
    terms = [] if old is None else [g.single(old, Zero())]
    return g.plus(terms if new is None else [*terms, new])
