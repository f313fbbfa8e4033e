"""Little free memory: samples run in ranges, in every call that can take them so, and a proof needs none."""

import pytest
import torch
from common import F64, seeded
from tolerances import assert_close
from torch.autograd.functional import jacobian as truth_of

import jactri
from jactri._src.plan import planning


@pytest.fixture
def little(monkeypatch):
    """32 KiB are free: less than one seed of 16 samples takes, and more than one of one sample."""
    monkeypatch.setattr(planning, "_LARGE", 1 << 10)
    monkeypatch.setattr(planning, "free_bytes", lambda device: 32 << 10)


NET, FIELD = seeded(3, 600, 2), seeded(3, 600, 3)
X = torch.linspace(-1, 1, 16 * 3, dtype=F64).reshape(16, 3)

CALLS = {
    "jacobian, differentiable": lambda: jactri.jacobian(NET, X, create_graph=True),
    "per_sample": lambda: jactri.jacobian(NET, X, per_sample=True),
    "per_sample, forward": lambda: jactri.jacobian(
        NET, X, per_sample=True, strategy="forward-mode"
    ),
    "gradient": lambda: jactri.gradient(NET, X),
    "jacrev": lambda: jactri.func.jacrev(NET)(X),
    "jacfwd": lambda: jactri.func.jacfwd(NET)(X),
    "jacrev of parameters too": lambda: jactri.func.jacrev(NET)(X.clone().requires_grad_()),
}


@pytest.mark.parametrize("name", CALLS)
def test_jacobians(little, name):
    made = CALLS[name]()
    want = truth_of(NET, X)
    if made.dim() == 3:
        want = want.diagonal(0, 0, 2).movedim(-1, 0)
    assert_close(made.detach(), want, F64, length=600)


def test_a_deferred_graph(little):
    params = list(NET.parameters())
    theirs = torch.func.jacrev(NET)(X)
    ours = jactri.func.jacrev(NET)(X)
    want = torch.autograd.grad(theirs.square().sum(), params, allow_unused=True)
    got = torch.autograd.grad(ours.square().sum(), params, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            assert_close(g, w, F64, length=6000, what="gradient")


def test_sums_of_a_jacobian(little):
    J = truth_of(FIELD, X).diagonal(0, 0, 2).movedim(-1, 0)
    assert_close(jactri.divergence(FIELD, X), J.diagonal(0, 1, 2).sum(1), F64, length=600)
    assert_close(jactri.jtj(FIELD, X, per_sample=True), J.mT @ J, F64, length=600)
    assert_close(jactri.jjt(FIELD, X, per_sample=True), J @ J.mT, F64, length=600)


@pytest.mark.parametrize("per_sample", [False, True])
def test_explain_tells_the_ranges(little, per_sample):
    report = jactri.explain(NET, X, per_sample=per_sample)
    assert "samples run one after another" in report.note
    assert report.peak_bytes <= 16 << 10
    assert report.chunks > 1
