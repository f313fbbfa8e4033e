"""`jacrev`, `jacfwd` and `hessian` with the signatures, results and errors of ``torch.func``.

Change the import and keep the code: ``argnums``, pytrees, ``has_aux`` and nesting are torch.func's.

Examples:
    >>> from jactri.func import jacrev
    >>> weight = {"a": torch.tensor(2.0), "b": torch.ones(3)}
    >>> J = jacrev(lambda w: w["a"] * w["b"].sum())(weight)
    >>> J["a"], J["b"]
    (tensor(3.), tensor([2., 2., 2.]))
"""

from ._src.calls.func import hessian, jacfwd, jacrev

__all__ = ["hessian", "jacfwd", "jacrev"]
