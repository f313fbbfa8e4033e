"""Unary and binary elementwise functions, nn's activations, broadcasting, where and clamp."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .case import A, C, D, G, M, P, R, S, U, V, seeded

inf, nan = math.inf, math.nan
ENDS = (-inf, inf, nan)

# name, function, domain, node, special values
UNARY = [
    ("abs", torch.abs, A, "Abs", (0.0, *ENDS)),
    ("acos", torch.acos, S, "Acos", (0.0, 1.0, -1.0, nan)),
    ("acosh", torch.acosh, G, "Acosh", (1.0, inf, nan)),
    ("angle", torch.angle, A, "Angle", (0.0,)),
    ("asin", torch.asin, S, "Asin", (0.0, 1.0, -1.0, nan)),
    ("asinh", torch.asinh, R, "Asinh", (0.0, *ENDS)),
    ("atan", torch.atan, R, "Atan", (0.0, *ENDS)),
    ("atanh", torch.atanh, S, "Atanh", (0.0, 1.0, nan)),
    ("ceil", torch.ceil, A, "Ceil", (1.0,)),
    ("cos", torch.cos, R, "Cos", (0.0, inf, nan)),
    ("cosh", torch.cosh, R, "Cosh", (0.0, *ENDS)),
    ("deg2rad", torch.deg2rad, R, "Deg2Rad", ()),
    ("digamma", torch.digamma, P, "Digamma", (inf, nan)),
    ("erf", torch.erf, R, "Erf", (0.0, *ENDS)),
    ("erfc", torch.erfc, R, "Erfc", (0.0, *ENDS)),
    ("erfinv", torch.erfinv, S, "Erfinv", (0.0, 1.0, nan)),
    ("exp", torch.exp, R, "Exp", (0.0, 1000.0, *ENDS)),
    ("exp2", torch.exp2, R, "Exp2", (0.0, *ENDS)),
    ("expm1", torch.expm1, R, "Expm1", (0.0, *ENDS)),
    ("floor", torch.floor, A, "Floor", (1.0,)),
    ("frac", torch.frac, A, "Frac", (1.0,)),
    ("i0", torch.i0, R, "I0", (0.0,)),
    ("i0e", torch.special.i0e, A, "SpecialI0E", ()),
    ("i1", torch.special.i1, A, "SpecialI1", (0.0,)),
    ("i1e", torch.special.i1e, A, "SpecialI1E", ()),
    ("lgamma", torch.lgamma, P, "Lgamma", (inf, nan)),
    ("log", torch.log, P, "Log", (0.0, inf, -1.0, nan)),
    ("log10", torch.log10, P, "Log10", (0.0, inf, nan)),
    ("log1p", torch.log1p, P, "Log1P", (0.0, -1.0, inf, nan)),
    ("log2", torch.log2, P, "Log2", (0.0, inf, nan)),
    ("log_ndtr", torch.special.log_ndtr, R, "SpecialLogNdtr", ()),
    ("logit", torch.logit, U, "Logit", (0.0, 0.5, 1.0, 2.0, nan)),
    ("logit_eps", lambda x: torch.logit(x, eps=0.2), U, "Logit", (0.2, 0.1, 0.8, 1.0)),
    ("mvlgamma", lambda x: torch.mvlgamma(x, 2), G, "Mvlgamma", ()),
    ("nan_to_num", torch.nan_to_num, R, "NanToNum", ENDS),
    ("ndtr", torch.special.ndtr, R, "Erf", ()),
    ("ndtri", torch.special.ndtri, U, "SpecialNdtri", ()),
    ("neg", torch.neg, R, "Neg", ENDS),
    ("polygamma", lambda x: torch.polygamma(1, x), P, "Polygamma", ()),
    ("positive", torch.positive, R, "", ENDS),
    ("rad2deg", torch.rad2deg, R, "Rad2Deg", ()),
    ("reciprocal", torch.reciprocal, A, "Reciprocal", (0.0, *ENDS)),
    ("round", torch.round, A, "Round", (0.5,)),
    ("round_decimals", lambda x: torch.round(x, decimals=1), A, "Round", ()),
    ("rsqrt", torch.rsqrt, P, "Rsqrt", (0.0, inf, -1.0, nan)),
    ("sgn", torch.sgn, A, "Sgn", (0.0,)),
    ("sigmoid", torch.sigmoid, R, "Sigmoid", (0.0, 200.0, -200.0, *ENDS)),
    ("sign", torch.sign, A, "Sign", (0.0,)),
    ("sin", torch.sin, R, "Sin", (0.0, inf, nan)),
    ("sinc", torch.sinc, A, "Sinc", (0.0,)),
    ("sinh", torch.sinh, R, "Sinh", (0.0, *ENDS)),
    ("special_entr", torch.special.entr, P, "SpecialEntr", ()),
    ("special_erfcx", torch.special.erfcx, R, "SpecialErfcx", ()),
    ("sqrt", torch.sqrt, P, "Sqrt", (0.0, inf, -1.0, nan)),
    ("square", torch.square, R, "Pow", (0.0, *ENDS)),
    ("tan", torch.tan, S, "Tan", (0.0, inf, nan)),
    ("tanh", torch.tanh, R, "Tanh", (0.0, 30.0, -30.0, *ENDS)),
    ("trunc", torch.trunc, A, "Trunc", (1.0,)),
    ("zeta", lambda x: torch.special.zeta(2.5, x), G, "SpecialZeta", ()),
]
# torch has no second derivative, or a first one that is itself without a derivative
ONCE = {"i1", "i1e", "i0e", "zeta", "special_erfcx"}

# sgn's derivative is a ZeroTensor, which torch cannot handle in poisoned memory
NO_POISON = {"abs", "sgn"}

# name, module, node, special values
ACTIVATIONS = [
    ("ELU", lambda: nn.ELU(0.7), "Elu", (0.0, *ENDS)),
    ("Hardshrink", lambda: nn.Hardshrink(0.4), "Hardshrink", (0.0, 0.4, -0.4, *ENDS)),
    ("Hardsigmoid", nn.Hardsigmoid, "Hardsigmoid", (-3.0, 0.0, 3.0, *ENDS)),
    ("Hardswish", nn.Hardswish, "Hardswish", (-3.0, 0.0, 3.0, *ENDS)),
    ("Hardtanh", lambda: nn.Hardtanh(-0.5, 0.8), "Hardtanh", (-0.5, 0.8, 0.0, *ENDS)),
    ("LeakyReLU", lambda: nn.LeakyReLU(0.2), "LeakyRelu", (0.0, *ENDS)),
    ("LogSigmoid", nn.LogSigmoid, "LogSigmoid", (0.0, 100.0, -100.0, *ENDS)),
    ("ReLU", nn.ReLU, "Relu", (0.0, -0.0, *ENDS)),
    ("ReLU6", nn.ReLU6, "Hardtanh", (0.0, 6.0, *ENDS)),
    ("RReLU", lambda: nn.RReLU().eval(), "RreluWithNoise", (0.0, *ENDS)),
    ("SELU", nn.SELU, "Elu", (0.0, *ENDS)),
    ("CELU", lambda: nn.CELU(1.3), "Celu", (0.0, *ENDS)),
    ("GELU", nn.GELU, "Gelu", (0.0, 20.0, -20.0, *ENDS)),
    ("GELU_tanh", lambda: nn.GELU("tanh"), "Gelu", (0.0, 20.0, -20.0, *ENDS)),
    ("Sigmoid", nn.Sigmoid, "Sigmoid", (0.0,)),
    ("SiLU", nn.SiLU, "Silu", (0.0, 100.0, -100.0, *ENDS)),
    ("Mish", nn.Mish, "Mish", (0.0, 30.0, -30.0, *ENDS)),
    ("Softplus", nn.Softplus, "Softplus", (0.0, 20.0, 21.0, -100.0, *ENDS)),
    ("Softplus_beta", lambda: nn.Softplus(2.0, 1.5), "Softplus", (0.75, 0.8, -50.0)),
    ("Softshrink", lambda: nn.Softshrink(0.4), "Softshrink", (0.0, 0.4, -0.4, *ENDS)),
    ("Softsign", nn.Softsign, "Div", (0.0, *ENDS)),
    ("Tanh", nn.Tanh, "Tanh", (0.0,)),
    ("Tanhshrink", nn.Tanhshrink, "Sub Tanh", (0.0, *ENDS)),
    ("Threshold", lambda: nn.Threshold(0.1, 20.0), "Threshold", (0.1, 0.0, *ENDS)),
    ("PReLU", nn.PReLU, "PreluKernel", (0.0, *ENDS)),
]
INPLACE = [
    ("ReLU", nn.ReLU(True)), ("ReLU6", nn.ReLU6(True)), ("ELU", nn.ELU(0.7, True)),
    ("LeakyReLU", nn.LeakyReLU(0.2, True)), ("SiLU", nn.SiLU(True)), ("SELU", nn.SELU(True)),
    ("CELU", nn.CELU(1.3, True)), ("Hardtanh", nn.Hardtanh(inplace=True)), ("Mish", nn.Mish(True)),
    ("Hardswish", nn.Hardswish(True)), ("Hardsigmoid", nn.Hardsigmoid(True)),
    ("Threshold", nn.Threshold(0.1, 2.0, True)),
]  # fmt: skip


CASES = []
for name, func, domain, node, special in UNARY:
    second = name not in ONCE
    CASES += [
        C(name, func, domain(3, 4), nodes=node, samples=True, special=special, second=second,
          poison=name not in NO_POISON),
        C(f"{name}_scalar", func, domain(), nodes=node, variant=True),
        C(f"{name}_one", func, domain(1, 2, 1), nodes=node, samples=True, variant=True),
        C(f"{name}_empty", func, domain(0, 3), samples=True, variant=True),
    ]
for name, module, node, special in ACTIVATIONS:
    CASES += [
        M(name, module, A(3, 4), nodes=node, samples=True, special=special,
          second=name != "Hardsigmoid"),
        M(f"{name}_one", module, A(1, 1), nodes=node, samples=True, variant=True),
        M(f"{name}_empty", module, A(2, 0), samples=True, variant=True),
    ]
for name, module in INPLACE:
    CASES.append(
        C(f"{name}_inplace", lambda x, f=module: f(x * 1.5), A(3, 4), samples=True,
          second=name != "Hardsigmoid")
    )  # x * 1.5: a leaf may not be written to
for name in "relu relu6 hardtanh hardswish leaky_relu elu celu selu".split():
    CASES.append(C(f"{name}_vector_of_kinks", getattr(F, name), V(-3.0, -1.0, 0.0, 1.0, 3.0, 6.0)))

CASES += [
    C("pow_2", lambda x: x**2, R(3, 4), nodes="Pow", samples=True, special=(0.0, *ENDS)),
    C("pow_3", lambda x: x**3, R(3, 4), nodes="Pow", samples=True, special=(0.0, *ENDS)),
    C("pow_half", lambda x: x**0.5, P(3, 4), nodes="Pow", samples=True, special=(0.0, inf, nan)),
    C("pow_minus", lambda x: x**-1.5, P(3, 4), nodes="Pow", samples=True, special=(0.0, inf)),
    C("pow_0", lambda x: x**0, R(3, 4), nodes="Pow", samples=True, special=(0.0, *ENDS)),
    C("pow_1", lambda x: x**1, R(3, 4), nodes="Pow", samples=True, special=(0.0, *ENDS)),
    C("pow_base", lambda x: 2.5**x, R(3, 4), nodes="Pow", samples=True, special=(0.0, *ENDS)),
    C("pow_base_0", lambda x: 0.0**x, P(3, 4), nodes="Pow", samples=True, special=(0.0, 1.0)),
    C("pow_tensors", torch.pow, P(3, 4), R(3, 4), nodes="Pow", samples=True),
    C("pow_broadcast", torch.pow, P(3, 1), R(4), nodes="Pow", samples=(0,)),
    C("pow_zero_zero", torch.pow, V(0.0, 0.0, 2.0), V(0.0, 2.0, 0.0), second=False),
    C("float_power", lambda x: torch.float_power(x, 3), P(3, 4), samples=True),
    C("rsub", lambda x: torch.rsub(x, 2.0, alpha=3), R(3, 4), nodes="Rsub", samples=True),
    C("rsub_tensor", lambda x, y: torch.rsub(x, y, alpha=3), R(3, 4), R(4), samples=(0,)),
    C("radd_rsub_rdiv", lambda x: (1 + x) * (3 - x) / (2 / x), A(3, 4), samples=True),
    C("add_alpha", lambda x, y: torch.add(x, y, alpha=-2), R(3, 4), R(3, 4), samples=True),
    C("sub_alpha", lambda x, y: torch.sub(x, y, alpha=3), R(3, 4), R(3, 4), samples=True),
    C("mul_self", lambda x: x * x, R(3, 4), nodes="Mul", samples=True, special=(0.0, *ENDS)),
    C("div_self", lambda x: x / x, A(3, 4), nodes="Div", samples=True),
    C("add_self", lambda x: x + x, R(3, 4), nodes="Add", samples=True),
    C("div_floor", lambda x, y: torch.div(x, y, rounding_mode="floor"), A(3, 4), A(3, 4),
      nodes="Div", samples=True, second=False),
    C("div_trunc", lambda x, y: torch.div(x, y, rounding_mode="trunc"), A(3, 4), A(4),
      nodes="Div", second=False),
    C("fmod", torch.fmod, D(3, 4), P(3, 4), nodes="Fmod", samples=True),
    C("fmod_scalar", lambda x: torch.fmod(x, 0.7), A(3, 4), nodes="Fmod", samples=True),
    C("remainder", torch.remainder, D(3, 4), P(3, 4), nodes="Remainder", samples=True),
    C("remainder_scalar", lambda x: x % 0.7, A(3, 4), nodes="Remainder", samples=True),
    C("remainder_broadcast", torch.remainder, D(2, 3), P(3), nodes="Remainder"),
    C("atan2", torch.atan2, A(3, 4), A(3, 4), nodes="Atan2", samples=True),
    C("atan2_broadcast", torch.atan2, A(3, 1), A(1, 4), nodes="Atan2"),
    C("hypot", torch.hypot, A(3, 4), A(3, 4), nodes="Hypot", samples=True),
    C("copysign", torch.copysign, A(3, 4), A(3, 4), nodes="Copysign", samples=True),
    C("copysign_scalar", lambda x: torch.copysign(x, -1.0), A(3, 4), samples=True),
    C("logaddexp", torch.logaddexp, R(3, 4), R(3, 4), nodes="Logaddexp", samples=True),
    C("logaddexp2", torch.logaddexp2, R(3, 4), R(4), nodes="Logaddexp2"),
    C("xlogy", torch.xlogy, P(3, 4), P(3, 4), nodes="Xlogy", samples=True),
    C("xlogy_zero", torch.xlogy, V(0.0, 0.0, 1.5), P(3), second=False),
    C("xlogy_scalar", lambda x: torch.xlogy(2.0, x) + torch.xlogy(x, 3.0), P(3, 4), samples=True),
    C("xlog1py", torch.special.xlog1py, P(3, 4), P(3, 4), nodes="SpecialXlog1Py", samples=True),
    C("maximum", torch.maximum, D(3, 4), R(3, 4), nodes="Maximum", samples=True),
    C("maximum_tie", torch.maximum, V(0.0, 1.0, -1.0), V(0.0, 0.0, -1.0)),
    C("minimum", torch.minimum, D(3, 4), R(4), nodes="Minimum"),
    C("minimum_tie", torch.minimum, V(0.0, 1.0, -1.0), V(0.0, 0.0, -1.0)),
    C("fmax", torch.fmax, D(3, 4), R(3, 4), nodes="Fmax", samples=True),
    C("fmin", torch.fmin, D(3, 4), R(3, 4), nodes="Fmin", samples=True),
    C("fmax_nan", torch.fmax, V(nan, 1.0, 2.0), V(0.0, nan, 2.0), second=False),
    C("clamp", lambda x: x.clamp(-0.5, 0.9), A(3, 4), nodes="Clamp", samples=True,
      special=(-0.5, 0.9, *ENDS)),
    C("clamp_min", lambda x: x.clamp(min=0.4), A(3, 4), nodes="Clamp", samples=True,
      special=(0.4, *ENDS)),
    C("clamp_max", lambda x: x.clamp(max=0.4), A(3, 4), nodes="Clamp", samples=True,
      special=(0.4, *ENDS)),
    C("clamp_min_max_functions", lambda x, y: torch.clamp_max(torch.clamp_min(torch.clamp_min(
        x, -0.8), y), 0.9), A(3, 4), R(3, 4), nodes="ClampMin ClampMax", samples=True),
    C("clamp_max_tensor", lambda x, y: torch.clamp_max(x, y), A(3, 4), R(4), nodes="ClampMax"),
    C("clamp_tensors", torch.clamp, D(3, 4), R(3, 4), P(3, 4), samples=True),
    C("clamp_tensor_min", lambda x, lo: torch.clamp(x, min=lo), D(3, 4), R(4)),
    C("clamp_tensor_max", lambda x, hi: torch.clamp(x, max=hi), D(3, 4), R(3, 1)),
    C("where", lambda x, y: torch.where(x > y, x, 2 * y), D(3, 4), R(3, 4), nodes="Where",
      samples=True),
    C("where_broadcast", lambda x, y: torch.where(x > 0, x, y), D(3, 4), R(4), nodes="Where",
      samples=(0,)),
    C("where_scalar", lambda x: torch.where(x > 0, x, 0.5), A(3, 4), nodes="Where", samples=True),
    C("where_both_scalar_cond", lambda x, y: torch.where(x.new_ones(()) > 0, x, y), R(3), R(2, 3)),
    C("lerp", torch.lerp, R(3, 4), R(3, 4), U(3, 4), nodes="Lerp", samples=True),
    C("lerp_scalar", lambda x, y: torch.lerp(x, y, 0.3), R(3, 4), R(3, 4), nodes="Lerp",
      samples=True),
    C("lerp_broadcast", torch.lerp, R(4), R(3, 1), U(1), nodes="Lerp"),
    C("addcmul", lambda x, y, z: torch.addcmul(x, y, z, value=0.7), R(3, 4), R(3, 4), R(3, 4),
      nodes="Addcmul", samples=True),
    C("addcmul_broadcast", lambda x, y, z: torch.addcmul(x, y, z, value=-2), R(3, 4), R(4), R(3, 1),
      nodes="Addcmul"),
    C("addcdiv", lambda x, y, z: torch.addcdiv(x, y, z, value=0.7), R(3, 4), R(3, 4), A(3, 4),
      nodes="Addcdiv", samples=True),
    C("addcdiv_broadcast", lambda x, y, z: torch.addcdiv(x, y, z, value=2), R(4), R(3, 1), A(3, 4),
      nodes="Addcdiv"),
    C("GLU", nn.GLU(), R(3, 4), nodes="Glu", samples=True),
    C("GLU_first", nn.GLU(0), R(4, 3), nodes="Glu"),
    C("GLU_middle", nn.GLU(1), R(2, 4, 3), nodes="Glu", samples=True),
    M("PReLU_channels", lambda: nn.PReLU(3), A(2, 3, 2), nodes="PreluKernel", samples=True),
    C("prelu_weight", F.prelu, A(2, 3, 2), P(3), nodes="PreluKernel", samples=(0,)),
    C("rrelu_train", seeded(lambda x: F.rrelu(x, training=True)), A(3, 4), nodes="RreluWithNoise"),
    C("gumbel_softmax", seeded(lambda x: F.gumbel_softmax(x, 0.7, dim=-1)), R(3, 4)),
    C("gumbel_softmax_hard", seeded(lambda x: F.gumbel_softmax(x, 0.7, hard=True, dim=-1)),
      R(3, 4), factor=16, reason="y_hard - y.detach() + y cancels"),
    C("dropout_eval", lambda x: F.dropout(x, 0.5, training=False) * 2, R(3, 4), samples=True),
    C("dropout_train", seeded(lambda x: F.dropout(x, 0.5, training=True)), R(3, 4),
      strided=False),
    C("dropout_all", lambda x: F.dropout(x, 1.0, training=True), R(3, 4), samples=True),
    C("dropout2d_train", seeded(lambda x: F.dropout2d(x, 0.5, training=True)), R(2, 3, 2, 2)),
    C("alpha_dropout_train", seeded(lambda x: F.alpha_dropout(x, 0.5, training=True)), R(3, 4),
      strided=False),
    C("feature_alpha_dropout", seeded(lambda x: F.feature_alpha_dropout(x, 0.5, training=True)),
      R(2, 3, 2)),
    C("masked_scale_chain", lambda x: x * (x > 0) * 2 + x.sign(), A(3, 4), samples=True),
    C("comparison_only", lambda x: (x > 0).to(x.dtype) * x, A(3, 4), samples=True),
    C("bool_mask_times", lambda x: x * x.gt(0), A(3, 4), samples=True),
    C("isnan_where", lambda x: torch.where(torch.isnan(x), x.new_zeros(()), x), R(3, 4),
      samples=True),
    C("polynomial", lambda x: 3 * x**3 - 2 * x + 1, R(3, 4), samples=True),
    C("swish_by_hand", lambda x: x * torch.sigmoid(1.7 * x), R(3, 4), samples=True),
    C("quadratic_difference", lambda x, y: (x - y) * (x + y), R(3, 4), R(3, 4), samples=True),
    C("silu_chain", lambda x: F.silu(F.silu(F.silu(x))), R(3, 4), nodes="Silu", samples=True),
    C("unfused_layers", lambda x: torch.tanh(torch.exp(torch.sin(x) * 0.3)), R(3, 4), samples=True),
]

# Broadcasting, both ways, for the four operations and the sizes that go wrong first.
SHAPES = [
    ((3, 4), (3, 4)), ((3, 4), (4,)), ((4,), (3, 4)), ((3, 4), ()), ((), (3, 4)), ((), ()),
    ((3, 1), (1, 4)), ((1, 1), (3, 4)), ((2, 1, 3), (4, 1)), ((3,), (1, 1, 3)), ((1,), ()),
    ((0, 3), (3,)), ((1, 3), (0, 3)), ((2, 3), (1,)), ((2, 0), (2, 1)),
]  # fmt: skip
for name, func in [
    ("add", torch.add), ("sub", torch.sub), ("mul", torch.mul), ("div", torch.div),
    ("maximum", torch.maximum), ("atan2", torch.atan2),
]:  # fmt: skip
    for a, b in SHAPES:
        label = "x".join(map(str, a)) + "_with_" + "x".join(map(str, b))
        CASES.append(C(f"{name}_{label}", func, D(*a), A(*b), variant=name not in ("add", "mul")))
for name, func in [("add", torch.add), ("sub", torch.sub), ("mul", torch.mul), ("div", torch.div)]:
    node = name.capitalize()
    CASES += [
        C(f"{name}_samples", func, R(3, 4), A(3, 4), nodes=node, samples=True),
        C(f"{name}_samples_column", func, R(3, 1), A(3, 4), nodes=node, samples=True),
        C(f"{name}_samples_vector", func, R(3, 4), A(4), nodes=node, samples=(0,)),
        C(f"{name}_samples_row", func, R(1, 4), A(1, 4), nodes=node, samples=True),
        C(f"{name}_number", lambda x, f=func: f(x, 2.5), R(3, 4), nodes=node, samples=True),
        C(f"{name}_constant", lambda x, f=func: f(x, x.new_tensor([2.0, 3.0, 0.5, -1.0])), R(3, 4),
          nodes=node, samples=True),
        C(f"{name}_constant_wider", lambda x, f=func: f(x, x.new_full((5, 1, 4), 2.0)), R(3, 4),
          nodes=node),
    ]  # fmt: skip
