"""`empirical_ntk` against products of Jacobians, in all its forms."""

import pytest
import torch
from parameter_cases import CASES, F64, build, truth_of, whole
from tolerances import assert_close, assert_gradients_close
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import jactri

FORMS = {
    "full": lambda k: k,
    "diagonal": lambda k: k.diagonal(0, 2, 3),
    "trace": lambda k: k.diagonal(0, 2, 3).sum(-1),
}


def kernel(a, b):
    return torch.einsum("aip,bjp->abij", a, b)


def shaped(form, n1, n2, out):
    return {
        "full": (n1, n2, *out, *out), "diagonal": (n1, n2, *out), "trace": (n1, n2),
    }[form]  # fmt: skip


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_against_itself_and_another(name, form, chunk_size):
    module, x = build(name)
    truth, _ = truth_of(name)
    out, p = tuple(module(x).shape[1:]), truth.shape[2]
    options = {"compute": form, "chunk_size": chunk_size}
    want = FORMS[form](kernel(truth, truth))
    scale = kernel(truth.abs(), truth.abs()).max().item() * truth.shape[1]
    got = jactri.empirical_ntk(module, x, **options)
    assert_close(got, want.reshape(shaped(form, 4, 4, out)), F64, length=p, scale=scale)
    if name == "a weight a sample":
        return
    for n in (1, 3):
        few, _ = truth_of(name, n)
        want = FORMS[form](kernel(truth, few)).reshape(shaped(form, 4, n, out))
        assert_close(
            jactri.empirical_ntk(module, x, x[:n], **options), want, F64, length=p, scale=scale
        )


@pytest.mark.parametrize("form", FORMS)
def test_of_no_samples(form):
    module, x = build("mlp")
    for a, b in ((x[:0], x), (x, x[:0]), (x[:0], None)):
        got = jactri.empirical_ntk(module, a, b, compute=form)
        n2 = len(a) if b is None else len(b)
        assert got.shape == shaped(form, len(a), n2, (3,))


def test_of_some_parameters():
    module, x = build("cnn")
    _, by_name = whole(module, x)
    names = ["two.weight", "norm.bias"]
    truth = torch.cat([by_name[k].reshape(4, 3, -1) for k in names], 2)
    got = jactri.empirical_ntk(module, x, params=names)
    assert_close(got, kernel(truth, truth), F64, length=truth.shape[2])


def test_of_a_parameter_that_is_not_used():
    module, x = build("shared")
    assert not jactri.empirical_ntk(module, x, params=["unused.weight"]).any()


def test_float32():
    module, x = build("mlp", dtype=torch.float32)
    truth, _ = whole(*build("mlp"))
    got = jactri.empirical_ntk(module, x)
    assert got.dtype == torch.float32
    assert_close(got, kernel(truth, truth), torch.float32, length=truth.shape[2])


@pytest.mark.parametrize("name", ["mlp", "cnn", "language tied"])
def test_gradients(name):
    with sdpa_kernel(SDPBackend.MATH):  # torch has no second derivative of the fused one
        gradients(name)


def gradients(name):
    module, x = build(name)
    truth = torch.func.functional_call
    params = dict(module.named_parameters())

    def ours():
        return jactri.empirical_ntk(module, x, x[:2], create_graph=True)

    def theirs():
        rows = []
        for batch in (x, x[:2]):
            y = truth(module, params, (batch,))
            grads = [
                torch.autograd.grad(e, list(params.values()), create_graph=True)
                for e in y.reshape(-1)
            ]
            flat = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in grads])
            rows.append(flat.reshape(len(batch), -1, flat.shape[1]))
        return kernel(*rows)

    weights = torch.randn(4, 2, 1, 1, dtype=F64)
    got, want = (
        torch.autograd.grad((f() * weights).sum(), list(params.values()), allow_unused=True)
        for f in (ours, theirs)
    )
    assert_gradients_close(got, want, F64, length=1 << 14)


@pytest.mark.parametrize("limit", ["60KB", "1MB"])
def test_memory_limit(limit):
    module, x = build("cnn")
    truth, _ = whole(module, x)
    for form, pick in FORMS.items():
        got = jactri.empirical_ntk(module, x, compute=form, memory_limit=limit)
        assert_close(got, pick(kernel(truth, truth)), F64, length=truth.shape[2], what=form)


def test_what_is_wrong():
    module, x = build("mlp")
    with pytest.raises(
        ValueError, match="compute must be one of 'full', 'trace', 'diagonal', got 'all'"
    ):
        jactri.empirical_ntk(module, x, compute="all")
    tokens = torch.randn(4, 2, 3, dtype=F64)
    with pytest.raises(RuntimeError, match=r"one shape behind the batch, got \(3,\) and \(2, 3\)"):
        jactri.empirical_ntk(module, x, tokens)
    with pytest.raises(TypeError, match="x of empirical_ntk must be a Tensor"):
        jactri.empirical_ntk(module, [x])


@pytest.mark.parametrize("compute", ["full", "trace", "diagonal"])
def test_batches_that_are_cut_differently_under_a_limit(compute):
    """The entries that both have in common are cut alike: none is skipped."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 6),
    ).double()  # fmt: skip
    many, few = torch.randn(12, 3, 8, 8, dtype=F64), torch.randn(2, 3, 8, 8, dtype=F64)
    for x1, x2 in ((many, few), (few, many)):
        whole = jactri.empirical_ntk(net, x1, x2, compute=compute)
        cut = jactri.empirical_ntk(net, x1, x2, compute=compute, memory_limit="5MB")
        torch.testing.assert_close(cut, whole)
