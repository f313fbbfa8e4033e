"""`jvp` with tangents that go with the function's run: what it leaves behind, and how often it walks a graph."""

import gc
import weakref

import pytest
import torch
from common import F64, x3
from test_streaming import given, truth
from tolerances import assert_close, assert_same_tree

import jactri
from jactri._src.prologue import streaming


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_with_what_func_writes_to(fails):
    """Neither a mark of ours, nor tangents behind the leaves to which its graph leads."""
    kept, alive = torch.zeros(20, dtype=F64), []

    def func(x):
        for k in range(20):
            kept[k] = x[k % 3].sin()
            if k in (3, 19):
                alive.append(kept.grad_fn)
        if fails:
            raise KeyError("the caller's")
        return kept * 2

    x, t = x3(), torch.ones(1000, 3, dtype=F64)
    taken = weakref.ref(t)
    if fails:
        with pytest.raises(KeyError, match="the caller's"):
            jactri.jvp(func, x, t, differentiate=None)
    else:
        jactri.jvp(func, x, t, differentiate=None)
    del t
    gc.collect()  # of an exception's frames
    assert not vars(kept) and kept.requires_grad
    assert taken() is None
    stack, leaves = list(alive), []
    while stack:
        node = stack.pop()
        leaves += [node.variable] if hasattr(node, "variable") else []
        stack += [p for p, _ in node.next_functions if p is not None]
    assert leaves and not any(map(vars, leaves))


def of_weights(ops, before):
    """A function whose weight so many ops made, within it or ``before``, and which is used after each."""
    w = torch.linspace(0.5, 1, 9, dtype=F64).view(3, 3).requires_grad_()

    def made(v):
        weights = [v]
        for _ in range(ops):
            v = (v * 1.01).t()
            weights.append(v)
        return weights

    ready = made(w) if before else None

    def func(x):
        for v in ready or made(w):
            x = (x @ v).tanh()
        return x

    return func


@pytest.mark.parametrize("before", [False, True])
def test_weights_are_walked_once(before, monkeypatch):
    walked = []

    class Walk(streaming.Walk):
        __slots__ = ()

        def __init__(self, *ends):
            super().__init__(*ends)
            walked.append(len(self.order))

    monkeypatch.setattr(streaming, "Walk", Walk)
    (x,), (t,) = given([(2, 3)], (2,))
    for ops in (30, 120):
        walked.clear()
        func = of_weights(ops, before)
        product = jactri.jvp(func, x, t, differentiate=None)[1]
        assert sum(walked) < 20 * ops
        assert_close(product, truth(func, (x,), (t,))[0], F64, length=64)
    ready = of_weights(2, True)
    jactri.jvp(ready, x, t, differentiate=None)
    assert all(not v.grad_fn.metadata for v in ready.__closure__[1].cell_contents[1:])


def test_writes_to_what_had_no_tangents():
    """What was found to be of weights alone is so no longer when it, or a view of it, is written to."""
    w = torch.linspace(0.5, 1, 4, dtype=F64).requires_grad_()

    def func(x):
        a = w * 2
        part = a[1:].view(-1)
        b = a.exp() * w
        a[0] = x[0]
        c = a.clone() * part.sum()
        part.mul_(x[:3])
        d = a + b.clone().sin()
        b.mul_(x)
        for k in range(20):
            a[k % 4] = a[k % 4].clone() * b[0]
        torch._foreach_mul_([c], [x])
        return a * b, c + d, part, b * w

    (x,), (t,) = given([(4,)], (3,))
    product = jactri.jvp(func, x, t, differentiate=None)[1]
    assert_same_tree(product, truth(func, (x,), (t,)), F64, length=64)
