"""The guards and the honest interpreter catch what they are there for: planted bugs."""

import pytest
import torch
import triton
import triton.language as tl
from guard import Canvas, guarded, packed

from jactri.kernels import support

interpreter_only = pytest.mark.skipif(
    not support.interpreted(), reason="out-of-bounds accesses are for the interpreter only"
)


@triton.jit
def _copy(X, Y, n, BUG: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    if BUG == "reads beside":
        x = tl.load(X + i + 1, mask=i < n, other=0.0)
    elif BUG == "other= is missing":
        x = tl.load(X + i, mask=i < n - 3)
    else:
        x = tl.load(X + i, mask=i < n, other=0.0)
    if BUG == "writes beside":
        tl.store(Y + i, x)
    elif BUG == "leaves one out":
        tl.store(Y + i, x, mask=i < n - 1)
    else:
        tl.store(Y + i, x, mask=i < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "bug",
    [
        None,
        pytest.param("reads beside", marks=interpreter_only),
        pytest.param("other= is missing", marks=interpreter_only),
        pytest.param("writes beside", marks=interpreter_only),
        "leaves one out",
    ],
)
def test_planted_bugs_are_caught(bug, dtype, device):
    if bug == "other= is missing" and dtype is torch.bfloat16:
        return  # bit patterns in the interpreter: a NaN cannot be put there
    x, y = guarded(torch.randn(100, device=device).to(dtype)), Canvas((100,), dtype, device)
    _copy[(2,)](x, y.view, 100, bug or "", 64)
    if bug is None:
        y.check()
        return
    with pytest.raises(AssertionError, match=r"guard zone|not written"):
        y.check()


def test_guarded_copies_keep_values_and_order(device):
    t = torch.randn(3, 1, 5, device=device).expand(3, 4, 5)
    for order in (None, (2, 0, 1)):
        for gap in (1, 2):
            g = guarded(t, order, gap)
            assert torch.equal(g, t) and g.stride(1) == 0
    assert packed((2, 3, 4), (2, 0, 1)) == (3, 1, 6)


@triton.jit
def _product(A, B, C, HOW: tl.constexpr, n: tl.constexpr):
    i = tl.arange(0, n)
    at = i[:, None] * n + i[None, :]
    a, b = tl.load(A + at), tl.load(B + at)
    if HOW == "bf16":
        c = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), input_precision="ieee")
    else:
        c = tl.dot(a, b, input_precision=HOW)
    tl.store(C + at, c)


@pytest.mark.parametrize(
    "how, least, most", [("ieee", 0, 1e-6), ("tf32", 1e-4, 2e-3), ("bf16", 1e-3, 1e-2)]
)
def test_dots_round_as_tensor_cores_do(how, least, most, device):
    a, b = torch.randn(2, 64, 64, device=device)
    c = torch.empty(64, 64, device=device)
    _product[(1,)](a, b, c, how, 64)
    truth = a.double() @ b.double()
    assert least <= ((c - truth).norm() / truth.norm()).item() <= most


@triton.jit
def _cast(X, Y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(Y + i, tl.load(X + i).to(tl.bfloat16).to(tl.float32))


def test_bfloat16_rounds_to_nearest_even(device):
    x = torch.randn(1024, device=device)
    x[:8] = torch.tensor(
        [0.0, -0.0, float("inf"), -float("inf"), 1 + 2**-8, 1 + 3 * 2**-8, 1e38, 1e-40]
    )
    y = torch.empty_like(x)
    _cast[(1,)](x, y, 1024)
    assert torch.equal(y, x.bfloat16().float())
