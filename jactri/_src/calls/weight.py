"""The weight of a weighted Laplacian tr(A H): the directions along which second derivatives are summed."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..base.classes import plain
from ..base.tracing import tracing
from . import points


def check(weight, x: Tensor) -> Tensor:
    """The symmetric part of ``weight``, ``(n, n)`` or ``(N, n, n)``. Raises for a shape or dtype that does not fit."""
    size = points.inner(x)
    n = prod(size)
    want = [(*size, *size)]
    if points.batched(x):
        want.append((x.shape[0], *size, *size))
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor of shape {want[0]}, got {type(weight)}")
    if tuple(weight.shape) not in want:
        allowed = " or ".join(map(str, want))
        raise ValueError(
            f"weight must have shape {allowed} for x of shape {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if weight.dtype != x.dtype or weight.device != x.device:
        raise RuntimeError(
            f"weight must have the dtype and device of x, {x.dtype} on {x.device}, got {weight.dtype} on "
            f"{weight.device}"
        )
    weight = plain(weight)
    a = weight.reshape(*weight.shape[: weight.dim() - 2 * len(size)], n, n)
    return (a + a.mT) * 0.5


def directions(a: Tensor, x: Tensor, create_graph: bool) -> tuple[Tensor, int]:
    """``(r, 1 or N, *in)`` and p: ``tr(A H)`` is the sum of the second derivatives along the first p less the others.

    ``A = Q diag(l) Q'`` gives the columns of Q times ``sqrt |l|``, without those that are zero for all samples. Where A
    itself is differentiated, eigenvectors would not do (they are not unique where eigenvalues are alike), nor in a
    trace (how many are zero is a value); then
    ``a'Hb = ((a + b)'H(a + b) - (a - b)'H(a - b)) / 4`` with the columns of A and of the identity, scaled alike.
    """
    size = points.inner(x)
    batch = a.dim() == 3
    n = a.shape[-1]
    if tracing() or (create_graph and a.requires_grad):
        eye = torch.eye(n, dtype=a.dtype, device=a.device)
        scale = a.detach().abs().amax((-2, -1), keepdim=True)
        scale = torch.where(scale > 0, scale, 1).sqrt()
        rows = [(eye * scale + a / scale) / 2, (eye * scale - a / scale) / 2]
        plus = n
    else:
        # in double precision: a small eigenvalue of a low rank must come out as zero
        values, q = torch.linalg.eigh(a.detach().double())
        tiny = values.abs().amax(-1, keepdim=True) * n * torch.finfo(a.dtype).eps
        values = torch.where(values.abs() <= tiny, 0, values)
        rows = []
        for part in (values.clamp(min=0), (-values).clamp(min=0)):
            found = (part > 0).any(0) if batch else part > 0
            first = found.to(torch.int8).argsort(descending=True, stable=True)[: int(found.sum())]
            scaled = (q * part.sqrt().unsqueeze(-2)).mT  # rows are the directions
            rows.append(scaled.index_select(-2, first).to(a.dtype))
        plus = rows[0].shape[-2]
    block = torch.cat(rows, -2)
    block = block.transpose(0, 1) if batch else block.unsqueeze(1)
    count = block.shape[0]
    if not points.batched(x):
        return block.reshape(count, *size), plus
    return block.reshape(count, block.shape[1], *size), plus
