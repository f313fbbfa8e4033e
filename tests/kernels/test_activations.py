"""Derivatives of activations in kernels against float64 autograd, and at kinks exactly as autograd has them."""

import pytest
import torch
from torch.nn import functional as F

from jactri._src.rules import REGISTRY
from jactri.kernels.activations import DERIVATIVES
from jactri.kernels.elementwise import scaled_sum
from jactri.kernels.support import Factor

OPS = {
    # derivative: (op, constants) for each way to have it
    "relu": [(F.relu, ())],
    "leaky_relu": [(F.leaky_relu, (0.01,)), (lambda x: F.leaky_relu(x, 0.3), (0.3,))],
    "elu": [
        (F.elu, (1.0, 1.0, 1.0)),
        (F.selu, (1.6732632423543772, 1.0507009873554805, 1.0)),
        (lambda x: F.celu(x, 0.4), (0.4, 1.0, 2.5)),
    ],
    "elu_result": [(lambda x: F.elu(x, 0.7), (0.7, 1.0, 1.0))],
    "gelu": [(F.gelu, ())],
    "gelu_tanh": [(lambda x: F.gelu(x, approximate="tanh"), ())],
    "silu": [(F.silu, ())],
    "mish": [(F.mish, ())],
    "sigmoid": [(torch.sigmoid, ())],
    "tanh": [(torch.tanh, ())],
    "softplus": [(F.softplus, (1.0, 20.0)), (lambda x: F.softplus(x, 3.0, 5.0), (3.0, 5.0))],
    "hardtanh": [(F.hardtanh, (-1.0, 1.0)), (F.relu6, (0.0, 6.0))],
    "hardswish": [(F.hardswish, ())],
    "hardsigmoid": [(F.hardsigmoid, ())],
    "softsign": [(F.softsign, ())],
    "logsigmoid": [(F.logsigmoid, ())],
    "sin": [(torch.sin, ())],
    "exp": [(torch.exp, ())],
}
CASES = [(name, op, constants) for name, ways in OPS.items() for op, constants in ways]

KINKS = [0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, float("nan")]
FAR = [float("inf"), -float("inf"), 88.0, -88.0, 1e4, -1e4, 20.0, -20.0, 1e-30, -1e-30]
BLOWS_UP = {"exp", "sin", "elu_result"}
"""Infinite, or without a meaning, at infinity; or saved as a value that no input gives."""


def test_every_derivative_has_a_case():
    assert set(OPS) | {"ready"} == set(DERIVATIVES)


def test_records_of_ops_name_derivatives():
    """With as many constants as these take; of those with a curvature, kernels have the second derivative too."""
    named = set()
    for record in REGISTRY.values():
        for approximate in ("none", "tanh") if record.form else ():
            form = record.form({"approximate": approximate}.get)
            if form.kernel:
                found = DERIVATIVES[form.kernel]
                named.add(form.kernel)
                assert len(form.constants(lambda name: 0.5)) == len(found.constants)
                assert found.second is not None or form.slopes is None
    assert named == set(DERIVATIVES) - {"ready", "softsign"}


def kernel(name, constants, saved):
    ones = torch.ones(1, *saved.shape, device=saved.device)
    return scaled_sum([(ones, Factor(saved, name, constants))], ones.shape)[0]


def truth(op, x):
    x = x.double().requires_grad_()
    y = op(x)
    (d,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), d


@pytest.mark.parametrize("name, op, constants", CASES)
def test_against_float64(name, op, constants, device):
    x = torch.linspace(-12, 12, 4001, device=device)
    y, d = truth(op, x)
    saved = x if DERIVATIVES[name].of == "x" else y.float()
    got = kernel(name, constants, saved)
    # derivatives from the rounded result are off by its rounding; e^12 has larger entries than 1
    scale = d.abs().clamp_min(1)
    assert ((got - d).abs() / scale).max() < 1e-6


@pytest.mark.parametrize("name, op, constants", CASES)
def test_autograds_choice_at_kinks(name, op, constants, device):
    x = torch.tensor(KINKS, device=device, requires_grad=True)
    y = op(x)
    (want,) = torch.autograd.grad(y.sum(), x)
    got = kernel(name, constants, (x if DERIVATIVES[name].of == "x" else y).detach())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name, op, constants", [c for c in CASES if c[0] not in BLOWS_UP])
def test_far_out(name, op, constants, device):
    x = torch.tensor(FAR, device=device)
    y, d = truth(op, x)
    got = kernel(name, constants, x if DERIVATIVES[name].of == "x" else y.float())
    known = ~d.isnan()  # 0 * inf in autograd's formula: nothing to agree with
    torch.testing.assert_close(got[known], d[known].float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saved_values_of_half_are_read_exactly(dtype, device):
    y = torch.linspace(-0.9, 0.9, 33, device=device).to(dtype)
    assert torch.equal(kernel("tanh", (), y), 1 - y.float() * y.float())
