"""W1 to W4: MLPs whose Jacobian is square, wide, tall, or has a bottleneck."""

from . import workloads

WORKLOADS = workloads.MLP


def test_mlp(case, timed):
    """Time one contender on one MLP."""
    timed(*case)
