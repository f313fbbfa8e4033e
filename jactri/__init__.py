"""jactri: fast exact Jacobians of neural networks in PyTorch."""

from . import func
from .api import jacobian, jacobian_of
from .check import CheckReport, JacobianMismatch, check
from .compiled import Compiled, compile
from .custom import Rule, rule
from .entries import Banded
from .exported import export
from .finite_difference import finite_difference
from .opaque import FallbackError, fallback
from .operators.diagonal import diagonal
from .operators.divergence import divergence
from .operators.ggn import GGN, ggn
from .operators.gradient import gradient
from .operators.gram import jjt, jtj
from .operators.laplacian import bilaplacian, laplacian
from .operators.ntk import empirical_ntk
from .operators.parameters import ParameterJacobian, parameter_jacobian
from .operators.vectors import jvp, vjp
from .profiling import Profile, profile
from .report import Explanation, explain
from .sparsity import sparsity
from .structure import Node

__version__ = "0.1.0"

__all__ = [
    "GGN",
    "Banded",
    "CheckReport",
    "Compiled",
    "Explanation",
    "FallbackError",
    "JacobianMismatch",
    "Node",
    "ParameterJacobian",
    "Profile",
    "Rule",
    "bilaplacian",
    "check",
    "compile",
    "diagonal",
    "divergence",
    "empirical_ntk",
    "explain",
    "export",
    "fallback",
    "finite_difference",
    "func",
    "ggn",
    "gradient",
    "jacobian",
    "jacobian_of",
    "jjt",
    "jtj",
    "jvp",
    "laplacian",
    "parameter_jacobian",
    "profile",
    "rule",
    "sparsity",
    "vjp",
]
