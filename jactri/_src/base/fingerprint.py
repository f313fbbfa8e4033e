"""Short texts that tell tensors, models and what they are called with apart: the same on every machine and device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .classes import PLAIN, plain

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART = 1 << 20
_ENTRIES = 64


def of_value(value: Any) -> str:
    """Of tensors bit by bit, and of all else as it is printed, in tuples, lists and mappings."""
    found = hashlib.sha256()
    _add(found, value)
    return found.hexdigest()[:16]


def _add(found, value: Any) -> None:
    if isinstance(value, Tensor):
        value = plain(value.detach())
        found.update(repr((tuple(value.shape), value.dtype)).encode())
        flat = value.cpu().contiguous().view(-1)
        found.update(flat.view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            found.update(f"{key}:".encode())
            _add(found, value[key])
    elif isinstance(value, (tuple, list)):
        found.update(f"{len(value)}(".encode())
        for part in value:
            _add(found, part)
    else:
        found.update(f"{value!r};".encode())


def of_module(module: torch.nn.Module) -> str:
    """Of the classes of a module and of those in it, and its state: names, shapes, dtypes, and of each tensor the sum
    of its bits and some entries.

    Costs one pass over the weights, where they are.
    """
    found = hashlib.sha256()
    for name, part in module.named_modules():
        found.update(f"{name}:{type(part).__name__};".encode())
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            found.update(repr((name, value)).encode())
            continue
        found.update(repr((name, *_told(value))).encode())
    return found.hexdigest()[:32]


def state_of(model: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    """What tells at no cost that a model may be another: its modules, and which tensors it has, where, how often
    written to."""
    found: dict[str, tuple[Any, ...]] = {n: (type(m),) for n, m in model.named_modules()}
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        where = t.data_ptr() if t.__class__ in PLAIN and not t.is_meta else None
        found[name] = id(t), where, t.dtype, 0 if t.is_inference() else t._version
    return found


def of_weights(weights: Iterable[Tensor]) -> str:
    """Of weights in their order: shapes, dtypes, and of each the sum of its bits and some entries.

    Costs one pass over them, where they are.
    """
    found = hashlib.sha256()
    for value in weights:
        found.update(repr(_told(value)).encode())
    return found.hexdigest()[:32]


def _told(value: Tensor) -> tuple[Any, ...]:
    value = plain(value.detach())
    told = tuple(value.shape), str(value.dtype)
    if value.__class__ in PLAIN and value.layout is torch.strided and not value.is_meta:
        return (*told, *_bits(value))
    return told


def _bits(x: Tensor) -> tuple[int, list[int]]:
    x = torch.view_as_real(x) if x.is_complex() else x
    words = x.contiguous().view(-1).view(_WORDS[x.element_size()])
    total = sum(int(part.sum(dtype=torch.int64)) for part in words.split(_PART))
    at = torch.arange(min(_ENTRIES, len(words)), device=x.device) * max(1, len(words) // _ENTRIES)
    return total % (1 << 64), words[at].tolist()
