"""What to write instead: the ends of messages about natural mistakes, as code."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import numpy
from torch import Tensor

_KEYWORDS = {
    "argnums": "close over the inputs that are not differentiated, lambda a: func(a, b), or call "
    "jactri.func.jacrev(func, argnums), which has torch.func's arguments",
    "has_aux": "call jactri.func.jacrev(func, has_aux=True), or return the aux as a detached output",
    "randomness": "func runs once, so one draw serves all rows; jactri.func.jacfwd takes randomness",
    "v": "jvp takes tangents, and vjp cotangents, in the same place",
    "in_dims": "a batch on the first axis is what per_sample=True is for",
}
"""Arguments of torch's and JAX's calls, and what stands for them here."""


def instead_of(value: Any, name: str, nested: bool) -> str:
    """What to pass, or to return, instead of a value that is no tensor; ``nested``: it lies in a tuple."""
    returned = name.startswith("output")
    if value is None:
        return "; func has no return statement?" if returned else "; leave it out of the tuple"
    if isinstance(value, numpy.ndarray):
        return "; convert it: " + (
            "compute it in torch, an array has no graph"
            if returned
            else f"torch.from_numpy({name})"
        )
    if isinstance(value, Mapping):
        return _of_mapping(value, returned)
    if isinstance(value, (list, tuple)):
        if nested and returned:
            return "; return the tensor that is meant: lambda *inputs: func(*inputs)[0]"
        if not nested and all(isinstance(v, Tensor) for v in value):
            return (
                "; return a tuple: lambda *inputs: tuple(func(*inputs))"
                if returned
                else f"; pass a tuple: tuple({name})"
            )
        return "; nested tensors (pytrees) are what jactri.func.jacrev(func) takes"
    if isinstance(value, (int, float, complex, bool, numpy.generic)):
        return (
            "; compute it in torch: a number has no graph"
            if returned
            else f"; convert it: torch.as_tensor({value!r})"
        )
    if returned:
        held = [k for k, v in getattr(value, "__dict__", {}).items() if isinstance(v, Tensor)]
        if held:
            return f"; return the tensor that is meant: lambda *inputs: func(*inputs).{held[0]}"
    return ""


def _of_mapping(value: Mapping, returned: bool) -> str:
    if not returned:
        return (
            "; jactri.func.jacrev(func)(inputs) takes dicts (pytrees), and "
            "lambda *tensors: func(dict(zip(names, tensors))) makes func one of tensors"
        )
    keys = [k for k, v in value.items() if isinstance(v, Tensor)]
    if not keys:
        return "; return the tensor that is meant"
    key = keys[0]
    get = f".{key}" if hasattr(value, str(key)) else f"[{key!r}]"
    rest = f" (it has {', '.join(map(str, keys))})" if len(keys) > 1 else ""
    return f"; return the tensor that is meant: lambda *inputs: func(*inputs){get}{rest}"


def check_differentiable(x: Tensor) -> None:
    """Raise, as torch does, for a tensor of integers or booleans."""
    if not (x.dtype.is_floating_point or x.dtype.is_complex):
        raise RuntimeError(
            "only Tensors of floating point and complex dtype can require gradients, but an input of shape "
            f"{tuple(x.shape)} has dtype {x.dtype}: convert it, x.float(), or close over an input that only picks, "
            "lambda x: func(x, index)"
        )


_TWICE = {
    "EmbeddingBag": "torch.nn.functional.embedding(indices, weight) and sum, mean or amax over each bag's rows",
}
"""By an op whose backward torch cannot differentiate: ops that give the same, and whose backward it can."""


def untwice(node: str, error: Exception) -> str:
    """For a derivative of a node's backward that torch does not have; ``error`` is its own."""
    op = node.rsplit("::", 1)[-1].partition("Backward")[0]
    instead = _TWICE.get(op, "ops whose backward torch differentiates")
    return f"{op} has no further derivative in torch ({error}): write it as {instead}"


def nearest(given: Any, allowed) -> str:
    """``, did you mean 'x'?``, or nothing."""
    close = difflib.get_close_matches(
        str(given), [a for a in allowed if isinstance(a, str)], 1, 0.5
    )
    return f", did you mean {close[0]!r}?" if close else ""


def of_shape(given: Tensor, y: Tensor, x: Tensor) -> str:
    """What an ``out`` of this shape would be right for."""
    if tuple(given.shape) == (*y.shape, *x.shape[1:]):
        return "; that is the shape of per_sample=True"
    if tuple(given.shape) == (*y.shape, *x.shape):
        return "; that is the shape without per_sample"
    return ""


def no_such(option: str, call: Callable, known) -> TypeError:
    """For a keyword that a call does not have."""
    remedy = _KEYWORDS.get(option)
    remedy = f": {remedy}" if remedy else nearest(option, known)
    return TypeError(f"{call.__name__}() has no argument {option!r}{remedy}")
