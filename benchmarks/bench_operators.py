"""Laplacian, divergence, parameter Jacobian and tangent kernel (W8, W9)."""

from .workloads import OPERATORS as WORKLOADS  # noqa: F401


def test_operator(case, timed):
    """Time one contender."""
    timed(*case)
