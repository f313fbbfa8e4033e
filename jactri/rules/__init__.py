"""One rule for each autograd node that jactri understands: node name -> linear maps.

A rule takes the `graph.Reader` at a node and returns the index of the value that it emitted (a tuple of indices for a
node with several outputs), or None where it does not cover the node's arguments: then the node itself is called.
"""

from __future__ import annotations

from collections.abc import Callable

REGISTRY: dict[str, Callable] = {}


def rule(*names: str):
    """Register a rule for autograd nodes, named without their version: ``rule("Tanh")`` is ``TanhBackward0``.

    A name that already ends in a digit is taken as it is.
    """

    def decorate(function):
        for name in names:
            full = name if name[-1].isdigit() and "Backward" in name else f"{name}Backward0"
            if full in REGISTRY:
                raise ValueError(f"two rules for {full}")
            REGISTRY[full] = function
        return function

    return decorate


from . import elementwise, linear  # noqa: E402, F401 - registration
