"""W5 and W6: a convolutional classifier, and an image-to-image network."""

from . import workloads

WORKLOADS = workloads.CONV


def test_conv(case, timed):
    """Time one contender on one convolutional network."""
    timed(*case)
