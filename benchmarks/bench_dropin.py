"""The full drop-in shape (N, out, N, in): one import changed, nothing else."""

from . import workloads

WORKLOADS = workloads.DROPIN


def test_dropin(case, timed):
    """Time one contender on `jacobian(net, x)`."""
    timed(*case)
