"""Losses, a weight for every entry and then nothing, a mean or a sum; and their gradients, for graphs of gradients."""

from __future__ import annotations

import torch

from ..maps.layout import one
from . import rule
from .elementwise import Partials, Zero, flat
from .reduce import weigh

aten = torch.ops.aten


@rule("MseLoss", regular=True)
@rule(
    "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "HuberLoss", "SmoothL1Loss", "SoftMarginLoss"
)  # fmt: skip
def elementwise_loss(g):
    """A function of each pair of entries, then nothing, a mean or a sum."""
    shape, terms = tuple(g.tensor("self").shape), []
    if tuple(g.tensor("target").shape) != shape:
        return None
    for edge, s in enumerate(g.src):
        if s is None:
            continue
        if edge > 1 or g.values[s].shape != shape:
            return None
        s = weigh(g, g.cast(s), 0, edge)
        terms.append(s if g.saved("reduction") == 0 else g.sum(s, tuple(range(len(shape)))))
    return g.plus(terms)


@rule("NllLoss", "NllLoss2D", curve=flat)
@rule("MultiMarginLoss", "MultilabelMarginLoss")
def class_loss(g):
    """A loss for each sample (and pixel) over the classes, then nothing, a mean or a sum."""
    s = g.src[0]
    shape = g.values[s].shape
    n = len(shape)
    one_each = (0, *range(2, n)) if n > 1 else ()
    alone = g.saved("reduction") == 0 and g.shape == tuple(shape[a] for a in one_each)
    axes = tuple(a for a in range(n) if not (alone and a in one_each))
    return (g.sum(weigh(g, s, selects=True), axes), *[None] * (len(g.meta) - 1))


@rule("CtcLoss.0-1")
def ctc(g):
    """A loss for each sequence of ``log_probs`` (time, batch, class)."""
    s = g.src[0]
    shape = g.values[s].shape
    if len(shape) != 3 or g.shape != shape[1:2]:
        return None
    return (g.sum(weigh(g, s), (0, 2)), *[None] * (len(g.meta) - 1))


# -- gradients --------------------------------------------------------------------------------------

# node: (the op that it differentiates, the operands of that after the gradient of the loss)
GRADIENTS = {
    "BinaryCrossEntropyBackward": ("binary_cross_entropy_backward", "self target weight reduction"),
    "HuberLossBackward": ("huber_loss_backward", "self target reduction delta"),
    "MseLossBackward": ("mse_loss_backward", "self target reduction"),
    "SmoothL1LossBackward": ("smooth_l1_loss_backward", "self target reduction beta"),
    "SoftMarginLossBackward": ("soft_margin_loss_backward", "self target reduction"),
}


@rule(*GRADIENTS)
def gradient(g):
    """Linear in the gradient of the loss, which a reduced loss shares out among all entries."""
    name, operands = GRADIENTS[g.name.removesuffix("Backward0")]
    (s, *rest), m = g.src, g.meta[0]
    terms, partials = [], Partials(g)
    if s is not None:
        given, op = g.values[s].shape, getattr(aten, name)
        args = [g.saved(operand) for operand in operands.split()]
        terms.append(g.diagonal(g.match(s), lambda: op(one(m).expand(given), *args)))
    for edge, s in enumerate(rest, 1):
        if s is not None:
            terms.append(partials.diagonal(g, g.match(s), edge))
    return g.plus(terms)


@rule("NllLossBackward", "NllLoss2DBackward")
def class_gradient(g):
    """The gradient of the loss of each sample (and pixel), or of all, times what the node makes of each class."""
    g.check_memory()
    (s, *rest), shape, call, m = g.src, g.shape, g.call, g.meta[0]
    terms = [g.single(r, Zero()) for r in rest if r is not None]  # linear in the logarithms too
    if s is not None:
        given = g.values[s].shape
        lifted = (given[0], 1, *given[1:]) if given else (1,) * len(shape)

        def shares():
            with torch.enable_grad():
                u = torch.zeros(shape, dtype=m.dtype, device=m.device, requires_grad=True)
                out = call(u)
                out = out[0] if isinstance(out, tuple) else out
            return torch.autograd.grad(out, u, torch.ones_like(out))[0]

        terms.append(g.diagonal(g.expand(g.view(s, lifted), shape), shares))
    return g.plus(terms)
