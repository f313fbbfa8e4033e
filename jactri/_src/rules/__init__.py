"""One record for each autograd node that jactri understands: all that it knows of the op, in the file of its family.

It is registered by `rule`, which decorates what reads the op's linear maps, or by a row for an elementwise op
(`elementwise.op`). A rule takes the `graph.Reader` at a node and returns the index of the value that it emitted (a
tuple of indices for a node with several outputs), or None where it does not cover the node's arguments: then the node
itself is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class Record:
    """What is known of one op. All of it may be missing.

    Attributes:
        read: emits its linear maps; else the node is called.
        complex: emits them where it takes or gives complex numbers (see `complexes`); else autograd computes all of the
            function.
        curve: gives its second-order terms (see `maps.curvature`), from a `second.curves.CurveReader` at the node that
            it was read from; None where they are not known. Else an op is asked whether it is linear.
        kept: the (input axis, output axis) pairs that the node passes through unmixed, by the shapes of an input and an
            output, for where it is called: autograd then computes it, and samples still stay apart.
        form: of an elementwise op in one operand, its `elementwise.Form`, by what reads a saved value.
        selects: its backward selects, and does nothing else: the derivative is 1 where a gradient passes, else 0.
        scales: its backward selects and scales: where, the node tells (see `elementwise.passing`).
        bounded: its derivative is bounded where its operand is finite (see `plan.poles`).
        regular: its derivative is finite where its operands are: it counts beside a pole, whose value may not be.
        moves: it scales or moves the entries of its first operand, and adds nothing.
    """

    read: Callable | None = None
    complex: Callable | None = None
    curve: Callable | None = None
    kept: Callable[[tuple, tuple], tuple[tuple[int, int], ...]] | None = None
    form: Callable | None = None
    selects: bool = False
    scales: bool = False
    bounded: bool = False
    regular: bool = False
    moves: bool = False


class MissingValue(Exception):
    """A rule needs a tensor that the node did not save."""


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


def record_of(op: str) -> Record:
    """The record of nodes of this name; one that knows nothing where there is none."""
    return REGISTRY.get(op, _UNKNOWN)


_UNKNOWN = Record()


def known(*names: str | type, **facts) -> None:
    """Register a `Record` for autograd nodes, named as `node_names` reads them, or for Functions, by their classes."""
    for name in names:
        for full in [name] if isinstance(name, type) else node_names(name):
            if full in REGISTRY:
                raise ValueError(f"two rules for {full}")
            REGISTRY[full] = Record(**facts)


def rule(*names: str | type, **facts):
    """Decorate what reads nodes of these names, and register it with what else is known of the op (see `Record`)."""

    def decorate(function):
        known(*names, read=function, **facts)
        return function

    return decorate


def batches(in_shape, out_shape) -> tuple[tuple[int, int], ...]:
    """`Record.kept` of ops on the last two axes of each operand, batched over the axes before."""
    batch = min(len(in_shape) - 2, len(out_shape))
    # batches are aligned from the left only where both have all of them
    if tuple(in_shape[:batch]) != tuple(out_shape[:batch]):
        return ()
    return tuple((a, a) for a in range(batch))


def normal_axis(dim: int, ndim: int) -> int:
    """A dimension counted from 0: autograd saves negative ones as unsigned 64-bit."""
    return normal_index(dim) % max(ndim, 1)


def normal_index(n: int) -> int:
    """An integer as it was before autograd saved it as unsigned 64-bit."""
    return n - (1 << 64) if n >= 1 << 63 else n


from . import (  # noqa: E402 - registration
    activations,  # noqa: F401
    arithmetic,  # noqa: F401
    attention,  # noqa: F401
    complexes,
    conv,  # noqa: F401
    distance,  # noqa: F401
    functions,  # noqa: F401
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

complexes.register()
