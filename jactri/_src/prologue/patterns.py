"""A caller's ``pattern=``: one for each output and input, nested as the result is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..base.csr import Csr
from ..run.sparsity import csr_of


def taken_pattern(
    pattern: Any,
    ys,
    xs,
    tupled_out: bool,
    tupled: bool,
    per_sample: bool | str,
    of: str = "Jacobian",
) -> list[list[Csr]]:
    """``pattern`` by output and input, each the matrix of output entries by input entries (of a sample).

    ``of`` is what messages call the matrix.

    Raises TypeError for what is no pattern, RuntimeError for a shape or a nest that is not the result's.
    """
    rows = _level(pattern, len(ys), "output", "") if tupled_out else [pattern]
    made = []
    for j, (row, y) in enumerate(zip(rows, ys, strict=True)):
        name = f"[{j}]" if tupled_out else ""
        blocks = _level(row, len(xs), "input", name) if tupled else [row]
        made.append([
            csr_of(
                block, y.shape, x.shape, f"pattern{name}" + (f"[{i}]" if tupled else ""), bool(per_sample), of
            )
            for i, (block, x) in enumerate(zip(blocks, xs, strict=True))
        ])  # fmt: skip
    return made


def _level(pattern: Any, count: int, what: str, name: str) -> list[Any]:
    """The parts of a tuple."""
    if not isinstance(pattern, (tuple, list)):
        kind = "a tensor" if isinstance(pattern, Tensor) else f"{type(pattern)}"
        raise TypeError(
            f"pattern{name} must be a tuple of {count}, one for each {what}, as the result is, got {kind}"
        )
    if len(pattern) != count:
        raise RuntimeError(
            f"pattern{name} must be nested as the result is, with one for each of {count} {what}s, got {len(pattern)}"
        )
    return [*pattern]
