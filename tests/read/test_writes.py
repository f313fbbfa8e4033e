"""Writes into parts of one tensor, one after another: read as one where each entry of the result has one origin."""

import pytest
import torch
from common import F64, MODES
from tolerances import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import jactri


def entry_by_entry(x):
    """Of a matrix, constants between; each is what the next write goes on from."""
    out = x.new_zeros(len(x), 3, 3)
    for r in range(3):
        for k in range(3):
            out[:, r, k] = float(k) if r == k else x[:, r] * x[:, k].sin() if r < k else x[:, 0]
    return out @ out


def in_order(x):
    out, h = x.new_zeros(len(x), 5, x.shape[1]), x
    for k in range(5):
        h = torch.tanh(h * 1.1)
        out[:, k] = h
    return out


def in_blocks(x):
    out = x.new_zeros(len(x), 4, 4)
    out[:, :3, :3] = x[:, :3, None] * x[:, None, :3]
    out[:, :3, 3] = x[:, :3].exp()
    out[:, 3, 3] = 1
    out[:, 3, 0] = x[:, 0]
    return out


def over_values(x):
    y = (x[:, :, None] * x[:, None]).sin()
    y[:, 2] = x.cos()
    y[:, 0] = x.sin()
    y[:, :, 0] = 0
    return y


def backwards(x):
    out = x.new_zeros(3, len(x))
    for k in reversed(range(3)):
        out[k] = x[:, k] ** (k + 2)
    return out.T


def added(x):
    y = x * 2
    y[:, 0].add_(x[:, 1].sin())
    y[:, 1].add_(x[:, 0] * x[:, 2])
    y[:, 1].add_(x[:, 2])
    return y


def overwritten(x):
    y = x.new_zeros(x.shape)
    y[:, 0] = x[:, 1].exp()
    y[:, 1] = x[:, 0].exp()
    y[:, 0] = x[:, 0].sin()
    return y


def scaled(x):
    y = x.clone()
    y[:, 0] = x[:, 1].exp()
    y[:, 0].mul_(0.5)
    y[:, 2] = x[:, 0]
    y[:, 1].exp_()
    return y


def as_it_is_here(x):
    """A factor that happens to be 1."""
    y = x.new_zeros(x.shape)
    y[:, 1] = x[:, 2]
    y[:, 0] = x[:, 1] - x[:, 1].detach()
    y[:, 0].exp_()
    return y


def read_between(x):
    y = x.new_zeros(x.shape)
    y[:, 0] = x[:, 1].exp()
    z = y[:, 0] + x[:, 2]
    y[:, 1] = z
    y[:, 2] = z.sin()
    return y, z


def of_one_number(x):
    y = x * x
    y[:, 0] = x[0, 0].exp()
    y[1, 1] = x[0, 0].sin()
    return y


def of_others(x):
    p = torch.ones(len(x), dtype=x.dtype, requires_grad=True)
    y = x.new_zeros(x.shape)
    y[:, 0] = p * 2
    y[:, 1] = x[:, 0].exp()
    y[:, 2] = p.sin()
    return y


def of_other_dtypes(x):
    y = x.new_zeros(x.shape)
    y[:, 0] = x[:, 1].exp()
    y[:, 2] = x[:, 1].float()
    return y


def of_parts(x):
    z = torch.zeros(len(x), 3, dtype=torch.complex128)
    z[:, 0] = torch.complex(x[:, 0], x[:, 1])
    z[:, 1] = torch.complex(x[:, 1].sin(), x[:, 2])
    z[:, 2] = z[:, 0] * 1j
    return z.abs()


WRITES = (
    entry_by_entry, in_order, in_blocks, over_values, backwards, added, overwritten, scaled, as_it_is_here, of_others,
    of_parts,
)  # fmt: skip
MIXED = (read_between, of_one_number, of_other_dtypes)


def inputs(func):
    x = torch.randn(4, 3, dtype=F64)
    return x


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("func", (*WRITES, *MIXED))
def test_writes(func, mode):
    x = inputs(func)
    truth = torch.autograd.functional.jacobian(func, x)
    ours = jactri.jacobian(func, x, strategy=mode)
    for got, want in zip(
        *([t] if isinstance(t, torch.Tensor) else t for t in (ours, truth)), strict=True
    ):
        assert_close(got, want, torch.float32 if func is of_other_dtypes else F64, what=mode)
    if func in WRITES:
        own = jactri.jacobian(func, x, per_sample=True, strategy=mode)
        for n in range(4):
            assert_close(own[n], truth[n][..., n, :], F64, what=mode)


@pytest.mark.parametrize("func", WRITES)
def test_second_derivatives(func):
    def energies(x):
        return func(x).sin().flatten(1).sum(1)

    def energy(x):
        return energies(x).sum()

    x = inputs(func)
    second = torch.autograd.functional.hessian(energy, x)
    scale = second.abs().max().item()
    assert_close(jactri.func.hessian(energy)(x), second, F64, scale=scale)
    traces = torch.stack([second[n, :, n].trace() for n in range(4)])
    assert_close(jactri.laplacian(energies, x), traces, F64, scale=scale)


class _Count(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


def _ops(call):
    with _Count() as count:
        call()
    return count.n


@pytest.mark.parametrize("entries", [9, 25])
def test_each_write_is_asked_twice(entries):
    """What reading takes of a write is two calls of its node, and no more of the sweep than stacking does."""

    def written(x):
        out = x.new_zeros(len(x), entries)
        for k in range(entries):
            out[:, k] = x[:, k % 3]
        return out.sin()

    def stacked(x):
        return torch.stack([x[:, k % 3] for k in range(entries)], 1).sin()

    x = torch.randn(4, 3, dtype=F64)
    found = {
        f: _ops(lambda f=f: jactri.jacobian(f, x, per_sample=True)) for f in (written, stacked)
    }
    leaf = x.clone().requires_grad_()
    y = written(leaf)
    passed = _ops(lambda: torch.autograd.grad(y.sum(), leaf))
    assert found[written] - _ops(lambda: written(leaf)) <= found[stacked] + 2 * passed + 40


def products(columns, n, rows, over, dtype=F64):
    """What adds to a part of zeros, by a matrix with columns at the ``rows``, one an input; then other writes.

    ``over``: the part is a function of the inputs already, and was scaled.
    """
    M = torch.zeros(n, len(rows), dtype=dtype)
    for k, (row, column) in enumerate(zip(rows, columns, strict=True)):
        for at, weight in column.items():
            M[row + at, k] = weight

    def func(x):
        y = x.sum().expand(n).clone() if over else x.new_zeros(n)
        if over:
            y[0].mul_(2)
        y[:].addmv_(M, x)
        y[1] = x[0]
        return y

    return func


CUBIC = {0: 2.0, 1: -3, 2: 3, 3: -1}  # a number, and its third difference
SMOOTH = {-2: -3 / 35, -1: 12 / 35, 0: 17 / 35, 1: 12 / 35, 2: -3 / 35}  # Savitzky and Golay
UP, DOWN = {0: 1 + 2**-23, 1: 0.5, -1: -0.5}, {0: 2.0}


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize(
    ("columns", "n", "rows"),
    [
        ((CUBIC, CUBIC, CUBIC), 12, (2, 5, 8)),
        ((SMOOTH, SMOOTH, SMOOTH), 40, (4, 12, 30)),
        (({0: 1.0, 2046: 1.0}, {0: 1.0}, {0: 1.0}), 2050, (0, 5, 7)),
        ((UP, DOWN, {0: -1.0, 1: 2.0}), 9, (3, 5, 7)),
    ],
    ids=["difference", "filter", "sum", "scaled"],
)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_products_that_look_like_copies(columns, n, rows, over, dtype):
    """Of numbers in order, and of their squares, a product may give what a copy would."""
    func = products(columns, n, rows, over, dtype)
    x = torch.randn(3, dtype=dtype)
    assert_close(jactri.jacobian(func, x), torch.autograd.functional.jacobian(func, x), dtype)


def test_writes_share_steps():
    plan = jactri.explain(in_order, torch.randn(4, 3, dtype=F64), strategy="reverse-mode")
    assert sum("CopySlices" in step.op for step in plan.steps) <= 2 * 5 + 1, str(plan)
