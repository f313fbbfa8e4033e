"""What is given to a parameter Jacobian: checked, and taken apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .pairs import check_real
from .used import Used

Params = dict[str, Tensor]


def check_names(params: Params, given, what: str) -> None:
    """Raise ValueError for names that are not those of the Jacobian."""
    wrong = [name for name in given if name not in params]
    missing = [name for name in params if name not in given]
    if wrong or missing:
        names = list(params)
        raise ValueError(
            f"{what} must have the names of this Jacobian, {', '.join(names[:8])}"
            f"{', ...' if len(names) > 8 else ''}; unknown: {wrong}, missing: {missing}"
        )


def check_out(run: Used, out) -> None:
    """Raise for tensors that a Jacobian cannot be written to."""
    if run.create_graph:
        raise RuntimeError(
            "out= and create_graph=True exclude each other: a result written in place has no graph"
        )
    if not isinstance(out, dict):
        raise TypeError(
            f"out must be a dict of tensors by parameter name, got {type(out).__name__}"
        )
    check_names(run.params, out, "out")
    for name, p in run.params.items():
        t, want = out[name], (*run.y.shape, *p.shape)
        if not isinstance(t, Tensor):
            raise TypeError(f"out[{name!r}] must be a Tensor, got {type(t)}")
        if tuple(t.shape) != want or t.dtype != p.dtype or t.device != p.device:
            raise RuntimeError(
                f"out[{name!r}] must have shape {want}, dtype {p.dtype} and device {p.device}, got "
                f"{tuple(t.shape)}, {t.dtype} and {t.device}"
            )
        if t.requires_grad:
            raise RuntimeError(f"out[{name!r}] requires grad; pass a detached tensor")


def check_variances(params: Params, v) -> None:
    """Raise unless there is a real tensor of its shape for every parameter."""
    check_names(params, v, "v")
    for name, p in params.items():
        if not isinstance(v[name], Tensor) or v[name].shape != p.shape:
            got = tuple(v[name].shape) if isinstance(v[name], Tensor) else type(v[name])
            raise RuntimeError(f"v[{name!r}] must be a tensor of shape {tuple(p.shape)}, got {got}")
        if v[name].is_complex() and (not p.is_complex() or bool(v[name].imag.any())):
            raise RuntimeError(
                f"v[{name!r}] must hold variances, which are real, got {v[name].dtype}"
            )


def check_alike(params: Params, others: Params) -> None:
    """Raise unless the parameters of another Jacobian are like those of this one."""
    check_names(params, others, "other")
    for name, p in params.items():
        q = others[name]
        if (p.shape, p.dtype, p.device) != (q.shape, q.dtype, q.device):
            raise ValueError(
                f"{name!r} of other must be like this Jacobian's, {tuple(p.shape)} {p.dtype} on {p.device}, but is "
                f"{tuple(q.shape)} {q.dtype} on {q.device}"
            )


def block(params: Params, v: dict[str, Tensor]) -> int | None:
    """The length of the leading axis of a block of tangents, or None."""
    k: Any = ()
    for name, p in params.items():
        t = v[name]
        if not isinstance(t, Tensor):
            raise TypeError(f"v[{name!r}] must be a Tensor, got {type(t)}")
        check_real(f"v[{name!r}]", t, "the parameter", p)
        mine = t.shape[0] if t.dim() == p.dim() + 1 else None
        if tuple(t.shape) != (*(() if mine is None else (mine,)), *p.shape) or k not in ((), mine):
            raise RuntimeError(
                f"v[{name!r}] must have the parameter's shape {tuple(p.shape)}, or all of v one leading axis more, "
                f"got {tuple(t.shape)}"
            )
        k = mine
    return k


def split(params: Params, matrix: Tensor) -> Params:
    """The last axis of a tensor taken apart: views, or in the parameters' dtypes."""
    entries = sum(p.numel() for p in params.values())
    if not isinstance(matrix, Tensor):
        raise TypeError(f"matrix must be a Tensor, got {type(matrix)}")
    if not matrix.dim() or matrix.shape[-1] != entries:
        raise RuntimeError(
            f"matrix must have the {entries} entries of all parameters on its last axis, got shape "
            f"{tuple(matrix.shape)}"
        )
    made, start = {}, 0
    for name, p in params.items():
        part = matrix.narrow(-1, start, p.numel()).unflatten(-1, tuple(p.shape) or (1,))
        part = part if p.dim() else part.squeeze(-1)
        if part.is_complex() and not p.is_complex():
            part = part.real
        made[name] = part.to(p.dtype)
        start += p.numel()
    return made
