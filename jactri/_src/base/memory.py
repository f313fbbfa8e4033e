"""How much memory a call may take: one meaning of ``memory_limit``, and one refusal, for all calls."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Iterable, Iterator
from math import ceil, inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from .free import free_on_host
from .heap import Heap
from .tracing import aside

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bytes(amount: int | str) -> int:
    """``1500``, ``"1500"``, ``"1.5KB"``, ``"2GB"`` (powers of 1000) or ``"2GiB"`` (powers of 1024) in bytes.

    Raises ValueError for anything else, zero and negative amounts included.
    """
    if isinstance(amount, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", amount, re.IGNORECASE)
        if match:
            number, unit, binary = match.groups()
            scale = _UNITS[unit.upper()]
            if binary:
                scale = 1 << (10 * "KMGT".index(unit.upper()) + 10) if unit else 1
            amount = int(float(number) * scale)
    if not isinstance(amount, int) or isinstance(amount, bool) or amount <= 0:
        raise ValueError(f"memory_limit must be bytes above 0 or a text like '2GB', got {amount!r}")
    return amount


def si(number: float) -> str:
    """A number with a decimal prefix: 1.23 M."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {letter}"
    return f"{number:.3g} "


_seen: dict[torch.device, int] = {}


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a device now; inside of a CUDA graph's capture, which does not let one ask, what
    was found last."""
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _seen.get(device) or torch.cuda.get_device_properties(device).total_memory
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        _seen[device] = free
        return free
    return free_on_host()


LARGE = 1 << 26
"""Bytes up to which nobody looks how much memory is free."""


class MemoryLimitTooSmall(ValueError):
    """What is asked for needs more than a call may allocate: ``need`` bytes at the least."""

    def __init__(self, text: str, need: float):
        super().__init__(text)
        self.need = need


class Offer(NamedTuple):
    """What a refusal can offer instead of more memory."""

    samples: int = 0
    """How many there are, if their blocks can be had alone;"""
    apart: float = 0.0
    """the bytes of these."""
    out: str = ""
    """What writes the answer elsewhere."""
    of: str = ""
    """Which call takes the options, where it is another."""


OFFER = Offer()


class Budget:
    """The bytes that a call may allocate after its function has run, its answer included.

    That is its ``memory_limit``, or half of what is free. This is looked up when something asks that may take more than
    `LARGE`, and once: a call is planned under one number. ``spent``: bytes that are not to be had any more, as those of
    an answer that is there from the start. ``bound``: what is left of a limit that was given, a part of the key of what
    is planned under it; else None.
    """

    __slots__ = ("_heap", "_total", "bound", "device", "given", "spent")

    def __init__(self, memory_limit: int | str | None, device: torch.device, spent: float = 0.0):
        self.given: int | None = None
        self.bound: float | None = None
        if memory_limit is not None:
            self.given = parse_bytes(memory_limit)
            self.bound = self.given - spent
        self.device, self.spent, self._total = device, spent, self.given
        self._heap = None if self.given is None else Heap.of(device, self.given / 2)

    @property
    def total(self) -> int:
        if self._total is None:
            self._total = max(free_bytes(self.device) // 2, LARGE)
        return self._total

    @property
    def bounded(self) -> float:
        """What is left of a limit that was given, or no bound: for what is small but where somebody sets a limit."""
        return inf if self.bound is None else self.bound

    @property
    def left(self) -> float:
        """What is not spent."""
        return self.total - self.spent

    @classmethod
    def unbounded(cls, device: torch.device) -> Budget:
        """For what is only looked at, and does not run."""
        made = cls(None, device)
        made._total = sys.maxsize
        return made

    def less(self, more: float) -> Budget:
        """With so many bytes spent beside."""
        rest = Budget(self.given, self.device, self.spent + more)
        rest._total, rest._heap = self._total, self._heap
        return rest

    def tidy(self) -> None:
        """Between the parts of a computation: have what they left in pieces given back, under a limit."""
        if self._heap is not None:
            self._heap()

    def fits(self, need: float) -> bool:
        return (self.given is None and need + self.spent <= LARGE) or need <= self.left

    def limit(self, need: float) -> float:
        """The bytes for what takes about ``need``: no bound if none was given and that is small."""
        return inf if self.given is None and need + self.spent <= LARGE else self.left

    def count(self, each: float, most: int) -> int:
        """How many things of so many bytes fit at once: at least one."""
        return most if self.fits(each * most) else max(1, int(self.left // each))

    def check(self, what: str, size: float, offer: Offer = OFFER) -> None:
        """Raise MemoryLimitTooSmall for an answer that does not fit, before any of it is taken."""
        if not self.fits(size):
            raise self.refusal(what, size, offer=offer)

    def refusal(
        self, what: str, need: float, answer: float = 0.0, offer: Offer = OFFER
    ) -> MemoryLimitTooSmall:
        """The error for what takes ``need`` bytes, ``answer`` of them for the answer: it says what to write instead."""
        need = ceil(need + self.spent)
        whose = "half of the free memory" if self.given is None else "memory_limit"
        answer = answer or self.spent
        part = f", {si(answer)}B of it for the answer" if answer else ""
        alone = (
            f"if the {offer.samples} samples of the first axis do not influence one another, {offer.of}per_sample=True "
            f"gives their blocks alone, {si(offer.apart)}B; else "
            if offer.samples
            else ""
        )
        out = f"{offer.out} writes it elsewhere (a numpy.memmap: to disk), or " if offer.out else ""
        return MemoryLimitTooSmall(
            f"{what} takes {si(need)}B{part}, and {whose} is {si(self.total)}B: {alone}{out}{offer.of}a "
            f"memory_limit of {need} bytes or more allows it",
            need,
        )


class Taken(TorchDispatchMode):
    """A context that counts what torch's ops allocate within it, in a backward pass too: no allocator of a CPU tells.

    ``now``: bytes that are still there; ``peak``: the most at one time. Counted are the ops' results, and views of one
    memory once; what an op takes for itself is not seen, nor what a sparse tensor holds.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._there: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = None
        for memory in _memory((made,)):
            if memory._cdata not in self._there and (size := memory.nbytes()):
                if given is None:
                    given = {m._cdata for m in _memory((*args, *(kwargs or {}).values()))}
                if memory._cdata not in given:
                    self._add(memory, size)
        return made

    def _add(self, memory: torch.UntypedStorage, size: int) -> None:
        key = memory._cdata

        def gone(_) -> None:
            del self._there[key]
            self.now -= size

        self._there[key] = weakref.ref(memory, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _memory(values: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    """The memory of tensors, and of those that they are made of."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _memory(value)
        elif isinstance(value, Tensor):
            if is_traceable_wrapper_subclass(value):
                yield from _memory(getattr(value, name) for name in value.__tensor_flatten__()[0])
            elif value.layout is torch.strided:
                yield value.untyped_storage()


_MOST = (32 << 20) - (64 << 10)
_AMPLE = 1 << 30
"""Free bytes below which memory is given back: held in pieces it may serve no large block."""
_held = 0


def hold(amount: float, device: torch.device) -> None:
    """Have the CPU's allocator hold on to freed memory, twice ``amount`` bytes, for blocks that come and go.

    glibc gives memory back to the system from twice the size of the largest block that was freed so far (at most
    64 MiB; "dynamic" in mallopt(3)): in sweeps of smaller blocks each would fault its pages in anew, which can cost
    more than the arithmetic. A block freed untouched tells it. Other allocators take no notice.

    Not for calls with a memory_limit: held memory falls into pieces, and their peak was seen 1.4 times the limit.
    """
    global _held
    amount = int(min(amount, _MOST))
    if device.type == "cpu" and amount > _held:
        _held = amount
        if free_on_host() > _AMPLE:
            with aside():
                torch.empty(amount, dtype=torch.uint8)
