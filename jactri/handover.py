"""Inside of a torch.func transform (vmap, grad, ...) torch.func computes: its transforms compose with each other."""

from __future__ import annotations

import torch
from torch.func import jacfwd, jacrev, vmap

_level = torch._C._functorch.maybe_current_level
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def transforming(xs) -> bool:
    """Whether a torch.func transform is running, or a tensor belongs to one."""
    return _level() is not None or any(_wrapped(x) for x in xs)


def refuse(**given: bool) -> None:
    """Raise for an option that was given, and that no transform has."""
    for name, is_given in given.items():
        if is_given:
            raise RuntimeError(f"{name} is not available inside of a torch.func transform")


def jacobian(func, xs, tupled, strategy, strict, per_sample, return_output, chunk_size, out):
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
    if strategy == "forward-mode":
        transform = jacfwd(as_tuples, argnums, has_aux=True)
    else:
        transform = jacrev(as_tuples, argnums, has_aux=True, chunk_size=chunk_size)
    if per_sample:
        one_sample = transform

        def alone(*args):
            def batch_of_one(*row):
                ys, aux = as_tuples(*(r.unsqueeze(0) for r in row))
                return tuple(y.squeeze(0) for y in ys), tuple(y.squeeze(0) for y in aux)

            inner = jacfwd if strategy == "forward-mode" else jacrev
            return inner(batch_of_one, argnums, has_aux=True)(*args)

        one_sample = alone
        rows, ys = vmap(one_sample)(*xs)
    else:
        rows, ys = transform(*xs)
    rows = tuple(tuple(row) for row in rows) if tupled else tuple(row[0] for row in rows)
    answer = rows if tupled_out[0] else rows[0]
    if not return_output:
        return answer
    return (tuple(ys) if tupled_out[0] else ys[0]), answer


def transform(name, func, argnums, has_aux, chunk_size, randomness):
    """torch.func's own ``jacrev``, ``jacfwd`` or ``hessian``."""
    if name == "jacrev":
        return jacrev(func, argnums, has_aux=has_aux, chunk_size=chunk_size)
    if name == "hessian":  # as torch.func, forward over reverse
        func = jacrev(func, argnums, has_aux=has_aux, chunk_size=chunk_size)
    return jacfwd(func, argnums, has_aux, randomness=randomness)


def jvp(func, xs, tangents, block: bool, chunk_size: int | None):
    """`jactri.jvp` by torch.func; ``block``: the tangents have an axis K in front."""
    if not block:
        return torch.func.jvp(func, xs, tangents)

    def one(*ts):
        return torch.func.jvp(func, xs, ts)

    # the output is that of every tangent: a transform cannot tell that it is the same
    outputs, products = vmap(one, randomness="same", chunk_size=chunk_size)(*tangents)
    same = tuple(y[0] for y in outputs) if isinstance(outputs, tuple) else outputs[0]
    return same, products


def vjp(func, xs, tupled: bool, ready, chunk_size: int | None):
    """`jactri.vjp` by torch.func. ``ready(outputs)``: the cotangents, and whether they have an axis K in front."""
    result, pull = torch.func.vjp(func, *xs)
    tupled_out = isinstance(result, tuple)
    cotangents, block = ready(result if tupled_out else (result,))

    def one(*cs):
        return pull(cs if tupled_out else cs[0])

    made = vmap(one, chunk_size=chunk_size)(*cotangents) if block else one(*cotangents)
    return result, made if tupled else made[0]


def diagonal(func, x, check, chunk_size: int | None):
    """The output, and the diagonal of its Jacobian by torch.func; ``check(output, x)`` raises where there is none."""
    result, pull = torch.func.vjp(func, x)
    check(result, x)
    n = x.numel()
    rows = torch.eye(n, dtype=result.dtype, device=result.device).view(n, *result.shape)
    made = vmap(lambda row: (pull(row)[0] * row).sum(), chunk_size=chunk_size)(rows)
    return result, made.reshape(x.shape)
