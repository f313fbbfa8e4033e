"""What an object says of itself, as text and, in a notebook, as HTML: the same lines and tables."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Table(NamedTuple):
    """Rows of texts under a ``head``, which may be empty."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def __str__(self) -> str:
        rows = [r for r in (self.head, *self.rows) if r]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        )

    def html(self) -> str:
        rows = [_row("th", self.head)] if self.head else []
        rows += [_row("td", r) for r in self.rows]
        return f'<table style="border-collapse: collapse">{"".join(rows)}</table>'


class Picture(NamedTuple):
    """The entries of a matrix that are there, as shares of the cells of a grid; text leaves it out."""

    shares: Tensor

    def html(self) -> str:
        rows, columns = self.shares.shape
        cells = []
        for i, row in enumerate(self.shares.tolist()):
            for share, run in groupby(range(columns), row.__getitem__):
                if share:
                    j, *more = run
                    shade = f' fill-opacity="{0.25 + 0.75 * share:.2f}"' if share < 1 else ""
                    cells.append(
                        f'<rect x="{j}" y="{i}" width="{1 + len(more)}" height="1"{shade}/>'
                    )
        return (
            f'<svg viewBox="0 0 {columns} {rows}" width="{4 * columns}" height="{4 * rows}" fill="currentColor" '
            f'style="border: 1px solid currentColor" role="img">{"".join(cells)}</svg>'
        )

    def braille(self) -> str:
        """A frame around dots of the cells that have an entry, two by four of them in a character."""
        rows, columns = self.shares.shape
        lines, wide = -(-rows // 4), -(-columns // 2)
        there = np.zeros((4 * lines, 2 * wide), np.int64)
        there[:rows, :columns] = self.shares.numpy() > 0
        dots = (there.reshape(lines, 4, wide, 2) * _DOTS[:, None]).sum((1, 3))
        text = ["".join(chr(0x2800 + dot) for dot in line) for line in dots.tolist()]
        return "\n".join(
            ["┌" + "─" * wide + "┐", *(f"│{t}│" for t in text), "└" + "─" * wide + "┘"]
        )


_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
"""What each dot of a braille character adds to its number in Unicode."""


class Shown:
    """An object whose text and whose HTML are made of the parts that ``_parts`` gives: texts, tables and pictures."""

    __slots__ = ()

    def _parts(self) -> Sequence[str | Table | Picture]:
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(str(p) for p in self._parts() if not isinstance(p, Picture))

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return "".join(
            f'<div style="white-space: pre-wrap">{html.escape(p)}</div>'
            if isinstance(p, str)
            else p.html()
            for p in self._parts()
        )


def _row(tag: str, cells: Sequence[str]) -> str:
    style = "text-align: left; vertical-align: top; padding: 0.1em 0.6em 0.1em 0"
    if tag == "th":
        style += "; border-bottom: 1px solid currentColor"
    made = "".join(f'<{tag} style="{style}">{html.escape(c)}</{tag}>' for c in cells)
    return f"<tr>{made}</tr>"


def spy(
    row: Tensor, column: Tensor, shape: tuple[int, int], cells: tuple[int, int] = (64, 64)
) -> Picture:
    """A picture of at most so many ``cells`` of a matrix's entries, whose indices these are."""
    grid = [max(min(n, most), 1) for n, most in zip(shape, cells, strict=True)]
    at = [
        (i.cpu() * g).div(max(n, 1), rounding_mode="floor")
        for i, g, n in zip((row, column), grid, shape, strict=True)
    ]
    counts = torch.bincount(at[0] * grid[1] + at[1], minlength=grid[0] * grid[1])
    counts = counts.view(*grid).to(torch.float32)
    return Picture(counts / counts.max().clamp(min=1))
