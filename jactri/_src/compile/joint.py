"""The derivative of a traced call: its graph and that of its backward, of one trace, parted at what is kept.

As AOTAutograd does it: the joint graph is split by min-cut (functorch.compile), which recomputes what is cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, fx
from torch._C import _DisableAutocast
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from ..base.tracing import REFUSALS
from .engines import Built, Run, build
from .reached import Reached
from .traced import Traced, Untraceable, fake, fakes, trace


@dataclass
class Joint:
    """Two graphs: the call, whose results are its answer and what is kept, and the backward of kept and cotangents."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    results: int
    """How many of the forward graph's results are the answer."""
    differentiated: list[int]
    """Which of the answer's tensors have cotangents."""
    held: list[Tensor]
    """What the two traces held, those of the call alone first."""
    gradients: list[int]
    """For which of the inputs and held tensors the backward gives gradients, in its order."""


def joint(
    call: Callable[..., Any], traced: Traced, inputs: Sequence[Tensor], reached: Reached
) -> Joint:
    """The graphs of ``call``, of which ``traced`` is the graph, and whose answer requires grad.

    Raises Untraceable.
    """
    needed = [t.requires_grad for t in inputs]
    weights = [t for t in traced.held if t.requires_grad]
    hooked = [w for w in weights if w._backward_hooks]
    if hooked:  # it would run in the trace, and again in each backward
        raise Untraceable(f"{reached.called(hooked[0])} has a hook")
    outs = [n.meta["val"] for n in traced.results]
    made: dict[str, list[int]] = {}

    def both(*given):
        xs = given[: len(needed)]
        ys = tree_leaves(call(*xs))
        wanted = [k for k, y in enumerate(ys) if y.requires_grad]
        sources = [x for x in xs if x.requires_grad] + weights
        cotangents = [given[len(xs) + k] for k in wanted]
        grads = [None] * len(sources)
        if wanted:
            some = [ys[k] for k in wanted]
            with _DisableAutocast():  # of a backward, which is called outside of it
                grads = torch.autograd.grad(some, sources, cotangents, allow_unused=True)
        made["differentiated"] = wanted
        made["sources"] = [k for k, g in enumerate(grads) if g is not None]
        return *[y.detach() for y in ys], *[g for g in grads if g is not None]

    cotangents = [torch.empty_like(y, device=y.device) for y in _real(outs)]
    found = trace(both, [*inputs, *cotangents], (), reached)
    if not made["differentiated"]:
        raise Untraceable("in a trace, its answer loses its graph")
    known = set(map(id, traced.held))  # but constants that each trace makes
    held = [*traced.held, *(t for t in found.held if id(t) not in known)]
    at = {id(t): len(inputs) + k for k, t in enumerate(held)}
    sources = [k for k, r in enumerate(needed) if r] + [at[id(w)] for w in weights]
    try:
        graph = _functional(found, len(inputs), len(outs), held)
        forward, backward = min_cut_rematerialization_partition(
            graph, (), num_fwd_outputs=len(outs)
        )
    except REFUSALS as error:  # of torch, on a graph that was traced
        reason = f"its derivative is no graph: {type(error).__name__}: {error}"
        raise Untraceable(reason.split("\n")[0]) from error
    gradients = [sources[k] for k in made["sources"]]
    return Joint(forward, backward, len(outs), made["differentiated"], held, gradients)


def _real(outs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros(y.shape, dtype=y.dtype, device=y.device) for y in outs]


def _functional(found: Traced, inputs: int, outs: int, all_held: list[Tensor]) -> fx.GraphModule:
    """Without writes, and with the order and the names of placeholders that the partitioner knows."""
    mode = fakes()
    places = [n for n in found.graph.graph.nodes if n.op == "placeholder"]
    held = {id(t): places[inputs + outs + k].name for k, t in enumerate(found.held)}
    values = {n.name: n.meta["val"] for n in places}
    own = [n.name for n in places[:inputs]]
    of_held = [held.get(id(t)) for t in all_held]
    cotangents = [n.name for n in places[inputs : inputs + outs]]

    def ordered(*given):
        names = [*own, *of_held, *cotangents]
        by_name = dict(zip(names, given, strict=True))
        # unlike torch.func.functionalize, it knows ops of others that write, as kernels do
        functional = dispatch_functionalize(found.graph, FunctionalTensorMode())
        return functional(*[by_name[n.name] for n in places])

    like = [_real([values[n]])[0] for n in own]
    like += all_held
    like += [_real([values[n]])[0] for n in cotangents]
    with torch.no_grad(), _DisableAutocast():
        graph = make_fx(ordered, tracing_mode="fake")(*[fake(mode, t.detach()) for t in like])
    graph.graph.eliminate_dead_code()
    for k, node in enumerate([n for n in graph.graph.nodes if n.op == "placeholder"]):
        primals = inputs + len(all_held)
        node.target = f"primals_{k + 1}" if k < primals else f"tangents_{k - primals + 1}"
    graph.recompile()
    return graph


def _each_its_own(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What is one tensor as several, in the same memory: one may have a gradient, the other not."""
    seen: set[int] = set()
    own = []
    for t in tensors:
        own.append(t.detach() if id(t) in seen else t)
        seen.add(id(t))
    return tuple(own)


def _plain(cotangent: Tensor) -> Tensor:
    """Laid out as those that the backward was traced for, whatever autograd was given."""
    return cotangent.resolve_conj().resolve_neg().contiguous()


def differentiable(
    made: Joint, engine: str, like: Sequence[Tensor]
) -> tuple[Run, tuple[Built, Built]]:
    """A function of the tensors of a call's graph that autograd can differentiate, once, and what runs its graphs."""
    first = build(engine, made.forward, like)
    forward = first.run
    found = forward([t.detach() for t in like])
    cotangents = _real(found[: made.results])
    second = build(engine, made.backward, [*found[made.results :], *cotangents])
    backward = second.run
    constants = [k for k in range(made.results) if k not in made.differentiated]

    class CompiledCall(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            found = forward(list(tensors))
            answer = _each_its_own(found[: made.results])
            ctx.save_for_backward(*found[made.results :])
            ctx.mark_non_differentiable(*(answer[k] for k in constants))
            return answer

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, *cotangents):
            found = backward([*ctx.saved_tensors, *map(_plain, cotangents)])
            grads = [None] * len(ctx.needs_input_grad)
            for k, g in zip(made.gradients, found, strict=True):
                grads[k] = g
            return tuple(grads)

    def run(tensors: list[Tensor]) -> Sequence[Tensor]:
        with torch.enable_grad():  # which keeps no tensors of inference mode
            return CompiledCall.apply(*[t.clone() if t.is_inference() else t for t in tensors])

    return run, (first, second)
