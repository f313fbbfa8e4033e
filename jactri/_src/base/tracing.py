"""While a call is traced: the ops on its tensors are written down, for other values than those at hand.

So nothing may be decided by a value that could be another one, and no tensor of the trace may be kept for later calls.
What follows from structure alone is found `aside`, outside of the trace.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch.utils._python_dispatch import _disable_current_modes, _len_torch_dispatch_stack

_PROXY, _FAKE = _TorchDispatchModeKey.PROXY, _TorchDispatchModeKey.FAKE

_moving: ContextVar[dict[int, tuple[Tensor, Tensor | None]] | None] = ContextVar(
    "moving", default=None
)
_making: ContextVar[bool] = ContextVar("making", default=False)


@contextlib.contextmanager
def of_others(tensors):
    """A context in which these real tensors, too, stand for others in a trace: weights, which change.

    It gives what it keeps: by id, each of them and its .grad.
    """
    found: dict[int, tuple[Tensor, Tensor | None]] = {}
    token = _moving.set(found)
    stands_for_others(tensors)
    try:
        yield found
    finally:
        _moving.reset(token)


def stands_for_others(tensors) -> None:
    """The same of these, found in the course of it: whatever func holds may be written to in place."""
    found = _moving.get()
    if found is not None:
        for t in tensors:
            if id(t) not in found:
                found[id(t)] = t, t.grad if t.is_leaf else None


def tracing() -> bool:
    """Whether ops are traced, or tensors have no values."""
    if not _len_torch_dispatch_stack():
        return False
    return _get_dispatch_mode(_PROXY) is not None or _get_dispatch_mode(_FAKE) is not None


def may_write() -> bool:
    """Whether blocks may be overwritten: not where autograd watches them, nor in a trace.

    There the compiler decides what memory is used again; and the same written anew may have other strides.
    """
    return not torch.is_grad_enabled() and not tracing()


def aside():
    """A context whose ops are not part of a trace."""
    return _disable_current_modes() if tracing() else contextlib.nullcontext()


def own() -> bool:
    """Whether the trace is jactri's own, whose tensors are like those that its graph will run on."""
    return _moving.get() is not None and tracing()


@contextlib.contextmanager
def making():
    """In jactri's own trace: a context whose tensors are real ones, which the graph holds."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    token = _making.set(True)
    try:
        with disable_proxy_modes_tracing(), unset_fake_temporarily():
            yield
    finally:
        _making.reset(token)


def made_now() -> bool:
    """Whether what is made now is what a graph will hold."""
    return _making.get()


REFUSALS = (
    RuntimeError, TypeError, ValueError, AttributeError, AssertionError, LookupError, ArithmeticError,
)  # fmt: skip
"""What torch raises where it cannot trace or compile, and func where there are no values."""


def valued() -> bool:
    """Whether there are values: not where a trace is of fake tensors."""
    return not _len_torch_dispatch_stack() or _get_dispatch_mode(_FAKE) is None


def number(t: Tensor):
    """The value of a 0-d tensor. Autograd's wrapped numbers cannot be read through a dispatch mode."""
    if not _len_torch_dispatch_stack():
        return t.item()
    with _disable_current_modes():
        return t.item()


def constant(t: Tensor) -> bool:
    """Whether a tensor has its value whatever the inputs of a trace are: no op of the trace, nor an input, made it."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import get_proxy_slot

    if isinstance(t, FakeTensor) or id(t) in (_moving.get() or ()):
        return False
    mode = _get_dispatch_mode(_PROXY)
    return mode is None or get_proxy_slot(t, mode.tracer, None) is None
