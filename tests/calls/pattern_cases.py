"""Functions whose Jacobians have a known pattern, and what these are held against."""

import torch
from common import F64


def drawn(m, n, seed=0, density=0.15):
    """A function with a random pattern, and that."""
    gen = torch.Generator().manual_seed(seed)
    mask = torch.rand(m, n, generator=gen) < density
    weight = torch.randn(m, n, generator=gen, dtype=F64) * mask
    return lambda x: (weight @ x.sin().flatten()).tanh(), mask


def arrow(x):
    rest = x.sin() + x[0] * x.cos()
    return torch.cat([(x[:-1] * x[1:]).sum()[None], rest[1:]])


def point(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def autograd(func, x):
    return torch.autograd.functional.jacobian(func, x)


def dense(J):
    return J if isinstance(J, torch.Tensor) and J.layout is torch.strided else J.to_dense()


def same(J, want):
    torch.testing.assert_close(dense(J).reshape(want.shape), want)
