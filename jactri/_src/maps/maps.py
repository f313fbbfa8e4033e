"""Linear maps of particular layers: fixed image ops, scatter, grid sampling, lazy batched products.

Convolution (`convolution`), normalisation and softmax (`low_rank`) have their own files. All follow the contract of
`linear_map.LinearMap`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..base.csr import Csr, stacked
from .contraction import MatMul
from .grids import sampled
from .linear_map import LinearMap
from .once import Formed
from .unmasked import Unmasked

LINES = 32
"""Lines that are pushed through an op at once to see its windows."""

HALF = (torch.float16, torch.bfloat16)


def wide(t: Tensor) -> Tensor:
    """Half precision in float32, in which reductions are accumulated; other dtypes as they are."""
    return t.float() if t.dtype in HALF else t


def fold(t: Tensor, tail: int) -> tuple[Tensor, tuple[int, ...]]:
    """A block as one batch axis and its last ``tail`` axes, with the batch that it was.

    Samples that share one block (stride 0) come as one sample.
    """
    lead = t.dim() - tail
    if 0 in t.stride():
        for a in range(1, lead):
            if t.stride(a) == 0 and t.shape[a] > 1:
                t = t.narrow(a, 0, 1)
    return t.reshape(-1, *t.shape[lead:]), tuple(t.shape[:lead])


def unfold(flat: Tensor, batch: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Tensor, bool]:
    """The inverse of `fold` around an op: ``shape`` is the leading shape of the block that was folded.

    Returns the block and whether it may be overwritten.
    """
    out = flat if len(batch) == 1 else flat.unflatten(0, batch)
    if batch == tuple(shape):
        return out, True
    return out.expand(*shape, *flat.shape[1:]), False


class Fixed(LinearMap):
    """A linear op without saved values that mixes the last ``tail`` axes only, as a resize of images does.

    ``push`` and ``pull`` take and return ``(batch, channels, *last axes)``. Where ``exact`` is false, autograd
    cannot differentiate them (as for some backward ops of images), and `Transposed` supplies the derivative.
    ``options`` determine the op; where they are given, it is a product of one op an axis, whose weights do not cancel.
    """

    __slots__ = ("_pull", "_push", "_work", "exact", "name", "options", "tail")
    structure, uniform = "window", True

    def __init__(
        self,
        name: str,
        tail: int,
        push: Callable[[Tensor], Tensor],
        pull: Callable[[Tensor], Tensor],
        work: float = 2.0,
        exact: bool = True,
        options: tuple | None = None,
    ):
        self.name, self.tail, self._push, self._pull = name, tail, push, pull
        self._work, self.exact, self.options = work, exact, options

    @property
    def key(self):
        return Fixed, self.name, self.tail, self._work, self.options

    def kept(self, in_shape, out_shape):
        return tuple((a, a) for a in range(len(in_shape) - self.tail))

    def work(self, in_shape, out_shape, reverse):
        # `_work` is for an output; the pull does as much in all, spread over the inputs
        return self._work * (prod(out_shape) / max(1, prod(in_shape)) if reverse else 1.0)

    def narrow(self, source, target, in_shape, out_shape):
        return self

    def windows(self, in_shape, out_shape):
        if self.options is None:
            return ()
        return tuple((a, a) for a in range(len(in_shape) - self.tail, len(in_shape)))

    def support(self, axis, in_shape, out_shape):
        """Found by looking: lines along the axis, alike along the others, on the CPU."""
        size, n = in_shape[-self.tail :], in_shape[axis]
        at = axis - len(in_shape)
        found = []  # of each line, where it is seen
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            for first in range(0, n, LINES):
                lines = torch.zeros(min(LINES, n - first), n, device="cpu")
                lines.diagonal(first).fill_(1)
                shape = [1] * self.tail
                shape[at] = n
                images = lines.view(len(lines), 1, *shape).expand(-1, 1, *size).contiguous()
                seen = self._push(images) != 0
                others = [d for d in range(1, seen.dim()) if d != at % seen.dim()]
                seen = seen.any(others) if others else seen
                found.append(Csr.of_dense(seen.numpy()))
        return stacked(found).T

    def _run(self, t: Tensor, op, transposed):
        flat, batch = fold(t, self.tail + 1)
        if self.exact or not torch.is_grad_enabled():
            out = op(flat)
        else:
            out = Transposed.apply(flat, op, transposed)
        return unfold(out, batch, tuple(t.shape[: t.dim() - self.tail - 1]))

    def push(self, t, own):
        return self._run(t, self._push, self._pull)

    def pull(self, c, own):
        return self._run(c, self._pull, self._push)


class Transposed(torch.autograd.Function):
    """A linear op whose backward is the transposed op, and the reverse: differentiable any number of times."""

    @staticmethod
    def forward(ctx, x, op, transposed):
        ctx.ops = op, transposed
        return op(x)

    @staticmethod
    def backward(ctx, g):
        op, transposed = ctx.ops
        return Transposed.apply(g, transposed, op), None, None


class Transpose(LinearMap):
    """Another map the other way round."""

    __slots__ = ("base",)

    def __init__(self, base: LinearMap):
        self.base = base

    @property
    def name(self):
        return self.base.name + " transposed"

    @property
    def structure(self):
        return self.base.structure

    @property
    def key(self):
        return Transpose, self.base.key

    def kept(self, in_shape, out_shape):
        return tuple((b, a) for a, b in self.base.kept(out_shape, in_shape))

    def windows(self, in_shape, out_shape):
        return tuple((b, a) for a, b in self.base.windows(out_shape, in_shape))

    def picks(self, in_shape, out_shape):
        return tuple((b, a) for a, b in self.base.picks(out_shape, in_shape))

    def support(self, axis, in_shape, out_shape):
        base, ends = self.base, (out_shape, in_shape)
        before = next(a for a, b in (*base.windows(*ends), *base.picks(*ends)) if b == axis)
        return base.support(before, *ends).T

    def links(self, in_shape, out_shape):
        found = self.base.links(out_shape, in_shape)
        return None if found is None else found.T

    @property
    def digest(self):
        return self.base.digest

    @property
    def chosen(self):
        return self.base.chosen

    def work(self, in_shape, out_shape, reverse):
        return self.base.work(out_shape, in_shape, not reverse)

    def reach(self, t, in_shape, out_shape, reverse, values):
        return self.base.reach(t, out_shape, in_shape, not reverse, values)

    def narrow(self, source, target, in_shape, out_shape):
        base = self.base.narrow(target, source, out_shape, in_shape)
        return None if base is None else Transpose(base)

    def push(self, t, own):
        return self.base.pull(t, own)

    def pull(self, c, own):
        return self.base.push(c, own)


class Batched(MatMul):
    """A `MatMul` by a matrix a sample ``(b, ., .)`` that is made at its first use."""

    __slots__ = ("_make", "forms")

    def __init__(
        self,
        make: Callable[[], Tensor],
        side: str,
        unmasked: Unmasked | None = None,
        forms: tuple[Formed, ...] = (),
    ):
        self._make, self.side, self.unmasked, self.forms = make, side, unmasked, forms
        self.key = (MatMul, side, 3)  # type: ignore[misc]
        self.structure = "batched matrix"

    @property
    def partner(self) -> Tensor:
        return self._make()

    uniform = False

    def narrow(self, source, target, in_shape, out_shape):
        make = self._make
        if source.axis not in (0, 2 if self.side == "right" else 1):
            return self
        unmasked = self._unmasked(source, in_shape)
        return Batched(
            lambda: self._cut(make(), source, target, len(in_shape)),
            self.side,
            unmasked,
            self.forms,
        )


class Sample(LinearMap):
    """Images ``(N, C, *size)`` interpolated at the places of a grid ``(N, *out, 2 or 3)`` (`grid_sample`).

    Seeds are folded into the channels, so that all of them share the weights of a place.
    """

    __slots__ = ("grid", "options", "size")
    name, structure = "grid sample", "window"

    def __init__(self, grid: Tensor, options: tuple, size: tuple[int, ...]):
        self.grid, self.options, self.size = grid, options, size

    def kept(self, in_shape, out_shape):
        return (0, 0), (1, 1)

    def work(self, in_shape, out_shape, reverse):
        total = 2.0 ** (len(self.size) + 1)
        return total * (prod(out_shape) / max(1, prod(in_shape)) if reverse else 1.0)

    @property
    def key(self):
        return Sample, self.size

    def narrow(self, source, target, in_shape, out_shape):
        if source.axis != 0:
            return self
        return Sample(source.of(self.grid, self.grid.dim()), self.options, self.size)

    def _pair(self):
        """Push and pull of ``(N, channels, ...)`` blocks."""
        aten, grid, options, size = torch.ops.aten, self.grid, self.options, self.size
        if grid.requires_grad and torch.is_grad_enabled():
            return self._differentiable()
        if len(size) == 2:
            op, back = aten.grid_sampler_2d, aten.grid_sampler_2d_backward
        else:
            op, back = aten.grid_sampler_3d, aten.grid_sampler_3d_backward

        def pull(c):
            x = c.new_empty(1).expand(*c.shape[:2], *size)
            return back(c.contiguous(), x, grid, *options, (True, False))[0]

        return lambda t: op(t, grid, *options), pull

    def _differentiable(self):
        """The same, of which the derivatives in the grid have derivatives themselves."""

        def push(t):
            return sampled(t, self.grid, self.options)

        def pull(c):
            u = c.new_zeros((*c.shape[:2], *self.size), requires_grad=True)
            return torch.autograd.grad(push(u), u, c, create_graph=True)[0]

        return push, pull

    def _run(self, t, op, transposed):
        k, n, c = t.shape[:3]
        flat = t.transpose(0, 1).reshape(n, k * c, *t.shape[3:])
        if torch.is_grad_enabled() and not self.grid.requires_grad:
            out = Transposed.apply(flat, op, transposed)
        else:
            out = op(flat)
        return out.reshape(n, k, c, *out.shape[2:]).transpose(0, 1), True

    def push(self, t, own):
        return self._run(t, *self._pair())

    def pull(self, c, own):
        push, pull = self._pair()
        return self._run(c, pull, push)
