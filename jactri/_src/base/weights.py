"""What is made of weights alone: on a CPU it is kept with a weight for as long as it lives, and until it changes.

A copy of the weight tells whether it has changed, also where it was written to behind autograd's back, which no
version counter sees: by ``weight.data``, numpy or DLPack, by an optimizer with ``fused=True`` (seen with torch 2.13),
by a replay of a CUDA graph, by collectives, by FSDP.

Comparing on a GPU would wait for it, and of what it costs to make anew there a version could save little. So there
nothing outlives the call that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import backends

MOST_BYTES = 1 << 28
"""Copies of weights are made up to this many bytes; what is kept with them takes about as much."""

T = TypeVar("T")


@dataclass
class _Entry:
    copy: Tensor
    made: dict[Hashable, tuple[object, tuple[Tensor, ...], tuple[Tensor, ...]]] = field(
        default_factory=dict
    )
    """What was made, the tensors that it holds, and copies of what else it was made of."""

    def holds(self, weight: Tensor) -> bool:
        return _same(self.copy, weight)


_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Leaf -> view of it (shape, strides, offset; None for itself) -> entry."""


def _all() -> list[_Entry]:
    return [e for views in _entries.values() for e in views.values()]


def made_of(
    weight: Tensor,
    key: Hashable,
    make: Callable[[], T],
    tensors: Callable[[T], tuple[Tensor, ...]],
    given: tuple[Tensor, ...] = (),
) -> T:
    """``make()``, or what it returned for an equal ``weight``, ``key`` and other tensors ``given``.

    ``tensors`` are those that it holds. A weight that is a view is kept with the leaf that it is a view of. Nothing is
    kept of weights that do not lie on the CPU.
    """
    leaf, view = weight, None
    if not weight.is_leaf and weight._base is not None:
        leaf, view = weight._base, (weight.shape, weight.stride(), weight.storage_offset())
    cpu = leaf.device.type == "cpu"
    if torch.is_grad_enabled() or not (cpu and leaf.is_leaf) or backends.capturing(leaf.device):
        return make()
    entry = _entries.get(leaf, {}).get(view)
    if entry is None or not entry.holds(weight):
        _entries.get(leaf, {}).pop(view, None)
        size = weight.numel() * weight.element_size()
        if size + sum(e.copy.numel() * e.copy.element_size() for e in _all()) > MOST_BYTES:
            return make()
        entry = _Entry(weight.detach().clone())
        _entries.setdefault(leaf, {})[view] = entry
    found = entry.made.get(key)
    if found is None or not all(map(_same, found[2], given)):
        value = make()
        found = entry.made[key] = value, tensors(value), tuple(g.detach().clone() for g in given)
    return found[0]


def _same(copy: Tensor, t: Tensor) -> bool:
    return (copy.shape, copy.dtype, copy.device) == (t.shape, t.dtype, t.device) and torch.equal(
        copy, t
    )
