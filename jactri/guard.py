"""Whether autograd recorded the same computation as before, and where the values that it saved are now.

Beside `graph`, the only reader of autograd's nodes. At the first call every node between outputs and inputs is written
down: its type, its edges, the shapes of its saved tensors and every other saved value. A later call's graph is compared
with that, node by node, by generated code (about 1.5 microseconds a node): a function that takes another branch is
noticed, not answered wrongly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .hooks import MODULE_HOOKS
from .tape import Unrecordable, strided

_ACCUMULATE = torch._C._functions.AccumulateGrad
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout)


def is_python(node) -> bool:
    """Whether a node runs Python code. Those that hold a module's backward hooks are identities without them."""
    return isinstance(node, torch._C._FunctionBase) and node.__class__ is not MODULE_HOOKS


def _plain(value) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_plain(v) for v in value)
    return isinstance(value, (*_PLAIN, torch.memory_format))


class Guard:
    """Source that walks a graph like the recorded one. ``lines`` raise Stale; ``places`` name tensors that it holds.

    ``bases`` name those that saved ones are views of, which nothing was compared with yet.
    """

    def __init__(self, ys: Sequence[Tensor], xs: Sequence[Tensor]):
        self.lines: list[str] = []
        self.constants: dict[str, object] = {}
        self.places: list[tuple[Tensor, str]] = [(x, f"leaf{i}") for i, x in enumerate(xs)]
        self.places += [(y, f"y{j}") for j, y in enumerate(ys)]
        self.bases: list[tuple[Tensor, str]] = []
        self._leaves = {id(x): f"leaf{i}" for i, x in enumerate(xs)}
        self._names: dict[object, str] = {}
        active = self._active(ys)
        for j, y in enumerate(ys):
            self._check(f"y{j}.shape != {self._constant(y.shape)}", "an output's shape")
            self._check(f"y{j}.stride() != {self._constant(y.stride())}", "an output's strides")
            self._check(f"y{j}.dtype is not {self._constant(y.dtype)}", "an output's dtype")
            self._edge(f"y{j}.grad_fn", y.grad_fn, active)
            if y.grad_fn is None:
                same = self._leaves.get(id(y))
                if same:
                    self._check(f"y{j} is not {same}", "an output")
                else:
                    self._check(f"y{j}.requires_grad", "an output")
            else:
                self._check(f"y{j}.output_nr != {y.output_nr}", "an output")
        while self._open:
            self._node(*self._open.pop(), active)

    def _active(self, ys) -> set:
        """The nodes from which an input is reached."""
        self._open: list[tuple[object, str]] = []
        order, seen, stack = [], set(), [y.grad_fn for y in ys if y.grad_fn is not None]
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                order.append(node)
                stack.extend(p for p, _ in node.next_functions if p is not None)
        active, grew = set(), True
        while grew:  # producers may come after consumers in this order
            grew = False
            for node in reversed(order):
                if node in active:
                    continue
                if node.__class__ is _ACCUMULATE:
                    hit = id(node.variable) in self._leaves
                else:
                    hit = any(p in active for p, _ in node.next_functions)
                if hit:
                    active.add(node)
                    grew = True
        return active

    def _constant(self, value) -> str:
        name = f"g{len(self.constants)}"
        self.constants[name] = value
        return name

    def _check(self, condition: str, what: str) -> None:
        self.lines.append(f"if {condition}: raise Stale({what!r})")

    def _edge(self, path: str, node, active) -> None:
        """Compare what ``path`` leads to with a node of the recorded graph; the first time, give it a name."""
        if node is None:
            self._check(f"{path} is not None", "a path")
            return
        known = self._names.get(node)
        if known is not None:
            self._check(f"{path} is not {known}", "a path")
            return
        if node.__class__ is _ACCUMULATE:
            leaf = self._leaves.get(id(node.variable))
            if leaf is not None:
                kind = self._constant(_ACCUMULATE)
                self.lines.append(f"v = {path}")
                self._check(f"v.__class__ is not {kind} or v.variable is not {leaf}", "an input")
                return
        if node not in active:
            # a path of constants may change, but must not lead to an input
            if node.__class__ is _ACCUMULATE:
                kind = self._constant(_ACCUMULATE)
                self.lines.append(f"v = {path}")
                leaves = ", ".join(f"id({leaf})" for leaf in self._leaves.values())
                self._check(
                    f"v.__class__ is not {kind} or id(v.variable) in ({leaves},)", "an input"
                )
            else:
                self._check(
                    f"{path}.__class__ is not {self._constant(node.__class__)}", "a constant"
                )
            return
        if is_python(node):
            raise Unrecordable(
                f"{node.name()} is Python code, which may do something else each time"
            )
        name = self._names[node] = f"n{len(self._names)}"
        self.lines.append(f"{name} = {path}")
        self._check(f"{name}.__class__ is not {self._constant(node.__class__)}", "an op")
        self._open.append((node, name))

    def _node(self, node, name: str, active) -> None:
        edges = node.next_functions
        self.lines.append(f"e = {name}.next_functions")
        self._check(f"len(e) != {len(edges)}", "an op's inputs")
        pairs = []
        for k, (parent, nr) in enumerate(edges):
            if parent in active and parent.__class__ is not _ACCUMULATE:
                self._check(f"e[{k}][1] != {nr}", "an op's inputs")
            pairs.append((f"e[{k}][0]", parent))
        for path, parent in pairs:
            self._edge(path, parent, active)
        for attribute in dir(node):
            if attribute.startswith("_saved_"):
                self._saved(node, name, attribute)

    def _saved(self, node, name: str, attribute: str) -> None:
        value = getattr(node, attribute)
        if isinstance(value, Tensor):
            self._tensor(value, f"{name}.{attribute}")
        elif isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
            many = f"l{len(self.places)}"  # not the name of its first tensor
            self.lines.append(f"{many} = {name}.{attribute}")
            self._check(f"len({many}) != {len(value)}", "a saved list")
            for k, v in enumerate(value):
                if isinstance(v, Tensor):
                    self._tensor(v, f"{many}[{k}]")
                else:
                    self._check(f"{many}[{k}] is not None", "a saved list")
        elif _plain(value):
            # a size or a stride follows from the shapes, which are compared
            if not attribute.endswith(("_sym_sizes", "_sym_strides")):
                self._check(f"{name}.{attribute} != {self._constant(value)}", "an op's option")
        else:
            raise Unrecordable(f"{node.name()} saved {type(value).__name__} {attribute[7:]!r}")

    def _tensor(self, value: Tensor, path: str) -> None:
        strided(value)
        place = f"s{len(self.places)}"
        self.lines.append(f"{place} = {path}")
        self._check(
            f"{place}.shape != {self._constant(value.shape)} or {place}.stride() != {self._constant(value.stride())}",
            "a saved shape",
        )
        self.places.append((value, place))
        if value._base is not None and value._base.layout is torch.strided:
            self.bases.append((value._base, f"{place}._base"))


def key(t: Tensor) -> tuple:
    """What tells the memory of one saved tensor from that of others."""
    return t.data_ptr(), tuple(t.shape), t.stride(), t.dtype, t.device


def unchanged(place: str, t: Tensor) -> str:
    """A line for a tensor of ``bases`` that is read."""
    size = f"({tuple(t.shape)}, {t.stride()}, {t.storage_offset()})"
    now = f"({place}.shape, {place}.stride(), {place}.storage_offset())"
    return f"if {place} is None or {now} != {size}: raise Stale('a saved shape')"


def alike(one: str, other: str) -> str:
    """A line for two saved tensors that were one: which one an op read cannot be told, so they must be one again."""
    return f"if {one}.data_ptr() != {other}.data_ptr(): raise Stale('which tensors are the same')"
