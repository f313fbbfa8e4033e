"""Derivatives that the caller gives ops in place of their own, while the graph of a call is read (`jactri.overrides`).

What is in force belongs to a context: other threads and tasks do not see it. A `Reader` asks at every node; so what
does not read the graph does not know of overrides, and has to `refuse`.
"""

from __future__ import annotations

import functools
import re
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import _get_sequence_nr

from ..rules import record_of
from .writes import NAME as WRITE

if TYPE_CHECKING:
    from .graph import Reader

Ids = tuple[int | None, ...]

SOFTMAX = frozenset({"SoftmaxBackward0"})

_INSIDE = (
    (SOFTMAX | {"BmmBackward0"}, re.compile("Attention")),
    ({"RsqrtBackward0"}, re.compile("FusedRmsNorm")),
    ({"TanhBackward0", "SigmoidBackward0"}, re.compile("Lstm|Gru|Rnn")),
)
"""Ops that nodes of others' names compute, too."""

_WHOLE = re.compile("^(CheckpointFunction|CompiledFunction)")
"""Nodes that hide any op."""


class Calls(threading.local):
    """When the modules of an override ran, in sequence numbers of autograd's nodes, which a thread counts by itself."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[float] = []
        self._depth = 0

    def begin(self) -> None:
        """A function begins: no module runs, though an interrupt may have ended one without a word."""
        if self._depth:
            self._depth, self._stops[-1] = 0, _get_sequence_nr()

    def enter(self) -> None:
        """A module begins; one within another adds nothing."""
        if not self._depth:
            self._starts.append(_get_sequence_nr())
            self._stops.append(float("inf"))
        self._depth += 1

    def leave(self) -> None:
        """It ends."""
        if self._depth:
            self._depth -= 1
            if not self._depth:
                self._stops[-1] = _get_sequence_nr()

    def made(self, node) -> bool:
        """Whether a node was made in one of them, in this thread."""
        number = node._sequence_nr()
        k = bisect_right(self._starts, number) - 1
        return k >= 0 and number < self._stops[k]


class Override:
    """One entry of the caller's.

    Attributes:
        key: what it is for, as text.
        how: what it puts there, as text.
        ops: names of nodes, or classes of Functions; none where it is for modules as a whole.
        read: emits the maps of a node; None leaves it to its rule.
        zero: whether it is the derivative zero.
        calls: of the modules that it is limited to, if it is.
    """

    __slots__ = ("calls", "how", "key", "ops", "read", "zero")

    def __init__(
        self, key: str, how: str, ops: frozenset, read: Callable[[Reader], Ids], zero: bool, calls: Calls | None,
    ):  # fmt: skip
        self.key, self.how, self.ops, self.read, self.zero, self.calls = (
            key, how, ops, read, zero, calls,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.key}: {self.how}"

    def takes(self, node, name: str) -> bool:
        """Whether it is for a node."""
        if (applied := _applied(node)) is not None:
            return applied.override is self
        mine = name in self.ops or getattr(node, "_forward_cls", None) in self.ops
        return mine and self.here(node)

    def here(self, node) -> bool:
        return self.calls is None or self.calls.made(node)

    def hidden(self, node, name: str) -> bool:
        """Whether a node may compute what it is for, out of sight."""
        if not self.ops or not _may_hide(self.ops, name) or not self.here(node):
            return False
        return name != WRITE or _written(self.ops, node)


@functools.lru_cache(1024)
def _may_hide(ops: frozenset, name: str) -> bool:
    return bool(name == WRITE or _WHOLE.search(name)) or any(
        not known.isdisjoint(ops) and within.search(name) for known, within in _INSIDE
    )


def _written(ops: frozenset, node) -> bool:
    """Whether a write into a part of a tensor may be by one of these ops, in place, and no assignment.

    The numbers 1, 2, 3, ... tell: an assignment takes those of the places that it replaces to what it puts there.
    """
    known = [op for op in ops if isinstance(op, str) and _op(op) in _in_place()]
    if known and len(node.next_functions) > 1:  # operands that ops with a form have not
        known = [op for op in known if record_of(op).form is None]
    if not known or len(node.next_functions) == 1:
        return bool(known)
    meta = node._input_metadata[0]
    c = torch.arange(1, prod(meta.shape) + 1, device=meta.device).to(meta.dtype)
    c = c.reshape(tuple(meta.shape))
    with torch.no_grad():
        base, *rest = node(c)
    taken = [t.double().sum() for t in rest if t is not None]
    if base is None or not taken:  # a constant: for what it says, a product with zeros and ones
        return True
    gone = base == 0
    assigned = bool((gone | (base == c)).all()) and bool(sum(taken) == c[gone].double().sum())
    return not assigned


def _op(name: str) -> str:
    return name.partition("Backward")[0].lower()


@functools.cache
def _in_place() -> frozenset[str]:
    """The ops that can write to what they are given."""
    names = {n for where in (torch.Tensor, torch, torch._C._nn) for n in dir(where)}
    return frozenset(
        n.replace("_", "").lower() for n in names if n.endswith("_") and not n.startswith("_")
    )


class Reading:
    """What overrides did while a graph was read."""

    fixed = 0
    """Whether the deviation by which a norm divides is held constant: 1, and 2 once a rule has done so."""

    def __init__(self, overrides: Sequence[Override]):
        self.overrides = overrides
        self.met = dict.fromkeys(overrides, 0)
        self._ran: Counter[str] = Counter()

    def read(self, g: Reader) -> Ids | None:
        """The values of the current node's outputs, or None where it has its own derivative."""
        node = g.node
        if _OWN in node.metadata:
            return None
        applied = _applied(node)
        if applied is None:
            self._ran[g.name] += 1
        for override in reversed(self.overrides):  # the innermost block first
            if override.takes(node, g.name):
                self.met[override] += 1
                return override.read(g) if applied is None else applied.read(g)
        inside = [o for o in self.overrides if o.hidden(node, g.name)]
        for override in inside:
            if not (override.zero and override.ops >= SOFTMAX and g.name.startswith("ScaledDot")):
                raise RuntimeError(_hides(override, g.name))
            self.met[override] += 1
        if inside:  # constant weights: the values alone are left
            g.src = [s if edge == 2 else None for edge, s in enumerate(g.src)]
            return g.understand() if g.src[2] is not None else (None,) * len(g.meta)
        return None

    def check(self, nodes, inputs: Sequence[Tensor]) -> None:
        """Raise ValueError for an override that no node was for; empty inputs have none.

        ``nodes``: all, those that do not depend on ``inputs``, too.
        """
        last.set(self.met)
        if not all(x.numel() for x in inputs):
            return
        for override, count in self.met.items():
            if count or any(override.takes(n, n.name()) for n in nodes if _OWN not in n.metadata):
                continue
            ran = ", ".join(f"{op} ({n})" for op, n in self._ran.most_common(40)) or "none"
            what = "op" if override.ops else "module"
            raise ValueError(
                f"jactri.overrides: {override.key} is no {what} of this call. "
                + (_MODULES if not override.ops else "")
                + f"The ops between inputs and outputs: {ran}"
            )


_MODULES = (
    "A module counts when it is called (not by its forward) within the function that jactri runs, and its output lies "
    "between inputs and outputs; for a computation of your own, as jacobian_of takes it, name an op. "
)


_OWN = "jactri"


def own(y: Tensor, *given: Tensor) -> None:
    """What makes ``y`` of ``given`` is no part of the caller's function: no override is for it."""
    ends = [x.grad_fn for x in given]
    left = [y.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in ends or node.name() == "torch::autograd::AccumulateGrad":
            continue
        node.metadata[_OWN] = True
        left += [before for before, _ in node.next_functions]


class Applied:
    """The derivative that a call of a module got, at the node behind its output, whose edge 1 is the module's input.

    ``slope``: a tensor or number for each entry, or None for zero.
    """

    __slots__ = ("override", "slope")

    def __init__(self, override: Override, slope):
        self.override, self.slope = override, slope

    def read(self, g: Reader) -> Ids:
        slope = self.slope
        if slope is None or (s := g.src[1]) is None:
            return (None,)
        s = g.match(s)
        if slope.__class__ is float:
            return (g.scale(s, slope),)
        return (g.diagonal(s, slope),)


def _applied(node) -> Applied | None:
    found = getattr(node, "applied", None)
    return found if isinstance(found, Applied) else None


def _hides(override: Override, name: str) -> str:
    if "Attention" in name:
        remedy = 'load the model with attn_implementation="eager", or call it within sdpa_kernel(SDPBackend.MATH)'
    elif "RmsNorm" in name:
        remedy = "put jactri.detached_std in place of 'rms_norm'"
    elif name.startswith("Checkpoint"):
        remedy = "call torch.utils.checkpoint with use_reentrant=False"
    elif name == WRITE:
        remedy = "write into parts of a tensor by torch.cat or torch.where"
    elif name.startswith("Compiled"):
        remedy = "call it as it was before it was compiled"
    else:
        remedy = "write it in ops of torch"
    return (
        f"jactri.overrides: {override.key} may be inside of {name}, one node, where nothing can be put in its place: "
        f"{remedy}, or override {name} itself"
    )


now: ContextVar[tuple[Override, ...]] = ContextVar("overrides", default=())
"""What is in force, of the innermost block last."""

last: ContextVar[dict[Override, int] | None] = ContextVar("overrides met", default=None)
"""How many nodes each was for, in the graph that this context read last."""


def names() -> tuple[str, ...]:
    """What tells a graph that was read under overrides from one that was not."""
    return tuple(map(str, now.get()))


def begin() -> None:
    """A function of the caller's begins to run."""
    for override in now.get():
        if override.calls is not None:
            override.calls.begin()


def reading() -> Reading | None:
    """For a graph that is about to be read."""
    overrides = now.get()
    return Reading(overrides) if overrides else None


@contextmanager
def using(overrides: tuple[Override, ...]) -> Iterator[None]:
    """Within, these are in force."""
    token = now.set(overrides)
    try:
        yield
    finally:
        now.reset(token)


def refuse(what: str, instead: str = "") -> None:
    """Raise RuntimeError for what overrides do not reach, while some are in force."""
    if overrides := now.get():
        raise RuntimeError(
            f"{what} is not available under jactri.overrides ({', '.join(o.key for o in overrides)}): overrides are of "
            f"first derivatives that jactri reads from the graph; {instead or 'call it outside of the block'}"
        )


def told() -> tuple[str, ...]:
    """What is in force, and for how many nodes of the graph that was read last, as texts."""
    met: Any = last.get() or {}
    return (
        tuple(f"{o} ({n} node{'s' if n != 1 else ''})" for o, n in met.items()) if now.get() else ()
    )
