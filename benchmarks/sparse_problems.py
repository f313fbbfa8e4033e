"""Sparse Jacobians on which tools for them are measured, for torch and JAX by the same lines: see `benchmarks.sparse`.

A problem is a function of sizes and of a `Namespace`: what arrays are made and joined by. It returns the function and
the point, float64, as NumPy has it; JAX is given the function of flat vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import nets

Array = Any
Function = Callable[[Array], Array]


class Namespace(Protocol):
    """What torch and JAX call by different names; everything else are operators and methods of arrays."""

    array: Callable[[np.ndarray], Array]
    concatenate: Callable[..., Array]
    stack: Callable[..., Array]
    roll: Callable[..., Array]
    zeros: Callable[..., Array]
    sin: Callable[[Array], Array]
    cos: Callable[[Array], Array]
    sqrt: Callable[[Array], Array]
    tanh: Callable[[Array], Array]
    relu: Callable[[Array], Array]

    def add_at(self, x: Array, index: Array, values: Array) -> Array: ...

    def conv(self, x: Array, weight: Array, padding: int) -> Array: ...


class _Torch:
    array, concatenate, stack, roll = map(
        staticmethod, (torch.from_numpy, torch.cat, torch.stack, torch.roll)
    )
    sin, cos, sqrt, tanh, relu = map(
        staticmethod, (torch.sin, torch.cos, torch.sqrt, torch.tanh, torch.relu)
    )

    @staticmethod
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64)

    @staticmethod
    def add_at(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
        return x.index_add(0, index, values)

    @staticmethod
    def conv(x: Tensor, weight: Tensor, padding: int) -> Tensor:
        """Of images (or lines) ``(1, channels, *size)``."""
        return (F.conv1d if x.dim() == 3 else F.conv2d)(x, weight, padding=padding)


TORCH: Namespace = _Torch()


def jax_names() -> Namespace:
    """JAX's, in float64."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)

    class Jax:
        array, concatenate, stack, roll = map(
            staticmethod, (jnp.asarray, jnp.concatenate, jnp.stack, jnp.roll)
        )
        sin, cos, sqrt, tanh = map(staticmethod, (jnp.sin, jnp.cos, jnp.sqrt, jnp.tanh))

        @staticmethod
        def zeros(*shape):
            return jnp.zeros(shape)

        @staticmethod
        def relu(x):
            return jnp.maximum(x, 0)

        @staticmethod
        def add_at(x, index, values):
            return x.at[index].add(values)

        @staticmethod
        def conv(x, weight, padding):
            ends = [(padding, padding)] * (x.ndim - 2)
            names = ("NCHW", "OIHW", "NCHW") if x.ndim == 4 else ("NCH", "OIH", "NCH")
            return jax.lax.conv_general_dilated(
                x, weight, (1,) * (x.ndim - 2), ends, dimension_numbers=names
            )

    return Jax()


@dataclass(frozen=True)
class Problem:
    """A function and a point, at ``sizes``, or those of ``quick`` for tests."""

    name: str
    title: str
    make: Callable[..., tuple[Function, np.ndarray]]
    sizes: Mapping[str, int]
    quick: Mapping[str, int]

    def given(self, quick: bool, names: Namespace = TORCH) -> tuple[Function, np.ndarray]:
        """The function and its point: the same numbers at every call."""
        return self.make(
            names, np.random.default_rng(nets.SEED), **(self.quick if quick else self.sizes)
        )

    def torch(self, quick: bool = False) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        function, x = self.given(quick)
        return function, torch.from_numpy(x)

    def flat(self, quick: bool, names: Namespace) -> tuple[Function, np.ndarray]:
        """Of a vector, as a vector."""
        function, x = self.given(quick, names)
        return lambda v: function(v.reshape(x.shape)).reshape(-1), x.reshape(-1)


# ---- differential equations on grids


def brusselator_line(xp: Namespace, rng, n: int):
    """Hairer and Wanner, Solving Ordinary Differential Equations II, IV.1: ends are held at 1 and 3."""
    scale = 0.02 * (n + 1) ** 2
    ends = [xp.array(np.full(1, v)) for v in (1.0, 3.0)]

    def rate(w):
        u, v = w[0], w[1]
        wider = [xp.concatenate([e, part, e]) for e, part in zip(ends, (u, v), strict=True)]
        du, dv = (scale * (p[:-2] - 2 * p[1:-1] + p[2:]) for p in wider)
        return xp.stack([1 + u * u * v - 4 * u + du, 3 * u - u * u * v + dv])

    at = np.arange(1, n + 1) / (n + 1)
    return rate, np.stack([1 + np.sin(2 * np.pi * at), np.full(n, 3.0)]) + 0.1 * rng.random((2, n))


def brusselator(xp: Namespace, rng, n: int):
    """On a torus of n x n cells, as SciML's and asdex' examples have it."""
    scale = 10.0 * n * n

    def spread(w):
        near = xp.roll(w, 1, 0) + xp.roll(w, -1, 0) + xp.roll(w, 1, 1) + xp.roll(w, -1, 1)
        return scale * (near - 4 * w)

    def rate(w):
        u, v = w[0], w[1]
        du = 1 + u * u * v - 4.4 * u + spread(u)
        return xp.stack([du, 3.4 * u - u * u * v + spread(v)])

    x = np.arange(n) / n
    u = 22 * (x * (1 - x))[:, None] ** 1.5 + 0 * x
    v = 27 * (x * (1 - x)) ** 1.5 + 0 * x[:, None]
    return rate, np.stack([u, v]) + 0.1 * rng.random((2, n, n))


def heat_line(xp: Namespace, rng, n: int):
    """With both ends at zero, as in asdex' benchmark."""

    def rate(u):
        left, right = u[1:2] - 2 * u[:1], u[-2:-1] - 2 * u[-1:]
        return xp.concatenate([left, u[:-2] - 2 * u[1:-1] + u[2:], right])

    return rate, rng.random(n)


def heat(xp: Namespace, rng, n: int):
    """Conduction that grows with temperature, five points, borders at zero."""

    def rate(u):
        line, column = xp.zeros(1, n), xp.zeros(n, 1)
        down = xp.concatenate([line, u, line], 0)
        across = xp.concatenate([column, u, column], 1)
        flow = (1 + (down[1:] + down[:-1]) ** 2) * (down[1:] - down[:-1])
        side = (1 + (across[:, 1:] + across[:, :-1]) ** 2) * (across[:, 1:] - across[:, :-1])
        return flow[1:] - flow[:-1] + side[:, 1:] - side[:, :-1]

    return rate, rng.random((n, n))


def mesh(xp: Namespace, rng, n: int):
    """Finite volumes: n^3 cells, which a list of faces knows by number alone."""
    cells = np.arange(n**3).reshape(n, n, n)
    left, right = (
        xp.array(np.concatenate([np.take(cells, part, a).reshape(-1) for a in range(3)]))
        for part in (np.arange(n - 1), np.arange(1, n))
    )

    def residual(u):
        flux = (1 + 0.25 * (u[left] + u[right]) ** 2) * (u[left] - u[right])
        return xp.add_at(xp.add_at(u, left, flux), right, -flux)

    return residual, rng.random(n**3)


# ---- by their shape


def arrowhead(xp: Namespace, rng, n: int):
    """A dense row, a dense column and the diagonal."""

    def residual(x):
        rest = x[1:] ** 3 + x[:1] * x[1:]
        return xp.concatenate([(x * x).sum(0).reshape(1), rest])

    return residual, rng.random(n)


def banded(xp: Namespace, rng, n: int, width: int):
    """So many neighbours at each side, in a ring."""
    weights = rng.random(2 * width + 1).tolist()

    def residual(x):
        y = x * x
        return sum(w * xp.roll(y, d - width, 0) for d, w in enumerate(weights)) - xp.sin(x)

    return residual, rng.random(n)


def rosenbrock(xp: Namespace, rng, n: int):
    """The gradient of Rosenbrock's function: its Jacobian is the Hessian."""

    def gradient(x):
        gap = x[1:] - x[:-1] ** 2
        first = 2 * (x[:-1] - 1) - 400 * x[:-1] * gap
        return xp.concatenate([first, xp.zeros(1)]) + xp.concatenate([xp.zeros(1), 200 * gap])

    return gradient, rng.random(n)


# ---- by index


def bundle(xp: Namespace, rng, cameras: int, points: int, seen: int):
    """Snavely's camera: rotation, translation, focal length, two distortions. ``seen``: by how many a point is."""
    camera = xp.array(np.concatenate([rng.permutation(cameras)[:seen] for _ in range(points)]))
    point = xp.array(np.arange(points).repeat(seen))
    split = 9 * cameras

    def residual(x):
        eyes, places = x[:split].reshape(cameras, 9)[camera], x[split:].reshape(points, 3)[point]
        turn, p = eyes[:, :3], places
        angle = xp.sqrt((turn * turn).sum(1))[:, None]
        axis = turn / angle
        along = (axis * p).sum(1)[:, None]
        cross = xp.stack(
            [
                axis[:, (i + 1) % 3] * p[:, (i + 2) % 3] - axis[:, (i + 2) % 3] * p[:, (i + 1) % 3]
                for i in range(3)
            ],
            1,
        )
        p = p * xp.cos(angle) + cross * xp.sin(angle) + axis * along * (1 - xp.cos(angle))
        p = p + eyes[:, 3:6]
        image = -p[:, :2] / p[:, 2:]
        far = (image * image).sum(1)[:, None]
        return eyes[:, 6:7] * (1 + far * (eyes[:, 7:8] + far * eyes[:, 8:9])) * image

    eyes = np.concatenate(
        [
            0.1 + 0.2 * rng.random((cameras, 3)), rng.random((cameras, 2)), 6 + rng.random((cameras, 1)),
            500 + 10 * rng.random((cameras, 1)), 0.01 * rng.random((cameras, 2)),
        ], 1,
    )  # fmt: skip
    return residual, np.concatenate([eyes.reshape(-1), rng.random(3 * points)])


def graph(xp: Namespace, rng, nodes: int, edges: int, features: int):
    """A layer of a graph network: messages along directed edges."""
    source, target = (xp.array(rng.integers(nodes, size=edges)) for _ in range(2))
    weight = xp.array(rng.standard_normal((features, features)))

    def layer(x):
        return xp.add_at(x, target, xp.tanh(x[source] @ weight))

    return layer, rng.standard_normal((nodes, features))


# ---- convolutions


def image(xp: Namespace, rng, size: int, channels: int):
    """Image to image by three 3 x 3 convolutions with ReLU between: the network of W6."""
    counts = (1, channels, channels, 1)
    kernels = [
        xp.array(rng.standard_normal((o, i, 3, 3)) / np.sqrt(9 * i)) for i, o in pairwise(counts)
    ]

    def network(x):
        for k, kernel in enumerate(kernels):
            x = xp.conv(xp.relu(x) if k else x, kernel, 1)
        return x

    return network, rng.standard_normal((1, 1, size, size))


def line(xp: Namespace, rng, n: int):
    """Three convolutions along a line, of 8, 4 and 2 channels, as in asdex' benchmark."""
    shapes = ((8, 1, 5), (4, 8, 3), (2, 4, 3))
    kernels = [xp.array(rng.standard_normal(s) / np.sqrt(s[1] * s[2])) for s in shapes]

    def network(x):
        for kernel in kernels:
            x = xp.relu(xp.conv(x, kernel, kernel.shape[-1] // 2))
        return x

    return network, rng.standard_normal((1, 1, n))


PROBLEMS = (
    Problem("heat-line", "heat, a line of 2000", heat_line, {"n": 2000}, {"n": 9}),
    Problem("heat", "nonlinear heat, 64 x 64", heat, {"n": 64}, {"n": 5}),
    Problem("brusselator-line", "Brusselator, a line of 2 x 1000", brusselator_line, {"n": 1000}, {"n": 7}),
    Problem("brusselator", "Brusselator, 2 x 32 x 32", brusselator, {"n": 32}, {"n": 6}),
    Problem("brusselator-large", "Brusselator, 2 x 128 x 128", brusselator, {"n": 128}, {"n": 5}),
    Problem("mesh", "finite volumes, 24 x 24 x 24 cells", mesh, {"n": 24}, {"n": 3}),
    Problem("arrowhead", "arrowhead, n = 1000", arrowhead, {"n": 1000}, {"n": 11}),
    Problem(
        "tridiagonal", "ring with three diagonals, n = 10,000", banded,
        {"n": 10_000, "width": 1}, {"n": 12, "width": 1},
    ),
    Problem(
        "banded", "ring with eleven diagonals, n = 10,000", banded,
        {"n": 10_000, "width": 5}, {"n": 14, "width": 2},
    ),
    Problem("rosenbrock", "Rosenbrock's gradient, n = 5000", rosenbrock, {"n": 5000}, {"n": 8}),
    Problem(
        "bundle", "bundle adjustment, 20 cameras, 500 points, 3000 observations", bundle,
        {"cameras": 20, "points": 500, "seen": 6}, {"cameras": 3, "points": 4, "seen": 2},
    ),
    Problem(
        "graph", "graph network, 1000 nodes of 4, 3000 edges", graph,
        {"nodes": 1000, "edges": 3000, "features": 4}, {"nodes": 6, "edges": 9, "features": 2},
    ),
    Problem(
        "image", "image to image 1 x 32 x 32, three conv3x3, 16 channels", image,
        {"size": 32, "channels": 16}, {"size": 8, "channels": 2},
    ),
    Problem("line", "three convolutions along a line of 200", line, {"n": 200}, {"n": 20}),
)  # fmt: skip


def select(names: list[str]) -> list[Problem]:
    """The problems of these names (none: all). Raises KeyError."""
    known = {p.name: p for p in PROBLEMS}
    if missing := [n for n in names if n not in known]:
        raise KeyError(f"no problem {missing[0]}; there are {', '.join(known)}")
    return [known[n] for n in names] or list(PROBLEMS)
