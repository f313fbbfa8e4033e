"""How far a kernel may be from float64, in one place."""

import torch

WAYS = ("ieee", "tf32", "tf32x3", "bf16x6", "half")

LIMITS = {
    "tf32": 2.0**-9,  # operands cut to 10 mantissa bits: 2^-10 each
    torch.float16: 2.0**-10,  # operands and results rounded to 11 bits
    torch.bfloat16: 2.0**-7,  # to 8 bits
}
"""Relative errors in the Frobenius norm, for each product of a chain."""

FLOOR = 2.0**-22
"""For fp32-grade products: small ones are sometimes exact in torch, and never in parts."""


def distance(got, truth):
    """Relative, in the Frobenius norm."""
    off = torch.linalg.vector_norm(got.double() - truth)
    return (off / torch.linalg.vector_norm(truth).clamp_min(1e-300)).item()


def limit(way, dtype, products, torch_error):
    """fp32-grade: twice what torch's own float32 is off by. The others: their operands' rounding, for each product."""
    if way == "half":
        return LIMITS[dtype] * products
    if way == "tf32":
        return LIMITS[way] * products
    return 2 * torch_error + FLOOR
