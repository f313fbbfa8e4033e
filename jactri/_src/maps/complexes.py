"""Complex values inside of real functions: a value of shape ``s`` is one of pairs of reals, of shape ``(*s, 2)``.

Rules read complex ops as they read real ones, and emit linear maps between complex values. What such a map does to
complex numbers, `Complex` does to pairs (`read.complexes` puts it in the map's place). A pull is the adjoint: so
autograd has it, whose gradient of a real ``L`` in ``a + i b`` is ``dL/da + i dL/db``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contraction import MatMul
from .cut import Shape
from .linear_map import Diagonal, LinearMap, Scale


class Part(LinearMap):
    """A map that is none between complex numbers, and on pairs a simple one: ``kind`` says which.

    "embed": a real number as a complex one; "real": the real part; "conj": the conjugate; "same": a pair as a complex
    number, or the reverse.
    """

    __slots__ = ("kind",)

    def __init__(self, kind: str):
        self.kind = kind

    @property
    def key(self):
        return Part, self.kind


class Complex(LinearMap):
    """A map that takes and gives complex numbers, on pairs; ``before`` and ``after``: on which sides there are any."""

    __slots__ = ("_back", "after", "base", "before")

    def __init__(self, base: LinearMap, before: bool, after: bool):
        self.base, self.before, self.after = base, before, after
        self._back: LinearMap | None = None

    @property
    def name(self):
        return self.base.name

    @property
    def structure(self):
        both = self.before and self.after
        return ("complex " if both else "half complex ") + self.base.structure

    @property
    def key(self):
        return Complex, self.base.key, self.before, self.after

    def _shapes(self, in_shape: Shape, out_shape: Shape) -> tuple[Shape, Shape]:
        """Without the pairs."""
        before, after = len(in_shape) - self.before, len(out_shape) - self.after
        return in_shape[:before], out_shape[:after]

    def kept(self, in_shape, out_shape):
        return self.base.kept(*self._shapes(in_shape, out_shape))

    def work(self, in_shape, out_shape, reverse):
        return 2.0 * self.base.work(*self._shapes(in_shape, out_shape), reverse)

    def narrow(self, source, target, in_shape, out_shape):
        base = self.base.narrow(source, target, *self._shapes(in_shape, out_shape))
        return None if base is None else Complex(base, self.before, self.after)

    def reach(self, t, in_shape, out_shape, reverse, values):
        first, last = (self.after, self.before) if reverse else (self.before, self.after)
        t = t.amax(-1) if first else t
        t = self.base.reach(t, *self._shapes(in_shape, out_shape), reverse, values)
        return t.unsqueeze(-1) if last else t

    def forget(self) -> None:
        """Let derivatives go that can be computed again."""
        if isinstance(self.base, Diagonal):
            self.base.forget()
            self._back = None

    def push(self, t, own):
        out, own = self.base.push(numbers(t) if self.before else t, own)
        return pairs(out) if self.after else out, own

    def pull(self, c, own):
        if self._back is None:
            self._back = _conjugated(self.base)
        out, own = self._back.pull(numbers(c) if self.after else c, own)
        return pairs(out) if self.before else out, own


def _conjugated(m: LinearMap) -> LinearMap:
    """The map whose transpose is the adjoint of ``m``; of others, the pull is the adjoint, or there are reals only."""
    if isinstance(m, MatMul):
        return MatMul(m.partner.conj(), m.side)
    if isinstance(m, Scale):
        return Scale(m.factor.conjugate())
    if isinstance(m, Diagonal):
        d = m.d.conj().resolve_conj()
        m.forget()
        return Diagonal(d)
    return m


def numbers(t: Tensor) -> Tensor:
    """A block of pairs as complex numbers: a view, where its memory allows that."""
    if t.stride(-1) != 1 or t.storage_offset() % 2 or any(s % 2 for s in t.stride()[:-1]):
        t = t.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(t)


def pairs(t: Tensor) -> Tensor:
    """A complex tensor as a block of pairs."""
    return torch.view_as_real(t.resolve_conj())
