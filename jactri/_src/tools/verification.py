"""A user's rule held against the node's own gradient: one cotangent, one tangent, the axes that it keeps."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..base.constants import arbitrary, halves
from ..maps.functional import Functional
from ..read.graph import Reader
from ..read.opaque import OpaqueCall
from .check import JacobianMismatch


class Verification:
    """One node and what a rule emitted for it: the values ``new``, of which ``ids`` stand for its outputs."""

    def __init__(self, g: Reader, new: range, ids: tuple[int | None, ...], where: str):
        self.g, self.new, self.ids, self.where = g, new, ids, where
        shapes = {e: g.values[s].shape for e, s in enumerate(g.src) if s is not None}
        self.sources = list(dict.fromkeys(s for s in g.src if s is not None))
        self.call = OpaqueCall(g.node, g.meta, shapes, recomputed=g.recomputed)

    def key(self) -> tuple:
        """What decides whether a node is like one that was seen."""
        g = self.g
        sources = [(g.values[s].shape, g.values[s].dtype) if s is not None else None for s in g.src]
        maps = [m.key for v in self.new for _, m in g.values[v].sources]
        metas = [(tuple(m.shape), m.dtype) for m in g.meta]
        return (g.node.__class__, *sources, *metas, *maps, torch.is_grad_enabled())

    @cached_property
    def tangents(self) -> dict[int, Tensor]:
        """By source; other numbers than those of cotangents: <t, A t> cannot tell A from its transpose."""
        return {s: self._arbitrary(s, 1.754878) for s in self.sources}

    # -- through what the rule emitted -------------------------------------------------------------

    def pull(self, nr: int, c: Tensor) -> list[Tensor]:
        """The gradients of a block of cotangents of output ``nr``, one for each of the ``sources``."""
        values, found = self.g.values, {self.ids[nr]: c}
        for v in reversed(self.new):
            if v in found:
                c = found.pop(v)
                for s, m in values[v].sources:
                    part = m.pull(c, False)[0]
                    found[s] = found[s] + part if s in found else part
        return [found[s] if s in found else self._zeros(s) for s in self.sources]

    def push(self, nr: int, curves: dict) -> tuple[Tensor, Tensor]:
        """The tangents of output ``nr``, and its second derivative along them, by ``curves``."""
        values, found = self.g.values, dict(self.tangents)
        bends: dict[int, Tensor] = {}
        for v in self.new:
            edges = values[v].sources
            found[v] = sum((m.push(found[s], False)[0] for s, m in edges), self._zeros(v))
            bends[v] = sum(
                (m.push(bends[s], False)[0] for s, m in edges if s in bends), self._zeros(v)
            )
            if v in curves:
                bends[v] = bends[v] + curves[v].along([found[s] for s in curves[v].sources])
        i = self.ids[nr]
        return found[i], bends[i] if i in bends else self._zeros(i)

    def merged(self, grads) -> list[Tensor]:
        """The node's gradients, one for each of the ``sources``: operands that are one value have their sum."""
        total = {s: self._zeros(s) for s in self.sources}
        for grad, s in zip(grads, self.g.src, strict=False):
            if grad is not None and s is not None:
                total[s] = total[s] + grad.reshape(total[s].shape)
        return list(total.values())

    def _zeros(self, v: int) -> Tensor:
        value = self.g.values[v]
        return torch.zeros(1, *value.shape, dtype=value.dtype, device=value.device)

    def _arbitrary(self, v: int, *step: float) -> Tensor:
        return arbitrary((1, *self.g.values[v].shape), self._zeros(v), *step)

    # -- the checks --------------------------------------------------------------------------------

    def first(self) -> None:
        """Pull against the node, push against pull, and what is said to be kept."""
        for nr, i in enumerate(self.ids):
            if i is None:
                continue
            c = self._arbitrary(i)
            ours = self.pull(nr, c)
            theirs = self.merged(self.call.pull(nr, c))
            for s, got, want in zip(self.sources, ours, theirs, strict=True):
                self._compare(
                    got, want, f"its pull to {self._argument(s)} is not the node's own gradient"
                )
            left = (c * self.push(nr, {})[0]).double()
            right = [
                (p * self.tangents[s]).double() for s, p in zip(self.sources, ours, strict=True)
            ]
            size = left.abs().sum() + sum(r.abs().sum() for r in right)
            gap = (left.sum() - sum(r.sum() for r in right)).abs()
            if bool(gap > _tolerance(c.dtype) * size) or (
                bool(gap.isnan()) and not bool(size.isnan())
            ):
                self._fail(
                    "its push is not the transpose of its pull: <c, push(t)> and <pull(c), t> differ by "
                    f"{float(gap):.3g} of {float(size):.3g}"
                )
        self._kept()

    def _kept(self) -> None:
        values = self.g.values
        for v in self.new:
            for s, m in values[v].sources:
                if not isinstance(m, Functional):
                    continue
                for a, b in m.kept(values[s].shape, values[v].shape):
                    n = values[v].shape[b]
                    if n < 2:
                        continue
                    # every two entries are told apart by one of the masks, both ways round
                    masks = halves(n, self.g.device)
                    out = [len(masks), *[1] * len(values[v].shape)]
                    out[b + 1] = n
                    into = [len(masks), *[1] * len(values[s].shape)]
                    into[a + 1] = n
                    got = m.pull(self._arbitrary(v) * masks.view(out), False)[0]
                    if bool((got.detach().masked_fill(masks.view(into), 0) != 0).any()):
                        self._fail(
                            f"axes ({a}, {b}) are not kept: entries of the output's axis {b} depend on others of the "
                            f"input's axis {a}"
                        )

    def second(self, curves: dict | None = None) -> None:
        """The derivative of the pull, as ``create_graph`` takes it, or the second derivative that ``curves`` give.

        Where autograd has none, since the backward is not recorded, the rule's word is taken.
        """
        g, along = self.g, [self.tangents[s] for s in self.sources]
        ends = [
            torch.autograd.graph.GradientEdge(*g.node.next_functions[g.src.index(s)])
            for s in self.sources
        ]
        for nr, i in enumerate(self.ids):
            if i is None:
                continue
            c = self._arbitrary(i)
            with torch.enable_grad():
                grads = self.call.edges(self.call.cotangents({nr: c[0]}))
                summed = [
                    x if s is None or x is None else x.sum_to_size(g.values[s].shape)
                    for x, s in zip(grads, g.src, strict=True)
                ]
                want = self._derivatives(self.merged(summed), ends)
                if want is None:
                    continue
                got = self._derivatives(self.pull(nr, c), ends) if curves is None else None
            if curves is None:
                for s, a, b in zip(
                    self.sources, got or map(self._zeros, self.sources), want, strict=True
                ):
                    self._compare(
                        a,
                        b,
                        f"its pull, differentiated in {self._argument(s)}, is not the node's second derivative",
                    )
                continue
            left = float((c * self.push(nr, curves)[1]).detach().double().sum())
            parts = [(w * t).double() for w, t in zip(want, along, strict=True)]
            right, size = (
                float(sum(p.sum() for p in parts)),
                float(sum(p.abs().sum() for p in parts)),
            )
            if abs(left - right) > _tolerance(c.dtype) * (size + abs(left)):
                self._fail(
                    f"its second derivative along a tangent gives {left:.6g}, autograd's {right:.6g}"
                )

    def _derivatives(self, grads: list[Tensor], ends) -> list[Tensor] | None:
        """The gradients of ``sum <grad, tangent>`` in the sources; None where it is not recorded, or constant."""
        y = sum((p * self.tangents[s]).sum() for s, p in zip(self.sources, grads, strict=True))
        if not y.requires_grad or _cut(y):
            return None
        found = torch.autograd.grad(y, ends, retain_graph=True, allow_unused=True)
        if all(f is None for f in found):
            return None
        return [
            self._zeros(s) if f is None else f.unsqueeze(0)
            for f, s in zip(found, self.sources, strict=True)
        ]

    def _argument(self, s: int) -> str:
        return f"argument {self.g.src.index(s)}"

    def _compare(self, got: Tensor, want: Tensor, what: str) -> None:
        got, want = got.detach().double(), want.detach().double()
        scale = float(want.abs().nan_to_num(0, 0, 0).max()) if want.numel() else 0.0
        gap = (got - want).abs()
        wrong = (gap > _tolerance(self.g.dtype) * scale) | (got.isnan() != want.isnan())
        if bool(wrong.any()):
            worst = int(gap.masked_fill(~wrong, -1).nan_to_num(float("inf")).argmax())
            self._fail(
                f"{what}: for an arbitrary cotangent {float(got.flatten()[worst]):.6g} where autograd has "
                f"{float(want.flatten()[worst]):.6g}, entry {worst} of {tuple(want.shape[1:])}"
            )

    def _fail(self, why: str):
        raise JacobianMismatch(f"{self.where}: {why}")


def _tolerance(dtype: torch.dtype) -> float:
    return min(1e4 * torch.finfo(dtype).eps, 0.05)


def _cut(y: Tensor) -> bool:
    """Whether a backward in the graph must not be differentiated (`once_differentiable`)."""
    seen, stack = {y.grad_fn}, [y.grad_fn]
    while stack:
        node = stack.pop()
        if node.name() == "torch::autograd::Error":
            return True
        fresh = {p for p, _ in node.next_functions if p is not None} - seen
        seen |= fresh
        stack += fresh
    return False
