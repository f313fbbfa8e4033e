"""The launch of a kernel; where ops are watched, as by a trace, it is one: ``jactri::kernel``.

A node of a graph then, which torch's compilers leave as it is and fuse around: the kernel's name, the tensors that it
reads, the one that it writes to, and all else as JSON, so that a graph can be kept on disk. Elsewhere it is Triton's
own call: an op takes ten microseconds more.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from .support import fitting, on_device


def launch(kernel, grid: tuple[int, ...], out: Tensor, *args: Any, **options: Any) -> None:
    """Run a kernel over a grid. ``args``: its own, among them ``out``, the one tensor that it writes to.

    ``options`` are Triton's. Raises Unfit where the device cannot run it.
    """
    options["enable_fp_fusion"] = True
    if _len_torch_dispatch_stack():
        read: list[Tensor] = []
        how = {"grid": grid, "args": _written_down(args, read, out), "options": options}
        how["strides"] = [t.stride() for t in (*read, out)]
        told = json.dumps(how, separators=(",", ":"))
        OP(_name(kernel), read, out, told)
    else:
        with on_device(out), fitting():
            kernel[grid](*args, **options)


def _name(function) -> str:
    return f"{function.fn.__module__.rpartition('.')[2]}.{function.fn.__name__}"


def _written_down(value: Any, read: list[Tensor], out: Tensor) -> Any:
    """Arguments as plain data; tensors other than ``out`` are put into ``read``."""
    if isinstance(value, (tuple, list)):
        return [_written_down(v, read, out) for v in value]
    if value is out:
        return {"out": True}
    if isinstance(value, Tensor):
        read.append(value)
        return {"read": len(read) - 1}
    return {"function": _name(value)} if hasattr(value, "fn") else value


def _filled(value: Any, read: Sequence[Tensor], out: Tensor) -> Any:
    """What was written down, with these tensors."""
    if isinstance(value, list):
        return tuple(_filled(v, read, out) for v in value)
    if not isinstance(value, dict):
        return value
    if "function" in value:
        return _function(value["function"])
    return out if "out" in value else read[value["read"]]


@functools.cache
def _function(name: str):
    module, _, function = name.partition(".")
    return getattr(importlib.import_module(f"{__package__}.{module}"), function)


_read = functools.lru_cache(maxsize=1024)(json.loads)


def run(name: str, read: Sequence[Tensor], out: Tensor, how: str) -> None:
    """A launch that was written down."""
    told = _read(how)
    *strides, last = told["strides"]
    read = [_laid_out(t, s) for t, s in zip(read, strides, strict=True)]
    into = _laid_out(out, last)
    with on_device(out), fitting():
        _function(name)[tuple(told["grid"])](*_filled(told["args"], read, into), **told["options"])
    if into is not out:
        out.copy_(into)


def _laid_out(t: Tensor, strides: Sequence[int]) -> Tensor:
    """A tensor as it lay in the trace: the arguments of a kernel tell its strides. A copy if it lies otherwise."""
    looked = zip(t.shape, t.stride(), strides, strict=True)
    if all(a == b for n, a, b in looked if n > 1):
        return t
    made = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device)
    to = made
    for dim, stride in enumerate(strides):
        if stride == 0 and t.shape[dim] > 1:  # one entry, written once
            to, t = to.narrow(dim, 0, 1), t.narrow(dim, 0, 1)
    to.copy_(t)
    return made


_library = torch.library.Library("jactri", "DEF")
_library.define(
    "kernel(str name, Tensor[] read, Tensor(a!) out, str how) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
_library.impl("kernel", run, "CompositeExplicitAutograd")


@torch.library.register_fake("jactri::kernel", lib=_library)
def _(name: str, read: Sequence[Tensor], out: Tensor, how: str) -> None:
    """Nothing is made: ``out`` is there."""


OP = torch.ops.jactri.kernel.default
