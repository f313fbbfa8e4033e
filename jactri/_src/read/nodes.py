"""What determines a node of autograd's graph.

Of nodes that are not torch's own nothing is remembered: two functions may share a name, and one of them may have
several modes.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

_scalars: dict[type, tuple[str, ...]] = {}


def builtin(node) -> bool:
    """Whether a node is an op of torch's own: those have a class each. Python's and extensions' nodes have not."""
    kind = type(node)
    return getattr(torch._C._functions, kind.__name__, None) is kind


def identity(node) -> Hashable | None:
    """What determines a node but for values of tensors and their shapes, or None if that cannot be told."""
    if not builtin(node):
        return None
    kind = type(node)
    names = _scalars.get(kind)
    if names is None:
        saved = [n for n in dir(kind) if n.startswith("_saved_")]
        names = _scalars[kind] = tuple(n for n in saved if not hasattr(kind, "_raw" + n))
    return kind, repr([getattr(node, n) for n in names])
