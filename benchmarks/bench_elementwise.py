"""pytorch#105220: a Jacobian that a hand-written line gets with one multiplication."""

from . import workloads

WORKLOADS = workloads.ELEMENTWISE


def test_elementwise(case, timed):
    """Time one contender on the sum of squares."""
    timed(*case)
