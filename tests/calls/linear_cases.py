"""Functions to linearize, and the matrices of their Jacobians by torch."""

import tolerances
import torch
from common import F64, Cube, seeded, unfollowed
from torch.autograd.functional import jacobian as truth_of
from torch.utils.checkpoint import checkpoint

import jactri


def randn(*shape):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(sum(shape) + 1))


def close(made, want, length=64):
    if isinstance(want, tuple):
        assert isinstance(made, tuple) and len(made) == len(want)
        for m, w in zip(made, want, strict=True):
            close(m, w, length)
    else:
        tolerances.assert_close(made, want, F64, length=length)


def strided(x):
    return torch.stack([x, x], -1)[..., 0]


class Recurrent(torch.nn.Module):
    """Mixes samples."""

    def forward(self, x):
        return (x @ x.T).tanh() @ x.cumsum(1)[:, :2]


def several(a, b):
    return (a.sum() * b.sin(), a.outer(b[0]), a.new_ones(2))


CASES = {
    "mlp": lambda: (seeded(3, 7, 2), (randn(5, 3),)),
    "one sample": lambda: (seeded(3, 7, 2), (randn(1, 3),)),
    "no samples": lambda: (seeded(3, 7, 2), (randn(0, 3),)),
    "strided": lambda: (seeded(3, 7, 2), (strided(randn(4, 3)),)),
    "samples mix": lambda: (Recurrent(), (randn(4, 3),)),
    "one axis": lambda: (lambda x: x[1:] * x[:-1], (randn(6),)),
    "a number": lambda: (lambda x: x.square().sum(), (randn(2, 3),)),
    "of a number": lambda: (lambda x: x.sin(), (randn(),)),
    "several": lambda: (several, (randn(3), randn(2, 3))),
    "a Function": lambda: (lambda x: Cube.apply(x).sum(1), (randn(4, 3),)),
    "complex inside": lambda: (
        lambda x: torch.view_as_real(unfollowed(torch.fft.fft(x))),
        (randn(2, 4),),
    ),
    "checkpointed": lambda: (
        lambda x: checkpoint(seeded(3, 7, 2), x, use_reentrant=False),
        (randn(5, 3),),
    ),
    "a constant": lambda: (lambda x: x.new_ones(2, 2), (randn(3),)),
}


def given(name):
    func, xs = CASES[name]()
    inputs = xs if len(xs) > 1 else xs[0]
    return func, xs, inputs, jactri.linearize(func, inputs)


def truth(func, inputs):
    """That of torch, which has none of nothing."""
    if isinstance(inputs, tuple) or inputs.numel():
        return truth_of(func, inputs)
    return torch.zeros(*func(inputs).shape, *inputs.shape, dtype=F64)


def matrix(func, inputs, xs):
    """All blocks of the Jacobian as one matrix."""
    rows = truth(func, inputs)
    rows = rows if isinstance(rows, tuple) else (rows,)
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    sizes = [x.numel() for x in xs]
    return torch.cat(
        [
            torch.cat(
                [
                    b.reshape(b.shape[: b.dim() - x.dim()].numel(), n)
                    for b, x, n in zip(row, xs, sizes, strict=True)
                ],
                1,
            )
            for row in rows
        ]
    )
