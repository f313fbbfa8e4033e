"""What to write instead: the ends of messages about natural mistakes, as code."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

_CHOSEN = (
    "close over the inputs that are not differentiated, lambda a: func(a, b), or call "
    "jactri.func.jacrev(func, argnums), which has torch.func's arguments"
)
_SAMPLES = "a batch on the first axis is what per_sample=True is for"
_ZEROS = "leave it out, what does not depend on an input has zeros"

_KEYWORDS = {
    "argnums": _CHOSEN,
    "static_argnums": _CHOSEN,
    "wrt": _CHOSEN,
    "has_aux": "call jactri.func.jacrev(func, has_aux=True), or return the aux as a detached output",
    "randomness": "func runs once, so one draw serves all rows; jactri.func.jacfwd takes randomness",
    "v": "jvp takes tangents, and vjp cotangents, in the same place",
    "grad_outputs": "jactri.vjp(func, inputs, cotangents) takes them",
    "is_grads_batched": "a leading axis K makes cotangents of jactri.vjp a block",
    "in_dims": _SAMPLES,
    "out_dims": _SAMPLES,
    "batched": _SAMPLES,
    "vectorize": "leave it out, all rows run at once",
    "create_graph": "what it gives is detached, and jactri.jacobian, jvp and vjp take create_graph",
    "retain_graph": "leave it out, no graph is freed",
    "allow_unused": _ZEROS,
    "materialize_grads": _ZEROS,
    "static": "jactri.compile(func, x) makes static calls, and its engine= chooses what runs them",
    "device": "results are where the inputs are, x.to(device)",
    "dtype": "results are of the inputs' dtype, x.to(dtype)",
}
"""Arguments of torch's and JAX's calls, and what stands for them here."""


# -- what is no tensor ------------------------------------------------------------------------------


def instead_of(value: Any, name: str, nested: bool = False) -> str:
    """What to pass as the argument ``name`` instead of a value that is no tensor; ``nested``: it lies in a tuple."""
    if value is None:
        return "; leave it out of the tuple" if nested else "; pass a tensor"
    if isinstance(value, numpy.ndarray):
        return f"; convert it: torch.from_numpy({name})"
    if isinstance(value, Mapping):
        return (
            f"; jactri.func.jacrev(func)({name}) takes dicts (pytrees), and "
            "lambda *tensors: func(dict(zip(names, tensors))) makes func one of tensors"
        )
    if isinstance(value, (list, tuple)):
        leaves = torch.utils._pytree.tree_leaves(value)
        if leaves and all(isinstance(v, (int, float, complex)) for v in leaves):
            return f"; convert it: torch.tensor({name})"
        if not nested and all(isinstance(v, Tensor) for v in value):
            return f"; pass a tuple: tuple({name})"
        return "; nested tensors (pytrees) are what jactri.func.jacrev(func) takes"
    if isinstance(value, (int, float, complex, numpy.generic)):
        return f"; convert it: torch.as_tensor({value!r})"
    if callable(value):
        return "; the function comes first: (func, inputs)"
    return "; pass tensors, and close over other arguments: lambda x: func(x, other)"


def one_tensor(value: Any, name: str, call: str) -> None:
    """Raise TypeError where an argument of a call, which takes one tensor there, is none."""
    if isinstance(value, Tensor):
        return
    remedy = instead_of(value, name)
    if isinstance(value, (list, tuple)) and all(isinstance(v, Tensor) for v in value):
        remedy = (
            f"; of coordinates, make one tensor, lambda p: func(*p.split(1, -1)) at torch.cat({name}, -1), and close "
            "over inputs that are not differentiated: lambda x: func(x, t)"
        )
    raise TypeError(f"{name} of {call} must be a tensor, got {type(value)}{remedy}")


def returned(value: Any, nested: bool = False, of_module: bool = False) -> str:
    """What to return instead of a value that is no tensor; ``nested``: it lies in a tuple.

    ``of_module``: by a module, in whose place no function can stand.
    """
    if value is None:
        return "; has it no return statement?" if not nested else "; leave it out of the tuple"
    if isinstance(value, (numpy.ndarray, int, float, complex, numpy.generic)):
        return "; compute it in torch: numbers and arrays have no graph"
    if isinstance(value, list) and not of_module and all(isinstance(v, Tensor) for v in value):
        return "; return a tuple: lambda *inputs: tuple(func(*inputs))"
    names = ["[0]"] if nested or isinstance(value, (list, tuple)) else _tensors_in(value)
    if not names:
        return "; return the tensor that is meant"
    held = ", ".join(re.findall(r"\w+", " ".join(names)))
    rest = f" (it has {held})" if len(names) > 1 else ""
    if of_module:
        code = f"module.register_forward_hook(lambda module, args, output: output{names[0]})"
        return (
            f"; return the tensor that is meant: {code}{rest}, or wrap the module in one that does"
        )
    return f"; return the tensor that is meant: lambda *inputs: func(*inputs){names[0]}{rest}"


def _tensors_in(value: Any) -> list[str]:
    """How to get at the tensors of a dict, a dataclass or another object: ``.logits``, ``['y']``."""
    if isinstance(value, Mapping):
        keys = [k for k, v in value.items() if isinstance(v, Tensor)]
        return [f".{k}" if hasattr(value, str(k)) else f"[{k!r}]" for k in keys]
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    names = dict.fromkeys([*getattr(value, "__dict__", ()), *(f.name for f in fields)])
    return [f".{n}" for n in names if isinstance(getattr(value, n, None), Tensor)]


# -- tensors that do not do -------------------------------------------------------------------------

NO_DERIVATIVE = (
    "which has no derivative: return what it was picked from, as the scores before an argmax"
)
"""Of an output of integers or booleans."""


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


def of_shape(given: Tensor, y: Tensor, x: Tensor, want: tuple[int, ...]) -> str:
    """What an ``out`` of this shape would be right for, or one that is right."""
    if tuple(given.shape) != want and tuple(given.shape) == (*y.shape, *x.shape[1:]):
        return "; that is the shape of per_sample=True"
    if tuple(given.shape) != want and tuple(given.shape) == (*y.shape, *x.shape):
        return "; that is the shape without per_sample"
    return f"; pass torch.empty({want}, dtype={x.dtype}, device={str(x.device)!r})"


# -- functions --------------------------------------------------------------------------------------


def not_callable(func: Any) -> TypeError:
    """What to raise for a function that is none."""
    remedy = ""
    if isinstance(func, (Tensor, tuple, list)):
        remedy = (
            "; pass the function itself, not what it returned (jactri.jacobian_of(outputs, inputs) takes that): "
            "jacobian(net, x), not jacobian(net(x), x)"
        )
    return TypeError(f"func is not callable, but {type(func)}{remedy}")


# -- options ----------------------------------------------------------------------------------------


def nearest(given: Any, allowed: Iterable[Any], alike: float = 0.65) -> str | None:
    """The option that a text is a beginning of, or may be meant as: ``alike`` is the share of letters in common."""
    known = {a.casefold(): a for a in allowed if isinstance(a, str)}
    text = str(given).casefold()
    close = [text] if text in known else [k for k in known if text and k.startswith(text)]
    close = close or difflib.get_close_matches(text, known, 1, alike)
    return known[close[0]] if close else None


def one_of(name: str, given: Any, allowed: Sequence[Any]) -> str:
    """The message for an option that is none of those that there are."""
    close = nearest(given, allowed)
    told = f"{name} must be one of {', '.join(map(repr, allowed))}, got {given!r}"
    return told if close is None else f"{told}, did you mean {close!r}?"


def keyword(option: str, known: Iterable[str]) -> str:
    """The end of a message about a keyword that a call does not have."""
    known = [k for k in known if k != "self" and not k.startswith("_")]
    if option not in _KEYWORDS and (close := nearest(option, known)) is not None:
        return f", did you mean {close!r}?"
    other = nearest(option, _KEYWORDS, 0.9)
    return f": {_KEYWORDS[other]}" if other else f"; its options are {', '.join(known)}"


def misfit(call: Callable, args: Sequence[Any], options: Mapping[str, Any]) -> TypeError | None:
    """For a call whose arguments are not those that it has; None where they are."""
    signature, name = inspect.signature(call), call.__name__
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        known = signature.parameters
        wrong = next((o for o in options if o not in known), None)
        if wrong is not None:
            return TypeError(f"{name}() has no argument {wrong!r}{keyword(wrong, known)}")
        needed = [
            p.name for p in known.values() if p.default is p.empty and p.kind < p.VAR_POSITIONAL
        ]
        usage = f"{name}({', '.join(needed)})"
        remedy = f"write {usage}, several inputs as one tuple, and options by name"
        if len(args) < len(needed) and "func" in needed:
            remedy = f"write {usage}; a function to be called later is what jactri.func.jacrev(func) returns"
        return TypeError(f"{name}(): {error}; {remedy}")
    return None
