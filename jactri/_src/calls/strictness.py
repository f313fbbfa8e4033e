"""``strict``: an error where torch.autograd.functional raises one, in place of zeros for what does not depend."""

from __future__ import annotations

from ..read.behind import reached
from ..read.overriding import refuse
from ..run.banded import Banded
from ..run.blocks import Blocks

_ALLOWED = "This is not allowed in strict mode"


def check_dependence(ys, xs) -> None:
    """Raise unless every output depends on every input (empty ones have nothing to say)."""
    refuse("strict=True")
    _check_outputs(ys)
    for j, y in enumerate(ys):
        found = reached((y,), xs)
        for i, x in enumerate(xs):
            if y.numel() and x.numel() and i not in found:
                raise RuntimeError(
                    f"Output {j} of the user-provided function is independent of input {i}. {_ALLOWED}."
                )


def check_ends(ys, xs, forward: bool) -> None:
    """Raise unless every input is one that some output depends on; ``forward``: and every output on some input."""
    refuse("strict=True")
    _check_outputs(ys)
    found = [reached((y,), xs) for y in ys]
    for i, x in enumerate(xs):
        if x.numel() and not any(i in inputs for inputs in found):
            raise RuntimeError(
                f"The output of the user-provided function is independent of input {i}. {_ALLOWED}."
            )
    for j, y in enumerate(ys):
        if forward and y.numel() and not found[j]:
            raise RuntimeError(
                f"Output {j} of the user-provided function is independent of the inputs. {_ALLOWED}."
            )


def check_varying(made, of: str) -> None:
    """Raise for results under ``create_graph`` that are constant; ``of`` are the ends that number them."""
    for i, t in enumerate(made):
        if not t.requires_grad:
            raise RuntimeError(
                f"The product with the Jacobian for {of} {i} is constant. {_ALLOWED} when create_graph=True."
            )


def check_blocks(rows) -> None:
    """Raise for blocks of a Jacobian under ``create_graph`` that are constant."""
    for j, row in enumerate(rows):
        for i, block in enumerate(row):
            block = block.values if isinstance(block, (Banded, Blocks)) else block
            if not block.requires_grad:
                raise RuntimeError(
                    f"The jacobian of output {j} with respect to input {i} is constant. This is not allowed in "
                    "strict mode when create_graph=True."
                )


def _check_outputs(ys) -> None:
    for j, y in enumerate(ys):
        if not y.requires_grad:
            raise RuntimeError(
                f"Output {j} of the user-provided function does not require gradients. The outputs must be "
                "computed in a differentiable manner from the input when running in strict mode."
            )
