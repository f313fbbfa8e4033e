"""Where a warning says that a hook is, and what it takes to find that out."""

import pytest
import torch
from common import F64
from test_hooks import before_the_node, on_the_node

import jactri
from jactri._src.base.memory import Taken


def points():
    return torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))


def on_the_value(x):
    y = (x * 2).sin()
    y.register_hook(lambda g: 3 * g)
    return y * x.exp()


def at_the_output(x):
    y = (x * 2).sin()
    y.register_hook(lambda g: 3 * g)
    return y


def of_a_sum(x):
    """Of two cotangents neither of which the hook changes."""
    y = (x * 2).sin()
    y.register_hook(lambda g: g.clamp(-2, 2))
    return y * 1.5 + y


@pytest.mark.parametrize(
    "func", [on_the_value, on_the_node, before_the_node, at_the_output, of_a_sum]
)
def test_the_warning_names_the_place(func):
    with pytest.warns(UserWarning, match="at SinBackward0"):
        jactri.jacobian(func, points())


def test_the_warning_names_the_place_of_an_inputs_hook():
    x = points().requires_grad_()
    x.register_hook(lambda g: 3 * g)
    with pytest.warns(UserWarning, match="at MulBackward0"):
        jactri.jacobian_of((x * 2).sin(), x)


@pytest.mark.filterwarnings("ignore:a hook on gradients")
@pytest.mark.parametrize("factor", [1, 3])
def test_what_hooks_do_is_found_out_in_little_memory(factor):
    """No gradient outlives the call of its node, however many there are."""

    def func(x):
        h = x @ torch.ones(4, 1 << 14, dtype=F64)
        h.register_hook(lambda g: factor * g)
        for _ in range(12):
            h = h.sin()
        return h @ torch.ones(1 << 14, 2, dtype=F64)

    size = 3 * (1 << 14) * F64.itemsize
    with Taken() as forward:
        y = func(points().requires_grad_())
    with Taken() as taken:
        jactri.vjp(func, points(), torch.ones_like(y))
    assert taken.peak < forward.now + 7 * size
