"""Subclasses of Tensor: func gets the caller's class, the answer has it where torch's has; in between all is plain.

What ``*`` and ``+`` mean for a subclass (a group's product, a step on a manifold) is no business of the engine, which
works on the numbers: derivatives are those of torch's ops. Subclasses that hold other tensors (``__torch_dispatch__``)
have no numbers of their own, and stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _disabled_torch_dispatch_impl as _none
from torch.nn import Parameter

from .remedies import check_differentiable

PLAIN = frozenset((Tensor, Parameter))
"""The classes whose operators are torch's."""


def is_plain(x: Tensor) -> bool:
    """Whether torch's operators are those of a tensor's class, or the tensor is a wrapper of others."""
    kind = x.__class__
    return kind in PLAIN or kind.__torch_dispatch__ is not _none


def plain(x: Any) -> Any:
    """A tensor as one of the plain class, with the same memory and graph; what is no tensor as it is."""
    if x.__class__ in PLAIN:
        return x
    if isinstance(x, Tensor):
        if is_plain(x):
            return x
        with torch._C.DisableTorchFunctionSubclass():
            return Tensor.as_subclass(x, Tensor)
    if isinstance(x, (tuple, list)) and not all(map(_is_number, x)):
        return type(x)(map(plain, x))
    return x


def _is_number(x: Any) -> bool:
    return x.__class__ is int


def fresh_leaf(x: Tensor, create_graph: bool) -> Tensor:
    check_differentiable(x)
    if create_graph and x.requires_grad:
        return x.view_as(x) if x.layout is torch.strided else x.clone()
    if x.is_inference():
        x = x.clone()
    return x.detach().requires_grad_()


def leaf_and_given(x: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
    """An input that requires grad, and what func gets for it: the same, but of the caller's class."""
    if x.__class__ is Tensor:
        leaf = fresh_leaf(x, create_graph)
        return leaf, leaf
    like = fresh_leaf(
        x, create_graph
    )  # by the class itself: attributes are there, and a Parameter is a tensor again
    if is_plain(like):
        return like, like
    leaf = fresh_leaf(plain(x), create_graph)
    return leaf, as_given(leaf, like)


def as_given(x: Tensor, like: Tensor) -> Tensor:
    """A plain tensor in the class, and with the attributes, of another."""
    if is_plain(like):
        return x
    with torch._C.DisableTorchFunctionSubclass():
        x = Tensor.as_subclass(x, like.__class__)
    vars(x).update(vars(like))
    return x


def dressed(answer: Any, ends: Sequence[Tensor]) -> Any:
    """An answer of plain tensors, in tuples, as ``torch.autograd.grad`` between ``ends`` would have given it."""
    if PLAIN.issuperset(map(type, ends)) or all(map(is_plain, ends)):
        return answer

    @functools.wraps(torch.autograd.grad)
    def grad(*ends):
        return answer

    with torch.enable_grad():  # what has a graph keeps it
        return torch.overrides.handle_torch_function(grad, tuple(ends), *ends)
