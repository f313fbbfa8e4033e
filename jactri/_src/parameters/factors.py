"""The Jacobian in a parameter as a sum of pieces: cotangents times what the layer saw, and what is made of them.

A `Piece` is ``C``, or ``C`` times ``a``, or ``C`` put into the rows of an index, with lettered axes (see `uses`). An
outer product for a Linear layer, whose ``T`` tokens, if it has some, are summed (Goodfellow 2015, arXiv:1510.01799);
for a convolution ``a`` are the patches of its input (Rochette et al. 2019, arXiv:1912.06015).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..maps.entrywise import selected
from ..maps.layout import Selection, convert, one
from ..maps.lettered import Lettered, contract, cut, diagonals, multiply, once, settled, spread
from ..maps.letters import Letters
from ..read.graph import Graph
from .used import Used
from .uses import Role, Structure, Use


@dataclass
class Piece:
    """One term of the Jacobian in a parameter whose axes have the letters ``axes``.

    Letters below the number of seeds are those of the output. ``a`` may be None; ``index`` numbers rows, whose letter
    is ``row``. ``origin``: a name of the block that ``c`` is, if it is one as it was.
    """

    c: Tensor
    cl: Letters
    axes: tuple[Letters, ...]
    sizes: dict[int, int]
    a: Tensor | None = None
    al: Letters = ()
    index: Tensor | None = None
    il: Letters = ()
    row: int = -1
    origin: int | str | None = None

    @property
    def operands(self) -> list[tuple[Tensor, Letters]]:
        return [(self.c, self.cl)] if self.a is None else [(self.c, self.cl), (self.a, self.al)]

    def narrow(self, axis: int, start: int, length: int) -> Piece | None:
        """A range of one axis of the parameter, or None where letters do not allow that."""
        if len(self.axes[axis]) != 1:
            return None
        (letter,) = self.axes[axis]
        if letter == self.row or sum(letter in axis for axis in self.axes) > 1:
            return None

        spans = {letter: (start, length)}
        c = cut(self.c, self.cl, spans)
        a = None if self.a is None else cut(self.a, self.al, spans)
        return replace(self, c=c, a=a, sizes={**self.sizes, letter: length}, origin=None)


def pieces_of(used: Used, sel: Selection, small: bool) -> dict[int, list[Piece]]:
    """The pieces of every parameter (by its value), for a selection of the output's entries.

    ``small``: they are kept while others are made, so layers whose product is smaller are multiplied out.
    """
    graph, structure = used.graph, used.structure
    blocks = used.blocks(sel)
    seeds = len(structure.sweep.layout.seed)
    found: dict[int, list[Piece]] = {}
    for use in structure.uses:
        block = blocks[use.value]
        if use.pull is None:
            piece = _piece(graph, use, block, sel, structure, small)
            if any(s in axis for axis in piece.axes for s in sel):
                piece = _spread(piece, use.sizes, sel, seeds)
        else:
            piece = _pulled(graph, structure, use, block, sel)
        found.setdefault(use.root, []).append(piece)
    found = {root: _merged(pieces) for root, pieces in found.items()}
    if structure.inner:
        _through(graph, structure, found, sel)
    return found


def joined(parts: list[Piece], letter: int) -> Piece:
    """The pieces of consecutive ranges of a letter of the output as one."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def whole(ends: list[Lettered]) -> Lettered:
        for t, letters in ends:
            if letter not in letters:  # alike along it
                return t, letters
        letters = ends[0][1]
        return torch.cat([t for t, _ in ends], letters.index(letter)), letters

    c, cl = whole([(p.c, p.cl) for p in parts])
    made = replace(
        first, c=c, cl=cl, sizes={**first.sizes, letter: sum(p.sizes[letter] for p in parts)}
    )
    if first.a is not None:
        made.a, made.al = whole([(p.a, p.al) for p in parts])
    if first.index is not None:
        made.index, made.il = whole([(p.index, p.il) for p in parts])
    return made


# -- one use ------------------------------------------------------------------------------------------


def _piece(
    graph: Graph, use: Use, block: Tensor | None, sel: Selection, structure: Structure, small: bool
) -> Piece:
    seeds, batch = len(structure.sweep.layout.seed), structure.batch
    value = graph.values[use.value]
    sizes = {**use.sizes, **{letter: length for letter, (_, length) in sel.items()}}
    roles, steps, outer, index, row = [], [], None, None, -1
    own = {letter for axis in use.axes for letter in axis}
    factor = 1.0
    il: Letters = ()
    for role in use.roles:
        edge = graph.values[role.owner].sources[role.edge][1]
        if role.kind == "scale":
            factor *= edge.factor
        elif role.kind == "rows":
            *lead, row = role.letters
            il = tuple(lead)
            index = edge.index.reshape([use.sizes[s] for s in il])
            index = cut(index, il, sel)
        elif role.kind == "diagonal":
            full = graph.values[role.owner].shape
            for function, d in edge.factors(True):
                d = d.expand(full).reshape([use.sizes[s] for s in role.letters])
                roles.append(once(cut(d, role.letters, sel), role.letters))
                steps.append(function)
        else:
            outer = once(_seen(role, edge, use.sizes, sel), role.letters)
    known = own.union(il, range(seeds), *(letters for _, letters in roles))
    if outer is not None:
        known.update(outer[1])
    # axes of which a range of seeds is selected are whole, but for those of samples, which run alone
    whole = [
        sel[s][1] if s in sel and (i < use.free or s in batch) else use.sizes[s]
        for i, s in enumerate(use.cotangent)
    ]
    c = one(value).expand(whole) if block is None else block.reshape(whole)
    c, cl = once(cut(c, use.cotangent, sel), use.cotangent, known)
    origin = None
    if not roles and factor == 1.0:
        origin = "ones" if block is None else id(block)
    if selected in steps:  # in the order of a pull, which a product does not know
        for function, (t, letters) in zip(steps, roles, strict=True):
            out = tuple(sorted(set(cl).union(letters)))
            c, cl = function(spread(c, cl, out), spread(t, letters, out), False), out
        roles = []
    if roles:
        keep = set(cl).union(*(letters for _, letters in roles))
        kept = own.union(il, range(seeds), outer[1] if outer else ())
        out = tuple(sorted(keep & kept))
        c, cl = multiply([(c, cl), *roles], out), out
    elif outer is None and index is None:
        c, cl = settled(c, cl, own.union(range(seeds)))
    if factor != 1.0:
        c = c * factor
    if outer is not None:
        # the letters that nothing else has are summed once and for all
        t, letters = settled(*outer, own.union(cl, range(seeds)))
        if letters != outer[1]:
            origin = None
        out = tuple(sorted((set(cl) | set(letters)) & own.union(range(seeds))))
        summed = set(cl).intersection(letters).difference(out)
        at_once = small and bool(summed) and use.multiplied(seeds)
        if own.intersection(letters).difference(cl) and not at_once:
            return Piece(c, cl, use.axes, sizes, t, letters, origin=origin)
        return Piece(contract(c, cl, t, letters, out), out, use.axes, sizes)
    return Piece(c, cl, use.axes, sizes, None, (), index, il, row, origin)


def _seen(role: Role, edge, sizes: dict[int, int], sel: Selection) -> Tensor:
    """What an edge multiplies cotangents by, one axis a letter."""
    if role.kind == "matrix":
        return cut(edge.partner.reshape([sizes[s] for s in role.letters]), role.letters, sel)
    x = edge.x
    samples: list[int] = []
    while prod([sizes[s] for s in samples]) < x.shape[0]:
        samples.append(role.letters[len(samples)])
    if any(s in sel for s in samples):  # before there are patches of it
        x = cut(x.unflatten(0, [sizes[s] for s in samples]), samples, sel)
        x = x.flatten(0, len(samples) - 1)
    shape = [sel[s][1] if s in samples and s in sel else sizes[s] for s in role.letters]
    return cut(patches(x, edge.geometry, edge.kernel).reshape(shape), role.letters, sel)


def patches(x: Tensor, geometry, kernel) -> Tensor:
    """What every window of a convolution sees: ``(N, C, *kernel, *windows)``."""
    spatial = len(kernel)
    if spatial == 2:
        cut = F.unfold(x, kernel, geometry.dilation, geometry.padding, geometry.stride)
        windows = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                x.shape[2:],
                geometry.padding,
                geometry.dilation,
                kernel,
                geometry.stride,
                strict=True,
            )
        ]
        return cut.reshape(*x.shape[:2], *kernel, *windows)
    if any(geometry.padding):
        x = F.pad(x, [p for p in reversed(geometry.padding) for _ in range(2)])
    for a in range(spatial):
        k, s, d = kernel[a], geometry.stride[a], geometry.dilation[a]
        first = torch.arange(0, x.shape[2 + 2 * a] - d * (k - 1), s, device=x.device)
        index = torch.arange(k, device=x.device).mul(d).unsqueeze(1) + first
        x = x.index_select(2 + 2 * a, index.flatten()).unflatten(2 + 2 * a, index.shape)
    order = [0, 1, *range(2, 2 + 2 * spatial, 2), *range(3, 3 + 2 * spatial, 2)]
    return x.permute(order)


def _pulled(graph: Graph, structure: Structure, use: Use, block: Tensor | None, sel) -> Piece:
    """The edge called for the cotangents of a sample at a time: the others are zero."""
    sweep, batch = structure.sweep, structure.batch
    value, layout = graph.values[use.value], sweep.layouts[use.value]
    edge = graph.values[use.pull[0]].sources[use.pull[1]][1]
    only = layout.drop(layout.tied - batch)
    full = convert(
        block, layout, only, sel, torch.empty((), dtype=value.dtype, device=value.device)
    )
    seeds = [(letter, sel[letter][1] if letter in sel else n) for letter, n in enumerate(only.seed)]
    sizes = {**use.sizes, **dict(seeds)}
    if full is None:
        full = torch.ones(1, *value.shape, dtype=value.dtype, device=value.device)
    letters = tuple(sorted(batch))
    ties = [t for axis in only.axes for _, t in axis]
    fine = [n for axis in only.axes for n, _ in axis]
    view = full.reshape(full.shape[0], *fine)
    rows = []
    for number in range(prod([sizes[s] for s in letters])):
        rest, mask = number, torch.zeros_like(view)
        inside, source = mask, view
        for letter in reversed(letters):
            rest, at = divmod(rest, sizes[letter])
            dim = 1 + ties.index(letter)
            inside, source = inside.narrow(dim, at, 1), source.narrow(dim, at, 1)
        inside.copy_(source)
        rows.append(edge.pull(mask.reshape(full.shape), False)[0])
    free = [letter for letter, _ in seeds if letter not in batch]
    found = torch.stack(rows).reshape(
        *(sizes[s] for s in letters), *(sizes[s] for s in free), *graph.values[use.root].shape
    )
    own = tuple([letter for axis in use.axes for letter in axis])
    return Piece(found, (*letters, *free, *own), use.axes, sizes)


# -- the uses of one parameter ------------------------------------------------------------------------


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Uses of one form as one, their sum: a step of a recurrent net is one token."""
    if len(pieces) < 2:
        return pieces
    groups: dict[tuple, list[Piece]] = {}
    for p in pieces:
        shapes = tuple(p.c.shape), () if p.a is None else tuple(p.a.shape)
        groups.setdefault((p.cl, p.al, p.il, p.axes, p.row, shapes, p.c.dtype), []).append(p)
    out = []
    for same in groups.values():
        first = same[0]
        if len(same) == 1:
            out.append(first)
        elif first.a is None and first.index is None:
            out.append(replace(first, c=sum(p.c for p in same), origin=None))
        else:
            step = max(first.sizes) + 1
            merged = replace(
                first, c=torch.stack([p.c for p in same]), cl=(step, *first.cl), origin=None,
                sizes={**first.sizes, step: len(same)},
            )  # fmt: skip
            if first.a is not None:
                merged.a, merged.al = torch.stack([p.a for p in same]), (step, *first.al)
            if first.index is not None:
                merged.index, merged.il = torch.stack([p.index for p in same]), (step, *first.il)
            out.append(merged)
    return out


def _spread(piece: Piece, full: dict[int, int], sel: Selection, seeds: int) -> Piece:
    """A piece with a diagonal, of whose rows some are selected: the parameter keeps all of its entries.

    The diagonal becomes a matrix of zeros and ones, a factor of the cotangents.
    """
    axes, sizes, count = [], dict(piece.sizes), max(piece.sizes) + 1
    c, cl = piece.c, piece.cl
    for axis in piece.axes:
        own = []
        for letter in axis:
            if letter < seeds and letter in sel:
                start, length = sel[letter]
                rows = torch.eye(full[letter], dtype=c.dtype, device=c.device)
                out = (*(s for s in cl if s != letter), letter, count)
                c, cl = contract(c, cl, rows.narrow(0, start, length), (letter, count), out), out
                sizes[count] = full[letter]
                letter, count = count, count + 1
            own.append(letter)
        axes.append(tuple(own))
    return replace(piece, c=c, cl=cl, axes=tuple(axes), sizes=sizes, origin=None)


def _through(graph: Graph, structure: Structure, found: dict[int, list[Piece]], sel) -> None:
    """Replace the pieces of what is made of parameters by those of the parameters, formed."""
    seeds = [sel[s][1] if s in sel else n for s, n in enumerate(structure.sweep.layout.seed)]
    count = prod(seeds)
    blocks = {}
    for root in structure.inner:
        value = graph.values[root]
        dense = formed(found.pop(root), seeds, value.shape, value.dtype, value.device)
        blocks[root] = dense.reshape(count, *value.shape)
    for v in range(max(blocks), -1, -1):
        sources = graph.values[v].sources
        if v not in blocks or not sources:
            continue
        block = blocks.pop(v)
        for s, edge in sources:
            pulled, _ = edge.pull(block, False)
            blocks[s] = blocks[s] + pulled if s in blocks else pulled
    for leaf, block in blocks.items():
        shape = graph.values[leaf].shape
        sizes = dict(enumerate([*seeds, *shape]))
        axes = tuple((len(seeds) + a,) for a in range(len(shape)))
        piece = Piece(block.reshape(*seeds, *shape), tuple(sizes), axes, sizes)
        found[leaf] = _merged([*found.get(leaf, []), piece])


# -- formed -------------------------------------------------------------------------------------------


def formed(pieces: list[Piece], seeds: list[int], shape, dtype, device) -> Tensor:
    """The Jacobian ``(*seeds, *shape)`` itself."""
    zero = bool(pieces) and _diagonal(pieces[0], len(seeds))
    make = torch.zeros if zero or not pieces else torch.empty
    out = make((*seeds, *shape), dtype=dtype, device=device)
    write(pieces, out, len(seeds), cleared=zero)
    return out


def _diagonal(piece: Piece, seeds: int) -> bool:
    """Whether the piece vanishes but on diagonals: a letter of the output is one of the parameter."""
    return any(letter < seeds for axis in piece.axes for letter in axis)


def write(pieces: list[Piece], out: Tensor, seeds: int, cleared: bool = False, add=False) -> None:
    """Write the Jacobian into ``out``, which has the axes of the output and then those of the parameter.

    ``cleared``: it holds zeros. ``add``: what it holds is a part of the sum.
    """
    if not add and not cleared and (not pieces or _diagonal(pieces[0], seeds)):
        out.zero_()
    for piece in pieces:
        view, letters = _window(piece, out, seeds)
        if piece.index is None and not add and view.dtype == piece.c.dtype:
            multiply(piece.operands, letters, view)
        else:
            made = (
                multiply(piece.operands, letters)
                if piece.index is None
                else _in_rows(piece, letters)
            )
            view.add_(made) if add else view.copy_(made)
        add = True


def _window(piece: Piece, out: Tensor, seeds: int) -> tuple[Tensor, Letters]:
    """The part of the result in which a piece lies, as a view with one axis a letter."""
    names = [*range(seeds), *(letter for axis in piece.axes for letter in axis)]
    view = out.view([piece.sizes[s] for s in names])
    return diagonals(view, names)


def _in_rows(piece: Piece, out: Letters) -> Tensor:
    """Cotangents added to the rows that an index names, with axes ``out``."""
    il, row, sizes = piece.il, piece.row, piece.sizes
    kept = [s for s in il if s in out]
    number = piece.index
    stride = sizes[row]
    for s in reversed(kept):
        i = il.index(s)
        at = torch.arange(sizes[s], device=number.device).view(-1, *[1] * (len(il) - 1 - i))
        number = number + at * stride
        stride = stride * sizes[s]
    rest = tuple([s for s in out if s not in il and s != row])
    source = spread(*settled(piece.c, piece.cl, {*il, *rest}), (*il, *rest))
    source = source.expand([sizes[s] for s in (*il, *rest)]).reshape(
        prod([sizes[s] for s in il]), -1
    )
    total = source.new_zeros(stride, source.shape[1]).index_add_(0, number.reshape(-1), source)
    total = total.reshape([sizes[s] for s in (*kept, row, *rest)])
    return spread(total, (*kept, row, *rest), out)
