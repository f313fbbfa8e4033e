"""What kernels can run together, found from structures alone: no kernel runs here."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jactri._src.plan.fusion import Fused, fuse
from jactri._src.plan.sweep import Step, simulate
from jactri._src.read.reading import read

MODES = [False, True]


def sweeps(f, *shape, reverse=False, summed=False):
    x = torch.randn(*shape, requires_grad=True)
    y = f(x)
    ys = y if isinstance(y, tuple) else (y,)
    graph = read(ys, (x,))
    sweep = simulate(graph, 0, reverse, summed)
    return graph, sweep, fuse(graph, sweep)


def kinds(items):
    return [(i.kind, len(i.steps)) for i in items if isinstance(i, Fused)]


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.g = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x):
        return self.a(x) * torch.sigmoid(self.g(x))


def lin(*widths):
    return [nn.Linear(a, b) for a, b in pairwise(widths)]


A, B, C = lin(4, 6, 5, 3)
NETWORKS = {
    # name: (function, input shape, what is fused forward, and in reverse); first steps are free
    "mlp": (nn.Sequential(A, nn.Tanh(), B, nn.ReLU(), C), (7, 4), [("chain", 4)], [("chain", 4)]),
    "one layer": (A, (7, 4), [], []),
    "activation first": (nn.Sequential(nn.Tanh(), A, nn.Tanh()), (7, 4), [], []),
    "views between": (nn.Sequential(A, nn.Tanh(), B), (2, 3, 4), [("chain", 3)], [("chain", 3)]),
    "scalings only": (lambda x: x.sin().exp().tanh(), (7, 4), [], []),
    "gate": (Gated(), (7, 4), [("sum", 3)], []),
    "softmax": (nn.Sequential(A, nn.Tanh(), B, nn.Softmax(-1)), (7, 4), [("chain", 2), ("rows", 1)], [("chain", 3)]),
    "softmax over samples": (nn.Sequential(A, nn.Softmax(0)), (7, 4), [], []),
    "layer norm": (
        nn.Sequential(A, nn.LayerNorm(6), nn.Tanh(), B), (7, 4),
        [("rows", 3), ("chain", 1)], [("rows", 3), ("chain", 1)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("reverse", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_fused(name, reverse):
    f, shape, forward, backward = NETWORKS[name]
    _, _, items = sweeps(f, *shape, reverse=reverse)
    assert kinds(items) == (backward if reverse else forward)


def test_a_block_that_is_read_twice_ends_a_chain():
    def f(x):
        h = torch.tanh(B(torch.tanh(A(x))))
        return C(h) + C(torch.sin(h))

    _, _, items = sweeps(f, 7, 4)
    first = next(i for i in items if isinstance(i, Fused))
    assert len(first.steps) == 3  # tanh, B, tanh: and no further, although more links follow


def test_a_block_that_is_an_answer_ends_a_chain():
    def f(x):
        h = B(torch.tanh(A(x)))
        return C(torch.tanh(h)), h

    _, sweep, items = sweeps(f, 7, 4)
    fused = [i for i in items if isinstance(i, Fused)]
    assert kinds(items) == [("chain", 2), ("chain", 2)]
    assert fused[0].value in sweep.targets and fused[0].value == fused[1].reads[0]


@pytest.mark.parametrize("reverse", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_step_runs_once_after_what_it_reads(name, reverse):
    f, shape, *_ = NETWORKS[name]
    _, sweep, items = sweeps(f, *shape, reverse=reverse)
    steps = [s for i in items for s in (i.steps if isinstance(i, Fused) else (i,))]
    assert sorted(s.value for s in steps) == sorted(s.value for s in sweep.steps)
    here, gone = {sweep.seed}, set()
    for item in items:
        assert set(item.reads) <= here - gone
        here.add(item.value)
        gone.update(item.frees)
    targets = {t for t in sweep.targets if t is not None}
    assert not gone & targets
    assert gone == here - targets - ({sweep.seed} & targets)
    assert all(isinstance(i, Step | Fused) for i in items)


def test_chains_add_what_goes_around_them():
    up, down = nn.Linear(4, 9), nn.Linear(9, 4)

    def f(x):
        for _ in range(2):
            x = x + down(F.gelu(up(x)))
        return x

    # the first layer is free, and what goes around it an identity, which is added where it is one
    assert kinds(sweeps(f, 7, 4)[2]) == [("chain", 2), ("chain", 4)]
    assert kinds(sweeps(f, 7, 4, reverse=True)[2]) == [("chain", 3)]


def test_a_tie_that_is_lost_inside_is_no_link():
    """Samples mix between the layers: the block must be spread out first, which no kernel does."""

    def f(x):
        return B(torch.tanh(A(x)).t().reshape(7, 6))

    _, sweep, items = sweeps(f, 7, 4)
    for item in items:
        if isinstance(item, Fused):
            for step in item.steps:
                assert step.terms[0].route.mid is sweep.layouts[step.terms[0].other]
