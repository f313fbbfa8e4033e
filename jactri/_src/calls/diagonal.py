"""`diagonal`: the derivatives ``d out_i / d x_i``, without the Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base import backends
from ..base.memory import Budget
from ..base.remedies import one_tensor
from ..meet import diagonal as meeting
from ..plan.owners import apart
from ..plan.planning import proof, prove_by_probe
from ..plan.samples import probe_mixing
from ..prologue.arguments import Options, check_batch, outputs, taken
from ..prologue.running import computing, eagerly, prepare, public
from ..read import handover
from ..read.graph import UnsupportedGraph
from ..read.opaque import refuse_or_log
from ..read.reading import read
from ..spread.shards import by_rank
from . import whole


@public
@by_rank("x")
def diagonal(
    func: Callable[..., Any],
    x: Tensor,
    create_graph: bool = False,
    *,
    per_sample: bool | str = False,
    return_output: bool = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
) -> Any:
    """The diagonal of the Jacobian, ``d out_i / d x_i``, for a ``func`` whose output has the shape of ``x``.

    Args:
        func: takes ``x`` and returns a floating-point tensor of its shape.
        x: a floating-point tensor of any shape.
        create_graph: the result can be differentiated.
        per_sample: as of `jacobian`: the first axis is a batch of samples, which must not mix. The result is the same.
        return_output: return ``(output, result)``; the output is detached unless ``create_graph``.
        chunk_size: how many seeds run at once.
        memory_limit: bytes (or ``"2GB"``) that the call may allocate after ``func`` has run, the result included.
        backend: as of `jacobian`.

    Returns:
        A tensor of the shape, dtype and device of ``x``.

    Raises:
        TypeError: an ``x`` or an output that is not a tensor.
        RuntimeError: an integer ``x``; an output that is complex, or of another shape than ``x``; under ``per_sample``,
            samples that mix.
        ValueError: ``chunk_size`` below 1, a ``memory_limit`` too small for one seed, an unknown backend.

    Cost:
        An elementwise function: its derivative. A convolutional network: a sweep of as many seeds as an output sees
        inputs (Curtis, Powell and Reid 1974). Else at most the sweeps of a Jacobian whose samples are kept apart, less
        its most expensive product; memory for chunks of it only.

    Examples:
        >>> x = torch.linspace(-1, 1, 12).reshape(4, 3)
        >>> own = jactri.diagonal(lambda x: x.sin() + x.flip(1), x)
        >>> expected = x.cos()
        >>> expected[:, 1] += 1  # flip leaves the middle where it is
        >>> torch.allclose(own, expected)
        True
    """
    one_tensor(x, "x", "diagonal")
    asked = Options(create_graph, chunk_size, memory_limit, backend, per_sample)
    taken("diagonal", x, asked, "x")
    if handover.transforming((x,)):
        output, made = handover.diagonal(eagerly(func), x, check_shape, chunk_size)
        return (output, made) if return_output else made
    ran = prepare(func, (x,), create_graph, "diagonal")
    check_shape(ran.ys if ran.tupled else ran.result, x)
    (y,), (leaf,) = ran.ys, ran.leaves
    check_batch(per_sample, ran.ys, ran.leaves)
    with computing(create_graph, backend):
        made = diagonal_of(y, leaf, asked, Budget(memory_limit, leaf.device))
    made = ran.dressed(made, (x,))
    return (ran.output(create_graph), made) if return_output else made


def check_shape(y, x: Tensor) -> None:
    """Raise unless ``y`` is a tensor of the shape of ``x``."""
    outputs(y, "diagonal")
    if isinstance(y, tuple):
        raise TypeError(
            f"diagonal needs a function that returns one tensor, got a tuple of {len(y)}: call it for each, "
            "lambda x: func(x)[0]"
        )
    if y.shape != x.shape:
        raise RuntimeError(
            f"diagonal needs an output of the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}"
        )
    if y.is_complex():
        raise RuntimeError(
            f"the output of diagonal is complex ({y.dtype}): its Jacobian is not one real-linear matrix; return its "
            "real or its imaginary part"
        )


def diagonal_of(y: Tensor, x: Tensor, asked: Options, budget: Budget) -> Tensor:
    """The diagonal of a recorded computation, differentiable in grad mode."""
    try:
        graph = read((y,), (x,))
    except UnsupportedGraph as reason:
        refuse_or_log("the function", y.shape, [x.shape], f"holds {reason}")
        if asked.per_sample:
            whole.check((y,), (x,), asked.per_sample, reason, budget)
        return whole.diagonal(y, x, reason, asked.chunk_size, budget)
    if graph.inputs[0] is None or graph.outputs[0] is None:
        return torch.zeros_like(x)
    if asked.per_sample and not asked.assume:
        plan = proof(graph, "auto", (y,), (x,))
        if not plan.tied and not apart(graph):
            prove_by_probe(graph, plan, (y,), (x,), budget)

    def unmixed() -> bool:
        if backends.capturing(x.device):
            return False
        return apart(graph) or probe_mixing((y,), (x,), graph, room=budget.bounded) is None

    return meeting.diagonal(graph, asked.chunk_size, budget, unmixed).to(x.dtype)
