"""Little free memory: samples run in ranges, in every call that can take them so, and a proof needs none."""

import re

import pytest
import torch
from common import F64, seeded
from tolerances import assert_close
from torch.autograd.functional import jacobian as truth_of

import jactri
from jactri._src.base import memory
from jactri._src.base.memory import MemoryLimitTooSmall


@pytest.fixture
def little(monkeypatch):
    """48 KiB are free: half of them is less than one seed of 16 samples takes, and more than one of one sample."""
    monkeypatch.setattr(memory, "LARGE", 1 << 10)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 48 << 10)


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
    narrow = seeded(3, 60, 3)  # of all samples at once
    J = truth_of(narrow, X).diagonal(0, 0, 2).movedim(-1, 0)
    assert_close(jactri.divergence(narrow, X), J.diagonal(0, 1, 2).sum(1), F64, length=60)
    J = truth_of(FIELD, X).diagonal(0, 0, 2).movedim(-1, 0)
    assert_close(jactri.jtj(FIELD, X, per_sample=True), J.mT @ J, F64, length=600)
    assert_close(jactri.jjt(FIELD, X, per_sample=True), J @ J.mT, F64, length=600)


@pytest.mark.parametrize("per_sample", [False, True])
def test_explain_tells_the_ranges(little, per_sample):
    report = jactri.explain(NET, X, per_sample=per_sample)
    assert "samples run one after another" in report.note
    assert report.peak_bytes <= 24 << 10
    assert report.chunks > 1


LIMITED = {
    "jacobian": lambda **kw: jactri.jacobian(NET, X, **kw),
    "jacobian, per_sample": lambda **kw: jactri.jacobian(NET, X, per_sample=True, **kw),
    "jacobian of what is read as a whole": lambda **kw: jactri.jacobian(lambda v: (v + 1j).abs(), X, **kw),
    "jvp": lambda **kw: jactri.jvp(NET, X, X.expand(5, 16, 3), **kw)[1],
    "vjp": lambda **kw: jactri.vjp(NET, X, torch.ones(5, 16, 2, dtype=F64), **kw)[1],
    "gradient": lambda **kw: jactri.gradient(NET, X, **kw),
    "diagonal": lambda **kw: jactri.diagonal(FIELD, X, **kw),
    "laplacian": lambda **kw: jactri.laplacian(NET, X, **kw),
    "jtj": lambda **kw: jactri.jtj(NET, X, **kw),
    "jjt, per_sample": lambda **kw: jactri.jjt(NET, X, per_sample=True, **kw),
    "dense": lambda **kw: jactri.parameter_jacobian(NET, X, **kw).dense()["0.weight"],
    "gram": lambda **kw: jactri.parameter_jacobian(NET, X, **kw).gram(),
    "ntk": lambda **kw: jactri.empirical_ntk(NET, X, **kw),
    "ggn": lambda **kw: jactri.ggn(NET, X, torch.ones(16, 2, dtype=F64), **kw).diagonal()["0.weight"],
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITED)
def test_a_refusal_names_a_limit_that_works(name):
    """And one that counts the answer: below its bytes, no call runs. A bit less is refused."""
    call, named = LIMITED[name], 8
    want = call()
    while True:
        try:
            got = call(memory_limit=named)
            break
        except MemoryLimitTooSmall as refused:
            text, last = str(refused), named
            named = int(re.search(r"a memory_limit of (\d+) bytes or more allows it$", text)[1])
            assert named > last
    assert_close(got, want, F64, length=600)
    assert named >= want.nbytes
    with pytest.raises(MemoryLimitTooSmall):
        call(memory_limit=int(named * 0.99))


FORGOTTEN = {
    "jacobian": (lambda x: jactri.jacobian(NET, x), "; else out= writes it elsewhere"),
    "jacobian_of": (lambda x: jactri.jacobian_of(NET(x.requires_grad_()), x), "; else out= "),
    "jacrev": (lambda x: jactri.func.jacrev(NET)(x), "else jactri.jacobian with out="),
    "hessian": (lambda x: jactri.func.hessian(lambda v: NET(v).sum())(x), "the Hessian takes"),
    "jtj": (lambda x: jactri.jtj(NET, x), "the matrix of jtj takes"),
    "jjt": (lambda x: jactri.jjt(NET, x), "the matrix of jjt takes"),
    "finite_difference": (lambda x: jactri.finite_difference(NET, x), "the Jacobian takes"),
    "dense": (lambda x: jactri.parameter_jacobian(NET, x.double()).dense(), "out= writes"),
    "ntk": (lambda x: jactri.empirical_ntk(NET, x), "the kernel takes"),
    "gram": (lambda x: jactri.parameter_jacobian(NET, x).gram(), "J J^T takes"),
}


@pytest.mark.parametrize("name", FORGOTTEN)
def test_an_answer_that_cannot_be_is_refused_first(name, monkeypatch):
    """A forgotten per_sample, or a kernel of too many samples: nothing of the answer is allocated."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 200 << 20)
    call, says = FORGOTTEN[name]
    x = torch.ones(5000, 3, dtype=F64)
    with pytest.raises(
        MemoryLimitTooSmall, match="and half of the free memory is 105 MB"
    ) as refused:
        call(x)
    assert says in str(refused.value)
    if name not in ("dense", "ntk", "gram"):
        assert "if the 5000 samples of the first axis" in str(refused.value)
        assert "per_sample=True gives their blocks alone, " in str(refused.value)
