"""One row of any graph, and few rows of a long graph of small nodes: by autograd's engine, before anything is read.

A node costs the engine some microseconds a pass, in C++; jactri spends some tens on it, in Python, to read it, to plan
its step and to run that, for all rows at once. Where values are small, nothing else decides. So the nodes of a long
graph are counted and their sizes looked at, and where the passes are predicted to cost less, they are made: one a row,
and under ``per_sample`` those of a probe that shows that samples do not mix. Where it does not show that, or where a
derivative is not finite (structure knows of zeros there), the graph is read as ever. None runs by vmap: the engine
writes to tensors that retain their gradients, which must not be batches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..base.backends import capturing, forced
from ..base.constants import halvings
from ..base.elsewhere import check_graph, is_distributed
from ..base.journal import on_disk
from ..base.memory import Budget
from ..base.rates import rough
from ..plan.planning import answer_bytes, samples_of
from ..plan.samples import probe_mixing
from ..prologue.arguments import ASSUME, Options, block_shape
from ..read import overriding
from ..read.behind import Walk, handles_of
from ..read.graph import UnsupportedGraph
from ..read.opaque import refusing
from ..read.ranges import watching
from .whole import Passes, Whole, all_rows, filled, row

LONG = 128
"""Nodes from which it pays to look at their sizes where passes are several: below, reading them is no matter."""

SMALL = 1 << 16
"""Entries of all ends up to which Python's part of a product is more than what structure might save of its memory."""

PASS = 4e-6
"""Seconds that a node takes in a pass of the engine,"""
STEP = 6e-5
"""and that it takes to be read and run, and to be planned now and then."""


class Engine(NamedTuple):
    """What the engine would do."""

    nodes: int
    rows: int
    probes: int
    """Passes that show whether samples mix."""
    seconds: float
    """Predicted, against"""
    steps: float
    """those of a sweep."""
    held: float
    """Bytes of all gradients of a row."""

    @property
    def reason(self) -> str:
        if self.rows == 1 and not self.probes:
            return "one row is one backward pass"
        probes = f" and {self.probes} passes that show samples apart" if self.probes else ""
        return (
            f"{self.nodes} small nodes, predicted {self.seconds * 1e3:.3g} ms for {self.rows} rows{probes}, against "
            f"{self.steps * 1e3:.3g} ms to read, plan and run as many steps"
        )


def foreseen(walk: Walk, ys, xs, asked: Options, budget: Budget) -> Engine | None:
    """What the engine would do of a recorded computation, or None where a sweep is to run."""
    one = scalar(ys, xs, asked)
    if not one and (len(walk.edges) < LONG or not _may(ys, xs, asked)):
        return None
    per_sample, device = asked.per_sample, xs[0].device
    live = [y for y in ys if y.requires_grad]
    rows = sum(y[:1].numel() if per_sample else y.numel() for y in live)
    samples = xs[0].shape[0] if per_sample else max(1, samples_of(ys, xs))
    probes = 0
    if per_sample and per_sample != ASSUME:
        probes = len(live) * halvings(samples) * (1 + torch.is_grad_enabled())
    if not rows or (work := walk.work(samples)) is None:
        return None
    budget = budget.less(answer_bytes(ys, xs, per_sample))
    once = rough(device.type).seconds(work.flops, work.moved)
    seconds = (probes + rows) * (work.nodes * PASS + once)
    steps = work.nodes * STEP + once
    found = Engine(work.nodes, rows, probes, seconds, steps, work.held)
    if one or (found.seconds <= found.steps and budget.fits(found.held)):
        return found
    return None


def _may(ys, xs, asked: Options) -> bool:
    """Whether the call asks for no more than rows of the function itself, which has no hooks to see what they know."""
    if overriding.now.get():
        return False
    if asked.strategy not in ("auto", "reverse-mode") or asked.form != "dense" or asked.progress:
        return False
    if asked.out is not None and on_disk(a for row in asked.out for a in row):
        return False
    for t in (*ys, *xs):
        if t.device.type != "cpu" or t.layout is not torch.strided or t.is_nested:
            return False
        if t.dtype.is_complex or is_distributed(t) or not t.numel():
            return False
    handles = handles_of(xs) if asked.handles == 0 else asked.handles
    # not known (None) of a graph of the caller's, whose tensors may retain gradients: the engine writes those
    return not (handles != 0 or forced() or refusing() or watching() or capturing(xs[0].device))


def apart(ys, xs, asked: Options, budget: Budget, engine: Engine) -> list[Passes] | None:
    """The passes of the engine, or None where these do not show samples apart."""
    check_graph(ys)
    whole = Whole(
        ys, xs, asked.per_sample, UnsupportedGraph(), budget, "reverse-mode", chunk_size=1, measured=False
    )  # fmt: skip
    passes = [*all_rows(whole)]
    if engine.probes:
        products = {p.targets[0][0]: p.product for p in passes}
        if probe_mixing(ys, xs, products=products) is not None:
            return None
    return passes


def rows(
    ys, xs, asked: Options, budget: Budget, engine: Engine, dests
) -> list[list[Tensor]] | None:
    """``J[j][i]`` by the engine, or None where the graph has to be read."""
    passes = apart(ys, xs, asked, budget, engine)
    if passes is None:
        return None
    found = filled(passes[0].whole, passes, dests)
    return found if all(bool(b.detach().isfinite().all()) for row in found for b in row) else None


def scalar(ys, xs, asked: Options) -> bool:
    """Whether the Jacobian is one row, which the engine makes before anything is read."""
    return len(ys) == 1 and ys[0].numel() == 1 and _product(ys, xs, asked)


def gradient(ys, xs, asked: Options, dests) -> list[Tensor] | None:
    """The row of a scalar function, by input, in ``dests`` where there are any; None where the graph has to be read."""
    if not scalar(ys, xs, asked):
        return None
    made = product(ys, xs, [torch.ones_like(ys[0]).unsqueeze(0)], 1, asked)
    if made is None:
        return None
    row = [
        g.reshape(block_shape(ys[0], x, asked.per_sample)) for g, x in zip(made, xs, strict=True)
    ]
    return row if dests is None else [to.copy_(g) for to, g in zip(dests[0], row, strict=True)]


def product(ys, xs, cotangents, columns: int, asked: Options) -> list[Tensor] | None:
    """``c J`` by the engine, blocks ``(K, *x)``, or None where the graph has to be read.

    One cotangent is one pass, of which a sweep of the same ops in Python can save nothing. Second derivatives are left
    to the rules, as some of torch's own are wrong.
    """
    if columns > 1 or not _product(ys, xs, asked):
        return None
    check_graph(ys)
    pairs = zip(ys, cotangents, strict=True)
    ends = [(y, c[0]) for y, c in pairs if y.requires_grad and c is not None]
    if not ends:
        return [x.new_zeros(1, *x.shape) for x in xs]
    made = [g.unsqueeze(0) for g in row([y for y, _ in ends], xs, [c for _, c in ends])]
    return made if all(bool(m.isfinite().all()) for m in made) else None


def _product(ys, xs, asked: Options) -> bool:
    if sum(t.numel() for t in (*ys, *xs)) > SMALL:
        return False
    return not torch.is_grad_enabled() and asked.memory_limit is None and _may(ys, xs, asked)
