"""The contenders: jactri and every other way to get the same Jacobian.

A `Peer` turns (workload, net) into a function of the input. Whatever belongs to one user's
one-time set-up (building a transform, compiling) happens there and is not timed.
Every function returns (N, *out, *in), or (N, *out, N, *in) for a workload in the drop-in shape.
Workloads that ask for something else have contenders of their own (see operators.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, jvp, vmap

import jactri

from . import operators, peers_jax
from .workloads import CPU, Workload, problem

Call = Callable[[Tensor], Tensor]
Make = Callable[[Workload, nn.Module], Call]

# A direction that needs this many times the seeds of the other cannot win and may not fit.
HOPELESS = 50


@dataclass(frozen=True)
class Peer:
    """A way to get a Jacobian.

    kind: "jactri", "torch" (out of the box), "compiled", "jax", "expert" (written by hand for
    this workload), or "reference" (not a Jacobian: timed for comparison, not checked).
    """

    name: str
    kind: str
    make: Make
    mode: str = ""  # "forward" or "reverse" where it is fixed
    func: bool = False  # built of torch.func alone, so torch.compile takes it whole
    only: tuple[str, ...] = ()  # the workloads it is written for
    built: bool = False  # of ours, by torch's compiler, which takes long

    def left_out(self, w: Workload) -> str:
        """Why this peer is not run on a workload, or "" if it is."""
        if self.mode == "forward":
            if w.no_forward and not self.name.startswith("jax"):
                return w.no_forward
            if w.columns > HOPELESS * w.rows:
                return f"{w.columns} seeds where reverse mode needs {w.rows}"
        if self.mode == "reverse" and w.rows > HOPELESS * w.columns:
            return f"{w.rows} seeds where forward mode needs {w.columns}"
        return ""


def _front(jac: Tensor, w: Workload) -> Tensor:
    """(*out, N, *in) to (N, *out, *in), as a view."""
    return jac.movedim(len(w.out_shape), 0)


def _summed(net: nn.Module) -> Call:
    """The network's output summed over the batch: one sweep then serves all samples."""
    return lambda x: net(x).sum(0)


def _shared(x: Tensor) -> Tensor:
    """A zero perturbation that all samples share: the forward-mode twin of the sum."""
    return torch.zeros(x.shape[1:], dtype=x.dtype, device=x.device)


def _jactri(w: Workload, net: nn.Module) -> Call:
    if w.full:
        return lambda x: jactri.jacobian(net, x)
    return lambda x: jactri.jacobian(net, x, per_sample=True)


def _jactri_out(w: Workload, net: nn.Module) -> Call:
    kept: list[Tensor] = []

    def call(x: Tensor) -> Tensor:
        if not kept:  # not before: where it has to lie is known from the input
            kept.append(torch.empty(w.shape, device=x.device))
        return jactri.jacobian(net, x, per_sample=True, out=kept[0])

    return call


def _jactri_compile(w: Workload, net: nn.Module, engine: str = "inductor") -> Call:
    made: list[Call] = []

    def call(x: Tensor) -> Tensor:
        if not made:
            made.append(jactri.compile(net, x, per_sample=True, engine=engine))
        return made[0](x)

    return call


def _functional(vectorize: bool, strategy: str = "reverse-mode") -> Make:
    """torch.autograd.functional.jacobian, of the sum or of the shared perturbation."""
    jacobian = torch.autograd.functional.jacobian

    def make(w: Workload, net: nn.Module) -> Call:
        how = {"vectorize": vectorize, "strategy": strategy}
        if w.full:
            return lambda x: jacobian(net, x, **how)
        if strategy == "forward-mode":
            return lambda x: jacobian(lambda e: net(x + e), _shared(x), **how)
        total = _summed(net)
        return lambda x: _front(jacobian(total, x, **how), w)

    return make


def _grad_loop(w: Workload, net: nn.Module, layout: torch.memory_format | None = None) -> Call:
    """What people write by hand: autograd.grad for one output at a time."""

    def call(x: Tensor) -> Tensor:
        x = x.detach().contiguous(memory_format=layout or torch.contiguous_format)
        x.requires_grad_()
        if w.full:
            y = net(x).reshape(-1)
            rows = [torch.autograd.grad(y[k], x, retain_graph=True)[0] for k in range(len(y))]
            return torch.stack(rows).reshape(w.shape)
        y = net(x).reshape(len(x), -1)
        rows = [torch.autograd.grad(y[:, k].sum(), x, retain_graph=True)[0] for k in range(w.rows)]
        return torch.stack(rows, 1).reshape(w.shape)

    return call


def _per_sample(transform: Callable[[Call], Call]) -> Make:
    """vmap of a transform, or the transform itself for the drop-in shape."""
    return lambda w, net: transform(net) if w.full else vmap(transform(net))


def _jacrev_sum(w: Workload, net: nn.Module) -> Call:
    transformed = jacrev(_summed(net))
    return lambda x: _front(transformed(x), w)


def _jacfwd_shared(w: Workload, net: nn.Module) -> Call:
    return lambda x: jacfwd(lambda e: net(x + e))(_shared(x))


def _forward(w: Workload, net: nn.Module) -> Call:
    """The forward pass, recorded by autograd: no Jacobian can be had for less."""
    leaf: dict[int, Tensor] = {}

    def call(x: Tensor) -> Tensor:
        if id(x) not in leaf:
            leaf[id(x)] = x.detach().requires_grad_()
        return net(leaf[id(x)])

    return call


def _dropin(jacobian: Callable[..., Tensor]) -> Make:
    """The one-line call without per_sample, for a batch of one."""
    return lambda w, net: lambda x: jacobian(net, x)


def _twice(w: Workload, net: nn.Module) -> Call:
    """The derivative of (x**2).sum(-1), by hand."""
    return lambda x: 2 * x


def _hand_split(w: Workload, net: nn.Module) -> Call:
    """W4 cut at its bottleneck by hand: the decoder forward, the encoder in reverse."""
    encoder, decoder = net[:4], net[4:]
    into, out_of = vmap(jacrev(encoder)), vmap(jacfwd(decoder))
    return lambda x: torch.bmm(out_of(encoder(x)), into(x))


def _hand_coloured(w: Workload, net: nn.Module) -> Call:
    """W6 with 49 coloured seeds: pixels 7 apart do not share an output pixel."""
    side, reach, period = w.in_shape[-1], 3, 7
    place = next(net.parameters()).device
    seeds = torch.zeros(period * period, *w.in_shape, device=place)
    for a in range(period):
        for b in range(period):
            seeds[a * period + b, 0, a::period, b::period] = 1
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    offset = torch.arange(-reach, reach + 1)
    oy = (y.reshape(-1, 1) + offset.repeat_interleave(period)).flatten()
    ox = (x.reshape(-1, 1) + offset.repeat(period)).flatten()
    inside = (oy >= 0) & (oy < side) & (ox >= 0) & (ox < side)
    pixel = torch.arange(side * side).repeat_interleave(period * period)[inside]
    out = (oy * side + ox)[inside]
    colour = (y % period * period + x % period).flatten()
    source = colour[pixel] * side * side + out
    target = out * side * side + pixel
    source, target = source.to(place), target.to(place)

    def call(images: Tensor) -> Tensor:
        def along(seed: Tensor) -> Tensor:
            return jvp(net, (images,), (seed.expand_as(images),))[1]

        packed = vmap(along)(seeds).transpose(0, 1).reshape(len(images), -1)
        jac = images.new_zeros(len(images), math.prod(w.in_shape) ** 2)
        jac[:, target] = packed[:, source]
        return jac.view(w.shape)

    return call


def _channels_last(w: Workload, net: nn.Module) -> Call:
    """W5 by an autograd.grad loop in the layout that convolutions like."""
    return _grad_loop(w, net, torch.channels_last)


JACTRI = Peer("jactri", "jactri", _jactri)
JACTRI_OUT = Peer("jactri out=", "jactri", _jactri_out)
JACTRI_COMPILE = Peer("jactri compile", "jactri", _jactri_compile, built=True)
JACTRI_AOT = Peer("jactri aot", "jactri", partial(_jactri_compile, engine="aot"), built=True)
FORWARD = Peer("forward pass", "reference", _forward)

TORCH = (
    Peer("functional loop", "torch", _functional(False), "reverse"),
    Peer("functional vectorize", "torch", _functional(True), "reverse"),
    Peer("functional forward", "torch", _functional(True, "forward-mode"), "forward"),
    Peer("grad loop", "torch", _grad_loop, "reverse"),
    Peer("vmap(jacrev)", "torch", _per_sample(jacrev), "reverse", func=True),
    Peer("vmap(jacfwd)", "torch", _per_sample(jacfwd), "forward", func=True),
    Peer("jacrev of sum", "torch", _jacrev_sum, "reverse", func=True),
    Peer("jacfwd of f(x+e)", "torch", _jacfwd_shared, "forward", func=True),
)
TORCH_FULL = tuple(p for p in TORCH if p.name.startswith("functional") or "loop" in p.name) + (
    Peer("jacrev", "torch", _per_sample(jacrev), "reverse", func=True),
    Peer("jacfwd", "torch", _per_sample(jacfwd), "forward", func=True),
)
EXPERT = (
    Peer("2*x", "expert", _twice, only=("square",)),
    Peer("hand-split", "expert", _hand_split, only=("W4",)),
    Peer("hand-coloured", "expert", _hand_coloured, only=("W6-n1", "W6-n4")),
    Peer("grad loop channels_last", "expert", _channels_last, only=("W5",)),
)
OVERHEAD = (
    JACTRI,
    JACTRI_COMPILE,
    JACTRI_AOT,
    Peer("jactri drop-in call", "jactri", _dropin(jactri.jacobian)),
    Peer("vmap(jacrev)", "torch", _per_sample(jacrev), "reverse", func=True),
    Peer("functional loop", "torch", _dropin(torch.autograd.functional.jacobian), "reverse"),
    FORWARD,
)
OWN = (
    Peer("jactri", "jactri", operators.ours),
    Peer("jactri compile", "jactri", operators.ours_compiled, built=True),
    Peer("jactri aot", "jactri", partial(operators.ours_compiled, engine="aot"), built=True),
)
BY_OPERATOR = {
    operators.LAPLACIAN: (
        *OWN,
        Peer("vmap(hessian) trace", "torch", operators.hessian_trace, func=True),
        Peer("jvp of vmap(grad)", "torch", operators.jvp_of_grad, func=True),
        Peer("jvp of jvp", "torch", operators.jvp_of_jvp, func=True),
        Peer("grad of grad loop", "torch", operators.grad_of_grad),
    ),
    operators.DIVERGENCE: (
        *OWN,
        Peer("vmap(trace of jacrev)", "torch", operators.trace_of_jacrev, func=True),
        Peer("vmap(trace of jacfwd)", "torch", operators.trace_of_jacfwd, func=True),
        Peer("grad loop", "torch", operators.trace_by_loop),
        Peer("bilinear by hand", "expert", operators.bilinear),
    ),
    operators.PARAMETERS: (
        *OWN,
        Peer("jactri out=", "jactri", operators.parameters_out),
        Peer("jactri compile out=", "jactri", operators.parameters_compiled_out, built=True),
        Peer(
            "jactri aot out=",
            "jactri",
            partial(operators.parameters_compiled_out, engine="aot"),
            built=True,
        ),
        Peer("vmap(jacrev)", "torch", operators.parameters_by_func, func=True),
    ),
    operators.KERNEL: (
        *OWN,
        Peer("vmap(jacrev), einsum", "torch", operators.kernel_by_contraction, func=True),
        Peer("vmap(jacrev), matmul", "torch", operators.kernel_by_matmul, func=True),
    ),
}
JAX_OPERATORS = {
    operators.LAPLACIAN: Peer("jax vmap(hessian) trace", "jax", peers_jax.laplacian),
    operators.DIVERGENCE: Peer("jax vmap(trace of jacfwd)", "jax", peers_jax.divergence),
    operators.KERNEL: Peer("jax vmap(jacrev), matmul", "jax", peers_jax.kernel),
}
# All under jax.jit. lax.map takes the batch in pieces that stay in the cache.
PIECE = 64
JAX = (
    Peer("jax vmap(jacrev)", "jax", peers_jax.make("jacrev"), "reverse"),
    Peer("jax vmap(jacfwd)", "jax", peers_jax.make("jacfwd"), "forward"),
)
JAX_MAP = (
    Peer("jax lax.map(jacrev)", "expert", peers_jax.make("jacrev", PIECE), "reverse"),
    Peer("jax lax.map(jacfwd)", "expert", peers_jax.make("jacfwd", PIECE), "forward"),
)
JAX_EXPERT = (Peer("jax hand-split", "expert", peers_jax.hand_split, only=("W4",)),)
JAX_FULL = (
    Peer("jax jacrev", "jax", peers_jax.make("jacrev"), "reverse"),
    Peer("jax jacfwd", "jax", peers_jax.make("jacfwd"), "forward"),
)


def contender(
    w: Workload, peer: Peer, device: torch.device = CPU, wait: Callable[[], Any] = lambda: None
) -> Callable[[], Any]:
    """A peer's call on a workload's own network and input. `wait` returns when the device is done."""
    net, x = problem(w, device)
    made = peer.make(w, net)

    def call() -> Any:
        result = made(x)
        wait()
        return result

    return call


def peers_of(w: Workload, device: torch.device = CPU) -> tuple[list[Peer], dict[str, str]]:
    """The peers to run on a workload, jactri first, and those left out with the reason."""
    jax = peers_jax.available(device)
    if w.operator is not None:
        own = BY_OPERATOR[w.operator]
        return [*own, *(p for o, p in JAX_OPERATORS.items() if jax and o == w.operator)], {}
    if w.name == "overhead":
        return [*OVERHEAD, *(JAX[:1] if jax else ())], {}
    if w.full:
        pool: tuple[Peer, ...] = (JACTRI, *TORCH_FULL, *(JAX_FULL if jax else ()))
    else:
        own = (JACTRI, JACTRI_OUT)
        own += (JACTRI_COMPILE, JACTRI_AOT)
        pool = (*own, *TORCH, *(p for p in EXPERT if w.name in p.only))
        if jax:
            pool += JAX + (JAX_MAP if w.samples > PIECE else ())
            pool += tuple(p for p in JAX_EXPERT if w.name in p.only)
    if w.name == "square":
        pool += (FORWARD,)
    reasons = {p.name: p.left_out(w) for p in pool}
    return (
        [p for p in pool if not reasons[p.name]],
        {name: reason for name, reason in reasons.items() if reason},
    )


def compiled(peer: Peer) -> Peer:
    """The same peer under torch.compile."""

    def make(w: Workload, net: nn.Module) -> Call:
        # Compiled code is counted by the Python function, which all workloads share: without a
        # reset the ninth workload would pass the limit of recompilations and run eagerly.
        torch.compiler.reset()
        return torch.compile(peer.make(w, net), dynamic=False)

    return Peer(f"compile {peer.name}", "compiled", make, peer.mode)


def preferred(w: Workload) -> Peer:
    """The peer to compile where no time is known: what a goal names, else the fewer seeds."""
    able = [p for p in peers_of(w)[0] if p.func]
    for p in able:
        if w.goal and w.goal.peer == f"compile {p.name}":
            return p
    mode = "forward" if w.columns < w.rows else "reverse"
    return next((p for p in able if p.mode == mode), able[0])


def to_compile(w: Workload, seconds: dict[str, float]) -> Peer | None:
    """The peer that torch.compile gets: the one a goal names, else the fastest it can take."""
    if w.goal and w.goal.peer.startswith("compile "):
        return preferred(w)
    able = [p for p in peers_of(w)[0] if p.func and p.name in seconds]
    return min(able, key=lambda p: seconds[p.name], default=None)
