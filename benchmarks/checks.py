"""Holding a result against float64 before it is timed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .workloads import Workload, truth

# Largest error allowed, relative to the largest entry of the Jacobian. float32 rounds at 6e-8;
# the longest sums here have 784 terms and follow up to six layers.
TOLERANCE = 1e-5


class WrongResult(AssertionError):
    """A result that must not be timed."""


def error_of(workload: Workload, result: Any) -> float:
    """The largest error against float64, relative to the largest entry.

    Raises `WrongResult` for a wrong type, shape, dtype or value.
    """
    want = truth(workload)
    if workload.operator is not None and not hasattr(result, "__array__"):
        result = workload.operator.flat(result)
    if not isinstance(result, Tensor):
        if not hasattr(result, "__array__"):
            raise WrongResult(f"a {type(result).__name__}, not a tensor")
        result = torch.from_numpy(result.__array__().copy())
    shape = tuple(result.shape)
    if workload.samples == 1:  # (1, *out, 1, *in) from a drop-in call has the same entries
        one = (1,)
        if shape == one + workload.out_shape + one + workload.in_shape:
            shape = workload.shape
            result = result.reshape(shape)
    return distance(result, want, torch.float32)


def distance(result: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """`error_of` a tensor against the truth. Raises `WrongResult`."""
    if result.shape != want.shape:
        raise WrongResult(f"shape {tuple(result.shape)}, not {tuple(want.shape)}")
    if result.dtype != dtype:
        raise WrongResult(f"dtype {result.dtype}, not {dtype}")
    result = result.detach().cpu()
    worst = scale = 0.0
    step = max(1, 2**24 * len(want) // want.numel())
    for r, t in zip(result.split(step), want.split(step), strict=True):
        gap = (r - t).abs().max().item()
        if math.isnan(gap):
            raise WrongResult("NaN in the result")
        worst = max(worst, gap)
        scale = max(scale, t.abs().max().item())
    error = worst / scale
    if not error <= TOLERANCE:
        raise WrongResult(f"error {error:.1e} of the largest entry, {TOLERANCE:.0e} allowed")
    return error
