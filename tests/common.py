"""What several test files start from."""

import torch

F64 = torch.float64
MODES = ["auto", "forward-mode", "reverse-mode"]


def x3():
    return torch.tensor([0.5, -1.5, 2.0], dtype=F64)


def x23():
    return torch.tensor([[0.2, -0.4, 0.9], [1.3, 0.1, -0.8]], dtype=F64)


def make(module):
    torch.manual_seed(0)
    return module().double()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x**2
