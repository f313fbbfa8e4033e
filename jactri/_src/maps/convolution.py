"""The linear maps of a convolution: in its input, and in its weight.

Blocks are convolved with their seeds folded into the batch, ``(K, N, C, ...)`` as ``(K * N, C, ...)``; on a CPU in
float32 as `packed` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.csr import Csr
from ..base.weights import made_of
from .linear_map import LinearMap
from .maps import fold, unfold
from .packed import Packed, by_columns, quick, small


class Geometry:
    """The arguments of one convolution: one entry a spatial axis."""

    __slots__ = ("dilation", "groups", "output_padding", "padding", "stride", "transposed")

    def __init__(self, stride, padding, dilation, transposed, output_padding, groups):
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.transposed, self.output_padding, self.groups = transposed, output_padding, groups

    @property
    def key(self) -> tuple:
        return (
            self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups,
        )  # fmt: skip

    def planar(self) -> Geometry:
        """Of lines: the same for images of one row."""
        return Geometry(
            (1, *self.stride), (0, *self.padding), (1, *self.dilation), self.transposed, (0, *self.output_padding),
            self.groups,
        )  # fmt: skip

    def run(self, x: Tensor, w: Tensor, groups: int | None = None) -> Tensor:
        return torch.convolution(
            x, w, None, self.stride, self.padding, self.dilation, self.transposed, self.output_padding,
            groups or self.groups,
        )  # fmt: skip

    def flipped(self, size: tuple[int, ...], out: tuple[int, ...], kernel) -> Geometry:
        """The convolution that is the pull, with the same weight, from images of ``out`` to those of ``size``.

        Where not `exact`, its result has more entries behind those of ``size``.
        """
        transposed = not self.transposed
        extra = (0,) * len(size)
        if (
            transposed
        ):  # rows of the input that no window reached are the output padding of the pull
            extra = tuple(
                n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
                for n, m, s, p, d, k in zip(
                    size, out, self.stride, self.padding, self.dilation, kernel, strict=True
                )
            )
        return Geometry(self.stride, self.padding, self.dilation, transposed, extra, self.groups)

    def fine(self, coarse, kernel) -> tuple[int, ...]:
        """The larger images, of a transposed convolution's results, for those of ``coarse``."""
        return tuple(
            (m - 1) * s - 2 * p + d * (k - 1) + e + 1
            for m, s, p, d, k, e in zip(
                coarse,
                self.stride,
                self.padding,
                self.dilation,
                kernel,
                self.output_padding,
                strict=True,
            )
        )

    @property
    def exact(self) -> bool:
        """Whether the pull ends where the input does: not with an output padding that only the dilation allows."""
        return not self.transposed or all(
            e < s for e, s in zip(self.output_padding, self.stride, strict=True)
        )

    def run_transposed(self, c: Tensor, w: Tensor, size: tuple[int, ...]) -> Tensor:
        """The pull to inputs of the spatial ``size``."""
        out = self.flipped(size, c.shape[2:], w.shape[2:]).run(c, w)
        if not self.exact:
            for a, n in enumerate(size):
                out = out.narrow(a + 2, 0, n)
        return out


@dataclass(frozen=True)
class Folded:
    """How a weight is made (``key``), and of which other tensors (``given``)."""

    key: tuple
    make: Callable[[], Tensor]
    given: tuple[Tensor, ...]
    shape: tuple[int, ...]


class Conv(LinearMap):
    """A convolution (or a transposed one) as a map of its input ``(N, C, *size)``.

    ``folded``: how its weight is made of that and other tensors (see `folding`), when it is first needed.
    """

    __slots__ = ("_folded", "_made", "_packed", "_weight", "geometry", "shape", "size")
    name, structure, uniform = "convolution", "convolution", True

    def __init__(
        self,
        weight: Tensor,
        geometry: Geometry,
        size: tuple[int, ...],
        folded: Folded | None = None,
    ):
        self._weight, self.geometry, self.size, self._folded = weight, geometry, size, folded
        self.shape = weight.shape if folded is None else torch.Size(folded.shape)
        self._made = weight if folded is None else None
        self._packed: dict[bool, Packed] = {}

    @property
    def weight(self) -> Tensor:
        if self._made is None:
            self._made = self.once("weight", self.form, lambda w: (w,))
        return self._made

    def form(self) -> Tensor:
        """The weight, not kept."""
        return self._made if self._made is not None else self._folded.make()

    def once(self, key, make, tensors):
        """What is made of the weight, kept for as long as all that it is made of is what it was."""
        f = self._folded
        if f is None:
            return made_of(self._weight, key, make, tensors)
        return made_of(self._weight, (key, f.key), make, tensors, f.given)

    def scaled(self, scale: Tensor) -> Conv:
        """The channels of its result times ``scale``, a vector."""

        def make() -> Tensor:
            w, s = self.form().detach(), scale
            if self.geometry.transposed:  # (g I', O', ...)
                g = self.geometry.groups
                s = s.view(g, 1, -1).expand(-1, len(w) // g, -1).reshape(len(w), -1)
            return w * s.view(*s.shape, *(1,) * (w.dim() - s.dim()))

        return self._with("scaled", make, (scale,), self.shape, self.geometry)

    def then(self, other: Conv) -> Conv | None:
        """With another convolution after it, as one; None where that is none, or not of this kind.

        An output of ``other`` must see no padding where the result of this one has padding of its own: ``other`` has
        none, or this one is of single pixels.
        """
        g, h, k, l = self.geometry, other.geometry, self.shape[2:], other.shape[2:]
        if g.transposed or h.transposed or g.groups > 1 or h.groups > 1:
            return None
        alone = {*k, *g.stride} == {1} and not any(g.padding)
        if any(h.padding) and not alone:
            return None
        if {*l} != {1} and not ({*g.dilation} == {1} == {*h.dilation, *g.stride}) and not alone:
            return None
        padding = h.padding if alone else g.padding
        dilation = h.dilation if alone else g.dilation
        stride = tuple(a * b for a, b in zip(g.stride, h.stride, strict=True))
        taps = tuple(a + b - 1 for a, b in zip(k, l, strict=True))

        def make() -> Tensor:
            # each kernel of this one is an image that the other sees, reversed
            run = (F.conv1d, F.conv2d, F.conv3d)[len(k) - 1]
            images, seen = self.form().detach().transpose(0, 1), other.form().detach()
            flipped = seen.flip(*range(2, seen.dim()))
            return run(images, flipped, padding=[n - 1 for n in l]).transpose(0, 1).contiguous()

        f = other._folded
        recipe = ("then", g.key, h.key, None if f is None else f.key)
        given = (other._weight, *(() if f is None else f.given))
        geometry = Geometry(stride, padding, dilation, False, g.output_padding, 1)
        return self._with(recipe, make, given, (other.shape[0], self.shape[1], *taps), geometry)

    def _with(self, recipe, make, given, shape, geometry) -> Conv:
        f = self._folded or Folded((), make, (), ())
        folded = Folded((*f.key, recipe), make, (*f.given, *given), tuple(shape))
        return Conv(self._weight, geometry, self.size, folded)

    @property
    def key(self):
        return Conv, tuple(self.shape), self.geometry.key

    @property
    def entries(self):
        return self.shape.numel()

    def kept(self, in_shape, out_shape):
        if self.geometry.groups == in_shape[1] == out_shape[1]:
            return (0, 0), (1, 1)
        return ((0, 0),)

    def windows(self, in_shape, out_shape):
        groups = self.geometry.groups
        mixed_or_kept = groups == 1 or groups == in_shape[1] == out_shape[1]
        return tuple((a, a) for a in range(1 + mixed_or_kept, len(in_shape)))

    def support(self, axis, in_shape, out_shape):
        g, i = self.geometry, axis - 2
        if axis == 1:
            own = [numpy.arange(n) // (n // g.groups) for n in (out_shape[1], in_shape[1])]
            return Csr.of_dense(own[0][:, None] == own[1])
        fine, coarse = in_shape[axis], out_shape[axis]
        if g.transposed:
            fine, coarse = coarse, fine
        window = self.shape[axis], g.stride[i], g.padding[i], g.dilation[i]
        seen = Csr.windows(coarse, fine, *window)
        return seen.T if g.transposed else seen

    def work(self, in_shape, out_shape, reverse):
        # a multiply-add for each weight of a window and each place of the coarser side, in either direction
        coarse = in_shape if self.geometry.transposed else out_shape
        total = 2.0 * prod(coarse) * prod(self.shape[1:])
        return total / max(1, prod(in_shape if reverse else out_shape))

    def narrow(self, source, target, in_shape, out_shape):
        return (
            self if source.axis == 0 else None
        )  # a range of channels would need a range of the weights

    def push(self, t, own):
        return self._run(t, True)

    def pull(self, c, own):
        return self._run(c, False)

    def _run(self, t: Tensor, push: bool) -> tuple[Tensor, bool]:
        flat, batch = fold(t, len(self.size) + 1)
        if quick(flat):
            out = None
            if small(self.geometry, self.shape, flat, push):
                out = by_columns(self.geometry, self.weight, flat, push, self.size)
            else:
                packed = self._packed.get(push)
                if packed is None:
                    given = push, tuple(flat.shape[2:]), self.size

                    def pack() -> Packed:
                        return Packed(self.geometry, self.form(), *given)

                    packed = self.once((self.geometry.key, *given), pack, lambda p: p.tensors())
                    self._packed[push] = packed
                out = packed.run(flat)
        elif push:
            out = self.geometry.run(flat, self.weight)
        else:
            out = self.geometry.run_transposed(flat, self.weight, self.size)
        return unfold(out, batch, t.shape[: len(batch)])


class ConvWeight(LinearMap):
    """A convolution as a map of its weight. Seeds are folded into the output channels of each group."""

    __slots__ = ("geometry", "kernel", "x")
    name, structure = "convolution of weights", "convolution"

    def __init__(self, x: Tensor, geometry: Geometry, kernel: tuple[int, ...]):
        self.x, self.geometry, self.kernel = x, geometry, kernel

    @property
    def key(self):
        return ConvWeight, self.geometry.transposed, self.geometry.groups, tuple(self.x.shape)

    def kept(self, in_shape, out_shape):
        # an output channel has its own weights
        if not self.geometry.transposed:
            return ((0, 1),)
        return ((1, 1),) if self.geometry.groups == 1 else ()

    def work(self, in_shape, out_shape, reverse):
        g = self.geometry
        coarse = prod(self.x.shape) if g.transposed else prod(out_shape)
        total = 2.0 * coarse * prod(in_shape[1:])
        return total / max(1, prod(in_shape if reverse else out_shape))

    def _fold_weight(self, t: Tensor) -> Tensor:
        g = self.geometry.groups
        k, a, b = t.shape[:3]
        tail = t.shape[3:]
        if not self.geometry.transposed:  # (K, g O', I', ...) -> (g K O', I', ...)
            return t.reshape(k, g, a // g, b, *tail).transpose(0, 1).reshape(-1, b, *tail)
        # (K, g I', O', ...) -> (g I', K O', ...)
        return t.transpose(0, 1).reshape(a, k * b, *tail)

    def push(self, t, own):
        g, k = self.geometry.groups, t.shape[0]
        out = self.geometry.run(self.x, self._fold_weight(t))
        n, tail = out.shape[0], out.shape[2:]
        out = out.reshape(n, g, k, -1, *tail).transpose(1, 2).transpose(0, 1)
        return out.reshape(k, n, -1, *tail), True

    def pull(self, c, own):
        geo, g = self.geometry, self.geometry.groups
        k, n, o = c.shape[:3]
        tail = c.shape[3:]
        flat = c.reshape(k, n, g, o // g, *tail).permute(1, 2, 0, *range(3, c.dim() + 1))
        flat = flat.reshape(n, g * k * (o // g), *tail)
        kernel = self.kernel
        if geo.transposed:
            shape = (self.x.shape[1], k * (o // g), *kernel)
        else:
            shape = (g * k * (o // g), self.x.shape[1] // g, *kernel)
        grad = torch.ops.aten.convolution_backward(
            flat, self.x, self.x.new_empty(1).expand(shape), None, geo.stride, geo.padding, geo.dilation,
            geo.transposed, geo.output_padding, g, (False, True, False),
        )[1]  # fmt: skip
        if geo.transposed:
            out = grad.reshape(shape[0], k, o // g, *kernel).transpose(0, 1)
        else:
            out = grad.reshape(g, k, o // g, shape[1], *kernel).transpose(0, 1)
            out = out.reshape(k, o, shape[1], *kernel)
        return out, True
