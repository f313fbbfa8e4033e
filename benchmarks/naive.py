"""What people write without jactri, beside its call: a loop of backward passes, torch's own forward mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import jactri

Function = Callable[[Tensor], Tensor]
Limit = str | int | None

FORWARD = "forward mode"


@dataclass(frozen=True)
class Given:
    """One case, made.

    forward: runs the function as autograd records it, and returns its output: what `memory_limit` does not count.
    ours: jactri's call under a `memory_limit`.
    peers: the others.
    plan: what jactri predicts, for the calls that `jactri.explain` knows.
    """

    forward: Callable[[], Any]
    ours: Callable[[Limit], Tensor]
    peers: Mapping[str, Callable[[], Tensor]]
    plan: Callable[[], jactri.Explanation] | None = None


def draw(dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal numbers, which float32 holds."""
    return torch.randn(shape).to(dtype)


def frozen(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module in eval mode whose parameters are constants."""
    return net.to(dtype).eval().requires_grad_(False)


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def entries(y: Tensor) -> Iterator[Tensor]:
    """One after another: iterating over a tensor would unbind it, and each backward pass stack them all again."""
    flat = y.reshape(-1)
    return (flat[k] for k in range(len(flat)))


def grad_rows(f: Function, x: Tensor) -> Tensor:
    """The whole Jacobian, a backward pass an output."""
    x = leaf(x)
    y = f(x)
    rows = [torch.autograd.grad(v, x, retain_graph=True)[0] for v in entries(y)]
    return torch.stack(rows).reshape(*y.shape, *x.shape)


def sample_rows(f: Function, x: Tensor) -> Tensor:
    """Each sample's Jacobian ``(N, out, in)``, a backward pass an output of one sample."""
    x = leaf(x)
    y = f(x).flatten(1)
    heads = (y[:, k].sum() for k in range(y.shape[1]))
    return torch.stack([torch.autograd.grad(h, x, retain_graph=True)[0] for h in heads], 1)


def forward_columns(f: Function, x: Tensor) -> Tensor:
    """The whole Jacobian by torch's forward mode."""
    jacobian = torch.autograd.functional.jacobian
    return jacobian(f, x, vectorize=True, strategy="forward-mode")


def parameter_rows(f: Callable[[], Tensor], params: Sequence[Tensor]) -> Tensor:
    """``(outputs, parameters)``, a backward pass an output."""
    rows = (torch.autograd.grad(v, params, retain_graph=True) for v in entries(f()))
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def trace_of_gradient(f: Function, x: Tensor) -> Tensor:
    """The Laplacian of each sample, two backward passes a coordinate."""
    x = leaf(x)
    (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    g = g.flatten(1)
    heads = (g[:, k].sum() for k in range(g.shape[1]))
    rows = (torch.autograd.grad(h, x, retain_graph=True)[0].flatten(1) for h in heads)
    return sum(row[:, k] for k, row in enumerate(rows))


def whole(f: Function, x: Tensor, forward: bool = True) -> Given:
    """`jactri.jacobian` in the drop-in shape. `forward`: whether torch's forward mode knows all ops."""
    peers = {"grad loop": lambda: grad_rows(f, x)}
    if forward:
        peers[FORWARD] = lambda: forward_columns(f, x)
    return Given(
        lambda: f(leaf(x)),
        lambda limit: jactri.jacobian(f, x, memory_limit=limit),
        peers,
        lambda: jactri.explain(f, x),
    )


def of_samples(f: Function, x: Tensor, **peers: Callable[[], Tensor]) -> Given:
    """`jactri.jacobian` of each sample."""
    return Given(
        lambda: f(leaf(x)),
        lambda limit: jactri.jacobian(f, x, per_sample=True, memory_limit=limit),
        {"grad loop": lambda: sample_rows(f, x), **peers},
        lambda: jactri.explain(f, x, per_sample=True),
    )


def pulled(f: Function, x: Tensor) -> Given:
    """`jactri.vjp` with one cotangent."""
    c = draw(x.dtype, *f(x).shape)

    def by_torch() -> Tensor:
        v = leaf(x)
        return torch.autograd.grad(f(v), v, c)[0]

    return Given(
        lambda: f(leaf(x)),
        lambda limit: jactri.vjp(f, x, c, memory_limit=limit)[1],
        {"autograd.grad": by_torch},
    )


def pushed(f: Function, x: Tensor) -> Given:
    """`jactri.jvp` with one tangent."""
    v = draw(x.dtype, *x.shape)
    return Given(
        lambda: f(leaf(x)),
        lambda limit: jactri.jvp(f, x, v, memory_limit=limit)[1],
        {"functional.jvp": lambda: torch.autograd.functional.jvp(f, x, v)[1]},
    )


def traced(f: Function, x: Tensor) -> Given:
    """`jactri.laplacian`."""
    return Given(
        lambda: f(leaf(x)),
        lambda limit: jactri.laplacian(f, x, memory_limit=limit),
        {"grad loop": lambda: trace_of_gradient(f, x)},
    )
