"""Every differentiable op of PyTorch's own database, in every strategy, against rows of autograd.

Four samples an op; where jactri and autograd are not equal, opinfo_reasons.py says why.
"""

import pytest
import torch
from common import torch_before
from opinfo import F64, OPS, functions, gradients, hessians, some_rows
from opinfo_reasons import JACOBIAN, SECOND, Reason
from tolerances import assert_close

import jactri

pytestmark = [
    pytest.mark.usefixtures("one_thread", "_warned_only"),
    pytest.mark.filterwarnings(
        "ignore:.* does not have a deterministic implementation:UserWarning"
    ),
    # torch's own samples of linalg.pinv.singular are made by it
    pytest.mark.filterwarnings("ignore:torch.qr is deprecated:UserWarning"),
]

MODES = ("auto", "forward-mode", "reverse-mode")
TWICE = [name for name, op in OPS.items() if op.supports_gradgrad]
NONE = Reason("")


@pytest.fixture
def _warned_only():
    """Memory is poisoned in deterministic mode, in which torch refuses a few ops."""
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.mark.parametrize("name", OPS)
def test_jacobian(name):
    needed = Needed(name, JACOBIAN)
    found = functions(OPS[name])
    assert found, "no sample has a derivative"
    for k, func in found.items():
        rows = some_rows(func)
        for mode in MODES:
            J = jactri.jacobian(func, func.inputs, strategy=mode)
            for j, at, truths in rows:
                for i, (x, truth) in enumerate(zip(func.inputs, truths, strict=True)):
                    block = J[j][i]
                    whole = block.shape[: block.dim() - x.dim()]
                    assert block.shape == (*whole, *x.shape)
                    block = block.reshape(whole.numel(), *x.shape)[at]
                    needed.compare(
                        block, truth, f"sample {k}, {mode}, J[{j}][{i}]", func, (j, i, at)
                    )
    needed.check()


@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives(name):
    """Of a weighted sum of the outputs: func.hessian, laplacian, and the gradient of a Jacobian."""
    needed = Needed(name, SECOND)
    if needed.reason.refused:
        with pytest.raises((RuntimeError, UserWarning), match=needed.reason.refused):
            check_second_derivatives(name, needed)
        return
    check_second_derivatives(name, needed)
    needed.check()


def check_second_derivatives(name, needed):
    for k, func in functions(OPS[name], most=2, entries=2500).items():
        if func.most is not None or any(x.dtype != F64 for x in func.inputs):
            continue
        outputs, leaves = func.run()
        generator = torch.Generator().manual_seed(3)
        weights = [torch.randn(y.shape, generator=generator, dtype=F64) for y in outputs]

        def scalar(*xs, func=func, weights=weights):
            return sum((w * y).sum() for w, y in zip(weights, func(*xs), strict=True))

        truth = hessians(scalar(*leaves), leaves)
        size = scale_of(truth)
        many = range(len(leaves))
        H = jactri.func.hessian(scalar, argnums=tuple(many))(*func.inputs)
        for i in many:
            for j in many:
                ours = H[i][j].reshape(truth[i][j].shape)
                needed.compare(ours, truth[i][j], f"sample {k}, hessian[{i}][{j}]", scale=size)

        def at_point(p, scalar=scalar, leaves=leaves):
            parts = p[0].split([x.numel() for x in leaves])
            return scalar(*(v.reshape(x.shape) for v, x in zip(parts, leaves, strict=True)))[None]

        point = torch.cat([x.reshape(-1) for x in func.inputs])[None]
        trace = sum(truth[i][i].reshape(x.numel(), x.numel()).trace() for i, x in enumerate(leaves))

        needed.compare(
            jactri.laplacian(at_point, point)[0], trace, f"sample {k}, laplacian", scale=size
        )
        J = jactri.jacobian(scalar, leaves, create_graph=True)
        for i, block in enumerate(J):
            w = torch.randn(block.shape, generator=generator, dtype=F64)
            ours = gradients((w * block).sum(), leaves, retain_graph=True)
            for j in many:
                true = torch.tensordot(w.reshape(-1), truth[i][j], 1)
                needed.compare(ours[j], true, f"sample {k}, gradient of J[{i}] in {j}", scale=size)


def scale_of(truth):
    """Second derivatives of samples of order 1 may cancel: none is measured beside less."""
    return max(
        [
            1.0,
            *(
                t[t.isfinite()].abs().max().item()
                for row in truth
                for t in row
                if t.isfinite().any()
            ),
        ]
    )


class Needed:
    """Compares with autograd, by an op's reason where it has one, and fails if no comparison needed it."""

    def __init__(self, name, reasons):
        self.reason = reasons.get(name, NONE)
        self.used = False

    def compare(self, ours, truth, what, func=None, place=None, scale=None):
        narrow = max(ours.dtype, truth.dtype, key=lambda d: torch.finfo(d).eps)
        options = {
            "factor": 16,
            "what": what,
            "scale": scale,
            "length": max(truth.shape, default=1),
        }
        try:
            assert_close(ours, truth, narrow, **options)
            return
        except AssertionError:
            if self.reason is NONE:
                raise
        self.used = True
        if self.reason.spreads:
            truth = torch.where(truth.isnan(), ours, truth)
        if self.reason.keeps:
            ours = torch.where(ours.isfinite(), ours, truth)
        if self.reason.cancels:
            options["scale"] = self.reason.cancels
        if self.reason.differences:
            j, i, at = place
            slopes = jactri.finite_difference(func, func.inputs)[j][i]
            truth = slopes.reshape(-1, *truth.shape[1:])[at]
            torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6)
            return
        assert_close(ours, truth, narrow, **options)

    def check(self):
        due = self.reason is not NONE and (not self.reason.until or torch_before(self.reason.until))
        assert self.used or not due, f"this is no longer so: {self.reason.why}"


@pytest.mark.skipif(torch_before((2, 13)), reason="the reasons are those of torch 2.13")
def test_reasons_are_of_ops_that_exist():
    reasons = {**JACOBIAN, **SECOND}
    assert not {name for name, r in reasons.items() if not torch_before(r.since)} - OPS.keys()
