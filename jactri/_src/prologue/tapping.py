"""Activations of a module by the names of its layers, kept by hooks while it runs as its owner runs it.

What a layer gives is kept as a copy, and another copy goes on: writes in place reach neither, and a layer that hands
its input through is a place of its own in the graph. The first activation without a graph begins one, so that weights
may be frozen and inputs be integers.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from ..base.classes import plain
from ..read.overriding import own
from .running import staying_eager

Step = int | str
Change = Callable[[str, Tensor], Tensor]
"""What is kept, of a name and an activation: a new tensor, of its shape and numbers."""


class Spec(NamedTuple):
    """A name, read: ``pattern[:input|:output][[key]][#run]``."""

    pattern: str
    port: str = "output"
    key: Step | None = None
    run: int | None = None

    def named(self, path: str, run: int | None = None) -> str:
        """The name of one module's activation."""
        key = "" if self.key is None else f"[{self.key}]"
        port = f":{self.port}" if key or self.port != "output" else ""
        return f"{path}{port}{key}" + ("" if run is None else f"#{run}")


_NAME = re.compile(
    r"(?P<pattern>[^:#\[\]]*)(:(?P<port>input|output))?(\[(?P<key>\w+)\])?(#(?P<run>\d+))?"
)


def spec_of(name: Any) -> Spec:
    """A name as its parts. Raises TypeError or ValueError for what is none."""
    if not isinstance(name, str):
        raise TypeError(f"a layer's name must be a str, got {name!r}")
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(
            f"{name!r} is no layer's name: write 'path.to.module', with ':input' or ':output' after it, '[0]' or "
            "'[key]' for one of several tensors, '#1' for the second of several runs"
        )
    key, run = found["key"], found["run"]
    return Spec(
        found["pattern"],
        found["port"] or "output",
        int(key) if key and key.isdigit() else key,
        None if run is None else int(run),
    )


def specs_of(names: Any, argument: str) -> list[Spec]:
    """Names, given as one or as a sequence."""
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Sequence):
        raise TypeError(f"{argument} must be a name or a list of names, got {type(names)}")
    if not names:
        raise IndexError(f"{argument} is empty: pass at least one name")
    return [spec_of(name) for name in names]


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that a pattern matches: ``*`` is for one part of a path, or of a part, ``**`` for any number."""
    if "*" not in pattern and "?" not in pattern:
        return [p for p in paths if p == pattern]
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    known = {"**": ".*", "*": r"[^.]*", "?": "[^.]"}
    expression = re.compile("".join(known.get(p) or re.escape(p) for p in parts))
    return [p for p in paths if p and expression.fullmatch(p)]


def near(name: str, known: Iterable[str]) -> str:
    """The end of a message: names like one that is not there."""
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, known, 4, 0.5)
    end = name.rsplit(".", 1)[-1]
    close += [k for k in known if k.rsplit(".", 1)[-1] == end and k not in close][: 4 - len(close)]
    some = close or known[:8]
    told = "did you mean" if close else "there are"
    return f"; {told} {', '.join(map(repr, some))}" + ("" if close or len(known) <= 8 else ", ...")


class Tap(NamedTuple):
    """What was kept: by which name, in which of its runs, and how many were kept before it."""

    tensor: Tensor
    name: str
    run: int
    order: int


class Tapping:
    """A context in which activations of a module's layers are kept: ``made``, by name, one each run, in order.

    Of this thread alone: hooks belong to the model, which others may run meanwhile.

    ``modules``: for each spec, the modules that it matches, by path. ``calls``: what the model itself was called with.
    """

    def __init__(self, model: Module, specs: Sequence[Spec], change: Change):
        if not isinstance(model, Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {type(model)}; the layers of a function have no names"
            )
        self.specs, self.made = specs, dict[str, list[Tap]]()
        self._change, self._count = change, 0
        self._by_name: set[str] = set()  # and not by a pattern
        self._model, self.calls = model, list[tuple[tuple[Any, ...], dict[str, Any]]]()
        self._stack: ExitStack | None = None
        paths: dict[str, Module] = dict(model.named_modules(remove_duplicate=False))
        self.modules: list[dict[str, Module]] = []
        for spec in specs:
            found = matching(spec.pattern, paths)
            if not found:
                raise ValueError(
                    f"{spec.pattern!r} matches no module of {type(model).__name__}"
                    + near(spec.pattern, [p for p in paths if p])
                )
            self.modules.append({p: paths[p] for p in found})

    def __enter__(self) -> Tapping:
        self._thread = threading.get_ident()
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(staying_eager())
            called = self._model.register_forward_pre_hook(self._called_with, with_kwargs=True)
            stack.callback(called.remove)
            asked: dict[str, tuple[Module, Spec]] = {}
            for spec, modules in zip(self.specs, self.modules, strict=True):
                for path, module in modules.items():
                    asked[spec.named(path)] = module, spec
                    if path == spec.pattern:
                        self._by_name.add(spec.named(path))
            for name, (module, spec) in asked.items():
                if spec.port == "input":
                    handle = module.register_forward_pre_hook(
                        self._before(name, spec), with_kwargs=True
                    )
                else:
                    handle = module.register_forward_hook(self._after(name, spec))
                stack.callback(handle.remove)
            self._live = {id(b) for b in self._model.buffers() if _live(b)}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, trace) -> None:
        stack, self._stack = self._stack, None
        stack.__exit__(kind, error, trace)
        cached = [n for n, b in self._model.named_buffers() if _live(b) and id(b) not in self._live]
        for name in cached:
            _without_graph(self._model, name)
        if kind is not None:
            return
        if cached:
            raise RuntimeError(
                f"the model writes activations to its buffer {cached[0]!r}, as an in-place cache: their graph would "
                "outlive the call, and the next run change what it saved. Call the model without its cache "
                "(use_cache=False)"
            )
        self._check_ran()

    @property
    def inside(self) -> bool:
        """Whether the context is entered now."""
        return self._stack is not None

    def _called_with(self, module: Module, args: tuple, kwargs: dict) -> None:
        if self._thread == threading.get_ident():
            self.calls.append((args, kwargs))

    def _before(self, name: str, spec: Spec):
        def hook(module: Module, args: tuple, kwargs: dict):
            given: Any = (args, kwargs)
            path: tuple[Step, ...] = ()
            if spec.key is not None:
                path = (0, spec.key) if isinstance(spec.key, int) else (1, spec.key)
            return self._kept(name, given, path, "the input")

        return hook

    def _after(self, name: str, spec: Spec):
        def hook(module: Module, args: tuple, output: Any):
            path = () if spec.key is None else (spec.key,)
            return self._kept(name, output, path, f"a {type(output).__name__}")

        return hook

    def _kept(self, name: str, value: Any, path: tuple[Step, ...], what: str) -> Any:
        """Keep the first floating tensor of a value, at a path or below: the value with what goes on in its place.

        Where there is none, or nothing is recorded, a name is an error, and a pattern is not for this one.
        """
        if self._thread != threading.get_ident():
            return None
        found = _found(value, path)
        if name not in self._by_name and (found is None or not torch.is_grad_enabled()):
            return None
        if found is None:
            where = f" at [{path[-1]!r}]" if path else ""
            raise RuntimeError(
                f"{name!r}: {what} has no floating-point tensor{where}; name another layer, or one of several tensors "
                "by '[0]' or '[key]'"
            )
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"{name!r} runs under no_grad, where nothing is recorded: run the model in grad mode (its forward, not "
                "generate), its checkpoints with use_reentrant=False"
            )
        place, y = found
        tensor = self._change(name, plain(y))
        onward = tensor.clone()
        own(onward, tensor)
        runs = self.made.setdefault(name, [])
        runs.append(Tap(tensor, name, len(runs), self._count))
        self._count += 1
        return _replaced(value, place, onward) if path else _exchanged(value, y, onward)

    def _check_ran(self) -> None:
        for spec, modules in zip(self.specs, self.modules, strict=True):
            ran = [name for path in modules if (name := spec.named(path)) in self.made]
            if not ran:
                what = spec.named(spec.pattern)
                if self.made:
                    rest = f", and {', '.join(map(repr, list(self.made)[:8]))} did"
                else:
                    rest = ": call the model within the context; what calls a layer's forward itself runs no hook"
                raise RuntimeError(
                    f"{what!r} did not run in this call of {type(self._model).__name__}{rest}"
                )
            if spec.run is not None and all(len(self.made[name]) <= spec.run for name in ran):
                most = max(len(self.made[name]) for name in ran)
                raise RuntimeError(
                    f"{spec.named(spec.pattern, spec.run)!r}: it ran {most} times, and '#0' is the first"
                )

    def found(self, numbers: Iterable[int] | None = None) -> dict[str, Tap]:
        """What the specs, or those of some numbers, ask for, in the order in which it ran.

        With several runs of one name, each by its number.
        """
        asked = {
            (self.specs[i].named(path), self.specs[i].run)
            for i in (range(len(self.specs)) if numbers is None else numbers)
            for path in self.modules[i]
        }
        taps = [
            tap
            for runs in self.made.values()
            for tap in runs
            if (tap.name, None) in asked or (tap.name, tap.run) in asked
        ]
        return {self._called(t): t for t in sorted(taps, key=lambda t: t.order)}

    def _called(self, tap: Tap) -> str:
        return f"{tap.name}#{tap.run}" if len(self.made[tap.name]) > 1 else tap.name

    def tap(self, name: str) -> Tap:
        """What was kept under a name. Raises KeyError for one that was not."""
        found = self.found()
        if name in found:
            return found[name]
        spec = spec_of(name)
        base = spec.named(spec.pattern)
        runs = {t.run: t for t in found.values() if t.name == base}
        if not runs:
            raise KeyError(f"{name!r} is not tapped{near(name, found)}")
        if (count := len(self.made[base])) > 1 and spec.run is None:
            raise KeyError(f"{name!r} ran {count} times: write '{base}#0' to '{base}#{count - 1}'")
        if (run := spec.run or 0) not in runs:
            raise KeyError(f"{name!r} is not tapped: it ran {count} times, and '#0' is the first")
        return runs[run]


_CACHE = re.compile(r"past_key_value|cache(?!_position)")


def check_no_cache(kwargs: Mapping[str, Any], whose: str) -> None:
    """Raise RuntimeError for a cache among a model's arguments."""
    for name, value in kwargs.items():
        if value is not None and not isinstance(value, bool) and _CACHE.search(name):
            raise RuntimeError(
                f"{whose} hold {name}, a cache that the call writes activations to; leave it out, give all tokens at "
                "once and pass use_cache=False"
            )


def copied(name: str, y: Tensor) -> Tensor:
    """An activation in memory of its own, where its graph goes on, or begins."""
    if not y.requires_grad:
        return y.detach().clone().requires_grad_()
    kept = y.clone()
    own(kept, y)
    return kept


def _without_graph(model: Module, name: str) -> None:
    """Let the graph behind a buffer go."""
    b = model.get_buffer(name)
    if not b._is_view():
        b.detach_()
        return
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, b.detach())


def _live(b: Tensor) -> bool:
    return b.requires_grad and b.grad_fn is not None


# -- tensors in what layers take and give -------------------------------------------------------------


def _inside(value: Any) -> Iterator[tuple[Step, Any]]:
    """The parts of a tuple, list, mapping or dataclass."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (tuple, list)):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))


def _found(value: Any, path: Sequence[Step]) -> tuple[tuple[Step, ...], Tensor] | None:
    """The first floating tensor below a path, and its own path."""
    if path:
        part = next((v for k, v in _inside(value) if k == path[0]), None)
        parts: Iterable[tuple[Step, Any]] = () if part is None else [(path[0], part)]
    elif isinstance(value, Tensor):
        return ((), value) if value.is_floating_point() else None
    else:
        parts = _inside(value)
    for key, part in parts:
        if (below := _found(part, path[1:])) is not None:
            return (key, *below[0]), below[1]
    return None


def _replaced(value: Any, path: Sequence[Step], new: Tensor) -> Any:
    """A value with another tensor at a path; what lies elsewhere is the same."""
    if not path:
        return new
    key, *rest = path
    part = next(v for k, v in _inside(value) if k == key)
    return _rebuilt(value, {key: _replaced(part, rest, new)})


def _exchanged(value: Any, old: Tensor, new: Tensor) -> Any:
    """A value with another tensor wherever this one is: an attention is given one as query, key and value."""
    if value is old:
        return new
    parts = {k: w for k, v in _inside(value) if (w := _exchanged(v, old, new)) is not v}
    return _rebuilt(value, parts) if parts else value


def _rebuilt(value: Any, parts: Mapping[Step, Any]) -> Any:
    """A value of the same class with some other parts."""
    changed: Any
    if isinstance(value, Mapping):
        changed = copy.copy(value)
        for key, part in parts.items():
            changed[key] = part
        return changed
    if dataclasses.is_dataclass(value):
        changed = copy.copy(value)
        for key, part in parts.items():
            object.__setattr__(changed, str(key), part)  # whether it is frozen or not
        return changed
    listed = [parts.get(k, v) for k, v in _inside(value)]
    return type(value)(*listed) if hasattr(value, "_fields") else type(value)(listed)
