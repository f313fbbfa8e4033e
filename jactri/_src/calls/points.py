"""The batch convention of gradient, divergence and Laplacian, and what a caller passes to them, checked.

An input of one axis is a single point; with more axes, the first is a batch of samples that must not influence one
another. ``func`` sees exactly the tensor that is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ..base.remedies import NO_DERIVATIVE, one_tensor
from ..prologue.arguments import Options, check_samples, taken
from ..prologue.running import prepare
from .api import compute


def check(x, name: str, asked: Options) -> None:
    """Raises what the arguments deserve; ``name`` is the call's."""
    one_tensor(x, "x", name)
    if not x.dtype.is_floating_point:
        raise RuntimeError(
            f"x of {name} must be a floating-point tensor, got {x.dtype}: convert it, as by x.float()"
        )
    check_samples(asked.per_sample, True)
    taken(name, x, asked, "x")


def batched(x: Tensor) -> bool:
    """Whether the first axis of an input is samples."""
    return x.dim() > 1


def inner(x: Tensor) -> tuple[int, ...]:
    """The shape of one point."""
    return tuple(x.shape[1:]) if batched(x) else tuple(x.shape)


def check_same(y: Tensor, x: Tensor, name: str) -> None:
    """Raise unless an output has the shape of its input."""
    if y.shape != x.shape:
        raise RuntimeError(
            f"{name} needs a func whose output has the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}"
        )


def evaluate(
    func: Callable, x: Tensor, name: str, create_graph: bool, same: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """``func`` at ``x``: its output as it is, and the ends of its graph, output and input.

    ``same``: the output must have the shape of the input.
    """
    ys, (leaf,), tupled, result = prepare(func, (x,), create_graph, name)
    if tupled:
        raise TypeError(
            f"func of {name} must return one tensor, got a tuple of {len(ys)}: call {name} for each, "
            "lambda x: func(x)[0]"
        )
    (y,) = ys
    if not y.dtype.is_floating_point:
        raise RuntimeError(
            f"func of {name} must return a floating-point tensor, got {y.dtype}, {NO_DERIVATIVE}"
        )
    if same:
        check_same(y, x, name)
    if batched(x) and (y.dim() == 0 or y.shape[0] != x.shape[0]):
        remedy = "Pass a single point as a tensor of one axis, or as x.unsqueeze(0)"
        if y.numel() == 1:
            remedy += "; the gradient of one number in all of x is jactri.vjp(func, x)[1]"
        raise ValueError(
            f"x of {name} has shape {tuple(x.shape)}: a batch of {x.shape[0]} samples, for which func must return "
            f"({x.shape[0]}, *out), but it returned shape {tuple(y.shape)}. {remedy}"
        )
    return result, y, leaf


def jacobian(y: Tensor, x: Tensor, asked: Options, create_graph: bool | None = None) -> Tensor:
    """``(N, *out, *in)``, or ``(*out, *in)`` of a single point, by the machinery of `jactri.jacobian`."""
    graph = asked.create_graph if create_graph is None else create_graph
    backend = "auto" if graph else asked.backend
    per_sample = batched(x) and asked.per_sample
    options = replace(asked, create_graph=graph, backend=backend, per_sample=per_sample)
    return compute((y,), (x,), options)[0][0]


def result(y: Tensor, asked: Options) -> Tensor:
    """An answer with its graph, if one was asked for."""
    return y if asked.create_graph else y.detach()
