"""A Jacobian on disk that several ranks write to: which parts of it are there, whoever wrote them.

Beside a memmap ``J.npy`` lies ``J.npy.progress.3`` while rank 3 writes to it: what is being computed, how it is cut,
and for each finished part a checksum of some of its entries. A later call reads the files of all ranks, however many
there were, and deals out what is left. They go when all ranks have done their part.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..base.journal import EVERY, checksum, differs, holds, left_by_ranks, path_of, write
from .agreement import Ranks

_log = logging.getLogger("jactri")

Span = tuple[int, int, int]
"""A part of the answer: (number of the output or input, start, length)."""


class Dealt:
    """The progress file of one rank, which knows those of others."""

    def __init__(
        self, maps: list[np.memmap], what: dict[str, Any], cut: Any, ranks: Ranks, resume: bool
    ):
        """Read what an earlier call left; raise RuntimeError if that was another computation (``resume``)."""
        self.maps, self._ranks = maps, ranks
        alone = path_of(maps[0])
        self._path = alone.with_name(f"{alone.name}.{ranks.rank}")
        self._alone = alone
        self._state = {**what, "cut": json.loads(json.dumps(cut)), "done": {}}
        self._saved = 0.0
        self.known: dict[str, list[int]] = {}
        """Checksums of all parts that are there, by `name`."""
        if not resume:
            return
        if alone.exists():
            raise RuntimeError(
                f"out: {alone} is of an interrupted call without mesh=; leave mesh= out to go on, or pass resume=False "
                "to start over"
            )
        for rank, file in left_by_ranks(alone).items():
            left = self._read(file, what)
            self.known |= left
            if rank == ranks.rank:
                self._state["done"] = left

    def _read(self, file: Path, what: dict[str, Any]) -> dict[str, list[int]]:
        try:
            left = json.loads(file.read_text())
            reason = differs(what, left)
            done = dict(left["done"])
            if reason is None and left["cut"] != self._state["cut"]:
                reason = "order"
        except (ValueError, KeyError, TypeError, AttributeError):
            reason = "format"
        if reason is not None:
            raise RuntimeError(
                f"out: {file} is of an interrupted call for another computation (its {reason} differs); pass "
                "resume=False to start over, or another file"
            )
        return done

    def mine(self, spans: Sequence[Span]) -> list[Span]:
        """Those that this rank is to compute, of those that are not there."""
        left = [s for s in spans if name(s) not in self.known]
        first, last = (
            len(left) * r // self._ranks.size for r in (self._ranks.rank, self._ranks.rank + 1)
        )
        return left[first:last]

    def check(self, span: Span, number: int, parts: Sequence[Tensor]) -> None:
        """Raise RuntimeError where the file does not hold what the journal of a part says."""
        if name(span) in self.known and not holds(number, parts, self.known[name(span)]):
            raise RuntimeError(
                f"out: the file of {self._alone} does not hold what the interrupted call wrote (was it made anew with "
                "mode 'w+'?); open it with mode 'r+', or pass resume=False to start over"
            )

    def begin(self) -> None:
        """After all ranks have read what was left: begin a file."""
        if self._ranks.rank == 0 and not self.known:
            self._alone.unlink(missing_ok=True)
            self._forget(self._ranks.size)
        if self.known:
            _log.info("resuming %s after %d parts", self._alone, len(self.known))
        self.save()

    def done(self, span: Span, number: int, parts: Sequence[Tensor]) -> None:
        """A part was written to ``parts`` of the results."""
        self._state["done"][name(span)] = checksum(number, parts)
        if time.monotonic() - self._saved > EVERY:
            self.save()

    def save(self) -> None:
        """Write the results to disk, then the journal: it never claims what is not there."""
        write(self.maps, self._path, self._state)
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Wait for all ranks, and remove what they noted."""
        self.save()
        self._ranks.agree({})
        self._path.unlink(missing_ok=True)
        if self._ranks.rank == 0:
            self._forget(self._ranks.size)
        self._ranks.agree({})  # before one of them begins another call with this file

    def _forget(self, first: int) -> None:
        """Remove files of ranks that are not there any more."""
        for rank, file in left_by_ranks(self._alone).items():
            if rank >= first:
                file.unlink(missing_ok=True)


def name(span: Span) -> str:
    """A part, as a file names it."""
    return ":".join(map(str, span))
