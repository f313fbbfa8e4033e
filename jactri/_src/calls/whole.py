"""The last fallback: the whole function by autograd, some rows or some columns at a time.

A row is a vector-Jacobian product. Columns are to be had from one product that is recorded: it is linear in its
cotangent, and its derivative there is a Jacobian-vector product ("double vjp").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..base.backends import capturing
from ..base.constants import firm
from ..base.elsewhere import check_local
from ..base.memory import Budget, MemoryLimitTooSmall, Taken
from ..base.rates import block_bytes
from ..base.tracing import may_write
from ..plan.needs import CACHE_BYTES
from ..plan.owners import apart
from ..plan.planning import ONE_SEED, answer_bytes, proof, prove_by_probe
from ..plan.samples import REMEDY, probe_mixing
from ..prologue.arguments import ASSUME, block_shape
from ..read.graph import UnsupportedGraph
from ..read.opaque import logger, why_not
from ..read.unrecorded import UNUSUAL, guarded, tight
from ..read.vmapped import Vmapped, fitting, shown

T = TypeVar("T")

MARGIN = 2
"""How many times as many rows make columns the cheaper ones: their passes go through what a pass has recorded."""

BLOCKS = 4
"""About how many blocks a pass holds at once."""


@dataclass
class Whole:
    """What is asked for of the Jacobian of a computation; ``budget`` is what may be taken beside the answer."""

    ys: Sequence[Tensor]
    xs: Sequence[Tensor]
    per_sample: bool | str
    reason: UnsupportedGraph
    budget: Budget
    strategy: str = "auto"
    chunk_size: int | None = None
    measured: bool = True
    """Whether what seeds take is measured, to size chunks by it: not where they are small and few."""

    @cached_property
    def why(self) -> str | None:
        """Why gradients must not be differentiated, or None."""
        return self.reason.why or why_not(self.ys)

    @property
    def create_graph(self) -> bool:
        return torch.is_grad_enabled() and self.why is None

    def guarded(self, block: Tensor, y: Tensor) -> Tensor:
        """A block of ``y``, which raises when it is differentiated, if that must not be."""
        if torch.is_grad_enabled() and self.why is not None:
            (block,) = guarded([block], [y], self.why)
        return block

    def seeds(self, ends: Iterable[Tensor]) -> int:
        """How many unit vectors the ends have; under ``per_sample`` one serves all samples."""
        return sum(t[:1].numel() if self.per_sample else t.numel() for t in ends)

    def by_columns(self) -> bool:
        """Whether columns are asked for, or are fewer by a margin, and can be: what they give is held against rows."""
        reason = self.reason
        if self.strategy == "reverse-mode" or not (reason.linear and reason.twice):
            return False
        if self.strategy != "forward-mode":
            columns = self.seeds(self.xs) + len(self.ys)
            if self.per_sample == ASSUME or MARGIN * columns > self.seeds(self.ys):
                return False
        if capturing(self.xs[0].device):
            return False
        return not torch.is_grad_enabled() or self.why is None


def rows(
    ys, xs, per_sample, reason: UnsupportedGraph, *, budget: Budget, strategy: str = "auto",
    chunk_size: int | None = None, dests=None,
) -> list[list[Tensor]]:  # fmt: skip
    """``J[j][i]`` by products with the whole graph.

    Serves what the blocks of the engine do not represent: complex, sparse and nested tensors, hooks that change
    gradients. ``reason`` says which. Columns are held against a row; where they contradict it, or do not fit the
    memory, rows are taken. Under ``per_sample`` a probe decides whether samples mix (of hooks; the rest is proven as
    ever), and RuntimeError is raised if they do. Raises MemoryLimitTooSmall where one seed does not fit.
    """
    check(ys, xs, per_sample, reason, budget)
    if dests is None:
        budget = budget.less(answer_bytes(ys, xs, per_sample))
    whole = Whole(ys, xs, per_sample, reason, budget, strategy, chunk_size)
    return _by_either(whole, lambda passes: filled(whole, passes, dests))


def filled(whole: Whole, passes: Iterable[Passes], dests) -> list[list[Tensor]]:
    """The blocks of the answer, in ``dests`` where there are any."""
    per_sample, forward = whole.per_sample, whole.strategy == "forward-mode"
    found: dict[tuple[int, int], _Block] = {}
    for p in passes:

        def write(start: int, parts: tuple[Tensor, ...], p=p) -> None:
            for (j, i), part in zip(p.targets, parts, strict=True):
                if (j, i) not in found:
                    y, x, to = whole.ys[j], whole.xs[i], dests[j][i] if dests else None
                    like = y if forward and not x.is_complex() else x
                    found[j, i] = _Block(y, x, per_sample, p.forward, like, to)
                found[j, i].add(start, part)

        p.run(write)
    answer = []
    for j, y in enumerate(whole.ys):
        row = []
        for i, x in enumerate(whole.xs):
            to = dests[j][i] if dests else None
            if (j, i) in found:
                block = whole.guarded(found.pop((j, i)).block(), y)
            else:
                block = zero_block(y, x, per_sample, y if forward else x, to)
            row.append(block if to is None or block is to else to.copy_(block))
        answer.append(row)
    return answer


def diagonal(
    y: Tensor, x: Tensor, reason: UnsupportedGraph, chunk_size: int | None, budget: Budget
) -> Tensor:
    """The diagonal of the Jacobian of ``y`` in ``x``, of its shape, by rows."""
    check_ends([y], [x])
    whole = Whole([y], [x], False, reason, budget, chunk_size=chunk_size)
    parts: list[Tensor] = []

    def write(start: int, rows: tuple[Tensor, ...]) -> None:
        parts.extend(r.reshape(len(r), -1).diagonal(start).clone() for r in rows)

    if y.requires_grad and y.numel():
        _row(whole, 0).run(write)
    return whole.guarded(torch.cat(parts).reshape(x.shape), y) if parts else torch.zeros_like(x)


class Foreseen(NamedTuple):
    """What `rows` will do."""

    forward: bool
    seeds: int
    """How many rows, or columns, there are in all;"""
    at_once: int
    """how many run at once;"""
    chunks: int
    """in how many parts they run."""
    peak: float
    """Bytes held at once, the answer included."""


def foreseen(
    ys, xs, per_sample, reason: UnsupportedGraph, *, budget: Budget, strategy: str, chunk_size: int | None
) -> Foreseen:  # fmt: skip
    """What `rows` will do, by a first row of each output or a first column of each input. Raises what it raises."""
    check(ys, xs, per_sample, reason, budget)
    budget = budget.less(answer_bytes(ys, xs, per_sample))
    return _by_either(Whole(ys, xs, per_sample, reason, budget, strategy, chunk_size), _tried)


def _tried(passes: Iterable[Passes]) -> Foreseen:
    forward, seeds, at_once, chunks, peak = False, 0, 0, 0, 0.0
    spent = 0.0
    for p in passes:
        p.run(lambda *_: None, 1)
        k = min(p.n, p.at_once())
        first = int(p.chunk_size is None and not p.forward and p.n > 1)  # runs alone
        chunks += first - (-(p.n - first) // k)
        forward, seeds, at_once = p.forward, seeds + p.n, max(at_once, k)
        peak = max(peak, p.before, p.held + k * p.each)
        spent = p.whole.budget.spent
    return Foreseen(forward, seeds, at_once, chunks, spent + peak)


def _by_either(whole: Whole, run: Callable[[Iterable[Passes]], T]) -> T:
    """What ``run`` makes of the passes of columns, or else of those of rows."""
    refused = None
    if whole.by_columns():
        try:
            return run(_columns(whole))
        except MemoryLimitTooSmall as error:
            refused = error.with_traceback(None)  # which holds what was recorded
        except UNUSUAL as error:  # by rows, any other fault is raised again
            logger.info("fallback: the function has no columns (%s); it is computed by rows", error)
    try:
        return run(all_rows(whole))
    except MemoryLimitTooSmall as error:
        raise min(error, refused or error, key=lambda e: e.need) from None


def all_rows(whole: Whole) -> Iterator[Passes]:
    """The rows of every output."""
    return (_row(whole, j) for j, y in enumerate(whole.ys) if y.requires_grad and y.numel())


def check(ys, xs, per_sample, reason: UnsupportedGraph, budget: Budget) -> None:
    """Raise RuntimeError for ends that have no rows, and under ``per_sample`` where samples mix."""
    check_ends(ys, xs)
    if per_sample and not reason.linear:
        raise RuntimeError(
            f"per_sample=True, but the function holds {reason}, and what it gives for the gradients of several samples "
            "is not made of what it gives for each; drop per_sample for the rows of autograd, or remove the hook"
        )
    prove = per_sample and per_sample != ASSUME
    if prove and reason.graph is not None:
        plan = proof(reason.graph, "auto", ys, xs)
        if not plan.tied and not apart(reason.graph):
            prove_by_probe(reason.graph, plan, ys, xs, budget)
    if prove and (leak := probe_mixing(ys, xs)) is not None:
        raise RuntimeError(
            f"per_sample=True, but samples mix: {leak}; the function holds {reason}, which jactri cannot follow op by "
            "op. Drop per_sample for the whole Jacobian" + REMEDY
        )


def check_ends(ys, xs) -> None:
    """Raise RuntimeError for complex outputs, sparse or nested inputs, and what is distributed."""
    check_local(ys, xs)
    for j, y in enumerate(ys):
        if y.requires_grad and y.is_complex():
            raise RuntimeError(
                f"outputs[{j}] is complex ({y.dtype}): its Jacobian is not one real-linear matrix; return "
                "torch.view_as_real(output) or its real part"
            )
    for i, x in enumerate(xs):
        if x.is_nested or x.layout is not torch.strided:
            made = (
                "nested.nested_tensor_from_jagged(v, offsets)"
                if x.is_nested
                else "sparse_coo_tensor(at, v, shape)"
            )
            raise RuntimeError(
                f"inputs[{i}] is {'nested' if x.is_nested else f'of layout {x.layout}'}, so autograd leaves out the "
                "derivatives in entries that it does not store; differentiate by those that it does, v, by "
                f"lambda v: func(torch.{made})"
            )


class Passes:
    """Products with the unit vectors of one end of the computation, a chunk at a time.

    ``targets``: the blocks (output, input) that the results of ``one`` are of. ``check``: raises for results from a
    seed on that are not to be used. ``held``: bytes that lie there all the time, and ``before`` those at the peak of
    making them.
    """

    check: Callable[[int, tuple[Tensor, ...]], None] | None = None
    before = held = 0.0

    def __init__(self, whole: Whole, end: Tensor, forward: bool, one, targets, name: str):
        self.whole, self.end, self.forward, self.targets = whole, end, forward, targets
        self.n, self.chunk_size = whole.seeds([end]), whole.chunk_size
        self.product = Vmapped(one, name)
        self.each = inf  # not known

    def run(self, write: Callable[[int, tuple[Tensor, ...]], None], most: int | None = None):
        """Give ``write`` the number of a first seed and the results from there on, for all seeds or ``most``.

        What every chunk takes for each of its seeds sizes the next; where nothing is known, the first is a single one.
        """
        n, start = min(self.n, most or self.n), 0
        while start < n and self.targets:
            count = min(self.at_once(), n - start)
            with Taken() if self.whole.measured else nullcontext() as taken:
                made = self.product(self._seeds(start, count))
                if self.check is not None:
                    self.check(start, made)
            write(start, made)
            del made  # not beside the next
            self.whole.budget.tidy()
            start += count
            if taken is None:
                continue
            each = taken.peak / count  # too low of seeds that vmap could not take
            self.each = each if self.each == inf else max(self.each, each)
            if count == 1 and self.chunk_size is None:
                self._check_fits(each)

    def at_once(self) -> int:
        """How many seeds to run at once, by what those so far took."""
        if self.chunk_size is not None:
            return self.chunk_size
        if capturing(self.end.device):
            return self.n
        some = BLOCKS * block_bytes(self.end.device.type, CACHE_BYTES)
        room = min(some, self.whole.budget.limit(self.held + some) - self.held)
        return max(1, int(room // max(self.each, 1)))

    def _check_fits(self, each: float) -> None:
        """Raise MemoryLimitTooSmall where a limit does not hold one seed: a graph that is kept is not bounded by it."""
        budget, need = self.whole.budget, max(self.before, self.held + each)
        if budget.given is not None and need > budget.left and may_write():
            raise budget.refusal(ONE_SEED, need, budget.spent)

    def _seeds(self, start: int, count: int) -> Tensor:
        end = self.end
        eye = torch.zeros(count, self.n, dtype=end.dtype, device=end.device)
        at = torch.arange(count, device=end.device)
        eye[at, start + at] = 1
        if self.whole.per_sample:
            return eye.reshape(count, 1, *end.shape[1:]).expand(count, *end.shape)
        return eye.reshape(count, *end.shape)


def _row(whole: Whole, j: int) -> Passes:
    """The rows of output ``j``, to all inputs."""
    y, create_graph = whole.ys[j], whole.create_graph
    targets = [(j, i) for i in range(len(whole.xs))]

    def one(c: Tensor) -> tuple[Tensor, ...]:
        return row([y], whole.xs, [c], create_graph, not whole.measured)

    name = "an input" if y.grad_fn is None else y.grad_fn.name()
    return Passes(whole, y, False, one, targets, f"the whole function ({name})")


def row(
    ys: Sequence[Tensor],
    xs: Sequence[Tensor],
    cs: Sequence[Tensor],
    create_graph: bool = False,
    fits: bool = True,
) -> tuple[Tensor, ...]:
    """One pass of the engine from cotangents, to all inputs. ``fits``: these are known to be as the outputs are."""
    # backwards may write to them, or view them, as they may to what the engine gives them
    cs = [c.clone(memory_format=torch.contiguous_format) for c in cs]
    if fits:
        found = fitting(ys, xs, cs, create_graph)
    else:
        found = torch.autograd.grad(
            ys, xs, cs, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    # a backward may give nothing for some cotangents
    return tuple(
        x.new_zeros(x.shape) if g is None else _dense(g) for g, x in zip(found, xs, strict=True)
    )


def _columns(whole: Whole) -> list[Passes]:
    """The columns of every input. Raises one of `UNUSUAL` where a pass cannot be recorded."""
    live = {j: y for j, y in enumerate(whole.ys) if y.requires_grad and y.numel()}
    cs = {j: firm(y.shape, y) for j, y in live.items()}
    pulled = {
        j: torch.autograd.grad(y, whole.xs, cs[j].clone(), retain_graph=True, allow_unused=True)
        for j, y in live.items()
    }
    with torch.enable_grad(), Taken() as taken:
        given = {j: c.detach().requires_grad_() for j, c in cs.items()}
        clones = [c.clone() for c in given.values()]  # hooks may write to them
        ends = [*live.values()]
        recorded = torch.autograd.grad(ends, whole.xs, clones, create_graph=True, allow_unused=True)
        recorded = [None if g is None else _pairs(g) for g in recorded]
    found = []
    for i, g in enumerate(recorded):
        if g is None or not g.numel():
            continue
        if not g.requires_grad:
            raise NotImplementedError("its backward is not recorded")
        by = [j for j in live if pulled[j][i] is not None]
        p = _column(whole, i, g, {j: given[j] for j in by})
        p.check = _against([(cs[j], _pairs(pulled[j][i])) for j in by], whole.per_sample)
        p.each = p.before = taken.peak  # a column takes about as much
        p.held = taken.now
        found.append(p)
    return found


def _column(whole: Whole, i: int, g: Tensor, given: dict[int, Tensor]) -> Passes:
    """The columns of input ``i``, whose gradient is ``g``, recorded as a function of the cotangents ``given``."""
    create_graph, cotangents = whole.create_graph, [*given.values()]

    def one(t: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            g, cotangents, t, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )

    return Passes(whole, g, True, one, [(j, i) for j in given], "the whole function (columns)")


def _against(pulled: Sequence[tuple[Tensor, Tensor]], per_sample):
    """A check of columns: of every one, ``<c, J t> = <c J, t>`` for one ``c`` an output; ``pulled``: ``c`` and ``c J``.

    Some ops have a wrong second derivative (see `Opaque`), and some backwards are not recorded. Infinite ones have no
    columns: zeros may meet them there, and not in rows.
    """

    def check(start: int, made: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            holds = True
            for m, (c, g) in zip(made, pulled, strict=True):
                k = len(m)
                flat, c, g = m.detach().reshape(k, -1), c.reshape(-1), g.to(m.device)
                want = (g.sum(0) if per_sample else g).reshape(-1)
                # as rounding adds up: of all terms, one that is missing shows
                size = (flat.square() @ c.square() + want[start : start + k].square()).sqrt()
                gap = (flat @ c - want[start : start + k]).abs()
                noise = 64 * torch.finfo(g.dtype).eps * g.abs().max()
                close = gap <= max(tight(m.dtype), tight(g.dtype)) * size + noise
                holds = holds & (close & size.isfinite()).all()
            if not shown(holds):
                raise NotImplementedError("its second derivative contradicts its first")

    return check


def _dense(g: Tensor) -> Tensor:
    """A gradient in all entries: a sparse one, of an embedding, is zero in others."""
    return g if g.layout is torch.strided else g.to_dense()


def _pairs(g: Tensor) -> Tensor:
    """A gradient in all entries, a complex one as pairs of reals."""
    t = _dense(g)
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


class _Block:
    """A block of the answer as ``(samples, outputs, inputs)``, to which rows or columns are written.

    Where nothing may be written to, they are put together in the end.
    """

    def __init__(self, y: Tensor, x: Tensor, per_sample, forward: bool, like: Tensor, dest):
        self.shape, self.dtype = block_shape(y, x, per_sample), like.dtype
        self.forward, self.pairs = forward, forward and x.is_complex()
        samples = y.shape[0] if per_sample else 1
        inputs = x.numel() // samples * (1 + self.pairs)
        self.sizes = samples, y.numel() // samples, inputs
        self.parts: list[Tensor] = []
        self.made = None
        if may_write():
            own = dest is None or not dest.is_contiguous()
            self.made = (
                torch.empty(self.shape, dtype=like.dtype, device=like.device) if own else dest
            )

    def add(self, start: int, made: Tensor) -> None:
        """Rows, or columns, from ``start`` on: ``(how many, *shape of the other end)``."""
        samples, outputs, inputs = self.sizes
        part = made.reshape(len(made), samples, outputs if self.forward else inputs)
        part = part.permute(1, 2, 0) if self.forward else part.transpose(0, 1)
        if self.made is None:
            self.parts.append(part)
        else:
            flat = torch.view_as_real(self.made) if self.pairs else self.made
            flat.view(self.sizes).narrow(1 + self.forward, start, len(made)).copy_(part)

    def block(self) -> Tensor:
        if self.made is not None:
            return self.made
        parts = self.parts
        whole = torch.cat(parts, 1 + self.forward) if len(parts) > 1 else parts[0]
        if self.pairs:
            whole = torch.view_as_complex(whole.unflatten(2, (-1, 2)).contiguous())
        return whole.reshape(self.shape).to(self.dtype)


def zero_block(
    y: Tensor, x: Tensor, per_sample: bool | str, like: Tensor, dest: Tensor | None = None
) -> Tensor:
    """The block of an output that does not depend on an input."""
    if dest is not None:
        return dest.zero_()
    return torch.zeros(block_shape(y, x, per_sample), dtype=like.dtype, device=like.device)
