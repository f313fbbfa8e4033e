"""Which kernels run a part of a sweep, if any: predicted, measured where that pays, and remembered.

A chain of products can be run in one launch (`kernels.chain`), step by step (`kernels.linear`), in a mixture, or by
torch; for convolutions see `convolving`, for sweeps by patches `patching`, for what takes one pass over memory
`passes`, for Laplacians `second.fused`. On a GPU the few ways that cover a shape are timed once for each device,
dtype, precision, sizes, seeds and power of two of rows, if the problem is predicted to take `WORTH` seconds; a way may
only win if its result, on the data at hand, is at most twice as far from float64 as torch's. What it makes of matrices
counts in its time, as in the first chunk of a call. Below that, or with ``JACTRI_TUNE=0``, the way with the fewest
launches is taken. Under ``backend="triton"`` torch only gets what no kernel fits. A kernel that a device cannot run is
not tried again.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels import support
from ...kernels.support import Factor, Ready, Unfit
from ..base import backends
from ..base.rates import rough

WORTH = 4e-6
"""Predicted seconds from which ways are timed: below, launches cost more than any kernel."""

CHECKED_ROWS = 64
"""Rows of a chain that are computed in float64, to check a way's result."""

_CYCLES = 2e9
"""Of a device a second, at most."""

TIMED_ENTRIES = 1 << 24
"""Timing takes no more entries a block than this: rows are left out."""

_SLACK = {"fp32": 2.0**-22, "tf32": 1e-3}
"""What a way may be off by beside twice torch's own error: small problems may come out exact by chance."""


class Kind(Protocol):
    """What a choice depends on: hashable."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def precision(self) -> str:
        """See `_SLACK`; "" where nothing is multiplied by anything but derivatives."""

    @property
    def flops(self) -> float: ...

    @property
    def bytes(self) -> float:
        """Read and written by a way that keeps on chip what it can."""

    def offers(self) -> list[Offer]:
        """The predicted best first."""

    def plain(self) -> dict[str, object]:
        """As plain data, for reports."""


class Problem(Protocol):
    """What can be computed in several ways."""

    def kind(self) -> Kind:
        """What the choice depends on."""

    def timed(self) -> Problem:
        """A part that is large enough to be timed."""

    def few(self) -> Problem:
        """A part of `timed` that is small enough for float64; its result is the first part of that along all axes."""

    def torch(self, dtype: torch.dtype | None = None) -> Tensor:
        """The result as a sweep without kernels computes it."""

    def launch(self, way: Way, out: Any = None) -> Tensor:
        """The result by kernels, in ``out`` if given: a tensor, or what the problem takes for one."""


@dataclass
class Chain:
    """One chain to run: ``t`` (K, R, w_0), matrices (w_l, w_(l+1)), a factor (R, w_l) or None for each width.

    ``diagonals`` gives the factors' derivatives as tensors, for torch. ``ready``: what the call has made of
    its matrices so far. ``plus``: (K, R, w_L), a block to be added.
    """

    t: Tensor
    matrices: tuple[Tensor, ...]
    factors: tuple[Factor | None, ...]
    diagonals: Callable[[], list[Tensor | None]]
    ready: Ready | None = None
    plus: Tensor | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.t.shape[2], *(m.shape[1] for m in self.matrices))

    def kind(self) -> ChainKind:
        K, R, _ = self.t.shape
        names = tuple("" if f is None else f.name for f in self.factors)
        shared = R > 1 and self.t.stride(1) == 0
        adds = self.plus is not None
        return ChainKind.of(K, R, self.widths, names, shared, self.t.dtype, self.t.device, adds)

    def first(self, rows: int) -> Chain:
        """The same chain for the first rows only."""
        cut = tuple(
            None if f is None else Factor(f.values[:rows], f.name, f.constants)
            for f in self.factors
        )
        return Chain(
            self.t[:, :rows], self.matrices, cut,
            lambda: [None if d is None else d[:rows] for d in self.diagonals()],
            plus=None if self.plus is None else self.plus[:, :rows],
        )  # fmt: skip

    def timed(self) -> Chain:
        K, R, _ = self.t.shape
        return self.first(max(CHECKED_ROWS, min(R, TIMED_ENTRIES // (K * max(self.widths)))))

    def few(self) -> Chain:
        return self.first(CHECKED_ROWS)

    def torch(self, dtype: torch.dtype | None = None) -> Tensor:
        t, own = self.t if dtype is None else self.t.to(dtype), False
        diagonals = [d if d is None else d.to(t.dtype) for d in self.diagonals()]
        for l, d in enumerate(diagonals):
            if d is not None:
                t, own = (t.mul_(d) if own else t * d), True
            if l < len(self.matrices):
                m = self.matrices[l].to(t.dtype)
                if t.stride(1) == 0 and t.shape[1] > 1:  # one product for all rows
                    t, own = (t[:, 0] @ m).unsqueeze(1).expand(-1, t.shape[1], -1), False
                else:
                    t, own = torch.mm(t.reshape(-1, t.shape[2]), m).view(*t.shape[:2], -1), True
        return t if self.plus is None else t + self.plus.to(t.dtype)

    def launch(self, way: Way, out: Tensor | None = None) -> Tensor:
        from ...kernels import chain as chains
        from ...kernels import linear

        t, at = self.t, 0
        ready = made_ready(self.matrices, way, self.ready)
        for i, (name, count) in enumerate(way.kernels):
            end = at + count
            into, plus = (out, self.plus) if i == len(way.kernels) - 1 else (None, None)
            matrices = self.matrices[at:end]
            factors = (self.factors[0] if at == 0 else None, *self.factors[at + 1 : end + 1])
            last = i == len(way.kernels) - 1 or name == way.kernels[-1][0]
            options = {
                "precision": way.dot,
                "ready": ready,
                "plus": plus,
                "out": into,
                "config": way.config if last else None,
            }
            if name == "step":
                t = linear.step(t, *matrices, *factors, **options)
            else:
                kernel = chains.chain if name == "chain" else chains.pair
                t = kernel(t, matrices, factors, **options)
            at = end
        return t


@dataclass(frozen=True)
class ChainKind:
    """What a chain's choice depends on; ``rows`` is the power of two at or above the number of rows."""

    seeds: int
    rows: int
    widths: tuple[int, ...]
    factors: tuple[str, ...]
    shared: bool
    dtype: torch.dtype
    precision: str
    device: torch.device
    adds: bool

    @classmethod
    def of(cls, seeds, rows, widths, factors, shared, dtype, device, adds=False) -> ChainKind:
        size = support.power_of_two(rows)
        precision = support.precision(dtype)
        return cls(seeds, size, tuple(widths), factors, shared, dtype, precision, device, adds)

    @property
    def flops(self) -> float:
        return 2.0 * self.seeds * self.rows * sum(a * b for a, b in pairwise(self.widths))

    @property
    def bytes(self) -> float:
        ends = (1 + self.adds) * self.widths[-1] + (0 if self.shared else self.widths[0])
        return float(self.seeds * self.rows * ends * self.dtype.itemsize)

    def offers(self) -> list[Offer]:
        """Fewest launches first."""
        from ...kernels import chain, linear

        products, multiply = len(self.widths) - 1, dots(self.precision)
        found: list[Offer] = []
        if products > 1:
            configs = chain.chain_configs(self.widths, self.device)
            found.append(((("chain", products),), configs, multiply))
            pair = (*(("step", 1),) * (products - 2), ("pair", 2))
            found.append(
                (pair, chain.pair_configs(self.widths[-3:], self.precision, self.device), multiply)
            )
        found.append(((("step", 1),) * products, linear.CONFIGS, multiply))
        return found

    def plain(self) -> dict[str, object]:
        """As plain data, for reports."""
        return {
            "widths": self.widths, "seeds": self.seeds, "rows": self.rows, "precision": self.precision,
            "dtype": str(self.dtype), "factors": self.factors,
        }  # fmt: skip


Kernels = tuple[tuple[str, int], ...]
"""Names of kernels in the order of their launches, each with how many products it takes."""

Offer = tuple[Kernels, tuple, tuple[str, ...]]
"""Kernels that cover a kind, the tiles to try, and how they can multiply."""


@dataclass(frozen=True)
class Way:
    """A sequence of kernels, how they multiply, and the tile."""

    kernels: Kernels
    dot: str = ""
    config: Any = None

    def __str__(self) -> str:
        names = " + ".join(n if c == 1 else f"{c} {n}s" for n, c in self._counted())
        if self.config is None:
            return names
        c = self.config
        tile = "x".join(str(s) for s in (c.rows, c.out, c.inner) if s)
        dot = f"{self.dot}, " if self.dot else ""
        return f"{names} ({dot}tile {tile}, {c.warps} warps)"

    def _counted(self) -> list[tuple[str, int]]:
        out: list[tuple[str, int]] = []
        for name, _ in self.kernels:
            if out and out[-1][0] == name:
                out[-1] = (name, out[-1][1] + 1)
            else:
                out.append((name, 1))
        return out


def made_ready(matrices: Sequence[Tensor], way: Way, ready: Ready | None) -> Ready | None:
    """Where the kernels of a way find matrices ready: those of several kernels are made by one launch."""
    from ...kernels.operands import prepare

    if len(way.kernels) > 1:
        ready = Ready() if ready is None else ready
        prepare(matrices, way.dot, ready)
    return ready


TORCH = Way((("torch", 0),))


@dataclass
class Choice:
    """The way that runs a kind of problem, why, and what came of the others: milliseconds, or why not.

    ``kernels``: the fastest way of our own where torch's is faster, for those who ask for it.
    """

    way: Way
    why: str
    tried: dict[str, float | str] = field(default_factory=dict)
    kernels: Way | None = None

    def asked(self) -> Way:
        """The way to take under the backend that was asked for."""
        return self.kernels if self.kernels is not None and backends.forced() else self.way


_choices: dict[Kind, Choice] = {}
_refused: dict[tuple[Kind, Way], str] = {}


def dots(precision: str) -> tuple[str, ...]:
    """How tensor cores can multiply at a precision, the predicted best first."""
    if precision != "fp32":
        return (precision,)
    if support.interpreted() and not support.interpreter_rounds:
        return ("ieee",)
    return ("bf16x6",) if torch.version.hip else ("bf16x6", "tf32x3")


def run(problem: Problem, out: Any = None) -> Tensor | None:
    """The result, in ``out`` if given, by the kernels that were chosen for its kind of problem; None: by torch."""
    choice = _choice(problem)
    while (way := choice.asked()) is not TORCH:
        try:
            return problem.launch(way, out)
        except Unfit as error:
            kind = problem.kind()
            _refused[kind, way] = str(error)
            backends.unfit(str(way), error)
            _choices.pop(kind, None)
            choice = _choice(problem)
    return None


def forget() -> None:
    """Drop all choices, so that the next problem of each kind is timed again."""
    _choices.clear()
    _refused.clear()


def chosen() -> list[dict[str, object]]:
    """All choices of this process, as plain data: for reports."""
    return [
        {**k.plain(), "way": str(c.way), "why": c.why, "tried": c.tried}
        for k, c in _choices.items()
    ]


def described(kind: Kind) -> tuple[str, str]:
    """What runs a kind of problem, and why, for `explain`: as chosen in this process, or as predicted."""
    choice = _choices.get(kind) or _predicted(kind)
    way = choice.asked()
    return ("torch" if way is TORCH else "triton"), f"{way}: {choice.why}"


def _choice(problem: Problem) -> Choice:
    kind = problem.kind()
    choice = _choices.get(kind)
    if choice is None:
        if not _tunable(kind):
            choice = _predicted(kind)
        elif backends.capturing(kind.device):
            return _predicted(kind)  # nothing can be timed inside a CUDA graph: another time
        else:
            choice = _tuned(kind, problem)
            if choice is None:
                return _predicted(kind)
        _choices[kind] = choice
    return choice


def worth(kind: Kind) -> bool:
    """Whether a problem is large enough for its ways to be timed."""
    return rough(kind.device.type).seconds(kind.flops, kind.bytes) >= WORTH


def _tunable(kind: Kind) -> bool:
    return kind.device.type == "cuda" and worth(kind) and os.environ.get("JACTRI_TUNE", "1") != "0"


def _predicted(kind: Kind) -> Choice:
    """The covered way with the fewest launches whose kernels were not refused yet."""
    offers = kind.offers()
    for composition, configs, multiply in offers:
        for config in configs:
            for dot in multiply:
                way = Way(composition, dot, config)
                if (kind, way) not in _refused:
                    launches = len(composition)
                    why = f"{launches} launch{'es' if launches > 1 else ''}"
                    others = sum(len(c) * len(m) for _, c, m in offers) - 1
                    if _tunable(kind):
                        why += (
                            f", at the first use timed against torch and up to {others} other ways: "
                            "Triton compiles each once, in about a second, and keeps it on disk"
                        )
                    return Choice(way, why)
    why = "none of the kernels runs here, or is right" if offers else "no kernel covers it"
    return Choice(TORCH, why)


def _tuned(kind: Kind, problem: Problem) -> Choice | None:
    """Time every way on the problem's own data; None if these are no measure (not finite)."""
    problem = problem.timed()
    few = problem.few()
    truth = few.torch(torch.promote_types(kind.dtype, torch.float64))
    if not torch.isfinite(truth).all():
        return None
    checked = tuple(slice(0, n) for n in truth.shape)
    slack = _SLACK.get(kind.precision, 2 * torch.finfo(kind.dtype).eps)
    bound = 2 * _distance(few.torch(), truth) + slack
    by_torch = _milliseconds(lambda: problem.torch())
    tried: dict[str, float | str] = {"torch": by_torch}
    best, fastest = None, float("inf")
    better: tuple[str, ...] = ()
    for composition, configs, multiply in kind.offers():
        for config in configs:
            times: dict[str, float] = {}
            for dot in better if len(multiply) > 1 and better else multiply:
                way = Way(composition, dot, config)
                if (kind, way) in _refused:
                    tried[str(way)] = _refused[kind, way]
                    continue
                try:
                    off = _distance(problem.launch(way)[checked], truth)
                    if not off <= bound:
                        _refused[kind, way] = f"off by {off:.1e}, {bound:.1e} allowed"
                        tried[str(way)] = _refused[kind, way]
                        continue
                    times[dot] = _milliseconds(partial(problem.launch, way))
                except Unfit as error:
                    _refused[kind, way] = tried[str(way)] = str(error)
                    continue
                tried[str(way)] = times[dot]
                if times[dot] < fastest:
                    best, fastest = way, times[dot]
            if len(times) > 1:  # which parts are faster depends on the device, not on the tile
                better = (min(times, key=times.__getitem__),)
    if best is None or by_torch <= fastest:
        why = f"{by_torch:.3g} ms measured"
        if best is not None:
            why += f", {best} {fastest:.3g} ms"
        return Choice(TORCH, why, tried, best)
    return Choice(best, f"{fastest:.3g} ms measured, torch {by_torch:.3g} ms", tried)


def _distance(got: Tensor, truth: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    off = torch.linalg.vector_norm(got.to(truth.dtype) - truth)
    return (off / torch.linalg.vector_norm(truth).clamp_min(1e-300)).item()


def _milliseconds(call: Callable[[], object], runs: int = 7) -> float:
    """Median device time of a call, after one that compiles and warms up.

    The device waits while the host queues the call: a launch takes the host longer than a small product the device.
    """
    call()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    wait = int(2 * (time.perf_counter() - begun) * _CYCLES)
    times = []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(wait)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
