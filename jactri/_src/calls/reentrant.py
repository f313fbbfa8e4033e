"""Jacobians that are taken inside of a backward pass: in an autograd Function's backward, or in a hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def in_backward() -> bool:
    """Whether this thread runs a part of a backward pass."""
    return torch._C._current_graph_task_id() != -1


def aside(call: Callable[[], T]) -> T:
    """The result of a call that calls autograd nodes, from inside of a backward pass.

    A pass that was asked for certain gradients (``autograd.grad``) makes every node that is called meanwhile leave out
    the others. In a pass of its own, which asks for all, nodes answer as ever.
    """
    found: list[T] = []
    anchor = torch.zeros((), device="cpu", requires_grad=True)
    anchor.register_hook(lambda _: found.append(call()))
    anchor.backward()
    return found[0]
