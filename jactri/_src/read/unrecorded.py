"""Backward code that autograd does not record: it has no second derivative, and that is not zero.

The backward of an ``autograd.Function`` may use NumPy, ``.detach()``, ``no_grad`` or ``once_differentiable``; autograd
then differentiates what is left, or nothing. No attribute says so, but two facts tell. A pull ``g(c)`` is linear in its
cotangent, so that ``<dg/dc, c>`` must give back ``g`` (Euler's theorem on homogeneous functions); and what autograd
says of its change with the saved tensors must be the change that is seen when they are varied.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ..base.classes import plain
from ..base.constants import arbitrary

ERROR = torch._C._functions.Error
"""The class of the nodes that ``once_differentiable`` leaves: they lead nowhere."""

MARKED = (
    "the function holds a derivative through an autograd.Function that is marked with once_differentiable (the node "
    "torch::autograd::Error): autograd does not record its backward, so there is no further derivative; write that "
    "backward in torch's ops without the mark"
)

SPARSE = {
    f"{op}Backward0"
    for op in ("SparseCooTensorWithDimsAndTensors", "SparseCompressedTensor", "ToSparseCsr", "ToSparseCsc")
}  # fmt: skip
"""Torch's own nodes that take the values out of a sparse gradient, which autograd does not record."""

# what backward code of other people may say to arguments that it has not seen
UNUSUAL = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError)

Select = Callable[[object], list[Tensor]]
"""The gradients asked for, of what a backward returned."""

_warned: weakref.WeakSet[type] = weakref.WeakSet()


class Unrecorded(torch.autograd.Function):
    """Tensors as they are, which are not what autograd can differentiate: whoever does is told ``why``.

    ``anchors``: tensors whose graph holds all that the values depend on.
    """

    @staticmethod
    def forward(ctx, why: str, count: int, *tensors: Tensor):
        ctx.why = why
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.why)


def guarded(values: list[Tensor], anchors, why: str) -> list[Tensor]:
    """Values that raise ``why`` when they are differentiated by anything that the anchors depend on."""
    return list(Unrecorded.apply(why, len(values), *values, *anchors)) if values else values


def loose(dtype: torch.dtype) -> float:
    """A relative error that rounding does not reach, and a wrong result does not stay below."""
    return min(1e4 * torch.finfo(dtype).eps, 0.1)


def tight(dtype: torch.dtype) -> float:
    """`loose` of sums of many terms, in which rounding cancels and a term that is missing may nearly do."""
    return min(300 * torch.finfo(dtype).eps, 0.1)


def cause(node, meta, select: Select) -> str | None:
    """Why no second derivative goes through a node of other people, or None if nothing speaks against it.

    Warns, once a Function, where that cannot be told. Cost: about ten calls of its backward.
    """
    found = _cut(node, meta, select)
    if found is None:
        return None
    return (
        f"{_name(node)} has no second derivative: {found}. Write its backward in torch's ops on ctx.saved_tensors "
        "(inputs and outputs only), without once_differentiable, no_grad, .detach() or NumPy"
    )


def sparse_cause(node) -> str:
    """The same of a node of `SPARSE`."""
    return (
        f"{node.name()} has no second derivative: autograd does not record that its backward takes values out of a "
        "sparse gradient. Put the values into a dense tensor (index_put, index_add) where derivatives go through them"
    )


def _name(node) -> str:
    kind = getattr(node, "_forward_cls", None)
    return node.name() if kind is None else f"the autograd.Function {kind.__qualname__}"


def _cut(node, meta, select: Select) -> str | None:
    python = isinstance(node, torch.autograd.function.BackwardCFunction)
    cotangents = _cotangents(meta)
    with torch.enable_grad():
        try:
            found = _products(node.apply if python else node, cotangents, select)
        except UNUSUAL as error:  # if it says so without grad as well, it will reach the caller
            said = str(error).split("\n")[0]
            return f"its backward does not take a cotangent that requires grad ({said})"
        try:
            lost = _lost(found, cotangents)
        except RuntimeError:
            return None  # it refuses by itself, whenever it is differentiated
    if lost:
        return "its backward is not recorded by autograd"
    return _saved(node, cotangents, select) if python and found else None


def _cotangents(meta) -> list[Tensor]:
    made = []
    for i, m in enumerate(meta):
        if m.dtype.is_floating_point or m.dtype.is_complex:
            c = _numbers(tuple(m.shape), m, i).requires_grad_()
        else:
            c = torch.zeros(tuple(m.shape), dtype=m.dtype, device=m.device)
        made.append(c)
    return made


def _numbers(shape, like, i: int) -> Tensor:
    """Numbers of no structure, others for every ``i``."""
    return arbitrary(shape, like, 2.399963 + 0.137 * i)


def _products(backward, cotangents, select: Select) -> list[Tensor]:
    """The gradients that a backward gives; it gets memory of its own, which it may write to."""
    found = select(backward(*[c.clone() for c in cotangents]))
    return [g for g in found if g.is_floating_point() or g.is_complex()]


def _weighted(gradients, aligned: bool = False) -> list[Tensor]:
    """Each gradient times numbers of no structure, as a real vector; their sum is one number to differentiate.

    ``aligned``: with its signs, so that nothing cancels in the sum.
    """
    made = []
    for i, g in enumerate(gradients):
        g = torch.view_as_real(g) if g.is_complex() else g
        w = _numbers(g.shape, g, i + 7)
        made.append((g.detach().sign() * (1 + 0.5 * w) if aligned else w) * g)
    return made


def _along(parts, wrt, directions) -> float:
    """The derivative of the sum of the parts along the directions, as autograd has it."""
    parts = [p for p in parts if p.requires_grad]
    if not parts:
        return 0.0
    total = torch.stack([p.double().sum() for p in parts]).sum()
    back = torch.autograd.grad(total, wrt, retain_graph=True, allow_unused=True)
    return sum(
        float((b.conj() * d).real.double().sum())
        for b, d in zip(back, directions, strict=True)
        if b is not None
    )


def _lost(gradients, cotangents) -> bool:
    """Whether autograd lost a part of what is linear in the cotangents."""
    parts = [p for p in _weighted(gradients, True) if p.numel()]
    if not parts:
        return False
    live = [c for c in cotangents if c.requires_grad]
    size = sum(float(p.detach().double().sum()) for p in parts)
    if not size < float("inf"):
        return not any(p.requires_grad for p in parts)
    said = _along(parts, live, [c.detach() for c in live])
    return abs(size - said) > loose(parts[0].dtype) * size


# -- what was saved ---------------------------------------------------------------------------------


class _Context:
    """A Function's ctx, with other values of what it saved and of its tensor attributes."""

    def __init__(self, node, saved, attributes):
        self.__dict__.update(attributes)
        self.saved_tensors, self._node = saved, node

    def __getattr__(self, name):
        return getattr(self._node, name)


def _varying(x) -> bool:
    return (
        isinstance(x, Tensor)
        and x.is_floating_point()
        and x.layout is torch.strided
        and x.numel() > 0
    )


class _Replay:
    """A Function's backward as a function of the values that it saved."""

    def __init__(self, node, cotangents, select: Select, wide: bool):
        kind, self.select = node._forward_cls, select
        other = kind.vjp is not torch.autograd.Function.vjp
        self.node, self.call, self.wide = node, kind.vjp if other else kind.backward, wide
        self.cotangents = [self._own(c) for c in cotangents]
        self.saved = [self._own(s) for s in node.saved_tensors]
        self.attributes = {k: self._own(v) for k, v in vars(node).items() if isinstance(v, Tensor)}
        every = [*node.saved_tensors, *(v for v in vars(node).values() if isinstance(v, Tensor))]
        mine = [*self.saved, *self.attributes.values()]
        pairs = [(m, e) for m, e in zip(mine, every, strict=True) if _varying(m)]
        self.followed = [m for m, e in pairs if e.requires_grad]  # to an input or an output
        self.others = [m for m, e in pairs if not e.requires_grad]
        # arguments that need no gradient are constants, and parameters nobody's result
        constants = sum(p is None for p, _ in node.next_functions)
        if len(self.others) <= constants or all(
            e.requires_grad or isinstance(e, torch.nn.Parameter) for _, e in pairs
        ):
            self.others = []

    def _own(self, x):
        if not _varying(x):
            return x
        return plain(x.detach()).clone().to(torch.float64 if self.wide else x.dtype)

    def __call__(self, moved: dict[int, Tensor]) -> list[Tensor]:
        """The weighted gradients; ``moved``: other values, by the id of those here."""
        saved = tuple(moved.get(id(s), s) for s in self.saved)
        attributes = {k: moved.get(id(v), v) for k, v in self.attributes.items()}
        context = _Context(self.node, saved, attributes)
        with torch.enable_grad():
            found = _products(lambda *c: self.call(context, *c), self.cotangents, self.select)
            return _weighted(found)


def _saved(node, cotangents, select: Select) -> str | None:
    """Why the change of a backward with what it saved is not what autograd says, or None."""
    for wide in (True, False):  # in float64 if it can be
        if not wide and cotangents[0].dtype not in (torch.float32, torch.float64):
            return None
        try:
            replay = _Replay(node, cotangents, select, wide)
            if not (replay.followed or replay.others):
                return None
            lost = any(_differs(replay, d) for d in _directions(replay.followed))
            unknown = not lost and _depends(replay)
        except UNUSUAL:
            continue
        if lost:
            return "its backward uses saved tensors in a way that autograd does not record"
        if unknown and node._forward_cls not in _warned:
            _warned.add(node._forward_cls)
            warnings.warn(
                f"the backward of {_name(node)} uses a tensor that is neither its input nor its output. If it was "
                "computed from the input, second derivatives lack a part of theirs, here as in torch: save inputs "
                "and outputs only, and compute the rest in backward",
                stacklevel=2,
            )
        return None
    return None


def _directions(values) -> list[list[Tensor]]:
    """Ways to vary values: in proportion, which keeps zeros and signs; and zeros alone, where there are any."""
    if not values:
        return []
    noise = [_numbers(v.shape, v, i + 3) for i, v in enumerate(values)]
    ways = [[v * n for v, n in zip(values, noise, strict=True)]]
    if any(bool((v == 0).any()) for v in values):
        ways.append([torch.where(v == 0, n, 0) for v, n in zip(values, noise, strict=True)])
    return ways


def _differs(replay: _Replay, direction) -> bool:
    """Whether the change along a direction is smooth, and another than autograd says."""
    values = replay.followed
    leaves = [v.clone().requires_grad_() for v in values]
    parts = replay({id(v): x for v, x in zip(values, leaves, strict=True)})
    said = _along(parts, leaves, direction)
    size = sum(float(p.detach().abs().sum()) for p in parts)

    def change(h: float) -> Tensor:
        ends = []
        for step in (h, -h):
            moved = {id(v): v + step * d for v, d in zip(values, direction, strict=True)}
            ends.append(torch.cat([p.detach().double().flatten() for p in replay(moved)]))
        return (ends[0] - ends[1]) / (2 * h)

    # the step at which rounding and curvature cost about the same
    unit = torch.finfo(values[0].dtype).eps
    h = unit ** (1 / 3)
    seen = change(h)
    gap = abs(float(seen.sum()) - said)
    noise = 10 * unit ** (1 / 3) * float(seen.norm()) + 10 * unit * size / h
    if not gap > noise:
        return False
    # at a kink the change depends on the step
    return abs(float(change(h / 2).sum()) - float(seen.sum())) < 0.1 * gap


def _depends(replay: _Replay) -> bool:
    """Whether a backward uses values that autograd does not follow."""
    if not replay.others:
        return False
    (way, *_) = _directions(replay.others)
    moved = {id(v): v + 0.01 * d for v, d in zip(replay.others, way, strict=True)}
    return any(
        bool(((a - b).abs() > 1e-6 * a.abs().max()).any())
        for a, b in zip(replay({}), replay(moved), strict=True)
        if a.numel()
    )
