"""jactri: fast exact Jacobians of neural networks in PyTorch."""

import warnings as _warnings
from typing import Any as _Any

from . import distributed, func
from ._src.calls.api import jacobian, jacobian_of
from ._src.calls.diagonal import diagonal
from ._src.calls.divergence import divergence
from ._src.calls.finite_difference import finite_difference
from ._src.calls.ggn import GGN, ggn
from ._src.calls.gradient import gradient
from ._src.calls.gram import jjt, jtj
from ._src.calls.hessian import hessian
from ._src.calls.laplacian import bilaplacian, laplacian
from ._src.calls.layers import layer_jacobian
from ._src.calls.linearize import Linearization, linearize
from ._src.calls.mean import JacobianMean
from ._src.calls.normal import NormalEquations, normal_equations
from ._src.calls.ntk import empirical_ntk
from ._src.calls.parameters import ParameterJacobian, parameter_jacobian
from ._src.calls.taps import Taps, taps
from ._src.calls.vectors import jvp, vjp
from ._src.compile.compiled import Compiled, compile
from ._src.compile.exported import export
from ._src.read.opaque import FallbackError, fallback
from ._src.read.structure import Node
from ._src.run.banded import Banded
from ._src.run.solvers import to_scipy
from ._src.run.sparsity import Sparsity
from ._src.tools import profiling as _profiling
from ._src.tools.check import CheckReport, JacobianMismatch, check
from ._src.tools.custom import Rule, rule
from ._src.tools.derivatives import detached_std, identity, ratio, uniform, zero
from ._src.tools.overrides import overrides
from ._src.tools.profiling import Profile, named_layers, profile
from ._src.tools.report import Explanation, explain
from ._src.tools.sparsity import sparsity

__version__ = "0.2.0"

__all__ = [
    "GGN",
    "Banded",
    "CheckReport",
    "Compiled",
    "Explanation",
    "FallbackError",
    "JacobianMean",
    "JacobianMismatch",
    "Linearization",
    "Node",
    "NormalEquations",
    "ParameterJacobian",
    "Profile",
    "Rule",
    "Sparsity",
    "Taps",
    "bilaplacian",
    "check",
    "compile",
    "detached_std",
    "diagonal",
    "distributed",
    "divergence",
    "empirical_ntk",
    "explain",
    "export",
    "fallback",
    "finite_difference",
    "func",
    "ggn",
    "gradient",
    "hessian",
    "identity",
    "jacobian",
    "jacobian_of",
    "jjt",
    "jtj",
    "jvp",
    "laplacian",
    "layer_jacobian",
    "linearize",
    "named_layers",
    "normal_equations",
    "overrides",
    "parameter_jacobian",
    "profile",
    "ratio",
    "rule",
    "sparsity",
    "taps",
    "to_scipy",
    "uniform",
    "vjp",
    "zero",
]


def __dir__() -> list[str]:
    return __all__


# name: (what it still gives, what to write instead, the version in which it ends)
_DEPRECATED = {"profiling": (_profiling, "jactri.named_layers", "0.3.0")}


def __getattr__(name: str) -> _Any:
    if name not in _DEPRECATED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value, instead, end = _DEPRECATED[name]
    _warnings.warn(
        f"jactri.{name} is deprecated and ends in jactri {end}: write {instead}",
        DeprecationWarning,
        stacklevel=2,
    )
    return value
