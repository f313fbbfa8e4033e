"""What several test files start from."""

import collections
import itertools
import re
import threading

import torch
from torch import nn
from torch.nn.modules import module as modules

import jactri

F64 = torch.float64
MODES = ["auto", "forward-mode", "reverse-mode"]


def x3():
    return torch.tensor([0.5, -1.5, 2.0], dtype=F64)


def x23():
    return torch.tensor([[0.2, -0.4, 0.9], [1.3, 0.1, -0.8]], dtype=F64)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def make(module):
    torch.manual_seed(0)
    return module().double()


def mlp(*widths):
    parts = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*parts[:-1])


def unfollowed(z):
    """Complex numbers as they are, by an op that no rule follows among these: autograd computes such a function."""
    return z.lerp(z, 0.5)


def seeded(*widths, dtype=F64):
    torch.manual_seed(0)
    return mlp(*widths).to(dtype)


def ours_and_theirs(name):
    """A transform of `jactri.func` and that of torch.func."""
    return getattr(jactri.func, name), getattr(torch.func, name)


def torch_before(version):
    """Whether this torch is older: what it could not do yet is no reference."""
    return tuple(map(int, torch.__version__.split(".")[:2])) < version


def in_threads(count, work):
    """Run ``work(0)``, ``work(1)`` and so on at once."""
    threads = [threading.Thread(target=work, args=(k,)) for k in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x**2


STEP = re.compile(r"jactri #(\d+)(?:-(\d+))? (forward|reverse|product)( .*) \[.*FLOP .*B.*\]")


def steps(names):
    """By step number, what its ranges say: the direction, layer and op."""
    found = collections.defaultdict(list)
    for name in names:
        match = STEP.fullmatch(name)
        if match:
            first, last, direction, what = match.groups()
            for number in range(int(first), int(last or first) + 1):
                found[number].append(direction + what)
    return dict(found)


def hooks():
    """Of all modules; the last two are notes about them."""
    return sum(map(len, (
        modules._global_forward_hooks, modules._global_forward_pre_hooks,
        modules._global_forward_hooks_with_kwargs, modules._global_forward_hooks_always_called,
    )))  # fmt: skip
