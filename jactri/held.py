"""What a callable holds, and whether it still does: what a replay of its ops, without its Python, rests on."""

from __future__ import annotations

import functools
from types import CodeType, ModuleType

import numpy as np
import torch
from torch import Tensor

_DEPTH = 4
"""How many callables in callables are searched."""

_NUMBERS = (bool, int, float, complex, str, type(None))

_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))
"""Attributes that are not a user's."""

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

_LIBRARIES = ("torch", "jactri", "numpy")
"""Packages whose globals hold nothing of a caller's."""


class Held:
    """The tensors, arrays, modules and Python numbers that a callable holds. ``changed`` tells what was replaced since.

    Searched are modules (parameters, buffers, submodules, attributes), closures, defaults, globals by name, objects,
    partials, lists, tuples and dictionaries in all of them. Numbers that are attributes count if the code that runs
    names them: others, like a counter of steps, may change.
    """

    def __init__(self, func):
        self.tensors: list[Tensor] = []
        self._places: list[tuple[object, object, object]] = []  # where, name, what is there
        self._attributes: list[tuple[object, object, object]] = []
        self._sizes: list[tuple[dict, int]] = []
        self._names: set[str] = set()
        self._seen: set[int] = set()
        self._search(func, _DEPTH)
        self._places += [place for place in self._attributes if place[1] in self._names]
        self._looks = [_look(t) for t in self.tensors]
        del self._attributes, self._seen

    def changed(self) -> str | None:
        """What is no longer as it was, or None."""
        for where, name, value in self._places:
            now = where.get(name)
            if now is not value and not _same(now, value):
                return f"{name!r}"
        for where, size in self._sizes:
            if len(where) != size:
                return f"the length of a {type(where).__name__}"
        for tensor, look in zip(self.tensors, self._looks, strict=True):
            if _look(tensor) != look:
                return f"the memory of a tensor {tuple(tensor.shape)}, or whether it requires grad"
        return None

    def _search(self, thing, depth: int) -> None:
        if depth == 0 or id(thing) in self._seen or isinstance(thing, (Tensor, type, ModuleType)):
            return
        self._seen.add(id(thing))
        if isinstance(thing, torch.nn.Module):
            for module in thing.modules():
                self._module(module, depth)
        elif isinstance(thing, functools.partial):
            self._search(thing.func, depth - 1)
            self._all(_Items(thing.args), depth)
            self._all(thing.keywords, depth)
        elif isinstance(thing, (list, tuple)):
            self._sizes.append((thing, len(thing)))
            self._all(_Items(thing), depth)
        elif isinstance(thing, dict):
            self._sizes.append((thing, len(thing)))
            self._all(thing, depth)
        elif hasattr(thing, "__self__") and hasattr(thing, "__func__"):
            self._search(thing.__self__, depth)
            self._function(thing.__func__, type(thing.__self__), depth)
        elif hasattr(thing, "__code__"):
            self._function(thing, None, depth)
        elif hasattr(thing, "__dict__") or hasattr(thing, "__slots__"):
            where = _Attributes(thing)
            self._attributes += self._entries(where)
            self._inside(where, depth)
            for cls in type(thing).__mro__:
                self._function(vars(cls).get("__call__"), type(thing), depth)

    def _module(self, module: torch.nn.Module, depth: int) -> None:
        self._seen.add(id(module))
        self._sizes += [(vars(module)[h], len(vars(module)[h])) for h in ("_modules", *_HOOKS)]
        for where in (module._parameters, module._buffers, module._modules):
            self._places += self._entries(where)
        self._places += self._entries(vars(module), ("training",))
        own = [name for name in vars(module) if name not in _OF_EVERY_MODULE]
        numbers = self._entries(vars(module), own)
        if _of_a_library(type(module)):
            self._places += numbers
            return
        self._attributes += numbers
        self._inside({name: vars(module)[name] for name in own}, depth)
        self._function(type(module).forward, type(module), depth)

    def _function(self, f, owner: type | None, depth: int) -> None:
        """What the code of a function names; ``owner``: the class whose method it is."""
        f = getattr(f, "fget", f)  # of a property
        if not hasattr(f, "__code__") or (id(f), owner) in self._seen:
            return
        self._seen.add((id(f), owner))
        for cell in f.__closure__ or ():
            self._all(_Cell(cell), depth)
        self._all(_Items(f.__defaults__ or ()), depth)
        self._all(f.__kwdefaults__ or {}, depth)
        if _of_a_library(f):
            return
        names = _names(f.__code__)
        self._names |= names
        self._places += self._entries(f.__globals__, names)
        for name in names:
            value = f.__globals__.get(name)
            if isinstance(value, ModuleType):
                self._places += self._entries(vars(value), names)
            self._search(value, depth - 1)
            for cls in () if owner is None else owner.__mro__:
                self._places += self._entries(vars(cls), (name,))
                self._function(vars(cls).get(name), owner, depth)

    def _all(self, where, depth: int) -> None:
        """What lies in a container, all of which counts."""
        self._places += self._entries(where)
        self._inside(where, depth)

    def _inside(self, where, depth: int) -> None:
        for name in list(where):
            self._search(where.get(name), depth - 1)

    def _entries(self, where, names=None) -> list[tuple]:
        found = []
        for name in list(where) if names is None else names:
            if name not in where:
                continue
            value = where.get(name)
            if isinstance(value, Tensor):
                if value.grad_fn is not None:
                    continue  # computed from others, as by a weight norm
                self.tensors.append(value)
            elif not (
                isinstance(value, (torch.nn.Module, np.ndarray)) or value.__class__ in _NUMBERS
            ):
                continue
            found.append((where, name, value))
        return found


def _same(a, b) -> bool:
    """Whether two Python numbers are one; NaN is itself."""
    return a.__class__ is b.__class__ and a.__class__ in _NUMBERS and (a == b or a != a)


def _look(t: Tensor) -> tuple:
    return t.data_ptr(), t.requires_grad, t.shape, t.stride()


def _of_a_library(thing) -> bool:
    return (getattr(thing, "__module__", None) or "").partition(".")[0] in _LIBRARIES


def _names(code: CodeType) -> set[str]:
    """Names and texts that code uses, functions inside of it included."""
    found = {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            found |= _names(inner)
    return found


class _Cell:
    """A closure's cell, looked at as a dictionary of one entry."""

    def __init__(self, cell):
        self._cell = cell

    def __iter__(self):
        return iter(("contents",))

    def get(self, name):
        try:
            return self._cell.cell_contents
        except ValueError:  # not filled yet
            return None


class _Items:
    """A list or tuple, looked at as a dictionary by position."""

    def __init__(self, items):
        self._items = items

    def __iter__(self):
        return iter(range(len(self._items)))

    def get(self, i):
        return self._items[i] if i < len(self._items) else None


class _Attributes:
    """An object, looked at as a dictionary of its attributes, in slots or not."""

    def __init__(self, thing):
        self._thing = thing

    def __iter__(self):
        yield from getattr(self._thing, "__dict__", ())
        for cls in type(self._thing).__mro__:
            slots = vars(cls).get("__slots__", ())
            yield from (slots,) if isinstance(slots, str) else slots

    def get(self, name):
        return getattr(self._thing, name, None)
