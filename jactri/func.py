"""`jacrev`, `jacfwd` and `hessian` with the signatures, results and errors of ``torch.func``."""

from ._src.calls.func import hessian, jacfwd, jacrev

__all__ = ["hessian", "jacfwd", "jacrev"]
