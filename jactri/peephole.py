"""Recorded ops of a forward pass, exchanged for ones that do the same faster on a CPU."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from . import backends
from .tape import tensors

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.addmm.default: 1, _ATEN.mm.default: 0}
"""Products, and where their factors start among the arguments."""

_ACTIVATIONS = {_ATEN.tanh.default: "tanh", _ATEN.sigmoid.default: "sigmoid"}
"""What oneDNN computes on a product's result before it is written. Its ReLU makes 0 of NaN."""

_ACTIVATION = 64
"""Multiply-adds in whose time an activation of one entry is computed by itself; oneDNN's takes a third."""


def fused(lines: list[tuple], results: list[Tensor]) -> list[tuple]:
    """Lines whose large products are oneDNN's, where it is the faster one here; activations go with them."""
    if any(torch.Tag.inplace_view in op.tags for op, *_ in lines):
        return lines  # what a tensor looked like is not known from how it looks at the end
    uses = Counter(id(t) for _, args, kwargs, _ in lines for t in tensors([args, kwargs]))
    uses.update(id(t) for t in results)
    after = {
        id(args[0]): i
        for i, (op, args, *_) in enumerate(lines)
        if op in _ACTIVATIONS and uses[id(args[0])] == 1
    }
    gone: set[int] = set()
    made = []
    for i, line in enumerate(lines):
        if i in gone:
            continue
        op, args, kwargs, out = line
        first = _PRODUCTS.get(op)
        if first is None or kwargs or len(args) != first + 2:
            made.append(line)
            continue
        bias, (a, b) = args[0] if first else None, args[first:]
        j = after.get(id(out))
        work = a.numel() * out.shape[1] + (0 if j is None else _ACTIVATION * out.numel())
        fits = _bias(bias, out) and a.is_contiguous() and a.numel() > 0
        if not (fits and backends.onednn_for(a, work)):
            made.append(line)
            continue
        how = "none"
        if j is not None:
            gone.add(j)
            how, out = _ACTIVATIONS[lines[j][0]], lines[j][3]
        weight = b.t()
        made.append((_ATEN.t.default, (b,), {}, weight))
        made.append(backends.onednn_line(a, weight, bias, how, out))
    return made


def _bias(bias: Tensor | None, out: Tensor) -> bool:
    """Whether oneDNN can add it; it takes no notice of strides."""
    return bias is None or (bias.shape == out.shape[1:] and bias.is_contiguous())
