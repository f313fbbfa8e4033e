"""Answers of which only the entries of a pattern are computed: filled into zeros, or returned sparse.

A sweep with colours (see `colours`) leaves a block in which every entry of the pattern has a place of its own, by the
colour of its seed. Here entries are read from there, sample by sample where samples do not mix.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy
import torch
from torch import Tensor

from ..base import backends
from ..base.cache import Cache
from ..base.constants import fixed
from ..base.csr import starts
from ..base.tracing import may_write
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
from .blocks import Blocks, empty, indexed
from .coo import Coo, unravel
from .seeds import colours_in, tables_key

_checked: Cache[tuple, bool] = Cache()
"""Computations whose Jacobians are known to be sparse."""

FORMS = {
    torch.strided: "dense",
    torch.sparse_coo: "coo",
    torch.sparse_csr: "csr",
    torch.sparse_csc: "csc",
    torch.sparse_bsr: "bsr",
    "banded": "banded",
}
"""By the ``layout`` of a call."""

BLOCKED = ("bsr", "blocks")
"""Forms that have a size of blocks; the second is for callers in here, which get `Blocks`."""

ROWS_BYTES = 1 << 26
"""Rows of a dense answer are filled, on a CPU, this many bytes at a time: a file larger than memory is passed once."""


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


class Entries(Answer):
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

    @property
    def both(self) -> bool:
        """Whether the samples are on both sides."""
        return not self.per_sample and self.samples > 1

    def sized(self, n: int) -> tuple[int, ...]:
        """The shape of a dense answer of ``n`` samples, flat at either end."""
        rows, columns = self.pattern.shape
        return (n, rows, n, columns) if self.both else (n, rows, columns)

    def target(self) -> Tensor | None:
        """The caller's tensor, if a kernel can write a dense answer there."""
        out, like = self.dest, self.like
        if out is None or (out.dtype, out.device) != (like.dtype, like.device):
            return None
        return out if out.is_contiguous() else None

    def take(self, made: Tensor, written: bool) -> None:
        """What a kernel has made: the dense answer (``written``: in the caller's tensor), or the block of patches."""
        if self.form == "dense":
            self.made = self._given(made, written)
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
        return self._dense(found, None, target, start).view(self.sized(n))

    def window(self, sel):
        return None

    def allocate(self) -> Tensor:
        return Store.allocate(self)

    def put_patches(self, data: Tensor, chunk) -> None:
        """The block of a chunk of a sweep by patches."""
        seed = self.out if self.sweep.reverse else self.into
        self.store = put(self.store, data, chunk, seed)

    def put(self, data, own, sel) -> None:
        if own and not sel:
            self.store = data
        else:
            scatter(self.part(sel), self.final, data, self.layout, sel)

    def _place(self, entries) -> numpy.ndarray:
        """Where each entry is in the block (of a sample)."""
        sweep, layout = self.sweep, self.final
        seed, value = entries.column, entries.row
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
        """The place of every entry in the block, and where it goes: as the form of the answer needs it."""
        device = self.like.device
        copies = 1 if self.per_sample else max(self.samples, 1)

        def make() -> tuple[Tensor, ...]:
            entries = self.pattern.entries()
            found = [self._place(entries)]
            if self.form == "dense":
                found.append(entries.row * (copies * self.pattern.shape[1]) + entries.column)
                found.append(entries.start)
            elif self.size is not None:
                each = numpy.arange(copies).repeat(len(entries.row))
                rows, columns = self.pattern.shape
                row = numpy.tile(entries.row, copies) + each * rows
                column = numpy.tile(entries.column, copies) + each * columns
                found += indexed(row, column, (copies * rows, copies * columns), self.size)
            elif self.form == "csc":
                order = numpy.argsort(entries.column, kind="stable")
                count = numpy.bincount(entries.column, minlength=self.pattern.shape[1])
                found = [found[0][order], entries.column[order], entries.row[order], starts(count)]
            else:
                found += [entries.row, entries.column, entries.start]
            made = tuple(torch.from_numpy(t).to(device) for t in found)
            if self.form != "banded":
                return made
            return *made, torch.tensor(int(numpy.diff(entries.start).max(initial=0)))

        form = "bsr" if self.size is not None else self.form
        key = (
            form, self.pattern.key, tables_key(self.sweep), self.sweep.layout, self.final, self.sweep.reverse,
            self.samples, copies, device, self.patch, self.size,
        )  # fmt: skip
        return fixed(key, make)

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
        values = self._values(place)
        if values.dtype != self.like.dtype or values.device != self.like.device:
            values = values.to(device=self.like.device, dtype=self.like.dtype)
        if self.form == "dense":
            made = self._dense(values, self.dest, *where)
            return self._given(made, made is self.dest)
        if self.size is not None:
            made = self._blocked(values, *where)
            return made if self.form == "blocks" else made.to(self.form)
        if self.form in ("csr", "csc"):
            return self._compressed(values, *where)
        shape = (*self.out, *(self.into[1:] if self.per_sample else self.into))
        return {"coo": self._coo, "banded": self._banded}[self.form](values, shape, *where)

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
        return None if made is None else self._given(made, out is not None)

    def _given(self, dense: Tensor, written: bool) -> Tensor:
        """A dense answer in the caller's tensor, if there is one; ``written``: it is there."""
        if written:
            return self.dest
        dense = dense.view(*self.out, *(self.into[1:] if self.per_sample else self.into))
        return dense if self.dest is None else self.dest.copy_(dense)

    def _dense(self, values: Tensor, dest: Tensor | None, target: Tensor, start: Tensor) -> Tensor:
        """Zeros around the ``values`` of some samples, in ``dest`` if it is contiguous."""
        rows, columns = self.pattern.shape
        many = len(values)
        width = columns * (1 if self.per_sample else many)
        step = rows * width + (0 if self.per_sample else columns)
        if not may_write():
            at = target + step * torch.arange(many, device=target.device)[:, None]
            flat = values.new_zeros(many * rows * width)
            return flat.index_copy(0, at.reshape(-1), values.reshape(-1))
        if dest is None or not dest.is_contiguous() or dest.device != values.device:
            dest = values.new_empty(many * rows * width)
        flat, each = dest.view(-1), max(rows, 1)
        if dest.device.type == "cpu":
            each = max(1, ROWS_BYTES // max(width * values.element_size(), 1))
        if each >= rows:
            # from its first row to its last, no sample reaches into another
            span = max(0, (rows - 1) * width + columns)
            flat.zero_().as_strided((many, span), (step, 1)).index_copy_(1, target, values)
            return dest
        ends = [*range(0, rows, each), rows]
        places = start[ends].tolist()
        for i, own in enumerate(values):
            for (r0, r1), (a, b) in zip(pairwise(ends), pairwise(places), strict=True):
                flat[(i * rows + r0) * width : (i * rows + r1) * width].zero_()
                flat[i * step :].index_copy_(0, target[a:b], own[a:b])
        return dest

    def _blocks(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sample, row, column) of every entry, row by row, of all samples."""
        many = max(self.samples, 1)
        sample = torch.arange(many, device=row.device).repeat_interleave(len(row))
        return sample, row.repeat(many), column.repeat(many)

    def _coo(self, values: Tensor, shape, row: Tensor, column: Tensor, start: Tensor) -> Tensor:
        rows, columns = self.pattern.shape
        sample, row, column = self._blocks(row, column)
        index = [unravel(sample * rows + row, self.out)]
        if self.per_sample:
            index.append(unravel(column, self.into[1:]))
        else:
            index.append(unravel(sample * columns + column, self.into))
        return Coo.apply(values.reshape(-1), torch.cat(index), shape)

    def _compressed(self, values: Tensor, major: Tensor, minor: Tensor, start: Tensor) -> Tensor:
        """CSR or CSC: entries in the order of ``major``, rows or columns, each of which has a ``start``."""
        rows, columns = self.pattern.shape
        many, wide, make = max(self.samples, 1), columns, torch.sparse_csr_tensor
        if self.form == "csc":
            wide, make = rows, torch.sparse_csc_tensor
        if self.per_sample:
            ends, place = (t.expand(many, -1).contiguous() for t in (start, minor))
            return make(ends, place, values, (many, rows, columns), check_invariants=False)
        sample, _, minor = self._blocks(major, minor)
        first = start[:-1] + (torch.arange(many, device=major.device) * len(major))[:, None]
        ends = torch.cat([first.reshape(-1), first.new_full((1,), many * len(major))])
        place, size = sample * wide + minor, (many * rows, many * columns)
        return make(ends, place, values.reshape(-1), size, check_invariants=False)

    def _blocked(self, values: Tensor, start: Tensor, column: Tensor, slot: Tensor) -> Blocks:
        """Blocks of all samples together, or ``per_sample`` of each."""
        (rows, columns), (r, c) = self.pattern.shape, self.size
        many = max(self.samples, 1)
        if not self.per_sample:
            values, rows, columns = values.reshape(1, -1), many * rows, many * columns
        if r * c > 1:  # entries are in the order of rows
            size = len(column) * r * c
            values = values.new_zeros(len(values), size).index_copy(1, slot, values)
        values = values.view(len(values), len(column), r, c)
        key = (self.pattern.key, self.samples, self.size)
        made = Blocks(start, column, values, (rows, columns), key)
        return made if self.per_sample else made.with_values(values[0])

    def _banded(self, values: Tensor, shape, row, column, start, width: Tensor) -> Banded:
        rows, columns = self.pattern.shape
        width = int(width)
        at = row * width + torch.arange(len(row), device=row.device) - start[row]
        band = values.new_zeros(len(values), rows * width).index_copy(1, at, values)
        where = column.new_full((rows * width,), -1).index_copy(0, at, column)
        if self.per_sample:
            return Banded(band.view(*self.out, width), where.view(*self.out[1:], width), shape)
        many = max(self.samples, 1)
        offset = torch.arange(many, device=row.device)[:, None] * columns
        where = torch.where(where < 0, where, where + offset)
        return Banded(band.view(*self.out, width), where.view(*self.out, width), shape)


def check_pattern(graph: Graph, ys, xs, per_sample: bool | str, some: bool = False) -> None:
    """Raise ValueError where the analysis knows of no zeros in a Jacobian (of a sample, under ``per_sample``).

    ``some``: not where it does in that of another output or input.
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
                    "given; use layout=torch.strided"
                )
                if not some:
                    raise dense
            else:
                known = True
    if dense is not None and not known:
        raise dense
    _checked[key] = True


def nothing(
    form: str, y: Tensor, x: Tensor, per_sample: bool | str, size: tuple[int, int] | None = None
):
    """The sparse Jacobian of an output that does not depend on an input."""
    shape = (*y.shape, *(x.shape[1:] if per_sample else x.shape))
    samples = len(x) if per_sample else 1
    rows, columns = prod(y.shape) // max(samples, 1), prod(x.shape) // max(samples, 1)
    if form == "coo":
        return torch.sparse_coo_tensor(
            size=shape, dtype=x.dtype, device=x.device, check_invariants=False
        ).coalesce()
    if form == "banded":
        own = y.shape[1:] if per_sample else y.shape
        where = torch.empty((*own, 0), dtype=torch.int64, device=x.device)
        return Banded(x.new_empty((*y.shape, 0)), where, shape)
    lead = (samples,) if per_sample else ()
    made = empty((rows, columns), size or (1, 1), lead, x)
    if form == "csc":
        turned = empty((columns, rows), (1, 1), lead, x).to("csr")
        made = torch.sparse_csc_tensor(
            turned.crow_indices(), turned.col_indices(), turned.values(), (*lead, rows, columns),
            check_invariants=False,
        )  # fmt: skip
        return made
    return made if form == "blocks" else made.to(form)
