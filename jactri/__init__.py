"""jactri: fast exact Jacobians of neural networks in PyTorch."""

from .api import jacobian, jacobian_of
from .check import CheckReport, JacobianMismatch, check
from .compiled import Compiled, compile
from .entries import Banded
from .opaque import FallbackError, fallback
from .operators.diagonal import diagonal
from .operators.divergence import divergence
from .operators.gradient import gradient
from .operators.gram import jjt, jtj
from .operators.laplacian import bilaplacian, laplacian
from .operators.vectors import jvp, vjp
from .profiling import Profile, profile
from .report import Explanation, explain
from .sparsity import sparsity

__version__ = "0.1.0"

__all__ = [
    "Banded",
    "CheckReport",
    "Compiled",
    "Explanation",
    "FallbackError",
    "JacobianMismatch",
    "Profile",
    "bilaplacian",
    "check",
    "compile",
    "diagonal",
    "divergence",
    "explain",
    "fallback",
    "gradient",
    "jacobian",
    "jacobian_of",
    "jjt",
    "jtj",
    "jvp",
    "laplacian",
    "profile",
    "sparsity",
    "vjp",
]
