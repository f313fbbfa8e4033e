"""The parts that tiles of a block are split into for tensor cores."""

import pytest
import torch
import triton
import triton.language as tl

from jactri.kernels.operands import three


@triton.jit
def _split(X, OUT, n, TILE: tl.constexpr):
    at = tl.arange(0, TILE)
    parts = three(tl.load(X + at, mask=at < n, other=0.0))
    for p in tl.static_range(3):
        tl.store(OUT + p * n + at, parts[p], mask=at < n)


def _parts(x):
    out = torch.empty(3, x.numel(), dtype=torch.bfloat16, device=x.device)
    _split[(1,)](x, out, x.numel(), triton.next_power_of_2(x.numel()))
    return out


FINITE = {
    "normal": lambda: torch.randn(4096),
    "of any size": lambda: torch.randn(4096) * 2.0 ** torch.randint(-100, 120, (4096,)),
    "subnormal": lambda: torch.randn(4096) * 2.0**-130,
    "next to the largest": lambda: torch.tensor([torch.finfo(torch.float32).max, -3.4e38, 3.3961e38]),
    "powers and their neighbours": lambda: torch.cat(
        [torch.nextafter(2.0 ** torch.arange(-40, 40), torch.tensor(to)) for to in (0.0, 1e38)]
    ),
    "zeros": lambda: torch.tensor([0.0, -0.0]),
}  # fmt: skip


@pytest.mark.parametrize("kind", FINITE)
def test_they_add_up_exactly(kind, device):
    torch.manual_seed(0)
    x = FINITE[kind]().to(device)
    parts = _parts(x)
    off = parts.double().sum(0) - x.double()
    assert off.abs().max() <= (2.0**-134 if kind == "subnormal" else 0)
    # each is smaller than the one before by the bits that a bfloat16 has
    a = parts.double().abs()
    tiny = torch.finfo(torch.float32).tiny
    assert (a[1] <= a[0] * 2.0**-7 + tiny).all() and (a[2] <= a[0] * 2.0**-15 + tiny).all()


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF])
def test_infinity_and_every_nan_leave_a_nan(bits, device):
    value = bits - (1 << 32) if bits >= 1 << 31 else bits
    x = torch.tensor([value], dtype=torch.int32, device=device).view(torch.float32)
    assert _parts(x).isnan().any()
