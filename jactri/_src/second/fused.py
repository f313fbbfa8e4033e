"""Runs of Linear layers and activations in a forward Laplacian, by the kernels of `kernels.laplacian`.

A run is found in the structure of a course, once; it starts at the input, or wherever tangents and Laplacian lie in one
block. It goes in one launch where its layers are narrow (`kernels.laplacian.chain`), else layer by layer, the first of
them formed from the weights; `chooser` says which, and where torch takes the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels import support
from ...kernels.support import Factor, Ready
from ..base import backends
from ..device import chooser
from ..device.chooser import CHECKED_ROWS, TIMED_ENTRIES, Offer, Way, dots
from ..maps.curvature import Curves, Seeds, Unary
from ..plan.sweep import Step, Sweep
from ..read.graph import Graph

if TYPE_CHECKING:
    from .forward import LaplacianRun


def runs(
    graph: Graph, curves: Curves, sweep: Sweep, dense: frozenset[int]
) -> dict[int, tuple[Step, ...]]:
    """The runs of a course, by the value of their first step: each step reads the one before, and nobody else does.

    The rest of a run, from each of its layers on, is one too: for where its start cannot be run. ``dense``: see
    `forward.Course`.
    """
    steps = sweep.steps
    readers: Counter[int] = Counter()
    for s in steps:
        readers.update({*s.reads, *(curves[s.value].sources if s.value in curves else ())})
    readers[graph.outputs[0]] += 1
    after = {s.terms[0].other: s for s in steps if len(s.terms) == 1}
    found: dict[int, tuple[Step, ...]] = {}
    taken: set[int] = set()
    for step in steps:
        if step.value in taken or _link(graph, curves, dense, step) != "matmul":
            continue
        run, names = [step], ["matmul"]
        while readers[run[-1].value] == 1 and run[-1].value in after:
            step = after[run[-1].value]
            name = _link(graph, curves, dense, step)
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


def _link(graph: Graph, curves: Curves, dense: frozenset[int], step: Step) -> str:
    """ "matmul", "diagonal" or "view" for a step that can be a part of a run, else nothing."""
    if len(step.terms) != 1 or step.value not in dense:
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


def launch(run: LaplacianRun, steps: Sequence[Step]) -> Tensor | None:
    """Tangents and Laplacian ``(K + 1, *value)`` of the last step, or None where torch has to run them."""
    block = _start(run, steps[0])
    if block is None:
        return None
    layers = _layers(run, steps)
    if any(l.matrix.dtype != block.dtype or l.matrix.device != block.device for l in layers):
        return None
    out = chooser.run(Layers(block, layers, run.seeds, backends.ready.get()))
    return None if out is None else out.view(len(block), *run.values[steps[-1].value].shape)


@dataclass(frozen=True)
class Layer:
    """A Linear layer and the activation behind it: for kernels, and its two derivatives as tensors, for torch.

    A second derivative of None is zero.
    """

    matrix: Tensor
    factor: Factor | None = None
    slopes: Callable[[], tuple[Tensor, Tensor | None]] | None = None

    def first(self, rows: int) -> Layer:
        """The same for the first rows only."""
        if self.factor is None:
            return self
        f, slopes = self.factor, self.slopes

        def cut(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[:rows]

        factor = Factor(cut(f.values), f.name, f.constants, cut(f.second))
        return Layer(self.matrix, factor, lambda: tuple(map(cut, slopes())))


@dataclass(frozen=True)
class LayersKind:
    """What a choice depends on; ``rows`` is the power of two at or above the number of rows.

    ``last``: whether the last layer, which has no activation, is summed in an epilogue.
    """

    tangents: int
    rows: int
    widths: tuple[int, ...]
    factors: tuple[str, ...]
    last: bool
    shared: bool
    signed: bool
    dtype: torch.dtype
    precision: str
    device: torch.device

    @property
    def flops(self) -> float:
        products = sum(a * b for a, b in pairwise(self.widths))
        return 2.0 * (self.tangents + 1) * self.rows * products

    @property
    def bytes(self) -> float:
        ends = self.widths[-1] + (0 if self.shared else self.widths[0])
        return float((self.tangents + 1) * self.rows * ends * self.dtype.itemsize)

    def offers(self) -> list[Offer]:
        """One launch where the layers are narrow, or one a layer."""
        from ...kernels import laplacian

        layers = len(self.widths) - 1 - self.last
        multiply = dots(self.precision)
        found: list[Offer] = []
        within = self.widths[: layers + 1]
        if configs := laplacian.chain_configs(within, self.tangents, self.device):
            found.append(((("laplacian.chain", layers),), configs, multiply))
        steps = (("laplacian.step", 1),) * (layers - self.formed)
        found.append((steps, laplacian.CONFIGS, multiply))
        return found

    @property
    def formed(self) -> bool:
        """Whether the tangents behind the first layer are its weights, the same for all rows."""
        return self.shared and len(self.widths) - self.last > 2 and self.factors[0] != ""

    def plain(self) -> dict[str, object]:
        """As plain data, for reports."""
        return {
            "widths": self.widths, "tangents": self.tangents, "rows": self.rows, "precision": self.precision,
            "dtype": str(self.dtype), "factors": self.factors,
        }  # fmt: skip


@dataclass
class Layers:
    """One run: ``t`` (K + 1, rows, w_0), tangents and Laplacian, through layers.

    ``ready``: what the call has made of their matrices so far.
    """

    t: Tensor
    layers: list[Layer]
    seeds: Seeds
    ready: Ready | None = None

    def kind(self) -> LayersKind:
        from ...kernels import laplacian

        K, rows, n = len(self.t) - 1, self.t.shape[1], self.t.shape[2]
        widths = (n, *(l.matrix.shape[1] for l in self.layers))
        names = tuple("" if l.factor is None else l.factor.name for l in self.layers)
        last = len(names) > 1 and not names[-1] and widths[-1] <= laplacian.MOST_LAST
        return LayersKind(
            K, support.power_of_two(rows), widths, names, last, self._shared, self._signed, self.t.dtype,
            support.precision(self.t.dtype), self.t.device,
        )  # fmt: skip

    @property
    def _shared(self) -> bool:
        return self.t.stride(1) == 0 and self.t.shape[1] > 1

    @property
    def _signed(self) -> bool:
        return self.seeds.plus is not None and self.seeds.plus < len(self.t) - 1

    def first(self, rows: int) -> Layers:
        """The same run for the first rows only."""
        return Layers(self.t[:, :rows], [l.first(rows) for l in self.layers], self.seeds)

    def timed(self) -> Layers:
        K, rows, n = self.t.shape
        widest = max(n, *(l.matrix.shape[1] for l in self.layers))
        return self.first(max(CHECKED_ROWS, min(rows, TIMED_ENTRIES // max(1, K * widest))))

    def few(self) -> Layers:
        return self.first(CHECKED_ROWS)

    def torch(self, dtype: torch.dtype | None = None) -> Tensor:
        """``f' u_k``, and ``f' lap + f'' sum_k u_k^2``, a layer at a time; see `forward`."""
        t = self.t.to(dtype or self.t.dtype)
        rows = t.shape[1]
        for l in self.layers:
            if t.stride(1) == 0 and rows > 1:  # one product for all rows
                t = (t[:, 0] @ l.matrix.to(t.dtype)).unsqueeze(1).expand(-1, rows, -1)
            else:
                t = (t.flatten(0, 1) @ l.matrix.to(t.dtype)).view(len(t), rows, -1)
            if l.slopes is not None:
                first, second = l.slopes()
                made = t * first
                if second is not None:
                    made[-1].addcmul_(second.to(t.dtype), self.seeds.squares(t[:-1]))
                t = made
        return t

    def launch(self, way: Way, out: Tensor | None = None) -> Tensor:
        from ...kernels import laplacian

        t, layers, kind = self.t, self.layers, self.kind()
        options: dict[str, object] = {"precision": way.dot, "config": way.config}
        if self._signed:
            weights = torch.ones(len(t) - 1, dtype=torch.float32, device=t.device)
            weights[self.seeds.plus :] = -1
            options["weights"] = weights
        last = {"out": out}
        if kind.last:
            *layers, end = layers
            last["last"] = end.matrix
        matrices, factors = [l.matrix for l in layers], [l.factor for l in layers]
        if way.kernels[0][0] == "laplacian.chain":
            return laplacian.chain(t, matrices, factors, ready=self.ready, **options, **last)
        before = None
        if kind.formed:
            own = laplacian.seeds(matrices.pop(0).t(), t[:-1, 0], options.get("weights"))
            t, before = own.unsqueeze(1).expand(-1, t.shape[1], -1), factors.pop(0)
        options["ready"] = chooser.made_ready(matrices, way, self.ready)
        for i, (m, after) in enumerate(zip(matrices, factors, strict=True)):
            given = last if i == len(matrices) - 1 else {}
            t = laplacian.step(t, m, after, before=before, **options, **given)
            before = None
        return t


def _start(run: LaplacianRun, step: Step) -> Tensor | None:
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
        if run.layouts[step.value].columns != n or ties != sorted(ties):
            return None
        block = torch.eye(n, dtype=like.dtype, device=like.device).unsqueeze(1)
    elif source in run.plan.dense:
        block = block.reshape(block.shape[0], rows, n)
        if rows and block.stride(1) == 0:
            block = block[:, :1]
    else:
        return None
    return torch.cat((block, block.new_zeros(1, *block.shape[1:]))).expand(-1, rows, -1)


def _layers(run: LaplacianRun, steps: Sequence[Step]) -> list[Layer]:
    layers: list[Layer] = []
    for step in steps:
        term = step.terms[0]
        edge = run.values[term.owner].sources[term.edge][1]
        if edge.name == "matmul":
            layers.append(Layer(edge.partner))
        elif edge.name == "diagonal":
            layers[-1] = Layer(layers[-1].matrix, *_activation(run, step, edge))
    return layers


def _activation(run: LaplacianRun, step: Step, edge: Any):
    """Both derivatives of an activation, (rows, features): as kernels form them, or ready; and as tensors."""
    curve: Any = run.curves.get(step.value)
    shape = run.values[step.value].shape

    def rows(values: Tensor) -> Tensor:
        return values.expand(shape).reshape(-1, shape[-1])

    def slopes() -> tuple[Tensor, Tensor | None]:
        if curve is None:  # flat: the second derivative of these is zero in kernels too
            return rows(edge.d), None
        return tuple(map(rows, curve.slopes()))

    if curve is None:
        f = edge.factor()
    elif curve.kernel:
        f = Factor(curve.saved[0], curve.kernel, tuple(map(float, curve.constants)))
    else:
        first, second = slopes()
        f = Factor(first, second=second)
    second = None if f.second is None else rows(f.second)
    return Factor(rows(f.values), f.name, f.constants, second), slopes
