"""What a function reaches through modules: the tensors that a compiled call looks up again each time.

Modules are those that the function is, is bound to, closes over, names among its globals, or is a partial of; also
inside of lists, tuples, dictionaries and objects there. A `Place` is where a module holds a tensor.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

_FEW = 1000
"""Items of a container that are looked at."""

_NOT_LOOKED_INTO = (
    Tensor, str, bytes, int, float, complex, type(None), type, types.ModuleType,
    types.BuiltinFunctionType,
)  # fmt: skip


class Place(NamedTuple):
    """Where a module holds a tensor: one of its own dictionaries, and the name there."""

    table: dict[str, Tensor | None]
    name: str
    path: str
    """For people: ``0.weight``."""


class Reached:
    """The modules that ``func`` and ``options`` reach, as they were when this was made."""

    def __init__(self, func: Any, options: Any = ()):
        self.roots = list(_modules((func, options), set()))
        self.modules = list(dict.fromkeys(m for root in self.roots for m in root.modules()))
        self._modes = [(m, m.training) for m in self.modules]
        self._children = [
            (m._modules, name, child) for m in self.modules for name, child in m._modules.items()
        ]
        self.places: dict[int, list[Place]] = {}
        self.tensors: dict[int, Tensor] = {}
        for root in self.roots:
            for prefix, m in root.named_modules():
                for table in (m._parameters, m._buffers):
                    for name, t in table.items():
                        if t is not None:
                            path = f"{prefix}.{name}" if prefix else name
                            self.tensors[id(t)] = t
                            self.places.setdefault(id(t), []).append(Place(table, name, path))

    def changed(self) -> str | None:
        """What of the modules is another now: a mode, or a submodule; None if nothing is."""
        for m, training in self._modes:
            if m.training is not training:
                return "the mode of a module (train or eval)"
        for table, name, child in self._children:
            if table.get(name) is not child:
                return f"the submodule {name}"
        return None

    def called(self, t: Tensor) -> str:
        """What a tensor that a function holds is, for people."""
        places = self.places.get(id(t))
        return places[0].path if places else "a tensor that it holds"


def _modules(found: Any, seen: set[int], objects: int = 2) -> Iterator[nn.Module]:
    """The modules in something; ``objects``: of other classes that are looked into, one inside of another."""
    if id(found) in seen or isinstance(found, _NOT_LOOKED_INTO):
        return
    seen.add(id(found))
    if isinstance(found, nn.Module):
        yield found
        return
    inside = _inside(found)
    if inside is None:
        if not objects:
            return
        objects -= 1
        inside = list(getattr(found, "__dict__", {}).values())
        if callable(found):
            inside.append(type(found).__call__)
    for inner in inside:
        yield from _modules(inner, seen, objects)


def _inside(found: Any) -> list[Any] | None:
    if isinstance(found, functools.partial):
        return [found.func, *found.args, *found.keywords.values()]
    if isinstance(found, types.MethodType):
        return [found.__self__, found.__func__]
    if isinstance(found, types.FunctionType):
        library = (found.__module__ or "").split(".")[0] in ("torch", "jactri")
        return [] if library else _of_function(found)
    if isinstance(found, dict):
        return list(found.values()) if len(found) <= _FEW else []
    if isinstance(found, (list, tuple)):
        return list(found) if len(found) <= _FEW else []
    return None


def _of_function(func: types.FunctionType) -> list[Any]:
    cells = [c.cell_contents for c in func.__closure__ or () if c != types.CellType()]
    given = [*(func.__defaults__ or ()), *(func.__kwdefaults__ or {}).values()]
    names, codes = set(), [func.__code__]
    while codes:  # those of functions inside it, too
        code = codes.pop()
        names.update(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    named = [func.__globals__[n] for n in names if n in func.__globals__]
    return [*cells, *given, *named, getattr(func, "__wrapped__", None)]
