"""What runs a traced graph: the graph itself, Inductor's compiled code, or an AOTInductor package.

An engine takes a graph and tensors like those that it will be called with, and gives a function of a list of tensors
to the list of the graph's results.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._C import _DisableAutocast, _is_any_autocast_enabled
from torch.utils._pytree import tree_leaves

from ..base.remedies import one_of
from ..base.tracing import REFUSALS
from .compilation import TRACKED, Kernel, Part, of_artifact, of_graphs, of_package

_log = logging.getLogger("jactri")

Run = Callable[[list[Tensor]], Sequence[Tensor]]

ENGINES = ("inductor", "aot", "fx")

OPTIONS = {"fallback_random": True, **TRACKED}
"""Of Inductor: random numbers are those of an eager call."""

_one_at_a_time = threading.RLock()
"""The compiler keeps notes of what it compiles in variables of its modules."""


class Built(NamedTuple):
    """What runs a graph: by which engine, and what tells its kernels."""

    run: Run
    engine: str
    ops: int
    kernels: Callable[[], tuple[Kernel, ...] | None] = lambda: None

    def part(self, name: str) -> Part:
        return Part(name, self.engine, self.ops, self.kernels())


NO_COMPILER = (
    "needs a C++ compiler, and there is none here: install g++ or clang, or name one by CXX"
)


def has_compiler() -> bool:
    """Whether Inductor finds a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def usable(engine: str, inputs: Any) -> str:
    """The engine that is asked for, or ``"fx"``, with a warning, where it needs a C++ compiler that is not there."""
    if engine not in ENGINES:
        raise ValueError(one_of("engine", engine, ENGINES))
    on_cpu = all(t.device.type == "cpu" for t in tree_leaves(inputs) if isinstance(t, Tensor))
    # of a package, what calls the kernels is C++ too
    if engine == "fx" or (engine == "inductor" and not on_cpu) or has_compiler():
        return engine
    warnings.warn(
        f"engine={engine!r} {NO_COMPILER}. The traced graph runs as it is, as engine='fx' does",
        RuntimeWarning,
        stacklevel=3,
    )
    return "fx"


@contextlib.contextmanager
def quiet():
    """Without the compiler's own warnings, about torch's code, and that what it packed for this CPU is not cached."""
    log = logging.getLogger("torch._inductor.standalone_compile")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


def build(
    engine: str, graph: fx.GraphModule, like: Sequence[Tensor], freeze: bool = False
) -> Built:
    """The graph as an engine runs it, without a derivative; as it is, logged, where the compiler fails.

    ``freeze``: the compiler computes with the graph's constants what it can, and packs them for its products.
    """
    # in a package, a product with a packed matrix took 1.3 to 4 times as long (torch 2.13, MKL)
    options = {**OPTIONS, "freezing": freeze and engine != "aot"}
    ops = sum(n.op == "call_function" for n in graph.graph.nodes)
    with _one_at_a_time, torch.no_grad(), _DisableAutocast(), quiet():
        given = [t.detach() for t in like]
        if engine != "fx":
            from torch._inductor.exc import InductorError

            try:
                run, kernels = _BUILD[engine](graph, given, options)
                return Built(run, engine, ops, kernels)
            except (InductorError, *REFUSALS) as error:
                _log.warning(
                    "engine=%r cannot compile the graph, which runs as it is: %s", engine, error
                )
        return Built(_fx(graph, given), "fx", ops)


def _fx(graph: fx.GraphModule, like: list[Tensor]) -> Run:
    return _without_grad(graph.forward)


def _inductor(
    graph: fx.GraphModule, like: list[Tensor], options: dict[str, Any]
) -> tuple[Run, Callable]:
    from torch._inductor import standalone_compile
    from torch._inductor.compile_fx import compile_fx_inner

    seen = []

    def compile_graph(*args, **kwargs):
        seen.append(compile_fx_inner(*args, **kwargs))
        return seen[-1]

    options = {"config_patches": options, "inner_compile": compile_graph}
    made = standalone_compile(graph, like, dynamic_shapes="from_example_inputs", options=options)
    # what AOTAutograd finds in its cache is not compiled again
    return _without_grad(made), lambda: of_graphs(seen) or of_artifact(made)


def _without_grad(made: Callable[..., Sequence[Tensor]]) -> Run:
    def run(tensors):
        if not torch.is_grad_enabled():
            return made(*tensors)
        with torch.no_grad():
            return made(*tensors)

    return _without_autocast(run)


def _without_autocast(made: Run) -> Run:
    """Autocast's conversions are ops of the graph already."""

    def run(tensors):
        if not _is_any_autocast_enabled():
            return made(tensors)
        with _DisableAutocast():
            return made(tensors)

    return run


def _aot(
    graph: fx.GraphModule, like: list[Tensor], options: dict[str, Any]
) -> tuple[Run, Callable]:
    from torch._inductor import aoti_load_package

    with tempfile.TemporaryDirectory() as folder:
        path = package(graph, tuple(like), os.path.join(folder, "call.pt2"), options)
        loaded, kernels = aoti_load_package(path), of_package(path)
    return _without_autocast(loaded.loader.boxed_run), lambda: kernels


def package(
    module: nn.Module, examples: tuple, path: str, options: dict[str, Any] = OPTIONS
) -> str:
    """Write a module of plain ops as an AOTInductor package; the path."""
    from torch._inductor import aoti_compile_and_package

    program = torch.export.export(module, examples, strict=False)
    return aoti_compile_and_package(program, package_path=path, inductor_configs=options)


_BUILD = {"inductor": _inductor, "aot": _aot}
