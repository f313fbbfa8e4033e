"""Checkpointed segments run as often as a backward pass needs them, and what one of them made is kept at a time."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import GraphExecGroup, _CheckpointFrame, checkpoint

import jactri


class Sine(torch.autograd.Function):
    """Opaque: its node is called, once for each chunk, and reads what it saved."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.cos()


def written(x):
    out = torch.zeros_like(x)
    out[:, 1:] = x[:, :-1].sin() * x[:, 1:]
    return out * x


def nested(x):
    inner = (lambda v: v.sin() * v, lambda v: v.tanh().exp())
    for f in inner:
        x = checkpoint(f, x, use_reentrant=False).cos()
    return x


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(2, 2) for _ in range(3))

    def forward(self, x):
        x = x.unflatten(1, (2, 2))
        return ((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)).flatten(1)


def deep(activation, layers=4):
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(4, 4), activation())))


def held():
    """How many segments hold something that was computed anew."""
    frames = [f for f in gc.get_objects() if type(f) is _CheckpointFrame]
    return sum(any(map(len, f.recomputed.values())) for f in frames)


class Segments:
    """Three segments, each checkpointed if that is asked for; how often each ran, and how many were held at a time."""

    def __init__(self, segment, checkpointed=True):
        self.segment, self.checkpointed = segment, checkpointed
        self.runs, self.watched, self.held = [0, 0, 0], False, 0

    def __call__(self, x):
        for i in range(3):
            x = (
                checkpoint(self.one, i, x, use_reentrant=False)
                if self.checkpointed
                else self.one(i, x)
            )
        return x

    def one(self, i, x):
        self.runs[i] += 1
        if self.watched:
            self.held = max(self.held, held())
        return x + self.segment(x)


X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
C = torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4)
CALLS = {
    "vjp": lambda f: jactri.vjp(f, X, torch.stack([C, C.sin()]))[1],
    "jvp": lambda f: jactri.jvp(f, X, C)[1],
    "whole": lambda f: jactri.jacobian(f, X),
    "rows": lambda f: jactri.jacobian(f, X, per_sample=True),
    "columns": lambda f: jactri.jacobian(f, X, per_sample=True, strategy="forward-mode"),
    "chunks": lambda f: jactri.jacobian(f, X, memory_limit="2KB"),
    "graph": lambda f: jactri.jacobian(f, X, per_sample=True, create_graph=True),
    "jtj": lambda f: jactri.jtj(f, X),
    "diagonal": lambda f: jactri.diagonal(f, X),
    "divergence": lambda f: jactri.divergence(f, X),
    "laplacian": lambda f: jactri.laplacian(lambda x: f(x).sum(1), X),
}
SEGMENTS = {
    "tanh": lambda: deep(nn.Tanh),
    "leaky": lambda: deep(nn.LeakyReLU),  # its node is asked for two things
    "norm": lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4)),
    "attention": Attention,
    "written": lambda: written,
    "opaque": lambda: Sine.apply,
    "nested": lambda: nested,
}


def pair(name):
    """A function with checkpoints, and the same without."""
    torch.manual_seed(1)
    segment = SEGMENTS[name]()
    if isinstance(segment, nn.Module):
        segment.double()
    return Segments(segment), Segments(segment, False)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", SEGMENTS)
def test_a_segment_runs_at_most_three_times(name, call):
    f, plain = pair(name)
    got = CALLS[call](f)
    torch.testing.assert_close(got, CALLS[call](plain), rtol=1e-12, atol=1e-12)
    if (
        name != "opaque"
    ):  # nodes that are called have passes of their own: does one mix samples, is it recorded
        assert max(f.runs) <= 3, f.runs


@pytest.mark.parametrize("call", ("vjp", "columns", "graph"))
@pytest.mark.parametrize("name", ("tanh", "leaky"))
def test_one_segment_is_held(name, call):
    gc.collect()
    before = held()
    f, _ = pair(name)
    f.watched = True
    got = CALLS[call](f)
    assert f.held == before + 1  # when another one begins
    del got
    gc.collect()
    assert held() == before


def test_second_derivatives():
    f, plain = pair("tanh")
    got, want = (
        jactri.func.hessian(lambda x, g=g: g(x[None]).square().sum())(X[0]) for g in (f, plain)
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_within_a_group_of_the_caller():
    """The caller's own passes are as they were; the calls are not in that group."""
    f, plain = pair("tanh")
    leaf = X.clone().requires_grad_()
    want = CALLS["rows"](plain)
    with GraphExecGroup() as group:
        y = f(leaf)
        for _ in range(2):
            torch.testing.assert_close(CALLS["rows"](f), want, rtol=1e-12, atol=1e-12)
        assert GraphExecGroup._get_current_group() is group
        (got,) = torch.autograd.grad(y, leaf, C)
    torch.testing.assert_close(got, jactri.vjp(plain, X, C)[1], rtol=1e-12, atol=1e-12)


def test_a_segment_that_is_not_the_same_again_is_refused():
    class Changing(Segments):
        def one(self, i, x):
            self.runs[i] += 1
            return (x[: self.runs[i]] * 2).sin()

    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different metadata"):
        jactri.jacobian(Changing(None), X)


def test_saved_on_the_cpu():
    """Each value comes back once for each use: reading, and the product."""
    taken = []

    def net(x):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (t,), lambda p: taken.append(p) or p[0]
        ):
            return deep(nn.Tanh).double()(x)

    torch.manual_seed(1)
    jactri.vjp(net, X, C)
    assert len({id(p) for p in taken}) == len(taken)
