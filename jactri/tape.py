"""A computation on tensors, recorded once as the ATen ops that ran, and replayed as straight-line code.

A `TorchDispatchMode` sees every op of the accumulation, whatever Python it came from. The replay is a generated
function with a line an op: no layouts, maps or plans are looked at again. What Python read off a tensor (`.item()`, a
truth value) is a guard: replayed, and compared with what it was. Ops whose result has another shape for other values,
and random ones, cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from .memory import si

MOST_OPS = 4000
"""Ops from which on Python's overhead is a small part, and the code a long one."""


class Stale(Exception):
    """A recording is not one of this call's computation."""


class Unrecordable(Exception):
    """Why a computation cannot be replayed."""


def number(t: Tensor):
    """The value of a 0-d tensor on the CPU, as `.item()` reads it; a recording takes note.

    Autograd's wrapped numbers cannot be read through a dispatch mode: it is handed the number itself.
    """
    if not _len_torch_dispatch_stack():
        return t.item()
    modes = _get_current_dispatch_mode_stack()
    with _disable_current_modes():
        value = t.item()
    for mode in modes:
        if isinstance(mode, Recorder):
            mode.lines.append((torch.ops.aten._local_scalar_dense.default, (t,), {}, value))
            mode.kept.append(t)
    return value


class Recorder(TorchDispatchMode):
    """Writes down the ops that run under it. ``lines`` are (op, args, kwargs, results).

    It holds all results. Raises Unrecordable where those are more than ``limit`` bytes.
    """

    def __init__(self, limit: float):
        super().__init__()
        self.limit, self._storages, self._bytes = limit, set(), 0
        self.lines: list[tuple] = []
        self.kept: list[object] = []  # so that no tensor's id is used again
        self.numbers: set[int] = set()  # tensors that torch.tensor made of Python's numbers
        self.reason: str | None = None

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with (
            torch._C.DisableTorchFunctionSubclass()
        ):  # a node's saved values are of the caller's class
            out = op(*args, **kwargs)
        tags = op.tags
        if torch.Tag.dynamic_output_shape in tags and not _indexed_by_numbers(op, args):
            self.reason = self.reason or f"{op} cannot be replayed: {_BY_VALUES}"
        if torch.Tag.nondeterministic_seeded in tags and not _undropped(op, args, kwargs):
            self.reason = self.reason or f"{op} cannot be replayed: it is random"
        if op is torch.ops.aten.lift_fresh.default:
            self.numbers.add(id(args[0]))
        self.lines.append((op, args, kwargs, out))
        self.kept.append((args, kwargs, out))
        for t in tensors(out):
            strided(t)
            storage = t.untyped_storage()
            if storage._cdata not in self._storages:
                self._storages.add(storage._cdata)
                self._bytes += storage.nbytes()
        if self._bytes > self.limit:
            raise Unrecordable(
                f"a recording holds all that is computed, more than {si(self.limit)}B; raise memory_limit"
            )
        return out


_BY_VALUES = "its result's shape depends on values"


def _indexed_by_numbers(op, args) -> bool:
    """Whether an op is an indexing by whole numbers, whose shapes tell that of the result; masks do not."""
    if op is not torch.ops.aten.index.Tensor:
        return False
    return all(i is None or i.dtype in (torch.int32, torch.int64) for i in args[1])


def _undropped(op, args, kwargs) -> bool:
    """Whether an attention with dropout drops nothing."""
    names = [a.name for a in op._schema.arguments]
    if "dropout_p" not in names:
        return False
    i = names.index("dropout_p")
    return kwargs.get("dropout_p", args[i] if i < len(args) else 0.0) == 0


def strided(t: Tensor) -> None:
    """Raise Unrecordable for a tensor without memory of its own to follow."""
    if t.layout is not torch.strided:
        raise Unrecordable(f"a tensor {tuple(t.shape)} has the layout {t.layout}")


def tensors(tree) -> list[Tensor]:
    """The tensors in nested arguments or results."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [t for item in tree for t in tensors(item)]
    if isinstance(tree, dict):
        return [t for item in tree.values() for t in tensors(item)]
    return []


def _written(op, args, kwargs) -> list[Tensor]:
    """The arguments that an op writes to."""
    found = []
    for i, a in enumerate(op._schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            found += tensors(kwargs.get(a.name, args[i] if i < len(args) else None))
    return found


_ATEN = torch.ops.aten
_VIEWS = frozenset(
    {
        _ATEN.alias.default, _ATEN.as_strided.default, _ATEN.detach.default, _ATEN.diagonal.default,
        _ATEN.expand.default, _ATEN.permute.default, _ATEN.select.int, _ATEN.slice.Tensor,
        _ATEN.squeeze.default, _ATEN.squeeze.dim, _ATEN.squeeze.dims, _ATEN.t.default,
        _ATEN.transpose.int, _ATEN.unsqueeze.default, _ATEN.view.default,
    }
)  # fmt: skip
"""Ops that give another look at their argument's memory, and read no values."""


def straight(lines: list[tuple], results: list[Tensor]) -> list[tuple]:
    """Lines that do the same with fewer views: one for a chain of them, none for a look that there is already.

    What is returned stays a tensor of its own.
    """
    if any(torch.Tag.inplace_view in op.tags for op, *_ in lines):
        return lines  # what a tensor looks like is not known from how it looks at the end
    own = {id(t) for t in results}
    roots: dict[int, Tensor] = {}
    looks: dict[tuple, Tensor] = {}
    instead: dict[int, Tensor] = {}

    def swapped(tree):
        if isinstance(tree, Tensor):
            return instead.get(id(tree), tree)
        if isinstance(tree, (list, tuple)):
            return type(tree)([swapped(item) for item in tree])
        return tree

    made = []
    for op, args, kwargs, out in lines:
        args, kwargs = swapped(args), {k: swapped(v) for k, v in kwargs.items()}
        if op in _VIEWS and not (out.is_conj() or out.is_neg()):
            source = args[0]
            root = roots.get(id(source), source)
            look = id(root), tuple(out.shape), out.stride(), out.storage_offset()
            same = id(root), tuple(root.shape), root.stride(), root.storage_offset()
            if id(out) not in own:
                if look == same or look in looks:
                    instead[id(out)] = root if look == same else looks[look]
                    continue
                looks[look] = out
            roots[id(out)] = root
            if root is not source and out.storage_offset() == root.storage_offset():
                op, args, kwargs = _ATEN.as_strided.default, (root, *look[1:3]), {}
        made.append((op, args, kwargs, out))
    return made


class Tape:
    """Recorded lines as source code: a function of the tensors that came from outside.

    ``given`` are those of them that may be written to, named ``o0``, ``o1``, ...; ``inputs`` are ``i0``, ``i1``, ...
    """

    def __init__(
        self,
        recorder: Recorder,
        results: list[Tensor],
        given: list[Tensor],
        inputs: Sequence[Tensor] = (),
    ):
        if recorder.reason:
            raise Unrecordable(recorder.reason)
        if len(recorder.lines) > MOST_OPS:
            raise Unrecordable(f"{len(recorder.lines)} ops are more than {MOST_OPS}")
        self.names: dict[int, str] = {id(t): f"o{i}" for i, t in enumerate(given)}
        self.names |= {id(t): f"i{i}" for i, t in enumerate(inputs)}
        self.outside: list[Tensor] = []
        self.constants: dict[str, object] = {"Stale": Stale}
        lines = self._needed(straight(recorder.lines, results), results)
        last = self._last_uses(lines, results)
        self.code: list[str] = []
        self.ops = len(lines)
        for i, (op, args, kwargs, out) in enumerate(lines):
            self._line(op, args, kwargs, out)
            gone = sorted({self.names[k] for k in last.get(i, ()) if self.names[k][0] == "t"})
            if gone:
                self.code.append("del " + ", ".join(gone))
        self.results = [self._name(t) for t in results]
        for t in self.outside:
            strided(t)
        ours = {t.untyped_storage().data_ptr() for t in (*self.outside, *inputs)}
        for op, args, kwargs, _ in lines:
            for t in _written(op, args, kwargs):
                if t.numel() and t.untyped_storage().data_ptr() in ours:
                    raise Unrecordable(f"{op} writes to a tensor that is not of the call's own")

    @staticmethod
    def _needed(lines, results) -> list[tuple]:
        """Without the ops that nothing needs; what writes in place, or was read by Python, stays."""
        wanted = {id(t) for t in results}
        kept = []
        for line in reversed(lines):
            op, args, kwargs, out = line
            made = tensors(out)
            if op._schema.is_mutable or not made or any(id(t) in wanted for t in made):
                wanted.update(id(t) for t in tensors(args) + tensors(kwargs))
                kept.append(line)
        return kept[::-1]

    @staticmethod
    def _last_uses(lines, results) -> dict[int, list[int]]:
        """By line, the tensors that are not needed after it."""
        seen = {id(t) for t in results}
        out: dict[int, list[int]] = {}
        made = {id(t) for line in lines for t in tensors(line[3])}
        for i in range(len(lines) - 1, -1, -1):
            for t in tensors(list(lines[i][1:])):
                if id(t) not in seen:
                    seen.add(id(t))
                    if id(t) in made:
                        out.setdefault(i, []).append(id(t))
        return out

    def _name(self, t: Tensor) -> str:
        name = self.names.get(id(t))
        if name is None:
            name = self.names[id(t)] = f"x{len(self.outside)}"
            self.outside.append(t)
        return name

    def _constant(self, value) -> str:
        if value is None or value.__class__ in (bool, int):
            return repr(value)
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def _text(self, tree) -> str:
        """An argument as source."""
        if isinstance(tree, Tensor):
            return self._name(tree)
        if isinstance(tree, (list, tuple)) and tensors(tree):
            return "[" + ", ".join(self._text(item) for item in tree) + "]"
        return self._constant(tree)

    def _line(self, op, args, kwargs, out) -> None:
        # op._op is the op without a Python frame around it
        call = f"{self._constant(op._op)}({', '.join(self._text(a) for a in args)}"
        call += "".join(f", {k}={self._text(v)}" for k, v in kwargs.items()) + ")"
        if isinstance(out, Tensor):
            if id(out) in self.names:  # in place: the same tensor comes back
                self.code.append(call)
                return
            self.names[id(out)] = name = f"t{len(self.names)}"
            self.code.append(f"{name} = {call}")
        elif made := tensors(out):
            names = []
            for t in out if isinstance(out, (list, tuple)) else made:
                if not isinstance(t, Tensor):
                    names.append("_")
                    continue
                self.names[id(t)] = f"t{len(self.names)}"
                names.append(self.names[id(t)])
            self.code.append(f"{', '.join(names)}, = {call}")
        elif out is None:
            self.code.append(call)
        elif isinstance(out, torch.ScriptObject):  # a profiler's range
            raise Unrecordable(f"{op} gives an object, which cannot be compared")
        else:
            read, was = f"v{len(self.code)}", self._constant(out)
            self.code.append(f"{read} = {call}")
            nan = f" and not ({was} != {was} and {read} != {read})" if out != out else ""
            self.code.append(f"if {read} != {was}{nan}: raise Stale('a value that was read')")


def function(name: str, parameters: list[str], lines: list[str], constants: dict) -> Callable:
    """A function of generated source; its constants are globals."""
    body = "\n".join("    " + line for line in lines) or "    pass"
    source = f"def {name}({', '.join(parameters)}):\n{body}\n"
    space = dict(constants)
    exec(compile(source, f"<jactri {name}>", "exec"), space)
    return space[name]
