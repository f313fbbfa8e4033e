"""What a function reaches: the tensors of modules, which a compiled call looks up again each time, and what a trace may
leave its own tensors in.

Modules are those that the function is, is bound to, closes over, names among its globals, or is a partial of; also
inside of lists, tuples, sets, dictionaries, and the attributes of functions and objects there; and those that are
called. A `Place` is where a module holds a tensor.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

_FEW = 1000
"""Items of a container that are looked at."""

_NOT_LOOKED_INTO = (
    Tensor, str, bytes, int, float, complex, type(None), type, types.ModuleType,
    types.BuiltinFunctionType,
)  # fmt: skip


class Place(NamedTuple):
    """Where a module holds a tensor, also as a plain attribute: one of its own dictionaries, and the name there."""

    table: dict[str, Tensor | None]
    name: str
    path: str
    """For people: ``0.weight``."""


@contextlib.contextmanager
def called() -> Iterator[dict[nn.Module, None]]:
    """The modules that are called in this context, in this thread; the keys of what fills meanwhile."""
    found: dict[nn.Module, None] = {}
    thread = threading.get_ident()

    def enter(module, args):
        if threading.get_ident() == thread:
            found[module] = None

    hook = register_module_forward_pre_hook(enter)
    try:
        with warnings.catch_warnings():
            # of modules of torch.compile, which are noted twice
            warnings.filterwarnings("ignore", message=".*when there are global hooks on modules")
            yield found
    finally:
        hook.remove()


def modules_of(found: Any) -> list[nn.Module]:
    """The modules that something reaches, with those inside of them."""
    return list(dict.fromkeys(inner for m in _roots(found) for inner in m.modules()))


def _roots(found: Any) -> list[nn.Module]:
    return [m for m in _walk(found) if isinstance(m, nn.Module)]


class Reached:
    """The modules that ``func`` and ``options`` reach, and those that are ``called``, as they were when this was made.

    ``in_weights``: what is computed has an axis for each parameter, also for those that func does not read.
    """

    def __init__(
        self,
        func: Any,
        options: Any = (),
        called: Iterable[nn.Module] = (),
        in_weights: bool = False,
    ):
        self.roots = _roots((func, options))
        found = dict.fromkeys(m for root in self.roots for m in root.modules())
        for root in called:
            if root not in found:
                self.roots.append(root)
                found.update(dict.fromkeys(root.modules()))
        self.modules = list(found)
        self._modes = [(m, m.training) for m in self.modules]
        self._children = [(m._modules, dict(m._modules)) for m in self.modules]
        self._empty = [
            (table, name)
            for m in self.modules
            for table in (m._parameters, m._buffers)
            for name, t in table.items()
            if t is None
        ]
        self.places: dict[int, list[Place]] = {}
        self.tensors: dict[int, Tensor] = {}
        for root in self.roots:
            for prefix, m in root.named_modules():
                for table in (m._parameters, m._buffers, vars(m)):
                    for name, t in table.items():
                        if isinstance(t, Tensor):
                            path = f"{prefix}.{name}" if prefix else name
                            self.tensors[id(t)] = t
                            self.places.setdefault(id(t), []).append(Place(table, name, path))
        self._of = func, options, [*called]
        self._weights = self._present() if in_weights else None
        self._registered = {id(t) for m in self.modules for t in (m._parameters, m._buffers)}

    def contents(self) -> list[tuple[Any, dict]]:
        """What the attributes, closures, globals, lists and dictionaries that func reaches hold."""
        return [(found, _items(found)) for found in _walk(self._of, True) if _holder(found)]

    def taken_out(
        self, contents: list[tuple[Any, dict]], of_trace: Callable[[Any], bool]
    ) -> list[tuple[str, Any, bool]]:
        """Put back what stood where something `of_trace` stands now: the name, what stood there, and whether it is a
        parameter or a buffer.

        So func's Python leaves no tensor of a trace in what was there before it, ``contents``.
        """
        out = []
        for found, before in contents:
            now = _items(found)
            left = [k for k, v in now.items() if v is not before.get(k) and of_trace(v)]
            out += [(str(k), before.get(k), id(found) in self._registered) for k in left]
            if not left:
                continue
            if isinstance(found, (list, deque)):
                found.clear()
                found.extend(before.values())
            elif isinstance(found, set):
                found.clear()
                found.update(before.values())
            elif isinstance(found, dict):
                for k in left:
                    found.pop(k)
                    if k in before:
                        found[k] = before[k]
            elif before:
                found.cell_contents = before["a variable"]
            else:
                del found.cell_contents
        return out

    def changed(self) -> str | None:
        """What of the modules is another now: a mode, or a submodule; None if nothing is."""
        for m, training in self._modes:
            if m.training is not training:
                return "the mode of a module (train or eval)"
        for table, children in self._children:
            if table != children:  # of the same objects it compares their addresses alone
                return "the submodules"
        for table, name in self._empty:
            if table.get(name) is not None:
                return f"the tensor {name}"
        if self._weights is not None and self._weights != self._present():
            return "the parameters"
        return None

    def _present(self) -> list[tuple]:
        """Which there are: names, shapes, which are to be differentiated, and which are one."""
        first: dict[int, int] = {}
        return [
            (name, p.shape, p.requires_grad, first.setdefault(id(p), len(first)))
            for m in self.modules
            for name, p in m._parameters.items()
            if p is not None
        ]

    def called(self, t: Tensor) -> str:
        """What a tensor that a function holds is, for people."""
        places = self.places.get(id(t))
        return places[0].path if places else "a tensor that it holds"


def _walk(found: Any, deep: bool = False, seen: dict | None = None, objects: int = 2) -> Iterator:
    """What something reaches: modules and, if ``deep``, what is inside of them, and all that holds something.

    ``objects``: of other classes that are looked into, one inside of another.
    """
    seen = {} if seen is None else seen
    if id(found) in seen or isinstance(found, _NOT_LOOKED_INTO):
        return
    seen[id(found)] = found
    yield found
    if isinstance(found, nn.Module):
        inside = [vars(found)] if deep else []
    else:
        inside = _inside(found)
    if inside is None:
        if not objects:
            return
        objects -= 1
        inside = [vars(found)] if hasattr(found, "__dict__") else []
        if callable(found):
            inside.append(type(found).__call__)
    if deep and isinstance(found, types.FunctionType) and inside:
        yield found.__globals__
    for inner in inside:
        yield from _walk(inner, deep, seen, objects)


def _holder(found: Any) -> bool:
    holders = (dict, list, deque, set, types.CellType)
    return isinstance(found, holders) and len(_items(found)) <= _FEW


def _items(found: dict | list | deque | set | types.CellType) -> dict:
    """What something holds, by key."""
    if isinstance(found, dict):
        return dict(found)
    if isinstance(found, (list, deque)):
        return dict(enumerate(found))
    if isinstance(found, set):
        return {id(v): v for v in found}
    return {} if found == types.CellType() else {"a variable": found.cell_contents}


def _inside(found: Any) -> list[Any] | None:
    if isinstance(found, functools.partial):
        return [found.func, *found.args, *found.keywords.values()]
    if isinstance(found, types.MethodType):
        return [found.__self__, found.__func__]
    if isinstance(found, types.FunctionType):
        library = (found.__module__ or "").split(".")[0] in ("torch", "jactri")
        return [] if library else _of_function(found)
    if isinstance(found, types.CellType):
        return list(_items(found).values())
    if isinstance(found, dict):
        return list(found.values()) if len(found) <= _FEW else []
    if isinstance(found, (list, tuple, deque, set)):
        return list(found) if len(found) <= _FEW else []
    return None


def _of_function(func: types.FunctionType) -> list[Any]:
    given = [*(func.__defaults__ or ()), *(func.__kwdefaults__ or {}).values()]
    names: set[str] = set()
    codes = [func.__code__]
    while codes:  # those of functions inside it, too
        code = codes.pop()
        names.update(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    named = [func.__globals__[n] for n in names if n in func.__globals__]
    return [*(func.__closure__ or ()), *given, *named, vars(func)]
