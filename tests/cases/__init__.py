"""The table of op cases. Adding an op is one line in the file of its family."""

import torch

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
from .case import C, Case, M, graph_nodes, graph_steps

_every = [
    case
    for family in (
        elementwise, linalg, convolution, views, indexing, reductions, layers, others,
        gradients, rare,
    )
    for case in family.CASES
]  # fmt: skip

_version = tuple(int(part) for part in torch.__version__.split(".")[:2])
ALL = [case for case in _every if case.since <= _version]
LATER = [case for case in _every if case.since > _version]

__all__ = ["ALL", "LATER", "C", "Case", "M", "graph_nodes", "graph_steps"]

_names = [case.name for case in _every]
assert len(set(_names)) == len(_names), sorted({n for n in _names if _names.count(n) > 1})
