"""A row of the op table: a function, what it is called with, and what is true of it.

Values are drawn in float32 and then widened, so that the float32 and the float64 Jacobian of a case
are Jacobians at the very same point.
"""

import copy
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class In:
    """An input: its shape and where its values lie."""

    shape: tuple
    domain: str = "normal"
    values: tuple = ()

    def draw(self, generator):
        shape = self.shape
        count = torch.Size(shape).numel()
        uniform = torch.rand(shape, generator=generator)
        if self.domain == "values":
            return torch.tensor(self.values, dtype=torch.float32).reshape(shape)
        if self.domain == "normal":
            return torch.randn(shape, generator=generator)
        if self.domain == "positive":
            return 0.5 + 1.5 * uniform
        if self.domain == "unit":
            return 0.05 + 0.9 * uniform
        if self.domain == "symmetric":
            return 1.9 * uniform - 0.95
        if self.domain == "above one":
            return 1.1 + 2 * uniform
        if self.domain == "away from zero":
            return (0.3 + 1.5 * uniform) * torch.where(uniform * 64 % 2 < 1, -1.0, 1.0)
        if self.domain == "distinct":  # no two closer than 0.37: orders are certain
            order = torch.randperm(count, generator=generator).to(torch.float32)
            return ((order - count / 2) * 0.37 + 0.11).reshape(shape)
        if self.domain == "spd":
            a = torch.randn(shape, generator=generator)
            return a @ a.mT + shape[-1] * torch.eye(shape[-1])
        if self.domain == "well conditioned":
            a = torch.randn(shape, generator=generator)
            return 0.3 * a + 2 * torch.eye(shape[-2], shape[-1])
        raise ValueError(self.domain)


def _domain(name):
    return lambda *shape: In(shape, name)


R, P, U, S = map(_domain, ("normal", "positive", "unit", "symmetric"))
G, A, D = map(_domain, ("above one", "away from zero", "distinct"))
SPD, W = map(_domain, ("spd", "well conditioned"))


def V(*values):
    return In((len(values),), "values", values)


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    func: Callable
    inputs: tuple
    module: Callable | None = None  # builds a module, handed to func before the inputs
    nodes: frozenset = frozenset()  # ops whose nodes its graph must hold: "Sum" is SumBackward0 or 1
    samples: tuple | None = None  # inputs whose first axis is a batch of samples that never mix
    mixes: tuple | None = None  # inputs whose first axis is as long as the output's, but mixes
    second: bool = True  # torch can differentiate the Jacobian again
    variant: bool = False  # another size of a case that has every run already: runs in float64 only
    poison: bool = True  # False where torch itself refuses or fails in poisoned memory
    empty: bool = True  # False where torch crashes, and the process with it, without samples
    strided: bool = True  # also run on non-contiguous inputs
    factor: float = 1.0  # widens the tolerance; `reason` says why
    reason: str = ""
    inner: torch.dtype | None = None  # a narrower dtype inside, which bounds the accuracy
    twin: Callable | None = None  # the same function by ops that torch can (rightly) differentiate twice
    since: tuple = (2, 11)  # the version of torch that can differentiate it
    special: tuple = ()  # values fed one at a time: kinks, poles, infinities, NaN

    def __post_init__(self):
        assert self.factor == 1.0 or self.reason, f"{self.name}: a wider tolerance needs a reason"

    def build(
        self, dtype=torch.float64, *, strided=False, frozen=False, twin=False, batch=None, rounded=None
    ):
        """(func, inputs) in `dtype`; always the same values, of the first `batch` samples.

        `rounded`: as another dtype rounds them.
        """
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        inputs = tuple(spec.draw(generator).to(rounded or dtype).to(dtype) for spec in self.inputs)
        if batch is not None:
            inputs = tuple(x[:batch] if k in self.samples else x for k, x in enumerate(inputs))
        if strided:
            inputs = tuple(make_strided(x) for x in inputs)
        func = self.twin if twin and self.twin is not None else self.func
        if self.module is not None:
            with torch.random.fork_rng():
                torch.manual_seed(zlib.crc32(self.name.encode()))
                module = copy.deepcopy(self.module()).to(rounded or dtype).to(dtype)
            module.requires_grad_(not frozen)
            bare = func

            def func(*xs):
                return bare(module, *xs)

            func.module = module
        return func, inputs

    def __repr__(self):
        return self.name


def make_strided(x):
    """The same values as a view with holes and, from 2 axes on, its axes reversed in memory."""
    if x.ndim == 0:
        return torch.stack([x, x])[1]
    axes = tuple(range(x.ndim))[::-1]
    wide = torch.full((*[x.shape[a] for a in axes[:-1]], 2 * x.shape[axes[-1]] + 1), torch.nan)
    view = wide.to(x.dtype)[..., 1::2].permute(axes)
    view.copy_(x)
    return view


def _indices(flag, count):
    if flag is None or flag is False:
        return None
    return tuple(range(count)) if flag is True else tuple(flag)


def C(name, func, *inputs, nodes="", samples=None, mixes=None, **options):
    """A case of a plain function. A bare tuple among the inputs is the shape of normal values."""
    inputs = tuple(In(x) if isinstance(x, tuple) else x for x in inputs)
    return Case(
        name,
        func,
        inputs,
        nodes=frozenset(nodes.split()),
        samples=_indices(samples, len(inputs)),
        mixes=_indices(mixes, len(inputs)),
        **options,
    )


def seeded(func):
    """func, drawing the same random numbers at every call."""

    def call(*args):
        torch.manual_seed(11)
        return func(*args)

    return call


def quietly(func):
    """func, without what torch warns of it: an op in beta, a slower path taken."""

    def call(*args):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return func(*args)

    return call


def call_module(module, *inputs):
    return module(*inputs)


def M(name, module, *inputs, func=call_module, **options):
    """A case of an nn.Module, whose parameters require grad unless the test freezes them."""
    return C(name, func, *inputs, module=module, **options)


def op_of(node_name):
    """"SumBackward1" -> "Sum"."""
    return node_name.rsplit("::", 1)[-1].rstrip("0123456789").removesuffix("Backward")


def graph_nodes(outputs, inputs):
    """The names of the autograd nodes that lie on a way from `inputs`, which are leaves, to `outputs`."""
    return {node.name() for node in _on_the_way(outputs, inputs)}


def graph_steps(outputs, inputs):
    """The same names, and with each the pairs that it makes with the nodes whose values it was given."""
    nodes = _on_the_way(outputs, inputs)
    pairs = ((node, below) for node in nodes for below, _ in node.next_functions if below in nodes)
    return {(node.name(),) for node in nodes} | {(a.name(), b.name()) for a, b in pairs}


def _on_the_way(outputs, inputs):
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = {torch.autograd.graph.get_gradient_edge(x).node for x in inputs}
    active = {}  # node -> whether it leads to a leaf
    stack = [y.grad_fn for y in outputs if y.grad_fn is not None]
    while stack:
        node = stack[-1]
        below = [n for n, _ in node.next_functions if n is not None]
        waiting = [n for n in below if n not in active]
        if waiting:
            stack += waiting
            continue
        active[stack.pop()] = node in leaves or any(active[n] for n in below)
    return {node for node, leads in active.items() if leads and node not in leaves}
