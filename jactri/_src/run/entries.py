"""Answers of which only the entries of a pattern are computed: filled into zeros, or returned sparse.

A sweep with colours (see `colours`) leaves a block in which every entry of the pattern has a place of its own, by the
colour of its seed. Here entries are read from there, sample by sample where samples do not mix.
"""

from __future__ import annotations

from math import prod

import numpy
import torch
from torch import Tensor

from ..base import backends
from ..base.cache import Cache
from ..base.constants import fixed
from ..device import chooser
from ..device.passes import Pass, PassKind
from ..maps.layout import Layout, scatter
from ..plan.patches import ReceptiveField, images, put
from ..plan.pattern import Pattern
from ..plan.supports import Trace, indices, known_by, pattern_of
from ..plan.sweep import Sweep, factors_of
from ..read.graph import Graph
from .answers import Answer, Store
from .banded import Banded
from .blocks import empty
from .formed import Formed
from .seeds import colours_in, tables_key

_checked: Cache[tuple, bool] = Cache()
"""Computations whose Jacobians are known to be sparse."""


def blocks(
    sweep: Sweep, layout: Layout, out, into, pattern: Pattern, per_sample: bool | str
) -> tuple[int, Pattern]:
    """How many blocks of entries there are, one a sample, and the pattern of one; 0 for one of all samples."""
    n = (out[:1] or (0,))[0]
    each = pattern.sample(n, bool(per_sample)) if n and into[:1] == out[:1] else None
    if sweep.table is not None:
        apart = n == 1 or sweep.table.samples == n
    else:
        tied = layout.axes[:1] == sweep.layout.axes[:1]
        mixed = any(many > 1 for (a, _), many in sweep.colours.items() if a == 0)
        apart = n == 1 or (tied and not mixed)
    if each is not None and apart:
        return n, each
    return 0, pattern


def band(
    pattern: Pattern, many: int, both: bool, seeds: int, reverse: bool, dtype, device
) -> PassKind | None:
    """What the choice depends on of how ``many`` blocks of a pattern are written out; None where no kernel does.

    ``both``: with the samples on both sides.
    """
    if pattern.bands is None:
        return None
    rows, columns = pattern.shape
    how = (rows, columns, pattern.bands, reverse, both)
    read, written = seeds * rows, rows * columns * (many if both else 1)
    return PassKind.of("band", 1, many, read, written, how, dtype, device)


class Entries(Formed, Answer):
    """A Jacobian of which the entries of ``pattern`` are known, in one of the `FORMS`, or as "blocks".

    ``patch``: the window of the target, if the sweep runs by patches. ``size``: of blocks, in forms that have them.
    """

    def __init__(
        self,
        *answer,
        pattern: Pattern,
        form: str,
        patch: ReceptiveField | None = None,
        size: tuple[int, int] | None = None,
    ):
        super().__init__(*answer)
        self.patch, self.size = patch, size
        self.final, self.form = self.layout, form
        self.samples, self.pattern = blocks(
            self.sweep, self.layout, self.out, self.into, pattern, self.per_sample
        )
        if self.per_sample and not self.samples and self.out[0]:
            raise ValueError(
                "a sparse Jacobian for each sample has too many entries to tell which samples mix by their indices; "
                "drop per_sample, or use layout=torch.strided"
            )
        self.made: Tensor | None = None

    def target(self) -> Tensor | None:
        """The caller's tensor, if a kernel can write a dense answer there."""
        out, like = self.dest, self.like
        if out is None or (out.dtype, out.device) != (like.dtype, like.device):
            return None
        return out if out.is_contiguous() else None

    def take(self, made: Tensor, written: bool) -> None:
        """What a kernel has made: the dense answer (``written``: in the caller's tensor), or the block of patches."""
        if self.form == "dense":
            self.made = self.given(made, written)
        else:
            self.store = made

    def formed(self, block: Tensor) -> Tensor:
        """The dense answer out of patches, of the first samples."""
        return self._formed(lambda place: block.reshape(len(block), -1).index_select(1, place))

    def _formed(self, values) -> Tensor:
        """The dense answer of the first samples, of the ``values`` at a place: (samples, entries)."""
        place, target, start = self._index()
        found, many = values(place), max(self.samples, 1)
        n = len(found)
        if self.both and n < many:  # fewer columns
            columns = self.pattern.shape[1]
            target = target // (many * columns) * (n * columns) + target % columns
        return self.dense(found, None, target, start).view(self.sized(n))

    def window(self, sel):
        return None

    def allocate(self) -> Tensor:
        return Store.allocate(self)

    def put_patches(self, data: Tensor, chunk) -> None:
        """The block of a chunk of a sweep by patches."""
        seed = self.out if self.sweep.reverse else self.into
        n0, n, line, lines = chunk
        first = self.sweep.lines[0] if self.sweep.lines else 0
        self.store = put(self.store, data, (n0, n, line - first, lines), seed)

    def put(self, data, own, sel) -> None:
        if own and not sel:
            self.store = data
        else:
            scatter(self.part(sel), self.final, data, self.layout, sel)

    def _place(self, row: numpy.ndarray, column: numpy.ndarray) -> numpy.ndarray:
        """Where each entry is in the block (of a sample)."""
        sweep, layout = self.sweep, self.final
        seed, value = column, row
        if sweep.reverse:
            seed, value = value, seed
        if sweep.windows:
            return self._patch_place(seed, value)
        size = prod(layout.shape[1:] if self.samples else layout.shape)
        return self._colour(seed) * size + value

    def _colour(self, seed: numpy.ndarray) -> numpy.ndarray:
        """Which of the seeds that ran holds each seed (of a sample)."""
        if self.sweep.table is not None:
            return self.sweep.table.colour[seed]
        layout, factors = self.final, factors_of(self.sweep)
        if self.samples > 1:
            factors = factors[1:]
        found, unit, k = numpy.zeros_like(seed), 1, 1
        for n, f in reversed(factors):
            if f in layout.free:
                found += colours_in(self.sweep, f, n)[(seed // unit) % n] * k
                k *= layout.seed[f]
            unit *= n
        return found

    def _patch_place(self, seed: numpy.ndarray, value: numpy.ndarray) -> numpy.ndarray:
        """Where each entry is in the patches of a sample (see `patches`)."""
        ends = (self.out, self.into) if self.sweep.reverse else (self.into, self.out)
        (h, w), (height, width) = map(images, ends)
        window, channels = self.patch, ends[1][1]
        y, x = seed // w % h, seed % w
        i = value // width % height - window.stride[0] * y - window.offset[0]
        j = value % width - window.stride[1] * x - window.offset[1]
        inside = seed * window.size[0] + i
        return (inside * window.size[1] + j) * channels + value // (width * height)

    def _index(self) -> tuple[Tensor, ...]:
        """The place of every entry in the block, and where it goes."""
        sweep = self.sweep
        key = tables_key(sweep), sweep.layout, self.final, sweep.reverse, self.patch
        return self.where(key, self._place)

    def values(self) -> Tensor:
        """``(samples or 1, entries)`` in the order of the pattern, for any form but those that order them anew."""
        return self._values(self._index()[0])

    def _values(self, place: Tensor) -> Tensor:
        """``(samples or 1, entries)``."""
        if self.patch is not None:
            return self.store.reshape(len(self.store), -1).index_select(1, place)
        block = self._of_samples(self.block())
        return block.reshape(block.shape[0], -1).index_select(1, place)

    def _of_samples(self, block: Tensor) -> Tensor:
        return block.transpose(0, 1) if self.samples else block.unsqueeze(0)

    def finish(self):
        if self.made is not None:
            return self.made
        if self.form == "dense" and (made := self._written_out()) is not None:
            return made
        place, *where = self._index()
        # a block may be larger than the entries that are read from it
        values, self.store = self._values(place), None
        return self.answer(values, *where)

    def _written_out(self) -> Tensor | None:
        """The dense answer, written from the block by a kernel in one pass; None where that is torch's."""
        like, reverse, samples = self.like, self.sweep.reverse, self.samples
        if self.patch is not None or not backends.kernels_on(like.device):
            return None
        block = self.block()
        if (block.dtype, block.device) != (like.dtype, like.device):
            return None
        many = max(samples, 1)
        kind = band(self.pattern, many, self.both, len(block), reverse, like.dtype, like.device)
        if kind is None:
            return None
        from ...kernels.band import dense

        def make() -> tuple[Tensor, ...]:
            seeds = numpy.arange(self.pattern.shape[not reverse])
            colour = torch.from_numpy(self._colour(seeds)).to(like.device, torch.int32)
            found = (self.pattern.supports[t] for t in self.pattern.bands)
            dense = ((t.T if reverse else t).dense() for t in found)
            return (colour, *(torch.from_numpy(t).to(like.device, torch.uint8) for t in dense))

        rows, columns = self.pattern.shape

        def kernel(n: int, out: Tensor | None) -> Tensor:
            key = (
                "band",
                self.pattern.key,
                tables_key(self.sweep),
                self.sweep.layout,
                self.final,
                reverse,
                samples,
            )
            colour, *supports = fixed((*key, like.device), make)
            out = block.new_empty(self.sized(n)) if out is None else out.view(self.sized(n))
            values = self._of_samples(block)[:n]
            target = out.transpose(1, -1) if reverse else out
            dense(values.reshape(n, len(block), -1), colour, tuple(supports), out=target)
            return out

        def steps(n: int, dtype: torch.dtype | None) -> Tensor:
            dtype = dtype or block.dtype
            return self._formed(lambda place: self._values(place)[:n].to(dtype))

        out = self.target()
        entries = max(rows * columns * (many if self.both else 1), block.numel() // many)
        made = chooser.run(Pass(kind, many, entries, kernel, steps), out)
        return None if made is None else self.given(made, out is not None)


SMALL = 1 << 12
"""Entries of a Jacobian up to which it is no matter that all are there: two points are enough for one distance."""


def check_pattern(graph: Graph, ys, xs, per_sample: bool | str, some: bool = False) -> None:
    """Raise ValueError where the analysis knows of no zeros in a Jacobian (of a sample, under ``per_sample``).

    ``some``: not where it does in that of another output or input, nor for `SMALL` ones.
    """
    told = indices(graph)
    sizes = (*(y.shape for y in ys), *(x.shape for x in xs))
    key = graph.key, known_by(graph), bool(per_sample), some, sizes
    if key in _checked:
        return
    dense: ValueError | None = None
    known = False
    for i, v in enumerate(graph.inputs):
        trace = None if v is None else Trace(graph, v, told is not None)
        for j, end in enumerate(graph.outputs):
            pattern = None if trace is None or end is None else pattern_of(trace, end)
            if pattern is None or not ys[j].numel() or not xs[i].numel():
                continue
            whole, n = pattern, xs[i].shape[0] if per_sample else 0
            if per_sample and (pattern := pattern.sample(n, joined=True)) is None:
                op = graph.values[trace.lost(end)]
                raise ValueError(
                    f"a sparse Jacobian for each sample needs samples that are known not to mix, and the op {op.op} "
                    f"(output {tuple(op.shape)}) mixes them, as far as is known; drop per_sample, or use "
                    "layout=torch.strided"
                )
            if pattern.nnz == prod(pattern.shape) > 1:
                op = graph.values[trace.lost(end, n > 1)]
                what = "of a sample's Jacobian" if whole is not pattern else "of the Jacobian"
                dense = ValueError(
                    f"layout asks for a sparse result, but every entry {what} of output {j} by input {i} can be "
                    f"non-zero, as far as is known: the op {op.op} (output {tuple(op.shape)}) mixes all that it is "
                    "given; use layout=torch.strided, or name the entries by pattern= of jacobian"
                )
                if not some:
                    raise dense
            else:
                known = True
    small = sum(y.numel() for y in ys) * sum(x.numel() for x in xs) <= SMALL
    if dense is not None and not (known or small):
        raise dense
    _checked[key] = True


def nothing(
    form: str, y: Tensor, x: Tensor, per_sample: bool | str, like: Tensor, size: tuple[int, int] | None = None
):  # fmt: skip
    """The sparse Jacobian of an output that does not depend on an input, of the dtype and device of ``like``."""
    shape = (*y.shape, *(x.shape[1:] if per_sample else x.shape))
    samples = len(x) if per_sample else 1
    rows, columns = (prod(t.shape[1:] if per_sample else t.shape) for t in (y, x))
    if form == "coo":
        return torch.sparse_coo_tensor(
            size=shape, dtype=like.dtype, device=like.device, check_invariants=False
        ).coalesce()
    if form == "banded":
        own = y.shape[1:] if per_sample else y.shape
        where = torch.empty((*own, 0), dtype=torch.int64, device=like.device)
        return Banded(like.new_empty((*y.shape, 0)), where, shape)
    lead = (samples,) if per_sample else ()
    made = empty((rows, columns), size or (1, 1), lead, like)
    if form == "csc":
        turned = empty((columns, rows), (1, 1), lead, like).to("csr")
        made = torch.sparse_csc_tensor(
            turned.crow_indices(), turned.col_indices(), turned.values(), (*lead, rows, columns),
            device=like.device, check_invariants=False,
        )  # fmt: skip
        return made
    return made if form == "blocks" else made.to(form)
