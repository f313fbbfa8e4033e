"""Triton's own driver and C launchers take every launch, over a libcuda that starts nothing: see launchers.py."""


def test_launchers_take_every_launch(libcuda):
    compiled = "W9-ntk"
    counts = libcuda("W1-silu", "W5", "W6", "W7", "W8-laplacian", compiled, compiled)
    assert counts["target"] == ["cuda", 90]
    assert counts["launches"] >= counts["kernels"] >= 30
