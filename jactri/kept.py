"""What is made of weights alone: kept with a weight for as long as it lives, and until it changes.

A copy of the weight tells whether it has changed, also where it was written to behind autograd's back
(``weight.data``, numpy), which no version counter sees.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

MOST_BYTES = 1 << 28
"""Copies of weights are made up to this many bytes; what is kept with them takes about as much."""

T = TypeVar("T")


@dataclass(eq=False)
class _Entry:
    copy: Tensor
    made: dict[Hashable, tuple] = field(default_factory=dict)
    """By key: what was made, its tensors and, of several weights, their entries."""

    def holds(self, weight: Tensor) -> bool:
        c = self.copy
        if c.shape != weight.shape or (c.dtype, c.device) != (weight.dtype, weight.device):
            return False
        return torch.equal(c, weight)


_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def kept(
    weight: Tensor, key: Hashable, make: Callable[[], T], tensors: Callable[[T], tuple[Tensor, ...]]
) -> T:
    """``make()``, or what it returned for an equal ``weight`` and ``key``; ``tensors`` are those that it holds."""
    if torch.is_grad_enabled() or not weight.is_leaf:
        return make()
    entry = _entries.get(weight)
    if entry is None or not entry.holds(weight):
        _entries.pop(weight, None)
        size = weight.numel() * weight.element_size()
        if (
            size + sum(e.copy.numel() * e.copy.element_size() for e in _entries.values())
            > MOST_BYTES
        ):
            return make()
        entry = _entries[weight] = _Entry(weight.detach().clone())
    found = entry.made.get(key)
    if found is None:
        value = make()
        found = entry.made[key] = value, tensors(value)
    return found[0]


def kept_together(
    weights: tuple[Tensor, ...],
    key: Hashable,
    make: Callable[[], T],
    tensors: Callable[[T], tuple[Tensor, ...]],
) -> T:
    """`kept` for what is made of several weights: with the first, while all are equal."""
    if torch.is_grad_enabled() or not all(w.is_leaf for w in weights):
        return make()
    for w in weights:
        kept(w, "seen", tuple, tuple)  # an entry with a copy, where there is room for one
    entries = [_entries.get(w) for w in weights]
    if None in entries:
        return make()
    found = entries[0].made.get(key)
    if found is None or found[2] != entries:
        value = make()
        found = entries[0].made[key] = value, tensors(value), entries
    return found[0]


def kept_tensors() -> list[Tensor]:
    """All that are kept, and the copies of weights."""
    return [
        t
        for e in _entries.values()
        for t in (e.copy, *(t for kept_value in e.made.values() for t in kept_value[1]))
    ]
