"""What a user's rule is told of a node, and the structures that it returns (see `custom`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..maps.contraction import MatMul
from ..maps.functional import Functional
from ..maps.linear_map import Diagonal
from ..rules.elementwise import Zero, fit
from .graph import Reader


class Place(NamedTuple):
    """What is known of an input or an output of a node before its values are."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Structure:
    """The dependence of one output on one input, as `Node`'s methods make it; for a rule to return."""

    __slots__ = ("emit",)

    def __init__(self, emit: Callable[[Reader, int, str], int]):
        self.emit = emit


class Bent(Diagonal):
    """An elementwise derivative, and the second one, where it was given."""

    __slots__ = ("bend",)

    def __init__(self, slope, bend):
        super().__init__(slope)
        self.bend = bend


class Node:
    """The node that a rule is asked for: what it saved, and the structures that a rule may return.

    Attributes:
        ctx: autograd's node. Of a Function it is the ``ctx`` that its forward filled; of torch's own ops it has what is
            saved as ``_saved_self`` and so on.
        name: ``ctx.name()``.
        inputs: shape, dtype and device of each tensor argument; None for one that no input of jactri's call reaches.
        outputs: those of each output.

    Examples:
        >>> class Flip(torch.autograd.Function):
        ...     forward = staticmethod(lambda ctx, x: x.flip(1))
        ...     backward = staticmethod(lambda ctx, grad: grad.flip(1))
        >>> def flip(node):  # blocks have K in front; samples, the axis 0, stay apart
        ...     return node.linear(lambda t: t.flip(2), lambda c: c.flip(2), kept=(0,))
        >>> with jactri.rule(Flip, linear=True)(flip):
        ...     jactri.jacobian(Flip.apply, torch.ones(1, 3), per_sample=True)
        tensor([[[0., 0., 1.],
                 [0., 1., 0.],
                 [1., 0., 0.]]])
    """

    __slots__ = ("_where", "ctx", "inputs", "name", "outputs")

    def __init__(self, g: Reader, where: str):
        self.ctx, self.name, self._where = g.node, g.name, where
        values = [None if s is None else g.values[s] for s in g.src]
        self.inputs = tuple(
            None if v is None else Place(v.shape, v.dtype, v.device) for v in values
        )
        self.outputs = tuple(Place(tuple(m.shape), m.dtype, m.device) for m in g.meta)

    def __repr__(self):
        return f"<{self.name}: {[p and p.shape for p in self.inputs]} to {[p.shape for p in self.outputs]}>"

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """What a Function's forward gave to ``ctx.save_for_backward``."""
        return self.ctx.saved_tensors

    def elementwise(
        self,
        slope: Tensor | float | Callable[[], Tensor],
        bend: Tensor | float | Callable[[], Tensor] | None = None,
    ) -> Structure:
        """Each entry of the output depends on one entry of the input (which may broadcast): ``dy = slope * dx``.

        Args:
            slope: a tensor or number that broadcasts to the output; a function without arguments is called at its first
                use.
            bend: the second derivative, alike, which `jactri.laplacian` uses where no other argument depends on x.
        """

        def emit(g, s, where):
            m = g.now
            d = _lazy(slope, m, "slope", where)
            return g.single(
                g.match(s), Bent(d, None if bend is None else _lazy(bend, m, "bend", where))
            )

        return Structure(emit)

    def mask(self, keep: Tensor | Callable[[], Tensor]) -> Structure:
        """``dy = dx`` where ``keep`` is true, and 0 elsewhere, whatever stands behind (0 times infinity is NaN).

        Args:
            keep: a boolean tensor that broadcasts to the output, or a function without arguments that gives one.
        """

        def emit(g, s, where):
            return g.mask(g.match(s), _lazy(keep, g.now, "mask", where))

        return Structure(emit)

    def matrix(self, matrix: Tensor) -> Structure:
        """A matrix on the last axis: ``dy[..., o] = sum_i matrix[o, i] dx[..., i]``.

        Args:
            matrix: ``(out, in)``, or one for each index of the axes before, ``(*axes, out, in)``: for an input ``(N,
                in)``, a matrix a sample.
        """

        def emit(g, s, where):
            if not isinstance(matrix, Tensor) or matrix.dim() < 2:
                raise TypeError(
                    f"{where}: matrix needs a tensor of two axes or more, got {said(matrix)}"
                )
            shape, out, lead = g.values[s].shape, g.shape, tuple(matrix.shape[:-2])
            wanted = (out[-1:] + shape[-1:]) if out and shape else None
            if (
                wanted != tuple(matrix.shape[-2:])
                or shape[:-1] != out[:-1]
                or lead not in ((), shape[:-1])
            ):
                raise ValueError(
                    f"{where}: a matrix {tuple(matrix.shape)} does not take an input {shape} to an output {out}: it "
                    "needs (out, in) or (*axes, out, in), and the axes before the last must be the same"
                )
            m = fit(matrix, g.now).mT
            if not lead:
                rows = g.cast(s if len(shape) > 1 else g.view(s, (1, *shape)))
                inner = g.values[rows].shape
                return g.view(g.single(rows, MatMul(m, "right"), (*inner[:-1], out[-1])), out)
            count = m.numel() // max(m.shape[-1] * m.shape[-2], 1)
            rows = g.view(g.cast(s), (count, 1, shape[-1]))
            edge = MatMul(m.reshape(count, *m.shape[-2:]), "right")
            return g.view(g.single(rows, edge, (count, 1, out[-1])), out)

        return Structure(emit)

    def linear(
        self,
        push: Callable[[Tensor], Tensor],
        pull: Callable[[Tensor], Tensor],
        kept: Sequence = (),
    ) -> Structure:
        """Any linear map, by its action on blocks of K tangents or cotangents.

        Args:
            push: takes ``(K, *input)`` to ``(K, *output)``: a jvp of each. Differentiable, under ``create_graph``.
            pull: takes ``(K, *output)`` to ``(K, *input)``: a vjp of each. Differentiable, under ``create_graph``.
            kept: the axes that the map does not mix, as ``a`` or as ``(input axis, output axis)``: the batch axis, say,
                by which samples are known to be apart. It is what makes a sweep short.
        """

        def emit(g, s, where):
            a, b = g.values[s].shape, g.shape
            pairs = _pairs(kept, a, b, where)

            def run(what, function, to, dtype):
                def call(block):
                    out = function(block)
                    if not isinstance(out, Tensor) or out.shape != (block.shape[0], *to):
                        raise ValueError(
                            f"{where}: {what} of a block {tuple(block.shape)} must return a tensor "
                            f"{(block.shape[0], *to)}, got {said(out)}"
                        )
                    return out.to(dtype)

                return call

            maps = run("push", push, b, g.dtype), run("pull", pull, a, g.values[s].dtype)
            return g.emit([(s, Functional(where, *maps, pairs))], b)

        return Structure(emit)

    def identity(self) -> Structure:
        """``dy = dx``; the input may broadcast."""
        return Structure(lambda g, s, where: g.match(s))

    def zero(self) -> Structure:
        """No dependence."""
        return Structure(lambda g, s, where: g.single(g.match(s), Zero()))


class Output(Reader):
    """A reader that stands at one output of the current node of another, and emits into it."""

    def __init__(self, base: Reader, nr: int):
        self.values, self._key, self.node, self.src = base.values, base._key, base.node, base.src
        self.name, self._same = base.name, base._same
        self.meta, self.now = base.meta, base.meta[nr]
        m = self.now
        self.shape, self.dtype, self.device = tuple(m.shape), m.dtype, m.device


def said(x) -> str:
    """What a user gave, for messages."""
    return f"one of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def _lazy(d, meta, what: str, where: str) -> Callable[[], Tensor]:
    def make() -> Tensor:
        t = d() if callable(d) else d
        t = (
            torch.as_tensor(t, dtype=meta.dtype, device=meta.device)
            if isinstance(t, int | float)
            else t
        )
        if not isinstance(t, Tensor):
            raise TypeError(f"{where}: the {what} must be a tensor or a number, got {said(t)}")
        try:
            return fit(t, meta).expand(tuple(meta.shape))
        except RuntimeError:
            raise ValueError(
                f"{where}: the {what} must broadcast to the output {tuple(meta.shape)}, got {said(t)}"
            ) from None

    return make


def _pairs(kept, a, b, where: str) -> tuple[tuple[int, int], ...]:
    pairs = []
    for entry in (kept,) if isinstance(kept, int) else kept:
        i, j = (entry, entry) if isinstance(entry, int) else entry
        if not (-len(a) <= i < len(a) and -len(b) <= j < len(b)) or a[i] != b[j]:
            raise ValueError(
                f"{where}: axis {i} of an input {a} cannot be kept as axis {j} of an output {b}"
            )
        pairs.append((i % len(a), j % len(b)))
    if any(len({p[k] for p in pairs}) < len(pairs) for k in (0, 1)):
        raise ValueError(f"{where}: kept={kept} names an axis twice")
    return tuple(sorted(pairs))
