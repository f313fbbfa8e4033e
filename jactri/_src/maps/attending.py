"""A whole attention as one map of its q, k and v, which share the probabilities, never formed as a whole.

Its parts, each a map of its own (see `rules.attention`), have blocks of the size of the probabilities, but keep queries
or keys apart. By `attention` in torch's ops, or by `kernels.attention`.

What it gives can be differentiated: a push is linear in its tangents, where its gradient is a pull, and a pull in its
cotangents, where it is a push; in q, k and v both have one gradient (`attention.bend`). That of the last, a third
derivative, is autograd's of the whole written out, with the probabilities in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ..base import backends
from ..base.rowwise import Rowwise, rowwise
from ..device import chooser
from ..device.attending import AttentionKind, Product
from ..device.chooser import Way
from .attention import Attention, Blocks, bend, pull, push, pushed_as_a_whole
from .cut import Cut
from .joint import given
from .linear_map import LinearMap
from .maps import wide

Wanted = tuple[bool, ...]
"""Which of q, k and v."""


class Attend(LinearMap):
    """An attention from one of its q, k and v: number ``place`` of a ``whole``.

    Alone it forms the probabilities for itself. `Whole.join` takes all that are pushed; what is pulled to the others is
    kept until they ask for it.
    """

    __slots__ = ("place", "whole")
    name, structure = "attention", "function"

    def __init__(self, whole: Whole, place: int):
        self.whole, self.place = whole, place

    @property
    def key(self):
        of = self.whole.of
        return Attend, self.place, of.sizes, self.whole.wanted, of.causal

    @property
    def twice(self):
        mask = self.whole.of.mask
        return mask is None or not mask.requires_grad

    @property
    def entries(self):
        """Every chunk of seeds forms the probabilities again: what could be read in that time, about."""
        B, H, _, T, S, d, _ = self.whole.of.sizes
        return B * H * T * S * (2 + d // 16) // sum(self.whole.wanted)

    def kept(self, in_shape, out_shape):
        return ((0, 0),)

    def work(self, in_shape, out_shape, reverse):
        ends = in_shape if reverse else out_shape
        whole = self.whole.kind(1, self.whole.of.q.dtype, reverse, self._alone)
        return whole.each / max(1, prod(ends)) * self.whole.of.sizes[0] / whole.batch

    def narrow(self, source, target, in_shape, out_shape):
        return Attend(self.whole.narrow(source), self.place) if source.axis == 0 else None

    @property
    def _alone(self) -> Wanted:
        return tuple([n == self.place for n in range(3)])

    def push(self, t, own):
        return self.whole.join({self.place: t}), True

    def pull(self, c, own):
        return self.whole.pull(c, self._alone)[self.place], True

    def apply(self, data, own, layout, route, reverse, sel, like):
        if not reverse:
            return super().apply(data, own, layout, route, reverse, sel, like)
        whole, how = self.whole, (layout, route.mid, sel)
        made = whole.kept(self.place, data, how)
        if made is None:
            block, _ = given(data, False, layout, route.mid, sel, like)
            made = whole.keep(self.place, data, how, whole.pull(block, whole.wanted))
        return made, True


class Whole:
    """An attention, from those of its q, k and v that are ``wanted``."""

    def __init__(self, of: Attention, wanted: Wanted):
        self.of, self.wanted = of, wanted
        self._found: dict[str, object] = {}
        self._kept: tuple[Tensor | None, tuple, list[Tensor | None]] | None = None
        self._part: tuple[Cut, Whole] | None = None

    def narrow(self, cut: Cut) -> Whole:
        """That of a range of samples, the same for all of its maps."""
        if self._part is None or self._part[0] != cut:
            self._part = cut, Whole(self.of.of(cut), self.wanted)
        return self._part[1]

    def join(self, blocks: dict[int, Tensor]) -> Tensor:
        return self.push([blocks.get(n) for n in range(3)])

    def push(self, tangents: Blocks) -> Tensor:
        """Blocks (K, *of its tensor) of q, k and v, None for zeros, to (K, B, H, T, e)."""
        of = self.of
        if torch.is_grad_enabled():
            how = of.causal, of.scale
            return _Push.apply(how, of.q, of.k, of.v, of.mask, *tangents)[0]
        some = next(t for t in tangents if t is not None)
        wanted = tuple([t is not None for t in tangents])
        kind = self.kind(some.shape[0], some.dtype, False, wanted)

        def cut(n: int, dtype: torch.dtype | None) -> tuple[Attention, Blocks]:
            part = [None if t is None else _first(t, n, dtype) for t in tangents]
            return of.of(Cut(0, 0, n), dtype), part

        def steps(n: int, dtype: torch.dtype | None) -> Tensor:
            return push(*cut(n, dtype))

        def kernels(n: int, way: Way, out) -> Tensor:
            from ...kernels import attention as kernels

            part, blocks = cut(n, None)
            return kernels.push(*self._launched(part, way), blocks, **_options(way))

        made = self._by_kernels(some, Product(kind, of.sizes[0], steps, kernels))
        return push(of, tangents) if made is None else made

    def pull(self, c: Tensor, wanted: Wanted) -> list[Tensor | None]:
        """Blocks (K, B, H, T, e) to those of q, k and v that are wanted, each in memory of its own."""
        of = self.of
        ends = of.q, of.k, of.v
        if torch.is_grad_enabled():
            how = of.causal, of.scale
            return _apart(_Pull.apply(how, wanted, *ends, of.mask, c), wanted)
        kind = self.kind(c.shape[0], c.dtype, True, wanted)

        def room(n: int, dtype: torch.dtype | None) -> tuple[Tensor, Blocks]:
            """Memory for a check: one tensor, and its parts."""
            sizes = [prod(x.shape[1:]) * w for x, w in zip(ends, wanted, strict=True)]
            whole = c.new_empty(c.shape[0], n, sum(sizes), dtype=dtype or c.dtype)
            parts = zip(whole.split(sizes, -1), ends, wanted, strict=True)
            return whole, [p.unflatten(-1, x.shape[1:]) if w else None for p, x, w in parts]

        def steps(n: int, dtype: torch.dtype | None) -> Tensor:
            whole, parts = room(n, dtype)
            pull(of.of(Cut(0, 0, n), dtype), _first(c, n, dtype), parts)
            return whole

        def kernels(n: int, way: Way, out) -> Tensor:
            from ...kernels import attention as kernels

            whole, parts = room(n, None) if out is None else (c, out)
            found = self._launched(of.of(Cut(0, 0, n)), way)
            kernels.pull(*found, _first(c, n, None), parts, **_options(way))
            return whole

        into = [
            c.new_empty(len(c), *x.shape) if w else None for x, w in zip(ends, wanted, strict=True)
        ]
        if self._by_kernels(c, Product(kind, of.sizes[0], steps, kernels), into) is None:
            pull(of, c, into)
        return into

    def kept(self, place: int, data: Tensor | None, how: tuple) -> Tensor | None:
        """What was pulled for one of its maps when another asked, from the same block; it is given once."""
        if self._kept is None or self._kept[0] is not data or self._kept[1] != how:
            return None
        return self.keep(place, *self._kept)

    def keep(
        self, place: int, data: Tensor | None, how: tuple, made: list[Tensor | None]
    ) -> Tensor | None:
        """One of the results, the others being kept."""
        found, made[place] = made[place], None
        self._kept = (data, how, made) if any(m is not None for m in made) else None
        return found

    def kind(
        self, columns: int, dtype: torch.dtype, reverse: bool, wanted: Wanted
    ) -> AttentionKind:
        mask = self.of.mask
        seen = "" if mask is None else "boolean" if mask.dtype == torch.bool else "added"
        return AttentionKind.of(
            reverse, columns, self.of.sizes, wanted, seen, self.of.causal, dtype, self.of.q.device
        )  # fmt: skip

    def _by_kernels(self, t: Tensor, problem: Product, into=None) -> Tensor | None:
        """The result by kernels, in ``into`` if given; None where none runs, or torch is better."""
        if not backends.kernels_for(t) or t.dtype != self.of.q.dtype or not problem.what.offers():
            return None
        return chooser.run(problem, into)

    def _launched(self, of: Attention, way: Way) -> tuple:
        """What kernels take first: the attention of some samples, and what its forward left."""
        from ...kernels import attention as kernels

        ends = of.q, of.k, of.v, kernels.Seen(of.mask, of.causal), of.scale
        whole = of.sizes == self.of.sizes
        found = self._found.get(way.dot) if whole else None
        if found is None:
            found = kernels.forward(*ends, precision=way.dot)
            if whole:
                self._found[way.dot] = found
        return *ends, found


def _options(way: Way) -> dict:
    return {"precision": way.dot, "config": way.config}


def _first(t: Tensor, n: int, dtype: torch.dtype | None) -> Tensor:
    """Of a block, the first n samples."""
    return t[:, :n] if dtype is None else t[:, :n].to(dtype)


# -- derivatives ------------------------------------------------------------------------------------
#
# ``how``: whether it is causal, and the scale. ``wanted``: of q, k and v; what is not wanted is left out of a result.


class _Push(Rowwise):
    """`Whole.push`, as autograd follows it."""

    @staticmethod
    def forward(how, q, k, v, mask, *tangents):
        return (Whole(Attention(q, k, v, mask, *how), ALL).push(tangents),)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.how = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    @rowwise
    def backward(ctx, c):
        ends, wanted = ctx.needs_input_grad[1:4], ctx.needs_input_grad[5:]
        of, tangents = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        bent = _Bend.apply(ctx.how, ends, *of, c, *tangents) if any(ends) else ()
        pulled = _Pull.apply(ctx.how, wanted, *of, c) if any(wanted) else ()
        return None, *_apart(bent, ends), None, *_apart(pulled, wanted)


class _Pull(Rowwise):
    """`Whole.pull`, as autograd follows it."""

    @staticmethod
    def forward(how, wanted, q, k, v, mask, c):
        return _some(Whole(Attention(q, k, v, mask, *how), ALL).pull(c, wanted))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.how, ctx.wanted = inputs[:2]
        ctx.save_for_backward(*inputs[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @rowwise
    def backward(ctx, *cotangents):
        ends, own = ctx.needs_input_grad[2:5], ctx.needs_input_grad[6]
        *of, c = ctx.saved_tensors
        tangents = _apart(cotangents, ctx.wanted)
        some = any(t is not None for t in cotangents)
        bent = (
            _Bend.apply(ctx.how, ends, *of, c, *tangents)
            if some and any(ends)
            else (None,) * sum(ends)
        )
        pushed = _Push.apply(ctx.how, *of, *tangents)[0] if some and own else None
        return None, None, *_apart(bent, ends), None, pushed


class _Bend(Rowwise):
    """The gradients of ``sum_k c_k . J t_k`` in q, k and v (`attention.bend`)."""

    @staticmethod
    def forward(how, wanted, q, k, v, mask, c, *tangents):
        into = [torch.empty_like(x) if w else None for x, w in zip((q, k, v), wanted, strict=True)]
        bend(Attention(q, k, v, mask, *how), tangents, c, into)
        return _some(into)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.how, ctx.wanted = inputs[:2]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    @rowwise
    def backward(ctx, *cotangents):
        """By torch.func, of all of it written out: with the probabilities in memory."""
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        at = [n for n, need in enumerate(needed) if need]
        wanted = [n for n, want in enumerate(ctx.wanted) if want]

        def bent(*varied):
            inputs = dict(enumerate(saved)) | dict(zip(at, varied, strict=True))

            def form(*ends):
                q, k, v, mask, c, *tangents = (
                    inputs | dict(zip(wanted, ends, strict=True))
                ).values()
                pushed = pushed_as_a_whole(Attention(q, k, v, mask, *ctx.how), tangents)
                return (wide(c) * pushed).sum()

            return torch.func.grad(form, tuple(range(len(wanted))))(*[inputs[n] for n in wanted])

        made = torch.func.vjp(bent, *[saved[n] for n in at])[1](cotangents)
        return None, None, *_apart(made, needed)


ALL = True, True, True


def _some(blocks: Blocks) -> tuple[Tensor, ...]:
    return tuple([t for t in blocks if t is not None])


def _apart(some: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """What was left out as None."""
    found = iter(some)
    return [next(found) if w else None for w in wanted]
