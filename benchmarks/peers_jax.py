"""JAX peers, only where jax is installed: `jit(vmap(jacrev))` and `jit(vmap(jacfwd))`.

The torch module is rewritten as a JAX function of (weights, sample), so that XLA treats the
weights as arguments and not as constants.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .nets import SumOfSquares, TransformerBlock

JaxFunction = Callable[[Any, Any], Any]


def available() -> bool:
    """Whether jax can be imported."""
    return importlib.util.find_spec("jax") is not None


def version() -> str | None:
    """jax's version, or None where it is missing."""
    if not available():
        return None
    import jax

    return jax.__version__


def make(transform: str) -> Callable:
    """The maker of a peer: "jacrev" or "jacfwd" under vmap under jit."""

    def maker(_workload, net: nn.Module) -> Callable[[Tensor], Any]:
        import jax
        import jax.numpy as jnp

        weights, function = translate(net)
        per_sample = getattr(jax, transform)(function, argnums=1)
        run = jax.jit(jax.vmap(per_sample, in_axes=(None, 0)))
        moved: dict[int, Any] = {}

        def call(x: Tensor) -> Any:
            if id(x) not in moved:
                moved[id(x)] = jnp.asarray(x.numpy())
            return run(weights, moved[id(x)]).block_until_ready()

        return call

    return maker


def translate(net: nn.Module) -> tuple[Any, JaxFunction]:
    """A torch module as (weights, function of weights and one sample)."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    def array(t: Tensor):
        return jnp.asarray(t.detach().numpy())

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
