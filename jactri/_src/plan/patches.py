"""Sweeps of convolutional networks by patches: for every pixel of the seed, the window of pixels that it reaches.

A coloured sweep (see `pattern`) carries images, as many as the final window has pixels, from the first layer on. Here
a block has the pixels of the window only, ``(N, channels of the seed, *pixels of the seed, *window, C)``, and the
window starts at one pixel and grows by every layer: pixel ``j`` of it is pixel ``stride * seed + offset + j`` of the
value. Pixels outside of the image hold anything until something mixes pixels; then they must be zero (``clean``).

A convolution of small windows is one product with a matrix made of its weights alone (`_matrix`), or one convolution of
many small images; an activation multiplies by the windows of its derivative, a strided view.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import backends, rates
from ..base.tracing import may_write
from ..maps.convolution import Conv
from ..maps.linear_map import Diagonal, Identity, LinearMap, Scale
from ..maps.packed import LANES, channels_last
from ..read.graph import Graph
from .sweep import Step, Sweep

GAIN = 4.0
"""A product is this much faster than a convolution of small images with as many multiplications."""

LARGEST = 1 << 21
"""Entries of the matrices of weights that are formed."""

CHUNK_BYTES = 1 << 23
"""On a CPU blocks are cut to about this size; below it, what a chunk costs in Python shows."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class ReceptiveField:
    """The pixels of a value that a pixel of the seed reaches: ``size`` of them from ``stride * seed + offset`` on."""

    stride: Pair
    offset: Pair
    size: Pair

    def union(self, other: ReceptiveField) -> ReceptiveField | None:
        """The window of a sum."""
        if self.stride != other.stride:
            return None
        offset = _pair(map(min, self.offset, other.offset))
        ends = [
            max(a + n, b + m)
            for a, n, b, m in zip(self.offset, self.size, other.offset, other.size, strict=True)
        ]
        return ReceptiveField(
            self.stride, offset, _pair(e - o for e, o in zip(ends, offset, strict=True))
        )


def _pair(values: Iterable[int]) -> Pair:
    a, b = values
    return a, b


def images(shape) -> Pair | None:
    """The image of a value ``(N, C, *image)``: a line is an image of one row."""
    return {3: (1, *shape[2:]), 4: tuple(shape[2:])}.get(len(shape))


def _spreads(edge: Conv, reverse: bool) -> bool:
    """Whether a pixel is spread over the window of a kernel with its stride: a transposed convolution, or a pull."""
    return reverse != edge.geometry.transposed


def _geometry(edge: Conv) -> tuple[tuple[int, ...], Pair, Pair, Pair]:
    """The weight's shape, stride, padding and dilation, for images."""
    g, w = edge.geometry, edge.shape
    if len(w) == 3:
        g, w = g.planar(), (*w[:2], 1, w[2])
    return w, tuple(g.stride), tuple(g.padding), tuple(g.dilation)


def _through(edge: LinearMap, at: ReceptiveField, reverse: bool) -> ReceptiveField | None:
    """The window after a map, or None where patches cannot pass it."""
    if isinstance(edge, Diagonal | Scale | Identity):
        return at
    if edge.__class__ is not Conv or len(edge.shape) > 4:
        return None
    weight, stride, padding, dilation = _geometry(edge)
    reach = [d * (k - 1) for d, k in zip(dilation, weight[2:], strict=True)]
    if _spreads(edge, reverse):
        return ReceptiveField(
            _pair(s * t for s, t in zip(stride, at.stride, strict=True)),
            _pair(s * o - p for s, o, p in zip(stride, at.offset, padding, strict=True)),
            _pair(s * (n - 1) + r + 1 for s, n, r in zip(stride, at.size, reach, strict=True)),
        )
    if stride != (1, 1):
        return None  # which pixels are hit differs from pixel to pixel of the seed
    return ReceptiveField(
        at.stride,
        _pair(o + p - r for o, p, r in zip(at.offset, padding, reach, strict=True)),
        _pair(n + r for n, r in zip(at.size, reach, strict=True)),
    )


def convolves(graph: Graph) -> bool:
    """Whether all of a graph is images, convolved or scaled: without that, no sweep is one by patches."""
    edges = [edge for v in graph.values for _, edge in v.sources]
    return (
        any(edge.__class__ is Conv for edge in edges)
        and all(isinstance(edge, Conv | Diagonal | Scale | Identity) for edge in edges)
        and all(images(v.shape) is not None for v in graph.values)
    )


def by_patches(graph: Graph, sweep: Sweep) -> Sweep | None:
    """The same coloured sweep by patches, with the flops and bytes of its steps; None where they cannot be used."""
    values, seed = graph.values, graph.values[sweep.seed]
    image = images(seed.shape)
    if image is None or not sweep.patterns:
        return None
    n = seed.shape[0]
    windows = {sweep.seed: ReceptiveField((1, 1), (0, 0), (1, 1))}
    shared = {sweep.seed: True}
    seeds = seed.shape[1] * prod(image)
    steps = []
    for step in sweep.steps:
        shape = values[step.value].shape
        layout = sweep.layouts[step.value]
        if (
            images(shape) is None
            or shape[0] != n
            or (n > 1 and layout.axes[0] != sweep.layout.axes[0])
        ):
            return None
        found, flops, alike = None, 0.0, True
        for t in step.terms:
            edge = values[t.owner].sources[t.edge][1]
            before, channels = windows[t.other], values[t.other].shape[1]
            window = _through(edge, before, sweep.reverse)
            if window is not None and found is not None:
                window = found.union(window)
            if window is None:
                return None
            found = window
            same = shared[t.other] and not isinstance(edge, Diagonal)
            alike = alike and same
            rows = seed.shape[1] if same else n * seeds
            if edge.__class__ is Conv:
                after = _through(edge, before, sweep.reverse)
                flops += rows * _way(edge, before, after, channels, shape[1], sweep.reverse)[1]
            else:
                flops += rows * prod(before.size) * shape[1]
        windows[step.value], shared[step.value] = found, alike
        written = (seed.shape[1] if alike else n * seeds) * prod(found.size) * shape[1]
        size = values[step.value].dtype.itemsize
        steps.append(replace(step, flops=float(flops), bytes=float(written * size)))
    flops, written = sum(s.flops for s in steps), sum(s.bytes for s in steps)
    return replace(sweep, steps=steps, flops=flops, bytes=written, windows=windows, chunks={})


def from_lines(graph: Graph, sweep: Sweep, start: int, length: int) -> Sweep | None:
    """The same sweep from some lines of the seed's image; None where that has none, or its patterns are not by axes."""
    shape = graph.values[sweep.seed].shape
    if not sweep.windows or len(shape) != 4:
        return None
    patterns = {}
    for target, pattern in sweep.patterns.items():
        side = pattern.out if sweep.reverse else pattern.into
        if [n for n, _ in side] != [n for n in shape if n > 1] or shape[2] == 1:
            return None
        cut = pattern.cut(sweep.reverse, sum(n > 1 for n in shape[:2]), start, length)
        if cut is None:
            return None
        patterns[target] = cut
    part = length / shape[2]
    return replace(
        sweep, lines=(start, length), patterns=patterns, items=None, flops=part * sweep.flops, bytes=part * sweep.bytes
    )  # fmt: skip


def window(sweep: Sweep, value: int) -> ReceptiveField | None:
    """Where the block of a value is, of the first line from which a sweep by patches runs."""
    found = sweep.windows.get(value)
    if found is None or sweep.lines is None:
        return found
    y, x = found.offset
    return replace(found, offset=(y + found.stride[0] * sweep.lines[0], x))


def multiplies(graph: Graph, sweep: Sweep, step: Step) -> bool:
    """Whether a convolution is one product."""
    (t,) = step.terms
    edge, at = graph.values[t.owner].sources[t.edge][1], sweep.windows[t.other]
    channels, outs = (graph.values[v].shape[1] for v in (t.other, step.value))
    return _way(edge, at, sweep.windows[step.value], channels, outs, sweep.reverse)[0]


def reach(edge: Conv, reverse: bool) -> Pair:
    """(r, s): a convolution connects line i of a window with the lines from ``s i`` to ``s i + r`` of its result."""
    weight, stride, _, dilation = _geometry(edge)
    return dilation[0] * (weight[2] - 1), stride[0] if _spreads(edge, reverse) else 1


def _way(
    edge: Conv, at: ReceptiveField, to: ReceptiveField, channels: int, outs: int, reverse: bool
) -> tuple[bool, float]:
    """Whether a product is faster than a convolution of small images, and the flops for one pixel of the seed."""
    coarse = prod(at.size) if _spreads(edge, reverse) else prod(to.size)
    small = 2.0 * coarse * prod(edge.shape[2:]) * channels * outs / edge.geometry.groups
    entries = prod(at.size) * channels * prod(to.size) * outs
    slower = GAIN * max(1.0, LANES / outs)
    if edge.geometry.groups > 1 or entries > LARGEST or 2.0 * entries > slower * small:
        return False, small
    return True, 2.0 * entries


def block_bytes(graph: Graph, sweep: Sweep, value: int) -> float:
    """Bytes of a whole block."""
    seed, v = graph.values[sweep.seed], graph.values[value]
    return float(prod(seed.shape) * prod(sweep.windows[value].size) * v.shape[1] * v.dtype.itemsize)


def _cut(graph: Graph, sweep: Sweep) -> Pair:
    """Samples, and rows of the seed's image, at once."""
    seed = graph.values[sweep.seed]
    shape, most = seed.shape, rates.block_bytes(seed.device.type, CHUNK_BYTES)
    rows = images(shape)[0]
    largest = max((block_bytes(graph, sweep, s.value) for s in sweep.steps), default=0.0)
    fit = max(1, int(shape[0] * rows * most // max(largest, 1)))
    return (min(shape[0], fit // rows), rows) if fit >= rows else (1, fit)


def peak_bytes(graph: Graph, sweep: Sweep) -> float:
    """Predicted bytes of live blocks and derivatives at the worst step, but for the whole blocks of the targets."""
    values = graph.values
    shape = values[sweep.seed].shape
    many, lines = _cut(graph, sweep)
    part = many * lines / max(shape[0] * images(shape)[0], 1)
    live = worst = kept = 0.0
    size = {sweep.seed: 0.0}
    for step in sweep.steps:
        edges = [values[t.owner].sources[t.edge][1] for t in step.terms]
        size[step.value] = part * step.bytes
        scales = isinstance(edges[0], Diagonal) and len(edges) == 1
        if scales:  # the derivative, and the same with a border
            kept += 2.0 * prod(values[step.value].shape) * values[step.value].dtype.itemsize
        first = step.terms[0].other
        if scales and first in step.frees and size[first] == size[step.value]:
            live -= size[first]  # in place
            size[first] = 0.0
        live += size[step.value]
        worst = max(worst, live + kept)
        live -= sum(size[f] for f in step.frees)
    return worst


@dataclass(frozen=True)
class Block:
    """Patches; whether they are zero outside of the image; whether they are made of weights, alike for all seeds."""

    data: Tensor
    clean: bool
    alike: bool


def _shared(block: Block, blocks: dict[int, Block]) -> bool:
    """Whether another block lies in the same memory, as behind an op that passes it on."""
    memory = block.data.untyped_storage()._cdata
    return sum(b.data.untyped_storage()._cdata == memory for b in blocks.values()) > 1


class PatchRun:
    """One sweep by patches, some samples and lines of the seed's image at a time.

    ``samples``: the first ones only. ``dtype``: another one than the graph's.
    """

    def __init__(
        self,
        graph: Graph,
        sweep: Sweep,
        samples: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.graph, self.sweep = graph, sweep
        seed = graph.values[sweep.seed]
        self.shape, self.image = seed.shape, images(seed.shape)
        self.samples = self.shape[0] if samples is None else samples
        self.dtype = dtype or seed.dtype
        self._padded: dict[tuple, tuple[Tensor, Pair, Tensor | None]] = {}
        self._alike: dict[int, Block] = {}
        self._matrices: dict[tuple[int, ReceptiveField], Tensor] = {}
        """By the id of an edge, which the graph holds, and the window that it is given."""
        self.writable = may_write()

    def chunks(self):
        """(first sample, samples, first line, lines) of all chunks."""
        many, lines = _cut(self.graph, self.sweep)
        first, count = self.sweep.lines or (0, self.image[0])
        for n in range(0, self.samples, max(many, 1)):
            for y in range(first, first + count, max(lines, 1)):
                yield n, min(many, self.samples - n), y, min(lines, first + count - y)

    def blocks(self, steps, chunk, value: int) -> Block:
        """The block of a value, after some steps."""
        blocks = {self.sweep.seed: self.seed()}
        for step in steps:
            self.step(step, blocks, chunk, {value})
        return blocks[value]

    def whole(self, value: int) -> Tensor:
        """The block of a value, of all seeds."""
        found = None
        for chunk in self.chunks():
            data = self.blocks(self.sweep.steps, chunk, value).data
            found = put(found, data, chunk, (self.samples, *self.shape[1:]))
        return found

    def seed(self) -> Block:
        """Ones at the pixel itself."""
        like, c = self.graph.values[self.sweep.seed], self.shape[1]
        eye = torch.eye(c, dtype=self.dtype, device=like.device)
        return Block(eye.view(1, c, 1, 1, 1, 1, c), True, True)

    def step(self, step: Step, blocks: dict[int, Block], chunk, pinned) -> None:
        """Add the block of a step; blocks that nobody needs any more, but for the ``pinned``, go."""
        made = self._alike.get(step.value) or self._made(step, blocks, chunk, pinned)
        blocks[step.value] = made
        if made.alike:
            self._alike[step.value] = made
        for f in step.frees:
            if f not in pinned:
                del blocks[f]

    def _made(self, step: Step, blocks: dict[int, Block], chunk, pinned) -> Block:
        """The block of a step."""
        values, windows = self.graph.values, self.sweep.windows
        target = windows[step.value]
        total, clean, alike = None, True, True
        for t in step.terms:
            edge = values[t.owner].sources[t.edge][1]
            block, at = blocks[t.other], windows[t.other]
            data, fine, same = block.data, block.clean, block.alike
            if edge.__class__ is Conv:
                if not fine:
                    data, same = self._inside(data, at, values[t.other].shape, chunk), False
                data, fine = self._convolved(edge, data, at, values[step.value].shape[1]), False
            elif isinstance(edge, Diagonal):
                own = self.writable and not same and len(step.terms) == 1
                own = own and t.other in step.frees and t.other not in pinned
                own = own and not _shared(block, blocks)
                data, cleaned = self._scaled(data, edge, at, values[step.value].shape, chunk, own)
                fine, same = fine or cleaned, False
            elif edge.__class__ is Scale:
                data = data * edge.factor
            data = _widened(data, _through(edge, at, self.sweep.reverse), target)
            total = data if total is None else total + data
            clean, alike = clean and fine, alike and same
        return Block(total, clean, alike)

    def _scaled(
        self, data: Tensor, edge: Diagonal, at: ReceptiveField, shape, chunk, own: bool
    ) -> tuple[Tensor, bool]:
        """Times a derivative, or selected by it, and whether that made it zero outside of the image."""
        clean = False
        for function, d in edge.factors(self.sweep.reverse):
            pixels = range(2, d.dim())
            if d.dim() == len(shape) and all(d.stride(a) == 0 or d.shape[a] == 1 for a in pixels):
                view = d[(slice(None), slice(None), *[0] * len(pixels))]  # the same for all pixels
                if view.shape[0] > 1:
                    view = view.narrow(0, *chunk[:2])
                view = view.view(len(view), 1, 1, 1, 1, 1, -1).to(self.dtype)
            else:
                view, clean = self.windows(d, at, shape, chunk), True
            inside = all(v in (1, n) for v, n in zip(view.shape, data.shape, strict=True))
            data, own = function(data, view, own and inside), self.writable
        return data, clean

    def _inside(self, data: Tensor, at: ReceptiveField, shape, chunk) -> Tensor:
        """Zero outside of the image."""
        return data * self.windows(None, at, shape, chunk)

    def windows(self, d: Tensor | None, at: ReceptiveField, shape, chunk) -> Tensor:
        """The windows of a derivative, ``(samples, 1, lines, columns, *window, C)``, as a view of it with a border."""
        key = id(d), at, shape
        if key not in self._padded:
            image, given = images(shape), d
            if d is None:
                device = self.graph.values[self.sweep.seed].device
                d = torch.ones((1, 1, *image), dtype=self.dtype, device=device)
            else:
                d = d.expand(shape).reshape(*shape[:2], *image).to(self.dtype)
            low = [max(0, -o) for o in at.offset]
            high = [
                max(0, s * (m - 1) + o + n - h)
                for s, m, o, n, h in zip(
                    at.stride, self.image, at.offset, at.size, image, strict=True
                )
            ]
            d = F.pad(d.permute(0, 2, 3, 1), (0, 0, low[1], high[1], low[0], high[0])).contiguous()
            corner = _pair(o + b for o, b in zip(at.offset, low, strict=True))
            self._padded[key] = d, corner, given  # what is kept here keeps its id
        d, (y, x), _ = self._padded[key]
        n0, n, line, lines = chunk
        if d.shape[0] == 1:
            n0, n = 0, 1
        sn, sy, sx, sc = d.stride()
        return d.as_strided(
            (n, 1, lines, self.image[1], *at.size, d.shape[3]),
            (sn, sn, at.stride[0] * sy, at.stride[1] * sx, sy, sx, sc),
            d.storage_offset() + n0 * sn + (y + line * at.stride[0]) * sy + x * sx,
        )

    def _convolved(self, edge: Conv, data: Tensor, at: ReceptiveField, outs: int) -> Tensor:
        to, reverse = _through(edge, at, self.sweep.reverse), self.sweep.reverse
        lead, channels = data.shape[:4], data.shape[-1]
        if _way(edge, at, to, channels, outs, reverse)[0]:
            out = backends.product(data.reshape(prod(lead), -1), self.matrix(edge, at), False)
        else:
            patches = data.reshape(-1, *at.size, channels).permute(0, 3, 1, 2)
            out = _small(edge, patches, reverse).permute(0, 2, 3, 1)
        return out.reshape(*lead, *to.size, outs)

    def matrix(self, edge: Conv, at: ReceptiveField) -> Tensor:
        """The convolution of windows as a matrix."""
        matrix = self._matrices.get((id(edge), at))
        if matrix is None:
            matrix = _matrix(edge, at, self.sweep.reverse).to(self.dtype)
            self._matrices[id(edge), at] = matrix
        return matrix


def put(whole: Tensor | None, data: Tensor, chunk, seed) -> Tensor:
    """The block of a chunk in that of all seeds, ``(*seed, *window, C)``, which is made at the first chunk."""
    n0, n, line, lines = chunk
    lead = (*seed[:2], *images(seed))
    block = data.expand(n, seed[1], lines, lead[3], *data.shape[4:])
    if (n, lines) == (lead[0], lead[2]):
        return block
    if whole is None:
        whole = data.new_empty((*lead, *data.shape[4:]))
    whole[n0 : n0 + n, :, line : line + lines] = block
    return whole


def _small(edge: Conv, patches: Tensor, reverse: bool) -> Tensor:
    """The convolution of small images, whole windows of them."""
    shape, stride, _, dilation = _geometry(edge)
    weight = edge.weight.view(shape).to(patches.dtype)
    groups = edge.geometry.groups
    if patches.device.type == "cpu":
        weight = channels_last(weight)
    if _spreads(edge, reverse):
        return F.conv_transpose2d(patches, weight, None, stride, 0, 0, groups, dilation)
    border = tuple(d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
    return F.conv2d(patches, weight, None, 1, border, dilation, groups)


def _matrix(edge: Conv, at: ReceptiveField, reverse: bool) -> Tensor:
    """The convolution as a matrix ``(pixels * channels, pixels * channels)`` of windows, made of the weight alone."""

    def make() -> Tensor:
        weight = edge.weight
        inputs = weight.shape[0 if _spreads(edge, reverse) else 1]
        inner = prod(at.size) * inputs
        eye = torch.eye(inner, dtype=weight.dtype, device=weight.device)
        patches = eye.view(inner, *at.size, inputs).permute(0, 3, 1, 2)
        return _small(edge, patches, reverse).permute(0, 2, 3, 1).reshape(inner, -1)

    return edge.once(("matrix", at.size, edge.geometry.key, reverse), make, lambda m: (m,))


def _widened(data: Tensor, at: ReceptiveField, to: ReceptiveField) -> Tensor:
    """Zeros around a window, to that of a sum."""
    if at == to:
        return data
    low = [a - b for a, b in zip(at.offset, to.offset, strict=True)]
    high = [n - m - b for n, m, b in zip(to.size, at.size, low, strict=True)]
    return F.pad(data, (0, 0, low[1], high[1], low[0], high[0]))
