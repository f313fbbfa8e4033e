"""Autograd's graph, read, and its hooks looked at."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..base.elsewhere import check_graph
from .behind import Walk, handles_of
from .graph import Graph, Reader, UnsupportedGraph, follow
from .hooks import check, check_complex
from .joining import that_fits
from .overriding import refuse

_WHOLE = "take what it holds out of the function, or call it outside of the block"


def read(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    reader: Reader | None = None,
    handles: int | None = 0,
    walk: Walk | None = None,
) -> Graph:
    """Read the graph between ``inputs`` and ``outputs``. Raises UnsupportedGraph where blocks cannot follow.

    ``reader``: one that has read nothing yet, and that notes more than the graph holds. ``handles``: how many hooks
    were registered while the graph was recorded, None if that is not known; for inputs of a call, that is noted.
    ``walk``: through the nodes between them, where it is known.
    """
    try:
        graph = follow(outputs, inputs, reader, walk)
        if reader is None or reader.hooks:
            handles = handles_of(inputs) if handles == 0 else handles
            if handles != 0:
                check(graph, outputs, inputs)
        if graph.complex:
            check_complex(graph, outputs, inputs)
        return that_fits(graph) if reader is None and graph.others else graph
    except UnsupportedGraph as reason:
        refuse(f"a function that autograd computes as a whole (it holds {reason})", _WHOLE)
        check_graph(outputs)  # the engine will run
        raise
