"""Nothing of a call's graph is left to the garbage collector: a loop of calls would pile it up until it runs."""

import gc
import weakref

import pytest
import torch
from common import Cube, unfollowed
from linear_cases import Recurrent, randn

import jactri

FUNCS = {
    "ops": Recurrent(),
    "a Function": lambda x: Cube.apply(x).sin() @ x.T,
    "an op without a rule": lambda x: torch.linalg.svdvals(x)[:, None] * x[:3],
    "as a whole": lambda x: torch.view_as_real(unfollowed(torch.fft.fft(x))),
    "a sparse tensor": lambda x: (x.to_sparse() * 2).to_dense().sin(),
}

CALLS = {
    "jacobian": jactri.jacobian,
    "forward": lambda f, x: jactri.jacobian(f, x, strategy="forward-mode"),
    "jvp": lambda f, x: jactri.jvp(f, x, randn(3, *x.shape)),
    "vjp": lambda f, x: jactri.vjp(f, x, randn(2, *f(x).shape)),
    "jtj": jactri.jtj,
    "dense": lambda f, x: jactri.linearize(f, x).dense(),
    "products": lambda f, x: [op @ randn(4, 3, 2) for op in [jactri.linearize(f, x)]],
    "transposed": lambda f, x: [
        op.T @ randn(*op.output.shape, 2) for op in [jactri.linearize(f, x)]
    ],
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", FUNCS)
def test_a_graph_goes_with_its_call(name, call):
    func, kept = FUNCS[name], []

    class Saved:
        def __init__(self, x):
            self.x = x.detach()  # a node that saves its result would hold itself
            kept.append(weakref.ref(self))

    def watched(x):
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda s: s.x):
            return func(x)

    CALLS[call](
        func, randn(4, 3)
    )  # torch imports modules at a first call, within which errors are handled
    gc.disable()
    try:
        CALLS[call](watched, randn(4, 3))
        assert kept and all(k() is None for k in kept)
    finally:
        gc.enable()
