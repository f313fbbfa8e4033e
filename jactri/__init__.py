"""jactri: fast exact Jacobians of neural networks in PyTorch."""

from . import func
from .api import jacobian, jacobian_of
from .check import CheckReport, JacobianMismatch, check
from .compiled import Compiled, compile
from .entries import Banded
from .finite_difference import finite_difference
from .opaque import FallbackError, fallback
from .operators.diagonal import diagonal
from .operators.ggn import GGN, ggn
from .operators.gram import jjt, jtj
from .operators.ntk import empirical_ntk
from .operators.parameters import ParameterJacobian, parameter_jacobian
from .operators.vectors import jvp, vjp
from .profiling import Profile, profile
from .report import Explanation, explain
from .sparsity import sparsity

__version__ = "0.1.0"

__all__ = [
    "GGN",
    "Banded",
    "CheckReport",
    "Compiled",
    "Explanation",
    "FallbackError",
    "JacobianMismatch",
    "ParameterJacobian",
    "Profile",
    "check",
    "compile",
    "diagonal",
    "empirical_ntk",
    "explain",
    "fallback",
    "finite_difference",
    "func",
    "ggn",
    "jacobian",
    "jacobian_of",
    "jjt",
    "jtj",
    "jvp",
    "parameter_jacobian",
    "profile",
    "sparsity",
    "vjp",
]
