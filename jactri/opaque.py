"""The fallback: an autograd node used as it is, and the switch that forbids it.

Calling a node is its exact vector-Jacobian product; under ``torch.vmap`` it takes a block of cotangents. The
Jacobian-vector product comes from differentiating that product once more in its cotangent ("double vjp", in
which the product is linear). Nodes of Python ``autograd.Function`` subclasses may compute their backward outside of
autograd (NumPy, say), where a second derivative would be silently wrong: their push goes through the node's
dense matrix, built from exact pulls.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import warnings
from math import prod

import torch
from torch import Tensor

from .linear_map import LinearMap

logger = logging.getLogger("jactri")

_mode: contextvars.ContextVar[str] = contextvars.ContextVar("jactri_fallback", default="allow")
_logged: set[tuple] = set()


class FallbackError(RuntimeError):
    """An op has no rule and ``jactri.fallback("error")`` is in force."""


@contextlib.contextmanager
def fallback(mode: str):
    """Decide what happens at an op without a rule, inside of a ``with`` block and in this thread.

    ``"allow"`` (the default): autograd computes that op, which is exact but may be slow; each op and shape is
    logged once on the logger ``jactri`` at level INFO (entering the block forgets what was logged).
    ``"error"``: `FallbackError` is raised, naming the op.

    Raises ValueError for another mode.
    """
    if mode not in ("allow", "error"):
        raise ValueError(f"mode must be 'allow' or 'error', got {mode!r}")
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
            "use jactri.fallback('allow') to let autograd compute it"
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


class OpaqueCall:
    """One node as a function of the cotangents of its outputs; remembers the last answer for its other edges."""

    __slots__ = ("_last", "meta", "node", "present", "python", "shapes")

    def __init__(self, node, meta, present: list[bool], shapes: dict[int, tuple]):
        """``present``: which edges lead anywhere; ``shapes``: of the inputs that are asked for, by edge."""
        self.node, self.meta, self.present, self.shapes = node, meta, present, shapes
        self.python = isinstance(node, torch.autograd.function.BackwardCFunction)
        self._last: tuple[Tensor, int, tuple] | None = None
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(
                "jactri cannot differentiate through torch.utils.checkpoint with use_reentrant=True (its backward "
                "writes .grad fields, and torch.autograd.grad refuses it too); pass use_reentrant=False"
            )

    def edges(self, grads: tuple) -> tuple[Tensor | None, ...]:
        """One gradient an edge of the node, not yet reduced to the edge's shape."""
        if not self.python:
            out = self.node(*grads)
            return out if isinstance(out, tuple) else (out,)
        # a Python backward answers for every argument; edges exist for tensor arguments only
        out = self.node.apply(*grads)
        out = out if isinstance(out, tuple) else (out,)
        needed = [g for g, need in zip(out, self.node.needs_input_grad, strict=False) if need]
        if sum(self.present) != len(needed):
            raise RuntimeError(
                f"{self.node.name()}: {len(needed)} gradients for {sum(self.present)} differentiable inputs"
            )
        it = iter(needed)
        return tuple(next(it) if p else None for p in self.present)

    def cotangents(self, nr: int, c: Tensor) -> tuple:
        """The node's arguments: ``c`` for output ``nr``, zeros (Python nodes) or None for the others."""
        if len(self.meta) == 1:
            return (c,)
        if not self.python:
            return tuple(c if i == nr else None for i in range(len(self.meta)))
        return tuple(
            c if i == nr else torch.zeros(tuple(m.shape), dtype=m.dtype, device=m.device)
            for i, m in enumerate(self.meta)
        )

    def pull(self, nr: int, c: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of a block of cotangents ``(K, *out)`` for every edge asked for, reduced and stacked."""
        shapes = self.shapes
        if self._last is not None and self._last[0] is c and self._last[1] == nr:
            return self._last[2]
        present: list[bool] = []

        def one_row(row):
            grads = self.edges(self.cotangents(nr, row))
            grads = [
                _reduce(g, shapes[i]) if g is not None and i in shapes else None
                for i, g in enumerate(grads)
            ]
            present[:] = [g is not None for g in grads]
            return tuple(g for g in grads if g is not None)

        stacked = iter(batched(one_row, c, self.node.name()))
        out = tuple(next(stacked) if p else None for p in present)
        self._last = (c, nr, out)
        return out


def _reduce(g: Tensor, shape) -> Tensor:
    """What the engine does between nodes: sum a broadcast gradient to the shape of its input."""
    return g if g.shape == torch.Size(shape) else g.sum_to_size(shape)


_no_vmap: set[str] = set()
_verified: set[tuple] = set()


def batched(one_row, block: Tensor, name: str) -> tuple[Tensor, ...]:
    """``one_row`` over the first axis of ``block``: by vmap, or row by row where vmap cannot be trusted.

    Some ops have no vmap rule, and some have a wrong one (the backward of a batched ``torch.cdist`` in torch 2.13):
    the first time that an op is seen at some shape, two rows are computed without vmap and compared.
    """
    if block.shape[0] == 1:
        return tuple(o.unsqueeze(0) for o in one_row(block[0]))
    if name not in _no_vmap:
        try:
            with (
                warnings.catch_warnings()
            ):  # that vmap loops over an op without a rule is right, and no news
                warnings.filterwarnings("ignore", message="There is a performance drop")
                out = torch.vmap(one_row)(block)
        except (
            RuntimeError
        ) as error:  # no vmap rule for the op: the loop below raises any other fault again
            _distrust(name, str(error).split("\n")[0])
        else:
            use = (name, tuple(block.shape), block.dtype)
            if use in _verified or _agrees(one_row, block, out):
                _verified.add(use)
                return out
            _distrust(name, "its vmap rule gives another result than the op itself")
    rows = [one_row(row) for row in block.unbind(0)]
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def _distrust(name: str, why: str) -> None:
    logger.info("fallback: %s is not vmapped (%s); one row at a time", name, why)
    _no_vmap.add(name)


def _agrees(one_row, block: Tensor, out: tuple[Tensor, ...]) -> bool:
    """Whether the middle and the last row of a vmapped result are what the op gives for them alone."""
    for k in {block.shape[0] // 2, block.shape[0] - 1}:
        for got, want in zip(out, one_row(block[k]), strict=True):
            tolerance = (
                1e4
                * torch.finfo(want.dtype).eps
                * float(want.detach().abs().max() if want.numel() else 0)
            )
            gap = (got[k] - want).detach().abs()
            if bool((gap > tolerance).any()):  # a NaN in both is no disagreement
                return False
    return True


class Opaque(LinearMap):
    """One edge of a node that is called instead of understood; ``kept`` are the axes that it is known to keep."""

    __slots__ = ("_edge", "_kept", "_matrix", "call", "nr", "value")
    structure = "opaque"

    def __init__(self, call: OpaqueCall, nr: int, edge: int, value, kept=()):
        self.call, self.nr, self._edge, self.value, self._kept = call, nr, edge, value, kept
        self._matrix: Tensor | None = None

    @property
    def name(self):
        return self.call.node.name()

    @property
    def key(self):
        return Opaque, self.nr, self._edge, self.call.python, self._kept

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
        g = grads[self._edge]
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
        use = (
            self.name,
            self._edge,
            tuple(self.value.shape),
            tuple(self.call.meta[self.nr].shape),
            t.dtype,
        )
        if use in _no_push:
            return None
        try:
            if use not in _pushes and not self._push_agrees(t):
                raise NotImplementedError("its second derivative contradicts its first")
            out = self._twice(t, torch.is_grad_enabled())
        except RuntimeError as error:
            if not isinstance(error, NotImplementedError) and "is not implemented" not in str(
                error
            ):
                raise
            logger.info(
                "fallback: %s has no push (%s); its matrix is built by rows", self.name, error
            )
            _no_push.add(use)
            return None
        _pushes.add(use)
        return out

    def _twice(self, t: Tensor, create_graph: bool) -> Tensor:
        m = self.call.meta[self.nr]
        with torch.enable_grad():
            u = torch.zeros(tuple(m.shape), dtype=m.dtype, device=m.device, requires_grad=True)
            g = self.call.edges(self.call.cotangents(self.nr, u))[self._edge]
            if g is None:
                return t.new_zeros(t.shape[0], *m.shape, dtype=m.dtype)
            if not g.requires_grad:
                raise NotImplementedError("its backward is not recorded")
            g = _reduce(g, self.value.shape)

        def one_row(row):
            return torch.autograd.grad(
                g, u, row, retain_graph=True, create_graph=create_graph, materialize_grads=True
            )

        return batched(one_row, t.to(g.dtype), self.name + " (push)")[0]

    def _push_agrees(self, t: Tensor) -> bool:
        """<c, push(t)> = <pull(c), t> for one arbitrary pair: some ops have a wrong second derivative.

        (In torch 2.13 those of ``kl_div`` with a log target and of ``embedding`` with scaled gradients, for two.)
        """
        with torch.no_grad():
            c = _arbitrary(self.call.meta[self.nr].shape, t)
            r = _arbitrary(self.value.shape, t)
            left = c * self._twice(r, False)
            right = self.pull(c, False)[0] * r
        size = float(left.abs().sum() + right.abs().sum())
        return not abs(float(left.sum() - right.sum())) > 1e4 * torch.finfo(t.dtype).eps * size


_pushes: set[tuple] = set()
_no_push: set[tuple] = set()


def _arbitrary(shape, like: Tensor) -> Tensor:
    """A block of one row that has no structure, the same each time."""
    n = prod(shape)
    row = torch.arange(1, n + 1, dtype=torch.float64, device=like.device).mul(2.399963).sin()
    return row.to(like.dtype).reshape(1, *shape)
