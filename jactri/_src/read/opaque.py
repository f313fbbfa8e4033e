"""The fallback: an autograd node used as it is, and the switch that forbids it.

Calling a node is its exact vector-Jacobian product; under ``torch.vmap`` it takes a block of cotangents. The
Jacobian-vector product comes from differentiating that product once more in its cotangent ("double vjp", in
which the product is linear). Nodes of Python ``autograd.Function`` subclasses may compute their backward outside of
autograd (NumPy, say), where a second derivative would be silently wrong: their push goes through the node's
dense matrix, built from exact pulls, and a product that is to be differentiated is marked (see `unrecorded`).
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import warnings
from collections.abc import Callable, Hashable, Sequence
from math import prod

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from ..base import backends
from ..base.cache import Cache
from ..base.classes import plain
from ..base.constants import arbitrary
from ..base.recomputed import Recomputed
from ..base.remedies import one_of, untwice
from ..maps.linear_map import LinearMap
from .unrecorded import (
    ERROR,
    MARKED,
    SPARSE,
    UNUSUAL,
    cause,
    guarded,
    loose,
    sparse_cause,
)  # fmt: skip

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


def refuse_or_log(op: str, out_shape, in_shapes, reason: str = "has no rule") -> None:
    """Record one use of the fallback, or raise under ``fallback("error")``."""
    if _mode.get() == "error":
        raise FallbackError(
            f"{op} {reason} (output {tuple(out_shape)}) and jactri.fallback('error') is in force; "
            "use jactri.fallback('allow') to let autograd compute it, or write a rule for the op (jactri.rule)"
        )
    use = (op, tuple(out_shape), reason)
    if use not in _logged:
        _logged.add(use)
        logger.info(
            "fallback: %s %s; autograd computes it, one product for each of up to %d rows (inputs %s)",
            op,
            reason,
            prod(out_shape),
            ", ".join(map(str, in_shapes)),
        )


# What was found of torch's own nodes, by what determines them. Of others nothing is remembered: two functions may
# share a name, and one of them may have several modes.
_verified: Cache[Hashable, bool] = Cache(4096)  # whether its vmap rule is sound
_pushable: Cache[Hashable, bool] = Cache(4096)
_scalars: dict[type, tuple[str, ...]] = {}


def builtin(node) -> bool:
    """Whether a node is an op of torch's own: those have a class each. Python's and extensions' nodes have not."""
    kind = type(node)
    return getattr(torch._C._functions, kind.__name__, None) is kind


def identity(node) -> Hashable | None:
    """What determines a node but for values of tensors and their shapes, or None if that cannot be told."""
    if not builtin(node):
        return None
    kind = type(node)
    names = _scalars.get(kind)
    if names is None:
        saved = [n for n in dir(kind) if n.startswith("_saved_")]
        names = _scalars[kind] = tuple(n for n in saved if not hasattr(kind, "_raw" + n))
    return kind, repr([getattr(node, n) for n in names])


@contextlib.contextmanager
def looping():
    """A context in which vmap loops over ops without a rule and says nothing: that is right, and no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


class Vmapped:
    """``one_row``, a linear product, over the first axis of blocks: by vmap, or row by row where that is not sound.

    Some ops have no vmap rule, and some have a wrong one (the backward of a batched ``torch.cdist`` in torch 2.13), so
    what vmap gives is checked before it is used: the product is linear, and a combination of all rows of the block must
    give the same combination of all rows of the result.

    ``key``: what determines ``one_row`` but for the values in it; None if nothing does, then what is found holds for
    this object only.
    """

    __slots__ = ("_sound", "key", "name", "one_row")

    def __init__(
        self,
        one_row: Callable[[Tensor], tuple[Tensor, ...]],
        name: str,
        key: Hashable | None = None,
    ):
        self.one_row, self.name, self.key = one_row, name, key
        self._sound: bool | None = None

    def __call__(self, block: Tensor) -> tuple[Tensor, ...]:
        one_row, key = self.one_row, self.key
        if block.shape[0] == 1:
            return tuple(o.unsqueeze(0) for o in one_row(block[0]))
        sound = self._sound
        if key is not None:
            key = key, tuple(block.shape), block.dtype
            sound = _verified.get(key)
        # a check costs a row, and reads a value
        unknown = sound is None
        if unknown and (block.shape[0] == 2 or backends.capturing(block.device)):
            sound = unknown = False
        if sound is not False:
            out = self._by_vmap(block)
            sound = False if out is None else self._agrees(block, out) if unknown else True
            if unknown and sound is not None:
                self._sound = sound
                if key is not None:
                    _verified[key] = sound
            if sound:
                return out
        rows = [one_row(row) for row in block.unbind(0)]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def _by_vmap(self, block: Tensor) -> tuple[Tensor, ...] | None:
        try:
            with looping():
                return torch.vmap(self.one_row)(block)
        except UNUSUAL as error:  # without vmap, any other fault is raised again
            self._log(str(error).split("\n")[0])
            return None

    def _agrees(self, block: Tensor, out: tuple[Tensor, ...]) -> bool | None:
        """Whether a combination of all rows gives the same combination of the results; None if these are infinite."""
        finite = fits = True
        with torch.no_grad():
            weights = arbitrary((block.shape[0],), block.real)
            for got, want in zip(out, self.one_row(_combined(weights, block)), strict=True):
                if got.numel():
                    own = weights.to(got.dtype)
                    size = _combined(own.abs(), got.abs()).max()
                    gap = (_combined(own, got) - want).abs()
                    finite = finite & size.isfinite()
                    fits = fits & (gap <= loose(got.dtype) * size).all()
            if shown(finite & fits):
                return True
            if not shown(finite):
                return None
        self._log("its vmap rule gives another result than the op itself")
        return False

    def _log(self, why: str) -> None:
        logger.info("fallback: %s is not vmapped (%s); one row at a time", self.name, why)


def shown(holds) -> bool:
    """Whether something holds, for all samples where vmap is around."""
    while isinstance(holds, Tensor) and is_functorch_wrapped_tensor(holds):
        holds = get_unwrapped(holds)
    return bool(holds.all()) if isinstance(holds, Tensor) else holds


def _combined(weights: Tensor, block: Tensor) -> Tensor:
    """The sum of the rows of a block, each times its weight."""
    return torch.tensordot(weights.to(block.dtype), block, 1)


class OpaqueCall:
    """One node as a function of the cotangents of its outputs; remembers the last answer for its other edges."""

    __slots__ = (
        "_anchors", "_key", "_last", "_recomputed", "_rows", "_why", "meta", "node", "present",
        "python", "shapes",
    )  # fmt: skip

    def __init__(
        self,
        node,
        meta,
        shapes: dict[int, tuple],
        anchors: Sequence[Tensor] = (),
        recomputed: Recomputed | None = None,
    ):
        """``shapes``: of the inputs that are asked for, by edge; ``anchors``: tensors computed from the outputs."""
        self.node, self.meta, self.shapes, self._anchors = node, meta, shapes, anchors
        self._recomputed = Recomputed() if recomputed is None else recomputed
        self.present = [p is not None for p, _ in node.next_functions]
        self.python = isinstance(node, torch.autograd.function.BackwardCFunction)
        self._last: tuple[Tensor, int, tuple] | None = None
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
            return self._last[2]
        if nr not in self._rows:
            self._rows[nr] = self._products(nr)
        rows, present = self._rows[nr]
        if torch.is_grad_enabled() and (why := self.why_not()) is not None:
            with torch.no_grad():
                made = list(rows(c))
            stacked = iter(guarded(made, (c, *self._anchors), why))
        else:
            stacked = iter(rows(c))
        out = tuple(next(stacked) if p else None for p in present)
        self._last = (c, nr, out)
        return out

    def _products(self, nr: int) -> tuple[Vmapped, list[bool]]:
        """Products with one output's cotangents, and for which edges those had a gradient."""
        shapes = self.shapes
        present: list[bool] = []

        def one_row(row):
            grads = self.edges(self.cotangents({nr: row}))
            grads = [
                _reduce(g, shapes[i]) if g is not None and i in shapes else None
                for i, g in enumerate(grads)
            ]
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
    return g if g.shape == torch.Size(shape) else g.sum_to_size(shape)


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

    def work(self, in_shape, out_shape, reverse):
        # unknown; a dense product is the cautious guess, and a Python node's push needs its whole matrix
        n = float(prod(in_shape if not reverse else out_shape))
        return 2.0 * min(n, 64.0) if reverse or not self.call.python else 2.0 * n

    def pull(self, c, own):
        grads = self.call.pull(self.nr, c)
        g = grads[self.edge]
        if g is None:
            return c.new_zeros(c.shape[0], *self.value.shape, dtype=self.value.dtype), True
        return g.to(self.value.dtype), False

    def push(self, t, own):
        if not self.call.python:
            pushed = self._double_vjp(t)
            if pushed is not None:
                return pushed, False
        if self._matrix is None:
            m = self.call.meta[self.nr]
            shape = tuple(m.shape)
            n = prod(shape)
            eye = torch.eye(n, dtype=m.dtype, device=m.device).reshape(n, *shape)
            self._matrix = self.pull(eye, False)[0].reshape(n, -1)
        out = t.reshape(t.shape[0], -1).to(self._matrix.dtype) @ self._matrix.t()
        return out.reshape(t.shape[0], *self.call.meta[self.nr].shape), True

    def _double_vjp(self, t: Tensor) -> Tensor | None:
        """Tangents through the node, or None where its backward has no (right) derivative."""
        key, known = self.call.key("push", self.nr, self.edge, t.dtype), self._pushable
        if key is not None:
            known = _pushable.get(key)
        if known is False or (known is None and backends.capturing(t.device)):
            return None
        try:
            if known is None and not self._push_agrees(t):
                raise NotImplementedError("its second derivative contradicts its first")
            out, known = self._twice(t, torch.is_grad_enabled()), True
        except RuntimeError as error:
            if not isinstance(error, NotImplementedError) and "is not implemented" not in str(
                error
            ):
                raise
            logger.info(
                "fallback: %s has no push (%s); its matrix is built by rows", self.name, error
            )
            out, known = None, False
        self._pushable = known
        if key is not None:
            _pushable[key] = known
        return out

    def _twice(self, t: Tensor, create_graph: bool) -> Tensor:
        m = self.call.meta[self.nr]
        with torch.enable_grad():
            u = torch.zeros(tuple(m.shape), dtype=m.dtype, device=m.device, requires_grad=True)
            g = self.call.edges(self.call.cotangents({self.nr: u}))[self.edge]
            if g is None:
                return t.new_zeros(t.shape[0], *m.shape, dtype=m.dtype)
            if not g.requires_grad:
                raise NotImplementedError("its backward is not recorded")
            g = _reduce(g, self.value.shape)

        def one_row(row):
            return torch.autograd.grad(
                g, u, row, retain_graph=True, create_graph=create_graph, materialize_grads=True
            )

        key = self.call.key("push", self.nr, self.edge)
        return Vmapped(one_row, self.name + " (push)", key)(t.to(g.dtype))[0]

    def _push_agrees(self, t: Tensor) -> bool:
        """<c, push(t)> = <pull(c), t> for one arbitrary pair: some ops have a wrong second derivative.

        (In torch 2.13 those of ``kl_div`` with a log target and of ``embedding`` with scaled gradients, for two.)
        """
        with torch.no_grad():
            c = arbitrary((1, *self.call.meta[self.nr].shape), t)
            # other numbers: <r, A r> cannot tell A from its transpose
            r = arbitrary((1, *self.value.shape), t, 1.754878)
            left = c * self._twice(r, False)
            right = self.pull(c, False)[0] * r
        size = float(left.abs().sum() + right.abs().sum())
        return not abs(float(left.sum() - right.sum())) > loose(t.dtype) * size
