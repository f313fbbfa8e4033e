"""What runs a traced graph: the graph itself, Inductor's compiled code, or an AOTInductor package.

An engine takes a graph and tensors like those that it will be called with, and gives a function of a list of tensors
to the list of the graph's results.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

Run = Callable[[list[Tensor]], Sequence[Tensor]]

ENGINES = ("inductor", "aot", "fx")

OPTIONS = {"fallback_random": True}
"""Of Inductor: random numbers are those of an eager call."""


def compiler() -> str | None:
    """Why Inductor has no C++ compiler here; None if it has one."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return str(error).split("\n")[0]
    return None


def build(engine: str, graph: fx.GraphModule, like: list[Tensor]) -> Run:
    """The graph as an engine runs it."""
    return _BUILD[engine](graph, like)


def _fx(graph: fx.GraphModule, like: list[Tensor]) -> Run:
    forward = graph.forward
    return lambda tensors: forward(*tensors)


def _inductor(graph: fx.GraphModule, like: list[Tensor]) -> Run:
    from torch._inductor import standalone_compile

    made = standalone_compile(
        graph, like, dynamic_shapes="from_example_inputs", options={"config_patches": OPTIONS}
    )
    return lambda tensors: made(*tensors)


def _aot(graph: fx.GraphModule, like: list[Tensor]) -> Run:
    from torch._inductor import aoti_load_package

    with tempfile.TemporaryDirectory() as folder:
        loaded = aoti_load_package(package(graph, like, os.path.join(folder, "call.pt2")))
    return loaded.loader.boxed_run


def package(graph: fx.GraphModule, like: list[Tensor], path: str) -> str:
    """Write the graph as an AOTInductor package."""
    from torch._inductor import aoti_compile_and_package

    program = torch.export.export(graph, tuple(like), strict=False)
    return aoti_compile_and_package(program, package_path=path, inductor_configs=OPTIONS)


_BUILD = {"inductor": _inductor, "aot": _aot, "fx": _fx}
