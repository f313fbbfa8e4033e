"""What can be one graph: the calls of jactri that `compile` and `export` take, as functions of their inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..base.remedies import instead_of, keyword
from ..calls import func as transforms
from ..calls.api import jacobian
from ..calls.diagonal import diagonal
from ..calls.divergence import divergence
from ..calls.gradient import gradient
from ..calls.gram import jjt, jtj
from ..calls.hessian import hessian
from ..calls.laplacian import bilaplacian, laplacian
from ..calls.ntk import empirical_ntk
from ..calls.parameters import parameter_jacobian
from ..calls.unformed import unformed
from ..calls.vectors import jvp, vjp
from ..run.sparsity import Sparsity

_OF_TUPLES = (jacobian, hessian, jtj, jjt, parameter_jacobian)
"""Calls that take several inputs as one tuple."""

OF_FUNCTIONS = (transforms.jacrev, transforms.jacfwd, transforms.hessian)
"""Calls that take a function and give one."""

_TAKEN = {
    gradient: (1, 1), divergence: (1, 1), laplacian: (1, 1), bilaplacian: (1, 1), diagonal: (1, 1),
    empirical_ntk: (1, 2), jvp: (2, 2), vjp: (2, 2),
}  # fmt: skip
"""How many inputs the other calls take."""

_CALLS = (*_OF_TUPLES, *_TAKEN, *OF_FUNCTIONS)

_PATTERNED = ("layout", "pattern", "blocksize")
"""Options of `jacobian` that `compile` takes, with the pattern."""

_NOT_TAKEN = frozenset(
    "check differentiate estimate mesh out progress resume strict vectorize".split()
)
"""Options that are for one long call, or that a trace cannot have."""

IN_WEIGHTS = (parameter_jacobian, empirical_ntk)
"""Calls that differentiate by weights."""

TAKE_OUT = (jacobian, parameter_jacobian)


def name(of: Callable | None) -> str:
    """The call by name, for messages."""
    return "func" if of is None else of.__name__


def check(what: str, of: Any, options: dict[str, Any], examples: Sequence[Any]) -> None:
    """Raise for what ``what``, `compile` or `export`, cannot make one graph of, whatever the function does."""
    if of is not None and of not in _CALLS:
        names = ", ".join(
            f"jactri.{'func.' if f in OF_FUNCTIONS else ''}{f.__name__}" for f in _CALLS
        )
        raise TypeError(f"of must be one of {names}, or None for func itself, got {of!r}")
    known = [*_options(of), *(("engine", "freeze") if what == "compile" else ("path",))]
    if what != "compile" or of is not jacobian:
        known = [option for option in known if option not in _PATTERNED]
    wrong = [option for option in options if option not in known]
    if wrong:
        called = "func itself" if of is None else of.__name__
        raise TypeError(
            f"{what} of {called} takes no {', '.join(map(repr, wrong))}{keyword(wrong[0], known)}"
        )
    if of is jacobian:
        _check_pattern(options)
    if not examples:
        raise IndexError("example_inputs is empty: pass the tensors that func takes")


def _check_pattern(options: dict[str, Any]) -> None:
    """Raise for a sparse layout without a pattern, and for one that would be looked at again in every trace."""
    layout, pattern = options.get("layout", torch.strided), options.get("pattern")
    if pattern is None and layout is not torch.strided:
        raise ValueError(
            f"compile with layout={layout} needs pattern=, which is taken at its word: pass pattern=jactri.sparsity("
            "func, inputs)"
        )
    for t in () if pattern is None else tree_leaves(pattern):
        if not isinstance(t, Sparsity):
            raise TypeError(
                f"pattern of a compiled call must be what jactri.sparsity or Sparsity.of gives, got {type(t)}"
            )


def check_count(of: Callable | None, count: int) -> None:
    """Raise TypeError for more or fewer inputs than a call takes."""
    least, most = _TAKEN.get(of, (1, inf))
    if not least <= count <= most:
        takes = {
            (1, 1): "one tensor", (1, 2): "x1 and x2", (2, 2): "inputs and a vector", (1, inf): "tensors",
        }[least, most]  # fmt: skip
        raise TypeError(f"{name(of)} takes {takes}, got {count}")


def check_tensors(inputs: Sequence[Any], whose: str) -> None:
    """Raise TypeError for an input that is no tensor."""
    for x in inputs:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"the inputs of {whose} must be tensors, got {type(x)}{instead_of(x, 'x')}"
            )


def ordinary(of: Callable | None, func: Callable, options: dict[str, Any]) -> Callable:
    """The ordinary call, as a function of its inputs, one sequence, and ``out``."""
    if of is None:
        return lambda xs, out: func(*xs)
    if of in OF_FUNCTIONS:
        made = of(func, **options)
        return lambda xs, out: made(*xs)
    if of is parameter_jacobian:
        return lambda xs, out: of(func, _one(xs), **options).dense(out)
    if of is jacobian and options.get("layout", torch.strided) is not torch.strided:
        return lambda xs, out: unformed(func, _one(xs), out=out, **options)
    if of is jacobian:
        return lambda xs, out: of(func, _one(xs), out=out, **options)
    if of in _OF_TUPLES:
        return lambda xs, out: of(func, _one(xs), **options)
    return lambda xs, out: of(func, *xs, **options)


def _one(xs: Sequence[Any]) -> Any:
    return xs[0] if len(xs) == 1 else tuple(xs)


def _options(of: Callable | None) -> list[str]:
    """The options of a call that one graph of it has."""
    if of is None:
        return []
    known = inspect.signature(of).parameters.values()
    inputs = ("func", "module", "inputs", "x", "x1", "x2", "tangents", "cotangents")
    return [p.name for p in known if p.name not in (*_NOT_TAKEN, *inputs)]
