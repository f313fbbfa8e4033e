"""JAX peers, only where jax is installed: `jacrev` and `jacfwd` under `vmap` or `lax.map`, in `jit`.

The torch module is rewritten as a JAX function of (weights, sample), so that XLA treats the
weights as arguments and not as constants.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .nets import SumOfSquares, TransformerBlock

JaxFunction = Callable[[Any, Any], Any]
Call = Callable[[Tensor], Any]


def installed() -> bool:
    """Whether jax can be imported."""
    return importlib.util.find_spec("jax") is not None


def available(device: torch.device) -> bool:
    """Whether jax can compute on this device; if not, it is no peer there."""
    if not installed():
        return False
    if device.type == "cpu":
        return True
    # What jax takes at its first use would not be there for torch.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        return bool(_devices(device))
    except RuntimeError:  # a jax without that backend
        return False


def _devices(device: torch.device) -> list[Any]:
    import jax

    return jax.devices("cpu" if device.type == "cpu" else "gpu")


def version() -> str | None:
    """jax's version, or None where it is missing."""
    if not installed():
        return None
    import jax

    return jax.__version__


def make(transform: str, piece: int | None = None) -> Callable:
    """The maker of a peer: "jacrev" or "jacfwd", of the samples at once or so many at a time.

    In the drop-in shape the transform is taken of the whole batch.
    """

    def maker(workload, net: nn.Module) -> Call:
        import jax

        weights, function = translate(net)
        jacobian = getattr(jax, transform)
        if workload.full:
            batch = jacobian(jax.vmap(function, in_axes=(None, 0)), argnums=1)
        elif piece:
            per_sample = jacobian(function, argnums=1)

            def batch(w, xs):
                return jax.lax.map(lambda x: per_sample(w, x), xs, batch_size=piece)
        else:
            batch = jax.vmap(jacobian(function, argnums=1), in_axes=(None, 0))
        return _jitted(batch, weights)

    return maker


def hand_split(_workload, net: nn.Module) -> Call:
    """W4 cut at its bottleneck by hand: the decoder forward, the encoder in reverse."""
    import jax

    (first, encode), (second, decode) = translate(net[:4]), translate(net[4:])

    def one(weights, x):
        into = jax.jacrev(encode, argnums=1)(weights[0], x)
        return jax.jacfwd(decode, argnums=1)(weights[1], encode(weights[0], x)) @ into

    return _jitted(jax.vmap(one, in_axes=(None, 0)), (first, second))


def laplacian(_workload, net: nn.Module) -> Call:
    """Gradient and Hessian's trace of each sample."""
    import jax
    import jax.numpy as jnp

    weights, function = translate(net)

    def one(w, v):
        def f(u):
            return function(w, u)[0]

        return jax.grad(f)(v), jnp.trace(jax.hessian(f)(v))

    def joined(w, x):
        g, lap = jax.vmap(one, in_axes=(None, 0))(w, x)
        return jnp.concatenate([g, lap[:, None]], 1)

    return _jitted(joined, weights)


def divergence(_workload, net: nn.Module) -> Call:
    """The Jacobian's trace of each sample."""
    import jax
    import jax.numpy as jnp

    weights, function = translate(net)

    def one(w, v):
        return jnp.trace(jax.jacfwd(function, argnums=1)(w, v))

    return _jitted(jax.vmap(one, in_axes=(None, 0)), weights)


def kernel(workload, net: nn.Module) -> Call:
    """The empirical tangent kernel, a product a parameter."""
    import jax

    weights, function = translate(net)
    n, m = workload.samples, workload.rows

    def whole(w, x):
        jac = jax.vmap(jax.jacrev(function), in_axes=(None, 0))(w, x)
        total = sum((j := leaf.reshape(n * m, -1)) @ j.T for leaf in jax.tree.leaves(jac))
        return total.reshape(n, m, n, m).transpose(0, 2, 1, 3)

    return _jitted(whole, weights)


def _jitted(function: JaxFunction, weights: Any) -> Call:
    """A call that moves its input once and returns when the result is there."""
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")  # a GPU would take tf32
    run = jax.jit(function)
    moved: dict[int, Any] = {}

    def call(x: Tensor) -> Any:
        if id(x) not in moved:
            moved[id(x)] = jax.device_put((weights, x.cpu().numpy()), _devices(x.device)[0])
        return run(*moved[id(x)]).block_until_ready()

    return call


def translate(net: nn.Module) -> tuple[Any, JaxFunction]:
    """A torch module as (weights, function of weights and one sample)."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    def array(t: Tensor):
        return t.detach().cpu().numpy()

    if isinstance(net, nn.Sequential):
        parts = [translate(m) for m in net]

        def chain(weights, v):
            for w, (_, f) in zip(weights, parts, strict=True):
                v = f(w, v)
            return v

        return [w for w, _ in parts], chain
    if isinstance(net, nn.Linear):
        return (array(net.weight), array(net.bias)), lambda w, v: v @ w[0].T + w[1]
    if isinstance(net, nn.Conv2d):
        stride, pad = net.stride, [(p, p) for p in net.padding]
        names = ("NCHW", "OIHW", "NCHW")

        def conv(w, v):
            y = lax.conv_general_dilated(v[None], w[0], stride, pad, dimension_numbers=names)
            return y[0] + w[1][:, None, None]

        return (array(net.weight), array(net.bias)), conv
    if isinstance(net, nn.LayerNorm):
        eps = net.eps

        def norm(w, v):
            c = v - v.mean(-1, keepdims=True)
            return c * lax.rsqrt((c * c).mean(-1, keepdims=True) + eps) * w[0] + w[1]

        return (array(net.weight), array(net.bias)), norm
    if isinstance(net, TransformerBlock):
        names = ("norm1", "q", "k", "v", "o", "norm2", "up", "down")
        parts = {n: translate(getattr(net, n)) for n in names}
        heads = net.heads

        def block(weights, x):
            def part(n, v):
                return parts[n][1](weights[n], v)

            def split(v):
                return v.reshape(len(v), heads, -1).transpose(1, 0, 2)

            h = part("norm1", x)
            q, k, v = (split(part(n, h)) for n in "qkv")
            a = jax.nn.softmax(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]), -1) @ v
            x = x + part("o", a.transpose(1, 0, 2).reshape(x.shape))
            up = jax.nn.gelu(part("up", part("norm2", x)), approximate=False)
            return x + part("down", up)

        return {n: w for n, (w, _) in parts.items()}, block
    plain = {
        nn.Tanh: jnp.tanh,
        nn.SiLU: jax.nn.silu,
        nn.Sigmoid: jax.nn.sigmoid,
        nn.ReLU: lambda v: jnp.maximum(v, 0),
        nn.Flatten: lambda v: v.reshape(-1),
        SumOfSquares: lambda v: (v**2).sum(-1),
    }
    function = plain.get(type(net))
    if function is None:
        raise TypeError(f"no JAX translation of {type(net).__name__}")
    return (), lambda _w, v: function(v)
