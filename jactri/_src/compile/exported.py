"""`export`: a call as an AOTInductor package, which runs without Python, and without jactri."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
    treespec_dumps,
)

from ..base import backends
from ..calls.api import jacobian
from ..prologue.running import computing, public
from ..read import handover, overriding
from . import calls, engines
from .agreement import apart, dtypes
from .reached import Reached, called

if TYPE_CHECKING:
    from .traced import Traced


def export(
    func: Callable[..., Any],
    *example_inputs: Any,
    path: str | os.PathLike,
    of: Callable[..., Any] | None = jacobian,
    **options: Any,
) -> str:
    """Write a call of jactri as an AOTInductor package: machine code that runs without Python, and without jactri.

    The package is a function of the inputs alone. All else that ``func`` uses, weights among it, is inside, as it is
    now; later changes of them need another export. In Python ``torch._inductor.aoti_load_package(path)`` makes it a
    function of the inputs, whose answer is nested as that of the ordinary call, and detached. From C++
    ``torch::inductor::AOTIModelPackageLoader`` loads it, whose ``run`` takes the inputs' tensors, and gives the
    answer's, as one flat list, in the order of ``torch.utils._pytree.tree_leaves`` (``return_output=True``: the
    output, then the Jacobian); examples/cpp is a control loop. Of jactri's Triton kernels, which Python launches, there
    are none in it: on CUDA, too, it is torch's ops, fused by Inductor.

    Inputs must have the shapes, strides, dtypes and devices of the examples. A package checks that only where
    ``AOTI_RUNTIME_CHECK_INPUTS=1`` is in the environment when it first runs; else it reads memory as it was laid out in
    the examples, and may answer with wrong numbers. It belongs to the kind of machine and to the version of PyTorch
    that it was made on.

    Args:
        func: as for ``of``.
        example_inputs: tensors, or tuples, lists and dicts of them, like those that the package will be given.
        path: where to write it; ends in ``.pt2``. A file there is replaced, once the new one is made and checked.
        of: what is computed: `jacobian` and the other calls of jactri, `func.hessian`, ``None`` for ``func`` itself.
        options: those of ``of`` that `compile` takes, but for ``create_graph``: a package has no derivative.

    Returns:
        The path.

    Raises:
        TypeError: another ``of``, an option, a number of inputs that it does not take, or a container that a package
            cannot name.
        ValueError: a path without ``.pt2``; ``create_graph``.
        FileNotFoundError: the folder is not there.
        RuntimeError: ``backend="triton"``; a call that cannot be one graph; no C++ compiler; a package that does not
            answer as the ordinary call does; inside of a torch.func transform. Else what ``of`` raises.

    Cost:
        An ordinary call, a trace, and 5 to 30 seconds of compilation; then a call of the package takes what
        ``compile(engine="aot")`` takes.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        >>> x = torch.randn(4, 3)
        >>> jactri.export(net, x, path="step.pt2", per_sample=True)  # doctest: +SKIP
        'step.pt2'
        >>> jac = torch._inductor.aoti_load_package("step.pt2")(x)  # doctest: +SKIP

        What cannot be a package is refused before anything is compiled:

        >>> jactri.export(net, x, path="step.pt2", create_graph=True)
        Traceback (most recent call last):
        ValueError: a package has no derivative: export takes no create_graph=True; jactri.compile does
    """
    path = os.fspath(path)
    if not path.endswith(".pt2"):
        raise ValueError(f"path must end in '.pt2', got {path!r}")
    if options.pop("create_graph", False):
        raise ValueError(
            "a package has no derivative: export takes no create_graph=True; jactri.compile does"
        )
    calls.check("export", of, options, example_inputs)
    backends.check_packaged("export", options)
    calls.check_count(of, len(example_inputs))
    folder = os.path.dirname(path) or os.curdir
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder!r} to write {path!r} to")
    overriding.refuse("jactri.export")
    flat, nested = tree_flatten(example_inputs)
    calls.check_tensors(flat, f"an exported {calls.name(of)}")
    if handover.transforming(flat):
        raise RuntimeError("jactri.export cannot run inside of a torch.func transform")
    if not engines.has_compiler():
        raise RuntimeError(f"jactri.export {engines.NO_COMPILER}")
    answer, module = _module(func, of, options, flat, nested)
    _write(module, tree_map(Tensor.detach, example_inputs), answer, path, folder)
    return path


@public
def _module(func, of, options, flat: list[Tensor], nested: TreeSpec) -> tuple[Any, nn.Module]:
    """The answer of the ordinary call, and the call as a module of the inputs alone."""
    from .traced import Untraceable, frozen, trace  # imports torch._dynamo, which takes seconds

    call = calls.ordinary(of, func, options)
    with called() as modules:
        answer = call(tree_unflatten(flat, nested), None)
    reached = Reached(func, options, modules)
    try:
        with backends.packaging():
            traced = trace(
                lambda *xs: call(tree_unflatten(xs, nested), None), flat, (), reached, lasting=True
            )
    except Untraceable as reason:
        raise RuntimeError(
            f"jactri.export of {calls.name(of)}: the call cannot be one graph: {reason}. In func, read no values in "
            "Python (a branch or a mask is torch.where), draw no random numbers (take them as an input), write to no "
            "tensor but its own; per_sample=True tells that samples do not mix"
        ) from reason
    for what, spec in (("an input", nested), ("the answer", traced.spec)):
        try:
            treespec_dumps(spec)
        except NotImplementedError as error:
            raise TypeError(
                f"a package cannot name the containers of {what}; use tuples, lists and dicts: {error}"
            ) from error
    return answer, _Alone(frozen(traced))


class _Alone(nn.Module):
    """A traced call as a module of its inputs alone, nested as those of the call."""

    def __init__(self, traced: Traced):
        super().__init__()
        self.traced = traced.graph  # of a module, ``graph`` is another thing
        spec = traced.spec
        self.as_nested = lambda found: tree_unflatten(found, spec)

    def forward(self, *inputs):
        return self.as_nested(self.traced(*tree_leaves(inputs)))


def _write(module: nn.Module, examples: tuple, answer: Any, path: str, folder: str) -> None:
    """Write the package. Raises RuntimeError where its answer is another one."""
    with tempfile.TemporaryDirectory(dir=folder) as beside, computing(False):
        with engines.quiet():
            made = engines.package(module, examples, os.path.join(beside, "made.pt2"))
        found = torch._inductor.aoti_load_package(made)(*examples)
        off = apart(tree_leaves(found), tree_leaves(answer), dtypes(module.traced))
        if off is not None:
            raise RuntimeError(f"the package does not answer as the ordinary call does: {off}")
        os.replace(made, path)
