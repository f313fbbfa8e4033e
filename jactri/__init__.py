"""jactri: fast exact Jacobians of neural networks in PyTorch."""

from .api import jacobian, jacobian_of
from .opaque import FallbackError, fallback

__version__ = "0.1.0"

__all__ = ["FallbackError", "fallback", "jacobian", "jacobian_of"]
