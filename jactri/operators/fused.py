"""Runs of Linear layers and activations in a forward Laplacian, by the kernels of `kernels.laplacian`.

A run is found in the structure of a course, once; it starts at the input, or wherever tangents and Laplacian lie in one
block. It goes in one launch where its layers are narrow (`kernels.laplacian.chain`), else layer by layer, the first of
them formed from the weights. Where no kernel covers the blocks or fits the device, torch takes the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import backends, chooser
from ..graph import Graph
from ..kernels import support
from ..kernels.support import Factor, Unfit
from ..linear_map import LinearMap
from ..rules.elementwise import KERNELS
from ..sweep import Step
from .curvature import Unary, as_they_are
from .slopes import gelu_tanh

if TYPE_CHECKING:
    from .curves import Curves
    from .forward import Course, Run

_refused: set[tuple] = set()
"""Ways that a device could not run: they are not tried again."""


def runs(graph: Graph, curves: Curves, plan: Course) -> dict[int, tuple[Step, ...]]:
    """The runs of a course, by the value of their first step: each step reads the one before, and nobody else does.

    The rest of a run, from each of its layers on, is one too: for where its start cannot be run.
    """
    steps = plan.sweep.steps
    readers: Counter[int] = Counter()
    for s in steps:
        readers.update({*s.reads, *(curves[s.value].sources if s.value in curves else ())})
    readers[graph.outputs[0]] += 1
    after = {s.terms[0].other: s for s in steps if len(s.terms) == 1}
    found: dict[int, tuple[Step, ...]] = {}
    taken: set[int] = set()
    for step in steps:
        if step.value in taken or _link(graph, curves, plan, step) != "matmul":
            continue
        run, names = [step], ["matmul"]
        while readers[run[-1].value] == 1 and run[-1].value in after:
            step = after[run[-1].value]
            name = _link(graph, curves, plan, step)
            behind = [n for n in names if n != "view"]
            if not name or name == behind[-1] == "diagonal":
                break
            run.append(step)
            names.append(name)
        taken.update(s.value for s in run)
        for i, name in enumerate(names):
            if name == "matmul" and "diagonal" in names[i:]:
                found[run[i].value] = tuple(run[i:])
    return found


def _link(graph: Graph, curves: Curves, plan: Course, step: Step) -> str:
    """ "matmul", "diagonal" or "view" for a step that can be a part of a run, else nothing."""
    if len(step.terms) != 1 or step.value not in plan.dense:
        return ""
    term = step.terms[0]
    edge = graph.values[term.owner].sources[term.edge][1]
    curve = curves.get(step.value)
    if edge.name == "diagonal" and edge.structure == "diagonal":
        return "diagonal" if curve is None or curve.__class__ is Unary else ""
    if edge.name == edge.structure == "view":
        shape, other = graph.values[step.value].shape, graph.values[term.other].shape
        return "view" if shape[-1:] == other[-1:] != () else ""
    shared = edge.name == "matmul" and edge.structure == "shared matrix" and edge.side == "right"
    return "matmul" if shared and curve is None else ""


def launch(run: Run, steps: Sequence[Step]) -> Tensor | None:
    """Tangents and Laplacian ``(K + 1, *value)`` of the last step, or None where torch has to run them."""
    block = _start(run, steps[0])
    if block is None:
        return None
    matrices, factors = _layers(run, steps)
    if any(m.dtype != block.dtype or m.device != block.device for m in matrices):
        return None
    K, weights = block.shape[0] - 1, None
    if run.seeds.plus is not None and run.seeds.plus < K:
        weights = torch.ones(K, dtype=torch.float32, device=block.device)
        weights[run.seeds.plus :] = -1
    out = _run(block, matrices, factors, weights)
    return None if out is None else out.view(K + 1, *run.values[steps[-1].value].shape)


def _start(run: Run, step: Step) -> Tensor | None:
    """Tangents and Laplacian ``(K + 1, rows, features)`` ahead of a run; None where they are no such block."""
    source = step.terms[0].other
    like, layout = run.values[source], run.layouts[source]
    rows, n = prod(like.shape[:-1]), like.shape[-1]
    both = run.joined.get(source)
    if both is not None:
        return both.reshape(both.shape[0], rows, n) if source in run.plan.dense else None
    if run.laplacians.get(source) is not None:
        return None
    block, _ = run.blocks[source]
    if block is None:  # ones, tied to the features: the identity
        ties = [t for _, t in layout.axes[-1]]
        if run.layouts[step.value].columns() != n or ties != sorted(ties):
            return None
        block = torch.eye(n, dtype=like.dtype, device=like.device).unsqueeze(1)
    elif source in run.plan.dense:
        block = block.reshape(block.shape[0], rows, n)
        if rows and block.stride(1) == 0:
            block = block[:, :1]
    else:
        return None
    return torch.cat((block, block.new_zeros(1, *block.shape[1:]))).expand(-1, rows, -1)


def _layers(run: Run, steps: Sequence[Step]) -> tuple[list[Tensor], list[Factor | None]]:
    """The matrices, and the activation behind each."""
    matrices: list[Tensor] = []
    factors: list[Factor | None] = []
    for step in steps:
        term = step.terms[0]
        edge = run.values[term.owner].sources[term.edge][1]
        if edge.name == "matmul":
            matrices.append(edge.partner)
            factors.append(None)
        elif edge.name == "diagonal":
            factors[-1] = _activation(run, step, edge)
    return matrices, factors


def _activation(run: Run, step: Step, edge: LinearMap) -> Factor:
    """Both derivatives of an activation, (rows, features): as kernels form them, or ready."""
    curve, shape = run.curves.get(step.value), run.values[step.value].shape
    if curve is None:  # flat: the second derivative of these is zero in kernels too
        f = edge.factor()
    elif curve.formula is not as_they_are and curve.name in KERNELS:
        name = "gelu_tanh" if curve.formula is gelu_tanh else KERNELS[curve.name][0]
        f = Factor(curve.saved[0], name, tuple(map(float, curve.constants)))
    else:
        first, second = curve.slopes()
        f = Factor(first, second=second)

    def rows(values: Tensor) -> Tensor:
        return values.expand(shape).reshape(-1, shape[-1])

    second = None if f.second is None else rows(f.second)
    return Factor(rows(f.values), f.name, f.constants, second)


def _run(
    t: Tensor, matrices: list[Tensor], factors: list[Factor | None], weights: Tensor | None
) -> Tensor | None:
    from ..kernels import laplacian

    options: dict[str, object] = {"weights": weights}
    K = t.shape[0] - 1
    if len(matrices) > 1 and factors[-1] is None and matrices[-1].shape[1] <= laplacian.MOST_LAST:
        *matrices, options["last"] = matrices
        factors = factors[:-1]
    widths = (t.shape[2], *(m.shape[1] for m in matrices))
    configs = laplacian.chain_configs(widths, K, t.device)
    out = _fitting(laplacian.chain, configs, (K, widths), t, matrices, factors, **options)
    if out is not None:
        return out
    before, first = None, 0
    shared = t.stride(1) == 0 and t.shape[1] > 1
    if shared and len(matrices) > 1 and factors[0] is not None:  # the first layer is the weights
        own = laplacian.seeds(matrices[0].t(), t[:-1, 0], weights)
        t, before, first = own.unsqueeze(1).expand(-1, t.shape[1], -1), factors[0], 1
    last = options.pop("last", None)
    for l in range(first, len(matrices)):
        if l == len(matrices) - 1:
            options["last"] = last
        t = _fitting(
            laplacian.step, laplacian.CONFIGS, (K, widths[l : l + 2]), t, matrices[l], factors[l],
            before=before, **options,
        )  # fmt: skip
        before = None
        if t is None:
            return None
    return t


def _fitting(
    kernel: Callable[..., Tensor], configs: Sequence, sizes: tuple, t: Tensor, *given, **options
) -> Tensor | None:
    """A kernel's result by the first tile and way to multiply that the device can run; None: it can run none."""
    for config, dot in product(configs, chooser.dots(support.precision(t.dtype))):
        way = kernel.__name__, sizes, t.dtype, t.device, config, dot
        if way in _refused:
            continue
        try:
            return kernel(t, *given, precision=dot, config=config, **options)
        except Unfit as error:
            _refused.add(way)
            backends.unfit(f"laplacian.{kernel.__name__}", error)
    return None
