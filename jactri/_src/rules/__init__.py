"""One rule for each autograd node that jactri understands: node name -> linear maps.

A rule takes the `graph.Reader` at a node and returns the index of the value that it emitted (a tuple of indices for a
node with several outputs), or None where it does not cover the node's arguments: then the node itself is called.
"""

from __future__ import annotations

from collections.abc import Callable


class Record:
    """What is known of one op: ``read`` emits its linear maps, ``curve`` gives its second-order terms (see
    `second.curves`). Each may be missing."""

    __slots__ = ("curve", "read")

    def __init__(self, read: Callable | None = None, curve: Callable | None = None):
        self.read, self.curve = read, curve


REGISTRY: dict[str | type, Record] = {}
"""By the name of autograd's node; of an ``autograd.Function``, whose names are not unique, by the very class, or by
``module::name`` where that is not to be imported."""


def of_function(node) -> Record | None:
    """The record of the node of an ``autograd.Function``."""
    kind = getattr(node, "_forward_cls", None)
    if kind is None:
        return None
    return REGISTRY.get(kind) or REGISTRY.get(f"{kind.__module__}::{kind.__qualname__}")


def node_names(name: str) -> list[str]:
    """Full names of autograd nodes: "Tanh" is ``TanhBackward0``, "Div.1" is ``DivBackward1``, "Div.1-3" are three.

    A name with "::" in it is complete.
    """
    if "::" in name:
        return [name]
    op, _, versions = name.partition(".")
    first, _, last = (versions or "0").partition("-")
    return [f"{op}Backward{i}" for i in range(int(first), int(last or first) + 1)]


def rule(*names: str | type):
    """Register a rule for autograd nodes, named as `node_names` reads them, or for Functions, by their classes."""

    def decorate(function):
        for name in names:
            for full in [name] if isinstance(name, type) else node_names(name):
                if full in REGISTRY:
                    raise ValueError(f"two rules for {full}")
                REGISTRY[full] = Record(function)
        return function

    return decorate


def normal_axis(dim: int, ndim: int) -> int:
    """A dimension counted from 0: autograd saves negative ones as unsigned 64-bit."""
    return normal_index(dim) % max(ndim, 1)


def normal_index(n: int) -> int:
    """An integer as it was before autograd saved it as unsigned 64-bit."""
    return n - (1 << 64) if n >= 1 << 63 else n


from . import (  # noqa: E402 - registration
    attention,  # noqa: F401
    conv,  # noqa: F401
    distance,  # noqa: F401
    elementwise,  # noqa: F401
    grouped,  # noqa: F401
    index,  # noqa: F401
    inplace,  # noqa: F401
    linalg,  # noqa: F401
    linear,  # noqa: F401
    loss,  # noqa: F401
    norm,  # noqa: F401
    pool,  # noqa: F401
    recurrent,  # noqa: F401
    reduce,  # noqa: F401
    resize,  # noqa: F401
    shape,  # noqa: F401
)
