"""The values of a sparse Jacobian of which the pattern is given, for who forms the answer later: a compiled call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..prologue.arguments import Options, taken
from ..prologue.patterns import taken_pattern
from ..prologue.running import prepare, public
from .api import compute, nest


@public
def unformed(
    func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    *,
    return_output: bool = False,
    **options: Any,
) -> Any:
    """What `jacobian` returns, with `formed.Unformed` for each sparse tensor; ``options`` are of its names."""
    asked = Options(**options, of="", unformed=True)
    tupled, xs = taken("jacobian", inputs, asked)
    ran = prepare(func, xs, asked.create_graph)
    asked.pattern = taken_pattern(
        asked.pattern, ran.ys, ran.leaves, ran.tupled, tupled, asked.per_sample
    )
    answer = nest(compute(ran.ys, ran.leaves, asked), ran.tupled, tupled)
    return (ran.output(asked.create_graph), answer) if return_output else answer
