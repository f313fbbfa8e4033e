"""Pieces of one axis: where they fill it side by side, a sum of them is a cat, without zeros to add to."""

import pytest
import torch
from common import F64
from tolerances import assert_close
from torch.autograd.functional import jacobian as by_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import jactri
from jactri._src.maps.linear_map import Identity
from jactri._src.maps.selection import Place, Select, Slice, side_by_side


@pytest.mark.parametrize(
    ("parts", "order"),
    [
        ([(0, 2), (2, 3)], [0, 1]),
        ([(2, 3), (0, 2)], [1, 0]),
        ([(2, 0), (0, 2), (2, 3)], [1, 0, 2]),
        ([(0, 2), (3, 2)], None),  # a gap
        ([(0, 3), (2, 3)], None),  # an overlap
        ([(0, 2), (2, 2)], None),  # not to the end
        ([(1, 4)], None),
    ],
)
def test_pieces_that_fill_an_axis(parts, order):
    assert side_by_side([Slice(1, start, n, 1, 5) for start, n in parts], True) == order
    assert side_by_side([Place(1, start, n, 1, 5) for start, n in parts], False) == order


def test_other_maps_fill_none():
    half = Slice(1, 0, 2, 1, 4)
    assert side_by_side([half, Slice(0, 2, 2, 1, 4)], True) is None  # another axis
    assert side_by_side([Slice(1, 0, 2, 2, 4), Slice(1, 1, 2, 2, 4)], True) is None  # every other
    assert side_by_side([half, Slice(1, 2, 2, 1, 4)], False) is None  # pushed, they are views
    assert side_by_side([half, Identity()], True) is None
    assert side_by_side([Select(1, 0, 2), Select(1, 1, 2)], True) is None


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def matrix(rows, columns):
    return torch.randn(rows, columns, dtype=F64, generator=torch.Generator().manual_seed(rows))


def three(x):
    a, b, c = (x @ matrix(4, 9)).tanh().split([2, 3, 4], -1)
    return (c[:, :2] * a).sum(1, keepdim=True) * b


def out_of_order(x):
    y = (x @ matrix(4, 9)).sin()
    return torch.cat([y[:, 5:].exp(), y[:, :5] * 2], 1) @ matrix(9, 3)


def overlapping(x):
    y = (x @ matrix(4, 9)).sin()
    return y[:, :6].exp() @ matrix(6, 3) + y[:, 5:].cos() @ matrix(4, 3)


def with_a_gap(x):
    y = (x @ matrix(4, 9)).sin()
    return y[:, :4].exp() @ matrix(4, 3) + y[:, 5:].cos() @ matrix(4, 3)


def of_samples(x):
    a, b = x.sin().split([1, len(x) - 1])
    return torch.cat([a.exp(), b.cos()])


@pytest.mark.parametrize("func", [three, out_of_order, overlapping, with_a_gap, of_samples])
def test_jacobians_through_pieces(func):
    for n in (1, 3):
        x = matrix(n, 4)
        truth = by_autograd(func, x)
        for strategy in ("auto", "forward-mode", "reverse-mode"):
            for chunk in (None, 1, 2):
                J = jactri.jacobian(func, x, strategy=strategy, chunk_size=chunk)
                assert_close(J, truth, F64, length=9)
        leaf = x.clone().requires_grad_()
        found, wanted = (
            torch.autograd.grad(J(func, leaf, create_graph=True).square().sum(), leaf)[0]
            for J in (jactri.jacobian, by_autograd)
        )
        assert_close(found, wanted, F64, length=9 * 81)


def test_no_zeros_are_written():
    def mixed(x):
        a, b = (x @ matrix(4, 8)).sin().chunk(2, 1)
        return (a.exp() * b) @ matrix(4, 3)

    with Ops() as ops:
        jactri.jacobian(mixed, matrix(3, 4), strategy="reverse-mode")
    assert "cat" in ops.names and "slice_backward" not in ops.names
