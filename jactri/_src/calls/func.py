"""`jacrev`, `jacfwd` and `hessian` with the signatures, results and errors of ``torch.func``.

``func`` runs once, outside of any transform, so what vmap refuses (``.item()``, data-dependent control flow, ops
without a batching rule or a forward derivative) works. Where a torch.func transform is running already (``vmap``,
``grad``, or torch.func's own ``jacrev`` around these), torch.func computes, and they compose with it.

A result requires grad, in grad mode, where torch.func's does: where the outputs depend on tensors that require grad,
be they arguments or captured (it may be constant in these nevertheless, as the Jacobian of ``x.sin() + b`` is in
``b``). For captured ones, as a module's parameters, the graph for that is made when a backward pass comes, unless it
costs next to nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _get_sequence_nr
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..base.remedies import NO_DERIVATIVE, instead_of, not_callable, one_of, returned
from ..base.tracing import making, own
from ..prologue.arguments import HESSIAN, Options, check_options, form_of
from ..prologue.failures import note
from ..prologue.patterns import taken_pattern
from ..prologue.running import eagerly, prepare, recording, with_remedies
from ..read import handover, overriding
from ..read.behind import Outside
from . import symmetric
from .api import compute
from .deferred import differentiable
from .twice import gradients

_RANDOMNESS = ("error", "different", "same")


@with_remedies
def jacrev(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    _preallocate_and_copy: bool = False,
) -> Callable[..., Any]:
    """``torch.func.jacrev``, faster: a function that returns the Jacobian of ``func``.

    Args:
        func: takes any arguments and returns a tensor or a pytree of tensors, floating-point all.
        argnums: the positional argument, or a tuple of them, to differentiate by; negative ones count from the end.
            These are tensors or pytrees of tensors. All other arguments, keywords too, are passed on as they are.
        has_aux: ``func`` returns ``(output, aux)``; so does the result, with ``aux`` (a pytree of tensors) as it is.
        chunk_size: how many seeds run at once; by default what fits half of the free memory.
        _preallocate_and_copy: accepted for compatibility; chunks are always written to where they belong.

    Returns:
        A function of the arguments of ``func``. It gives the tree of the outputs, each leaf replaced by the tree of
        the argument, whose leaves are ``(*out, *in)``; under a tuple of argnums by the tuple of those trees. The
        dtype is the argument's, zeros stand where an output does not depend on it. The cheapest order of
        accumulation is chosen, as by `jactri.jacobian`; the name says whose dtype the result has.

    Raises:
        ValueError: here, ``chunk_size`` below 1; when called, a differentiated argument that is not made of tensors.
        RuntimeError: when called, argnums that are empty, not unique, out of range or not integers; tensors of
            integers to differentiate by; complex arguments or outputs; outputs that are not floating-point tensors,
            or none; ``has_aux`` and no pair.

    Cost:
        That of `jactri.jacobian`. Where the result depends on an argument that requires grad, that of
        ``create_graph=True``; for other tensors that require grad, once more that at the first backward pass.

    Examples:
        >>> predict = lambda w, x: torch.tanh(x @ w)
        >>> w, x = torch.randn(3, 2), torch.randn(5, 3)
        >>> of_w, of_x = jactri.func.jacrev(predict, argnums=(0, 1))(w, x)
        >>> of_w.shape, of_x.shape
        (torch.Size([5, 2, 3, 2]), torch.Size([5, 2, 5, 3]))
        >>> torch.allclose(of_w, torch.func.jacrev(predict)(w, x), atol=1e-6)
        True
    """
    return _Transform("jacrev", func, argnums, has_aux, chunk_size).wrapper()


@with_remedies
def jacfwd(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    chunk_size: int | None = None,
    randomness: str = "error",
) -> Callable[..., Any]:
    """``torch.func.jacfwd``, faster: as `jacrev`, but the dtype of a Jacobian is the output's.

    Args:
        func: as of `jacrev`. Outputs of integers or booleans have Jacobians of zeros.
        argnums: as of `jacrev`.
        has_aux: as of `jacrev`.
        chunk_size: how many seeds run at once. Inside of a torch.func transform it is not used.
        randomness: ``func`` runs once, so one draw of random numbers serves all columns of the Jacobian, which is
            ``"same"``. ``"error"``: raise if ``func`` moved torch's default generators. ``"different"``: a draw for
            every column, which takes a run for every column: torch.func computes.

    Returns:
        A function of the arguments of ``func``, as `jacrev`.

    Raises:
        ValueError: when called, tensors of integers to differentiate by.
        RuntimeError: an unknown ``randomness`` (here); random numbers under ``"error"`` (when called). Else as
            `jacrev`.

    Cost:
        That of `jacrev`.

    Examples:
        >>> x = torch.tensor([1.0, 2.0])
        >>> jactri.func.jacfwd(lambda x: torch.outer(x, x))(x).shape
        torch.Size([2, 2, 2])
        >>> jactri.func.jacfwd(lambda x: (x * x, x.sum()), has_aux=True)(x)
        (tensor([[2., 0.],
                [0., 4.]]), tensor(3.))
    """
    if randomness not in _RANDOMNESS:
        raise RuntimeError(one_of("randomness", randomness, _RANDOMNESS))
    return _Transform("jacfwd", func, argnums, has_aux, chunk_size, randomness).wrapper()


@with_remedies
def hessian(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    chunk_size: int | None = None,
    layout: torch.layout | str = torch.strided,
    pattern: Any = None,
) -> Callable[..., Any]:
    """``torch.func.hessian``, faster: the Jacobian of the gradient, by a structured sweep over the gradient's graph.

    Args:
        func: as of `jacrev`.
        argnums: as of `jacrev`.
        has_aux: as of `jacrev`.
        chunk_size: as of `jacrev`.
        layout: as of `jactri.hessian`, for outputs of one element: each leaf is sparse.
        pattern: as of `jactri.hessian`: a tree of patterns, as the result is one of tensors.

    Returns:
        A function of the arguments of ``func``. It gives the tree of the outputs; in place of each leaf the tree of
        the arguments, and in place of each leaf of that the tree of the arguments again, whose leaves are
        ``(*out, *in, *in)``. The dtype is that of the first of the two.

    Raises:
        ValueError: an unknown ``layout`` (here); when called, tensors of integers to differentiate by; a sparse
            ``layout`` where every entry can be non-zero.
        RuntimeError: as `jacrev`; when called, a sparse ``layout`` for an output of several elements, or inside of a
            torch.func transform.

    Cost:
        An output of one element: one backward pass and a sweep over its graph, in which samples that do not mix are
        carried once: the Hessian of the sum of a function of each of ``N`` samples costs ``N`` blocks, not ``N * N``;
        a sparse one as `jactri.hessian`. Other outputs: a differentiable Jacobian and a sweep over that one's graph.

    Examples:
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
        >>> H = jactri.func.hessian(lambda x: 0.5 * x @ A @ x)(torch.randn(2))
        >>> torch.allclose(H, A)
        True
    """
    return _Transform(
        "hessian", func, argnums, has_aux, chunk_size, layout=layout, pattern=pattern
    ).wrapper()


@dataclass(slots=True)
class _Evaluated:
    """One evaluation of ``func``, flat, with the trees of its outputs and of what is differentiated by."""

    ys: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    outputs: TreeSpec
    inputs: TreeSpec
    aux: Any
    start: int
    """The sequence number of autograd before it."""
    at_once: bool
    """Whether a graph of the result is needed rather than possible."""


class _Transform:
    """What the three have in common. ``name`` is of the one that is asked for."""

    def __init__(
        self,
        name,
        func,
        argnums,
        has_aux,
        chunk_size,
        randomness="same",
        layout=torch.strided,
        pattern=None,
    ):
        check_options("auto", chunk_size, None, False)
        if not callable(func):
            raise not_callable(func)
        if isinstance(argnums, Tensor):
            raise RuntimeError(
                f"argnums must be an int or a tuple of ints, got a Tensor: write jactri.func.{name}(func)(x)"
            )
        self.name, self.func, self.argnums, self.has_aux = name, func, argnums, has_aux
        self.chunk_size, self.randomness = chunk_size, randomness
        self.layout, self.form, self.pattern = layout, form_of(layout), pattern

    def wrapper(self):
        @functools.wraps(self.func, updated=())
        def wrapper_fn(*args, **kwargs):
            if torch.compiler.is_dynamo_compiling():  # as in running.public
                return torch.compiler.disable(self)(args, kwargs)
            return self(args, kwargs)

        return wrapper_fn

    def __call__(self, args, kwargs):
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        if handover.transforming(tensors) or self.randomness == "different":
            return self._by_torch(args, kwargs)
        graph = torch.is_grad_enabled()
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                args, kwargs = tree_map(_ordinary, (args, kwargs))
                return self._answer(args, kwargs, tensors, graph)
        return self._answer(args, kwargs, tensors, graph)

    def _by_torch(self, args, kwargs):
        overriding.refuse(f"{self.name} by torch.func (randomness={self.randomness!r})")
        if self.form != "dense":
            raise RuntimeError(
                f"layout={self.layout} is not possible inside of a torch.func transform"
            )
        handover.refuse(pattern=self.pattern is not None)
        for k in self._places(len(args)):
            self._check_inputs(tree_leaves(args[k]))
        func = functools.partial(self.func, **kwargs) if kwargs else self.func
        call = handover.transform(
            self.name, eagerly(func), self.argnums, self.has_aux, self.chunk_size, self.randomness
        )
        if self.randomness != "error":
            return call(*args)
        xs = [v for v in tree_leaves(args) if isinstance(v, Tensor)]
        generators = _generators(xs)
        answer = call(*args)
        _check_unmoved(generators, xs)
        return answer

    def _answer(self, args, kwargs, tensors, graph: bool):
        for x in tensors:
            if x.is_complex():
                raise RuntimeError(
                    f"{self.name} takes real arguments, but got a tensor {tuple(x.shape)} of {x.dtype}; pass "
                    "torch.view_as_real(x) and make it complex inside of func"
                )
        run = self._run(args, kwargs, graph)
        rows = self._second(run, graph) if self.name == "hessian" else self._first(run, graph)
        answer = tree_unflatten([tree_unflatten(row, run.inputs) for row in rows], run.outputs)
        if not self.has_aux:
            return answer
        return answer, tree_map(functools.partial(_shown, run=run, graph=graph), run.aux)

    def _run(self, args, kwargs, graph: bool) -> _Evaluated:
        places = self._places(len(args))
        chosen = tuple(args[k] for k in places)
        xs, spec = tree_flatten(chosen if isinstance(self.argnums, tuple) else chosen[0])
        self._check_inputs(xs)
        func, found = self.func, []

        def flat(*leaves):
            given = tree_unflatten(leaves, spec)
            given = given if isinstance(self.argnums, tuple) else (given,)
            into = dict(zip(places, given, strict=True))
            called_with = [into.get(k, a) for k, a in enumerate(args)]
            try:
                out = func(*called_with, **kwargs)
            except (RuntimeError, TypeError) as error:
                note(error, func, called_with, kwargs)
                raise
            aux = None
            if self.has_aux:
                out, aux = self._pair(out)
            ys, outputs = tree_flatten(out)
            self._check_outputs(ys)
            found.extend((outputs, aux))
            return tuple(ys)

        at_once = recording() or any(
            v.requires_grad for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)
        )
        start = _get_sequence_nr()
        generators = _generators(xs) if self.randomness == "error" else None
        ys, leaves, _, _ = prepare(flat, tuple(xs), graph)
        if generators is not None:
            _check_unmoved(generators, xs)
        for leaf in leaves:
            if leaf.grad_fn is None:
                leaf._jactri_leaf = True  # see behind.Outside
        return _Evaluated(ys, leaves, found[0], spec, found[1], start, at_once)

    # -- first and second derivatives --------------------------------------------------------------

    def _compute(self, ys, run: _Evaluated, graph: bool, strategy: str, roots=None):
        what = HESSIAN if self.name == "hessian" else "the Jacobian"
        asked = Options(
            strategy=strategy, chunk_size=self.chunk_size, what=what, of="jactri.jacobian with "
        )
        if not graph:
            return compute(ys, run.leaves, asked)
        return differentiable(ys, run.leaves, asked, run.start, run.at_once, roots)

    def _first(self, run: _Evaluated, graph: bool):
        """The Jacobians, by output and input."""
        live = [y for y in run.ys if y.is_floating_point()]
        kinds = {t.dtype for t in (*live, *run.leaves)}
        # one direction gives the outputs' dtypes, the other the inputs'; where these are one, the cheaper is taken
        strategy = "forward-mode" if self.name == "jacfwd" and len(kinds) > 1 else "auto"
        rows = iter(self._compute(live, run, graph, strategy) if live else ())
        return [
            next(rows)
            if y.is_floating_point()
            else [torch.zeros((*y.shape, *x.shape), dtype=y.dtype, device=y.device) for x in run.leaves]
            for y in run.ys
        ]  # fmt: skip

    def _second(self, run: _Evaluated, graph: bool):
        """The Hessians, by output and input, as trees of inputs."""
        overriding.refuse("a second derivative")
        if self.form != "dense" or self.pattern is not None:
            return self._entries(run, graph)
        slopes = [g for y in run.ys for g in gradients(y, run.leaves)]
        mixed = len({x.dtype for x in run.leaves}) > 1
        roots = [y for y in run.ys for _ in run.leaves]
        rows = self._compute(slopes, run, graph, "forward-mode" if mixed else "auto", roots)
        trees = [tree_unflatten(row, run.inputs) for row in rows]
        n = len(run.leaves)
        return [trees[k : k + n] for k in range(0, len(trees), n)]

    def _entries(self, run: _Evaluated, graph: bool):
        """The Hessians by the entries of a pattern, by output and input, as trees of inputs."""
        n, made = len(run.leaves), []
        given = None if self.pattern is None else tree_leaves(self.pattern)
        if given is not None and len(given) != len(run.ys) * n * n:
            raise RuntimeError(
                f"pattern must be nested as the result is, a tree of {len(run.ys) * n * n} patterns, got {len(given)}"
            )
        for k, y in enumerate(run.ys):
            if y.numel() != 1:
                what = f"layout={self.layout}" if self.pattern is None else "pattern="
                raise RuntimeError(
                    f"{what} is for outputs of one element, but func returned one of shape {tuple(y.shape)}; return "
                    "its sum, or use layout=torch.strided"
                )
            slopes = gradients(y, run.leaves)
            asked = Options(
                graph and bool(Outside(y, run.start)), self.chunk_size, layout=self.layout, form=self.form,
                what=HESSIAN,
            )  # fmt: skip
            if given is not None:
                own = iter(given[k * n * n : (k + 1) * n * n])
                nest = [[next(own) for _ in run.leaves] for _ in run.leaves]
                asked.pattern = taken_pattern(
                    nest, slopes, run.leaves, True, True, False, "Hessian"
                )
            rows = symmetric.rows(y, slopes, run.leaves, asked, run.start)
            made.append([tree_unflatten(row, run.inputs) for row in rows])
        return made

    # -- what the caller passed --------------------------------------------------------------------

    def _places(self, count: int) -> tuple[int, ...]:
        """The differentiated arguments, counted from the first."""
        given = self.argnums
        if not isinstance(given, (int, tuple)):
            raise RuntimeError(f"argnums must be an int or a tuple of ints, got {given!r}")
        places = []
        for k in given if isinstance(given, tuple) else (given,):
            if not isinstance(k, int):
                raise RuntimeError(f"argnums must hold ints, got {k!r} in {given!r}")
            if not -count <= k < count:
                raise RuntimeError(f"Got argnum={k}, but only {count} positional inputs")
            places.append(k % count)
        if not places:
            raise RuntimeError("argnums must be non-empty: pass the argument to differentiate by")
        if len(set(places)) < len(places):
            raise RuntimeError(f"argnums elements must be unique, got {given!r} of {count} inputs")
        return tuple(places)

    def _check_inputs(self, xs) -> None:
        if not xs:
            raise ValueError(
                f"{self.name}: the arguments of argnums={self.argnums!r} hold no tensor to differentiate by"
            )
        for x in xs:
            if not isinstance(x, Tensor):
                raise ValueError(
                    f"{self.name} differentiates by tensors, but the arguments of argnums={self.argnums!r} hold "
                    f"{type(x)}{instead_of(x, 'x')}, or leave the argument out of argnums"
                )
            if not x.is_floating_point():
                # as torch.func, whose two modes differ here
                error = RuntimeError if self.name == "jacrev" else ValueError
                raise error(
                    f"{self.name} differentiates by floating-point tensors, but the arguments of "
                    f"argnums={self.argnums!r} hold a tensor {tuple(x.shape)} of {x.dtype}; pass x.float(), or leave "
                    "the argument out of argnums"
                )

    def _pair(self, out):
        if not (isinstance(out, tuple) and len(out) == 2):
            raise RuntimeError(
                f"{self.name}: under has_aux=True func must return a tuple (output, aux), but it returned {type(out)}"
                + (f" of {len(out)}" if isinstance(out, tuple) else "")
            )
        for v in tree_leaves(out[1]):
            if not isinstance(v, Tensor):
                raise RuntimeError(
                    f"{self.name}: aux must hold tensors only, but func returned one of {type(v)}"
                )
        return out

    def _check_outputs(self, ys) -> None:
        if not ys or (len(ys) == 1 and ys[0] is None):
            raise RuntimeError(
                f"{self.name}: func must return a tensor or a pytree of tensors, but it returned nothing"
            )
        for y in ys:
            if not isinstance(y, Tensor):
                raise RuntimeError(
                    f"{self.name}: func must return tensors only, but it returned one of {type(y)}"
                    f"{returned(y)}; under has_aux=True what is not to be differentiated goes to aux"
                )
            if y.is_complex():
                raise RuntimeError(
                    f"{self.name}: func must return real tensors, but it returned one of {y.dtype}; return "
                    "torch.view_as_real(output)"
                )
            if self.name != "jacfwd" and not y.is_floating_point():
                raise RuntimeError(
                    f"{self.name}: func must return floating-point tensors, but it returned one of {y.dtype}, "
                    + NO_DERIVATIVE
                )


def _ordinary(x):
    """A tensor of inference mode cannot be saved for a backward pass."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def _shown(x: Tensor, run: _Evaluated, graph: bool) -> Tensor:
    """A tensor of aux as the caller knows it: with the graph to what is the caller's, if there is one."""
    return x if graph and Outside(x, run.start) else x.detach()


def _generators(xs) -> list[Tensor]:
    """The states of torch's default generators, of the CPU and of the inputs' CUDA devices."""
    devices = sorted({x.device for x in xs if x.is_cuda}, key=lambda d: d.index)
    return [torch.random.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]


def _check_unmoved(before, xs) -> None:
    with making() if own() else contextlib.nullcontext():  # states are no values of func's
        if all(map(torch.equal, before, _generators(xs))):
            return
    raise RuntimeError(
        "jacfwd: func drew random numbers under randomness='error'. One draw serves the whole Jacobian here: pass "
        "randomness='same' if that is meant, or draw before and pass the numbers as an argument"
    )
