"""What the commands share: the user's functions by MODULE:NAME, and their mistakes told apart from ours."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jactri

HERE = Path(__file__).parent


class UserError(Exception):
    """The call was wrong; the message names the argument, what it was, and what to pass instead."""


class UserCodeError(Exception):
    """The user's own code raised; the cause is shown with its traceback, the message below it."""


def refusal(error: Exception) -> bool:
    """Whether a raise statement of jactri explains itself to the user; else it is an accident."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(last.filename).is_relative_to(Path(jactri.__file__).parent)
    return ours and (last.line or "").startswith("raise ")


def without_our_frames(error: BaseException) -> BaseException:
    """The error with a traceback that starts in the user's code, where it has any of that."""
    kept = error.__traceback__
    while kept is not None and kept.tb_next is not None:
        path = kept.tb_frame.f_code.co_filename
        ours = Path(path).parent == HERE or path == importlib.__file__
        if not (ours or path.startswith("<frozen importlib")):
            break
        kept = kept.tb_next
    return error.with_traceback(kept)


def kind(value: object) -> str:
    """What a value is, for a message."""
    if value is None or value == ():
        return "None" if value is None else "an empty tuple"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def find(target: str) -> Callable:
    """What MODULE:NAME is. Raises UserError where there is no such thing, or it cannot be called."""
    # From the right: a Windows path has a colon of its own.
    where, separator, name = target.rpartition(":")
    if not separator or not where or not name:
        raise UserError(
            f"{target!r} is not MODULE:FUNCTION; pass for example model.py:net or package.module:net"
        )
    module = _import_file(where) if where.endswith(".py") else _import_module(where)
    value: Any = module
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            raise UserError(f"{target}: {where} has no {name!r}; {_offers(module)}") from None
    if isinstance(value, type):
        raise UserError(f"{target}: {name} is a class; pass an instance of it, made in {where}")
    if not callable(value):
        raise UserError(
            f"{target}: {name} is {kind(value)}, which cannot be called; pass a function or an nn.Module"
        )
    return value


def _offers(module: ModuleType) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and not isinstance(value, type)
        and getattr(value, "__module__", None) in (module.__name__, None, type(value).__module__)
    ]
    return f"it offers {', '.join(sorted(own)[:12])}" if own else "it has no functions of its own"


def _import_file(where: str) -> ModuleType:
    path = Path(where).resolve()
    if not path.is_file():
        raise UserError(
            f"{where}: there is no such file; pass the path to a .py file, or a module's dotted name"
        )
    sys.path.insert(0, str(path.parent))  # its neighbours are importable, as when it is run itself
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # Before it runs, as import does it: dataclasses and pickle look their module up.
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever it is, it is theirs to see
        raise UserCodeError(
            f"{where} raised {type(error).__name__} while it was imported (above)"
        ) from error
    return module


def _import_module(where: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(where)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{where}.".startswith(f"{error.name}."):
            raise UserError(
                f"{where}: there is no module {error.name!r} here; pass a dotted name that imports from "
                f"{os.getcwd()}, or the path to a .py file"
            ) from None
        raise UserCodeError(
            f"{where} raised {type(error).__name__} while it was imported (above)"
        ) from error
