"""W7: a transformer block, attention written out and fused."""

from . import workloads

WORKLOADS = workloads.ATTENTION


def test_attention(case, timed):
    """Time one contender on a transformer block."""
    timed(*case)
