"""Sweeps by patches: blocks that lie in one memory."""

import pytest
import torch
import torch.nn.functional as F
from common import F64
from tolerances import assert_close

import jactri


def gated(x):
    return (x * x.sin()).tanh()


def squared(x):
    h = x.tanh()
    return (h * (0.8 * h)).tanh()


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("function", [gated, squared])
def test_a_block_that_two_ops_take_is_scaled_by_neither(function, size, strategy):
    """An op that passes its block on leaves two in one memory: the first to be scaled must not write to it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 2, size, dtype=F64, generator=generator)
    x = torch.randn(1, 2, 40, dtype=F64, generator=generator)

    def func(x):
        return F.conv1d(function(F.conv1d(x, weight.expand(2, 2, size))), weight)

    assert "by patches" in str(jactri.explain(func, x, strategy=strategy))
    truth = torch.autograd.functional.jacobian(func, x)
    assert_close(jactri.jacobian(func, x, strategy=strategy), truth, F64, length=80)
