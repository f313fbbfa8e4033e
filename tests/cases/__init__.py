"""The table of op cases. Adding an op is one line in the file of its family."""

from . import (
    convolution,
    elementwise,
    gradients,
    indexing,
    layers,
    linalg,
    others,
    rare,
    reductions,
    views,
)
from .case import C, Case, M, graph_nodes

ALL = [
    case
    for family in (
        elementwise, linalg, convolution, views, indexing, reductions, layers, others,
        gradients, rare,
    )
    for case in family.CASES
]  # fmt: skip

__all__ = ["ALL", "C", "Case", "M", "graph_nodes"]

_names = [case.name for case in ALL]
assert len(set(_names)) == len(_names), sorted({n for n in _names if _names.count(n) > 1})
