"""Values of the entries of a pattern as an answer: filled into zeros, as a sparse tensor of any layout, or `Banded`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from ..base.constants import fixed
from ..base.csr import Csr, starts
from ..base.tracing import may_write
from ..maps.cut import Shape
from ..plan.pattern import Pattern
from .banded import Banded
from .blocks import Blocks, indexed
from .coo import Coo, unravel

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


class Like(NamedTuple):
    """What of a tensor an answer is like."""

    dtype: torch.dtype
    device: torch.device


class Unformed:
    """The values of a sparse answer, by which `formed` makes it; for a pytree they are its leaf.

    ``unsure``: they are those of another order than autograd's if all are finite, which a trace cannot tell.
    """

    def __init__(self, values: Tensor, how: Formed, unsure: bool = False):
        self.values, self.how, self.unsure = values, how, unsure
        how.like = Like(how.like.dtype, how.like.device)  # a trace's would be kept

    def formed(self) -> Tensor | Banded | Blocks:
        return self.how.of_values(self.values)


register_pytree_node(
    Unformed,
    lambda t: ([t.values], (t.how, t.unsure)),
    lambda values, about: Unformed(next(iter(values)), *about),
)


Places = Callable[[numpy.ndarray, numpy.ndarray], numpy.ndarray]
"""Of rows and columns of entries: where these are among what is known."""


class Formed:
    """A Jacobian of ``out`` by ``into`` of which the entries of a pattern are known.

    ``samples``: the ``pattern`` is that of each of so many, which do not mix; 0: of all together. ``form``: by the
    ``layout`` of a call, with the ``size`` of blocks where it has any. ``like`` has the dtype and device of the answer,
    which goes to ``dest``, if there is one and it is dense.
    """

    out: Shape
    into: Shape
    per_sample: bool | str
    samples: int
    pattern: Pattern
    form: str
    size: tuple[int, int] | None
    like: Tensor | Like
    dest: Tensor | None

    @staticmethod
    def known(
        out: Shape,
        into: Shape,
        per_sample: bool | str,
        pattern: Csr,
        form: str,
        size: tuple[int, int] | None,
        like: Tensor,
        dest: Tensor | None = None,
    ) -> Formed:
        """For values of a pattern that is known; under ``per_sample`` that of each sample."""
        made = Formed()
        made.out, made.into, made.per_sample = out, into, per_sample
        made.samples = out[0] if per_sample else 0
        made.pattern, made.form, made.size = Pattern.of(pattern), form, size
        made.like, made.dest = like, dest
        return made

    def of_values(self, values: Tensor) -> Tensor | Banded | Blocks:
        """The answer of ``values`` ``(samples or 1, entries)`` in the order of the pattern."""
        place, *where = self.where(("values",))
        if self.form == "csc" or self.size is not None:  # which have an order of their own
            values = values.index_select(1, place)
        return self.answer(values, *where)

    @property
    def both(self) -> bool:
        """Whether the samples are on both sides."""
        return not self.per_sample and self.samples > 1

    @property
    def many(self) -> int:
        """How many samples there are, or 1 where they are not told apart."""
        return self.samples if self.per_sample else max(self.samples, 1)

    def sized(self, n: int) -> tuple[int, ...]:
        """The shape of a dense answer of ``n`` samples, flat at either end."""
        rows, columns = self.pattern.shape
        return (n, rows, n, columns) if self.both else (n, rows, columns)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.out, *(self.into[1:] if self.per_sample else self.into))

    def where(self, key: tuple, place: Places | None = None) -> tuple[Tensor, ...]:
        """The ``place`` of every entry among what is known, and where it goes: as the form of the answer needs it.

        ``key``: what decides the place beside the pattern. Without a ``place``, values are in the order of the pattern.
        """
        device = self.like.device
        copies = 1 if self.per_sample else self.many

        def make() -> tuple[Tensor, ...]:
            entries = self.pattern.entries()
            at = self._places(entries, place)
            if self.form == "dense":
                target = entries.row
                target *= copies * self.pattern.shape[1]
                target += entries.column
                found = [at, target, entries.start]
            elif self.size == (1, 1) and copies == 1:
                found = [at, entries.start, entries.column, entries.column[:0]]
            elif self.size is not None:
                start, column, slot = indexed(entries, copies, self.size)
                if copies == 1 and len(slot) == len(column) * prod(self.size):
                    # no block has a hole: values come in the order of blocks
                    ordered = numpy.empty_like(at)
                    ordered[slot] = at
                    at, slot = ordered, slot[:0]
                found = [at, start, column, slot]
            elif self.form == "csc":
                order = numpy.argsort(entries.column, kind="stable")
                at = at[order]
                found = [at, entries.row[order], starts(entries.in_columns)]
            elif self.form == "csr":
                found = [at, entries.column, entries.start]
            else:
                found = [at, entries.row, entries.column, entries.start]
            made = tuple(torch.from_numpy(t).to(device) for t in found)
            if self.form != "banded":
                return made
            return *made, torch.tensor(entries.most, device="cpu")

        form = "bsr" if self.size is not None else self.form
        return fixed((form, self.pattern.key, *key, self.samples, copies, device, self.size), make)

    def _places(self, entries: Csr, place: Places | None) -> numpy.ndarray:
        """The place of every entry, found some at a time: what that takes is several times what is kept."""
        if place is None:
            return numpy.arange(entries.nnz)
        parts = [numpy.zeros(0, numpy.int32)]
        for row, column in entries.listed():
            found = place(row, column)
            small = found.max() < 1 << 31
            parts.append(found.astype(numpy.int32) if small else found)
        return numpy.concatenate(parts)

    def answer(self, values: Tensor, *where: Tensor) -> Tensor | Banded | Blocks:
        """The answer of ``values`` ``(samples or 1, entries)``, which belong ``where`` the index says."""
        if values.dtype != self.like.dtype or values.device != self.like.device:
            values = values.to(device=self.like.device, dtype=self.like.dtype)
        if self.form == "dense":
            made = self.dense(values, self.dest, *where)
            return self.given(made, made is self.dest)
        if self.size is not None:
            made = self._blocked(values, *where)
            return made if self.form == "blocks" else made.to(self.form)
        if self.form in ("csr", "csc"):
            return self._compressed(values, *where)
        return self._banded(values, *where) if self.form == "banded" else self._coo(values, *where)

    def given(self, dense: Tensor, written: bool) -> Tensor:
        """A dense answer in the caller's tensor, if there is one; ``written``: it is there."""
        if written:
            return self.dest
        dense = dense.view(self.shape)
        return dense if self.dest is None else self.dest.copy_(dense)

    def dense(self, values: Tensor, dest: Tensor | None, target: Tensor, start: Tensor) -> Tensor:
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
        many = self.many
        sample = torch.arange(many, device=row.device).repeat_interleave(len(row))
        return sample, row.repeat(many), column.repeat(many)

    def _coo(self, values: Tensor, row: Tensor, column: Tensor, start: Tensor) -> Tensor:
        rows, columns = self.pattern.shape
        sample, row, column = self._blocks(row, column)
        index = [unravel(sample * rows + row, self.out)]
        if self.per_sample:
            index.append(unravel(column, self.into[1:]))
        else:
            index.append(unravel(sample * columns + column, self.into))
        return Coo.apply(values.reshape(-1), torch.cat(index), self.shape)

    def _compressed(self, values: Tensor, minor: Tensor, start: Tensor) -> Tensor:
        """CSR or CSC: entries in the order of rows, or of columns, each of which has a ``start``."""
        rows, columns = self.pattern.shape
        many, wide, make = self.many, columns, torch.sparse_csr_tensor
        if self.form == "csc":
            wide, make = rows, torch.sparse_csc_tensor
        if self.per_sample:  # the index is the caller's own, as in all that follows
            ends, place = start.repeat(many, 1), minor.repeat(many, 1)
            return self._matrix(make, ends, place, values, (many, rows, columns))
        sample = torch.arange(many, device=minor.device)[:, None]
        first = start[:-1] + sample * len(minor)
        ends = torch.cat([first.reshape(-1), first.new_full((1,), many * len(minor))])
        place, size = minor + sample * wide, (many * rows, many * columns)
        return self._matrix(make, ends, place.reshape(-1), values.reshape(-1), size)

    def _matrix(self, make, ends: Tensor, place: Tensor, values: Tensor, size) -> Tensor:
        """A sparse tensor where its values are, which is not torch's default."""
        return make(ends, place, values, size, device=values.device, check_invariants=False)

    def _blocked(self, values: Tensor, start: Tensor, column: Tensor, slot: Tensor) -> Blocks:
        """Blocks of all samples together, or ``per_sample`` of each."""
        (rows, columns), (r, c) = self.pattern.shape, self.size
        many = 1 if self.per_sample else self.many
        if not self.per_sample:
            values, rows, columns = values.reshape(1, -1), many * rows, many * columns
        if len(slot):  # else entries are in the order of blocks
            size = len(column) * r * c
            values = values.new_zeros(len(values), size).index_copy(1, slot, values)
        values = values.view(len(values), len(column), r, c)
        key = (self.pattern.key, many, self.size)
        made = Blocks(start, column, values, (rows, columns), key)
        return made if self.per_sample else made.with_values(values[0])

    def _banded(self, values: Tensor, row, column, start, width: Tensor) -> Banded:
        rows, columns = self.pattern.shape
        width = int(width)
        at = row * width + torch.arange(len(row), device=row.device) - start[row]
        band = values.new_zeros(len(values), rows * width).index_copy(1, at, values)
        where = column.new_full((rows * width,), -1).index_copy(0, at, column)
        if self.per_sample:
            return Banded(band.view(*self.out, width), where.view(*self.out[1:], width), self.shape)
        many = self.many
        offset = torch.arange(many, device=row.device)[:, None] * columns
        where = torch.where(where < 0, where, where + offset)
        return Banded(band.view(*self.out, width), where.view(*self.out, width), self.shape)
