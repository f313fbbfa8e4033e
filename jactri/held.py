"""What a callable holds, and whether it still does: what a replay of its ops, without its Python, rests on."""

from __future__ import annotations

import dis
import functools
import sys
import sysconfig
from collections.abc import Callable
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules import module as nn_module

from .tape import Unrecordable

_DEPTH = 40
"""How many containers in containers are searched."""

_MOST = 20_000
"""Things that are looked at before every call, at most."""

_MANY = 1000
"""Items from which on a container is looked at as a whole: whether it is the same one, of the same length."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), range, torch.dtype, torch.device)

_STDLIB = sysconfig.get_paths()["stdlib"]

_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))
"""Attributes that are not a user's."""

_OF_THE_BASE = {f.__code__ for f in vars(torch.nn.Module).values() if isinstance(f, FunctionType)}
"""Code that runs for every module, and looks at no attributes of its own."""

_TABLES = (
    "_parameters", "_buffers", "_modules", "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks",
    "_backward_hooks",
)  # fmt: skip

_LOOK_UP = {"getattr", "attrgetter", "asdict", "astuple", "vars", "__dict__"}
"""What code names that may look up attributes which it does not name."""

_BY_TEXT = {"getattr", "hasattr", "attrgetter"}
"""What code names that looks up attributes by a text, which need not be there."""

_OF_A_FUNCTION = ("__code__", "__defaults__", "__kwdefaults__")

_MISSING = object()


class Held:
    """What the code of a callable reaches. `changed` tells what was replaced since.

    Made by one call, in which the Python functions that run are noted. Watched are the globals that they name;
    attributes that they name, of modules, objects and classes that are held; closures, defaults, and arguments of
    partials; parameters, buffers, submodules, modes and hooks of modules; the items of lists, tuples and dictionaries
    among all these: whether each is the same object, or an equal number. What no code names, like a log of losses, may
    change.
    """

    def __init__(self, func: Callable, call: Callable[[], object]):
        self._places: list[tuple[object, object, object]] = []  # where, name, what is there
        self._sizes: list[tuple[object, int]] = []
        self._seen: dict[int, object] = {}
        codes = _executed(call)
        own = [(code, space) for code, space in codes if not _of_a_library(space)]
        self._names = {name for code, _ in own for name in _uses(code)[1]}
        self._texts = {name for code, _ in own for name in _uses(code)[2]}
        # what torch's own layers and objects read of themselves
        inner = [code for code, _ in codes if code not in _OF_THE_BASE]
        self._inner_names = {name for code in inner for name in _uses(code)[1]}
        self._every_name = any(not _LOOK_UP.isdisjoint(code.co_names) for code, _ in own)
        try:
            self._search(func, _DEPTH)
            for hooks in (nn_module._global_forward_pre_hooks, nn_module._global_forward_hooks):
                self._items(hooks, _DEPTH)
            for code, space in own:
                for name in _uses(code)[0]:
                    self._place(space, name, _DEPTH)
                for name in _uses(code)[3]:
                    self._search(sys.modules.get(name), _DEPTH)
        except (
            AttributeError,
            LookupError,
            ReferenceError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            # a caller's objects may raise anything when they are looked at
            raise Unrecordable(f"what func holds cannot be watched ({error!r})") from error
        del self._seen

    def settle(self) -> None:
        """After another call: take what is there as what was there. Raises Unrecordable if the call changed it."""
        self.tensors, self._looks = [], []
        # but for what the callable computes and keeps, as an old weight norm does
        self._places = [
            (where, name, value)
            for where, name, value in self._places
            if not (isinstance(value, Tensor) and value.grad_fn is not None)
            or where.get(name, _MISSING) is value
        ]
        if (change := self.changed()) is not None:
            raise Unrecordable(f"func itself changes {change}")
        self.tensors = [value for _, _, value in self._places if _readable(value)]
        self._looks = [_look(t) for t in self.tensors]

    def changed(self) -> str | None:
        """What is no longer as it was, or None."""
        for where, name, value in self._places:
            now = where.get(name, _MISSING)
            if now is not value and not _same(now, value):
                return f"{name!r}"
        for where, size in self._sizes:
            if len(where) != size:
                return f"the length of a {type(where).__name__}"
        for tensor, look in zip(self.tensors, self._looks, strict=True):
            if _look(tensor) != look:
                return f"the memory of a tensor {tuple(tensor.shape)}, or whether it requires grad"
        return None

    def _place(self, where, name, depth: int) -> None:
        value = where.get(name, _MISSING)
        if value is not _MISSING:
            self._note(where, name, value)
            self._search(value, depth - 1)

    def _note(self, where, name, value) -> None:
        self._places.append((where, name, value))
        if len(self._places) > _MOST:
            raise Unrecordable(f"func holds more than {_MOST} things")

    def _search(self, thing, depth: int) -> None:
        if isinstance(thing, (Tensor, np.ndarray, np.generic, *_PLAIN)):
            return
        if id(thing) in self._seen or not depth:
            return
        self._seen[id(thing)] = thing  # kept, so that no id is used again
        if isinstance(thing, torch.nn.Module):
            for module in thing.modules():
                if module is thing or id(module) not in self._seen:
                    self._module(module, depth)
        elif isinstance(thing, functools.partial):
            for inner in (thing.func, thing.args, thing.keywords):
                self._search(inner, depth)
        elif isinstance(thing, (list, tuple, dict)):
            self._items(thing, depth)
            if type(thing) not in (list, tuple, dict):
                self._object(thing, depth)
        elif isinstance(thing, FunctionType):
            for cell in thing.__closure__ or ():
                self._place(_Cell(cell), "contents", depth)
            for name in _OF_A_FUNCTION:
                self._place(_Own(thing), name, depth)
            self._attributes(vars(thing), depth, self._names)
        elif isinstance(thing, MethodType):
            self._search(thing.__self__, depth)
            self._search(thing.__func__, depth)
        elif isinstance(thing, ModuleType):
            if not _of_a_library(vars(thing)):
                for name in self._names & vars(thing).keys():
                    self._place(vars(thing), name, depth)
        elif isinstance(thing, type):
            self._class(thing, depth, self._names, vars(thing))
        else:
            self._object(thing, depth)

    def _items(self, thing, depth: int) -> None:
        self._sizes.append((thing, len(thing)))
        if len(thing) <= _MANY:
            where = _Dictionary(thing) if isinstance(thing, dict) else _Items(thing)
            for name in where:
                self._place(where, name, depth)

    def _attributes(self, where, depth: int, names: set[str], without=frozenset()) -> None:
        for name in list(where):
            if name not in without and (self._every_name or name in names):
                self._place(where, name, depth)

    def _module(self, module: torch.nn.Module, depth: int) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            raise Unrecordable("what a scripted module holds cannot be watched")
        self._seen[id(module)] = module
        for table in _TABLES:
            self._items(vars(module)[table], depth)
        self._place(vars(module), "training", depth)
        self._note(vars(module), "forward", vars(module).get("forward", _MISSING))
        self._object(module, depth, _OF_EVERY_MODULE)

    def _object(self, thing, depth: int, without=frozenset()) -> None:
        """Attributes of an instance, and those of its classes, which one of the instance's own would hide."""
        own = getattr(thing, "__dict__", None)
        classes = [c for c in type(thing).__mro__ if c not in (torch.nn.Module, object)]
        names = self._names
        if any(map(_of_a_library, map(vars, classes))):
            names = self._inner_names
        if own is not None:
            self._attributes(own, depth, names, without)
            for name in self._texts - own.keys():
                self._note(own, name, _MISSING)
        for cls in classes:
            for name, value in vars(cls).items():
                if isinstance(value, MemberDescriptorType) and (self._every_name or name in names):
                    self._place(_Slot(value, thing), name, depth)
        self._class(type(thing), depth, names, own)

    def _class(self, cls: type, depth: int, names: set[str], hiding) -> None:
        """What a class and its bases hold: its functions, which syntax may call, and what code names.

        ``hiding``: a dictionary that is looked at before theirs.
        """
        for base in cls.__mro__:
            if _of_a_library({"__module__": base.__module__}):
                continue
            for name, value in vars(base).items():
                if isinstance(value, FunctionType) or name in names:
                    self._place(vars(base), name, depth)
                    if hiding is not None and name not in hiding:
                        self._note(hiding, name, _MISSING)


def _executed(call: Callable[[], object]) -> list[tuple[CodeType, dict]]:
    """The code that runs in a call, jactri's left out, and its globals."""
    found: dict[tuple[CodeType, int], dict] = {}

    def note(frame, event, _):
        if event == "call" and not _ours(frame.f_globals):
            found[frame.f_code, id(frame.f_globals)] = frame.f_globals

    # not sys.setprofile: some profilers cannot be put back
    before = sys.gettrace()
    sys.settrace(note)
    try:
        call()
    finally:
        sys.settrace(before)
    return [(code, space) for (code, _), space in found.items()]


def _package(space) -> str:
    names = space.get("__module__"), space.get("__name__")
    return next((name for name in names if isinstance(name, str)), "")


def _ours(space) -> bool:
    name = _package(space)
    return name.startswith("jactri.") and not name.startswith(("jactri.examples.", "jactri.demo."))


def _of_a_library(space) -> bool:
    """Whether what is named there holds nothing of a caller's."""
    return _is_a_library(_package(space).partition(".")[0]) or _ours(space)


@functools.lru_cache(maxsize=1000)
def _is_a_library(package: str) -> bool:
    if package not in sys.stdlib_module_names:
        return package in ("torch", "numpy")
    file = getattr(sys.modules.get(package), "__file__", None)
    return file is None or file.startswith(_STDLIB)


@functools.lru_cache(maxsize=1000)
def _uses(code: CodeType) -> tuple[frozenset[str], ...]:
    """What code names: globals, attributes, texts by which it looks attributes up, and modules that it imports."""
    found: dict[str, set[str]] = {"LOAD_GLOBAL": set(), "LOAD_NAME": set(), "IMPORT_NAME": set()}
    attributes: set[str] = set()
    for i in dis.get_instructions(code):
        if i.opname in found:
            found[i.opname].add(i.argval)
        elif "ATTR" in i.opname or "METHOD" in i.opname or i.opname == "IMPORT_FROM":
            attributes.add(i.argval)
    texts = set()
    if not _BY_TEXT.isdisjoint(code.co_names):
        texts = {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
    for c in code.co_consts:  # of a match statement
        if isinstance(c, tuple):
            attributes |= {name for name in c if isinstance(name, str)}
    named = found["LOAD_GLOBAL"] | found["LOAD_NAME"]
    return tuple(map(frozenset, (named, attributes | texts, texts, found["IMPORT_NAME"])))


def _same(a, b) -> bool:
    """Whether two numbers, or tuples of them, are equal; NaN is itself."""
    if a is b:
        return True
    if a.__class__ is not b.__class__:
        return False
    if a.__class__ is slice:
        a, b = (a.start, a.stop, a.step), (b.start, b.stop, b.step)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if a.__class__ in _PLAIN or isinstance(a, np.generic):
        return bool(a == b or (a != a and b != b))
    return False


def _readable(t) -> bool:
    """Whether something is a tensor that ops of a recording may read."""
    return type(t) in (Tensor, torch.nn.Parameter) and t.layout is torch.strided and not t.is_nested


def _look(t: Tensor) -> tuple:
    return t.data_ptr(), t.requires_grad, t.shape, t.stride()


class _Cell:
    """A closure's cell, looked at as a dictionary."""

    def __init__(self, cell):
        self._cell = cell

    def get(self, name, missing):
        try:
            return self._cell.cell_contents
        except ValueError:  # not filled yet
            return missing


class _Slot:
    """An object's slot, looked at as a dictionary."""

    def __init__(self, descriptor: MemberDescriptorType, thing):
        self._descriptor, self._thing = descriptor, thing

    def get(self, name, missing):
        try:
            return self._descriptor.__get__(self._thing)
        except AttributeError:  # not filled yet
            return missing


class _Own:
    """What belongs to an object itself, looked at as a dictionary."""

    def __init__(self, thing):
        self._thing = thing

    def get(self, name, missing):
        return getattr(self._thing, name, missing)


class _Items:
    """A list or tuple, looked at as a dictionary by position."""

    def __init__(self, items):
        self._items = items

    def __iter__(self):
        return iter(range(len(self._items)))

    def get(self, i, missing):
        return self._items[i] if i < len(self._items) else missing


class _Dictionary:
    """A dictionary, whose class may have a `get` of its own."""

    def __init__(self, items: dict):
        self._items = items

    def __iter__(self):
        return iter(list(dict.keys(self._items)))

    def get(self, name, missing):
        return dict.get(self._items, name, missing)
