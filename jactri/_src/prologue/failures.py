"""What an error of the caller's function may be about: a note below its own message, which stays as it is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Module

from ..read.ranges import roots


def note(
    error: RuntimeError | TypeError, func: Callable, args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    """Add to an error that ``func`` raised what its arguments have to do with it (from Python 3.11 on)."""
    found = _arity if isinstance(error, TypeError) else _elsewhere
    told = found(func, args, kwargs, str(error))
    if told and hasattr(error, "add_note") and told not in getattr(error, "__notes__", ()):
        error.add_note(told)


def _arity(func, args, kwargs, message: str) -> str:
    """That a function does not take as many arguments as there are inputs."""
    try:
        signature = inspect.signature(func.forward if isinstance(func, Module) else func)
    except ValueError:  # a builtin has none
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return (
            f"jactri calls func(*inputs), here with {len(args)} input{'s' * (len(args) != 1)}; for one that takes "
            "more, pass lambda *inputs: func(*inputs, other), for one that takes a tuple, lambda *inputs: func(inputs)"
        )
    return ""


def _elsewhere(func, args, kwargs, message: str) -> str:
    """That a module which a function is, or names, is on another device, or of another dtype, than an input."""
    inputs = [(i, x) for i, x in enumerate(args) if isinstance(x, Tensor)]
    for name, module in roots(inspect.unwrap(func)):
        for p in module.parameters():
            whose = f"the parameters of {name or 'func'}"
            for i, x in inputs:
                if x.device != p.device:
                    to = f"x.to({str(p.device)!r})"
                    return f"{whose} are on {p.device}, inputs[{i}] is on {x.device}; pass {to}"
                if "type" in message and p.is_floating_point() and x.dtype != p.dtype:
                    return f"{whose} are {p.dtype}, inputs[{i}] is {x.dtype}; pass x.to({p.dtype})"
            break
    return ""
