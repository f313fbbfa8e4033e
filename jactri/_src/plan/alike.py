"""`Alike`: a boolean matrix that is many alike blocks on a diagonal, after one that need not be.

Entries that an index picked are mostly worked on row by row from there on, each row as the others: what one of them
does is followed once, however many there are, and entries are listed where an op needs them in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from ..base.csr import Csr, union
from ..maps.cut import Shape
from ..maps.linear_map import LinearMap


@dataclass(frozen=True, eq=False)
class Alike:
    """``count`` times ``block`` on a diagonal, times ``base``."""

    base: Csr
    count: int
    block: Csr

    @staticmethod
    def of(base: Csr) -> Alike:
        return Alike(base, base.height, Csr.identity(1))

    def whole(self, limit: float | None = None) -> Csr | None:
        """The entries; None where more than ``limit`` would be listed."""
        if self.block.is_identity:
            return self.base if limit is None or self.base.nnz <= limit else None
        if limit is not None and self.count * self.block.nnz > limit:
            return None
        return self.block.repeated(self.count).after(self.base, limit)

    def then(self, count: int, block: Csr, limit: float) -> Alike | None:
        """After it, ``count`` times ``block`` on a diagonal; None where more than ``limit`` entries would be listed."""
        if count * block.nnz > limit:
            return None
        common = max(gcd(self.count, count), 1)
        if common == 1:
            before = self.whole(limit)
            if before is None:
                return None
            found = block.repeated(count).after(before, limit)
            return None if found is None else Alike.of(found)
        own, other = self._coarse(common), block.repeated(count // common)
        made = other.after(own, limit / common)
        return None if made is None else Alike(self.base, common, made)

    def _coarse(self, count: int) -> Csr:
        return self.block.repeated(self.count // count)

    def _beside(self, other: Alike) -> bool:
        """Whether both are blocks after the same."""
        return self.base is other.base or self.base.same(other.base)

    @staticmethod
    def union(parts: Sequence[Alike], limit: float) -> Alike | None:
        """The entries of any; None where more than ``limit`` would be listed."""
        first = parts[0]
        if all(p._beside(first) for p in parts):
            count = max(gcd(*(p.count for p in parts)), 1)
            return Alike(first.base, count, union([p._coarse(count) for p in parts]))
        found = [p.whole(limit) for p in parts]
        known = [f for f in found if f is not None]
        return Alike.of(union(known)) if len(known) == len(found) else None


def leading(edge: LinearMap, in_shape: Shape, out_shape: Shape) -> tuple[int, frozenset[int]]:
    """The number of alike blocks that first axes which a map keeps are, and these, of the input."""
    kept, count, axes = dict(edge.kept(in_shape, out_shape)), 1, set()
    ends = ([a for a, n in enumerate(shape) if n != 1] for shape in (in_shape, out_shape))
    for a, b in zip(*ends, strict=False):
        if kept.get(a) != b:
            break
        count *= in_shape[a]
        axes.add(a)
    return count, frozenset(axes)
