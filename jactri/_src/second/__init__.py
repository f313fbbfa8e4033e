"""Second order: curvature of ops, the forward Laplacian."""

from . import curves, equations  # noqa: F401 - of ops, registered
