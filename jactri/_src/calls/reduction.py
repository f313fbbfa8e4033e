"""Linear reductions of activations over their tokens, at either end of a Jacobian.

Activations are ``(samples, *tokens, features)``. At the target a reduction is applied; at the source its transpose
takes a small tensor to a summand of the activation, so that the Jacobian in that tensor is the reduced one: autograd
and the engine see but one more sum, and no block of all tokens is ever stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..base.remedies import one_of

How: TypeAlias = str | int | Tensor | None


class Reduction(NamedTuple):
    """``how``: see `layer_jacobian`; ``end``: ``"target"`` or ``"source"``, for messages and for what samples mean."""

    how: How
    end: str

    def check(self) -> None:
        """Raise for what is no reduction."""
        how, end = self.how, self.end
        if isinstance(how, str):
            if how not in ("sum", "mean"):
                raise ValueError(one_of(f"reduce at the {end}", how, ("sum", "mean")))
        elif isinstance(how, Tensor):
            if not (1 <= how.dim() <= 3 and how.is_floating_point()):
                raise ValueError(
                    f"reduce at the {end}: weights are of floating point, (tokens,), (tokens, K) or (samples, tokens, "
                    f"K), got {tuple(how.shape)} of {how.dtype}"
                )
        elif how is not None and (isinstance(how, bool) or not isinstance(how, int)):
            raise TypeError(
                f"reduce at the {end} must be 'sum', 'mean', the number of a token, a tensor of weights, or None, got "
                f"{how!r}"
            )

    def applied(self, y: Tensor, mask: Tensor | None, name: str) -> Tensor:
        """The reduction of an activation: ``(features,)``, ``(K, features)`` with weights, or all of it."""
        how = self.how
        if how is None:
            return y
        self._check_axes(y, name)
        if isinstance(how, Tensor):
            w = self._weights(how, y, name)
            k = "k" if how.dim() > 1 else ""
            return torch.einsum(f"nt{k},ntd->{k}d", w, _selected(y, mask))
        if isinstance(how, int):
            chosen = self._token(how, y, mask, name)
            rows = y.select(1, how) if mask is None else y[chosen]
            return rows.sum(0)
        total = _selected(y, mask).flatten(0, -2).sum(0)
        return total if how == "sum" else total * (1 / self._count(y, mask, name))

    def summand(self, y: Tensor, mask: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
        """A leaf of zeros, and what of it is added to an activation: the transpose of the reduction."""
        how, d = self.how, y.shape[-1:]
        if how is None:
            leaf = _leaf(y, y.shape)
            return leaf, leaf
        self._check_axes(y, name)
        if isinstance(how, Tensor):
            w = self._weights(how, y, name)
            k, axes = ("k", w.shape[2:]) if how.dim() > 1 else ("", ())
            leaf = _leaf(y, (*axes, *d))
            spread, mine = torch.einsum(f"nt{k},{k}d->ntd", w, leaf), mask
        else:
            leaf, mine = _leaf(y, d), mask
            if isinstance(how, int):
                mine = self._token(how, y, mask, name)
                spread = leaf * (1 / y.shape[0])
            else:
                spread = leaf if how == "sum" else leaf * (1 / self._count(y, mask, name))
        return leaf, _selected(spread.expand(y.shape), mine)

    def _check_axes(self, y: Tensor, name: str) -> None:
        """Raise IndexError where there is no axis to reduce."""
        least = 2 if isinstance(self.how, str) else 3
        if y.dim() >= least and (least == 2 or y.dim() == 3):
            return
        what = "weights" if isinstance(self.how, Tensor) else repr(self.how)
        need = (
            "one token axis, (samples, tokens, features)"
            if least == 3
            else "an axis before the features"
        )
        raise IndexError(
            f"reduce at the {self.end}: {what} needs {need}, but {name!r} has shape {tuple(y.shape)}; pass None there, "
            "which reduces nothing"
        )

    def _weights(self, w: Tensor, y: Tensor, name: str) -> Tensor:
        """Weights as ``(samples, tokens)`` or ``(samples, tokens, K)``."""
        n, t = y.shape[:2]
        if w.shape[w.dim() == 3 :][0] != t or (w.dim() == 3 and w.shape[0] != n):
            raise RuntimeError(
                f"reduce at the {self.end}: weights of shape {tuple(w.shape)} do not fit {name!r} of shape "
                f"{tuple(y.shape)}; pass ({t},), ({t}, K) or ({n}, {t}, K)"
            )
        w = w.detach().to(y)
        return w if w.dim() == 3 else w.expand(n, *w.shape)

    def _token(self, i: int, y: Tensor, mask: Tensor | None, name: str) -> Tensor:
        """Which ``(samples, tokens)`` is meant: the token ``i`` of the valid ones of each sample."""
        n, t = y.shape[:2]
        valid = torch.ones(n, t, dtype=torch.bool, device=y.device) if mask is None else mask
        rank = valid.cumsum(1) - 1
        at = torch.full((n, 1), i, device=y.device) if i >= 0 else valid.sum(1, keepdim=True) + i
        chosen = (rank == at) & valid
        if (not n and self.end == "source") or not bool(chosen.any(1).all()):
            counts = valid.sum(1).tolist()
            whose = (
                f"whose samples have {min(counts)} valid tokens or more" if n else "of no samples"
            )
            raise IndexError(
                f"reduce at the {self.end}: there is no token {i} in {name!r} of shape {tuple(y.shape)}, {whose}"
            )
        return chosen

    def _count(self, y: Tensor, mask: Tensor | None, name: str) -> int:
        """How many tokens a mean is over."""
        count = y.shape[:-1].numel() if mask is None else int(mask.sum())
        if not count:
            raise ValueError(
                f"reduce at the {self.end}: 'mean' of no token, {name!r} has shape {tuple(y.shape)}"
                + ("" if mask is None else " and a mask without a valid one")
            )
        return count


def _leaf(y: Tensor, shape) -> Tensor:
    return torch.zeros(tuple(shape), dtype=y.dtype, device=y.device, requires_grad=True)


def _selected(y: Tensor, mask: Tensor | None) -> Tensor:
    """An activation with zeros where tokens are not valid: chosen, so that no infinity behind them matters."""
    return y if mask is None else torch.where(mask.unsqueeze(-1), y, 0.0)


def own(how: Any) -> Any:
    """What is asked for, of which the caller may write to tensors later."""
    return how.detach().clone() if isinstance(how, Tensor) else how


def to_file(how: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A reduction for the description of a file; a tensor goes into the file, and its name is told."""
    if not isinstance(how, Tensor):
        return how
    tensors[name] = how.clone()  # in a file, no two share their memory
    return {"tensor": name}


def from_file(told: Any, tensors: dict[str, Tensor]) -> Any:
    """A reduction, by what `to_file` told of it."""
    return tensors[told["tensor"]] if isinstance(told, dict) else told
