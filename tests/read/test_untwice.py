"""Ops whose backward torch cannot differentiate: second derivatives are refused by name, with what to write instead."""

import pytest
import torch
import torch.nn.functional as F

import jactri

BAGS = torch.tensor([[0, 1], [1, 2]])
CALLS = {
    "hessian": lambda f, w: jactri.func.hessian(lambda v: f(v).sum())(w),
    "nested": lambda f, w: jactri.jacobian(lambda v: jactri.jacobian(f, v, create_graph=True), w),
    "nested forward": lambda f, w: jactri.jacobian(
        lambda v: jactri.jacobian(f, v, create_graph=True, strategy="forward-mode"), w
    ),
}


@pytest.mark.parametrize("call", ["hessian", "nested"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode, call):
    w = torch.randn(5, 3, dtype=torch.float64)

    def func(w):
        return F.embedding_bag(BAGS, w, mode=mode).sin()

    with pytest.raises(NotImplementedError, match=r"^EmbeddingBag .*\.embedding\("):
        CALLS[call](func, w)
    assert jactri.jacobian(func, w).isfinite().all()


@pytest.mark.parametrize("call", ["hessian", "nested", "nested forward"])
def test_what_is_to_be_written_instead(call):
    w = torch.randn(5, 3, dtype=torch.float64)

    def func(w):
        return F.embedding(BAGS, w).sum(1).sin()

    torch.testing.assert_close(func(w), F.embedding_bag(BAGS, w, mode="sum").sin())
    got = CALLS[call](func, w)
    if call == "hessian":
        want = torch.autograd.functional.hessian(lambda w: func(w).sum(), w)
    else:
        want = torch.func.jacrev(torch.func.jacrev(func))(w)
    torch.testing.assert_close(got, want)
