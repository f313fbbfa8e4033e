"""A Jacobian on disk: which chunks of it are written, so that an interrupted call goes on where it stopped.

Beside a memmap ``J.npy`` lies ``J.npy.progress`` while a call writes to it: what is being computed, and for each
finished chunk a checksum of some of its entries. It goes when the result is complete.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .classes import PLAIN, plain

_log = logging.getLogger("jactri")

EVERY = 1.0
"""Seconds between two saves: a killed process loses the chunks since the last one."""

_ENTRIES = 64
"""Entries of a chunk that its checksum covers, beside one that is not 0, and of the outputs that are compared."""

_AT_ONCE = 1 << 20
"""Entries that are looked at together."""

_FORM = 3
"""The form of the file."""


def on_disk(arrays) -> list[np.memmap]:
    """Those of the caller's ``out`` whose file is written to."""
    return [a for a in arrays if isinstance(a, np.memmap) and a.filename and a.mode != "c"]


def path_of(mapped: np.memmap) -> Path:
    """Where the journal of a memmap lies; parts of one file have one each."""
    whole = np.frombuffer(mapped._mmap, dtype=np.uint8)
    start = mapped.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    name = Path(mapped.filename)
    part = "" if start + mapped.nbytes >= whole.nbytes and start <= mapped.offset else f".{start}"
    return name.with_name(name.name + part + ".progress")


def identity(graph_key, ys, xs, weights, per_sample: bool | str) -> dict:
    """What makes a computation the same one: its ops and shapes, its inputs and the ``weights`` that its graph leads to
    bit by bit, samples of its outputs.
    """
    samples = []
    for k, y in enumerate(ys):
        flat = y.detach().reshape(-1)
        where = _places(k, (flat.shape[0],))[0]
        some = flat[where.to(flat.device)] if len(flat) else flat
        samples.append(some.double().tolist())
    return {
        "form": _FORM,
        "function": hashlib.sha256(repr(graph_key).encode()).hexdigest(),
        "inputs": _digest(xs),
        "weights": _digest(weights),
        "outputs": samples,
        "rounding": max(torch.finfo(y.dtype).eps for y in ys) ** (2 / 3),
        "per_sample": per_sample,
    }


def _digest(tensors) -> str:
    """Of tensors bit by bit, but for those that are no plain ones in memory (sharded, sparse)."""
    found = hashlib.sha256()
    for x in map(plain, tensors):
        found.update(repr((tuple(x.shape), x.dtype)).encode())
        if x.__class__ in PLAIN and x.layout is torch.strided:
            flat = x.detach().cpu().contiguous().view(-1)
            found.update(flat.view(torch.uint8).numpy())
    return found.hexdigest()


def _places(seed: int, shape) -> list[Tensor]:
    """Some places in a tensor, the same at every call."""
    gen = torch.Generator().manual_seed(seed)
    return [torch.randint(0, max(n, 1), (_ENTRIES,), generator=gen) for n in shape]


def differs(mine: dict, theirs: dict) -> str | None:
    """Which part of two computations is not the same, or None."""
    for name in ("form", "function", "per_sample", "inputs", "weights"):
        if mine[name] != theirs.get(name):
            return name
    rounding = mine["rounding"]
    for a, b in zip(mine["outputs"], theirs["outputs"], strict=True):
        one, two = (torch.tensor(v, dtype=torch.float64) for v in (a, b))
        # another number of threads may round differently; another function is further away
        atol = rounding * float(one.abs().nan_to_num(0, 0, 0).amax()) if len(one) else 0.0
        if not torch.allclose(one, two, rtol=rounding, atol=atol, equal_nan=True):
            return "outputs"
    return None


def checksum(number: int, parts: Sequence[Tensor]) -> list[int]:
    """Of some entries of the parts of the results that chunk ``number`` was written to, and where one is not 0.

    By that one a file of zeros is told from a chunk of which few entries are not.
    """
    place = _nonzero(parts)
    return [_sum(number, parts, place), *place]


def holds(number: int, parts: Sequence[Tensor], noted: Sequence[int]) -> bool:
    """Whether parts of the results still have the `checksum` that was noted."""
    return _sum(number, parts, noted[1:]) == noted[0]


def _sum(number: int, parts: Sequence[Tensor], place: Sequence[int]) -> int:
    found = 0
    for k, part in enumerate(parts):
        if part.numel():
            entries = part[tuple(_places(1000 * number + k, part.shape))]
            found = zlib.crc32(entries.numpy().tobytes(), found)
            if place and place[0] == k:
                found = zlib.crc32(part[tuple(place[1:])].numpy().tobytes(), found)
    return found


def _nonzero(parts: Sequence[Tensor]) -> list[int]:
    """The number of a part and the place in it of an entry that is not 0; nothing where all are."""
    for k, part in enumerate(parts):
        place = _nonzero_in(part)
        if place is not None:
            return [k, *place]
    return []


def _nonzero_in(part: Tensor) -> list[int] | None:
    """Some lines at a time: no copy of all, and mostly the first will do."""
    if part.numel() <= _AT_ONCE:
        there = (part != 0).reshape(-1)
        if not len(there) or not there[at := int(there.view(torch.uint8).argmax())]:
            return None
        return [int(i) for i in np.unravel_index(at, tuple(part.shape))]
    length = len(part)
    step = max(1, length * _AT_ONCE // part.numel())
    for start in range(0, length, step):
        some = part.narrow(0, start, min(step, length - start))
        if step == 1:
            if (found := _nonzero_in(some[0])) is not None:
                return [start, *found]
        elif (found := _nonzero_in(some)) is not None:
            return [start + found[0], *found[1:]]
    return None


def write(maps: Sequence[np.memmap], path: Path, state: dict) -> None:
    """Write what was computed to disk, then ``state`` in one step."""
    for mapped in maps:
        mapped.flush()
    written = path.with_name(path.name + ".new")
    written.write_text(json.dumps(state))
    os.replace(written, path)


def left_by_ranks(path: Path) -> dict[int, Path]:
    """By rank: the journals that a call over ranks has left beside ``path``, which is of a call alone."""
    found = path.parent.glob(glob.escape(path.name) + ".*")
    return {int(f.suffix[1:]): f for f in found if f.suffix[1:].isdecimal()}


class Journal:
    """The progress file of one call. Use as a context manager around the chunks."""

    def __init__(self, maps: list[np.memmap], what: dict, resume: bool):
        """Read what an earlier call left; raise RuntimeError if that was another computation (``resume``)."""
        self.maps, self.path = maps, path_of(maps[0])
        self.state = {**what, "limit": None, "plan": None, "chunks": []}
        self.at, self._saved, self.resumed = 0, 0.0, False
        if left := left_by_ranks(self.path):
            if resume:
                raise RuntimeError(
                    f"out: {self.path}.{min(left)} is of an interrupted call over the ranks of a mesh; pass mesh=, "
                    "of as many ranks as you like, to go on, or resume=False to start over"
                )
            for file in left.values():
                file.unlink()
        if not self.path.exists():
            return
        if not resume:
            self.path.unlink()
            return
        try:
            left = json.loads(self.path.read_text())
            reason = differs(what, left)
        except (ValueError, KeyError, TypeError, AttributeError):
            reason = "format"
        if reason is not None:
            raise RuntimeError(
                f"out: {self.path} is of an interrupted call for another computation (its {reason} differs); pass "
                "resume=False to start over, or another file"
            )
        self.state, self.resumed = left, True

    @property
    def limit(self) -> int | None:
        """The memory limit under which the earlier call was planned: it decides its chunks."""
        return self.state["limit"]

    def planned(self, plan, limit: float) -> None:
        """Note the plan. Raises RuntimeError if the earlier call ran another one."""
        signature = json.loads(json.dumps(plan))
        if self.resumed and signature != self.state["plan"]:
            raise RuntimeError(
                f"out: {self.path} is of an interrupted call with other options; pass the same strategy, chunk_size "
                "and memory_limit, or resume=False to start over"
            )
        self.state.update(plan=signature, limit=limit)
        if self.resumed:
            _log.info("resuming %s after %d chunks", self.path, len(self.state["chunks"]))

    @property
    def ahead(self) -> bool:
        """Whether the next chunk is one that the earlier call wrote."""
        return self.at < len(self.state["chunks"])

    def skip(self, parts: list[Tensor]) -> bool:
        """Whether the next chunk is written already, to ``parts`` of the results; then it counts as done."""
        if not self.ahead:
            return False
        if not holds(self.at, parts, self.state["chunks"][self.at]):
            raise RuntimeError(
                f"out: the file of {self.path} does not hold what the interrupted call wrote (was it made anew with "
                "mode 'w+'?); open it with mode 'r+', or pass resume=False to start over"
            )
        self.at += 1
        return True

    def done(self, parts: list[Tensor]) -> None:
        """A chunk was written to ``parts`` of the results."""
        self.state["chunks"].append(checksum(self.at, parts))
        self.at += 1
        if time.monotonic() - self._saved > EVERY:
            self.save()

    def save(self) -> None:
        """Write the results to disk, then the journal: it never claims what is not there."""
        write(self.maps, self.path, self.state)
        self._saved = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self.save()
            return
        for mapped in self.maps:
            mapped.flush()
        self.path.unlink(missing_ok=True)
