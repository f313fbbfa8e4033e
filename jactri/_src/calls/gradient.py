"""The Jacobian of every sample: `gradient`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..base.classes import dressed
from ..prologue.arguments import Options
from ..prologue.running import eagerly, public
from ..read import handover
from ..spread.shards import by_rank
from . import points


@public
@by_rank("x")
def gradient(
    func: Callable[[Tensor], Tensor],
    x: Tensor,
    create_graph: bool = False,
    *,
    per_sample: bool | str = True,
    return_lower: bool = False,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """The derivative of ``func`` at each sample of ``x``: the Jacobians of samples that do not mix.

    Args:
        func: maps ``x`` to a tensor ``(N, *out)``, for a single point to ``(*out,)``. It runs once.
        x: floating-point, ``(N, *in)``: N samples; or of one axis, a single point ``(n,)``.
        create_graph: return what can be differentiated again.
        per_sample: ``"assume"``: that samples do not mix is not proven but taken for granted, as by `jactri.jacobian`.
        return_lower: return ``(output, gradient)``.
        chunk_size: as of `jactri.jacobian`.
        memory_limit: as of `jactri.jacobian`.
        backend: as of `jactri.jacobian`.

    Returns:
        ``(N, *out, *in)``: ``(N, *in)`` for a function with one number a sample, ``func(x)`` of shape ``(N,)``. For a
        single point without ``N``.

    Raises:
        TypeError: ``x``, or what ``func`` returns, is no tensor.
        RuntimeError: they are not of floating point, or samples mix (the op is named).
        ValueError: ``func`` does not return a value for each sample; an option is out of range.

    Cost:
        That of `jactri.jacobian` with ``per_sample=True``.

    Examples:
        >>> distance = lambda p: p.norm(dim=1) - 1.0  # from a sphere
        >>> points = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, -2.0]])
        >>> d, normal = jactri.gradient(distance, points, return_lower=True)
        >>> torch.allclose(normal, points / points.norm(dim=1, keepdim=True))
        True
    """
    asked = Options(create_graph, chunk_size, memory_limit, backend, per_sample)
    points.check(x, "gradient", asked)
    if handover.transforming((x,)):
        y, answer = handover.jacobian(
            eagerly(func), (x,), False, per_sample=points.batched(x), chunk_size=chunk_size
        )
    else:
        out, y, leaf = points.evaluate(func, x, "gradient", create_graph)
        answer = dressed(points.jacobian(y, leaf, asked), (out, x))
        y = points.result(out, asked)
    return (y, answer) if return_lower else answer
