"""A convolution with the scalings around it, as a problem for `chooser`.

It can be run by tensor cores (`kernels.conv`), without them where channels are few (`kernels.direct`), or by torch with
a pass over the block for each scaling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ...kernels import support
from ...kernels.support import Factor, Ready
from ..device.chooser import TIMED_ENTRIES, Offer, Way, dots
from ..maps.convolution import Conv

CHECKED_ENTRIES = 1 << 22
"""Entries of a block that are computed in float64, to check a way's result."""


@dataclass(frozen=True)
class Shape:
    """What a convolution of a block is, apart from the block's leading axes. ``size_in``, ``size``: images."""

    channels_in: int
    channels: int
    size_in: tuple[int, ...]
    size: tuple[int, ...]
    taps: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool

    @classmethod
    def of(cls, edge: Conv, push: bool, size_in, size) -> Shape:
        """Of a map's push or pull between images of these sizes: one of the two gathers as a transpose does."""
        g, w = edge.geometry, edge.shape
        transposed = g.transposed == push
        ends = (w[0], w[1] * g.groups) if transposed else (w[1] * g.groups, w[0])
        return cls(
            *ends, tuple(size_in), tuple(size), tuple(w[2:]), tuple(g.stride), tuple(g.padding),
            tuple(g.dilation), g.groups, transposed,
        )  # fmt: skip

    @property
    def work(self) -> float:
        """Flops a seed and sample."""
        total = 2.0 * self.channels * self.channels_in / self.groups * prod(self.taps)
        return total * prod(self.size_in if self.transposed else self.size)

    @property
    def reads_last(self) -> bool:
        """Whether `kernels.conv` runs it, and loads channels that lie side by side several at a time."""
        inner, outer = self.channels_in // self.groups, self.channels // self.groups
        return outer > 2 and inner >= 16 and inner % 4 == 0

    @property
    def entries(self) -> int:
        """Entries a seed and sample of the larger block."""
        return max(self.channels_in * prod(self.size_in), self.channels * prod(self.size), 1)


@dataclass(frozen=True)
class ConvKind:
    """What a choice depends on; ``samples`` is the power of two at or above their number."""

    seeds: int
    samples: int
    shape: Shape
    factors: tuple[str, str]
    dtype: torch.dtype
    precision: str
    device: torch.device

    @classmethod
    def of(cls, seeds, samples, shape, factors, dtype, device) -> ConvKind:
        precision = support.convolution_precision(dtype)
        samples = support.power_of_two(samples)
        return cls(seeds, samples, shape, factors, dtype, precision, device)

    @property
    def flops(self) -> float:
        return self.seeds * self.samples * self.shape.work

    @property
    def bytes(self) -> float:
        s = self.shape
        ends = s.channels_in * prod(s.size_in) + s.channels * prod(s.size)
        return float(self.seeds * self.samples * ends * self.dtype.itemsize)

    def offers(self) -> list[Offer]:
        """The predicted best first: tensor cores, unless most of what they compute is padding."""
        from ...kernels import conv, direct

        s = self.shape
        if len(s.size) > 2:
            return []
        inner, outer = s.channels_in // s.groups, s.channels // s.groups
        product: Offer = ((("conv", 1),), conv.CONFIGS, dots(self.precision))
        if outer > direct.MOST:
            return [product]
        alone: Offer = ((("direct", 1),), direct.CONFIGS, ("",))
        if inner * prod(s.taps) < 16 or outer == 1 < s.groups:
            return [alone]
        return [alone, product] if outer <= 2 else [product, alone]

    def plain(self) -> dict[str, object]:
        """As plain data, for reports."""
        s = self.shape
        return {
            "channels": (s.channels_in, s.channels), "images": (s.size_in, s.size), "taps": s.taps, "stride": s.stride,
            "groups": s.groups, "transposed": s.transposed, "seeds": self.seeds, "samples": self.samples,
            "precision": self.precision, "dtype": str(self.dtype), "factors": self.factors,
        }  # fmt: skip


@dataclass
class Convolution:
    """One to run: the push or pull of ``edge`` on ``t`` (K, N, C, *image), to images of ``size``.

    ``factors``: before and after, (N, C, *image) each, or None; ``diagonals`` gives their derivatives as tensors.
    ``ready``: what the call has made of its weights. ``last``: whether kernels are to write the result with its
    channels side by side.
    """

    t: Tensor
    edge: Conv
    push: bool
    size: tuple[int, ...]
    factors: tuple[Factor | None, Factor | None]
    diagonals: Callable[[], tuple[Tensor | None, Tensor | None]]
    ready: Ready | None = None
    last: bool = False

    @property
    def shape(self) -> Shape:
        return Shape.of(self.edge, self.push, self.t.shape[3:], self.size)

    def kind(self) -> ConvKind:
        names = tuple("" if f is None else f.name for f in self.factors)
        K, N = self.t.shape[:2]
        return ConvKind.of(K, N, self.shape, names, self.t.dtype, self.t.device)

    def first(self, seeds: int, samples: int) -> Convolution:
        """The same for the first seeds and samples only."""

        def cut(d: Tensor | None) -> Tensor | None:
            return None if d is None else d[:samples]

        factors = tuple(f and Factor(cut(f.values), f.name, f.constants) for f in self.factors)
        return Convolution(
            self.t[:seeds, :samples], self.edge, self.push, self.size, factors,
            lambda: tuple(map(cut, self.diagonals())), last=self.last,
        )  # fmt: skip

    def _within(self, entries: int) -> Convolution:
        K, N = self.t.shape[:2]
        many = max(1, entries // self.shape.entries)
        seeds = min(K, many)
        return self.first(seeds, max(1, min(N, many // seeds)))

    def timed(self) -> Convolution:
        return self._within(TIMED_ENTRIES)

    def few(self) -> Convolution:
        return self._within(CHECKED_ENTRIES)

    def torch(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.t.dtype
        before, after = (d if d is None else d.to(dtype) for d in self.diagonals())
        edge, t = self.edge, self.t.to(dtype)
        if dtype != edge.weight.dtype:
            edge = Conv(edge.weight.to(dtype), edge.geometry, edge.size)
        t = t if before is None else t * before
        out, own = edge.push(t, False) if self.push else edge.pull(t, False)
        if after is None:
            return out
        return out.mul_(after) if own else out * after

    def launch(self, way: Way, out: Tensor | None = None) -> Tensor:
        from ...kernels import conv, direct
        from ...kernels.windows import Window

        g = self.edge.geometry
        window = Window(
            self.size, tuple(g.stride), tuple(g.padding), tuple(g.dilation), g.groups, self.shape.transposed
        )  # fmt: skip
        given = (self.t, self.edge.weight, window, *self.factors)
        ((name, _),) = way.kernels
        if name == "direct":
            return direct.direct(*given, out=out, config=way.config, last=self.last)
        return conv.convolve(
            *given, precision=way.dot, ready=self.ready, out=out, config=way.config, last=self.last
        )
