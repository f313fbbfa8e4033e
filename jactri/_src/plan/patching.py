"""The end of a sweep by patches in one kernel, as a problem for `chooser`.

Torch runs a product or a scaling at a time and puts entries in their places one by one; `kernels.patches` takes the
last one or two convolutions with the scalings around them, and writes the answer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels import support
from ..base import backends
from ..device import chooser
from ..device.chooser import TIMED_ENTRIES, Offer, Way, dots
from ..device.passes import CHECKED_ENTRIES
from ..maps.convolution import Conv
from ..maps.linear_map import Diagonal, Identity
from ..read.graph import Graph
from . import patches
from .fusion import edge_of, selects
from .patches import images
from .sweep import Step, Sweep

if TYPE_CHECKING:
    from ...kernels.patches import Place
    from ..run.entries import Entries


@dataclass(frozen=True)
class Tail:
    """The last steps of a sweep by patches, from the block of the value ``first`` to that of the target.

    ``products`` are those that convolve, one or two, and ``scalings`` those before, between and behind them.
    ``dense``: the answer itself is written, not its block, ``both``: with the samples on both sides.
    """

    steps: tuple[Step, ...]
    first: int
    products: tuple[Step, ...]
    scalings: tuple[tuple[Step, ...], ...]
    dense: bool
    both: bool
    bytes: float
    """Of the answer's entries that are no zeros: no block is written."""

    @property
    def value(self) -> int:
        return self.steps[-1].value

    @property
    def flops(self) -> float:
        return sum(s.flops for s in self.steps)


def fuse(graph: Graph, sweep: Sweep, dense: bool, both: bool) -> list[Step | Tail]:
    """The steps of a sweep by patches, the last ones as a `Tail` if a kernel can run them. Pure, as `fusion`."""
    found = _tail(graph, sweep, dense, both)
    return list(sweep.steps) if found is None else [*sweep.steps[: -len(found.steps)], found]


def tail_of(sweep: Sweep) -> Tail | None:
    """The tail among the items of a sweep by patches."""
    return sweep.items[-1] if sweep.items and isinstance(sweep.items[-1], Tail) else None


def _tail(graph: Graph, sweep: Sweep, dense: bool, both: bool) -> Tail | None:
    from ...kernels.patches import WIDEST_OUT

    ends = [t for t in sweep.targets if t is not None]
    values = graph.values
    dtype = values[sweep.seed].dtype
    if len(ends) != 1 or not support.computes(dtype) or ends[0] not in sweep.patterns:
        return None
    uses = Counter(t.other for s in sweep.steps for t in s.terms)
    alike = {sweep.seed}
    for s in sweep.steps:
        edges = (values[t.owner].sources[t.edge][1] for t in s.terms)
        if alike.issuperset(s.reads) and not any(isinstance(e, Diagonal) for e in edges):
            alike.add(s.value)
    taken: list[Step] = []
    products: list[Step] = []
    scalings: list[list[Step]] = [[]]
    for step in reversed(sweep.steps):
        wanted = taken[0].terms[0].other if taken else ends[0]
        edge = edge_of(graph, step)
        if (
            step.value != wanted
            or uses[wanted] != bool(taken)
            or len(step.terms) != 1
            or step.value in alike
            or values[step.value].dtype != dtype
        ):
            break
        if edge.__class__ is Conv:
            if len(products) == 2 or not patches.multiplies(graph, sweep, step):
                break
            products.insert(0, step)
            scalings.insert(0, [])
        elif isinstance(edge, Diagonal) and not selects(graph, sweep, step):
            scalings[0].insert(0, step)
        elif edge.__class__ is not Identity:
            break
        taken.insert(0, step)
    if not products or _width(graph, sweep, ends[0]) > WIDEST_OUT:
        return None
    size = values[ends[0]].dtype.itemsize
    return Tail(
        tuple(taken), taken[0].terms[0].other, tuple(products), tuple(map(tuple, scalings)), dense, both,
        float(sweep.patterns[ends[0]].nnz * size) if dense else taken[-1].bytes,
    )  # fmt: skip


def _width(graph: Graph, sweep: Sweep, value: int) -> int:
    return prod(_size(graph, sweep, value))


def _size(graph: Graph, sweep: Sweep, value: int) -> tuple[int, int, int]:
    """Lines, columns and channels of a value's windows."""
    return (*sweep.windows[value].size, graph.values[value].shape[1])


@dataclass(frozen=True)
class PatchKind:
    """What a choice depends on; ``samples`` is the power of two at or above their number.

    ``seeds``: channels and image of the seed; ``sizes``: lines, columns and channels of windows; ``factors``: which
    are scaled; ``entries``: written for a sample.
    """

    samples: int
    seeds: tuple[int, ...]
    sizes: tuple[tuple[int, int, int], ...]
    factors: tuple[bool, ...]
    how: tuple
    entries: int
    dtype: torch.dtype
    precision: str
    device: torch.device

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(map(prod, self.sizes))

    @property
    def flops(self) -> float:
        work = sum(a * b for a, b in zip(self.widths, self.widths[1:], strict=False))
        return 2.0 * self.samples * prod(self.seeds) * work

    @property
    def bytes(self) -> float:
        return float(self.samples * self.entries * self.dtype.itemsize)

    def offers(self) -> list[Offer]:
        """The one kernel, its tiles and ways to multiply."""
        from ...kernels import patches as kernel

        tiles = kernel.configs(self.widths, self.precision, self.device)
        return [((("patches", len(self.sizes) - 1),), tiles, dots(self.precision))]

    def plain(self) -> dict[str, object]:
        """As plain data, for reports."""
        return {
            "kernel": "patches", "samples": self.samples, "seeds": self.seeds, "windows": self.sizes,
            "factors": self.factors, "how": self.how, "precision": self.precision, "dtype": str(self.dtype),
        }  # fmt: skip


def _kind(graph: Graph, sweep: Sweep, tail: Tail, samples: int) -> PatchKind:
    seed, value = graph.values[sweep.seed], graph.values[tail.value]
    ends = [tail.first, *(s.value for s in tail.products)]
    sizes = tuple(_size(graph, sweep, v) for v in ends)
    entries = prod(seed.shape[1:]) * (
        prod(value.shape[1:]) * (samples if tail.both else 1) if tail.dense else prod(sizes[-1])
    )
    return PatchKind(
        support.power_of_two(samples), (seed.shape[1], *images(seed.shape)), sizes, tuple(map(bool, tail.scalings)),
        (tail.dense, tail.both, sweep.reverse, images(value.shape)), entries, seed.dtype,
        support.precision(seed.dtype), seed.device,
    )  # fmt: skip


def described(graph: Graph, sweep: Sweep, tail: Tail) -> tuple[str, str]:
    """The backend that runs a tail, and why, for `explain`."""
    return chooser.described(_kind(graph, sweep, tail, graph.values[sweep.seed].shape[0]))


def run(graph: Graph, sweep: Sweep, answer: Entries) -> bool:
    """Compute an answer by a kernel; False where none covers it, or torch is better."""
    tail, seed = tail_of(sweep), graph.values[sweep.seed]
    if tail is None or not backends.kernels_for(seed) or not answer.samples:
        return False
    if answer.samples != seed.shape[0] or (tail.dense, tail.both) != (
        answer.form == "dense",
        answer.both,
    ):
        return False
    weights = (edge_of(graph, s).weight for s in tail.products)
    if any((w.dtype, w.device) != (seed.dtype, seed.device) for w in weights):
        return False
    out = answer.target() if tail.dense else None
    made = chooser.run(Patched(graph, sweep, tail, answer, seed.shape[0]), out)
    if made is None:
        return False
    answer.take(made, out is not None)
    return True


@dataclass
class Patched:
    """One to run, for the first ``samples``: the answer if it is dense, else the block, ``(samples, ...)``."""

    graph: Graph
    sweep: Sweep
    tail: Tail
    answer: Entries
    samples: int

    def kind(self) -> PatchKind:
        return _kind(self.graph, self.sweep, self.tail, self.samples)

    def _within(self, entries: int) -> Patched:
        each = self.kind().entries // (self.samples if self.tail.both else 1)
        most = max(1, entries // max(each, 1))
        if self.tail.both:
            most = max(1, int(most**0.5))
        return replace(self, samples=min(self.samples, most))

    def timed(self) -> Patched:
        return self._within(TIMED_ENTRIES)

    def few(self) -> Patched:
        return self._within(CHECKED_ENTRIES)

    def torch(self, dtype: torch.dtype | None = None) -> Tensor:
        block = patches.PatchRun(self.graph, self.sweep, self.samples, dtype).whole(self.tail.value)
        return self.answer.formed(block) if self.tail.dense else block

    def launch(self, way: Way, out: Tensor | None = None) -> Tensor:
        from ...kernels.patches import patches as kernel

        graph, sweep, tail, n = self.graph, self.sweep, self.tail, self.samples
        run, seed = patches.PatchRun(graph, sweep, n), graph.values[sweep.seed]
        (K, *image), sizes = (seed.shape[1], *images(seed.shape)), self.kind().sizes
        edges = [edge_of(graph, s) for s in tail.products]
        ends = [tail.first, *(s.value for s in tail.products)]
        matrices = [run.matrix(e, sweep.windows[v]) for e, v in zip(edges, ends[:-1], strict=True)]
        derivatives = [_product(graph, steps) for steps in tail.scalings]
        if out is None:
            shape = self.answer.sized(n) if tail.dense else (n, K, *image, *sizes[-1])
            out = torch.empty(shape, dtype=seed.dtype, device=seed.device)
        flat, chunks, zeros = out.view(-1), list(run.chunks()), 0
        if tail.dense and sweep.reverse and not tail.both and chunks[0][3] == image[0]:
            zeros = prod(graph.values[tail.value].shape[1:])  # rows lie one after the other
        elif tail.dense:
            flat.zero_()
        for chunk in chunks:
            block = run.blocks(sweep.items[:-1], chunk, tail.first)
            lead = (chunk[1], K, chunk[3], image[1])
            clean = (block.clean, *(False for _ in edges[1:]), True)
            factors = [
                _windows(graph, sweep, run, d, v, chunk) if d is not None or not fine else None
                for d, v, fine in zip(derivatives, ends, clean, strict=True)
            ]
            place = self._place(chunk[2])
            kernel(
                block.data.flatten(4).expand(*lead, -1), matrices, factors, sizes,
                patches.reach(edges[0], sweep.reverse), flat[chunk[0] * place.strides[0] :], place,
                zeros=zeros, precision=way.dot, ready=backends.ready.get(), config=way.config,
            )  # fmt: skip
        return out

    def _place(self, line: int) -> Place:
        """Where results go, from a line of the seed's images on."""
        from ...kernels.patches import Place

        graph, tail, n = self.graph, self.tail, self.samples
        seed, value = graph.values[self.sweep.seed].shape, graph.values[tail.value].shape
        (H, W), (h, w), at = images(seed), images(value), self.sweep.windows[tail.value]
        if not tail.dense:
            y, x, c = _size(graph, self.sweep, tail.value)
            steps, step = [1], 1
            for size in (c, x, y, W, H, seed[1]):
                step *= size
                steps.insert(0, step)
            return Place(tuple(steps), line * steps[2], (0, 0), (0, 0), (y, x))
        ends = prod(seed[1:]), prod(value[1:])
        rows, columns = ends if self.sweep.reverse else ends[::-1]
        width = columns * (n if tail.both else 1)
        a, b = (width, 1) if self.sweep.reverse else (1, width)
        strides = (
            rows * width + (columns if tail.both else 0), H * W * a, W * a + at.stride[0] * w * b,
            a + at.stride[1] * b, w * b, b, h * w * b,
        )  # fmt: skip
        first = at.offset[0] + at.stride[0] * line, at.offset[1]
        start = (at.offset[0] * w + at.offset[1]) * b + line * strides[2]
        return Place(strides, start, first, at.stride, (h, w))


def _product(graph: Graph, steps: tuple[Step, ...]) -> Tensor | None:
    """The derivatives of scalings, as one."""
    whole = None
    for step in steps:
        d = edge_of(graph, step).d
        whole = d if whole is None else whole * d
    return whole


def _windows(graph: Graph, sweep: Sweep, run: patches.PatchRun, d, value: int, chunk) -> Tensor:
    """The windows of a derivative, or of ones within the image, for a kernel."""
    found = run.windows(d, sweep.windows[value], graph.values[value].shape, chunk)[:, 0]
    return found.expand(chunk[1], *found.shape[1:-1], graph.values[value].shape[1])
