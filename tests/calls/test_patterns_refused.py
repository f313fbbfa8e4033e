"""Patterns and nests that are refused, by name; and what is no fault of a pattern."""

import numpy
import pytest
import scipy.sparse
import torch
from pattern_cases import drawn, point

import jactri


@pytest.mark.parametrize(
    ("pattern", "error", "match"),
    [
        (5, TypeError, "what jactri.sparsity returns, a boolean tensor or array"),
        ("csr", TypeError, "a SciPy matrix, got <class 'str'>"),
        (torch.ones(4, 3), TypeError, "must be boolean, got a tensor of torch.float32.*J != 0"),
        (numpy.ones((4, 3)), TypeError, "must be boolean, got an array of float64"),
        (torch.ones(3, 4).bool(), RuntimeError, r"shape \(3, 4\); expected \(4, 3\).* pass pattern.T"),
        (torch.ones(2, 6).bool(), RuntimeError, r"pass pattern.reshape\(4, 3\)"),
        (torch.ones(4, 4).bool(), RuntimeError, "jactri.sparsity.func, inputs. finds one"),
        (scipy.sparse.eye_array(3), RuntimeError, r"shape \(3, 3\); expected \(4, 3\)"),
        (torch.ones(4, 3, 2).to_sparse(2), TypeError, "1 dense axes"),
        ((torch.ones(4, 3).bool(),), TypeError, "got <class 'tuple'>"),
    ],
)  # fmt: skip
def test_patterns_that_are_none(pattern, error, match):
    func, _ = drawn(4, 3)
    with pytest.raises(error, match=match):
        jactri.jacobian(func, point(3), pattern=pattern)
    x = point(3).requires_grad_()
    with pytest.raises(error, match=match):
        jactri.jacobian_of(func(x), x, pattern=pattern)


def test_a_pattern_of_another_call():
    """What the message names to find one is not what was just refused."""
    x = point(4, 3)
    with pytest.raises(
        RuntimeError, match=r"jactri\.sparsity\(func, inputs, per_sample=True\) finds"
    ):
        jactri.jacobian(torch.sin, x, per_sample=True, pattern=jactri.sparsity(torch.sin, x))
    found = jactri.sparsity(torch.sin, x, per_sample=True)
    want = torch.diag_embed(x.cos())
    assert torch.equal(jactri.jacobian(torch.sin, x, per_sample=True, pattern=found), want)
    with pytest.raises(RuntimeError, match=r"jactri\.sparsity\(func, inputs\) finds one"):
        jactri.jacobian(torch.sin, x, pattern=found)

    def energy(v):
        return v.sin().sum()

    of_gradient = jactri.sparsity(energy, x[0])
    for given, nested in ((x[0], of_gradient), ((x[0],), ((of_gradient,),))):
        with pytest.raises(RuntimeError, match=r"\(3, 3\), the Hessian's; leave pattern.* out"):
            jactri.hessian(energy, given, pattern=nested)


def test_nests_that_are_none():
    mask = torch.eye(3).bool()

    def two(a, b):
        return (a + b, a * b)

    xs = point(3), point(3)
    cases = [
        (mask, TypeError, "pattern must be a tuple of 2, one for each output, as the result is, got a tensor"),
        (((mask, mask),), RuntimeError, "one for each of 2 outputs, got 1"),
        (((mask, mask), mask), TypeError, r"pattern\[1\] must be a tuple of 2, one for each input"),
        (((mask, mask), (mask, None)), TypeError, r"pattern\[1\]\[1\] must be what"),
    ]  # fmt: skip
    for given, error, match in cases:
        with pytest.raises(error, match=match):
            jactri.jacobian(two, xs, pattern=given)


def test_where_a_pattern_is_refused():
    mask, x = torch.eye(3).bool(), point(3)
    with pytest.raises(ValueError, match="check=True tests a pattern; pass pattern="):
        jactri.jacobian(torch.sin, x, check=True)
    with pytest.raises(RuntimeError, match=r"complex128; pass torch\.view_as_real"):
        jactri.jacobian(lambda x: x * 2, x.to(torch.complex128), pattern=mask)
    with pytest.raises(RuntimeError, match="pattern is not available inside"):
        torch.func.vmap(lambda v: jactri.jacobian(torch.sin, v, pattern=mask))(point(2, 3))
    with pytest.raises(TypeError, match="compile of hessian takes no 'pattern'"):
        jactri.compile(lambda v: v.sin().sum(), x, of=jactri.hessian, pattern=mask)


def test_a_function_that_does_not_compute_the_same_twice():
    """What differs without a missing entry is not blamed on the pattern."""

    class Noisy(torch.autograd.Function):
        count = 0

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            Noisy.count += 1
            return g * Noisy.count

    with pytest.raises(ValueError, match="though no entry that is not zero is missing"):
        jactri.jacobian(
            lambda x: Noisy.apply(x), point(3), pattern=torch.eye(3).bool(), check=True,
            strategy="reverse-mode",
        )  # fmt: skip
