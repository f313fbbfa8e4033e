"""Inside of a torch.func transform (vmap, grad, ...) torch.func computes: its transforms compose with each other.

Not all of them are right inside of others. In torch 2.13, ``vmap`` of ``jacfwd`` is wrong for ``torch.linalg.solve``,
``det`` and ``slogdet``, and so is the derivative of ``jvp``, for these and for layer_norm; ``jacrev`` is wrong for
``torch.cdist``. Products with one vector are right: all here is made of ``torch.func.vjp``, over blocks by `Vmapped`.
Some ops have third derivatives that are wrong however they are made: these are refused. What torch refuses itself (in
2.14, under ``vmap``, a ``vjp`` of the gradient of a batch norm in training) is its own error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import jacfwd, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..base.constants import arbitrary
from ..rules.norm import BATCH_NORMS
from . import overriding
from .behind import nodes_behind
from .opaque import others
from .unrecorded import UNUSUAL, loose
from .vmapped import Vmapped, looping, shown

_level = torch._C._functorch.maybe_current_level
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

WRONG = {"LinalgDetBackward0", "LogcumsumexpBackward0", "NativeLayerNormBackward0", *BATCH_NORMS}
"""Nodes whose third derivative is wrong, or NaN, in torch 2.13 (of batch norms in training)."""

WRONG_FORWARD = {"CholeskyInverseBackward0"}
"""Nodes whose third derivative is wrong where one of the transforms is forward mode."""

WRONG_BETWEEN = {
    "LinalgHouseholderProductBackward0",
    "LinalgSlogdetBackward0",
    "LinalgSolveExBackward0",
}
"""Those whose third derivative is wrong where forward mode is not the outermost."""

_THIRD = (
    "inside of torch.func transforms, third derivatives of {} are wrong in torch; call jactri outside of them, with "
    "create_graph=True, and differentiate what it returns by torch.autograd.grad"
)


def transforming(xs) -> bool:
    """Whether a torch.func transform is running, or a tensor belongs to one. Overrides do not reach into any."""
    found = _level() is not None or any(map(_wrapped, xs))
    if found:
        overriding.refuse("a call inside of a torch.func transform")
    return found


def refuse(**given: bool) -> None:
    """Raise for an option that was given, and that no transform has."""
    for name, is_given in given.items():
        if is_given:
            raise RuntimeError(f"{name} is not available inside of a torch.func transform")


def jacobian(
    func, xs, tupled: bool, *,
    strategy="auto", strict=False, per_sample=False, return_output=True, chunk_size=None, out=None,
):  # fmt: skip
    """`jactri.jacobian` by torch.func, nested as torch.autograd.functional nests it.

    Raises RuntimeError for what cannot be answered under a transform: ``strict``, ``out``.
    """
    refuse(strict=strict, out=out is not None)
    tupled_out = [False]

    def as_tuples(*args):
        y = func(*args)
        tupled_out[0] = isinstance(y, tuple)
        ys = y if tupled_out[0] else (y,)
        for v in ys:
            if not isinstance(v, torch.Tensor):
                raise TypeError(
                    "The outputs of the user-provided function of jacobian must be a Tensor or a tuple of Tensors, "
                    f"but the given outputs have type {type(v)}"
                )
        return ys, ys

    argnums = tuple(range(len(xs)))
    if per_sample:

        def batch_of_one(*row):
            ys, aux = as_tuples(*(r.unsqueeze(0) for r in row))
            return tuple(y.squeeze(0) for y in ys), tuple(y.squeeze(0) for y in aux)

        with looping():
            rows, ys = vmap(jacrev(batch_of_one, argnums, has_aux=True))(*xs)
    else:
        rows, ys = jacrev(as_tuples, argnums, has_aux=True, chunk_size=chunk_size)(*xs)
    if strategy == "forward-mode":  # which has the outputs' dtypes
        rows = [[b.to(y.dtype) for b in row] for row, y in zip(rows, ys, strict=True)]
    rows = tuple(tuple(row) for row in rows) if tupled else tuple(row[0] for row in rows)
    answer = rows if tupled_out[0] else rows[0]
    if not return_output:
        return answer
    return (tuple(ys) if tupled_out[0] else ys[0]), answer


def jacrev(func, argnums=0, has_aux: bool = False, chunk_size: int | None = None):
    """``torch.func.jacrev``, with rows that are checked against one product of their combination."""
    several = isinstance(argnums, tuple)

    def made(*args):
        places = [k % len(args) for k in (argnums if several else (argnums,))]

        def chosen(*given):
            into = dict(zip(places, given, strict=True))
            return func(*(into.get(k, a) for k, a in enumerate(args)))

        result, pull, *aux = _vjp(chosen, *(args[k] for k in places), has_aux=has_aux)
        ys, outputs = tree_flatten(result)
        given = tuple(args[k] for k in places) if several else args[places[0]]
        xs, inputs = tree_flatten(given)
        blocks = []
        for j, y in enumerate(ys):
            if not y.is_floating_point():
                raise RuntimeError(f"func must return floating-point tensors, got one of {y.dtype}")

            def row(c, j=j):
                cs = _cotangents(c, j, ys)
                return tuple(tree_leaves(pull(tree_unflatten(cs, outputs))))

            n = y.numel()
            units = torch.eye(n, dtype=y.dtype, device=y.device).reshape(n, *y.shape)
            product = Vmapped(row, "a function inside of a transform")
            parts = [product(part) for part in units.split(chunk_size or n)] if n else []
            columns = [
                torch.cat(c).reshape(*y.shape, *x.shape)
                for c, x in zip(zip(*parts, strict=True), xs, strict=False)
            ] or [x.new_zeros(*y.shape, *x.shape) for x in xs]
            blocks.append(tree_unflatten(columns, inputs))
        answer = tree_unflatten(blocks, outputs)
        return (answer, *aux) if has_aux else answer

    return made


def _vjp(func, *xs, has_aux: bool = False):
    """``torch.func.vjp``. Raises RuntimeError where its derivatives, in the transforms around, would be wrong."""

    def checked(*given):
        out = func(*given)
        for y in tree_leaves(out[0] if has_aux else out):
            forward = _levels(y)
            if len(forward) > 2 and (name := _wrong(y, forward)) is not None:
                raise RuntimeError(_THIRD.format(name))
        return out

    result, pull, *aux = torch.func.vjp(checked, *xs, has_aux=has_aux)

    def quiet(*cotangents):
        with looping():
            return pull(*cotangents)

    return result, quiet, *aux


def _levels(y) -> list[bool]:
    """Of every transform that differentiates a tensor, from the innermost on: whether it is forward mode."""
    kinds = {i.level(): i.key() for i in torch._C._functorch.get_interpreter_stack() or ()}
    found = []
    while isinstance(y, torch.Tensor) and _wrapped(y):
        if torch._C._functorch.is_gradtrackingtensor(y):
            kind = kinds.get(torch._C._functorch.maybe_get_level(y))
            found.append(kind == torch._C._functorch.TransformType.Jvp)
        y = torch._C._functorch.get_unwrapped(y)
    return found


def _wrong(y: Tensor, forward: list[bool]) -> str | None:
    """The name of a node behind a tensor whose third derivative torch has wrong under such transforms, or None."""
    wrong = set(WRONG)
    if any(forward):
        wrong |= WRONG_FORWARD
    if any(forward[:-1]):
        wrong |= WRONG_BETWEEN
    while _wrapped(y):
        for node in nodes_behind([y]):
            name = node.name()
            if name not in wrong or node.next_functions[0][0] is None:  # linear in the others
                continue
            training = BATCH_NORMS.get(name, ("", True))[1]
            if training is True or (training and getattr(node, f"_saved_{training}")):
                return name
        y = torch._C._functorch.get_unwrapped(y)
    return None


def _cotangents(c: Tensor, j: int, ys) -> list[Tensor]:
    """Those of all outputs, where that of output ``j`` is given.

    Of the outputs' levels of vmap: some ops write into memory that is made like these.
    """
    zeros = [torch.zeros_like(y) for y in ys]
    zeros[j] = zeros[j] + c
    return zeros


def transform(name, func, argnums, has_aux, chunk_size, randomness):
    """What torch.func's ``jacrev``, ``jacfwd`` or ``hessian`` gives."""
    if name == "jacfwd" and randomness == "different":
        refuse(**{"randomness='different'": _level() is not None})
        return jacfwd(func, argnums, has_aux, randomness=randomness)
    if name == "jacrev":
        return jacrev(func, argnums, has_aux, chunk_size)
    if name == "hessian":
        return hessian(func, argnums, has_aux, chunk_size, _outputs_dtypes)
    return _outputs_dtypes(func, argnums, has_aux, chunk_size)


def _outputs_dtypes(func, argnums, has_aux: bool, chunk_size: int | None):
    """What ``torch.func.jacfwd`` gives: Jacobians of the outputs' dtypes, zeros for outputs of integers."""

    def made(*args):
        found = []

        def flat(*given):
            out = func(*given)
            out, aux = out if has_aux else (out, ())
            ys, spec = tree_flatten(out)
            found.append(spec)
            return [y for y in ys if not _is_whole(y)], (ys, aux)

        rows, (ys, aux) = jacrev(flat, argnums, has_aux=True, chunk_size=chunk_size)(*args)
        chosen = tuple(args[k] for k in argnums) if isinstance(argnums, tuple) else args[argnums]
        rows, answer = iter(rows), []
        for y in ys:
            if not _is_whole(y):
                answer.append(tree_map(lambda b, y=y: b.to(y.dtype), next(rows)))
            else:
                answer.append(tree_map(lambda x, y=y: y.new_zeros(*y.shape, *x.shape), chosen))
        answer = tree_unflatten(answer, found[-1])
        return (answer, aux) if has_aux else answer

    return made


def _is_whole(y) -> bool:
    return isinstance(y, torch.Tensor) and not (y.is_floating_point() or y.is_complex())


def hessian(func, argnums=0, has_aux=False, chunk_size=None, outer=jacrev):
    """``outer`` of `jacrev`. Raises RuntimeError where a second derivative goes through a Function.

    Its backward may not be recorded, and under a transform there is no telling. What is returned raises where autograd,
    outside of the transforms, differentiates it and torch has that derivative wrong.
    """
    wrong = None

    def checked(*args):
        nonlocal wrong
        out = func(*args)
        for y in tree_leaves(out[0] if has_aux else out):
            if not isinstance(y, torch.Tensor):
                continue
            wrong = wrong or _wrong(y, _levels(y))
            while _wrapped(y):
                for call in others([y]):
                    raise RuntimeError(
                        f"inside of a torch.func transform, second derivatives do not go through {call.node.name()}; "
                        "call jactri outside of the transform"
                    )
                y = torch._C._functorch.get_unwrapped(y)
        return out

    def refused(_):
        raise RuntimeError(_THIRD.format(wrong))

    def made(*args):
        answer = outer(jacrev(checked, argnums, has_aux, chunk_size), argnums, has_aux, chunk_size)(
            *args
        )
        for t in tree_leaves(answer[0] if has_aux else answer) if wrong else ():
            while _wrapped(t):
                t = torch._C._functorch.get_unwrapped(t)
            if t.requires_grad:
                t.register_hook(refused)
        return answer

    return made


def jvp(func, xs, tangents, block: bool, chunk_size: int | None):
    """`jactri.jvp` by torch.func; ``block``: the tangents have an axis K in front."""
    result, pull = _vjp(func, *xs)
    tupled = isinstance(result, tuple)
    ys = result if tupled else (result,)

    def pulled(*cs):
        made = pull(cs if tupled else cs[0])
        return made if isinstance(made, tuple) else (made,)

    ts = tangents if block else [t.unsqueeze(0) for t in tangents]
    # torch's second derivatives are not all differentiable: that of layer_norm has a wrong derivative in torch 2.13
    made = None if _tracked(xs) else _by_double_vjp(ys, pulled, ts, chunk_size)
    if made is None:
        made = [_by_rows(y, j, ys, pulled, ts, chunk_size) for j, y in enumerate(ys)]
    products = tuple(made if block else [m.squeeze(0) for m in made])
    return result, products if tupled else products[0]


def _tracked(xs) -> bool:
    """Whether some transform that runs will differentiate."""
    for x in xs:
        while _wrapped(x):
            if torch._C._functorch.is_gradtrackingtensor(x):
                return True
            x = torch._C._functorch.get_unwrapped(x)
    return False


def _by_double_vjp(ys, pulled, ts, chunk_size: int | None) -> list[Tensor] | None:
    """Tangents pulled through a pull, which is linear; None where its derivative is not what that says."""

    def one(*tangents):
        # cotangents like the tangents: some ops write into memory that is made like these
        extra = sum(t.flatten()[:1].sum() * 0 for t in tangents)
        zeros = [torch.zeros_like(y) + extra.to(y.dtype) for y in ys]
        return torch.func.vjp(pulled, *zeros)[1](tuple(tangents))

    try:
        made = _over(one, ts, chunk_size)
        cs = [arbitrary(y.shape, y, 1.754878) for y in ys]
        left = [m[0] * c for m, c in zip(made, cs, strict=True)]
        right = [g * t[0] for g, t in zip(pulled(*cs), ts, strict=True)]
    except UNUSUAL:
        return None
    size = sum(p.detach().abs().sum() for p in (*left, *right))
    gap = (sum(p.detach().sum() for p in left) - sum(p.detach().sum() for p in right)).abs()
    return made if shown((gap <= loose(gap.dtype) * size) | size.isnan()) else None


def _by_rows(y, j: int, ys, pulled, ts, chunk_size: int | None) -> Tensor:
    """The tangents of one of the outputs by the rows of its Jacobian."""
    n = y.numel()

    def row(c):
        return pulled(*_cotangents(c, j, ys))

    units = torch.eye(n, dtype=y.dtype, device=y.device).reshape(n, *y.shape)
    made: Any = 0
    for g, t in zip(_over(row, [units], chunk_size), ts, strict=True):
        made = made + t.reshape(t.shape[0], -1) @ g.reshape(n, -1).mT
    return made.reshape(ts[0].shape[0], *y.shape)


def _over(function, blocks, chunk_size: int | None) -> list[Tensor]:
    """A linear function of several tensors over the first axis of blocks of them."""
    sizes = [b[0].numel() for b in blocks]
    flat = torch.cat([b.reshape(b.shape[0], -1) for b in blocks], 1)

    def one_row(row):
        parts = zip(row.split(sizes), blocks, strict=True)
        return tuple(function(*(p.reshape(b.shape[1:]).to(b.dtype) for p, b in parts)))

    product = Vmapped(one_row, "a function inside of a transform")
    made = [product(part) for part in flat.split(chunk_size or max(flat.shape[0], 1))]
    return [torch.cat(parts) for parts in zip(*made, strict=True)]


def vjp(func, xs, tupled: bool, ready, chunk_size: int | None):
    """`jactri.vjp` by torch.func. ``ready(outputs)``: the cotangents, and whether they have an axis K in front."""
    result, pull = _vjp(func, *xs)
    tupled_out = isinstance(result, tuple)
    cotangents, block = ready(result if tupled_out else (result,))

    def one(*cs):
        made = pull(cs if tupled_out else cs[0])
        return made if isinstance(made, tuple) else (made,)

    made = tuple(_over(one, cotangents, chunk_size)) if block else one(*cotangents)
    return result, made if tupled else made[0]


def diagonal(func, x, check, chunk_size: int | None):
    """The output, and the diagonal of its Jacobian by torch.func; ``check(output, x)`` raises where there is none."""
    result, pull = _vjp(func, x)
    check(result, x)
    n = x.numel()
    rows = torch.eye(n, dtype=result.dtype, device=result.device).view(n, *result.shape)
    product = Vmapped(pull, "a function inside of a transform")
    parts = rows.split(chunk_size or max(n, 1))
    made = [(product(part)[0] * part).flatten(1).sum(1) for part in parts]
    return result, torch.cat(made).reshape(x.shape)
