"""The fallback: an autograd node used as it is, and the switch that forbids it.

Calling a node is its exact vector-Jacobian product; under ``torch.vmap`` it takes a block of cotangents. The
Jacobian-vector product comes from differentiating that product once more in its cotangent ("double vjp", in
which the product is linear). Nodes of Python ``autograd.Function`` subclasses may compute their backward outside of
autograd (NumPy, say), where that would be silently wrong: every such push is held against an exact pull, and goes
through the rows of the node's matrix where the two contradict each other. A product that is to be differentiated is
marked (see `unrecorded`).
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import replace
from math import hypot, inf, prod

import torch
from torch import Tensor

from ..base import backends
from ..base.cache import Cache
from ..base.classes import plain
from ..base.constants import arbitrary, firm, fixed, halves
from ..base.rates import block_bytes
from ..base.recomputed import Recomputed
from ..base.remedies import one_of, untwice
from ..maps.linear_map import LinearMap
from .nodes import builtin, identity
from .unrecorded import ERROR, MARKED, SPARSE, UNUSUAL, cause, guarded, sparse_cause, tight
from .vmapped import Vmapped, combined, figures, fitting, shown

logger = logging.getLogger("jactri")

_mode: contextvars.ContextVar[str] = contextvars.ContextVar("jactri_fallback", default="allow")
_logged: set[tuple] = set()


class FallbackError(RuntimeError):
    """An op has no rule and ``jactri.fallback("error")`` is in force; the message names the op.

    Examples:
        >>> class Double(torch.autograd.Function):
        ...     forward = staticmethod(lambda ctx, x: 2 * x)
        ...     backward = staticmethod(lambda ctx, grad: 2 * grad)
        >>> try:
        ...     with jactri.fallback("error"):
        ...         J = jactri.jacobian(Double.apply, torch.ones(2))
        ... except jactri.FallbackError as error:
        ...     print("DoubleBackward" in str(error))
        True
    """


@contextlib.contextmanager
def fallback(mode: str):
    """Decide what happens at an op without a rule, inside of a ``with`` block and in this thread.

    Args:
        mode: ``"allow"`` (the default): autograd computes that op, which is exact but may be slow; each op and shape is
            logged once on the logger ``jactri`` at level INFO (entering the block forgets what was logged).
            ``"error"``: `FallbackError` is raised, naming the op.

    Raises:
        ValueError: another mode.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        >>> with jactri.fallback("error"):  # passes: all of it has rules
        ...     J = jactri.jacobian(net, torch.randn(4, 3), per_sample=True)
    """
    if mode not in ("allow", "error"):
        raise ValueError(one_of("mode", mode, ("allow", "error")))
    token = _mode.set(mode)
    _logged.clear()
    try:
        yield
    finally:
        _mode.reset(token)


def refusing() -> bool:
    """Whether ``fallback("error")`` is in force."""
    return _mode.get() == "error"


def refuse_or_log(op: str, out_shape, in_shapes, reason: str = "has no rule") -> None:
    """Record one use of the fallback, or raise under ``fallback("error")``."""
    if refusing():
        raise FallbackError(
            f"{op} {reason} (output {tuple(out_shape)}) and jactri.fallback('error') is in force; "
            "use jactri.fallback('allow') to let autograd compute it, or write a rule for the op (jactri.rule)"
        )
    use = (op, tuple(out_shape), reason)
    if use not in _logged:
        _logged.add(use)
        logger.info(
            "fallback: %s %s; autograd computes it, one product for each of up to %d rows (inputs %s)",
            op, reason, prod(out_shape), ", ".join(map(str, in_shapes)),
        )  # fmt: skip


_pushable: Cache[Hashable, bool] = Cache(4096)
"""Whether a double vjp through one of torch's own nodes is right, by what determines the node."""

FEW = 32
"""Rows of a matrix that are pulled before it is asked whether fewer would do."""

COARSE = 0.01
"""A relative error that hides what is missing: of half precision."""

ROWS_BYTES = 1 << 22
"""Rows of a node's matrix are formed and multiplied about so many bytes at a time, on a CPU."""


class OpaqueCall:
    """One node as a function of the cotangents of its outputs; remembers the last answer until all edges had it."""

    __slots__ = (
        "__weakref__", "_anchors", "_key", "_last", "_recomputed", "_rows", "_why", "meta", "node",
        "present", "python", "shapes",
    )  # fmt: skip

    def __init__(
        self, node, meta, shapes: dict[int, tuple], anchors: Sequence[Tensor] = (),
        recomputed: Recomputed | None = None,
    ):  # fmt: skip
        """``shapes``: of the inputs that are asked for, by edge; ``anchors``: tensors computed from the outputs."""
        self.node, self.meta, self.shapes, self._anchors = node, meta, shapes, anchors
        self._recomputed = Recomputed() if recomputed is None else recomputed
        self.present = [p is not None for p, _ in node.next_functions]
        self.python = isinstance(node, torch.autograd.function.BackwardCFunction)
        self._last: tuple[Tensor, int, tuple, int] | None = None
        self._rows: dict[int, tuple[Vmapped, list[bool]]] = {}
        self._key: Hashable = ()
        self._why: str | None = ""
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(
                "jactri cannot differentiate through torch.utils.checkpoint with use_reentrant=True (its backward "
                "writes .grad fields, and torch.autograd.grad refuses it too); pass use_reentrant=False"
            )

    def edges(self, grads: tuple) -> tuple[Tensor | None, ...]:
        """One gradient an edge of the node, not yet reduced to the edge's shape."""
        if self.python:
            return self._aligned(self._recomputed.read(self.node.apply, *grads))
        try:
            return self._aligned(self._recomputed.read(self.node, *grads))
        except NotImplementedError as error:
            raise NotImplementedError(untwice(self.node.name(), error)) from error

    def _aligned(self, out) -> tuple[Tensor | None, ...]:
        """What the node returned, by edge."""
        out = out if isinstance(out, tuple) else (out,)
        if not self.python:
            return out
        # a Python backward answers for every argument; edges exist for tensor arguments only
        needed = [
            plain(g) for g, need in zip(out, self.node.needs_input_grad, strict=False) if need
        ]
        if sum(self.present) != len(needed):
            raise RuntimeError(
                f"{self.node.name()}: {len(needed)} gradients for {sum(self.present)} differentiable inputs"
            )
        it = iter(needed)
        return tuple(next(it) if p else None for p in self.present)

    def why_not(self) -> str | None:
        """Why a product with the node must not be differentiated, or None."""
        if self._why == "":

            def asked(out):
                grads = self._aligned(out)
                return [g for i, g in enumerate(grads) if i in self.shapes and g is not None]

            if self.node.name() in SPARSE:
                self._why = sparse_cause(self.node)
            elif builtin(self.node):  # what torch's own ops cannot differentiate, they refuse to
                self._why = None
            else:
                self._why = cause(self.node, self.meta, asked)
        return self._why

    def key(self, *more) -> Hashable | None:
        """What determines a product with the node but for the values in it; None if that cannot be told."""
        if self._key == ():
            key = identity(self.node)
            self._key = key and (key, *self.present, *self.shapes.items())
        return self._key and (self._key, *more)

    def cotangents(self, given: dict[int, Tensor]) -> tuple:
        """The node's arguments: what is given by output, zeros (Python nodes) or None for the others."""
        if not self.python:
            return tuple(given.get(i) for i in range(len(self.meta)))
        # Python code may write to them, or view them: contiguous memory of their own, and of no class of the caller's
        return tuple(
            plain(given[i]).clone(memory_format=torch.contiguous_format)
            if i in given
            else torch.zeros(tuple(m.shape), dtype=m.dtype, device=m.device)
            for i, m in enumerate(self.meta)
        )

    def pull(self, nr: int, c: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of a block of cotangents ``(K, *out)`` for every edge asked for, reduced and stacked."""
        if self._last is not None and self._last[0] is c and self._last[1] == nr:
            *_, out, left = self._last
            self._last = (c, nr, out, left - 1) if left > 1 else None
            return out
        if torch.is_grad_enabled() and (why := self.why_not()) is not None:
            with torch.no_grad():
                out = self._pulled(nr, c)
            made = [g for g in out if g is not None]
            marked = iter(guarded(made, (c, *self._anchors), why))
            out = tuple([None if g is None else next(marked) for g in out])
        else:
            out = self._pulled(nr, c)
        left = len(self.shapes) - 1
        self._last = (c, nr, out, left) if left else None
        return out

    def _pulled(self, nr: int, c: Tensor) -> tuple[Tensor | None, ...]:
        if len(c) == 1:
            return tuple([None if g is None else g.unsqueeze(0) for g in self._row(nr, c[0])])
        rows, present = self._rows.get(nr) or self._rows.setdefault(nr, self._products(nr))
        stacked = iter(rows(c))
        return tuple([next(stacked) if p else None for p in present])

    def _row(self, nr: int, row: Tensor) -> list[Tensor | None]:
        """Gradients of one cotangent, by edge."""
        shapes, grads = self.shapes, self.edges(self.cotangents({nr: row}))
        return [
            _reduce(g, shapes[i]) if g is not None and i in shapes else None
            for i, g in enumerate(grads)
        ]

    def _products(self, nr: int) -> tuple[Vmapped, list[bool]]:
        """Products with one output's cotangents, and for which edges those had a gradient."""
        present: list[bool] = []
        call = weakref.proxy(self)  # a cycle would hold the graph until it is collected

        def one_row(row):
            grads = call._row(nr, row)
            present[:] = [g is not None for g in grads]
            return tuple(g for g in grads if g is not None)

        return Vmapped(one_row, self.node.name(), self.key(nr)), present


def others(ys) -> list[OpaqueCall]:
    """Calls of nodes that are not torch's own, or of `SPARSE`. Raises RuntimeError for ``once_differentiable``."""
    found, stack = [], [y.grad_fn for y in ys if y.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node.__class__ is ERROR:
            raise RuntimeError(MARKED)
        edges = node.next_functions
        if not builtin(node) or node.name() in SPARSE:
            shapes = {e: () for e, (p, _) in enumerate(edges) if p is not None}
            found.append(OpaqueCall(node, node._input_metadata, shapes))
        for p, _ in edges:
            if p is not None and p not in seen:
                seen.add(p)
                stack.append(p)
    return found


def why_not(ys) -> str | None:
    """Why what a backward pass of these tensors gives must not be differentiated, or None."""
    return next((why for call in others(ys) if (why := call.why_not()) is not None), None)


def _reduce(g: Tensor, shape) -> Tensor:
    """What the engine does between nodes: sum a broadcast gradient to the shape of its input.

    Blocks are dense: a sparse gradient (``sparse=True`` of an embedding) is a layout, not another derivative.
    """
    if g.layout is not torch.strided:
        g = g.to_dense()
    return g if g.shape == shape else g.sum_to_size(shape)


def _fixed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`firm`, kept if it is small. Not to be written to."""

    def made() -> tuple[Tensor]:
        return (firm(shape, torch.empty((), dtype=dtype, device=device)),)

    (found,) = made() if prod(shape) >> 16 else fixed(("firm", shape, dtype, device), made)
    return found


class Opaque(LinearMap):
    """One edge of a node that is called instead of understood; ``kept`` are the axes that it is known to keep."""

    __slots__ = ("_kept", "_matrix", "_pushable", "call", "edge", "nr", "value")
    structure = "opaque"

    def __init__(self, call: OpaqueCall, nr: int, edge: int, value, kept=()):
        self.call, self.nr, self.edge, self.value, self._kept = call, nr, edge, value, kept
        self._matrix: Tensor | None = None
        self._pushable: bool | None = None

    @property
    def name(self):
        return self.call.node.name()

    @property
    def key(self):
        return Opaque, self.nr, self.edge, self.call.python, self._kept

    def kept(self, in_shape, out_shape):
        return self._kept

    def keep(self, pairs) -> None:
        """Note axes that a probe found to be left unmixed."""
        self._kept = pairs

    def unmixed(self, axis: int) -> bool:
        """Whether a probe finds no derivative, along an axis of both sides, of one entry in another.

        An arbitrary cotangent on some of the entries must leave exact zeros on the others; see `halves`.
        """
        m = self.call.meta[self.nr]
        shape, before = tuple(m.shape), self.value.shape
        noise = arbitrary(shape, m)

        def along(mask: Tensor, dims: int) -> Tensor:
            sizes = [1] * dims
            sizes[axis] = shape[axis]
            return mask.view(len(mask), *sizes)

        for masks in halves(shape[axis], m.device).split(self._at_once()):
            pulled = self.pull(noise * along(masks, len(shape)), False)[0]
            if shown((pulled.masked_fill(along(masks, len(before)), 0) != 0).any()):
                return False
        return True

    def work(self, in_shape, out_shape, reverse):
        # unknown; a dense product is the cautious guess, and that a Python node's push goes by rows
        n = float(prod(in_shape if not reverse else out_shape))
        return 2.0 * min(n, 64.0) if reverse or not self.call.python else 2.0 * n

    def route(self, layout, in_shape, out_shape, reverse):
        found = super().route(layout, in_shape, out_shape, reverse)
        if reverse or not self.call.python:
            return found
        # all of which are pulled, however few the tangents
        rows = self.work(in_shape, out_shape, True) * prod(in_shape)
        rows /= max(1, found.mid.columns) * prod(out_shape[b] for _, b in self._kept)
        return replace(found, work=found.work + rows)

    def pull(self, c, own):
        grads = self.call.pull(self.nr, c)
        g = grads[self.edge]
        if g is None:
            return c.new_zeros(c.shape[0], *self.value.shape, dtype=self.value.dtype), True
        return g.to(self.value.dtype), False

    def push(self, t, own):
        # what must not be differentiated is made of pulls, which say so
        once = torch.is_grad_enabled() and self.call.why_not() is not None
        pushed = None if once else self._double_vjp(t)
        if pushed is not None:
            return pushed, False
        return self._by_rows(t, once), True

    def _double_vjp(self, t: Tensor) -> Tensor | None:
        """Tangents through the node, or None where its backward has no (right) derivative."""
        call, silent = self.call, backends.capturing(t.device)
        key = call.key("push", self.nr, self.edge, t.dtype)
        known = self._pushable if key is None else _pushable.get(key)
        # where nothing is remembered, every product is checked
        if known is False or (silent and (known is None or key is None)):
            return None
        few = key is None and len(t) >= prod(call.meta[self.nr].shape) > 1  # rows
        if few or (call.python and tight(t.dtype) > COARSE):  # or no check could tell
            return None
        try:
            if key is not None and known is None:
                # other numbers than the cotangent's: <r, A r> cannot tell A from its transpose
                r = arbitrary((1, *self.value.shape), t, 1.754878)
                with torch.no_grad():
                    known = self._agrees(r, self._twice(r, False))
            out = None if known is False else self._twice(t, torch.is_grad_enabled())
            if key is None:
                known = self._agrees(t, out)
            if known is False or (known is None and key is None):
                raise NotImplementedError("its second derivative contradicts its first")
        except UNUSUAL as error:
            unknown = not isinstance(error, NotImplementedError)
            if not call.python and unknown and "is not implemented" not in str(error):
                raise
            logger.info("fallback: %s has no push (%s); it goes by rows", self.name, error)
            out, known = None, False
        if key is None:
            self._pushable = known
        elif known is not None:
            _pushable[key] = known
        return out

    def _twice(self, t: Tensor, create_graph: bool) -> Tensor:
        m = self.call.meta[self.nr]
        with torch.enable_grad():
            u = torch.zeros(tuple(m.shape), dtype=m.dtype, device=m.device, requires_grad=True)
            g = self.call.edges(self.call.cotangents({self.nr: u}))[self.edge]
            if g is not None and not g.requires_grad and self.call.key() is not None:
                raise NotImplementedError("its backward is not recorded")
            if g is None or not g.requires_grad:  # that this is all, the check tells
                return t.new_zeros(t.shape[0], *m.shape, dtype=m.dtype)
            g = _reduce(g, self.value.shape)

        def one_row(row):
            (found,) = fitting((g,), (u,), (row,), create_graph)
            return (torch.zeros_like(u) if found is None else found,)

        t = t.to(g.dtype)
        if len(t) == 1:
            return one_row(t[0])[0].unsqueeze(0)
        key = self.call.key("push", self.nr, self.edge)
        return Vmapped(one_row, self.name + " (push)", key)(t)[0]

    def _agrees(self, t: Tensor, pushed: Tensor) -> bool | None:
        """<c, push(t)> = <pull(c), t> for an arbitrary c and all tangents combined; None: the pull is infinite.

        Backwards may not be recorded, and some ops of torch's own have a wrong second derivative (in torch 2.13 those
        of ``kl_div`` with a log target and of ``embedding`` with scaled gradients, for two; in 2.14 that of a gradient
        of ``pdist`` is NaN).
        """
        m = self.call.meta[self.nr]
        with torch.no_grad():
            if len(t) > 1:
                weights = arbitrary((len(t),), t, 1.324718)
                t, pushed = (combined(weights, block).unsqueeze(0) for block in (t, pushed))
            c = _fixed((1, *m.shape), m.dtype, m.device)
            left, right = c * pushed, self.pull(c, False)[0] * t
            # as rounding adds up: of all terms, one that is missing shows
            bound, found = max(tight(m.dtype), tight(t.dtype)), []
            for total in (torch.sum, torch.linalg.vector_norm):
                found += [total(side, dtype=torch.float64) for side in (left, right)]
            if all(abs(a - b) <= bound * hypot(x, y) < inf for a, b, x, y in figures(found)):
                return True
        return False if shown(right.isfinite().all()) else None

    def _at_once(self) -> int:
        """How many rows of the matrix are formed at once."""
        m = self.call.meta[self.nr]
        row = max(prod(m.shape), prod(self.value.shape)) * m.dtype.itemsize
        return max(1, int(block_bytes(m.device.type, ROWS_BYTES) // max(row, 1)))

    def _apart(self, once: bool) -> tuple[int, int] | None:
        """An (input axis, output axis) pair that is left unmixed: one that is known, or the first if a probe says so.

        ``once``: what it is for must not be differentiated; else what a probe says in grad mode is not enough.
        """
        shape, before = tuple(self.call.meta[self.nr].shape), self.value.shape
        if self._kept:
            return max(self._kept, key=lambda pair: shape[pair[1]])
        if backends.capturing(self.value.device) or (torch.is_grad_enabled() and not once):
            return None
        if prod(shape) <= FEW or shape[0] < 2 or shape[:1] != before[:1]:
            return None
        with torch.no_grad():
            return (0, 0) if self.unmixed(0) else None

    def _by_rows(self, t: Tensor, once: bool) -> Tensor:
        """Tangents times the node's matrix, or its blocks along an axis that it keeps, some rows at a time."""
        m, k = self.call.meta[self.nr], len(t)
        pair = self._apart(once)
        a, b = pair or (0, 0)
        n = m.shape[b] if pair else 1
        rest = [size for axis, size in enumerate(m.shape) if not (pair and axis == b)]

        def by_entry(block: Tensor) -> Tensor:
            """``(n, rows, numbers of one entry of the axis)``"""
            block = block.movedim(a + 1, 0) if pair else block.unsqueeze(0)
            return block.reshape(n, block.shape[1], -1)

        tangents = by_entry(t.to(self.value.dtype)).mT
        rows, most = prod(rest), self._at_once()
        parts = []
        for start in range(0, rows, most):
            part = self._matrix
            if part is None:
                count = min(most, rows - start)
                index = torch.arange(count, device=m.device)
                units = torch.zeros(count, rows, dtype=m.dtype, device=m.device)
                units[index, start + index] = 1
                units = units.view(count, *rest)
                if pair:
                    units = units.unsqueeze(b + 1).expand(count, *m.shape)
                part = by_entry(self.pull(units, False)[0])
                if rows <= most:
                    self._matrix = part
            parts.append(part @ tangents)
        out = torch.cat(parts, 1).permute(2, 0, 1).reshape(k, n, *rest)
        return (out.movedim(1, b + 1) if pair else out.squeeze(1)).to(m.dtype)
