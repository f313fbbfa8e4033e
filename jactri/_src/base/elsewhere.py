"""Weights whose numbers are not here: memory that was given back after the forward pass, and distributed tensors.

FSDP frees the weights of a layer when it has run, and hooks bring them back when a backward pass of the engine reaches
it. Whoever reads them in between reads no memory at all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _has_storage
from torch.autograd.function import BackwardCFunction

from .recomputed import Recomputed

_ACCUMULATE = torch._C._functions.AccumulateGrad

FSDP = (
    "for FSDP, pass reshard_after_forward=False to every fully_shard (and if a backward pass comes first, call the "
    "module's set_reshard_after_backward(False))"
)


WRAPPED = "for FullyShardedDataParallel, use fully_shard instead"

DISTRIBUTED = "distributed tensors (DTensor)"


def check_here(t: Tensor, what: str = "a weight") -> None:
    """Raise for a tensor whose memory is gone; of a DTensor, this process's part."""
    if t.__class__ is not Tensor and is_distributed(t):
        t = t._local_tensor  # type: ignore[attr-defined]
    if _has_storage(t) and not t.untyped_storage().nbytes() and t.numel():
        raise RuntimeError(
            f"{what} of shape {tuple(t.shape)} was freed after the forward pass (its storage is empty), so nothing can "
            f"be computed from it; keep it until the call has ended: {FSDP}"
        )


MISFIT = (
    "scaled_dot_product_attention was called with a value of shape {} for a key of shape {}: axis 2 differs. Torch's "
    "kernel does not look, and its backward writes to other memory; pass a value for each key"
)


def check_keys(key: Tensor, value: Tensor) -> None:
    """Raise for an attention that has not one value for each key."""
    if key.shape[2:3] != value.shape[2:3]:
        raise RuntimeError(MISFIT.format(tuple(value.shape), tuple(key.shape)))


_names: dict[type, tuple[str, ...]] = {}
"""By the class of a node: its saved values that may be tensors."""


def check_saved(node, saved: Callable[[str], Any] | None = None) -> None:
    """Raise for a node that saved what is gone by now; ``saved`` reads what it saved, by name."""
    if saved is None:

        def saved(name: str) -> Any:
            return getattr(node, "_saved_" + name)

    kind = node.__class__
    if issubclass(kind, BackwardCFunction):
        check_value(node.saved_tensors)
        return
    names = _names.get(kind)
    if names is None:
        known = [n.removeprefix("_saved_") for n in dir(kind) if n.startswith("_saved_")]
        names = _names[kind] = tuple([n for n in known if _may_be_tensors(saved(n))])
    for name in names:
        check_value(saved(name))


def check_graph(ys: Iterable[Tensor]) -> None:
    """Raise where a graph holds what is gone, or does not fit: for autograd's engine, whose kernels do not ask."""
    stack = [y.grad_fn for y in ys if y.grad_fn is not None]
    seen, recomputed = set(stack), Recomputed()
    while stack:
        node = stack.pop()
        edges = node.next_functions
        if any(p is None for p, _ in edges):
            recomputed.read(check_saved, node)
        if node.__class__.__name__.startswith("ScaledDotProduct"):
            recomputed.read(_check_attention, node)
        for p, _ in edges:
            if p.__class__ is _ACCUMULATE:
                check_here(p.variable)
            elif p is not None and p not in seen:
                seen.add(p)
                stack.append(p)


def _check_attention(node) -> None:
    check_keys(node._saved_key, node._saved_value)


def _may_be_tensors(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return not value or isinstance(value[0], Tensor) or value[0] is None
    return value is None or isinstance(value, Tensor)


def check_value(value: Any) -> None:
    """Raise for a saved value whose memory is gone."""
    if isinstance(value, Tensor):
        check_here(value, "a tensor")
    elif isinstance(value, (tuple, list)):
        for v in value:
            check_value(v)


def is_distributed(t: Tensor) -> bool:
    """Whether a tensor is a DTensor, a part of whose numbers each process has."""
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and isinstance(t, known.DTensor)


def check_local(ys: Sequence[Tensor], xs: Sequence[Tensor]) -> None:
    """Raise for an end of a Jacobian that is distributed: its rows and columns would be, too."""
    for name, ends in (("outputs", ys), ("inputs", xs)):
        for i, t in enumerate(ends):
            if is_distributed(t):
                raise RuntimeError(
                    f"{name}[{i}] of shape {tuple(t.shape)} is a DTensor, so a process has a part of its numbers only; "
                    "make it a plain tensor by full_tensor() or to_local()"
                )
