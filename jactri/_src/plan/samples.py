"""Samples of a batch: whether they influence one another, and the computation of a range of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod

import torch
from torch import Tensor

from ..base.constants import fixed, halves
from ..base.rates import block_bytes
from ..maps.cut import Cut
from ..maps.layout import FREE, Layout
from ..read.graph import Graph, Value
from ..read.opaque import why_not
from ..read.pulling import blocks_pulled
from .needs import CACHE_BYTES
from .sweep import Sweep

Product = Callable[[Tensor], Sequence[Tensor]]
"""Of a block of cotangents: those of the inputs that are reached."""

REMEDY = '; if that is rounding, or a step size that all samples share, per_sample="assume" takes your word for it'
"""What a refusal of samples that mix ends with."""


def sample_ties(sweep: Sweep, layout: Layout, graph: Graph) -> bool:
    """Whether the first axis of a block's value is tied to the first axis of the seed, whole."""
    if not layout.axes or not sweep.layout.axes:
        return False
    n = graph.values[sweep.seed].shape[0]
    if n == 1:
        return layout.shape[0] == 1
    own = sweep.layout.axes[0]
    return layout.axes[0] == own


def untied_targets(graph: Graph, sweep: Sweep) -> list[int]:
    """The values at the end of a sweep whose samples are not tied to those of the seed."""
    return [
        t
        for t in sweep.targets
        if t is not None and not sample_ties(sweep, sweep.layouts[t], graph)
    ]


def mixing_steps(graph: Graph, sweep: Sweep, target: int) -> list[int]:
    """The values (in sweep order) at whose op the samples' tie is lost, of all that lead to ``target``."""
    batch = {t for _, t in sweep.layout.axes[0]}
    by_value = {s.value: s for s in sweep.steps}
    leads, stack = set(), [target]
    while stack:
        v = stack.pop()
        if v not in leads:
            leads.add(v)
            stack.extend(t.other for t in (by_value[v].terms if v in by_value else ()))
    lost = []
    for step in sweep.steps:
        if step.value in leads:
            for t in step.terms:
                had = batch <= sweep.layouts[t.other].tied
                if had and not (batch <= t.route.out.tied):
                    lost.append(t.owner)
    # a tie can also survive on another axis (a transposed batch): then the last op is named
    return lost or [by_value[target].terms[0].owner if target in by_value else target]


@dataclass(frozen=True)
class Leak:
    """What a probe found: derivatives in the input of ``sample``, of other samples' outputs.

    ``size``: the largest of them, by the largest within samples.
    """

    size: float
    sample: int

    def __str__(self) -> str:
        return (
            f"a probe found derivatives across samples, {self.size:.1e} times as large as those within (in the input "
            f"of sample {self.sample})"
        )


def probe_mixing(
    outputs,
    inputs,
    through: Graph | None = None,
    products: Mapping[int, Product] | None = None,
    room: float = inf,
) -> Leak | None:
    """The largest derivative of an output of one sample in the input of another, or None.

    A random cotangent on some of the samples must leave exactly zero gradient on the others. The masks of `halves`
    separate any two samples: about ``log2(N)`` backward passes an output. In grad mode, where the result will be
    differentiated, the gradient of what was left must be zero too: twice as many. What vanishes at this point with its
    second derivatives is not seen, and adds to the third. A NaN counts as mixing. The caller's random state is not
    used.

    ``through``: pull through this graph, whose last inputs are ``inputs``, several masks at once: autograd would run
    the caller's hooks on gradients, which are not to see what means nothing, nor to hide what is there.
    ``products``: by output, what pulls a block of one mask, where there are no such hooks. ``room``: bytes that several
    masks may take.
    """
    n = outputs[0].shape[0]
    if n < 2:
        return None
    across, sample = 0.0, None
    seen: list[tuple[Tensor, Tensor]] = []  # sizes, and where they are within samples
    # what must not be differentiated will not be
    graph = torch.is_grad_enabled() and why_not(outputs) is None
    for j, y in enumerate(outputs):
        if not y.requires_grad:
            continue
        noise = _noise(y)
        together = 1 if through is None else _at_once(through, room)
        for masks in halves(n, y.device).split(together):
            weights = noise * masks.view(-1, n, *([1] * (y.dim() - 1)))
            if products:
                grads = [g for g in products[j](weights) if g.numel()]
            elif through is None:
                grads = [g.unsqueeze(0) for g in _gradients(y, inputs, weights[0], graph)]
            else:
                only = [weights if k == j else None for k in range(len(outputs))]
                # in the mode that the maps will be used in: they keep what they compute
                found = blocks_pulled(through, only, through.inputs[-len(inputs) :])
                grads = [g if graph else g.detach() for g in found.values() if g.numel()]
            near = [masks.to(g.device) for g in grads]
            sizes = [g.detach().abs().reshape(len(masks), n, -1).amax(2) for g in grads]
            both = list(zip(sizes, near, strict=True))
            seen += both
            far = [s.masked_fill(m, 0).amax(0) for s, m in both]
            left = [
                (g * _noise(g))[~m].sum()
                for g, m in zip(grads, near, strict=True)
                if g.requires_grad
            ]
            if left:
                far += [g.abs().reshape(n, -1).amax(1) for g in _gradients(sum(left), inputs)]
            for size in far:
                most = float(size.max())
                if most != 0 and not most <= across:
                    across, sample = most, int(size.argmax())
    if sample is None:
        return None
    within = max(float(s.masked_fill(~m, 0).max()) for s, m in seen)
    return Leak(across / within if within else float("inf"), sample)


_BLOCKS = 8
"""About how many blocks there are at once, where nodes are called that take some themselves."""


def _at_once(graph: Graph, room: float) -> int:
    """How many cotangents are pulled at once."""
    value = max(graph.values, key=lambda v: prod(v.shape))
    most = min(block_bytes(value.device.type, CACHE_BYTES), room / _BLOCKS)
    return max(1, int(most // max(prod(value.shape) * value.dtype.itemsize, 1)))


def _noise(y: Tensor) -> Tensor:
    """Numbers for what has this shape, the same each time: kept if they are few, and not to be written to."""

    def make() -> tuple[Tensor]:
        gen = torch.Generator(device=y.device).manual_seed(0)
        noise = torch.rand(y.shape, generator=gen, device=y.device, dtype=torch.float32)
        return (noise.add_(0.5).to(y.dtype),)

    (found,) = make() if y.numel() >> 16 else fixed(("noise", y.shape, y.dtype, y.device), make)
    return found


def _gradients(y, inputs, weight=None, create_graph: bool = False) -> list[Tensor]:
    """The gradients in the inputs on which ``y`` depends."""
    grads = torch.autograd.grad(
        y, inputs, weight, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return [g for g in grads if g is not None and g.numel()]


def places(graph: Graph, sweeps: list[Sweep]) -> dict[int, tuple[int, int]] | None:
    """Where the samples are in every value of the sweeps: (axis, entries of the axis a sample), or None.

    None unless the samples stay tied to the seed, in order, through every sweep: then ranges of them can be run one
    after the other.
    """
    where: dict[int, tuple[int, int]] = {}
    for sweep in sweeps:
        if len(sweep.layout.axes[0]) != 1 or sweep.layout.axes[0][0][1] == FREE:
            return None
        batch = sweep.layout.axes[0][0][1]
        for value, layout in (*sweep.layouts.items(), *sweep.inside.items()):
            place = None
            for a, axis in enumerate(layout.axes):
                if axis[0][1] == batch:
                    place = a, layout.shape[a] // axis[0][0]
            if place is None or where.setdefault(value, place) != place:
                return None
    return where


def narrow(
    graph: Graph, where: dict[int, tuple[int, int]], start: int, length: int
) -> Graph | None:
    """The graph of samples ``start`` to ``start + length``, or None where a map cannot be cut."""
    cuts = {v: Cut(a, start * n, length * n) for v, (a, n) in where.items()}
    values: list[Value] = []
    key: list[object] = []
    for v, value in enumerate(graph.values):
        if v not in cuts:  # on no way from an input to an output
            values.append(value)
            key.append(None)
            continue
        sources = []
        for s, edge in value.sources:
            if s in cuts:
                edge = edge.narrow(cuts[s], cuts[v], graph.values[s].shape, value.shape)
                if edge is None:
                    return None
                sources.append((s, edge))
        shape = cuts[v].shape(value.shape)
        values.append(Value(value.op, shape, value.dtype, value.device, tuple(sources)))
        key.append((value.op, shape, value.dtype, tuple((s, m.key) for s, m in sources)))
    return Graph(values, graph.inputs, graph.outputs, (tuple(key), graph.key), graph.layers)
